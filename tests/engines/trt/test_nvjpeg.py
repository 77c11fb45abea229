"""Rule ``grey8-nvjpeg-v1``: JPEGs by nvJPEG, on a stand-in of nvImageCodec; all other files by the ordinary rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import double_nvimgcodec
import numpy as np
import pytest

from engines import packages
from engines.contract import NVJPEG_RULE, ModelContract
from engines.errors import EnvironmentProblem, ImageError
from engines.images import decode_grey, decode_image, read_input, read_inputs, require_decoder
from engines.trt import nvjpeg
from engines.trt.cuda import Gpu

CONTRACT = ModelContract(labels=("a", "b"), architecture="dsc", decode=NVJPEG_RULE)
GREY = np.random.default_rng(2).integers(0, 200, (12, 15), dtype=np.uint8)
PICTURE = cv2.resize(GREY, (900, 720), interpolation=cv2.INTER_CUBIC)


def encode(suffix: str, pixels: np.ndarray = PICTURE) -> bytes:
    return bytes(cv2.imencode(suffix, pixels)[1].tobytes())


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """This machine has a GPU and nvImageCodec."""
    real = packages.load
    monkeypatch.setattr(nvjpeg, "find_gpu", lambda: (Gpu("Double", "8.7"), ""))
    monkeypatch.setattr(
        nvjpeg, "load", lambda name: double_nvimgcodec if name == "nvidia.nvimgcodec" else real(name)
    )
    monkeypatch.setattr(nvjpeg, "_OF_THREAD", nvjpeg.threading.local())
    decoder = double_nvimgcodec.Decoder
    for name, value in (("made", []), ("fails", ""), ("has_nvjpeg", True)):
        monkeypatch.setattr(decoder, name, value)
    yield double_nvimgcodec


def test_jpegs_are_decoded_by_nvjpeg_and_nothing_else_is(codec: ModuleType) -> None:
    jpeg = encode(".jpg")
    whole = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(decode_image(jpeg, CONTRACT), np.minimum(whole, 254) + 1)
    colour = encode(".jpg", cv2.cvtColor(PICTURE, cv2.COLOR_GRAY2BGR))
    assert decode_image(colour, CONTRACT).shape == PICTURE.shape
    for suffix in (".png", ".bmp", ".tiff", ".webp"):
        data = encode(suffix)
        np.testing.assert_array_equal(decode_image(data, CONTRACT), decode_grey(data))
    ordinary = ModelContract(labels=("a", "b"), architecture="dsc")
    np.testing.assert_array_equal(decode_image(jpeg, ordinary), decode_grey(jpeg))
    assert len(codec.Decoder.made) == 1


def test_every_thread_has_its_own_decoder(codec: ModuleType, tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"{index:02}.jpg").write_bytes(encode(".jpg"))
    files = sorted(tmp_path.iterdir())
    expected = read_input(files[0], CONTRACT)
    for image in read_inputs(files, CONTRACT, threads=3):
        np.testing.assert_array_equal(image.pixels, expected)
    assert 2 <= len(codec.Decoder.made) <= 4


def test_bad_jpegs_are_rows(codec: ModuleType, tmp_path: Path) -> None:
    jpeg = encode(".jpg")
    with pytest.raises(ImageError, match="is a truncated JPEG"):
        decode_image(jpeg[:-400], CONTRACT, name="x")
    refused = jpeg[:2] + b"\xff\xfe\x00\x0fnvjpeg cannot" + jpeg[2:]  # a comment
    with pytest.raises(ImageError, match="x is a JPEG that nvJPEG does not decode") as seen:
        decode_image(refused, CONTRACT, name="x")
    assert seen.value.remedy == "copy the file again, or save it as PNG"
    with pytest.raises(ImageError, match=r"pixels"):
        decode_image(jpeg.replace(b"\x02\xd0\x03\x84", b"\xff\xff" * 2), CONTRACT)  # 720 rows, 900 columns


def test_what_is_missing_is_named(codec: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codec.Decoder.has_nvjpeg = False
    with pytest.raises(EnvironmentProblem, match="nvJPEG is not installed") as seen:
        require_decoder(CONTRACT)
    assert seen.value.remedy == "run it where that works, or build an engine without --decode nvjpeg"
    codec.Decoder.fails = "CUDA Runtime failure: '#35'"
    with pytest.raises(EnvironmentProblem, match="decoded by nvJPEG: CUDA Runtime failure: '#35'"):
        require_decoder(CONTRACT)
    codec.Decoder.fails = ""
    monkeypatch.delattr(codec, "CodeStream")
    with pytest.raises(EnvironmentProblem, match="nvImageCodec has no CodeStream here: update it"):
        decode_image(encode(".jpg"), CONTRACT)
    monkeypatch.setattr(nvjpeg, "load", packages.load)
    with pytest.raises(EnvironmentProblem, match=r"cannot import nvidia\.nvimgcodec") as seen:
        require_decoder(CONTRACT)
    assert "nvidia-nvimgcodec-cu12[nvjpeg]" in seen.value.remedy
    monkeypatch.setattr(nvjpeg, "find_gpu", lambda: (None, "no CUDA driver: libcuda.so.1 not found"))
    (tmp_path / "a.jpg").write_bytes(encode(".jpg"))
    with pytest.raises(EnvironmentProblem, match="decoded by nvJPEG: no CUDA driver"):
        list(read_inputs([tmp_path / "a.jpg"], CONTRACT))
    require_decoder(ModelContract(labels=("a", "b"), architecture="dsc"))


def test_a_gpu_that_fails_later_ends_the_job(codec: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    require_decoder(CONTRACT)

    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("CUDA Runtime failure: '#2'\n at here")

    monkeypatch.setattr(codec.Decoder, "decode", fail)
    with pytest.raises(EnvironmentProblem, match="nvJPEG: CUDA Runtime failure: '#2' at here"):
        decode_image(encode(".jpg"), CONTRACT)
