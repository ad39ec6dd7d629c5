"""Videos that go in and come out, and what is wrong with them."""

import contextlib
import io
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from lance_cases import loaded
from PIL import Image

from bagel_opt import Request, save_video, videos
from bagel_opt.sampling.lance import frame_numbers
from bagel_opt.sampling.planning import make_plan
from bagel_opt.videos import MOST_FRAMES, Video, read_video

av = pytest.importorskip("av")
FEW = {"num_timesteps": 2, "seed": 0}
SMALL = {"resolution_vae": 64, "resolution_vit": 84}


def frames(count, size=(64, 48)):
    return [Image.new("RGB", size, (20 * number % 256, 100, 50)) for number in range(count)]


@pytest.fixture(scope="module")
def model():
    return loaded()


def test_a_file_gives_back_its_frames(tmp_path):
    path = tmp_path / "a.mp4"
    save_video(frames(9), path, fps=24)
    save_video(frames(9), written := io.BytesIO(), fps=24)
    for source in (path, str(path), path.read_bytes(), written.getvalue()):
        video = read_video(source, None)
        assert (video.count, video.fps, video.size) == (9, 24, (64, 48))
        picked = video.pick([0, 4, 4, 8])
        for number, frame in zip((0, 4, 4, 8), picked, strict=True):
            assert np.abs(np.asarray(frame).astype(int) - np.asarray(frames(9)[number])).max() < 12


