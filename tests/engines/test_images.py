from __future__ import annotations

import hashlib
import struct
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from msgspec.structs import replace

from engines import images
from engines.contract import DECODE_RULE, ModelContract
from engines.errors import ImageError
from engines.images import LEVEL_BINS, count_levels, shape_input

CONTRACT = ModelContract(labels=("a", "b"), architecture="dsc")
COLOUR = ModelContract(labels=("a", "b"), architecture="x", decode="rgb8-v1", height=96, width=80)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(pixels: np.ndarray, suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, pixels, list(options))
    assert done
    return data.tobytes()


def with_exif_orientation(jpeg: bytes, orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = b"MM\x00\x2a" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    body = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_lossless_grey_comes_back_bit_for_bit(suffix: str) -> None:
    pixels = smooth(300, 260)
    np.testing.assert_array_equal(images.decode_grey(encode(pixels, suffix)), pixels)


def test_equal_channels_alpha_and_16_bits_give_the_grey_picture() -> None:
    grey = smooth(300, 260)
    bgr = cv2.merge([grey, grey, grey])
    bgra = cv2.merge([grey, grey, grey, np.full_like(grey, 128)])
    wide = grey.astype(np.uint16) * 257
    for pixels in (bgr, bgra, wide, cv2.merge([wide, wide, wide]), cv2.merge([wide, wide, wide, wide])):
        np.testing.assert_array_equal(images.decode_grey(encode(pixels, ".png")), grey)


def test_palette_png() -> None:
    # A 32x32 palette image of two colours, written by hand: OpenCV writes none.
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\x00" + bytes([row % 2] * 32) for row in range(32))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 3, 0, 0, 0))
    png += (
        chunk(b"PLTE", bytes([10, 10, 10, 200, 200, 200]))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    expected = np.repeat(np.array([10, 200] * 16, np.uint8)[:, None], 32, axis=1)
    np.testing.assert_array_equal(images.decode_grey(png), expected)


@pytest.mark.parametrize(("bits", "shift"), [(10, 2), (12, 4), (14, 6), (16, 8)])
def test_detector_depth_in_a_16_bit_file_is_recognised(bits: int, shift: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = images.decode_grey(encode(ramp, ".png"))
    np.testing.assert_array_equal(decoded, (ramp >> shift).astype(np.uint8))
    assert decoded.max() == 255


def test_progressive_jpeg_is_the_baseline_jpeg() -> None:
    pixels = smooth(300, 260)
    baseline = encode(pixels, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 92)
    progressive = encode(pixels, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    np.testing.assert_array_equal(images.decode_grey(progressive), images.decode_grey(baseline))


@pytest.mark.parametrize(("height", "width"), [(300, 260), (1200, 1000)])
def test_exif_orientation_is_applied(height: int, width: int) -> None:
    jpeg = encode(smooth(height, width), ".jpg")
    upright = images.decode_grey(jpeg)
    turned = images.decode_grey(with_exif_orientation(jpeg, 6))
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))


@pytest.mark.parametrize(("side", "expected"), [(447, 447), (895, 895), (896, 448), (1792, 448), (3584, 448)])
def test_large_jpegs_are_decoded_at_reduced_size(side: int, expected: int) -> None:
    assert images.decode_grey(encode(np.zeros((side, side + 8), np.uint8), ".jpg")).shape[0] == expected


def test_reduced_decoding_stays_close_to_the_full_picture() -> None:
    pixels = smooth(1800, 1800)
    full = images.resize_to(pixels, 224, 224).astype(int)
    reduced = images.resize_to(images.decode_grey(encode(pixels, ".jpg")), 224, 224).astype(int)
    assert np.abs(full - reduced).mean() < 1.0


def test_resize_halves_exactly_and_leaves_the_target_alone() -> None:
    pixels = smooth(448, 448)
    means = pixels.reshape(224, 2, 224, 2).astype(float).mean(axis=(1, 3))
    assert np.abs(images.resize_to(pixels, 224, 224) - means).max() <= 0.5
    same = smooth(224, 224)
    assert images.resize_to(same, 224, 224) is same


@pytest.mark.parametrize("size", [(225, 900), (224, 224), (100, 300), (300, 100), (449, 451), (1001, 1003)])
def test_every_size_becomes_the_input_shape(size: tuple[int, int]) -> None:
    out = images.prepare_pixels(smooth(*size), CONTRACT)
    assert out.shape == (224, 224, 1)
    assert out.dtype == np.uint8


def test_a_file_gives_the_bits_of_the_pixels_in_it(tmp_path: Path) -> None:
    grey = smooth(500, 470)
    path = tmp_path / "a.png"
    path.write_bytes(encode(cv2.merge([grey, grey, grey]), ".png"))
    frame = images.grey8(cv2.merge([grey, grey, grey]))  # as a camera gives it
    np.testing.assert_array_equal(images.read_input(path, CONTRACT), images.prepare_pixels(frame, CONTRACT))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_colours_come_back_bit_for_bit_red_first(suffix: str, tmp_path: Path) -> None:
    rgb = np.stack([smooth(96, 80, seed) for seed in range(3)], axis=2)
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode(bgr, suffix))
    np.testing.assert_array_equal(images.read_input(path, COLOUR), rgb)
    # A frame of a camera gives the bits of a file, with alpha, and at the depth of a detector, too.
    deep = np.maximum(bgr.astype(np.uint16) << 2, 3)  # ten bits
    deep[0, 0] = 1023
    expected = rgb.copy()
    expected[0, 0] = 255
    for frame, wanted in ((bgr, rgb), (cv2.cvtColor(bgr, cv2.COLOR_BGR2BGRA), rgb), (deep, expected)):
        converted = images.convert_frame(frame, COLOUR)
        np.testing.assert_array_equal(images.prepare_pixels(converted, COLOUR), wanted)


def test_grey_files_have_three_equal_channels_for_a_network_of_colour() -> None:
    grey = replace(COLOUR, decode="grey8-v1")
    for pixels in (smooth(300, 260), smooth(300, 260).astype(np.uint16) * 16):
        data = encode(pixels, ".png")
        wanted = images.prepare_pixels(images.decode_image(data, grey), grey)
        found = images.prepare_pixels(images.decode_image(data, COLOUR), COLOUR)
        np.testing.assert_array_equal(found, wanted.repeat(3, axis=2))
    flat = images.convert_frame(smooth(100, 100)[:, :, None], COLOUR)  # as some cameras give it
    assert images.prepare_pixels(flat, COLOUR).shape == (96, 80, 3)


def test_each_channel_is_resized_as_the_grey_picture_would_be() -> None:
    grey = replace(COLOUR, decode="grey8-v1")
    channels = [smooth(501, 700, seed) for seed in range(3)]
    found = images.prepare_pixels(np.stack(channels[::-1], axis=2), COLOUR)
    for place, channel in enumerate(channels):
        np.testing.assert_array_equal(found[:, :, place], images.prepare_pixels(channel, grey)[:, :, 0])


def test_a_colour_jpeg_is_turned_and_reduced_like_a_grey_one() -> None:
    jpeg = encode(np.stack([smooth(1200, 1000, seed) for seed in range(3)], axis=2), ".jpg")
    upright = images.decode_image(jpeg, COLOUR)
    assert upright.shape == (600, 500, 3)
    turned = images.decode_image(with_exif_orientation(jpeg, 6), COLOUR)
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))
    with pytest.raises(ImageError, match="truncated JPEG"):
        images.decode_image(jpeg[:-2], COLOUR)


