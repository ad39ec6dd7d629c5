"""Bundles of torch's formats, several profiles in one, recipes, and exports that are killed."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from support import CHECKPOINT, cases
from test_bundle import rewrite

import bagel_opt
from bagel_opt import BundleError, Profile, ProfileError
from bagel_opt.bundle import MANIFEST, UNFINISHED, read_manifest
from bagel_opt.cli import main
from bagel_opt.config import PUBLISHED
from bagel_opt.export import export
from bagel_opt.memory import needs
from bagel_opt.model.bagel import Bagel
from bagel_opt.profile import load_profile
from bagel_opt.recipe import load_recipe, recipes_folder

ROOT = Path(bagel_opt.__file__).parent.parent
SMALL = Profile("small", rows=2, slots=160, text=16, patches=16, latents=16)
named = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A bundle of two profiles."""
    large = Profile("large", rows=3, slots=512, text=16, patches=16, latents=64)
    return export(CHECKPOINT, tmp_path_factory.mktemp("two") / "bundle", [large, SMALL], format="export")


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


# ---- several profiles


def test_profiles_share_weights_and_what_programs_they_can(two):
    manifest = read_manifest(two)
    assert [profile.name for profile in manifest.profiles] == ["small", "large"]
    small, large = (manifest.programs[profile.name] for profile in manifest.profiles)
    for program in ("vae_encode", "vae_decode", "vit"):
        assert small[program] == large[program]
    for program in ("text", "decode", "generate", "step"):
        assert small[program]["parts"] != large[program]["parts"]
    assert len([name for name in manifest.files if "weights" in name]) == 1


def test_a_request_takes_the_smallest_profile_that_fits(two, eager, monkeypatch):
    model, seen = bagel_opt.load(two), []
    original = type(model.runtime).for_profile
    monkeypatch.setattr(type(model.runtime), "for_profile", lambda self, p: seen.append(p.name) or original(self, p))
    sides = (64, 128, 48)
    requests = [
        bagel_opt.Request(["a red circle"], height=side, width=side, num_timesteps=3, seed=1, cfg_text_scale=4.0)
        for side in sides
    ]
    pictures = [outputs[0] for outputs in model.run_many(requests)]
    assert seen == ["small", "large"]
    assert model.runtime.for_profile(model.profiles[0]).weights is model.runtime.weights
    for picture, side, want in zip(pictures, sides, eager.run_many(requests), strict=True):
        assert picture.size == (side, side)
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(want[0])).max() <= 1
    with pytest.raises(ProfileError, match="profile 'large' has slots = 512"):
        model.chat("a b " * 400)


def test_no_profile_or_the_same_twice_is_refused(tmp_path):
    for profiles in ([], [SMALL, SMALL]):
        with pytest.raises(ValueError, match="give at least one, and no name twice"):
            export(CHECKPOINT, tmp_path / "out", profiles)


# ---- torch's formats


@pytest.mark.parametrize("kind", ["aoti", "export"])
def test_one_layer_serves_all_and_weights_are_there_once(load, kind):
    folder = load(CHECKPOINT, kind).runtime.folder
    manifest = read_manifest(folder)
    parts = manifest.programs["tiny"]["generate"]["parts"]
    assert set(parts) == {"start", "layer", "end"}
    assert all(name.startswith("llm.layers.{}.") for name in parts["layer"]["weights"])
    assert "llm.embed.weight" in parts["start"]["weights"]  # the markers
    assert parts["end"]["weights"] == ["llm.norm_gen.weight", "latent_out.weight", "latent_out.bias"]
    weights = manifest.files["weights.safetensors"]["size"]
    assert sum(entry["size"] for entry in manifest.files.values()) < weights + 12e6


def test_bfloat16_passes_its_verification(tmp_path):
    folder = export(CHECKPOINT, tmp_path / "bf16", SMALL, format="export", dtype="bfloat16", verify=True)
    model = bagel_opt.load(folder)
    assert model.runtime.weights["latent_in.weight"].dtype == torch.bfloat16


def test_a_compile_bundle_starts_warm(tmp_path):
    """A new process with an empty cache of its own: right, and nothing was compiled that the bundle did not bring."""
    profile = Profile("warm", rows=3, slots=768, text=64, patches=64, latents=64)
    folder = export(CHECKPOINT, tmp_path / "bundle", profile, format="compile")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import bagel_opt
from support import cases
model = bagel_opt.load({str(folder)!r})
for case in cases():
    if case.name in ("image_editing", "text_to_image"):
        events = []
        case.check_outputs(model.run(case.inputs, on_step=events.append, **case.options))
        assert case.velocity_error(events) < 1e-4