def test_a_file_and_its_frames_are_edited_alike(model, tmp_path):
    path = tmp_path / "a.mp4"
    save_video(frames(6), path)
    read = list(read_video(path, None).pick(range(6)))
    one, other = (model.edit(video=v, instruction="red", **FEW, **SMALL) for v in (path, read))
    assert len(one) == 5
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("count", "fps", "numbers"),
    [
        (16, 24, [0, 3, 7, 11, 15]),  # 8 frames would be read; 4 divides 8
        (7, 12, [0, 1, 3, 4, 6]),
        (2, 12, [0]),
        (720, 12, 69),  # six seconds of sixty
        (72, 12, 69),
        (75, 12, 69),
    ],
)
def test_frames_that_are_read(count, fps, numbers):
    found = frame_numbers(Video(count, fps, (8, 8), ()))
    assert found == numbers if isinstance(numbers, list) else len(found) == numbers
    assert max(found) < count


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "video is an empty list; give at least two frames, or a file"),
        (frames(1), "video: a video of 1 frame; give it as a picture"),
        (
            [*frames(3), *frames(1, (48, 48))],
            "video: frame 3 is 48x48 pixels, and frame 0 is 64x48; resize them to one size",
        ),
        (
            [Image.new("1", (8, 8))] * 10000,
            f"video: a video of 10000 frames; allowed: at most {MOST_FRAMES}, so cut it",
        ),
        (frames(2, (600, 2)), "too thin"),
        (b"no video", "video: this file is no video that can be read: "),
        (__file__, "test_videos.py is no video that can be read: "),
    ],
)
def test_bad_videos(video, message):
    with pytest.raises(ValueError, match=r"^video") as caught:
        Request(["a"], video=video)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_may_have_so_many_pixels(tmp_path):
    save_video(frames(9), tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    assert read_video(data, None, most=9 * 64 * 48).count == 9
    with pytest.raises(ValueError, match="this file has more than 27647 pixels, all its frames together; cut it"):
        read_video(data, None, most=9 * 64 * 48 - 1)
    with pytest.raises(ValueError, match="this file has more than 3071 pixels"):
        read_video(data, None, most=64 * 48 - 1)
    growing = raw(frames(9)) + raw(frames(1, (640, 480)))  # the later frames are not even decoded
    with pytest.raises(ValueError, match=r"this file is no video that can be read: .*(max_pixels|Invalid data)"):
        read_video(growing, None, most=9 * 64 * 48)


def raw(frames):
    """As H.264 without a container, of which several can follow each other."""
    with av.open(file := io.BytesIO(), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"])  # fmt: skip
def test_a_playlist_opens_nothing_else(tmp_path, monkeypatch, text):
    """What comes over the net could otherwise read this machine's files, and fetch from its network."""
    monkeypatch.chdir(tmp_path)
    save_video(frames(9), tmp_path / "other.mp4")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/other.mp4"
        for place in ("other.mp4", str(tmp_path / "other.mp4"), address):
            with pytest.raises(ValueError, match="this file is no video that can be read"):
                read_video(text.format(place).encode(), None)
        (tmp_path / "list.mp4").write_text(text.format(address))
        with pytest.raises(ValueError, match=r"list\.mp4 is no video that can be read"):
            read_video(tmp_path / "list.mp4", None)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_a_picture_is_no_video(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a video of 1 frame; give it as a picture|no video"):
        Request(["a"], video=tmp_path / "a.png")


@pytest.mark.parametrize("video", [3, ["a"], [Image.new("RGB", (8, 8)), 3], {"a": 1}])
def test_other_things_are_no_videos(video):
    with pytest.raises(TypeError, match=r"^video is .*; allowed are a list of PIL images, a file's path and bytes$"):
        Request(["a"], video=video)


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"^video: there is no file nowhere\.mp4$"):
        Request(["a"], video="nowhere.mp4")


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (
            ["a"],
            {"output": "video", "num_frames": 10000},
            "num_frames: 9997 frames; allowed: at most 121",
        ),
        (
            ["a"],
            {"height": 1040, "width": 16},
            "height, width: 1040x16 pixels .*; allowed: at most 1024 a side",
        ),
        (["a"], {"height": 100}, "height=100; allowed: a multiple of 16 pixels"),
        (["a"], {"num_frames": 5}, "num_frames=5: a picture is one frame"),
        (["a", Image.new("RGB", (64, 48))], {"height": 64}, "height=64: .* an edit has its input's size"),
        (
            ["a", Image.new("RGB", (64, 48))],
            {"output": "video", "width": 64},
            "width=64: .* begins with a picture has its size",
        ),
        (["a"], {"video": frames(5)}, "output='image': a video is edited into a video; use output='video'"),
        (["a"], {"video": frames(5), "num_frames": 5, "output": "video"}, "num_frames=5: "),
        (["a"], {"video": frames(2), "fps": 100, "output": "video"}, "video: 2 frames at 100 a second are too short"),
        (["a"], {"output": "text"}, "Lance answers questions about a picture or a video, and there is none"),
        (["a"], {"output": "interleaved"}, "output='interleaved': Lance answers with one text, picture or video"),
        (["a"], {"size": "input"}, "size='input'; allowed only for an edit"),
        (["a", "b"], {}, "inputs: 2 texts and 0 pictures or videos; Lance takes one text"),
        ([Image.new("RGB", (64, 48))], {}, "inputs: 0 texts and 1 pictures"),
        (["a", *[Image.new("RGB", (64, 48))] * 2], {}, "inputs: 1 texts and 2 pictures"),
        (["a"], {"think": True}, "think=True: Lance has no such option; leave it out"),
        (["a"], {"negative_prompt": "blur"}, "negative_prompt='blur': Lance has no such option"),
        (["a"], {"cfg_img_scale": 2.0}, "cfg_img_scale=2.0: Lance has no such option"),
        (["a"], {"vit_max_size": 100}, "vit_max_size=100: Lance has no such option"),
        (["a"], {"max_rounds": 2}, "max_rounds=2: Lance has no such option"),
        (
            ["a", Image.new("RGB", (64, 48))],
            {"resolution_vae": 2000},
            r"inputs\[1\]: .* pixels .*; allowed: at most 1024 a side",
        ),
        (
            ["a", Image.new("RGB", (640, 48))],
            {"resolution_vae": 64, "resolution_vit": 16},
            "resolution_vit=16 makes it .* pixels; use a larger one",
        ),
        (["a"], {"noise": np.zeros((3, 48), np.float32)}, r"noise has shape \[3, 48\]; allowed: \[2304, 48\]"),
    ],
)
def test_what_lance_refuses(model, inputs, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        model.run(inputs, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output": "video"},
            "^output='video': this model draws and reads pictures alone; load a Lance checkpoint for videos$",
        ),
        ({"video": frames(3)}, "^video: this model draws and reads pictures alone"),
        ({"num_frames": 5}, "^num_frames: this model"),
        ({"resolution_vae": 64}, "^resolution_vae: this model"),
    ],
)
def test_bagel_refuses_videos(eager, options, message):
    with pytest.raises(ValueError, match=message):
        eager.run(["a"], **options)


