"""300 files as people send them: of all modes and formats, damaged, lying, and no pictures at all."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

SIZE = (20, 14)
SHADES = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
PICTURE = Image.fromarray(SHADES)
FORMATS = ("png", "jpeg", "webp", "gif", "tiff", "bmp", "ppm", "jpeg2000", "tga", "ico")
UNLIKE_FILES = {
    "a text": b"a red circle\n",
    "nothing": b"",
    "a page": b"<!doctype html><title>404 Not Found</title>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "json": b'{"error": {"message": "no such picture"}}',
    "zeros": bytes(4096),
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    "pdf": b"%PDF-1.7\n%%EOF\n",
    "gzip": zlib.compress(b"a picture"),
    "png's first bytes": b"\x89PNG\r\n\x1a\n",
    "jpeg's first bytes": b"\xff\xd8\xff\xe0",
    "riff": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    "a data URL": b"data:image/png;base64,iVBORw0KGgo=",
}


def saved(image: Image.Image, kind: str = "png", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Of a PNG."""
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 0, data: bytes = b"\0" * 9) -> bytes:
    """What its header says, whatever it holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    ends = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + ends


def _modes() -> Iterator[tuple[str, bytes]]:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"):
        for kind in FORMATS:
            try:
                image = PICTURE.convert(mode) if mode not in ("LAB", "HSV") else Image.new(mode, SIZE, (90, 120, 140))
                yield f"{mode} in {kind}", saved(image, kind)
            except (OSError, ValueError, KeyError):  # which the format does not have
                continue


def _ramp(low: float, high: float, dtype: type) -> Image.Image:
    ramp = np.linspace(low, high if np.isfinite(high) else 1, SIZE[0] * SIZE[1]).astype(dtype).reshape(SIZE[::-1])
    ramp[-1, -1] = high
    return Image.fromarray(ramp)


def _numbers() -> Iterator[tuple[str, bytes]]:
    for kind in ("png", "tiff", "jpeg2000"):
        yield f"16 bits in {kind}", saved(_ramp(0, 65535, np.uint16), kind)
    for low, high in ((0, 255), (0, 4095), (0, 65535), (-5, 255), (0, 2**31 - 1)):
        yield f"whole numbers {low} to {high}", saved(_ramp(low, high, np.int32), "tiff")
    for low, high in ((0, 1), (0, 255), (0, 1000), (-1, 1), (0, np.nan), (0, np.inf)):
        yield f"floats {low} to {high}", saved(_ramp(low, high, np.float32), "tiff")
    yield "pgm of 16 bits", b"P5 2 2 65535\n" + bytes(range(8))
    yield "pgm of 10 bits", b"P5 2 2 1023\n" + bytes(range(8))
    yield "pfm", b"Pf\n2 2\n-1.0\n" + np.array([0, 0.5, 1, 1], "<f4").tobytes()


def _transparent() -> Iterator[tuple[str, bytes]]:
    palette = PICTURE.convert("P")
    for name, value in (("one", 3), ("some", bytes(range(200))), ("none", b"")):
        yield f"palette, {name} transparent", saved(palette, transparency=value)
    for mode, colour in (("L", 9), ("1", 1), ("RGB", (9, 9, 9)), ("I;16", 900)):
        yield f"{mode}, one transparent", saved(Image.new(mode, SIZE, colour), transparency=colour)
    yield "gif, one transparent", saved(palette, "gif", transparency=2)


def _turned() -> Iterator[tuple[str, bytes]]:
    for kind in ("jpeg", "png", "webp"):
        for orientation in (0, 1, 3, 6, 8, 9, 77):
            exif = Image.Exif()
            exif[274] = orientation
            yield f"orientation {orientation} in {kind}", saved(PICTURE, kind, exif=exif)
        yield f"damaged EXIF in {kind}", saved(PICTURE, kind, exif=b"Exif\0\0garbage!")
        yield f"EXIF that ends in {kind}", saved(PICTURE, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09")


def _frames() -> Iterator[tuple[str, bytes]]:
    others = [PICTURE.rotate(angle) for angle in (90, 180)]
    for kind in ("gif", "webp", "png", "tiff"):
        yield f"three frames in {kind}", saved(PICTURE, kind, save_all=True, append_images=others)


def _sizes() -> Iterator[tuple[str, bytes]]:
    for size in ((1, 1), (1, 40), (40, 1), (1, 200), (1, 201), (1, 5000), (3000, 20), (5000, 1), (2, 3), (900, 7)):
        for kind in ("png", "jpeg"):
            yield f"{size[0]}x{size[1]} in {kind}", saved(Image.new("RGB", size, (9, 90, 200)), kind)


def _headers() -> Iterator[tuple[str, bytes]]:
    """What is said takes memory; what is there does not."""
    for width, height in (
        (2**31 - 1, 1),
        (2**31 - 1, 2**31 - 1),
        (30000, 30000),
        (13000, 13000),
        (5000, 5000),
        (0, 9),
        (0, 0),
    ):
        yield f"png of {width}x{height}", png(width, height)
    for depth, colour in ((16, 2), (3, 0), (8, 7), (1, 3), (16, 6)):
        yield f"png of depth {depth}, colour {colour}", png(4, 4, depth=depth, colour=colour)
    yield "gif of 65535x65535", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;"
    yield (
        "bmp of 100000x100000",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 10**5, 10**5, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield "bmp of height -9", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 9, -9, 1, 24, 0, 0, 0, 0, 0, 0)
    yield "jpeg of 65535x65535", saved(PICTURE, "jpeg").replace(struct.pack(">HH", *SIZE[::-1]), b"\xff" * 4)
    yield "webp of 16383x16383", b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0/" + b"\xff" * 16
    text = zlib.compress(bytes(2**24))
    yield "png with a text of 16 MB in 16 KB", png(4, 4, chunk(b"zTXt", b"a\0\0" + text), data=bytes(20))
    yield "png with a profile of 16 MB", png(4, 4, chunk(b"iCCP", b"a\0\0" + text), data=bytes(20))
    yield (
        "png with a profile that is none",
        png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"none")), data=bytes(20)),
    )
    yield "png with a wrong checksum", png(4, 4, chunk(b"tEXt", b"a\0b", crc=1), data=bytes(20))
    yield "png with an unknown chunk", png(4, 4, chunk(b"abCd", b"?"), data=bytes(20))
    yield "png with much more data", png(4, 4, data=bytes(2**20))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a red circle " * 500)
    yield "png with a long text", saved(PICTURE, pnginfo=info)


def _damaged() -> Iterator[tuple[str, bytes]]:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8))
    whole = {kind: saved(noise, kind) for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp")}
    for kind, data in whole.items():
        for share in (0.02, 0.5, 0.99):
            yield f"{kind}, cut at {share}", data[: int(share * len(data))]
        yield f"{kind} and more", data + b"more"
    draw = random.Random(0)
    for number in range(200):
        kind = draw.choice(list(whole))
        data, first = bytearray(whole[kind]), draw.random() < 0.6
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(60 if first else len(data))] = draw.randrange(256)
        yield f"{kind}, changed {number}", bytes(data)


def odd_pictures(most: int = 300) -> dict[str, bytes]:
    """By what they are. Of fewer than 300, evenly."""
    found = dict(UNLIKE_FILES)
    for make in (_modes, _numbers, _transparent, _turned, _frames, _sizes, _headers, _damaged):
        found |= make()
    names = list(found)[:300]
    assert len(names) == 300
    return {name: found[name] for name in names[:: 300 // most]}
