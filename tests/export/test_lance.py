"""Bundles of the Lance checkpoint."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from bundles import cached_export, few_programs, needs_compiler
from compiling import partly_compiled
from lance_cases import CHECKPOINT, cases, loaded
from on_host import in_float32, on_host

import bagel_opt
from bagel_opt import Profile
from bagel_opt.config import BagelConfig
from bagel_opt.export.onnx import Shapes, export_program
from bagel_opt.export.onnx_fused import NOT_IN_BFLOAT16
from bagel_opt.export.verify import verify
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.lance.config import LanceConfig, config_from
from bagel_opt.lance.pictures import read_input
from bagel_opt.programs.callables import programs
from bagel_opt.programs.signatures import signatures, sized
from bagel_opt.runtime.onnx_gpu import GRAPHED
from bagel_opt.sampling.batches import padded

PROFILE = Profile("lance", rows=2, slots=320, text=32, patches=64, latents=64)
SIDES = {"height": 64, "width": 96}


def test_a_configuration_comes_back():
    config = loaded().config
    assert config_from(config.to_dict()) == config
    assert isinstance(config, LanceConfig)
    assert isinstance(config_from(bagel_opt.load(device="cpu").config.to_dict()), BagelConfig)
    with pytest.raises((ValueError, KeyError, TypeError)):
        config_from({**config.to_dict(), "vae": {}})


@torch.no_grad()
def test_what_the_autoencoder_keeps_is_what_its_signature_says():
    vae, found = loaded().runtime.model.vae, signatures(loaded().config, PROFILE)
    kept = {
        "vae_encode_next": vae.encode(torch.zeros(1, 3, 1, 64, 96))[1:],
        "vae_decode_next": vae.decode(torch.zeros(1, 48, 1, 4, 6))[2:],
    }
    for name, state in kept.items():
        shapes = [shape for shape, _ in found[name].inputs.values()][1:]
        assert [sized(shape, SIDES, 16) for shape in shapes] == [list(tensor.shape) for tensor in state]
        assert list(found[name].outputs) == list(found[name.removesuffix("_next")].outputs)


def test_a_bundle_of_few_programs_loads(tmp_path):
    programs = ("vit", "choose", "step")
    folder = cached_export(CHECKPOINT, PROFILE, name="lance-few", format="export", programs=programs)
    with few_programs(*programs):
        model = bagel_opt.load(folder)
        assert model.config == loaded().config
        case = next(case for case in cases() if case.name == "x2t_image")
        [(patches, places)] = image_of(case, model.config).patches()
        got, want = (embeddings(m, patches, places) for m in (model, loaded()))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def image_of(case, config):
    picture = next(item for item in case.inputs if not isinstance(item, str))
    return read_input([picture], picture.size, 1, config, (112, 112), "a picture")


def embeddings(model, patches, places):
    inputs = [padded(x, PROFILE.patches)[None] for x in (patches, places)]
    runtime = model.runtime.for_profile(PROFILE)
    found = runtime.run("vit", [*inputs, np.array([len(patches)])])[0]
    return torch.tensor(runtime.host(found))[:, : len(patches) // 4]


@pytest.mark.second
@pytest.mark.parametrize("form", ["onnx", "export"])
def test_every_case_from_a_bundle(form):
    check(bagel_opt.load(cached_export(CHECKPOINT, PROFILE, name="lance", format=form)), cases())


@pytest.mark.second
def test_every_case_that_draws_from_compiled_code():
    """What differs most from what test_golden.py compiles: drawing, the ViT, the autoencoder. The rest runs as in the test above."""
    needs_compiler("aoti")
    compiled = ("generate", "vit", "vae_encode", "vae_encode_next", "vae_decode", "vae_decode_next")
    drawn = (*compiled, "text", "vit_context", "generate_row", "step")
    settings = {"format": "aoti", "programs": drawn, "compiled": compiled}
    folder = cached_export(CHECKPOINT, PROFILE, name="lance-drawn", **settings)
    with few_programs(*drawn), partly_compiled() as packages:
        check(bagel_opt.load(folder), [case for case in cases() if case.options["output"] != "text"])
    assert packages == set(compiled)


def check(model, some):
    """The official answers, one after another and together."""
    assert len(some) > 4
    for case in some:
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        assert case.velocity_error(events) < 1e-4, case.name
        case.check_outputs(outputs)
    together = model.run_many([case.request() for case in some])
    for case, outputs in zip(some, together, strict=True):
        case.check_outputs(outputs)


@pytest.fixture
def archives():
    return cached_export(CHECKPOINT, PROFILE, name="lance", format="export")


@pytest.mark.second
def test_sides_are_whole_multiples_of_the_latents(archives):
    """What the encoder computes has no floors of sides in its shapes."""
    graph = torch.export.load(archives / "vae_encode_next.whole.pt2").graph
    sides = {str(side) for node in graph.nodes for side in getattr(node.meta.get("val"), "shape", ())}
    assert [side for side in sides if side.startswith("16*")]
    assert not [side for side in sides if "//" in side]


@pytest.mark.second
def test_verify_compares_videos_too(archives):
    assert verify(archives, CHECKPOINT).keys() >= {"vae_encode_next", "vae_decode_next", "filming"}


@pytest.mark.second
def test_every_case_from_a_bundle_for_a_gpu():
    with in_float32():
        folder = cached_export(CHECKPOINT, PROFILE, name="lance-gpu", device="cuda")
    check(on_host(folder), cases())


@pytest.mark.parametrize(
    "program",
    ["decode", "generate", *(pytest.param(n, marks=pytest.mark.second) for n in ("vae_encode_next", "vae_decode"))],
)
def test_its_graphs_have_what_a_gpu_computes(program):
    """Nothing that a replayed graph would read in the host's memory, as CUDA's GatherND and an uneven Split do, and in bfloat16
    nothing that CUDA's provider has in other types alone."""
    shapes = Shapes(Checkpoint(CHECKPOINT).config, torch.bfloat16, "cuda")
    made = export_program(
        shapes, program, programs(shapes.model)[program], signatures(shapes.config, PROFILE)[program], PROFILE
    )
    nodes = list(made.graph)
    assert "GatherND" not in {node.op_type for node in nodes}
    assert not [node for node in nodes if node.op_type == "Split" and len({tuple(x.shape) for x in node.outputs}) > 1]
    kinds = {(node.op_type, node.inputs[0].dtype) for node in nodes}
    assert not {(op, kind) for op, kind in kinds if op in NOT_IN_BFLOAT16 and kind == ir.DataType.BFLOAT16}
    assert program in GRAPHED or ("ReduceL2", ir.DataType.FLOAT) in kinds
