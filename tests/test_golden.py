"""The official code's answers, from every runtime."""

import numpy as np
import pytest
import torch
from support import CHECKPOINT, cases, relative

import bagel_opt
from bagel_opt import Profile
from bagel_opt.sampling.engine import Context, Engine, Job
from bagel_opt.sampling.plan import THINK_IMAGE, THINK_TEXT, Block, fit_profile, make_plan

CASES = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


@CASES
def test_answers(model, case):
    events, tokens = [], []
    outputs = model.run(case.inputs, on_step=events.append, on_token=tokens.append, **case.options)
    assert len(events) == case.data["flow_steps"]
    assert case.velocity_error(events) < 1e-4
    case.check_outputs(outputs)
    for generated in case.series("gen_text.{}.tokens"):
        assert tokens == generated.tolist()[1:]  # the first is the start token


@CASES
def test_keys_and_values_of_every_prefill(model, case):
    """All that the official code fills, contexts that bagel_opt shares or never needs included."""
    plan = make_plan(case.request(), model.config, model.tokenizer)
    contexts = official_contexts(case, model, plan)
    stored = {name.rpartition(".")[0] for name in case.tensors if "prefill" in name}
    assert stored or case.name == "taylorseer"
    for name in stored:
        keys, values = prefill(model, plan, contexts[name])
        for got, kind in ((keys, "k"), (values, "v")):
            want = case.tensors[f"{name}.{kind}"]
            assert got.shape == want.shape
            assert relative(got, want) < 1e-4, name


def test_no_state_survives_taylorseer(model):
    """The official code keeps answering with its predictions after a request that used them."""
    plain, cached = (next(c for c in cases() if c.name == name) for name in ("text_to_image", "taylorseer"))
    model.run(cached.inputs, **cached.options)
    events = []
    outputs = model.run(plain.inputs, on_step=events.append, **plain.options)
    assert plain.velocity_error(events) < 1e-4
    plain.check_outputs(outputs)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_all_together_equals_one_by_one(eager, rows):
    model = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("test", rows, 768, 64, 64, 64))
    check_together(eager, model)


def test_all_together_from_the_bundle(bundle):
    model = bagel_opt.load(bundle)
    check_together(model, model)


def check_together(alone, together):
    events = [[] for _ in cases()]
    requests = [case.request(on_step=seen.append) for case, seen in zip(cases(), events, strict=True)]
    for case, outputs, seen in zip(cases(), together.run_many(requests), events, strict=True):
        expected = []
        case.check_outputs(outputs)
        wanted = alone.run(case.inputs, on_step=expected.append, **case.options)
        for got, want in zip(outputs, wanted, strict=True):
            if isinstance(want, str):
                assert got == want
            else:
                assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1
        for got, want in zip(seen, expected, strict=True):
            assert relative(got.x_t, want.x_t) < 1e-5
            assert relative(got.v_t, want.v_t) < 1e-5


def official_contexts(case, model, plan):
    """The blocks behind each stored prefill, counted as the official code calls them: main first, then cfg_img."""
    found, counts = {}, {"text": 0, "vae": 0, "vit": 0}
    main, cfg_img, draws = [], [], plan.draws

    def fill(context, block):
        context.append(block)
        found[f"{block.kind}_prefill.{counts[block.kind]}"] = list(context)
        counts[block.kind] += 1

    def text(content):
        ids = model.tokenizer.block(content)
        return Block("text", len(ids), ids)

    if plan.options.think:
        fill(main, text(THINK_IMAGE if draws else THINK_TEXT))
        fill(cfg_img, main[0])
    images = iter(block for block in plan.main if block.kind != "text")
    for item in case.data["input"]:
        if "text" in item:
            assert text(item["text"]).ids == tuple(item["token_ids"])
            fill(main, text(item["text"]))
            fill(cfg_img, main[-1])
        else:
            for _ in range(2 if draws else 1):
                fill(main, next(images))
    if draws and plan.options.think:
        fill(main, text(case.outputs[0]))
    return found


def prefill(model, plan, blocks):
    """Keys and values [layers, tokens, heads, channels] of a context, in the official order of tokens."""
    profile = model.profile or fit_profile([plan], round_up=False)
    engine = Engine(model.runtime, model.config, model.tokenizer, profile)
    engine.caches[0] = model.runtime.caches(profile.rows, profile.slots)
    context = Context(0, profile.rows - 1)
    for _ in engine._prefill(Job(0, plan, context, context, context), context, blocks):
        pass
    order, start = [], 0
    for block in blocks:
        slots = list(range(start, start + block.length))
        if block.kind != "text":  # stored with both markers first
            slots = [slots[0], *slots[2:], slots[1]]
        order += slots
        start += block.length
    layers = model.config.llm.num_hidden_layers
    stacked = torch.stack([torch.as_tensor(model.runtime.host(c, context.row)) for c in engine.caches[0]])
    return stacked[:layers, order], stacked[layers:, order]
