"""From an image file or a camera frame to the network's input: the one preprocess of every stage."""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.contract import NVJPEG_RULE, ModelContract
from engines.dicom import check_pixels, check_scans, decode_dicom, is_dicom, jpeg_frame
from engines.errors import EdgeDscError, ImageError
from engines.files import read_regular, sha256_bytes

InputPixels: TypeAlias = NDArray[np.uint8 | np.int8 | np.float16]  # as the contract says
_Pixels = NDArray[np.uint8 | np.uint16]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

IMAGE_SUFFIXES = frozenset({".bmp", ".dcm", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MIN_SIDE = 32
LEVEL_BINS = 32  # of a histogram of grey levels: eight levels each
MAX_BYTES = 512 << 20

# Reduced-size JPEG decoding must leave at least two pixels for each of the network's, and never fewer than this.
_REDUCE_ABOVE = 448
_JPEG = b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
# Source: W3C PNG, 11.2.5: the last chunk is empty, so its type and checksum are these bytes.
_PNG_END = b"IEND\xaeB`\x82"
# The types of a TIFF number, with the codes of struct. Source: TIFF 6.0, section 2; BigTIFF adds 16 and 17.
_TIFF_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_STORED_BITS = (8, 10, 12, 14, 16)  # what detectors store in 16-bit containers
_TO_GREY = {3: cv2.COLOR_BGR2GRAY, 4: cv2.COLOR_BGRA2GRAY}  # by the number of channels
_TO_BGR = {4: cv2.COLOR_BGRA2BGR}
_READ_REMEDIES = {errno.EACCES: "check the file's permissions", errno.EFBIG: "shrink the image"}
# By how much a JPEG may be reduced while it is decoded, most first: the flags for grey and for colour.
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_GRAYSCALE_8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_GRAYSCALE_4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.IMREAD_REDUCED_COLOR_2),
    (1, cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR),
)


def read_input(path: Path, contract: ModelContract) -> InputPixels:
    """Turn an image file into one network input.

    Returns:
        The input, of the contract's type and shape, such as ``uint8 [height, width, channels]``.

    Raises:
        ImageError: Missing, empty, damaged, no image, too small or too large.
        EnvironmentProblem: The contract's decoder is missing.
    """
    return _prepare(read_bytes(path), contract, path)


@dataclass(frozen=True, eq=False)
class InputImage:
    """An image file as the network sees it, read once.

    Attributes:
        path: The file.
        sha256: Hash of the very bytes that were decoded.
        pixels: Of the contract's type and shape, such as ``uint8 [height, width, channels]``; or why there are none.
    """

    path: Path
    sha256: str
    pixels: InputPixels | ImageError


def read_inputs(
    paths: Iterable[Path], contract: ModelContract, *, threads: int | None = None
) -> Iterator[InputImage]:
    """Read, hash and decode image files in threads; yield each in the order given, a bad one with its error.

    Args:
        paths: The files.
        contract: The model's contract.
        threads: How many at once; default: one for each processor that this process may use.

    Yields:
        The images; at most a few for each thread wait for the caller.
    """

    def read(path: Path) -> InputImage:
        digest = ""
        try:
            data = read_bytes(path)
            digest = sha256_bytes(data)
            return InputImage(path, digest, _prepare(data, contract, path))
        except ImageError as error:
            return InputImage(path, digest, error)

    quiet_decoder()
    yield from map_in_threads(read, paths, threads=threads or usable_processors(), ahead=4)


def _prepare(data: bytes, contract: ModelContract, path: Path) -> InputPixels:
    return prepare_pixels(decode_image(data, contract, name=str(path)), contract, name=str(path))


