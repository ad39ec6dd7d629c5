"""Adapters that stay apart from the weights: each request's own, in common batches, as if they were merged."""

import numpy as np
import pytest
import torch
from adapters import BOTH, adapted
from PIL import Image
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile, Request
from bagel_opt.errors import BundleError, CheckpointError
from bagel_opt.files.checkpoint import published_names
from bagel_opt.files.lora import Lora
from bagel_opt.model.linear import Linear, LowRank
from bagel_opt.runtime import adapters as attaching

SETTINGS = {"seed": 1, "num_timesteps": 4, "height": 64, "width": 64, "cfg_interval": (0.0, 1.0)}
PROFILE = Profile("tiny", rows=8, slots=320, text=16, patches=64, latents=64)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three adapters: of the generation expert, of both, and of other ranks in some of its modules."""
    home = tmp_path_factory.mktemp("adapters")
    adapted(seed=1).save_pretrained(home / "a")
    adapted(seed=2, targets=BOTH, r=6).save_pretrained(home / "b")
    patterns = {"rank_pattern": {"mlp_moe_gen.down_proj": 2}, "use_rslora": True}
    adapted(seed=3, targets=["q_proj_moe_gen", "mlp_moe_gen.down_proj", "mlp.up_proj"], **patterns).save_pretrained(
        home / "c"
    )
    return {name: home / name for name in "abc"}


@pytest.fixture
def model(places):
    found = bagel_opt.load(CHECKPOINT, device="cpu", profile=PROFILE)
    found.set_adapters({name: (place, 0) for name, place in places.items()})
    return found


def velocities(model, inputs=("a red circle",), **options):
    seen = []
    model.run(inputs, on_step=lambda event: seen.append(np.asarray(event.v_t)), **SETTINGS | options)
    return np.stack(seen)


def close(got, want, tolerance=1e-5):
    return np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("wanted", [{"a": 1.0}, {"b": -0.7}, {"c": 2}, {"a": 0.5, "b": 1, "c": 0.25}], ids=str)
@pytest.mark.parametrize("inputs", [("a red circle",), (Image.new("RGB", (64, 48), "red"), "make it blue")], ids=len)
def test_apart_as_merged(model, places, inputs, wanted):
    merged = bagel_opt.load(CHECKPOINT, device="cpu", lora=[(places[name], factor) for name, factor in wanted.items()])
    want = velocities(merged, inputs)
    assert close(velocities(model, inputs, adapters=wanted), want)
    assert not close(velocities(model, inputs, adapters={}), want, 1e-2)


def test_velocities_are_those_of_pefts_own_products(model, places, monkeypatch):
    """The adapted layers of a model, each computed by peft's modules."""
    theirs = bagel_opt.load(CHECKPOINT, device="cpu")
    tree, forward, used = adapted(seed=2, targets=BOTH, r=6).base_model.model, Linear.forward, set()
    named = {module: f"{name}.weight" for name, module in theirs.runtime.model.named_modules()}

    def by_peft(self, x, share_BK=None):
        if not named.get(self, "").startswith("llm.layers."):
            return forward(self, x, share_BK)
        parts = [tree.get_submodule(part.removesuffix(".weight")) for part in published_names(named[self])]
        used.update(part for part in parts if hasattr(part, "lora_A"))
        out = torch.cat([part(x) for part in parts], dim=-1)
        return out if self.bias is None else out + self.bias

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(Linear, "forward", by_peft)
        want = velocities(theirs)
    assert len(used) > 20
    assert close(velocities(model, adapters={"b": 1}), want)
    assert close(velocities(bagel_opt.load(CHECKPOINT, device="cpu", lora=places["b"])), want)


def test_text_is_written_with_them(model, places):
    merged = bagel_opt.load(CHECKPOINT, device="cpu", lora=[places["b"]])
    texts = [
        m.chat("hello", max_think_tokens=12, **given) for m, given in ((merged, {}), (model, {"adapters": {"b": 1}}))
    ]
    assert texts[0] == texts[1] != model.chat("hello", max_think_tokens=12)


def test_none_named_is_none(model):
    plain = bagel_opt.load(CHECKPOINT, device="cpu", profile=PROFILE)
    for given in ({}, {"adapters": {}}, {"adapters": {"a": 0}}):
        assert close(velocities(model, **given), velocities(plain), 1e-6)