@pytest.mark.parametrize(("side", "expected"), [(96, 448), (224, 448), (225, 896), (600, 1792)])
def test_a_reduced_jpeg_keeps_two_pixels_for_each_of_the_networks(side: int, expected: int) -> None:
    contract = replace(CONTRACT, height=32, width=side)
    jpeg = encode(np.zeros((1792, 1800), np.uint8), ".jpg")
    assert images.decode_image(jpeg, contract).shape[0] == expected


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    """Forty images, one of which is none and one of which is not there."""
    paths = [tmp_path / f"{index:02}.png" for index in range(40)]
    for index, path in enumerate(paths):
        path.write_bytes(encode(smooth(64, 64, seed=index), ".png"))
    paths[7].write_text("hello")
    paths[30].unlink()
    return paths


@pytest.mark.parametrize("threads", [1, 3, None])
def test_many_files_come_back_in_order_with_their_hashes(folder: list[Path], threads: int | None) -> None:
    found = list(images.read_inputs(iter(folder), CONTRACT, threads=threads))
    assert [image.path for image in found] == folder
    for image in found:
        if image.path in (folder[7], folder[30]):
            continue
        assert image.sha256 == hashlib.sha256(image.path.read_bytes()).hexdigest()
        np.testing.assert_array_equal(image.pixels, images.read_input(image.path, CONTRACT))
    damaged, missing = found[7], found[30]
    assert damaged.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert isinstance(damaged.pixels, ImageError) and "damaged or no image" in damaged.pixels.what
    assert missing.sha256 == ""
    assert isinstance(missing.pixels, ImageError) and "does not exist" in missing.pixels.what