def test_values_that_are_nobodys_option_are_left_alone(model):
    """Options that are given as they are by default ask for nothing."""
    options = {"think": False, "negative_prompt": None, "cfg_img_scale": 1.5, "height": 32, "width": 32}
    assert model.generate("a", **options, **FEW).size == (32, 32)


def test_without_pyav_files_are_refused_with_what_to_install(monkeypatch, tmp_path):
    path = tmp_path / "a.mp4"
    save_video(frames(2), path)
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (lambda: read_video(path, None), lambda: save_video(frames(2), path)):
        with pytest.raises(ImportError, match=r"a file of a video needs .*pip install 'bagel-opt\[video\]'"):
            call()


def test_files_take_even_sides(tmp_path):
    with pytest.raises(ValueError, match="frames are 63x48 pixels"):
        save_video(frames(2, (63, 48)), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no frames"):
        save_video([], tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("frames", "file", "fps", "kind", "message"),
    [
        ([], "a.mp4", 12, ValueError, "there are no frames"),
        ("frames", "a.mp4", 12, TypeError, "frames is str; allowed is a list of PIL images"),
        ([np.zeros((8, 8, 3))], "a.mp4", 12, TypeError, "frames is list; allowed is a list of PIL images"),
        ([(8, 8), (8, 16)], "a.mp4", 12, ValueError, "frame 1 is 8x16 pixels, and frame 0 is 8x8"),
        ([(8, 8)], "nowhere/a.mp4", 12, FileNotFoundError, "nowhere/a.mp4: there is no folder nowhere"),
        ([(8, 8)], "a.mp4", 0, ValueError, "fps=0; allowed: a number from 1 to 240"),
    ],
)
def test_what_is_not_written(tmp_path, monkeypatch, frames, file, fps, kind, message):
    monkeypatch.chdir(tmp_path)
    found = (
        [Image.new("RGB", one) if isinstance(one, tuple) else one for one in frames] if frames != "frames" else frames
    )
    with pytest.raises(kind, match=message):
        save_video(found, file, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_caption_that_is_a_word_of_the_system_text(model):
    """The official code takes the first place where its tokens are for the caption."""
    plan = make_plan(Request([" image"], height=32, width=32), model.config, model.tokenizer)
    lost = sum(block.length for block in plan.main) - sum(block.length for block in plan.cfg_text)
    assert lost == len(model.tokenizer.encode(" image"))
    assert plan.cfg_text[0].length < plan.main[0].length  # of the system text
    assert plan.targets[1].at[0] == plan.targets[0].at[0] - lost


def test_an_empty_caption_shares_its_branch(model):
    plan = make_plan(Request([""], height=32, width=32), model.config, model.tokenizer)
    assert plan.contexts() == 1
    assert model.run([""], height=32, width=32, **FEW)[0].size == (32, 32)


def test_wide_pictures_are_read_smaller(model):
    """Of the default resolution some ratios would be beyond the table of places."""
    [picture] = model.run(["blue", Image.new("RGB", (640, 240))], **FEW, resolution_vit=84)
    assert picture.size == (784, 336)


def test_a_file_that_ends_too_soon(tmp_path, monkeypatch):
    save_video(frames(3), tmp_path / "short.mp4")
    video = read_video(tmp_path / "short.mp4", None)
    with pytest.raises(ValueError, match=r"short.mp4 ends before its frame 4; write it anew"):
        list(video.pick([0, 4, 5]))
    empty = SimpleNamespace(decode=lambda video: iter(()))
    monkeypatch.setattr(videos, "_opened", lambda source: contextlib.nullcontext(empty))
    with pytest.raises(ValueError, match=r"ends before its frame 0"):
        list(video.pick([0]))