"""
    run_alone(script, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"))
    brought, used = ({path.name for path in (tmp_path / f).rglob("*main.so")} for f in ("bundle/cache", "empty"))
    assert len(brought) > 5
    assert used == brought


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
        ({"machine": "Z80"}, "was compiled for instruction set Z80, and this is"),
        ({"versions": {"torch": "1.0"}}, r"was compiled for torch 1\.0, and this is"),
    ],
)
def test_code_for_another_machine_is_refused(two, tmp_path, change, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in two.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    machine = torch.backends.cpu.get_cpu_capability()
    rewrite(copy, **{"kind": "aoti", "machine": machine, **change})
    with pytest.raises(BundleError, match=message):
        bagel_opt.load(copy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onnx", "dtype": "bfloat16"}, "dtype='bfloat16'; allowed for format='onnx': 'float32', 'float16'"),
        ({"format": "onnx", "device": "cuda"}, "device='cuda'; allowed for format='onnx': 'cpu'"),
        ({"format": "aoti", "attention": "flex"}, "attention='flex'; allowed for format='aoti': 'auto'"),
        ({"format": "compile", "attention": "fast"}, "attention='fast'; allowed are 'auto'"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export(CHECKPOINT, tmp_path / "out", SMALL, **settings)
    assert list(tmp_path.iterdir()) == []


# ---- recipes, profiles, memory


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_whole(path):
    recipe = load_recipe(path.stem)
    assert path.read_text().startswith("# ")
    assert [load_profile(name).name for name in recipe.profiles] == recipe.profiles


def test_the_command_takes_recipes_and_overrides(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("bagel_opt.export.export", lambda *a, **k: calls.append((a, k)) or tmp_path)
    assert main(["export", "--recipe", "demo-aoti", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 0
    ((_, _, profiles), options) = calls[0]
    assert profiles == ["demo"]
    assert {name: options[name] for name in ("format", "dtype", "device")} == {
        "format": "aoti",
        "dtype": "bfloat16",
        "device": "cpu",
    }
    assert main(["export", "--profile", "tiny", "--profile", "demo", "--out", str(tmp_path)]) == 0
    assert calls[1][0][2] == ["tiny", "demo"]
    assert main(["export", "--out", str(tmp_path)]) == 1
    assert "give --profile or --recipe; profiles/ has bagel-1024, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 'onnx'", "missing field profiles"),
        ("format = 'onnx'\nprofiles = ['a']\nspeed = 3", "unknown field speed"),
        ("format = 'onnx'\nprofiles = 'a'", "profiles is 'a'; it must be a list"),
        ("format = ", "is not valid TOML"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        load_recipe(path)
    with pytest.raises(FileNotFoundError, match="recipe 'nowhere' is neither a file nor one of: bagel-1024"):
        load_recipe("nowhere")


@pytest.mark.parametrize("name", ["bagel-1024", "bagel-edit-1024", "bagel-understand", "bagel-512"])
def test_profiles_of_the_published_model_say_what_they_need(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Bagel(PUBLISHED).parameters())
    needed = needs(PUBLISHED, load_profile(name), "bfloat16", parameters)
    text = "{weights:.1f} GB of weights, {caches:.1f} GB of caches, about {workspace:.1f} GB besides"
    path = ROOT / "profiles" / f"{name}.toml"
    assert text.format(**{part: count / 1e9 for part, count in needed.items()}) in path.read_text()
    assert tomllib.loads(path.read_text())["name"] == name


def test_inspect_tells_the_memory_before_anything_is_allocated(capsys, two, eager):
    assert main(["inspect", str(CHECKPOINT), "--profile", "tiny", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    c = eager.config.llm
    assert "memory in bfloat16" in shown
    assert f"{3 * 1536 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 / 1e6:.3g} MB" in shown
    assert main(["inspect", str(two)]) == 0
    shown = capsys.readouterr().out
    assert "memory in float32" in shown
    assert "small" in shown


def test_caches_are_as_large_as_told(eager):
    profile = Profile("p", rows=2, slots=100, text=16, patches=16, latents=16)
    caches = eager.runtime.caches(profile.rows, profile.slots)
    told = needs(eager.config, profile, "float32", 0)["caches"]
    assert told == profile.batches * sum(cache.nbytes for cache in caches)


# ---- exports that are killed

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import bagel_opt
from bagel_opt.export import export
from bagel_opt import Profile
import torch.export, safetensors.torch, bagel_opt.export.packaged

checkpoint, folder, first, count = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
profile = Profile("small", rows=2, slots=160, text=16, patches=16, latents=16)

def start(number):
    out = folder / str(number) / "bundle"
    out.parent.mkdir()
    child = os.fork()
    if not child:
        export(checkpoint, out, profile, format="export")
        os._exit(0)
    return child

begun = time.monotonic()
os.waitpid(start(-first - 1), 0)
whole = time.monotonic() - begun
for number in range(first, first + count):
    child = start(number)
    time.sleep(random.Random(number).random() * whole)
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1])
"""