def test_each_file_is_read_once_and_only_a_few_ahead(
    folder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = images.read_bytes
    monkeypatch.setattr(images, "read_bytes", lambda path: read.append(path) or real(path))
    inputs = images.read_inputs(folder, CONTRACT, threads=2)
    next(inputs)
    assert len(read) <= 4 * 2
    list(inputs)
    assert sorted(read) == folder


def test_a_caller_who_stops_early_ends_the_reading(folder: list[Path]) -> None:
    inputs = images.read_inputs(folder, CONTRACT, threads=2)
    next(inputs)
    inputs.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_processors_that_this_process_may_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    assert images.usable_processors() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert images.usable_processors() == 1


def test_truncated_jpegs_and_pngs_are_refused() -> None:
    for suffix in (".jpg", ".png"):
        data = encode(smooth(300, 260), suffix)
        for kept in (0.3, 0.6, 0.99):
            with pytest.raises(ImageError):
                images.decode_grey(data[: int(len(data) * kept)], name="x")
    jpeg = encode(smooth(300, 260), ".jpg")
    with pytest.raises(ImageError, match=r"a\.jpg is a truncated JPEG \(\d+ bytes\)"):
        images.decode_grey(jpeg[:-2], name="a.jpg")


def test_a_truncated_png_is_named_without_a_word_of_libpng(capfd: pytest.CaptureFixture[str]) -> None:
    png = encode(smooth(300, 260), ".png")
    with pytest.raises(ImageError, match=r"a\.png is a truncated PNG \(\d+ bytes\)"):
        images.decode_grey(png[:-1], name="a.png")
    assert capfd.readouterr() == ("", "")
    assert images.decode_grey(png + b"\n").shape == (300, 260)


def test_a_damaged_tiff_is_refused_without_a_word_of_opencv(capfd: pytest.CaptureFixture[str]) -> None:
    images.quiet_decoder()
    with pytest.raises(ImageError, match=r"a\.tiff is damaged"):
        images.decode_grey(tiff((256, 3, 64), (257, 3, 64)), name="a.tiff")
    assert capfd.readouterr() == ("", "")


def test_a_text_file_named_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "note.png"
    path.write_text("hello, this is text")
    with pytest.raises(
        ImageError, match=r"note\.png is damaged or no image \(19 bytes, starting 68 65 6c 6c"
    ):
        images.read_input(path, CONTRACT)


def test_a_1x1_image_is_refused() -> None:
    with pytest.raises(ImageError, match="dot is 1x1 pixels") as caught:
        images.prepare_pixels(np.zeros((1, 1), np.uint8), CONTRACT, name="dot")
    assert "at least 32 pixels a side" in caught.value.remedy


def test_a_20000_pixel_png_is_refused_by_its_header_alone() -> None:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", 20000, 20000)
    with pytest.raises(ImageError, match="big is 20000x20000 = 400 megapixels"):
        images.decode_grey(header, name="big")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"is empty \(0 bytes\)"), (None, "does not exist"), ("folder", "is not a regular file")],
)
def test_unusable_files(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "x.png"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        images.read_input(path, CONTRACT)


def test_float_pixels_and_strange_shapes_are_refused() -> None:
    with pytest.raises(ImageError, match="float32 pixels"):
        images.grey8(np.zeros((64, 64), np.float32))
    with pytest.raises(ImageError, match=r"shape \(64, 64, 2\)"):
        images.grey8(np.zeros((64, 64, 2), np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".webp"])
def test_encoded_size_reads_headers(suffix: str) -> None:
    data = encode(smooth(48, 40), suffix)
    assert images.encoded_size(data) == (48, 40)
    for size in range(len(data)):
        assert images.encoded_size(data[:size]) in ((48, 40), None)


def webp(kind: bytes, content: bytes) -> bytes:
    return b"RIFF" + bytes(4) + b"WEBP" + kind + bytes(4) + content


def tiff(*entries: tuple[int, int, int], order: str = "<") -> bytes:
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, value in entries:
        data += struct.pack(order + "HHI", tag, kind, 1)
        data += struct.pack(order + ("H" if kind == 3 else "I"), value).ljust(4, b"\0")
    return data + bytes(4)


BIG_TIFF = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2)
BIG_TIFF += struct.pack("<HHQQ", 256, 4, 1, 30000) + struct.pack("<HHQQ", 257, 16, 1, 40000)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"BM" + bytes(12) + struct.pack("<Iii", 40, 30000, -40000), (40000, 30000)),
        (b"BM" + bytes(12) + struct.pack("<IHH", 12, 30000, 40000), (40000, 30000)),
        (webp(b"VP8X", bytes(4) + b"\x2f\x75\0\x3f\x9c\0"), (40000, 30000)),
        (webp(b"VP8L", b"\x2f" + struct.pack("<I", 9999 << 14 | 15999)), (10000, 16000)),
        (webp(b"VP8 ", bytes(6) + struct.pack("<HH", 16000, 10000)), (10000, 16000)),
        (tiff((256, 3, 30000), (257, 4, 40000)), (40000, 30000)),
        (tiff((256, 3, 30000), (257, 3, 9), (257, 3, 40000), order=">"), (40000, 30000)),
        (BIG_TIFF, (40000, 30000)),
    ],
)
def test_no_format_is_decoded_before_its_size_is_known(
    data: bytes, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cv2, "imdecode")
    assert images.encoded_size(data) == size
    with pytest.raises(ImageError, match=f"x is {size[1]}x{size[0]} = "):
        images.decode_grey(data, name="x")


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + struct.pack("<HH", 64, 64),
        b"P5\n64 64\n255\n" + bytes(4096),
        b"#?RADIANCE\n",
        b"\x76\x2f\x31\x01",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\xff\xd8\xff",
        tiff((256, 5, 64), (257, 4, 64)),
        tiff((256, 4, 64)),
    ],
)
def test_other_formats_and_headers_without_a_size_are_not_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cv2, "imdecode")
    with pytest.raises(ImageError, match="x is damaged or no image"):
        images.decode_grey(data, name="x")