def map_in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int, ahead: int
) -> Iterator[_Result]:
    """Call a function with each item in threads and yield the results in order.

    Args:
        function: Called in a thread.
        items: What it is called with; taken in the calling thread.
        threads: How many at once.
        ahead: Results, for each thread, that may wait for the caller: memory does not grow with ``items``.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="edge-dsc") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def usable_processors() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quiet_decoder() -> None:
    """Keep OpenCV's and FFmpeg's own complaints off the terminal: each bad image already gets one line of ours."""
    # OpenCV reads OPENCV_LOG_LEVEL when it is imported; who set it wants to see more.
    if "OPENCV_LOG_LEVEL" not in os.environ and hasattr(cv2.utils, "logging"):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET


def read_bytes(path: Path) -> bytes:
    """Read an image file whole.

    Raises:
        ImageError: Missing, not a file, unreadable, empty or over 512 MiB.
    """
    try:
        data = read_regular(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist", remedy="name an image file") from error
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        remedy = _READ_REMEDIES.get(getattr(error, "errno", None) or 0, "name an image file")
        raise ImageError(f"cannot read {path}: {reason}", remedy=remedy) from error
    if not data:
        raise ImageError(f"{path} is empty (0 bytes)", remedy="copy the file again")
    return data


def require_decoder(contract: ModelContract) -> None:
    """Open the contract's decoder before there is a picture, so that a job that cannot go on does not begin.

    Raises:
        EnvironmentProblem: It is missing on this machine.
    """
    if contract.decode == NVJPEG_RULE:
        from engines.trt.nvjpeg import require_nvjpeg

        require_nvjpeg()


def decode_image(data: bytes, contract: ModelContract, *, name: str = "image") -> NDArray[np.uint8]:
    """Decode an encoded image to 8-bit pixels by a contract's rule: ``grey8-v1``, ``rgb8-v1``, ``grey8-nvjpeg-v1``.

    EXIF orientation is applied, alpha is dropped, palettes are expanded. 16-bit pixels lose their low bits; when no
    pixel needs more than 8, 10, 12 or 14 bits, that is taken for the stored depth, because detectors of 10 to 14 bits
    write 16-bit files that would else come out black. A large JPEG is decoded at a half, a quarter or an eighth of its
    size while 448 pixels a side remain, or twice the network's longer side where that is more. By ``grey8-v1`` colour
    becomes luma; by ``rgb8-v1`` it stays, and a grey file has three equal channels. By ``grey8-nvjpeg-v1`` a JPEG is
    decoded by nvJPEG, in full size, and every other file as by ``grey8-v1``.

    Args:
        data: The file's bytes: JPEG, PNG, BMP, TIFF, WebP or DICOM (see :func:`engines.dicom.decode_dicom`).
        contract: The model's contract.
        name: Named in errors.

    Returns:
        What :func:`prepare_pixels` takes: ``uint8 [H, W]`` grey; by ``rgb8-v1`` ``uint8 [H, W, 3]`` in OpenCV's order,
        BGR, and a DICOM file ``[H, W]`` all the same.

    Raises:
        ImageError: Not one of these formats, damaged, several pictures in one file, or too large.
        EnvironmentProblem: A DICOM file, and ``pydicom`` is missing; or a JPEG, and nvJPEG is.
    """
    if contract.decode == NVJPEG_RULE and data.startswith(_JPEG):
        from engines.trt.nvjpeg import decode_jpeg  # engines of this rule are few

        require_decoder(contract)  # what is missing is no fault of this picture
        with _as_image_error(name):
            _check_encoded(data, name)
            return decode_jpeg(data, name=name)
    shortest = max(_REDUCE_ABOVE, 2 * contract.height, 2 * contract.width)
    return _decode_any(data, name, colour=contract.channels == 3, shortest=shortest)


def decode_grey(data: bytes, *, name: str = "image") -> NDArray[np.uint8]:
    """Decode an encoded image to ``uint8 [H, W]`` as :func:`decode_image` does for a grey network of 224 x 224."""
    return _decode_any(data, name, colour=False, shortest=_REDUCE_ABOVE)


def _decode_any(data: bytes, name: str, *, colour: bool, shortest: int) -> NDArray[np.uint8]:
    with _as_image_error(name):
        if is_dicom(data):
            return decode_dicom(data, name=name)
        return _decode(data, name, colour=colour, shortest=shortest)


@contextmanager
def _as_image_error(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into the error of that one picture, without its text, which may quote the file."""
    try:
        yield
    except EdgeDscError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise many types, and no picture may end the job
        raise ImageError(
            f"{name} cannot be decoded ({type(error).__name__})", remedy="export or convert it again"
        ) from None


