"""Bundles of torch's formats."""

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import bundles
import numpy as np
import pytest
import torch
from bundles import ONE, SMALL, rewrite
from PIL import Image
from support import CHECKPOINT, ROOT, relative
from torch import Tensor

import bagel_opt
from bagel_opt import BundleError
from bagel_opt.export import export
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.files.weights import locate_weights
from bagel_opt.model import attention
from bagel_opt.runtime.torch_bundle import lacking, machine


def run_alone(script, folder, **environment):
    """In a process of its own, with the same packages."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", [pytest.param("aoti", marks=pytest.mark.second), "export"])
def test_one_layer_serves_all_and_weights_are_there_once(load, kind):
    folder = load(CHECKPOINT, kind).runtime.folder
    manifest = read_manifest(folder)
    parts = manifest.programs["tiny"]["generate"]["parts"]
    assert set(parts) == {"start", "layer", "end"}
    assert all(name.startswith("llm.layers.{}.") for name in parts["layer"]["weights"])
    assert "llm.embed.weight" in parts["start"]["weights"]  # the markers
    assert parts["end"]["weights"] == ["llm.norm_gen.weight", "latent_out.weight", "latent_out.bias"]
    data, places = (folder / WEIGHTS).read_bytes(), locate_weights(folder / WEIGHTS)
    for part in (part for program in manifest.programs["tiny"].values() for part in program["parts"].values()):
        middles = [places[name.format(0)].offset + places[name.format(0)].length // 2 for name in part["weights"]]
        samples = [data[middle : middle + 32] for middle in middles]
        code = (folder / part["file"]).read_bytes()
        assert not [sample for sample in samples if len(set(sample)) > 8 and sample in code], part["file"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_are_copied_since_mapped_ones_are_slower(load):
    weights = load(CHECKPOINT, "export").runtime.folder / "weights.safetensors"
    assert weights.exists()
    assert str(weights) not in Path("/proc/self/maps").read_text()


def test_one_set_of_programs_serves_all_profiles_and_sizes(load):
    """But for "step", whose inputs are as many as there are batches, and "choose"."""
    folder = bundles.cached_export(CHECKPOINT, [ONE, SMALL, bundles.PROFILES[CHECKPOINT]], format="export")
    one, small, tiny = read_manifest(folder).programs.values()
    for name, entry in tiny.items():
        if not name.startswith(("choose", "step")):
            base = name.removesuffix("_row")
            assert entry["parts"] == one[base]["parts"] == small[name]["parts"]
    for name, files in (("step", ("step-1", "step-2", "step")), ("choose", ("choose-1", "choose-2", "choose-3"))):
        assert [p[name]["parts"]["whole"]["file"] for p in (one, small, tiny)] == [f"{f}.whole.pt2" for f in files]
    assert small["choose_row"]["parts"] == tiny["choose_row"]["parts"] == one["choose"]["parts"]
    for path in set(folder.glob("*.pt2")) - set(folder.glob("choose*")):
        assert torch.export.load(path).range_constraints, path  # lengths that are free


@pytest.mark.second
def test_bfloat16_passes_its_verification(tmp_path):
    """In "compile", the bundle that starts warm does."""
    folder = export(CHECKPOINT, tmp_path / "bf16", ONE, format="export", dtype="bfloat16", verify=True)
    assert bagel_opt.load(folder).runtime.dtype == torch.bfloat16


@torch.library.custom_op("bagel_opt_tests::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, causal: bool) -> Tensor:
    """What the kernel computes, where there is none."""
    return attention.attention(q, k, v, kv_len, causal, "sdpa").contiguous()


@flash_attention.register_fake
def _(q, k, v, kv_len, causal):
    return torch.empty_like(q)


@pytest.mark.second
def test_flash_attention_is_one_op_in_a_bundle(tmp_path, eager, monkeypatch):
    monkeypatch.setattr(attention, "choose", lambda *_: "flash")
    monkeypatch.setattr(attention, "_flash", flash_attention)
    picture = Image.radial_gradient("L").resize((48, 48))
    few = ("text", "decode", "choose", "vit", "vit_context", "generate", "step", "vae_decode")
    velocities = []
    with bundles.few_programs(*few):
        model = bagel_opt.load(export(CHECKPOINT, tmp_path / "flash", ONE, format="export"))
        layer = torch.export.load(tmp_path / "flash" / "generate.layer.pt2")
        assert [str(node.target) for node in layer.graph.nodes if "attention" in str(node.target)] == [
            "bagel_opt_tests.flash_attention.default"
        ]
        answers = [one.understand(picture, "tell me", max_think_tokens=9) for one in (model, eager)]
        assert answers[0] == answers[1]
        for one in (model, eager):
            one.generate("a red circle", **DRAWING, on_step=lambda e: velocities.append(e.v_t))
    for got, want in zip(velocities[:2], velocities[2:], strict=True):
        assert relative(got, want) < 1e-5


DRAWING = {"num_timesteps": 3, "seed": 1, "cfg_text_scale": 1.0, "height": 64, "width": 64}


@pytest.mark.second
def test_a_compile_bundle_starts_warm(tmp_path):
    """A new process with an empty cache of its own: right, and nothing was compiled that the bundle did not bring. The bundle
    is in bfloat16, partly in 4 bits, and passes its verification. In float32, test_golden.py has what the compiler makes."""
    settings = {"dtype": "bfloat16", "quantization": {"und": "int4"}}
    folder = export(CHECKPOINT, tmp_path / "bundle", ONE, format="compile", verify=True, **settings)
    script = f"""
