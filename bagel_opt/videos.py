"""Videos on the host: frames that a caller gives or that a file holds, and files that frames are written to (by PyAV)."""

import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from bagel_opt.errors import reason
from bagel_opt.images import check_image
from bagel_opt.installed import missing
from bagel_opt.options import FPS, Options

MOST_FRAMES = 4096  # that may be read of one video


@dataclass(frozen=True, eq=False)
class Video:
    """A video to read. count: its frames, of `size` (width, height) in pixels. source: those frames, or a file's path or bytes."""

    count: int
    fps: float
    size: tuple[int, int]
    source: "Sequence[Image.Image] | os.PathLike | bytes"

    def pick(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these numbers, which ascend and may repeat, one at a time: a file's may be large. Raises ValueError where a
        file does not hold them after all."""
        if not isinstance(self.source, os.PathLike | bytes):
            yield from (self.source[number] for number in numbers)
            return
        left = deque(numbers)
        with _opened(self.source) as container:
            for number, frame in enumerate(container.decode(video=0)):
                while left and left[0] == number:
                    yield frame.to_image()
                    left.popleft()
                if not left:
                    return
        raise ValueError(f"video: {_name(self.source)} ends before its frame {left[0]}; write it anew")


def read_video(source: Any, fps: float | None, most: int | None = None) -> Video:
    """A video from its frames, PIL images that follow each other `fps` times a second (FPS unless given), or from a file's path or
    bytes. most: pixels that all frames of a file may have together. Raises ValueError, TypeError for other things,
    FileNotFoundError, and ImportError where a file needs PyAV."""
    if isinstance(source, str):
        source = _Path(source)
    if isinstance(source, os.PathLike | bytes):
        return _read_file(source, most)
    frames = list(source) if isinstance(source, Sequence) else None
    if frames is None or not all(isinstance(frame, Image.Image) for frame in frames):
        what = type(source).__name__ if frames is None else f"{type(source).__name__} of other things"
        raise TypeError(f"video is {what}; allowed are a list of PIL images, a file's path and bytes")
    if not frames:
        raise ValueError("video is an empty list; give at least two frames, or a file")
    _check_sizes(frames)
    check_image(frames[0], "video")
    _check_count(len(frames), "video")
    return Video(len(frames), fps or FPS, frames[0].size, frames)


def _check_sizes(frames: Sequence[Image.Image]) -> None:
    for number, frame in enumerate(frames):
        if frame.size != frames[0].size:
            sizes = (f"{width}x{height}" for width, height in (frame.size, frames[0].size))
            raise ValueError(
                "video: frame {} is {} pixels, and frame 0 is {}; resize them to one size".format(number, *sizes)
            )


class _Path(str, os.PathLike):
    def __fspath__(self) -> str:
        return str(self)


def _check_count(count: int, where: str) -> None:
    if count == 1:
        raise ValueError(f"{where}: a video of 1 frame; give it as a picture")
    if count > MOST_FRAMES:
        raise ValueError(f"{where}: a video of {count} frames; allowed: at most {MOST_FRAMES}, so cut it")


def _read_file(source: "os.PathLike | bytes", most: int | None) -> Video:
    name = _name(source)

    def check(count: int, pixels: int) -> None:
        if count > MOST_FRAMES:
            raise ValueError(f"video: {name} has more than {MOST_FRAMES} frames, which is the most allowed; cut it")
        if most is not None and pixels > most:
            raise ValueError(f"video: {name} has more than {most} pixels, all its frames together; cut it")

    with _opened(source) as container:
        stream = container.streams.video[0]
        size, rate = (stream.width, stream.height), stream.average_rate or stream.guessed_rate
        count = pixels = 0
        check(count, size[0] * size[1])
        if most is not None:  # of a frame, whatever the head of the file says
            stream.codec_context.options = {"max_pixels": str(most)}
        for frame in container.decode(video=0):
            count, pixels = count + 1, pixels + frame.width * frame.height
            check(count, pixels)
    _check_count(count, f"video: {name}")
    check_image(Image.new("1", size), f"video: {name}")
    return Video(count, float(rate or FPS), size, source)


def _name(source: "os.PathLike | bytes") -> str:
    return "this file" if isinstance(source, bytes) else os.fspath(source)


@contextmanager
def _opened(source: "os.PathLike | bytes") -> Iterator[Any]:
    name = _name(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise FileNotFoundError(f"video: there is no file {name}")
    av = _library("a file of a video")
    # a playlist must not make the library open addresses, nor, where it came as bytes, files
    options = {"protocol_whitelist": "none" if isinstance(source, bytes) else "file"}
    file = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    try:
        with av.open(file, options=options) as container:
            if not container.streams.video:
                raise ValueError(f"video: {name} has no pictures in it; give a video")
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(f"video: {name} is no video that can be read: {reason(error)}") from None


def _library(what: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise missing(what, "av", error, "video") from None
    return av


def check_writing(width: int, height: int) -> None:
    """Raises ValueError for frames that `save_video` does not write, ImportError where it cannot write any."""
    if width % 2 or height % 2:
        raise ValueError(f"frames are {width}x{height} pixels; H.264 as players read it takes even sides")
    _library("a file of a video")


def save_video(frames: Sequence[Image.Image], file: "str | os.PathLike | BinaryIO", fps: float = FPS) -> None:
    """Writes frames as an MP4 file (H.264), shown `fps` times a second. Raises ValueError for no frames, several or odd sizes,
    FileNotFoundError for a file in no folder, and ImportError where PyAV is missing."""
    if not frames:
        raise ValueError("there are no frames to write")
    if not isinstance(frames, Sequence) or not all(isinstance(frame, Image.Image) for frame in frames):
        raise TypeError(f"frames is {type(frames).__name__}; allowed is a list of PIL images")
    _check_sizes(frames)
    width, height = frames[0].size
    check_writing(width, height)
    Options(fps=fps)  # raises what is wrong with it
    if isinstance(file, str | os.PathLike) and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(file)}: there is no folder {Path(file).parent}")
    av = _library("a file of a video")
    with av.open(os.fspath(file) if isinstance(file, str | os.PathLike) else file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