def _decode(data: bytes, name: str, *, colour: bool, shortest: int) -> NDArray[np.uint8]:
    size = _check_encoded(data, name)
    flags = (cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE) | cv2.IMREAD_ANYDEPTH
    if data.startswith(_JPEG):
        flags = _jpeg_flags(min(size), shortest, colour=colour)
    try:
        pixels = cast(_Pixels | None, cv2.imdecode(np.frombuffer(data, np.uint8), flags))
    except cv2.error as error:
        raise _undecodable(data, name) from error
    if pixels is None:
        raise _undecodable(data, name)
    check_pixels(pixels.shape[0], pixels.shape[1], name)
    return _eight_bits(pixels, name, colour=colour)


def _check_encoded(data: bytes, name: str) -> tuple[int, int]:
    """Hold an encoded image to what its header and its end say, before a decoder sees it; return height and width."""
    size = encoded_size(data)
    if size is None:  # another format, or a header that does not say how much memory the decoder would take
        raise _undecodable(data, name)
    check_pixels(*size, name)
    if _has_more_pictures(data):
        raise ImageError(f"{name} holds more than one picture", remedy="give single radiographs")
    if data.startswith(_JPEG):
        _check_jpeg_end(data, name)
        check_scans(data, name)
    elif data.startswith(_PNG) and data.rfind(_PNG_END) < 0:  # libpng would say so on the terminal
        raise _truncated(data, "PNG", name)
    return size


def convert_frame(pixels: _Pixels, contract: ModelContract, *, name: str = "image") -> NDArray[np.uint8]:
    """Do with pixels what :func:`decode_image` does after decoding.

    Args:
        pixels: ``uint8`` or ``uint16``; ``[H, W]`` grey or ``[H, W, 1|3|4]`` in OpenCV's order (BGR, BGRA).
        contract: The model's contract.
        name: Named in errors.

    Returns:
        What :func:`prepare_pixels` takes: ``uint8 [H, W]`` grey, or ``[H, W, 3]`` BGR.

    Raises:
        ImageError: Another dtype or shape.
    """
    return _eight_bits(pixels, name, colour=contract.channels == 3)


def grey8(pixels: _Pixels, *, name: str = "image") -> NDArray[np.uint8]:
    """Bring decoded pixels to ``uint8 [H, W]``: :func:`convert_frame` for a grey network."""
    return _eight_bits(pixels, name, colour=False)


