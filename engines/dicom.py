"""DICOM radiographs to 8-bit grey. Only what the pixels need is parsed: who the patient is never gets in here."""

from __future__ import annotations

import io
import logging
import re
import struct
import threading
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.errors import ImageError
from engines.packages import load

MAX_SCANS = 100  # a progressive JPEG has about ten, and each costs a pass over the whole picture
MAX_PIXELS = 100_000_000  # X-ray detectors give at most about 20 million
_MAGIC = b"DICM"
_MAGIC_AT = 128
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_J2K = b"\xff\x4f\xff\x51"  # the start of a codestream and of its size. Source: ITU-T T.800, A.4.1 and A.5.1
_BITS = range(8, 17)
_TAGS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PlanarConfiguration",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
)
# pydicom warns of odd values and quotes them. Written as the warnings module keeps it.
_FILTER: Any = ("ignore", None, UserWarning, re.compile(r"pydicom\."), 0)
_SILENCING = threading.Lock()

_Stored = NDArray[np.integer[Any]]  # as the detector gave them: 8 to 16 bits, signed or not
_Values = NDArray[np.integer[Any] | np.floating[Any]]  # after the modality's LUT or rescale


def is_dicom(data: bytes) -> bool:
    """Say whether a file's beginning (132 bytes or more) is that of a DICOM file (PS3.10, 7.1)."""
    return data[_MAGIC_AT : _MAGIC_AT + 4] == _MAGIC


def decode_dicom(data: bytes, *, name: str = "image") -> NDArray[np.uint8]:
    """Decode a DICOM radiograph to 8-bit grey as a viewer first shows it.

    In the order of the standard: modality LUT or rescale, VOI LUT or the first window (linear, linear exact or
    sigmoid), MONOCHROME1 inverted. A file with neither goes from its smallest value to its largest one, padding left
    out.

    Source: DICOM PS3.3, C.11.1, C.11.2.1 and C.7.6.3.1.2.

    Args:
        data: The file's bytes, preamble included.
        name: Named in errors; they tell no value of the file but sizes and technical codes.

    Returns:
        ``uint8 [H, W]``.

    Raises:
        ImageError: Colour, more than one frame, bits outside 8 to 16, too large, damaged, or compressed in a way
            that no installed handler knows.
        EnvironmentProblem: ``pydicom`` is missing.
    """
    pydicom = _load_silent()
    # pydicom would inflate it, to a thousand times its size, before it can be asked anything.
    if _DEFLATED in data:
        raise ImageError(
            f"{name} is a deflated DICOM file (transfer syntax {_DEFLATED.decode()})",
            remedy="convert it: dcmconv +te FILE OUT",
        )
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(_TAGS))
        _check(dataset, name)
        return _grey(dataset, _stored_values(dataset, name), name)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory", remedy="free some memory") from error
    except Exception as error:  # noqa: BLE001 - pydicom raises many types, and their texts may quote the file
        raise ImageError(
            f"{name} is a damaged DICOM file ({len(data)} bytes, {type(error).__name__})",
            remedy="export it again",
        ) from None


def _load_silent() -> ModuleType:
    """Import pydicom, with nothing that it says of a file reaching the terminal or a log.

    That is set once per process, and again only where a ``warnings.catch_warnings`` of somebody else has taken the
    filter away at its end: the list of filters belongs to all threads.
    """
    pydicom = load("pydicom")
    with _SILENCING:
        if _FILTER not in warnings.filters:
            load("pydicom.config").settings.reading_validation_mode = pydicom.config.IGNORE
            # Its modules have loggers below this one: their records end here, at a handler that drops them.
            logger = logging.getLogger("pydicom")
            logger.handlers, logger.propagate = [logging.NullHandler()], False
            warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")
    return pydicom