def test_several_pictures_in_one_file_are_refused() -> None:
    pages = (smooth(64, 64), smooth(64, 64, 1))
    done, two = cv2.imencodemulti(".tiff", pages)
    assert done
    page = tiff((256, 3, 64), (257, 3, 64))
    still = encode(smooth(64, 64), ".png")
    moving = still[:33] + struct.pack(">I", 8) + b"acTL" + bytes(12) + still[33:]
    animated = webp(b"VP8X", b"\2\0\0\0" + b"\x3f\0\0" * 2)
    for data in (two.tobytes(), moving, animated):
        with pytest.raises(ImageError, match="x holds more than one picture"):
            images.decode_grey(data, name="x")
    thumbnail = struct.pack("<HHHII", 1, 254, 4, 1, 1) + bytes(4)
    assert not images._has_more_pictures(page[:-4] + struct.pack("<I", len(page)) + thumbnail)
    assert images._has_more_pictures(page[:-4] + struct.pack("<I", 8) + thumbnail)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    jpeg = encode(smooth(300, 260), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = jpeg.rfind(b"\xff\xda")
    with pytest.raises(ImageError, match=r"x is a JPEG of \d{3} scans"):
        images.decode_grey(jpeg[:-2] + 100 * jpeg[last:-2] + jpeg[-2:], name="x")


@pytest.mark.parametrize("kind", [ValueError, MemoryError, cv2.error, AssertionError])
def test_whatever_a_decoder_raises_is_the_error_of_that_picture(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind("Doe^Jane")

    (tmp_path / "a.png").write_bytes(encode(smooth(64, 64), ".png"))
    for place in ("imdecode", "resize"):
        with monkeypatch.context() as patch:
            patch.setattr(cv2, place, fail)
            (read,) = images.read_inputs([tmp_path / "a.png"], CONTRACT)
            assert isinstance(read.pixels, ImageError) and "a.png" in str(read.pixels)
            assert "Doe" not in str(read.pixels)


@pytest.mark.parametrize("decode", [DECODE_RULE, "rgb8-v1"])
def test_grey_levels_are_those_of_the_pixels_whatever_the_engine_takes(decode: str) -> None:
    contract = ModelContract(labels=("a", "b"), architecture="x", decode=decode, height=64, width=48)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *contract.input_shape), dtype=np.uint8)
    expected = np.bincount(pixels.reshape(-1) // (256 // LEVEL_BINS), minlength=LEVEL_BINS)
    for made in (contract, contract.with_input("float16"), contract.with_input("int8", 1)):
        np.testing.assert_array_equal(count_levels(shape_input(pixels, made), made), expected)
