"""The command line on the Lance checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lance_cases import CHECKPOINT, loaded
from PIL import Image
from safetensors.torch import load_file

from bagel_opt.videos import read_video

FEW = ["--checkpoint", CHECKPOINT, "--num-timesteps", 2, "--seed", 0]
SMALL = ["--resolution-vae", 64, "--resolution-vit", 84]
SIZE = ["--height", 64, "--width", 96]


def test_pictures(run):
    assert run("generate", "a ball", *FEW, *SIZE)[:2] == (0, "out.png\n")
    want = loaded().generate("a ball", height=64, width=96, num_timesteps=2, seed=0)
    assert np.array_equal(Image.open("out.png"), want)
    assert run("edit", "out.png", "blue", *FEW, *SMALL, "-o", "blue.png")[:2] == (0, "blue.png\n")
    status, out, _ = run(
        "understand", "out.png", "what?", "--checkpoint", CHECKPOINT, "--max-think-tokens", 3, *SMALL[2:]
    )
    assert status == 0
    assert out == loaded().understand(Image.open("out.png"), "what?", max_think_tokens=3, resolution_vit=84) + "\n"


def test_videos(run):
    pytest.importorskip("av")
    frames = ["--num-frames", 9, "--fps", 8]
    status, out, err = run("generate", "a ball", *FEW, *SIZE, "--output", "video", *frames)
    assert (status, out) == (0, "out.mp4\n")
    assert "again: bagel-opt generate" in err
    made = read_video("out.mp4", None)
    assert (made.count, made.fps, made.size) == (9, 8, (96, 64))
    want = loaded().generate("a ball", output="video", num_frames=9, height=64, width=96, num_timesteps=2, seed=0)
    for got, frame in zip(made.pick(range(9)), want, strict=True):  # H.264 keeps a fourth of the colours
        assert np.abs(np.asarray(got.convert("L")).astype(int) - np.asarray(frame.convert("L"))).mean() < 8
    assert run("edit", "--video", "out.mp4", "blue", *FEW, *SMALL, "-o", "blue.mp4")[:2] == (0, "blue.mp4\n")
    assert read_video("blue.mp4", None).fps == 12
    next(made.pick([0])).save("first.png")
    begins = ["--output", "video", "--image", "first.png", "--num-frames", 5]
    assert run("generate", "it rolls", *FEW, *SMALL[:2], *begins, "-o", "rolls.mp4")[0] == 0
    assert read_video("rolls.mp4", None).count == 5
    status, out, _ = run("understand", "--video", "out.mp4", "what?", *FEW[:2], "--max-think-tokens", 3, *SMALL[2:])
    assert status == 0
    assert out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "blue", *FEW], "give a picture's file and then the text, or --video FILE"),
        (["edit", "a.png", "blue", "--video", "a.mp4", *FEW], "give a picture's file, or --video FILE; not both"),
        (["edit", "--video", "a.mp4", "blue", *FEW], "video: there is no file a.mp4"),
        (
            ["generate", "a", "--output", "video", "-o", "a.png", *FEW],
            "--out a.png: the name of a video must end in .mp4",
        ),
        (["generate", "a", "-o", "a.mp4", *FEW], "--out a.mp4: the name must end in .png, .jpg or .webp"),
        (["generate", "a", "--image", "a.png", *FEW], "--image is what a video begins with"),
        (["generate", "a", "--output", "video", "--num-frames", 10000, *FEW], "9997 frames; allowed: at most 121"),
        (["generate", "a", "--output", "video", "--num-timesteps", 2], "load a Lance checkpoint for videos"),
        (["chat", "hello", "--checkpoint", CHECKPOINT], "Lance answers questions about a picture or a video"),
        (["interleave", "hello", "--checkpoint", CHECKPOINT], "output='interleaved': Lance answers with one"),
        (["convert", CHECKPOINT], "Wan2.2_VAE.pth is missing; give the folder of a Lance checkpoint"),
        (["convert", "nowhere"], "nowhere is no folder and no file; give the folder of a Lance checkpoint"),
    ],
)
def test_what_is_refused(fails, arguments, message):
    assert message in fails(*arguments)
    assert not list(Path.cwd().iterdir())


def test_convert(run):
    shutil.copytree(CHECKPOINT, "lance")
    torch.save(load_file("lance/Wan2.2_VAE.safetensors"), "lance/Wan2.2_VAE.pth")
    Path("lance/Wan2.2_VAE.safetensors").unlink()
    status, _, err = run("generate", "a", "--checkpoint", "lance", *FEW[2:], *SIZE)
    assert status == 1
    assert "`bagel-opt convert lance` reads its numbers alone" in err
    assert run("convert", "lance")[:2] == (0, "lance/Wan2.2_VAE.safetensors\n")
    assert run("generate", "a", "--checkpoint", "lance", *FEW[2:], *SIZE)[0] == 0


@pytest.mark.parametrize("more", [[], ["--profile", "tiny"], ["--memory", "4GB"]])
def test_inspect(run, more):
    status, out, _ = run("inspect", CHECKPOINT, *more)
    assert status == 0
    for told in ("generation expert", "longest video", "121 frames", "recommended num_timesteps", *more[1:]):
        assert told.removesuffix("GB") in out