class JpegFrame(NamedTuple):
    """What the frame header of a JPEG says.

    Attributes:
        height: Rows.
        width: Pixels per row.
        one_scan: Grey and sequential: one scan has it all.
    """

    height: int
    width: int
    one_scan: bool


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Return the frame header of a JPEG or JPEG-LS, or None where there is none.

    Source: ITU-T T.81, B.1.1: segments of marker, length; SOF0..SOF15 hold the size, but for DHT (C4), JPG (C8) and
    DAC (CC). ITU-T T.87, C.1.1: F7 is that of JPEG-LS.
    """
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            return JpegFrame(height, width, one_scan=marker in (0xC0, 0xC1) and components == 1)
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def check_scans(data: bytes, name: str) -> None:
    """Refuse a JPEG that would take minutes, before it is decoded.

    Raises:
        ImageError: More than 100 scans.
    """
    frame = jpeg_frame(data)
    if frame is not None and frame.one_scan:  # then the decoder refuses a second one
        return
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise ImageError(f"{name} is a JPEG of {scans} scans", remedy=f"the limit is {MAX_SCANS}; convert it")


def check_pixels(height: int, width: int, name: str) -> None:
    """Refuse an image that would take too much memory, before it is decoded.

    Raises:
        ImageError: More than 100 megapixels.
    """
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height} = {height * width / 1e6:.0f} megapixels",
            remedy=f"the limit is {MAX_PIXELS / 1e6:.0f} megapixels; shrink the image",
        )


def _check(dataset: Any, name: str) -> None:
    photometric = str(dataset.PhotometricInterpretation)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise ImageError(
            f"{name} is {photometric}, not grey", remedy="give a MONOCHROME1 or MONOCHROME2 image"
        )
    if frames != 1:
        raise _several(frames, name)
    if int(dataset.BitsStored) not in _BITS or int(dataset.BitsAllocated) not in (8, 16):
        raise ImageError(f"{name} has {int(dataset.BitsStored)} bits stored", remedy="give 8 to 16 bits")
    check_pixels(int(dataset.Rows), int(dataset.Columns), name)
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        _check_codestream(dataset, name)
        return
    one = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
    if one and len(dataset.PixelData) >= 2 * one:  # less is padding
        raise _several(len(dataset.PixelData) // one, name)


def _check_codestream(dataset: Any, name: str) -> None:
    """Hold what the compressed picture says of its size against the limit: the decoder believes it, not the tags."""
    data = load("pydicom.encaps").get_frame(dataset.PixelData, 0, number_of_frames=1)
    if data.startswith(b"\xff\xd8") and (frame := jpeg_frame(data)):
        check_pixels(frame.height, frame.width, name)
        check_scans(data, name)
    elif (start := data.find(_J2K)) >= 0:
        width, height = struct.unpack_from(">II", data, start + 8)
        check_pixels(height, width, name)


def _several(frames: int, name: str) -> ImageError:
    return ImageError(f"{name} has {frames} frames", remedy="give single radiographs")


def _stored_values(dataset: Any, name: str) -> _Stored:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        pixels: _Stored = dataset.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        raise ImageError(
            f"{name} is compressed as {syntax.name}, which cannot be decoded here",
            remedy="pip install 'edge-dsc[dicom]' brings the handlers; if they are there, the file is damaged",
        ) from error
    if pixels.ndim != 2:
        raise _several(len(pixels), name)
    return pixels  # pydicom has cleared the bits above those stored, which may hold an overlay


def _grey(dataset: Any, pixels: _Stored, name: str) -> NDArray[np.uint8]:
    """Map stored values to 0..255 through a table of every value between the smallest and the largest."""
    lowest = int(pixels.min())
    stored = np.arange(lowest, int(pixels.max()) + 1)
    with np.errstate(all="ignore"):  # what is no number in the file is no number here
        shown = _first_shown(dataset, stored, pixels)
    if not np.isfinite(shown).all():
        raise ImageError(
            f"{name} has a window or a rescale that gives no grey", remedy="export it with another window"
        )
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    table = np.rint(shown * 255).astype(np.uint8)
    return table[pixels.astype(np.int32) - lowest]


def _first_shown(dataset: Any, stored: _Stored, pixels: _Stored) -> NDArray[np.float64]:
    """Return what each stored value becomes on a screen, 0 to 1."""
    processing = load("pydicom.pixels")
    values: _Values = processing.apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        looked_up = processing.apply_voi(np.rint(values).astype(np.int64), dataset)
        shown: NDArray[np.float64] = np.clip(looked_up / ((1 << bits) - 1), 0, 1)
        return shown
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        center, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
        return _window(values, center, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    return _full_range(dataset, stored, values, pixels)


def _full_range(dataset: Any, stored: _Stored, values: _Values, pixels: _Stored) -> NDArray[np.float64]:
    """Stretch from the smallest to the largest value that occurs, padding left out."""
    used = np.zeros(len(stored), bool)
    used[np.unique(pixels) - stored[0]] = True
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        used &= stored != int(padding)
    seen = values[used] if used.any() else values
    low, high = float(seen.min()), float(seen.max())
    shown: NDArray[np.float64] = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    return shown


def _window(values: _Values, center: float, width: float, function: str) -> NDArray[np.float64]:
    """Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    shown: NDArray[np.float64]
    if width <= 0 and function in ("SIGMOID", "LINEAR_EXACT"):  # the standard wants more than 0
        width = np.nan
    if function == "SIGMOID":
        shown = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500)))
    elif function == "LINEAR_EXACT":
        shown = np.clip((values - center) / width + 0.5, 0, 1)
    elif width <= 1:
        shown = (values > center - 0.5).astype(np.float64)
    else:
        shown = np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    return shown


def _first(value: Any) -> float:
    """Return the first of several windows, the one that a viewer shows first."""
    return float(value if isinstance(value, (int, float)) else value[0])