def test_factors_count_where_a_request_names_none(model, places):
    want = velocities(model, adapters={"a": 0.5, "b": 1})
    model.set_adapters({"b": places["b"], "a": (places["a"], 0.5), "c": (places["c"], 0)})
    assert close(velocities(model), want)
    assert close(velocities(model, adapters={"c": 1}), velocities(model, adapters={"c": 1, "a": 0, "b": 0}), 1e-6)


def test_a_batch_of_different_adapters(model):
    """Each request as alone, whoever shares its batch."""
    wanted = [{}, {"a": 1}, {"b": 1}, {"c": 1}, {"a": 0.5, "b": 0.5}, {"b": -1}, {}, {"c": 0.3}]
    texts = ["a red circle", "a blue star", "a tree", "x", "a red circle", "a blue star", "a tree", "x"]

    def requests(seen):
        for number, (text, adapters) in enumerate(zip(texts, wanted, strict=True)):
            mine = seen.setdefault(number, [])
            settings = SETTINGS | {"seed": number, "think": number == 4, "max_think_tokens": 9}
            yield Request([text], adapters=adapters, on_step=lambda e, m=mine: m.append(np.asarray(e.v_t)), **settings)

    together, alone = {}, {}
    model.run_many(requests(together))
    for request in requests(alone):
        model.run_many([request])
    for number in range(8):
        assert len(alone[number]) == 3
        assert close(np.stack(together[number]), np.stack(alone[number]))


def test_step_caches(places):
    model, options = bagel_opt.load(CHECKPOINT, device="cpu"), {"step_cache": "taylorseer", "num_timesteps": 12}
    model.set_adapters({"a": places["a"]})
    merged = bagel_opt.load(CHECKPOINT, device="cpu", lora=places["a"])
    assert close(velocities(model, **options), velocities(merged, **options), 1e-4)


