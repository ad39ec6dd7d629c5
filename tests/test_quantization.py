"""Whole models in 8 and 4 bits.

Rounding to 8 bits turns a difference in the last bit, as sums of another order have it, into one of a code, and the next
layer makes more of it. So what has to be equal is compared in float64 with exact products, in the first flow step: later
ones go through guidance in float32.
"""

import numpy as np
import pytest
import torch
from adapters import BOTH, adapted
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rounding import rounded, unpacked
from support import CHECKPOINT, ODD, Poisoned, cases, draw_profile, examples, relative
from torch import Tensor

import bagel_opt
from bagel_opt.cli.commands import main
from bagel_opt.devices import check_kinds
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.model import quantized
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.ops import TorchOps
from bagel_opt.model.quantized import to_codes, to_groups
from bagel_opt.quantization import KINDS, PARTS, kinds_of_parts
from bagel_opt.runtime import torch_setup
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.sampling.plan import fit_profile
from bagel_opt.sampling.planning import make_plan

ALL = cases()
named = {case.name: case for case in ALL}
# The largest relative error of a guided velocity in all steps of a golden case: of a text alone; of a text with guidance; of
# an edit. Random weights of 64 channels show more of it than trained ones.
ERRORS = {
    ("gen", "fp8"): (0.0542, 0.137, 0.203),
    ("und", "fp8"): (0.0209, 0.0541, 0.0532),
    ("vit", "fp8"): (0, 0, 0.0382),
    ("gen", "int8"): (0.0146, 0.0456, 0.0650),
    ("und", "int8"): (0.0048, 0.0157, 0.0156),
    ("vit", "int8"): (0, 0, 0.0152),
    ("gen", "int4"): (0.120, 0.190, 0.220),
    ("und", "int4"): (0.061, 0.150, 0.170),
    ("vit", "int4"): (0, 0, 0.200),
    ("embeddings", "fp8"): (0.0096, 0.034, 0.0136),
    ("embeddings", "int8"): (0.0016, 0.0046, 0.0029),
    ("embeddings", "int4"): (0.020, 0.079, 0.038),
    **dict.fromkeys([("head", "fp8"), ("head", "int8"), ("head", "int4")], (0, 0, 0)),  # a picture has no use for it
}
CASES = ("text_to_image_no_cfg", "text_to_image", "image_editing")


def exact_product(x_MC, x_scale_M, codes_NC, scale_N, bias_N, dtype) -> Tensor:
    """In float64, which holds sums of such products to their last bit, in whatever order."""
    out_MN = (x_MC.double() @ codes_NC.double().T) * scale_N.double()
    out_MN = out_MN if x_scale_M is None else out_MN * x_scale_M.double()[:, None]
    return (out_MN if bias_N is None else out_MN + bias_N.double()).to(getattr(torch, dtype))


def exact(quantization=None, runtime=TorchRuntime, folder=CHECKPOINT):
    """A checkpoint's model in float64. Its products are exact where `exact_products` is."""
    checkpoint = Checkpoint(folder)
    network = checkpoint.load(torch.device("cpu"), torch.float64, kinds=kinds_of_parts(quantization))
    network.ops = TorchOps("sdpa")
    return bagel_opt.Model(runtime(prepare(network)), checkpoint.config, checkpoint.tokenizer)


@pytest.fixture(scope="module")
def exact_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "quantized_product", exact_product)
        yield


def first(model, case, **changes):
    """The velocity of the first flow step, or the text."""
    events = []
    one = {} if case.options["output"] == "text" else {"num_timesteps": 2}
    outputs = model.run(case.inputs, on_step=events.append, **{**case.options, **one, **changes})
    return events[0].v_t if events else outputs[0]


def same(got, want, tolerance=1e-6):
    return got == want if isinstance(want, str) else relative(got, want) < tolerance


# ---- what is computed


INSIDE = {
    "und": lambda model: [layer.und for layer in model.llm.layers],
    "gen": lambda model: [layer.gen for layer in model.llm.layers],
    "vit": lambda model: [*model.vit_encoder.layers],
    "head": lambda model: [model.llm.lm_head],
    "embeddings": lambda model: [model.llm.embed],
}