import bagel_opt, numpy as np
from PIL import Image
model, seen = bagel_opt.load({str(folder)!r}), []
picture = Image.radial_gradient("L").resize((48, 48))
model.run([picture, "make it red"], **{DRAWING}, on_step=lambda event: seen.append(np.asarray(event.v_t.float())))
print(model.understand(picture, "what is it?", max_think_tokens=3))
np.save("seen.npy", seen)
"""
    run_alone(script, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"))
    brought, used = ({path.name for path in (tmp_path / f).rglob("*main.so")} for f in ("bundle/cache", "empty"))
    assert len(brought) > 5
    assert used == brought
    seen, want = np.load(tmp_path / "seen.npy"), []
    model = bagel_opt.load(CHECKPOINT, device="cpu", quantization=settings["quantization"])
    picture = Image.radial_gradient("L").resize((48, 48))
    model.run([picture, "make it red"], **DRAWING, on_step=lambda event: want.append(event.v_t))
    assert len(seen) == len(want) == 2
    for ours, theirs in zip(seen, want, strict=True):
        assert relative(torch.tensor(ours), theirs) < 0.05


@pytest.mark.second
def test_packages_hold_the_name_by_which_torch_211_finds_their_metadata(load):
    for path in load(CHECKPOINT, "aoti").runtime.folder.glob("*.pt2"):
        names = [Path(name).name for name in zipfile.ZipFile(path).namelist()]
        (library,) = (name for name in names if name.endswith(".wrapper.so"))
        stem = library.removesuffix(".so")
        assert {f"{stem}.cpp", f"{stem}_metadata.json"} <= set(names)


@pytest.mark.second
def test_what_an_export_to_aoti_leaves(load):
    """It is whole, and says what it was compiled for. `test_golden.py` has its answers."""
    folder = load(CHECKPOINT, "aoti").runtime.folder
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.machine) == ("aoti", machine(torch.device("cpu")))
    assert platform.machine() in manifest.machine.split()
    assert manifest.programs == read_manifest(load(CHECKPOINT, "export").runtime.folder).programs
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "lock"}


@pytest.mark.second
def test_an_aoti_bundle_needs_no_compiler(load, tmp_path):
    folder = load(CHECKPOINT, "aoti").runtime.folder
    script = f"""
import bagel_opt
model = bagel_opt.load({str(folder)!r})
model.generate("a red circle", seed=3, num_timesteps=4, height=64, width=64)
"""
    run_alone(script, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"), PATH="/nowhere")
    assert not list((tmp_path / "empty").rglob("*.so"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "Z80 sse2"}, "was compiled for processors with Z80, which this one has not; export it here"),
        ({"machine": "avx99_x y86"}, "was compiled for processors with avx99_x, y86, which this one has not"),
        ({"machine": "AVX2 and sm_999"}, "was compiled for processors with sm_999, which"),  # as format 6 has it
        ({"versions": {"torch": "1.0"}}, r"was compiled for torch 1\.0, and this is"),
    ],
)
def test_code_for_another_machine_is_refused(small_bundle, tmp_path, monkeypatch, change, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small_bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX512)
    rewrite(copy, **{"kind": "aoti", "machine": machine(torch.device("cpu")), **change})
    with pytest.raises(BundleError, match=message):
        bagel_opt.load(copy)


FEATURES = {"sse2": True, "avx2": True, "avx512_f": False, "sse4a": True, "l2_cache_size": 1, "architecture": "x86_64"}
AVX512 = {**FEATURES, "avx512_f": True, "sse4a": False}


@pytest.mark.parametrize(
    ("compiled", "running", "lacks"),
    [
        (("AVX2", FEATURES), ("AVX2", FEATURES), []),
        (("AVX2", FEATURES), ("AVX512", AVX512), []),  # fewer features; no compiler takes sse4a on its own
        (("AVX512", AVX512), ("AVX2", FEATURES), ["avx512_f"]),
        (("SVE256", {"sve": True, "architecture": "aarch64"}), ("AVX2", FEATURES), ["SVE256", "aarch64", "sve"]),
        (("DEFAULT", {"architecture": "aarch64"}), ("SVE256", {"sve": True, "architecture": "aarch64"}), []),
        # format 6
        ("AVX2", ("AVX512", AVX512), []),
        ("AVX2", ("AVX2", FEATURES), []),
        ("DEFAULT", ("AVX2", FEATURES), []),
        ("AVX512", ("AVX2", FEATURES), ["AVX512"]),
        ("AVX512 and sm_90", ("AVX512", AVX512), ["sm_90"]),
        ("SVE256", ("SVE256", {"architecture": "aarch64"}), []),
    ],
)
def test_code_for_fewer_features_runs(monkeypatch, compiled, running, lacks):
    def on(named, features):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: named)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)

    if not isinstance(compiled, str):
        on(*compiled)
        compiled = machine(torch.device("cpu"))
    on(*running)
    assert lacking(compiled, torch.device("cpu")) == lacks


def test_features_of_an_older_torch(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine(torch.device("cpu")) == "AVX2"
    assert lacking("AVX2", torch.device("cpu")) == lacking("DEFAULT", torch.device("cpu")) == []
    assert lacking("AVX512", torch.device("cpu")) == ["AVX512"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"format": "onnx", "dtype": "bfloat16"},
            "dtype='bfloat16'; allowed for format='onnx' on device='cpu': 'float32', 'float16'",
        ),
        ({"format": "onnx", "device": "tpu"}, "device='tpu'; allowed for format='onnx': 'cpu', 'cuda'"),
        (
            {"format": "aoti", "attention": "flex"},
            "attention='flex'; allowed for format='aoti': 'auto', 'sdpa', 'flash'",
        ),
        ({"format": "compile", "attention": "fast"}, "attention='fast'; allowed are 'auto'"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export(CHECKPOINT, tmp_path / "out", SMALL, **settings)
    assert list(tmp_path.iterdir()) == []
