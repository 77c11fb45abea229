from __future__ import annotations

import io
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from msgspec.structs import replace
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from edge_dsc.infer.source import expand_source
from engines.contract import ModelContract
from engines.dicom import decode_dicom
from engines.errors import ImageError
from engines.images import decode_grey, prepare_pixels, read_input

SECRET = "Doe^Jane"
RAMP = np.linspace(0, 4095, 64 * 96).reshape(64, 96).astype(np.uint16)


def dicom(
    pixels: np.ndarray,
    *,
    bits: int = 12,
    monochrome: int = 2,
    syntax: Any = ExplicitVRLittleEndian,
    **tags: Any,
) -> bytes:
    """A radiograph with a patient, as a modality would send it."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    data.PatientName, data.PatientID, data.PatientBirthDate = SECRET, "4711", "19700101"
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, f"MONOCHROME{monochrome}"
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if syntax == ExplicitVRBigEndian:
        pixels = pixels.astype(pixels.dtype.newbyteorder(">"))
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    for name, value in tags.items():
        setattr(data, name, value)
    return save(data)


def save(data: FileDataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, data, enforce_file_format=True)
    return stream.getvalue()


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, written as the standard does."""
    shown = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    shown[values <= center - 0.5 - (width - 1) / 2] = 0
    shown[values > center - 0.5 + (width - 1) / 2] = 255
    return np.rint(shown).astype(np.uint8)


@pytest.mark.parametrize("monochrome", [1, 2])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_first_window_is_what_a_viewer_shows(bits: int, monochrome: int) -> None:
    dtype = np.uint8 if bits == 8 else np.uint16
    pixels = np.linspace(0, 2**bits - 1, 64 * 96).reshape(64, 96).astype(dtype)
    center, width = 2.0**bits / 3, 2.0**bits / 2
    data = dicom(pixels, bits=bits, monochrome=monochrome, WindowCenter=[center, 5], WindowWidth=[width, 9])
    wanted = linear(pixels.astype(float), center, width)
    grey = decode_dicom(data)
    assert grey.dtype == np.uint8
    assert np.abs(grey.astype(int) - (wanted if monochrome == 2 else 255 - wanted.astype(int))).max() <= 1


def test_rescale_comes_before_the_window_and_values_may_be_signed() -> None:
    pixels = (RAMP.astype(np.int32) - 1024).astype(np.int16)
    data = dicom(pixels, bits=16, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=1000, WindowWidth=3000)
    assert (decode_dicom(data) == linear(pixels * 2.0 - 100, 1000, 3000)).all()


def test_exact_and_sigmoid_windows() -> None:
    for function, formula in (
        ("LINEAR_EXACT", lambda x: np.clip((x - 2000) / 1000 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 2000) / 1000))),
    ):
        data = dicom(RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction=function)
        assert (decode_dicom(data) == np.rint(formula(RAMP.astype(float)) * 255)).all()
    step = decode_dicom(dicom(RAMP, WindowCenter=2000, WindowWidth=1))
    assert (step == np.where(RAMP > 1999, 255, 0)).all()