@pytest.mark.second
def test_compiled_code_and_that_switching_compiles_nothing(places):
    model = bagel_opt.load(CHECKPOINT, device="cpu", backend="compile")
    model.set_adapters({"b": places["b"]})
    velocities(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        velocities(model, adapters={"b": 0.5})
        model.set_adapters({"a": places["a"]})  # fewer ranks, in fewer products
        got, none = velocities(model), velocities(model, adapters={})
    assert close(got, velocities(bagel_opt.load(CHECKPOINT, device="cpu", lora=places["a"])))
    assert close(none, velocities(bagel_opt.load(CHECKPOINT, device="cpu")))


def test_more_ranks_than_before(model, places, tmp_path):
    adapted(seed=4, r=20).save_pretrained(tmp_path / "d")
    model.set_adapters({"a": places["a"]})
    before = [m for m in model.runtime.model.modules() if isinstance(m, LowRank)]
    model.set_adapters({"d": tmp_path / "d", "a": (places["a"], 0)})
    after = [m for m in model.runtime.model.modules() if isinstance(m, LowRank)]
    assert any(m not in before for m in after)
    assert close(velocities(model), velocities(bagel_opt.load(CHECKPOINT, device="cpu", lora=tmp_path / "d")))


def test_no_adapters_any_more(model):
    model.set_adapters({})
    assert not [m for m in model.runtime.model.modules() if isinstance(m, LowRank)]
    plain = bagel_opt.load(CHECKPOINT, device="cpu", profile=PROFILE)
    assert np.array_equal(velocities(model), velocities(plain))
    with pytest.raises(ValueError, match="adapters: there is no 'a'; this model keeps none apart"):
        model.chat("hello", adapters={"a": 1})


def test_weights_beside_their_adapters(places, monkeypatch):
    """As products on Hopper take them: one piece of memory for both."""
    real = attaching.attach
    monkeypatch.setattr("bagel_opt.runtime.torch.attach", lambda model, adapters, _: real(model, adapters, True))
    model = bagel_opt.load(CHECKPOINT, device="cpu")
    plain = {name: p.clone() for name, p in model.runtime.model.named_parameters()}
    for chosen in ({"b": places["b"]}, {"a": places["a"]}):
        model.set_adapters(chosen)
        product = model.runtime.model.llm.layers[1].gen.gate_up
        x, share = torch.randn(2, 3, product.in_features), torch.tensor([[1.0], [0.5]])
        wide = torch.cat((x, product.low_rank.reduced(x, share)), dim=-1) @ product.low_rank.wide.T
        assert torch.allclose(wide, torch.cat(product(x, share), dim=-1), atol=1e-4)
        assert not torch.allclose(wide, torch.cat(product(x), dim=-1), atol=1e-2)
        want = velocities(bagel_opt.load(CHECKPOINT, device="cpu", lora=list(chosen.values())))
        assert close(velocities(model), want)
    model.set_adapters({})
    for name, p in model.runtime.model.named_parameters():
        assert p.is_contiguous()
        assert torch.equal(p, plain[name]), name


# ---- what is refused


def refused(model, adapters, kind, *words):
    with pytest.raises(kind) as error:
        model.set_adapters(adapters)
    for word in words:
        assert word in str(error.value)
    assert list(model.runtime.adapters) == ["a", "b", "c"]  # those before stay


def test_what_is_refused(model, places, tmp_path):
    refused(model, {"a": tmp_path / "nowhere"}, FileNotFoundError, "nowhere")
    refused(model, {"": places["a"]}, ValueError, "adapters is")
    refused(model, {"a": (places["a"], "much")}, ValueError, "adapters has for 'a' (", "much")
    refused(model, {"b": places["a"], "a": 3}, ValueError, "adapters has for 'a' 3; allowed: a file or a folder, or (")
    refused(model, {"a": (places["a"], 101)}, ValueError, "adapters has for 'a' ", " with the factor 101; allowed")
    refused(model, [places["a"]], ValueError, "adapters is")
    refused(model, {str(number): places["a"] for number in range(65)}, ValueError, "at most 64")
    adapted(targets=["vae2llm", "q_proj_moe_gen"]).save_pretrained(tmp_path / "wide")
    refused(model, {"a": tmp_path / "wide"}, CheckpointError, "vae2llm", "merge it")
    for adapters, word in (
        ({"x": 1}, "adapters: there is no 'x'; there are 'a', 'b', 'c'"),
        ({"a": "1"}, "adapters={"),
        (["a"], "adapters="),
    ):
        with pytest.raises(ValueError, match=word):
            model.chat("hello", adapters=adapters)


def test_not_while_requests_are_on_their_way(model, places):
    failures = []

    def on_step(event):
        with pytest.raises(RuntimeError, match="on their way"):
            model.set_adapters({"a": places["a"]})
        failures.append(event.index)

    model.run(["a"], on_step=on_step, **SETTINGS)
    assert len(failures) == 3
    model.set_adapters({"a": places["a"]})


def test_none_is_kept_where_memory_ends_on_the_way(model, places, monkeypatch):
    plain, made = bagel_opt.load(CHECKPOINT, device="cpu", profile=PROFILE), []

    def make(model, product, ranks, widen):
        made.append(ranks)
        if ranks and len(made) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(model, product, ranks, widen)

    real = attaching._make
    adapted(r=40).save_pretrained(places["a"].parent / "much")
    with monkeypatch.context() as patched:
        patched.setattr(attaching, "_make", make)
        with pytest.raises(torch.OutOfMemoryError):
            model.set_adapters({"much": places["a"].parent / "much"})
    assert model.runtime.adapters == {}
    assert np.array_equal(velocities(model), velocities(plain))
    model.set_adapters({"a": places["a"]})
    assert close(velocities(model), velocities(bagel_opt.load(CHECKPOINT, device="cpu", lora=places["a"])))


def test_not_of_a_bundle(model, places):
    model.runtime.adapters = None
    with pytest.raises(BundleError, match="weights are fixed"):
        model.set_adapters({"a": places["a"]})


def test_a_lone_number_of_ranks(places):
    """All layers have the same, so one compiled layer serves them."""
    model = bagel_opt.load(CHECKPOINT, device="cpu")
    model.set_adapters({"a": places["a"]})
    ranks = {len(layer.gen.qkv.low_rank.of_R) for layer in model.runtime.model.llm.layers}
    assert ranks == {attaching.ROUND}
    assert all(layer.und.qkv.low_rank is None for layer in model.runtime.model.llm.layers)
    assert isinstance(attaching.read_adapters([places["a"]], model.config)[0], Lora)


def test_texts_and_pictures_in_turn(model, places):
    """Every text and picture of an interleaved request has its adapters."""
    options = SETTINGS | {"output": "interleaved", "max_rounds": 2, "max_think_tokens": 6}
    merged = bagel_opt.load(CHECKPOINT, device="cpu", lora=[places["b"]])
    want = merged.run(["a red circle"], **options)
    got = model.run(["a red circle"], adapters={"b": 1}, **options)
    assert [type(output) for output in got] == [type(output) for output in want]
    for ours, theirs in zip(got, want, strict=True):
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    plain = model.run(["a red circle"], adapters={}, **options)
    assert plain[0] != got[0] or np.abs(np.asarray(plain[1], int) - np.asarray(got[1], int)).mean() > 1
