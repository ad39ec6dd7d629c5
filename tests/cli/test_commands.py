"""The command line on the golden checkpoint."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import packages
from PIL import Image
from support import CHECKPOINT, GOLDEN, ROOT

import bagel_opt
from bagel_opt.cli.arguments import parser
from bagel_opt.cli.commands import COMMANDS, main
from bagel_opt.installed import Compiler

PICTURE = GOLDEN / "cases" / "image_editing" / "input0.png"
SMALL = ["--checkpoint", CHECKPOINT, "--num-timesteps", 3, "--seed", 0]
SIZE = ["--height", 64, "--width", 64]
TEXT = ["--checkpoint", CHECKPOINT, "--max-think-tokens", 6]


# ---- commands


def test_generate(run, eager):
    status, out, _ = run("generate", "a cat", *SMALL, *SIZE, "--out", "cat.png")
    assert (status, out) == (0, "cat.png\n")
    want = eager.generate("a cat", height=64, width=64, num_timesteps=3, seed=0)
    assert np.array_equal(Image.open("cat.png"), want)


def test_generate_with_all_options(run, eager):
    options = {
        "timestep_shift": 2.0,
        "cfg_text_scale": 3.0,
        "cfg_img_scale": 1.0,
        "cfg_interval": (0.0, 1.0),
        "cfg_renorm_min": 0.5,
        "cfg_renorm_type": "channel",
        "negative_prompt": "a dog",
        "step_cache": "taylorseer",
        "max_think_tokens": 5,
        "text_temperature": 0.9,
        "top_p": 0.9,
    }
    written = [[f"--{name}", *(value if isinstance(value, tuple) else [value])] for name, value in options.items()]
    flags = [str(part) for option in written for part in option]
    status, out, _ = run("generate", "a cat", *SMALL, *SIZE, "--think", "--do-sample", *flags)
    assert status == 0
    options |= {"think": True, "do_sample": True, "seed": 0, "num_timesteps": 3, "height": 64, "width": 64}
    thought, picture = eager.run("a cat", **options)
    assert out == f"{thought}\nout.png\n"
    assert np.array_equal(Image.open("out.png"), picture)


FEW = {"max_think_tokens": 6, "num_timesteps": 3, "seed": 0, "height": 64, "width": 64}


def test_interleave(run, eager):
    flags = [*SMALL, *SIZE, "--max-think-tokens", 6, "--max-rounds", 2, "--system-prompt", "Look well."]
    status, out, err = run("interleave", PICTURE, "what is it?", *flags, "-o", "seen.jpg")
    want = eager.run(
        [Image.open(PICTURE), "what is it?"], output="interleaved", **FEW, max_rounds=2, system_prompt="Look well."
    )
    assert (status, out) == (0, f"{want[0]}\nseen-1.jpg\n{want[2]}\nseen-2.jpg\n")
    assert err.splitlines()[-1].startswith("again: bagel-opt interleave")
    assert [Image.open(f"seen-{n}.jpg").size for n in (1, 2)] == [picture.size for picture in want[1::2]]
    assert run("interleave", "what is it?", PICTURE, *flags)[0] == 0
    want = eager.run(["what is it?", Image.open(PICTURE)], output="interleaved", **FEW, max_rounds=2, system_prompt="Look well.")  # fmt: skip
    assert all(np.array_equal(Image.open(f"out-{n + 1}.png"), want[2 * n + 1]) for n in range(2))


def test_interleave_tells_each_part_as_soon_as_it_is_there(run, monkeypatch):
    from bagel_opt.cli import commands

    seen = []
    monkeypatch.setattr(
        commands, "say", lambda text: seen.append(sorted(path.name for path in Path.cwd().glob("*.png")))
    )
    run("interleave", "a" * 5000, *SMALL, *SIZE, "--max-think-tokens", 3, "--max-rounds", 2)  # no file has such a name
    assert seen == [[], ["out-1.png"]]


def test_interleave_with_main_alone_ends_where_no_picture_is_asked_for(run, eager):
    status, out, _ = run("interleave", "a", *SMALL, *SIZE, "--max-think-tokens", 6, "--interleaved-context", "main")
    assert (status, out) == (0, eager.run("a", output="interleaved", **FEW, interleaved_context="main")[0] + "\n")


def test_interleave_with_a_picture_that_is_not_there(fails):
    assert "there is no picture none.png" in fails("interleave", "none.png", "a")
    assert "the name must end in" in fails("interleave", "a", "-o", "out.txt")
    assert "max_rounds=0; allowed" in fails("interleave", "a", "--max-rounds", 0)


def test_stop_texts_and_sides_and_prompts(run, eager):
    options = {"vit_min_size": 84, "system_prompt": "Look well.", "stop": ["A", "never"]}
    flags = ["--vit-min-size", 84, "--system-prompt", "Look well.", "--stop", "A", "--stop", "never"]
    status, out, _ = run("understand", PICTURE, "what is it?", *TEXT, *flags)
    want = eager.understand(Image.open(PICTURE), "what is it?", max_think_tokens=6, **options)
    assert (status, out) == (0, want + "\n")
    assert run("understand", PICTURE, "what is it?", *TEXT, *flags, "--stop", "")[0] == 1


@pytest.mark.parametrize("spelling", ["--num_timesteps", "--num-timesteps"])
def test_both_spellings(run, spelling):
    status, out, _ = run("generate", "a cat", "--checkpoint", CHECKPOINT, *SIZE, spelling, 2)
    assert (status, out) == (0, "out.png\n")
    assert Image.open("out.png").size == (64, 64)


def test_edit(run, eager):
    status, out, _ = run("edit", PICTURE, "make it red", *SMALL, "-o", "red.png")
    assert (status, out) == (0, "red.png\n")
    want = eager.edit(Image.open(PICTURE), "make it red", num_timesteps=3, seed=0)
    assert np.array_equal(Image.open("red.png"), want)


def test_edit_in_sizes_of_ones_own(run, eager):
    image = Image.open(PICTURE).resize((75, 50))
    image.save("in.png")
    for given, options in (
        (["--size", "input"], {"size": "input"}),
        (["--height", 32, "--width", 48], {"height": 32, "width": 48}),
    ):
        assert run("edit", "in.png", "a", *SMALL, *given, "-o", "out.png")[0] == 0
        want = eager.edit(image, "a", num_timesteps=3, seed=0, **options)
        assert np.array_equal(Image.open("out.png"), want)
        assert want.size == (image.size if "size" in options else (48, 32))


def test_edit_turns_the_picture_as_the_camera_was_held(run):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (128, 64)).save("turned.jpg", exif=exif)
    assert run("edit", "turned.jpg", "a", *SMALL)[0] == 0
    assert Image.open("out.png").size == (64, 128)


def test_understand(run, eager):
    status, out, _ = run("understand", PICTURE, "what is it?", *TEXT)
    assert (status, out) == (0, eager.understand(Image.open(PICTURE), "what is it?", max_think_tokens=6) + "\n")


def test_chat(run, eager):
    status, out, _ = run("chat", "hello", *TEXT)
    assert (status, out) == (0, eager.chat("hello", max_think_tokens=6) + "\n")


def test_profile(run):
    assert run("chat", "hello", *TEXT, "--profile", "tiny")[0] == 0


def test_inspect(run):
    status, out, _ = run("inspect", CHECKPOINT)
    rows = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in out.splitlines()]
    table = {row[0]: row[1:] for row in rows}
    assert status == 0
    assert table["VAE"] == ["16 channels, 1/8 of the side, widths 32 x [1, 1, 2, 2]"]
    assert table["transformer"] == ["3 layers of 64, MLP 160, 4 heads on 2 of 16 channels"]
    assert table["largest picture"] == ["128 x 128 pixels"]
    parts = {row[0]: int(row[1].replace(",", "")) for row in rows if len(row) == 4 and row[0] != "part"}
    assert parts.pop("together") == sum(parts.values()) == 1_458_611
    assert parts["VAE"] == 1_049_603  # what ae.safetensors holds
    assert parts["generation expert"] == 129_952


@pytest.mark.parametrize("command", [["inspect"], ["chat", "hello", "--max-think-tokens", 2]])
def test_without_a_checkpoint_the_shipped_model_is_used(run, command):
    assert run(*command)[0] == 0


def test_module():
    command = [sys.executable, "-m", "bagel_opt", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bagel-opt {bagel_opt.__version__}\n", "")


# ---- errors


@pytest.mark.parametrize("command", ["edit", "understand"])
def test_missing_picture(fails, command):
    assert "nowhere.png" in fails(command, "nowhere.png", "a", "--checkpoint", CHECKPOINT)


@pytest.mark.parametrize("command", ["edit", "understand"])
def test_file_that_is_no_picture(fails, command):
    Path("words.txt").write_text("not a picture")
    err = fails(command, "words.txt", "a", "--checkpoint", CHECKPOINT)
    assert "words.txt" in err
    assert "give PNG, JPEG or WebP" in err


def test_serving_needs_a_profile(fails):
    assert "--profile is missing" in fails("serve", CHECKPOINT)


def test_truncated_picture(fails):
    Path("half.jpg").write_bytes(PICTURE.read_bytes()[:500])
    assert "truncated" in fails("understand", "half.jpg", "a", "--checkpoint", CHECKPOINT)


def test_picture_with_damaged_exif(fails):
    Image.new("RGB", (64, 64)).save("a.webp", exif=b"Exif\0\0garbage!")
    assert "the picture a.webp cannot be read: not a TIFF file" in fails(
        "understand", "a.webp", "a", "--checkpoint", CHECKPOINT
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_timesteps", 1], "num_timesteps=1; allowed: a whole number of at least 2"),
        (["--cfg-interval", 0.9, 0.1], "cfg_interval=(0.9, 0.1); allowed: (low, high)"),
        (["--cfg-renorm-type", "local"], "cfg_renorm_type='local'; allowed: 'global'"),
        (["--step-cache", "none"], "step_cache='none'; allowed: None, 'taylorseer', 'teacache'"),
        (["--text-temperature", "nan"], "text_temperature=nan; allowed: a number from 0.001 to 1000"),
        (["--seed", -1], "seed=-1; allowed"),
        (["--height", 65], "height=65; allowed: a multiple of 16 pixels"),
        (["--width", 4096], "at most 128 pixels"),
        (["--dtype", "int8"], "dtype='int8'; allowed are 'float32'"),
        (["--device", "gpu"], "device='gpu'; allowed are 'cpu'"),
        (["--backend", "tpu"], "backend='tpu'; allowed for a checkpoint are 'eager'"),
        (["--attention", "fast"], "attention='fast'; allowed are 'auto'"),
        (["--profile", "nowhere"], "profile 'nowhere' is neither a file nor one of: "),
        (["--out", "cat.xyz"], "--out cat.xyz: the name must end in .png, .jpg or .webp"),
        (["--out", "no/cat.png"], "--out no/cat.png: there is no folder no"),
    ],
)
def test_bad_value(fails, arguments, message):
    assert message in fails("generate", "a cat", "--checkpoint", CHECKPOINT, *arguments)


@pytest.mark.parametrize("arguments", [["--num-timesteps", 1], ["--out", "cat.xyz"]])
def test_slips_cost_no_loading(fails, monkeypatch, arguments):
    monkeypatch.setattr("bagel_opt.cli.commands.load", lambda *a, **k: pytest.fail("loaded"))
    fails("generate", "a cat", *arguments)


@pytest.mark.parametrize("command", [["generate", "a"], ["edit", PICTURE, "a"], ["chat", "a"], ["inspect"]])
def test_missing_checkpoint(fails, tmp_path, command):
    where = [tmp_path / "nowhere"] if command == ["inspect"] else ["--checkpoint", tmp_path / "nowhere"]
    assert f"{tmp_path / 'nowhere'} is no folder" in fails(*command, *where)


def test_empty_checkpoint(fails, tmp_path):
    assert f"{tmp_path} has no weights" in fails("chat", "a", "--checkpoint", tmp_path)


@pytest.mark.parametrize(
    "argv",
    [[], ["draw"], ["generate"], ["generate", "a", "--steps", "3"], ["chat", "a", "--height", "64"]]
    + [["serve", "--port", port] for port in ("99999", "-1", "x", "1e3", "9" * 5000)],
)
def test_bad_usage(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: bagel-opt" in capsys.readouterr().err


def test_a_port_in_use_ends_the_server_before_a_model_is_loaded(fails, monkeypatch):
    monkeypatch.setattr("bagel_opt.cli.commands.load", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in fails("serve", "--port", port)
    assert "cannot listen on nowhere.invalid, port 8000" in fails("serve", "--host", "nowhere.invalid")


@pytest.mark.parametrize("arguments", [[], ["--no-check"]])
def test_checking_of_bundles_can_be_left_out(run, monkeypatch, arguments):
    seen, load = [], bagel_opt.load
    monkeypatch.setattr(
        "bagel_opt.cli.commands.load", lambda *a, check, **k: seen.append(check) or load(*a, check=check, **k)
    )
    run("chat", "hi", "--max-think-tokens", "1", *arguments)
    assert seen == [not arguments]


def test_inspect_can_leave_out_checking_too(fails, run, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "text.onnx").write_bytes((copy / "text.onnx").read_bytes()[::-1])
    assert "text.onnx was changed" in fails("inspect", copy)
    assert run("inspect", copy, "--no-check")[0] == 0
    for option, value in (("--profile", "tiny"), ("--dtype", "bfloat16")):
        assert "whose profiles, dtype and weights were fixed" in fails("inspect", bundle, option, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--max-replicas", "3"], "--max-replicas is for replicas; give --replicas too"),
        (["bench", "somewhere", "--preset", "h100"], "--preset makes its own weights; leave somewhere out"),
        (["bench", "--onnx", "somewhere"], "--onnx is for --preset"),
        (["bench", "--aoti", "somewhere"], "--aoti is for --preset"),
    ],
)
def test_options_that_would_do_nothing_are_refused(fails, arguments, message):
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ([], "auto"),
        (["--parallel", "sequence"], "sequence"),
        (["--parallel", "guidance=2,sequence=3"], {"guidance": 2, "sequence": 3}),
    ],
)
def test_several_gpus(given, way, monkeypatch):
    asked = {}

    def load(source, **settings):
        asked.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr("bagel_opt.cli.commands.load", load)
    assert main(["chat", "a", "--gpus", "6", *given]) == 1
    assert (asked["gpus"], asked["parallel"]) == (6, way)


@pytest.mark.parametrize("way", ["guidance=two", "guidance=2,guidance=2", "guidance=2,sequence"])
def test_ways_that_are_none(way, capsys):
    with pytest.raises(SystemExit):
        main(["chat", "a", "--gpus", "4", "--parallel", way])
    assert "is no way of WAY=RANKS, as guidance=2,sequence=2" in capsys.readouterr().err


def test_out_of_memory_says_how_much_and_what_to_do(fails, monkeypatch):
    def full(*arguments, **options):
        raise MemoryError("the GPU has no 1.2 GB left; use a smaller profile")

    monkeypatch.setattr("bagel_opt.cli.commands.load", full)
    said = fails("chat", "a").splitlines()[-1]
    assert said == "bagel-opt: out of memory: the GPU has no 1.2 GB left; use a smaller profile"


def test_interrupted(run, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bagel_opt.cli.commands.load", interrupt)
    assert run("chat", "a") == (130, "", "bagel-opt: interrupted\n")


def test_without_a_compiler_all_runs_eager(run, eager, monkeypatch):
    """One line says so."""
    lacks = Compiler("a C++ compiler", "No working C++ compiler found", "install g++")
    monkeypatch.setattr("bagel_opt.devices.compiler", lambda _: lacks)
    status, out, err = run("chat", "a", *TEXT, "--backend", "compile")
    assert (status, out) == (0, eager.chat("a", max_think_tokens=6) + "\n")
    [line] = [line for line in err.splitlines() if "compile" in line]
    assert line == "nothing is compiled (No working C++ compiler found), so all runs eager, more slowly; install g++"


def test_flex_attention_without_a_compiler_is_refused(fails, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("bagel_opt.loading.compiler", lambda _: Compiler("g++", "there is no Python.h", "install it"))
    line = fails("chat", "a", *TEXT, "--attention", "flex")
    assert "(there is no Python.h): install it, or use attention='sdpa'" in line


@pytest.mark.parametrize("said", ["CppCompileError: C++ compile error", "Failed to find C compiler. Please"])
def test_a_compiler_that_fails_is_told_in_one_line(said, fails, monkeypatch):
    def breaks(*arguments, **options):
        raise RuntimeError(f"backend='inductor' raised:\n{said}\nmore")

    monkeypatch.setattr("bagel_opt.cli.commands.load", breaks)
    assert f"bagel-opt: {said}; compiling needs a C++ compiler" in fails("chat", "a")


def test_a_library_that_cannot_be_imported_is_told_with_its_reason(fails, bundle, tmp_path, monkeypatch):
    with packages(monkeypatch, tmp_path, onnxruntime="raise ImportError('libcudart.so.13: no such file')"):
        line = fails("chat", "a", "--checkpoint", bundle, "--no-check")
    assert (
        "an ONNX bundle needs onnxruntime, which cannot be imported here (libcudart.so.13: no such file): pip" in line
    )


def test_a_picture_that_is_not_there_is_named(capsys):
    assert main(["edit", "make it green", "shapes.png"]) == 1  # in the wrong order
    assert (
        capsys.readouterr().err == "bagel-opt: there is no picture make it green; its file comes first, then the text\n"
    )


EMPTY = [
    *((command, f"--{name}") for command in ("generate", "serve") for name in ("profile", "device", "weights", "lora")),
    *(("generate", f"--{name}") for name in ("checkpoint", "memory", "quantization", "parallel", "image", "out")),
    *(
        ("export", f"--{name}")
        for name in ("recipe", "dtype", "format", "profile", "out", "checkpoint", "quantization")
    ),
    *(("bench", f"--{name}") for name in ("official", "backends", "export", "json")),
    *(("serve", f"--{name}") for name in ("host", "name")),
    ("inspect", "--profile"),
    ("quantize", "--out"),
]


@pytest.mark.parametrize(("command", "option"), EMPTY)
def test_options_without_a_value(command, option, capsys):
    """As of a shell's variable that was not set. None is passed over, and none is the folder that one is in."""
    with pytest.raises(SystemExit, match="2"):
        parser(COMMANDS).parse_args([command, option, ""])
    assert f"{option}: it is empty; give a value, or leave the option out" in capsys.readouterr().err.replace("-o/", "")