def test_a_voi_lut_goes_before_the_window() -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 10]
    table = (np.arange(4096) // 4)[::-1].astype(np.uint16)
    item.LUTData = table.tobytes()
    item["LUTData"].VR = "OW"
    data = dicom(RAMP, VOILUTSequence=[item], WindowCenter=1, WindowWidth=2)
    assert (decode_dicom(data) == np.rint(table[RAMP] / 1023 * 255)).all()


def test_without_a_window_the_values_that_are_there_fill_the_range() -> None:
    pixels = RAMP // 4 + 100
    pixels[0, :] = 4000
    grey = decode_dicom(dicom(pixels, PixelPaddingValue=4000))
    low, high = pixels[1:].min(), pixels[1:].max()
    assert (grey[1:] == np.rint((pixels[1:] - low) / (high - low) * 255)).all()
    assert (grey[0] == 255).all()
    assert (decode_dicom(dicom(np.full((64, 64), 7, np.uint16))) == 0).all()


def test_bits_above_those_stored_are_no_part_of_the_picture() -> None:
    with_overlay = RAMP.copy()
    with_overlay[::2] |= 0x8000
    assert (decode_dicom(dicom(with_overlay)) == decode_dicom(dicom(RAMP))).all()


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_lossless_transfer_syntaxes_give_the_same_picture(syntax: Any) -> None:
    wanted = decode_dicom(dicom(RAMP))
    if syntax == ExplicitVRBigEndian:
        data = dicom(RAMP, syntax=syntax)
    elif syntax == RLELossless:
        dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        data = save(dataset)
    else:
        data = compressed(RAMP, syntax)
    assert (decode_dicom(data) == wanted).all()


def compressed(pixels: np.ndarray, syntax: Any) -> bytes:
    """Compress with GDCM itself, the library that hospitals' archives use."""
    import gdcm

    reader = gdcm.ImageReader()
    path = Path("plain.dcm")
    path.write_bytes(dicom(pixels))
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName("compressed.dcm")
    assert writer.Write()
    return Path("compressed.dcm").read_bytes()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lossless_jpeg_the_commonest_of_archives() -> None:
    data = compressed(RAMP, pydicom.uid.JPEGLosslessSV1)
    assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == pydicom.uid.JPEGLosslessSV1
    assert (decode_dicom(data) == decode_dicom(dicom(RAMP))).all()


def test_baseline_jpeg() -> None:
    pixels = (RAMP // 16).astype(np.uint8)
    jpeg = bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1])
    dataset = pydicom.dcmread(io.BytesIO(dicom(pixels, bits=8, WindowCenter=128, WindowWidth=256)))
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([jpeg])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    assert np.abs(decode_dicom(save(dataset)).astype(int) - pixels).max() <= 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"PhotometricInterpretation": "RGB"}, "is RGB, not grey"),
        ({"NumberOfFrames": 2}, "has 2 frames"),
        ({"BitsStored": 32}, "has 32 bits stored"),
        ({"Rows": 65535, "Columns": 65535}, "is 65535x65535 = 4295 megapixels"),
        ({"Rows": 640}, r"is a damaged DICOM file \(\d+ bytes, ValueError\)"),
        ({"PixelData": b""}, "is a damaged DICOM file"),
        ({"PixelData": RAMP.tobytes() * 3}, "has 3 frames"),
        ({"NumberOfFrames": 1, "PixelData": RAMP.tobytes() * 2}, "has 2 frames"),
        ({"WindowCenter": "nan", "WindowWidth": 9}, "has a window or a rescale that gives no grey"),
        ({"WindowCenter": 9, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, "gives no grey"),
        ({"WindowCenter": 9, "WindowWidth": -1, "VOILUTFunction": "LINEAR_EXACT"}, "gives no grey"),
        ({"RescaleSlope": "1e400", "RescaleIntercept": 0}, "gives no grey"),
        ({"RescaleSlope": "nan", "RescaleIntercept": 0}, "gives no grey"),
        ({"NumberOfFrames": -1}, "has -1 frames"),
        ({"Rows": 1}, "has 64 frames"),
        ({"Rows": 0}, "is a damaged DICOM file"),
    ],
)
def test_what_cannot_be_read_says_why(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode_dicom(dicom(RAMP, **change), name="a.dcm")


def test_a_deflated_file_is_refused_before_it_is_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.delattr(pydicom, "dcmread")
    with pytest.raises(ImageError, match=r"a\.dcm is a deflated DICOM file .*1\.2\.1\.99"):
        decode_dicom(data, name="a.dcm")


def encapsulated(codestream: bytes, syntax: Any) -> bytes:
    """A DICOM file whose picture is these bytes in a compressed transfer syntax."""
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([codestream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return save(dataset)


@pytest.mark.parametrize(
    ("syntax", "codestream"),
    [
        (JPEGBaseline8Bit, b"\xff\xd8\xff\xc0\0\x0b\x08\x9c\x40\x75\x30\1\0\0\0"),
        (JPEGLSLossless, b"\xff\xd8\xff\xf7\0\x0b\x08\x9c\x40\x75\x30\1\0\0\0"),
        (JPEG2000Lossless, b"\xff\x4f\xff\x51\0\x29\0\0\0\0\x75\x30\0\0\x9c\x40" + bytes(40)),
    ],
)
def test_the_size_inside_a_compressed_picture_is_held_to_the_limit_too(
    syntax: Any, codestream: bytes
) -> None:
    with pytest.raises(ImageError, match="is 30000x40000 = 1200 megapixels"):
        decode_dicom(encapsulated(codestream, syntax))


def test_a_jpeg_of_very_many_scans_is_refused_in_dicom_too() -> None:
    jpeg = b"\xff\xd8\xff\xc2\0\x0b\x08\0\x40\0\x60\1\0\0\0" + b"\xff\xda" * 101
    with pytest.raises(ImageError, match="is a JPEG of 101 scans"):
        decode_dicom(encapsulated(jpeg, JPEGBaseline8Bit))


def test_a_syntax_that_nobody_decodes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = compressed(RAMP, JPEG2000Lossless)
    decoder = pydicom.pixels.decoders.JPEG2000LosslessDecoder
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ImageError, match=r"JPEG 2000 .*cannot be decoded here .*edge-dsc\[dicom\]"):
        decode_dicom(data)


def test_who_the_patient_is_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = pydicom.dcmread
    seen: list[Any] = []
    monkeypatch.setattr(pydicom, "dcmread", lambda *a, **k: seen.append(read(*a, **k)) or seen[-1])
    decode_dicom(dicom(RAMP))
    assert "PixelData" in seen[0]
    assert not [element.keyword for element in seen[0] if element.keyword.startswith("Patient")]


def test_nothing_of_the_patient_is_said(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    with caplog.at_level(logging.DEBUG):
        sound = dicom(RAMP, PatientBirthDate="19700101")
        for size in (len(sound), len(sound) - 100, 600, 300, 140):
            try:
                decode_dicom(sound[:size], name="a.dcm")
            except ImageError as error:
                assert size != len(sound)
                assert SECRET not in str(error) and "4711" not in str(error)
                assert error.__cause__ is None or SECRET not in str(error.__cause__)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err + caplog.text


def odd_values() -> bytes:
    """A file that pydicom warns of: more pixel data than it has pixels."""
    return dicom(RAMP, PixelData=RAMP.tobytes() + bytes(640))


def test_odd_values_are_warned_of_by_pydicom_and_not_by_us(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as loud:
        warnings.simplefilter("always")
        pydicom.dcmread(io.BytesIO(odd_values())).pixel_array  # noqa: B018
    assert "excess padding" in str(loud[0].message)
    caplog.clear()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as quiet, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        assert (decode_dicom(odd_values()) == decode_dicom(dicom(RAMP))).all()
        logging.getLogger("pydicom.pixels.decoders.base").error("below the logger of the package")
    assert (quiet, caplog.records, tuple(capfd.readouterr())) == ([], [], ("", ""))


def test_the_filters_of_warnings_are_set_once_whatever_the_threads() -> None:
    data = odd_values()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = len(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(decode_dicom, [data] * 16))
        assert len(warnings.filters) == before + 1
        warnings.simplefilter("ignore", ResourceWarning)  # somebody else's, later and therefore first
        after = list(warnings.filters)
        decode_dicom(data)
        assert warnings.filters == after


def test_a_dicom_file_goes_the_way_of_every_image(folder: Path) -> None:
    contract = ModelContract(labels=("a", "b"), architecture="dsc")
    data = dicom(RAMP)
    study = folder / "study"
    study.mkdir()
    for name in ("a.dcm", "IM000001", "1.2.840.113619.2.5"):
        (study / name).write_bytes(data)
    for name in ("NOTES", "2.840.7", "b.txt"):
        (study / name).write_bytes(b"text" * 100 if name != "b.txt" else data)
    found = [path.name for path in expand_source(str(study))]
    assert found == ["1.2.840.113619.2.5", "IM000001", "a.dcm"]
    assert [path.name for path in expand_source(f"{study}/*")] == found
    wanted = prepare_pixels(decode_grey(data), contract)
    for name in found:
        assert (read_input(study / name, contract) == wanted).all()
        # A network of colour sees the grey picture in all three channels: DICOM stays grey.
        colour = replace(contract, decode="rgb8-v1")
        assert (read_input(study / name, colour) == wanted.repeat(3, axis=2)).all()
