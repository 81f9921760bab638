"""Unusual and broken image files.

``VALID`` has files that must be read: functions that write a file to a path and return its expected
pixels, ``(H, W, 3)`` uint8 RGB. ``BROKEN`` has the contents of files that must be refused.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 60
LOSSY = 14  # largest mean difference due to compression or color conversion


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Make a smooth image without symmetry: rotating or mirroring changes it."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 40 + 0 * x]
    return np.round(np.stack(channels, axis=2)).astype(np.uint8)


PICTURE = picture()
GRAY = PICTURE[:, :, 0]
GRAY_RGB = np.repeat(GRAY[:, :, None], 3, axis=2)
OTHER = 255 - PICTURE  # a second frame


def _rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def _saved(image_format: str, image: np.ndarray = PICTURE, **options) -> Callable:
    def make(path: Path) -> np.ndarray:
        Image.fromarray(image).save(path, image_format, **options)
        return image if image.ndim == 3 else GRAY_RGB

    return make


def _converted(mode: str, image_format: str) -> Callable:
    def make(path: Path) -> np.ndarray:
        image = Image.fromarray(PICTURE).convert(mode)
        image.save(path, image_format)
        return _rgb(image)

    return make


def _with_opacity(mode: str) -> Callable:
    """Half transparent. Transparency is ignored."""

    def make(path: Path) -> np.ndarray:
        image = Image.fromarray(PICTURE if mode == "RGBA" else GRAY).convert(mode)
        image.putalpha(Image.fromarray(GRAY))
        image.save(path, "PNG")
        return PICTURE if mode == "RGBA" else GRAY_RGB

    return make


def transparent_palette(path: Path) -> np.ndarray:
    image = Image.fromarray(PICTURE).quantize(16)
    image.save(path, "PNG", transparency=bytes(range(0, 160, 10)))
    return _rgb(image)


def _sixteen_bits(image_format: str, dtype: str) -> Callable:
    def make(path: Path) -> np.ndarray:
        # The lower eight bits are noise, which must not influence the result.
        noise = np.random.default_rng(0).integers(0, 256, GRAY.shape)
        Image.fromarray((GRAY.astype(np.uint16) * 256 + noise).astype(dtype)).save(
            path, image_format
        )
        return GRAY_RGB

    return make


def sixteen_bit_pgm(path: Path) -> np.ndarray:
    path.write_bytes(b"P5 60 40 65535 " + (GRAY.astype(">u2") * 257).tobytes())
    return GRAY_RGB


def _frames(image_format: str, **options) -> Callable:
    def make(path: Path) -> np.ndarray:
        first = Image.fromarray(PICTURE)
        if image_format == "GIF":
            first = first.quantize(256)
        others = [Image.fromarray(OTHER)] * 2
        first.save(path, image_format, save_all=True, append_images=others, **options)
        return _rgb(first)

    return make


# How to display an image, by its EXIF orientation.
EXIF_TRANSFORMS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image.transpose(1, 0, 2), 2),
    8: lambda image: np.rot90(image, 1),
}


def _orientation(value: int, image_format: str) -> Callable:
    def make(path: Path) -> np.ndarray:
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(PICTURE).save(path, image_format, exif=exif)
        return EXIF_TRANSFORMS.get(value, EXIF_TRANSFORMS[1])(PICTURE)

    return make


def _exif(content: bytes) -> Callable:
    return _saved("JPEG", exif=b"Exif\0\0" + content, quality=95)


def _sized(height: int, width: int) -> Callable:
    return _saved("PNG", picture(height, width))


VALID: dict[str, tuple[str, Callable[[Path], np.ndarray], int]] = {
    # name of the case: (file name, function that writes the file, tolerance)
    "PNG called jpg": ("a.jpg", _saved("PNG"), 0),
    "JPEG called png": ("a.png", _saved("JPEG", quality=95), LOSSY),
    "GIF called bmp": ("a.bmp", _frames("GIF"), 0),
    "bmp": ("a.bmp", _saved("BMP"), 0),
    "tiff, compressed": ("a.tif", _saved("TIFF", compression="tiff_lzw"), 0),
    "webp": ("a.webp", _saved("WEBP", lossless=True), 0),
    "suffix in upper case": ("A.PNG", _saved("PNG"), 0),
    "gray": ("a.png", _saved("PNG", GRAY), 0),
    "gray jpeg": ("a.jpg", _saved("JPEG", GRAY, quality=95), LOSSY),
    "one bit": ("a.png", _converted("1", "PNG"), 0),
    "palette": ("a.png", _converted("P", "PNG"), 0),
    "palette with opacity": ("a.png", transparent_palette, 0),
    "gray with opacity": ("a.png", _with_opacity("LA"), 0),
    "RGBA": ("a.png", _with_opacity("RGBA"), 0),
    "CMYK jpeg": ("a.jpg", _converted("CMYK", "JPEG"), LOSSY),
    "CMYK tiff": ("a.tif", _converted("CMYK", "TIFF"), 0),
    "16-bit png": ("a.png", _sixteen_bits("PNG", "<u2"), 0),
    "16-bit tiff": ("a.tif", _sixteen_bits("TIFF", "<u2"), 0),
    "16-bit tiff, big endian": ("a.tif", _sixteen_bits("TIFF", ">u2"), 0),
    "16-bit pgm called png": ("a.png", sixteen_bit_pgm, 0),
    "animated gif": ("a.gif", _frames("GIF"), 0),
    "animated webp": ("a.webp", _frames("WEBP", lossless=True), 0),
    "animated png": ("a.png", _frames("PNG"), 0),
    "tiff of several pages": ("a.tif", _frames("TIFF"), 0),
    **{f"EXIF orientation {n}": ("a.png", _orientation(n, "PNG"), 0) for n in EXIF_TRANSFORMS},
    **{f"tiff, orientation {n}": ("a.tif", _orientation(n, "TIFF"), 0) for n in EXIF_TRANSFORMS},
    "EXIF orientation 0": ("a.png", _orientation(0, "PNG"), 0),
    "EXIF orientation 9": ("a.png", _orientation(9, "PNG"), 0),
    "EXIF of noise": ("a.jpg", _exif(bytes(range(200, 256))), LOSSY),
    "EXIF cut off": ("a.jpg", _exif(b"II*\0\x08\0\0\0\x01\0\x12\x01"), LOSSY),
    "EXIF that refers to itself": (
        "a.jpg",
        _exif(b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"),
        LOSSY,
    ),
    "1x1": ("a.png", _sized(1, 1), 0),
    "20000x10": ("a.png", _sized(10, 20000), 0),
    "10x20000": ("a.png", _sized(20000, 10), 0),
    "name with spaces": (" a  b .png", _saved("PNG"), 0),
    "name not in ASCII": ("Öl-画像.png", _saved("PNG"), 0),
    "name with dots": ("a..b...png", _saved("PNG"), 0),
    "name with a backslash": ("a\\b.png", _saved("PNG"), 0),
    "name with a newline": ("a\nb.png", _saved("PNG"), 0),
    "name not in UTF-8": ("a\udcffb.png", _saved("PNG"), 0),
    "name with pattern characters": ("{0}%s*.png", _saved("PNG"), 0),
    "name like an option": ("-rf.png", _saved("PNG"), 0),
    "longest possible name": ("a" * 251 + ".png", _saved("PNG"), 0),
}


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _bytes_of(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, image_format)
    return file.getvalue()


def _flipped(content: bytes, index: int) -> bytes:
    return content[:index] + bytes([content[index] ^ 0xFF]) + content[index + 1 :]


def _header(width: int, height: int) -> bytes:
    return struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def _float_tiff(dtype: type) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE[:, :, 0].astype(dtype)).save(file, "TIFF")
    return file.getvalue()


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 60 40
%%EndComments
(ran) (OUT) (w) file exch writestring
"""