def test_sources_without_a_name(fails):
    for command in (["inspect", ""], ["quantize", "", "--quantization", "int8", "--out", "new"], ["serve", ""]):
        assert "'' names nothing; give a checkpoint folder, a bundle or a repo id" in fails(*command)
    assert "there is no picture ''; its file comes first" in fails("edit", "", "make it green")


def test_what_an_edit_lacks(fails, tmp_path):
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.tif")
    both = "give a picture's file and then the text, or --video FILE and the text"
    assert both in fails("edit", "thin.tif")
    assert "image: an image of 1x300 pixels is too thin" in fails("edit", "thin.tif", "a", *SMALL)


def test_bundles_and_files_in_the_place_of_others(fails, small_bundle, tmp_path):
    made_from = (
        f"{small_bundle} is a bundle, whose weights are for its programs; give the checkpoint that it was made from"
    )
    assert made_from in fails("export", "--checkpoint", small_bundle, "--profile", "tiny", "--out", "new")
    assert made_from in fails("quantize", small_bundle, "--quantization", "int8", "--out", "new")
    assert made_from in fails("chat", "a", "--checkpoint", CHECKPOINT, "--weights", small_bundle)
    (tmp_path / "file").touch()
    for command in (["export", "--profile", "tiny"], ["quantize", "--quantization", "int8"]):
        told = fails(*command, "--out", "file/new")
        assert f"{tmp_path}/file/new cannot be a folder: {tmp_path}/file is a file" in told


def test_folders_that_may_not_be_written_to(fails, tmp_path, monkeypatch):
    """Told before anything is drawn or timed. Root, and so these tests in a container, may write anywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path / "locked"))
    monkeypatch.setattr("bagel_opt.cli.commands.load", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "locked").mkdir()
    for command, option, file in (("generate", "--out", "a.png"), ("bench", "--json", "a.json")):
        words = ["a"] if command == "generate" else []
        line = fails(command, *words, option, f"locked/{file}")
        assert f"{option} locked/{file}: nothing may be written to the folder {tmp_path / 'locked'}" in line
