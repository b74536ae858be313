"""Decoding against Pillow and NumPy, and against files that mean harm."""

import contextlib
import io
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgelab import images
from edgelab.errors import ImageError
from edgelab.images import decode

RNG = np.random.default_rng(0)
PICTURE: NDArray[np.uint8] = RNG.integers(0, 256, (24, 40, 3), np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_back_the_pixels(kind: str, options: dict[str, Any]) -> None:
    pixels = decode(encode(Image.fromarray(PICTURE), kind, **options))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_lossy_formats_give_what_pillow_gives(kind: str) -> None:
    data = encode(Image.fromarray(PICTURE), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ein Bild ü.png"
    path.write_bytes(encode(Image.fromarray(PICTURE), "PNG"))
    for image in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(decode(image), PICTURE)


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, PICTURE),
        (2, PICTURE[:, ::-1]),
        (3, PICTURE[::-1, ::-1]),
        (4, PICTURE[::-1]),
        (5, PICTURE.transpose(1, 0, 2)),
        (6, PICTURE.transpose(1, 0, 2)[::-1]),
        (7, PICTURE[::-1, ::-1].transpose(1, 0, 2)),
        (8, PICTURE.transpose(1, 0, 2)[:, ::-1]),
    ],
)
def test_exif_orientation_is_undone(orientation: int, stored: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data), PICTURE)


def test_transparency_is_dropped_and_colours_stay() -> None:
    alpha = RNG.integers(0, 256, PICTURE.shape[:2], np.uint8)
    rgba = Image.fromarray(np.dstack([PICTURE, alpha]))
    np.testing.assert_array_equal(decode(encode(rgba, "PNG")), PICTURE)


def test_a_palette_gives_its_colours_even_with_transparent_entries() -> None:
    palette = Image.fromarray(PICTURE).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(palette, "PNG")), expected)
    transparent = encode(palette, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode(transparent), expected)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_three_equal_channels(mode: str) -> None:
    grey = Image.fromarray(PICTURE).convert(mode)
    pixels = decode(encode(grey, "PNG"))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], np.asarray(grey.convert("L")))


def test_cmyk_is_converted() -> None:
    red = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.max(abs(red.astype(int) - (255, 0, 0))) <= 2  # JPEG is lossy


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(ramp), kind))
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(pixels, np.dstack([expected] * 3))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_grey_is_refused(dtype: type) -> None:
    data = encode(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(ImageError, match="32-bit pixels"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_a_truncated_file_is_an_error(kind: str) -> None:
    data = encode(Image.fromarray(PICTURE), kind)
    for length in (len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError):
            decode(data[:length])


@pytest.mark.parametrize(
    ("width", "height"),
    [(8193, 8192), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)],
    ids=["our limit", "Pillow's warning", "Pillow's error", "largest claim"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_memory_is_taken(width: int, height: int) -> None:
    with pytest.raises(ImageError, match=r"too large.*67,108,864 pixels are the limit"):
        decode(png_claiming(width, height))


def test_the_largest_size_is_not_called_too_large() -> None:
    with pytest.raises(ImageError, match="damaged or cut off"):  # it has no pixel data
        decode(png_claiming(8192, 8192))


@pytest.mark.parametrize("data", [b"", b"\0", b"not an image", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7"])
def test_bytes_that_are_no_image_name_the_formats(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"bytes\) is no image that can be read here.*JPEG, PNG"):
        decode(data)


def test_other_formats_of_pillow_stay_closed() -> None:
    data = encode(Image.fromarray(PICTURE), "EPS")  # would start Ghostscript
    with pytest.raises(ImageError, match="no image that can be read"):
        decode(data)


def test_a_missing_file_a_folder_and_an_impossible_name_say_why(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read .*missing\.jpg: No such file"):
        decode(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match=r"cannot read .*: (Is a directory|Permission denied)"):
        decode(tmp_path)
    with pytest.raises(ImageError, match=r"cannot read .*: embedded null"):
        decode("a\0b.jpg")


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(PICTURE), "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(data))
    decode(path)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(data) - 1)
    for image in (path, data):
        with pytest.raises(ImageError, match="more than"):
            decode(image)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_file_without_end_is_left_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    pipe, taken = tmp_path / "pipe", 0
    os.mkfifo(pipe)

    def feed() -> None:
        nonlocal taken
        with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            while taken < 100 << 20:
                taken += file.write(bytes(1 << 16)) or 0

    feeder = threading.Thread(target=feed)
    feeder.start()
    with pytest.raises(ImageError, match="pipe has more than 1,000 bytes"):
        decode(pipe)
    feeder.join()
    assert taken <= 1 << 20


@pytest.mark.parametrize(
    "array",
    [
        PICTURE.astype(np.float32),
        PICTURE.astype(np.int8),
        PICTURE[..., 0],
        PICTURE[..., :2],
        np.dstack([PICTURE, PICTURE[..., :1]]),
        PICTURE.transpose(2, 0, 1),
        PICTURE[None],
        np.empty((0, 4, 3), np.uint8),
        np.empty((4, 0, 3), np.uint8),
        np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (8193, 8192, 3)),
        np.array(b"text"),
    ],
    ids=lambda a: f"{a.dtype} {a.shape}",
)
def test_an_array_of_another_form_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match=r"need uint8 pixels|it must have 1 to"):
        decode(array)


def test_a_view_that_is_not_contiguous_becomes_contiguous() -> None:
    mirrored = decode(PICTURE[::-2, ::3])
    assert mirrored.flags.c_contiguous
    np.testing.assert_array_equal(mirrored, PICTURE[::-2, ::3])


def only_image_errors(data: bytes) -> None:
    try:
        pixels = decode(data)
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@settings(max_examples=300)
@given(st.sampled_from([b"", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"BM", b"P6 ", b"II*\0"]),
       st.binary(max_size=400))  # fmt: skip
def test_random_bytes_raise_only_image_errors(start: bytes, rest: bytes) -> None:
    only_image_errors(start + rest)


EXIF = Image.Exif()
EXIF[0x0112] = 6
VICTIMS = [
    encode(Image.fromarray(PICTURE), "JPEG", exif=EXIF),
    encode(Image.fromarray(PICTURE).quantize(16), "PNG", transparency=bytes(16), exif=EXIF),
    encode(Image.fromarray(PICTURE), "WEBP"),
    encode(Image.fromarray(PICTURE).quantize(16), "GIF"),
]


@settings(max_examples=500)
@given(
    st.sampled_from(VICTIMS),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 1 << 16),
)
def test_mutated_files_raise_only_image_errors(
    victim: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(victim)
    for place, value in changes:
        data[place % len(data)] = value
    only_image_errors(bytes(data[: cut % len(data)] if cut % 3 == 0 else data))