def test_killing_an_export_leaves_nothing_that_loads(tmp_path, two):
    """Twenty times, at random moments of about the time that it takes."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLS, str(CHECKPOINT), str(tmp_path), str(first), "10"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 10)
    ]
    ends = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert len(ends) == 20
    assert ends.count(9) >= 10  # killed; the others had finished
    folders = [path for number in range(20) for path in (tmp_path / str(number)).iterdir()]
    assert len(folders) >= 5  # on their way
    whole = {path.parent for path in folders if path.name == "bundle" and (path / MANIFEST).exists()}
    assert len(whole) <= ends.count(0) + 1
    for path in folders:
        if path.parent not in whole:
            with pytest.raises((BundleError, FileNotFoundError)):
                bagel_opt.load(path)


@pytest.mark.parametrize(
    ("step", "replaces"), [("rename", False), ("name", False), ("unlink", True), ("rename", True), ("name", True)]
)
def test_dying_at_the_last_steps_leaves_nothing_wrong(tmp_path, two, step, replaces):
    """What exists afterwards is the old bundle, the new one, or nothing that loads; and a new export cleans up."""
    if replaces:
        export_quickly(two, tmp_path)
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_formats
test_formats.export_quickly(Path({str(two)!r}), Path({str(tmp_path)!r}), {step!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60).returncode == 9
    assert (tmp_path / "bundle" / MANIFEST).exists() == (replaces and step == "unlink")
    for folder in tmp_path.iterdir():
        if not (folder / MANIFEST).exists():
            with pytest.raises((BundleError, FileNotFoundError)):
                bagel_opt.load(folder)
    export_quickly(two, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    bagel_opt.load(tmp_path / "bundle")


def export_quickly(ready, folder, die=None):
    """An export whose programs are copies of another bundle's; it dies at a step."""
    import shutil

    import bagel_opt.export as module

    manifest = read_manifest(ready)

    def write(model, profiles, partial, *_):
        for path in ready.glob("*.pt2"):
            shutil.copy(path, partial)
        return manifest.programs

    def before(step, call):
        def wrapped(*arguments, **options):
            if step == die and Path(arguments[0]).name == MANIFEST:
                os._exit(9)
            return call(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_write_programs", write)
        if die:
            patch.setattr(Path, "unlink", before("unlink", Path.unlink))
            rename = Path.rename

            def renamed(self, target):
                if (self.name == UNFINISHED) == (die == "name") and die in ("name", "rename"):
                    os._exit(9)
                return rename(self, target)

            patch.setattr(Path, "rename", renamed)
        return export(CHECKPOINT, folder / "bundle", manifest.profiles, format="export")


# ---- without torch


def test_an_environment_without_torch_runs_the_shipped_models_bundle(load, tmp_path):
    """As the README says: a new environment, the package with its onnx extra, a bundle."""
    folder = load(bagel_opt.api.shipped_model(), "onnx").runtime.folder
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{ROOT}[onnx]"]
    subprocess.run(install, check=True, cwd=tmp_path)
    script = f"""
import importlib.util, json, pathlib, sys
assert importlib.util.find_spec("torch") is None
import bagel_opt
model = bagel_opt.load({str(folder)!r})
prompt = "a large red circle at the top and a small blue star on the left"
picture = model.generate(prompt, num_timesteps=25, seed=0)
picture.save("circle.png")
(green,), (answer,) = model.run_many([
    bagel_opt.Request([picture, "make the circle green"], num_timesteps=25, seed=0),
    bagel_opt.Request([picture, "where is the star?"], output="text"),
])
site = pathlib.Path(bagel_opt.__file__).parent.parent
size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file() and "pip" not in path.parts)
print(json.dumps({{"answer": answer, "size": size}}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["answer"] == "on the left"
    print(f"installed: {found['size'] / 1e6:.0f} MB")
    assert found["size"] < 400e6
    command = [tmp_path / "venv" / "bin" / "bagel-opt", "understand", "circle.png", "what color is the circle?"]
    done = subprocess.run(
        [*command, "--checkpoint", folder], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "red"
    done = subprocess.run(
        [command[0], "inspect", folder], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "memory in float32" in done.stdout
