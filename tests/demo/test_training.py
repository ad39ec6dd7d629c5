"""The training of the model that ships: batches, losses through inference's own modules, interruption."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

import bagel_opt
from bagel_opt.api import Model
from bagel_opt.demo import __main__, data, evaluate, layout, loop, objective, samples, texts, train
from bagel_opt.demo.world import draw
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.sampling.planning import THINK_IMAGE, THINK_TEXT
from bagel_opt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    layout.write_tokenizer(folder, [THINK_TEXT, THINK_IMAGE, *texts.corpus(Random(0), 50)])
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights that all matter."""
    model = train.fresh(layout.demo_config(tokenizer.special), seed=1)
    with torch.no_grad():
        model.latent_out.weight.normal_(std=0.1)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.llm.lm_head.weight.normal_(std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inference(model, tokenizer):
    return Model(TorchRuntime(prepare(model)), model.config, tokenizer)


@pytest.fixture(scope="module")
def edit():
    return texts.sample_edit(Random(3), held_out=False, kind="move")


def encoded(model, picture, noise):
    """Patches and latent tokens of a picture, as one of a batch."""
    x = objective.pixels(torch.from_numpy(np.array(picture))[None], torch.float32)
    mean, log_variance = model.vae.encode(x).chunk(2, dim=1)
    z = model.config.vae.scale_factor * (mean + (0.5 * log_variance).exp() * noise - model.config.vae.shift_factor)
    return objective.tokens(x, model.config.vit.patch_size), objective.tokens(z, 2)


@pytest.mark.parametrize("kind", ["draw", "edit", "think_draw", "think_edit", "nothing"])
def test_training_gives_the_velocities_of_inference(kind, model, inference, tokenizer, edit):
    """One pass over a whole padded sequence with one mask is what inference computes block by block."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 64, generator=generator)
    vae_noise = torch.randn(1, 16, 16, 16, generator=generator)
    picture, row, seen = draw(edit.before), data.Row(tokenizer), []
    options = {"noise": noise, "num_timesteps": 3, "cfg_text_scale": 1.0, "on_step": seen.append}
    think, edits = kind.startswith("think"), kind.endswith("edit")
    inputs = [picture, edit.text] if edits else [edit.text]
    if kind == "nothing":  # the text guidance's row: an empty context
        options |= {"cfg_text_scale": 100.0, "cfg_img_scale": 1.0, "cfg_renorm_min": 1.0}
    if think:
        options |= {"think": True, "max_think_tokens": 9}
        row.text(THINK_IMAGE)
    if edits:
        options["vae_noise"] = vae_noise
        row.image(0, "clean", "vit")
    if kind != "nothing":
        row.text(edit.text)
    outputs = inference.run(inputs, **options)
    if think:
        row.text(outputs[0])
    row.image(0, "noisy")
    shape = data.SHAPES["think" if think else "edit" if edits else "draw"]
    packed = data.pack([row, row], shape)
    patches, latents = encoded(model, picture, vae_noise)
    for event in seen:
        t = torch.full((2,), event.t)
        x_t = event.x_t[None].expand(2, -1, -1)
        clean = latents.expand(2, -1, -1) if shape.clean else None
        _, hidden = objective.forward(model, packed, patches, clean, x_t, t)
        got, want = model.velocity(hidden)[1], event.v_t
        if kind == "nothing":  # v = u + 100 (c - u) with the prompt's velocity c
            told = data.Row(tokenizer).text(edit.text).image(0, "noisy")
            _, hidden = objective.forward(model, data.pack([told], shape), patches, clean, x_t[:1], t[:1])
            got = got + 100 * (model.velocity(hidden)[0] - got)
        assert (got - want).norm() / want.norm() < (1e-4 if kind == "nothing" else 1e-5)


@pytest.mark.parametrize("think", [False, True])
def test_training_predicts_the_tokens_of_inference(think, model, inference, tokenizer, edit):
    picture = draw(edit.before)
    wanted = []
    inference.understand(picture, "what is it?", think=think, max_think_tokens=12, on_token=wanted.append)
    start, end = tokenizer.special.bos_token_id, tokenizer.special.eos_token_id
    row = data.Row(tokenizer)
    if think:
        row.text(THINK_TEXT)
    row.image(0, "vit").text("what is it?").block((start, *wanted, end), learn=True)
    packed = data.pack([row], data.SHAPES["think" if think else "ask"])
    patches, latents = encoded(model, picture, 0)
    drawn = (latents, latents, torch.ones(1)) if think else (None, None, None)  # slots that this row does not use
    hidden, _ = objective.forward(model, packed, patches, *drawn)
    logits = model.llm.lm_head(model.llm.norm_und(hidden))
    learned = packed.labels != data.IGNORED
    assert len(wanted) > 3
    assert packed.labels[learned].tolist() == [*wanted, end]
    assert logits.argmax(-1)[learned][:-1].tolist() == wanted


def test_lookups_have_the_gradient_of_embeddings():
    table, ids = torch.randn(7, 3, requires_grad=True), torch.tensor([[0, 2, 2], [6, 2, 0]])
    gradient = torch.randn(2, 3, 3)
    (want,) = torch.autograd.grad(torch.nn.functional.embedding(ids, table), table, gradient)
    out = objective.Lookup.apply(ids, table)
    (got,) = torch.autograd.grad(out, table, gradient)
    assert torch.equal(out, table[ids])
    assert torch.allclose(got, want)


def test_batches_follow_from_seed_and_step_alone(tokenizer):
    first, second = (data.Batches(tokenizer, seed=5, pairs=3, steps=4) for _ in range(2))
    second[0]
    for got, want in zip(loop.leaves(second[2]), loop.leaves(first[2]), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(first[2][0], first[3][0])
    assert not torch.equal(first[2][0], data.Batches(tokenizer, seed=6, pairs=3, steps=4)[2][0])


def test_training_never_sees_a_held_out_combination(monkeypatch, tokenizer):
    seen = []
    draw_scene = data.draw
    monkeypatch.setattr(data, "draw", lambda scene: seen.append(scene) or draw_scene(scene))
    data.Batches(tokenizer, seed=0, pairs=200, steps=1)[0]
    train.Pictures(seed=0, count=200, steps=1)[0]
    assert len(seen) == 600
    assert not any(scene.held_out for scene in seen)


def test_a_row_that_is_too_long_is_refused(tokenizer):
    row = data.Row(tokenizer).text("a red circle " * 40)
    with pytest.raises(ValueError, match="text tokens; the shape has 64"):
        data.pack([row], data.SHAPES["draw"])


@pytest.fixture
def small(monkeypatch):
    """Settings and sizes that train in seconds."""
    corpus = texts.corpus
    monkeypatch.setattr(texts, "corpus", lambda rng, count: corpus(rng, count // 10))
    few = {"vae_steps": 2, "vae_batch": 1, "steps": 2, "refine_steps": 2, "pairs": 1}
    return loop.Settings(**few, workers=0, save_every=1, log_every=1, sheets=0)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, small):
    whole = train.train(tmp_path / "whole", small, "cpu")
    with pytest.raises(loop.Stopped, match=r"vae: stopped after step 1 of 2"):
        train.train(tmp_path / "parts", small, "cpu", stop_after=0)
    for stage in ("transformer", "refine"):
        with pytest.raises(loop.Stopped, match=rf"{stage}: stopped after step 1 of 2"):
            train.train(tmp_path / "parts", small, "cpu", stop_after=0)
    parts = train.train(tmp_path / "parts", small, "cpu")
    for name in ("ema.safetensors", "ae.safetensors", "tokenizer.json", "config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    losses = [list(map(json.loads, (tmp_path / run / "log.jsonl").open())) for run in ("whole", "parts")]
    keys = [{(e["stage"], e.get("step"), e.get("error"), e.get("draw_flow")) for e in run} for run in losses]
    assert keys[0] == keys[1]


@pytest.mark.second
def test_training_lowers_the_losses_and_writes_a_checkpoint(tmp_path, small, monkeypatch):
    few = {"num_timesteps": 2}  # of the pictures on the sheets
    monkeypatch.setattr(samples, "Request", lambda *given, **more: bagel_opt.Request(*given, **{**more, **few}))
    settings = replace(small, vae_steps=6, vae_batch=2, steps=6, pairs=2, rate=2e-3, sheets=1)
    folder = train.train(tmp_path, settings, "cpu")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    for stage, loss in (("vae", "error"), ("transformer", "think_text"), ("transformer", "draw_flow")):
        values = [entry[loss] for entry in log if entry["stage"] == stage and loss in entry]
        assert sum(values[-3:]) < sum(values[:3])
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24e6
    assert len(list(tmp_path.glob("*.png"))) == 3
    picture = bagel_opt.load(folder).generate("a red circle", num_timesteps=3, seed=0)
    assert picture.size == (128, 128)


def test_bad_arguments_end_in_one_line(tmp_path, small, capsys, monkeypatch):
    def status(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        return stopped.value.code, capsys.readouterr().err

    assert status(train, "--out", tmp_path, "--device", "tpu") == (
        1,
        "bagel-opt: device='tpu'; allowed are 'cpu', 'cuda' and 'cuda:N'\n",
    )
    for module in (evaluate, __main__):
        options = ["--checkpoint", "/nowhere"] if module is __main__ else ["/nowhere"]
        code, said = status(module, *options, *(["--out", tmp_path] if module is __main__ else []))
        assert code == 1
        assert said.startswith("bagel-opt: /nowhere is no folder")
        assert said.count("\n") == 1
    (tmp_path / "vae.state.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"vae\.state\.safetensors is damaged .*; remove it"):
        train.train(tmp_path, small, "cpu")


def test_a_step_with_broken_gradients_changes_nothing_and_is_counted():
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    weights = loop.Weights(parameters, 0.9)
    for step, gradient in enumerate((1.0, float("nan"), float("inf"))):
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        weights.step(0.1, step)
        if step == 0:
            first = [p.detach().clone() for p in parameters]
            assert not torch.equal(first[0], torch.ones(2, 2))
    assert weights.skipped == 2
    assert all(map(torch.equal, parameters, first))


def test_a_run_whose_gradients_stay_broken_ends(tmp_path):
    run = loop.Run(tmp_path, loop.Settings(vae_steps=4, workers=0, log_every=2, sheets=0), torch.device("cpu"), 1e9)
    parameter = torch.nn.Parameter(torch.ones(2))

    def compute(batch):
        (parameter * float("nan")).sum().backward()
        return {}

    with pytest.raises(FloatingPointError, match="vae: 2 of 2 steps had gradients that are not finite"):
        run.stage("vae", loop.Weights([parameter], 0.9), 4, 0.1, range(4), lambda batch, _: batch, compute, print)