def _eight_bits(pixels: _Pixels, name: str, *, colour: bool) -> NDArray[np.uint8]:
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{name} has {pixels.dtype} pixels", remedy="store it with 8 or 16 bits a channel")
    conversions = _TO_BGR if colour else _TO_GREY
    if pixels.ndim == 3 and pixels.shape[2] in conversions:
        pixels = cast(_Pixels, cv2.cvtColor(pixels, conversions[pixels.shape[2]]))
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    elif pixels.ndim != 2 and not (colour and pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ImageError(
            f"{name} has shape {pixels.shape}", remedy="give [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    if pixels.dtype == np.uint16 and pixels.size:
        needed = int(pixels.max()).bit_length()
        stored = next(bits for bits in _STORED_BITS if bits >= needed)
        return (pixels >> (stored - 8)).astype(np.uint8)
    return cast(NDArray[np.uint8], pixels)


def prepare_pixels(pixels: NDArray[np.uint8], contract: ModelContract, *, name: str = "image") -> InputPixels:
    """Turn decoded pixels into one network input: size check, the contract's resize rule, channels, border and type.

    Args:
        pixels: ``uint8 [H, W]`` grey, or ``uint8 [H, W, 3]`` BGR for a contract of three channels.
        contract: The model's contract.
        name: Named in errors.

    Returns:
        The input, of the contract's type and shape, such as ``uint8 [height, width, channels]``; three channels are
        red, green and blue.

    Raises:
        ImageError: A side shorter than 32 pixels.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels", remedy=f"an X-ray has at least {MIN_SIDE} pixels a side"
        )
    with _as_image_error(name):
        resized = resize_to(pixels, contract.height, contract.width)
        if contract.channels == 1:
            return shape_input(resized[:, :, None], contract)
        to_rgb = cv2.COLOR_GRAY2RGB if resized.ndim == 2 else cv2.COLOR_BGR2RGB
        return shape_input(cast(NDArray[np.uint8], cv2.cvtColor(resized, to_rgb)), contract)


def shape_input(pixels: NDArray[np.uint8], contract: ModelContract) -> InputPixels:
    """Give resized pixels the border, the type and the axes of a contract, in one pass over them.

    Args:
        pixels: ``uint8 [..., height, width, channels]``.
        contract: What the engine takes.

    Returns:
        ``[..., *contract.input_shape]``; ``pixels`` itself where the contract wants nothing else.
    """
    made: InputPixels = pixels
    if contract.dtype == "float16":
        made = pixels.astype(np.float16)
    elif contract.dtype == "int8":
        made = _subtract_middle(pixels, contract.border)
    return made if contract.layout == "NHWC" else np.ascontiguousarray(np.moveaxis(made, -1, -3))


def count_levels(pixels: InputPixels, contract: ModelContract) -> NDArray[np.int64]:
    """Count the grey levels of network inputs, all channels together, without the border of a contract that has one.

    Args:
        pixels: ``[..., *contract.input_shape]`` of the contract's type.
        contract: What they were made for.

    Returns:
        ``int64 [LEVEL_BINS]``: how many values lie in each of equal parts of 0..255.
    """
    if contract.border:  # NCHW, the only layout that has one
        edge = slice(contract.border, -contract.border)
        pixels = pixels[..., edge, edge]
    grey = np.ascontiguousarray(pixels)
    if contract.dtype == "int8":
        grey = grey.view(np.uint8) ^ np.uint8(0x80)
    levels = cv2.calcHist([grey.astype(np.uint8, copy=False).reshape(-1)], [0], None, [LEVEL_BINS], [0, 256])
    return levels.reshape(-1).astype(np.int64)  # OpenCV 4 gives it as a column


def _subtract_middle(pixels: NDArray[np.uint8], border: int) -> NDArray[np.int8]:
    """Return pixels minus 128 with a black border: in two's complement the same byte with its highest bit turned."""
    *stack, rows, columns, channels = pixels.shape
    made = np.full((*stack, rows + 2 * border, columns + 2 * border, channels), 0x80, np.uint8)
    np.bitwise_xor(
        pixels, np.uint8(0x80), out=made[..., border : border + rows, border : border + columns, :]
    )
    return made.view(np.int8)


def resize_to(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Stretch pixels ``[H, W]`` or ``[H, W, 3]`` to ``height`` x ``width`` (rule ``halve-area-v1``).

    While both sides are at least twice the target, the image is halved exactly (mean of 2x2; an odd last
    row or column is left out, since only even sides take OpenCV's fast path, six times faster than a direct
    resize of a large image). Then one area resize, or a linear one where a side grows.
    """
    rows, columns = pixels.shape[:2]
    while rows >= 2 * height and columns >= 2 * width:
        rows, columns = rows // 2, columns // 2
        pixels = _resize(pixels[: 2 * rows, : 2 * columns], rows, columns, cv2.INTER_AREA)
    if (rows, columns) == (height, width):
        return pixels
    grows = rows < height or columns < width
    return _resize(pixels, height, width, cv2.INTER_LINEAR if grows else cv2.INTER_AREA)


def _resize(pixels: NDArray[np.uint8], height: int, width: int, interpolation: int) -> NDArray[np.uint8]:
    return cast(NDArray[np.uint8], cv2.resize(pixels, (width, height), interpolation=interpolation))


def encoded_size(data: bytes) -> tuple[int, int] | None:
    """Return ``(height, width)`` as the header gives it, so that nothing is decoded whose size is not known.

    Returns:
        The size; None for a format other than JPEG, PNG, BMP, TIFF and WebP, and for a header that does not say it.
    """
    try:
        return next((size(data) for magic, size in _SIZES if data.startswith(magic)), None)
    except struct.error:  # the header ends too early
        return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    frame = jpeg_frame(data)
    return (frame.height, frame.width) if frame else None


def _png_size(data: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", data, 16)
    return (height, width) if data[12:16] == b"IHDR" else None


def _bmp_size(data: bytes) -> tuple[int, int]:
    # OS/2's header has 12 bytes and holds 16 bits each; a negative height says that the top row comes first.
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return abs(height), abs(width)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Source: RFC 9649, 2.5 to 2.7 and 3.4."""
    kind = data[8:16]
    if kind == b"WEBPVP8X":
        width, height = data[24:27], data[27:30]
        return 1 + int.from_bytes(height, "little"), 1 + int.from_bytes(width, "little")
    if kind == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"WEBPVP8 ":
        columns, rows = struct.unpack_from("<HH", data, 26)
        return rows & 0x3FFF, columns & 0x3FFF
    return None


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    sides = next(_tiff_pages(data), {})
    return (sides[257], sides[256]) if {256, 257} <= sides.keys() else None


def _tiff_pages(data: bytes) -> Iterator[dict[int, int]]:
    """Yield what each directory says: tag to number, the largest one where a tag stands twice. At most two.

    Source: TIFF 6.0, section 2: tags 254 (1: a reduced copy), 256 and 257 (the size).
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4].strip(b"\0") == b"+"
    offset, counter, entry, value_at = ("Q", "Q", 20, 12) if big else ("I", "H", 12, 8)
    (position,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    for _ in range(2):
        if not 0 < position < len(data):
            return
        (count,) = struct.unpack_from(order + counter, data, position)
        position += struct.calcsize(counter)
        end = position + count * entry
        numbers: dict[int, int] = {}
        for start in range(position, min(end, len(data)), entry):
            tag, kind = struct.unpack_from(order + "HH", data, start)
            if tag in (254, 256, 257) and kind in _TIFF_CODES:
                (value,) = struct.unpack_from(order + _TIFF_CODES[kind], data, start + value_at)
                numbers[tag] = max(numbers.get(tag, 0), value)
        yield numbers
        if end + struct.calcsize(offset) > len(data):
            return
        (position,) = struct.unpack_from(order + offset, data, end)


def _has_more_pictures(data: bytes) -> bool:
    """Say whether a file holds several pictures, of which the decoder would give the first: APNG, WebP, TIFF."""
    if data.startswith(_PNG):
        return data.find(b"acTL", 0, max(0, data.find(b"IDAT"))) >= 0
    if data.startswith(b"RIFF"):
        return data[12:16] == b"VP8X" and bool(data[20] & 2)
    if data.startswith(_TIFF):
        return any(not page.get(254, 0) & 1 for page in list(_tiff_pages(data))[1:])
    return False


_SIZES: tuple[tuple[bytes | tuple[bytes, ...], Callable[[bytes], tuple[int, int] | None]], ...] = (
    (_JPEG, _jpeg_size),
    (_PNG, _png_size),
    (b"BM", _bmp_size),
    (b"RIFF", _webp_size),
    (_TIFF, _tiff_size),
)


def _jpeg_flags(short_side: int, shortest: int, *, colour: bool) -> int:
    fitting = (flags for factor, *flags in _REDUCED if factor == 1 or short_side // factor >= shortest)
    return next(fitting)[colour]


def _check_jpeg_end(data: bytes, name: str) -> None:
    # Some OpenCV releases fill a truncated JPEG with grey and say nothing. After the last start of scan
    # (FFDA) there must be an end of image (FFD9): neither can occur inside entropy-coded data. The end is looked for
    # first, from behind: a search for the start would run through the whole file.
    if data.find(b"\xff\xda", max(0, data.rfind(b"\xff\xd9"))) >= 0:
        raise _truncated(data, "JPEG", name)


def _truncated(data: bytes, kind: str, name: str) -> ImageError:
    return ImageError(f"{name} is a truncated {kind} ({len(data)} bytes)", remedy="copy the file again")


def _undecodable(data: bytes, name: str) -> ImageError:
    start = data[:8].hex(" ")
    return ImageError(
        f"{name} is damaged or no image ({len(data)} bytes, starting {start})",
        remedy=f"give one of {', '.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))}",
    )