def stood_for(weight: Tensor, kind: str) -> Tensor:
    """The numbers that its codes stand for, in float64."""
    if kind == "int4":
        return torch.from_numpy(unpacked(*to_groups(weight), weight.shape[1]))
    codes, scale = rounded(weight, kind)
    return torch.from_numpy(codes * scale[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "folder", [CHECKPOINT, pytest.param(ODD / "checkpoint", marks=pytest.mark.second)], ids=["golden", "odd"]
)
def test_as_a_plain_reference(exact_products, monkeypatch, folder, part, kind):
    """The products or the table of that part in that kind, all of them, and no others."""
    got, want = exact({part: kind}, folder=folder), exact(folder=folder)
    held = Linear | Embedding
    chosen = {m for module in INSIDE[part](want.runtime.model) for m in module.modules() if isinstance(m, held)}
    assert {m for m in got.runtime.model.modules() if isinstance(m, held) and m.quantized is not None} == {
        m for module in INSIDE[part](got.runtime.model) for m in module.modules() if isinstance(m, held)
    }
    if part == "embeddings":
        with torch.no_grad():
            table = want.runtime.model.llm.embed.weight
            table.copy_(stood_for(table, kind))
    plain = Linear.forward

    def forward(self, x, share_BK=None):
        if self not in chosen:
            return plain(self, x, share_BK)
        lone = x.ndim == 2 or x.shape[1] == 1  # a token that is being decoded
        if kind == "int4" or lone:
            out = x @ stood_for(self.weight, kind).T
        else:
            (x_codes, x_scale), (codes, scale) = (rounded(tensor, kind) for tensor in (x, self.weight))
            out = torch.from_numpy((x_codes @ codes.T) * x_scale[..., None] * scale)
        return out if self.bias is None else out + self.bias

    monkeypatch.setattr(Linear, "forward", forward)
    for case in cases(folder.parent):
        if case.name in ("image_editing", "image_understanding"):  # all parts are at work in one or the other
            assert same(first(got, case), first(want, case))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_guided_velocities(part, kind):
    """As stated, and not much less: a part that were not quantised would have none."""
    model = bagel_opt.load(CHECKPOINT, device="cpu", quantization={part: kind})
    for name, stated in zip(CASES, ERRORS[part, kind], strict=True):
        events = []
        model.run(named[name].inputs, on_step=events.append, **named[name].options)
        error = named[name].velocity_error(events)
        assert stated / 2 <= error < 1.5 * stated if stated else error < 1e-4


# ---- shapes, neighbours, what unused slots hold


@pytest.fixture(
    scope="module",
    params=["fp8", "int8", {"gen": "fp8", "und": "int4", "vit": "int8", "head": "int8", "embeddings": "int8"}],
    ids=str,
)
def alone(request, exact_products):
    """A model, and what it gives each case by itself in exactly fitting shapes."""
    model = exact(request.param, Poisoned)
    return model, [first(model, case) for case in ALL]


@examples(10)
@given(data=st.data())
def test_shapes_neighbours_and_garbage_change_nothing(alone, data):
    model, wanted = alone
    chosen = data.draw(st.lists(st.integers(0, len(ALL) - 1), min_size=1, max_size=5))
    events = [[] for _ in chosen]
    requests = [ALL[i].request(on_step=seen.append) for i, seen in zip(chosen, events, strict=True)]
    plans = [make_plan(request, model.config, model.tokenizer) for request in requests]
    fixed = [draw_profile(data, fit_profile(plans, round_up=False))]
    outputs = bagel_opt.Model(model.runtime, model.config, model.tokenizer, fixed).run_many(requests)
    for i, output, seen in zip(chosen, outputs, events, strict=True):
        assert same(seen[0].v_t if seen else output[0], wanted[i])


def test_a_neighbour_a_thousand_times_larger(alone):
    """In the same batch, in all of its steps and those of its guidance."""
    model, wanted = alone
    case, number = named["text_to_image"], ALL.index(named["text_to_image"])
    huge = case.request(noise=1000 * case.options["noise"])
    events = []
    model.run_many([huge, case.request(on_step=events.append), huge])
    assert same(events[0].v_t, wanted[number])


@pytest.mark.parametrize("step_cache", ["taylorseer", "teacache"])
def test_step_caches_in_a_batch(alone, step_cache):
    """One who has it beside one who has none."""
    model, wanted = alone
    pair, events = [named["text_to_image"], named["image_editing"]], [[], []]
    caches = zip(pair, events, (step_cache, None), strict=True)
    model.run_many([case.request(on_step=seen.append, step_cache=cache) for case, seen, cache in caches])
    for case, seen in zip(pair, events, strict=True):
        assert len(seen) == case.data["flow_steps"]
        assert same(seen[0].v_t, wanted[ALL.index(case)])


@pytest.mark.parametrize("kind", KINDS)
def test_all_together_are_as_near_to_the_official_ones_as_alone(kind):
    """In float32, where the same rounding may fall otherwise."""
    events = {name: [] for name in CASES}
    model = bagel_opt.load(CHECKPOINT, device="cpu", quantization=kind)
    model.run_many([named[name].request(on_step=seen.append) for name, seen in events.items()])
    for name, stated in zip(CASES, ERRORS["gen", kind], strict=True):
        assert named[name].velocity_error(events[name]) < 1.5 * stated


@pytest.mark.second
def test_compiled_code_is_as_near_too():
    """In one model; in 4 bits, what export/test_packages.py compiles, and the bundle that starts warm."""
    kinds, case, events = {"gen": "int8", "und": "fp8"}, named["text_to_image"], []
    model = bagel_opt.load(CHECKPOINT, device="cpu", quantization=kinds, backend="compile")
    model.run(case.inputs, on_step=events.append, **case.options)
    assert 0.01 < case.velocity_error(events) < 1.5 * max(ERRORS[one][1] for one in kinds.items())


# ---- beside other arguments of load


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted(seed=2, targets=BOTH, r=6).save_pretrained(folder)
    return folder


def test_merged_adapters_are_rounded_with_the_weights(adapter):
    plain = bagel_opt.load(CHECKPOINT, device="cpu", lora=adapter).runtime.model
    got = bagel_opt.load(CHECKPOINT, device="cpu", lora=adapter, quantization="int8").runtime.model
    for layer, want in zip(got.llm.layers, plain.llm.layers, strict=True):
        for part in ("qkv", "o", "gate_up", "down"):
            held, weight = getattr(layer.gen, part).quantized, getattr(want.gen, part).weight
            assert all(map(torch.equal, (held.codes, held.scale), to_codes(weight, torch.int8)))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_apart_are_not_rounded(exact_products, adapter, kind):
    """They add in full precision what they add to a plain product."""
    got, plain = exact(kind), exact()
    for model in (got, plain):
        model.set_adapters({"a": adapter})
    product, other = (model.runtime.model.llm.layers[1].gen.down for model in (got, plain))
    x = torch.randn(2, 3, product.in_features, dtype=torch.float64)
    share = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    assert same(product(x, share) - product(x), other(x, share) - other(x))
    assert not same(product(x, share), product(x), 1e-2)
    case, none = named["text_to_image"], exact(kind)
    assert same(first(got, case, adapters={}), first(none, case))
    assert not same(first(got, case), first(none, case), 1e-2)


# ---- what is no quantisation

BAD = ["fp4", "", 8, ["fp8"], {"gen": "fp4"}, {"vae": "fp8"}, {"gen": None}, {"gen": ["fp8"]}, {1: "fp8"}, "x" * 9999]


@pytest.mark.parametrize("quantization", BAD, ids=lambda value: str(value)[:20])
def test_bad_values(quantization):
    with pytest.raises(
        ValueError, match=r"quantization=.*; allowed: 'fp8' or 'int8' or 'int4', or an object from 'und', "
    ) as told:
        bagel_opt.load(CHECKPOINT, device="cpu", quantization=quantization)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


def test_kinds_of_parts():
    assert kinds_of_parts(None) == kinds_of_parts({}) == {}
    assert kinds_of_parts("fp8") == {"und": "fp8", "gen": "fp8"}
    assert kinds_of_parts({"vit": "int8"}) == {"vit": "int8"}


@pytest.mark.parametrize(
    ("text", "quantization"), [("fp8", "fp8"), ("gen=fp8,und=int8", {"gen": "fp8", "und": "int8"})], ids=str
)
def test_the_command_line(text, quantization, tmp_path, capsys):
    out = tmp_path / "cat.png"
    size = {"height": 64, "width": 64, "num_timesteps": 3, "seed": 0}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
    assert (
        main(["generate", "a cat", "--checkpoint", str(CHECKPOINT), "--quantization", text, "--out", str(out), *flags])
        == 0
    )
    want = bagel_opt.load(CHECKPOINT, device="cpu", quantization=quantization).generate("a cat", **size)
    assert np.array_equal(Image.open(out), want)
    assert not np.array_equal(want, bagel_opt.load(CHECKPOINT, device="cpu").generate("a cat", **size))


@pytest.mark.parametrize("text", ["fp4", "gen=fp4", "vae=fp8", "gen=", "=fp8", "gen=fp8,und", "gen=fp8,"])
def test_the_command_line_refuses(text, capsys):
    assert main(["chat", "a", "--checkpoint", str(CHECKPOINT), "--quantization", text]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bagel-opt: quantization=")
    assert err.count("\n") == 1


def test_a_part_named_twice(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "a", "--quantization", "gen=fp8,gen=int8"])
    assert "names a part twice" in capsys.readouterr().err


def test_what_a_gpu_needs(monkeypatch):
    """Products have kernels of their own there; rows of a table are read by any GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    registered = []
    monkeypatch.setattr(torch_setup, "register_kernels", registered.append)
    check_kinds(torch.device("cuda"), {"embeddings": "fp8"})
    with pytest.raises(
        ValueError, match=r"quantization='fp8' needs a GPU of compute capability 8\.9, and Some GPU has"
    ):
        check_kinds(torch.device("cuda"), {"embeddings": "int8", "gen": "fp8"})
    for part, count in ("embeddings", 0), ("head", 1):
        bagel_opt.load(CHECKPOINT, device="cpu", quantization={part: "int8"})
        assert len(registered) == count