BROKEN: dict[str, tuple[str, bytes]] = {
    # name of the case: (file name, content)
    "empty": ("a.png", b""),
    "text called jpg": ("a.jpg", b"not an image\n"),
    "HTML called png": ("a.png", b"<!DOCTYPE html><title>404</title>"),
    "svg called png": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "ELF called jpg": ("a.jpg", b"\x7fELF\x02\x01\x01" + bytes(200)),
    "PostScript called jpg": ("a.jpg", EPS),
    "truncated png": ("a.png", _bytes_of("PNG")[:-60]),
    "truncated jpeg": ("a.jpg", _bytes_of("JPEG")[:-300]),
    "truncated bmp": ("a.bmp", _bytes_of("BMP")[:-900]),
    "truncated gif": ("a.gif", _bytes_of("GIF")[:-200]),
    "truncated tiff": ("a.tif", _bytes_of("TIFF")[:300]),
    "truncated webp": ("a.webp", _bytes_of("WEBP")[:-30]),
    "header only": ("a.png", _bytes_of("PNG")[:33]),
    "header of zeros": ("a.png", _png((b"IHDR", _header(0, 0)), (b"IEND", b""))),
    "flipped bits in the checksum of the header": ("a.png", _flipped(_bytes_of("PNG"), 30)),
    "bomb: 60000x60000": (
        "a.png",
        _png((b"IHDR", _header(60000, 60000)), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    ),
    "bomb: compressed text": (
        "a.png",
        _png(
            (b"IHDR", _header(8, 8)),
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27))),
            (b"IDAT", zlib.compress(bytes(8 * 25))),
            (b"IEND", b""),
        ),
    ),
    "bomb: bmp of 4e9 x 4e9": (
        "a.bmp",
        b"BM" + bytes(8) + b"\x36\0\0\0\x0c\0\0\0\xff\xff\xff\xff\x01\0\x18\0",
    ),
    "32-bit floats": ("a.tif", _float_tiff(np.float32)),
    "32-bit integers": ("a.tif", _float_tiff(np.int32)),
}
