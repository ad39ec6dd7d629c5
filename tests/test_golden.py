"""The official code's answers, from every runtime."""

import pytest
from bundles import BACKENDS
from support import CHECKPOINT, ODD, cases, check_together, prefill, relative

from bagel_opt.sampling.contexts import Block
from bagel_opt.sampling.plan import fit_profile
from bagel_opt.sampling.planning import THINK_IMAGE, THINK_TEXT, make_plan

SLOW = ("compile", "aoti")  # compiling takes a minute, and two
FEW = ("text_only",)  # of compiled programs in the first tier


def tier(backend, case=None):
    """The second checkpoint goes through what every other runtime is traced from, and ONNX."""
    if backend == "aoti":  # whose packages have tests of their own in the first tier
        return [pytest.mark.second]
    if case is None:
        return [pytest.mark.second] if backend in SLOW else []
    late = case.checkpoint != CHECKPOINT if backend == "onnx" else backend in SLOW and case.name not in FEW
    return [pytest.mark.second] if late else []


CASES = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(b, case, marks=tier(b, case), id=f"{b}-{case.folder.parent.parent.name}-{case.name}")
        for b in BACKENDS
        for case in cases() + (cases(ODD) if b in ("eager", "onnx") else [])
    ],
)
EACH = pytest.mark.parametrize("backend", [pytest.param(b, marks=tier(b)) for b in BACKENDS])
named = {case.name: case for case in cases()}


@CASES
def test_answers(load, backend, case):
    model = load(case.checkpoint, backend)
    events, tokens = [], []
    outputs = model.run(case.inputs, on_step=events.append, on_token=tokens.append, **case.options)
    assert len(events) == case.data["flow_steps"]
    assert case.velocity_error(events) < 1e-4
    case.check_outputs(outputs)
    for generated in case.series("gen_text.{}.tokens"):
        assert tokens == generated.tolist()[1:]  # the first is the start token


@CASES
def test_keys_and_values_of_every_prefill(load, backend, case):
    """All that the official code fills, contexts that bagel_opt shares or never needs included."""
    model = load(case.checkpoint, backend)
    plan = make_plan(case.request(), model.config, model.tokenizer)
    contexts = official_contexts(case, model, plan)
    stored = {name.rpartition(".")[0] for name in case.tensors if "prefill" in name}
    assert stored or "taylorseer" in case.name
    for name in stored:
        keys, values = prefill(model, plan, contexts[name], model.profile or fit_profile([plan], round_up=False))
        for got, kind in ((keys, "k"), (values, "v")):
            want = case.tensors[f"{name}.{kind}"]
            assert got.shape == want.shape
            assert relative(got, want) < 1e-4, name


@EACH
def test_no_state_survives_taylorseer(load, backend):
    """The official code keeps answering with its predictions after a request that used them."""
    model, plain, cached = load(CHECKPOINT, backend), named["text_to_image"], named["taylorseer"]
    model.run(cached.inputs, **cached.options)
    events = []
    outputs = model.run(plain.inputs, on_step=events.append, **plain.options)
    assert plain.velocity_error(events) < 1e-4
    plain.check_outputs(outputs)


@EACH
def test_all_together_equals_one_by_one(load, backend):
    model = load(CHECKPOINT, backend)
    check_together(model, model)


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
