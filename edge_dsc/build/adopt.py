"""``adopt``: a classifier that was trained elsewhere becomes a model folder like any other.

The file is read without running code from it, brought into the deployed form (:mod:`edge_dsc.build.conform`), and held
against the original on real images before anything is written.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from msgspec import Meta
from numpy.typing import NDArray

from edge_dsc import __version__
from edge_dsc.build.conform import (
    LOGITS,
    PROBABILITIES,
    Normalisation,
    SourceGraph,
    check_labels,
    deploy_any,
    describe_source,
)
from edge_dsc.build.export import PARENTS_KEY, convert_to_onnx
from edge_dsc.build.front import Front
from edge_dsc.data import PARTS, Split, discover, save_split
from edge_dsc.data.loading import load_images
from edge_dsc.data.phantoms import CLASSES, draw_phantom
from edge_dsc.data.purposes import PARTS_FOR, Purpose
from edge_dsc.data.split import SPLIT_FILE
from edge_dsc.evaluate.confidence import fit_temperature
from edge_dsc.infer.source import expand_source
from edge_dsc.networks.keras_files import read_network
from edge_dsc.training.run_folder import RECORD_FILE
from engines.contract import (
    COLOUR_RULE,
    DECODE_RULE,
    LARGEST_MODEL,
    METADATA_KEY,
    Count,
    ModelContract,
    Number,
    Sha256,
    Text,
    upgrade_contract,
)
from engines.cpu.ort import failures_of, open_session
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, ImageError, UsageError
from engines.files import (
    ONNX_MODEL,
    DocumentKind,
    canonical_json,
    kind_of_file,
    read_regular,
    require_unread,
    require_writable,
    sha256_bytes,
    write_bytes,
)
from engines.graph import OnnxModel, parse_model, refuse_large_values, replace_contract, seal_model
from engines.images import prepare_pixels, quiet_decoder, read_inputs
from engines.packages import load
from engines.runtimes import Progress
from engines.text_table import printable

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL_NAME, ADOPTION_FILE = "model.onnx", "adoption.json"
TOLERANCE = 1e-4  # of a probability: what float32 leaves of hundreds of layers, in another order of sums
COMPARED_IMAGES = 32
JUDGED_IMAGES = 256
_PHANTOMS = 8
SMALLEST_SIDE = 32  # as of a picture
_ONNX = ("", "ai.onnx")
_CHANGING = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})  # what scales or shifts pixels
_KERAS_REASON = re.compile(r"Exception encountered: ([^.\n]+\.)")
_NAME_A_FILE = "name an .onnx file, as torch.onnx.export writes one, or a .keras file"
_WHERE_ITS_CODE_IS = "export it to ONNX where its code is, and adopt that"
_EXPORT_ELSE = "export it again, with ONNX's own operators, opset 13 to 20"

_Answer = Callable[
    [NDArray[np.float32]], NDArray[np.float32]
]  # [N, H, W, C] normalised -> what the network gives


class AdoptionRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an adopted model comes from, what was done to it, and how that was checked.

    Attributes:
        source: Name of the original's file.
        source_sha256: Its hash.
        onnx_sha256: Hash of the model that was made of it.
        contract: That model's contract.
        scale: Factor on the pixels that the original wanted; with ``mean`` and ``std`` it is inside the model now.
        mean: See :class:`edge_dsc.build.conform.Normalisation`.
        std: Likewise.
        gives: What the original gives: ``logits`` or ``probabilities``.
        folded: Operators in front of the first convolution that went into its weights.
        border: How the padding of that convolution stays exact.
        kept: Why they are still in the graph; None where they were folded.
        parity: Largest difference of a probability between the original and the model.
        images: Images that were compared.
        images_from: Where they are from.
        accuracy: Share of labelled images that the model has right; None where none was labelled.
        judged: Labelled images.
        versions: Package versions.
        created: UTC time, ISO 8601.
        edge_dsc: Version of edge-dsc.
    """

    source: Text
    source_sha256: Sha256
    onnx_sha256: Sha256
    contract: ModelContract
    scale: Number
    mean: tuple[Number, ...]
    std: tuple[Number, ...]
    gives: Text
    folded: tuple[Text, ...]
    border: tuple[Text, ...]
    kept: Text | None
    parity: Annotated[float, Meta(ge=0, le=1)]
    images: Count
    images_from: Text
    accuracy: Annotated[float, Meta(ge=0, le=1)] | None
    judged: Count
    versions: dict[Text, Text]
    created: Text
    edge_dsc: Text


ADOPTION = DocumentKind(
    name="edge-dsc/adoption",
    version=2,
    body=AdoptionRecord,
    renew="edge-dsc adopt MODEL --labels A,B,C",
    seal="record_sha256",
    older={1: lambda body: {**body, "contract": upgrade_contract(body["contract"])}},
)


@dataclass(frozen=True, kw_only=True)
class AdoptRequest:
    """What ``adopt`` was asked for.

    Attributes:
        source: An ``.onnx`` or ``.keras`` file.
        labels: Class names, in the order of its outputs.
        normalisation: What it wants beyond what its own graph does.
        colour: Whether it is to see colour; a network of three channels sees the grey picture in all three otherwise.
        size: Height and width, where the file leaves them open.
        gives: ``logits`` or ``probabilities``; None looks at the last operator.
        out: The folder; None makes one below ``runs``, named after the file.
        images: A folder of images to compare on; None compares on phantoms.
        fit: A folder of labelled images to fit the temperature on, ``DIR/class/file``; they may not judge the model
            then. None leaves its probabilities as they are.
    """

    source: Path
    labels: tuple[str, ...]
    normalisation: Normalisation = field(default_factory=Normalisation)
    colour: bool = False
    size: tuple[int, int] | None = None
    gives: str | None = None
    out: Path | None = None
    images: Path | None = None
    fit: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """An adopted model.

    Attributes:
        model: The model, as it was written.
        record: Its record, beside it.
        front: What became of the preparation of the pixels: one sentence.
        skipped: Images that could not be read.
        doubt: Why comparing these answers says little; None where it says much.
    """

    model: OnnxModel
    record: AdoptionRecord
    front: str
    skipped: int
    doubt: str | None

    def text(self) -> str:
        """Return what a person should know."""
        record, contract = self.record, self.model.contract
        colour = "colour" if contract.channels == 3 else "grey"
        lines = [
            f"{self.model.path}: equal to {record.source} within {record.parity:.1e}"
            f" on {record.images} images of {record.images_from}",
            f"  takes {colour} pixels, {contract.height} x {contract.width}; the original gives {record.gives}",
            f"  {self.front}",
        ]
        if record.accuracy is not None:
            lines.append(f"  accuracy on {record.judged} labelled images: {record.accuracy:.1%}")
        if (folder := self.model.path.parent / SPLIT_FILE).is_file():
            lines.append(f"  temperature {contract.temperature:g}, fitted on the images in {folder}")
        if record.kept is None and not _CHANGING & {*record.folded}:
            lines.append(
                "  it is fed pixels 0..255: name --scale, --mean and --std if it was trained on others"
            )
        if self.doubt is not None:
            lines.append(f"  {self.doubt}: is --scale right?")
        return "\n".join(map(printable, lines))


@dataclass(frozen=True, kw_only=True)
class _Original:
    """A foreign classifier, read.

    Attributes:
        sha256: Hash of its file.
        proto: Its graph.
        source: What that takes and gives.
        answer: Runs the original itself.
    """

    sha256: str
    proto: ModelProto
    source: SourceGraph
    answer: _Answer


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What is compared on.

    Attributes:
        pixels: ``uint8 [N, height, width, channels]``.
        classes: Of each image: the class that its folder names, or None.
        origin: Where they are from.
        skipped: Images that could not be read.
    """

    pixels: NDArray[np.uint8]
    classes: tuple[int | None, ...]
    origin: str
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class _Check:
    """How the model was held against the original.

    Attributes:
        gives: What the original gives.
        parity: Largest difference of a probability.
        compared: Images for that.
        right: Of each labelled image, whether it got its class.
    """

    gives: str
    parity: float
    compared: int
    right: list[bool]


def adopt_model(request: AdoptRequest, progress: Progress | None = None) -> Adopted:
    """Bring a trained classifier in: write ``model.onnx`` and ``adoption.json``.

    Args:
        request: What is asked for.
        progress: Called before and after each phase.

    Raises:
        UsageError: Labels or sizes that no model can have, or a folder that holds another model.
        BadInputError: The file is no classifier that can be adopted: the text names what is in the way.
        AccuracyGateError: The adopted model answers differently; nothing is written.
        EnvironmentProblem: TensorFlow is missing for a ``.keras`` file, or the place cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    folder = request.out or Path("runs") / _slug(request.source)
    _require_folder(folder, request.source)
    report("reading the model", 0, 3)
    read = _read_keras if request.source.suffix.lower() == ".keras" else _read_onnx
    original = read(request.source, request.size)
    contract = _contract_of(request, original.source)
    images = _read_images(request, contract)
    report("comparing", 1, 3)
    compared = _evenly(images.pixels)
    raw = original.answer(request.normalisation.apply(compared, original.source.channels))
    gives = _what_it_gives(original.source, request.gives, raw, len(contract.labels))
    report("converting", 2, 3)
    parents = canonical_json({request.source.name: original.sha256}).decode()
    deployed = deploy_any(
        original.proto, contract, request.normalisation, {PARENTS_KEY: parents}, gives=gives
    )
    data = seal_model(deployed.proto)
    model = parse_model(data, folder / MODEL_NAME)
    answers = _answers_of(model)(images.pixels)
    parity = float(np.abs(_evenly(answers) - _probabilities(raw, gives)).max())
    if not parity <= TOLERANCE:
        raise AccuracyGateError(
            f"the adopted model differs from {request.source} by {parity:.1e} on {len(compared)} images, "
            f"more than {TOLERANCE:.0e}",
            remedy="nothing was written; export it with a dynamic batch, without random or training layers",
        )
    check = _Check(gives=gives, parity=parity, compared=len(compared), right=_right(answers, images))
    fitted = None
    if request.fit is not None:
        model, fitted = _fit_temperature(model, request.fit)
        data = seal_model(model.proto)
        model = parse_model(data, model.path)
    record = _record(request, original, model, deployed.front, images, check)
    write_bytes(model.path, data, ONNX_MODEL)
    ADOPTION.save(folder / ADOPTION_FILE, record)
    if fitted is not None:
        save_split(fitted, folder / SPLIT_FILE)
    else:
        (folder / SPLIT_FILE).unlink(missing_ok=True)  # that of the model that is replaced
    report("converting", 3, 3)
    return Adopted(
        model=model,
        record=record,
        front=str(deployed.front),
        skipped=images.skipped,
        doubt=_doubt(answers),
    )


def _fit_temperature(model: OnnxModel, data: Path) -> tuple[OnnxModel, Split]:
    """Return the model with the temperature that labelled images ask for, and these as its validation part."""
    contract = model.contract
    dataset = discover(data, labels=contract.labels)
    unknown = sorted(set(dataset.labels) - set(contract.labels))
    if unknown:
        raise BadInputError(
            f"the model does not know the class {unknown[0]}",
            remedy=f"name the folders after its classes: {', '.join(contract.labels)}",
        )
    loaded = load_images(data, dataset.samples, contract)
    true = np.array([contract.labels.index(sample.label) for sample in loaded.samples], np.int64)
    temperature = fit_temperature(true, _answers_of(model)(loaded.pixels))
    calibrated = msgspec.structs.replace(contract, temperature=temperature)
    parts = {part: loaded.samples if part in PARTS_FOR[Purpose.FIT] else () for part in PARTS}
    split = Split(root=data, labels=tuple(sorted(contract.labels)), seed=0, parts=parts)
    return replace(model, proto=replace_contract(model.proto, calibrated), contract=calibrated), split


def _evenly(values: NDArray[Any]) -> NDArray[Any]:
    """Return the images that are compared, of all."""
    return values[:: max(1, len(values) // COMPARED_IMAGES)][:COMPARED_IMAGES]


def _slug(source: Path) -> str:
    """Return a file's name without its suffix as a folder's name, and as what engines are named after."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem).strip("-._")[:64] or "adopted"


def _require_folder(folder: Path, source: Path) -> None:
    """Refuse a folder with a model of another origin, or one where the original itself would be replaced."""
    there = [name for name in (RECORD_FILE, MODEL_NAME) if (folder / name).is_file()]
    record = folder / ADOPTION_FILE
    ours = there == [MODEL_NAME] and record.is_file() and kind_of_file(record) == ADOPTION.name
    if there and not ours:
        raise UsageError(
            f"{folder} holds {there[0]}, which adopt did not write", remedy="choose another folder with --out"
        )
    require_unread(folder / MODEL_NAME, source)
    require_writable(folder / MODEL_NAME, ONNX_MODEL)
    require_writable(record, ADOPTION.name)


def _contract_of(request: AdoptRequest, source: SourceGraph) -> ModelContract:
    height, width = _size_of(request, source)
    normalisation = request.normalisation
    for name, values in (("--mean", normalisation.mean), ("--std", normalisation.std)):
        if len(values) not in (1, source.channels):
            raise UsageError(
                f"{name} has {len(values)} numbers, the network {source.channels} channels",
                remedy="give one number, or one for each channel",
            )
    fields = {
        "labels": request.labels,
        "architecture": _slug(request.source),
        "height": height,
        "width": width,
        "decode": COLOUR_RULE if request.colour else DECODE_RULE,
        "scale": normalisation.scale,
    }
    try:
        return msgspec.convert(fields, ModelContract)
    except ValueError as error:
        raise UsageError(
            f"no model can have this contract: {error}",
            remedy="name two classes or more, each once: --labels A,B,C",
        ) from error


def _size_of(request: AdoptRequest, source: SourceGraph) -> tuple[int, int]:
    given = request.size or (source.height, source.width)
    sides = []
    for name, own, asked in zip(("height", "width"), (source.height, source.width), given, strict=True):
        if own is not None and asked not in (None, own):
            raise UsageError(
                f"the network's {name} is {own}, not {asked}",
                remedy="leave --size out, or give the network's own",
            )
        side = own or asked
        if side is None:
            raise _open_size(request.source)
        if side < SMALLEST_SIDE:
            raise BadInputError(
                f"the network's {name} is {side}",
                remedy=f"a picture has at least {SMALLEST_SIDE} pixels a side",
            )
        sides.append(side)
    return sides[0], sides[1]


def _open_size(path: Path) -> UsageError:
    return UsageError(
        f"{path} leaves the size of its input open", remedy="give the one it was trained with: --size 224"
    )


def _read_onnx(path: Path, _size: tuple[int, int] | None) -> _Original:
    """Read a foreign ONNX file: one graph of ONNX's own operators, all of it in this file."""
    try:
        data = read_regular(path, LARGEST_MODEL)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}", remedy=_NAME_A_FILE) from error
    try:
        proto = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise BadInputError(f"{path} is not an ONNX model", remedy=_NAME_A_FILE) from error
    if not proto.graph.node:
        raise BadInputError(f"{path} is not an ONNX model: no nodes inside", remedy=_NAME_A_FILE)
    if any(entry.key == METADATA_KEY for entry in proto.metadata_props):
        raise UsageError(
            f"{path} is a model of edge-dsc already", remedy="use it as it is: edge-dsc build-engine"
        )
    _refuse_external_data(proto, path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _refuse_operators(proto, path)
    with _told_of_the_original(path):
        onnx.checker.check_model(proto)
        refuse_large_values(proto, path)
        source = describe_source(proto)
        session = open_session(proto.SerializeToString(), str(path), threads=1, remedy=_EXPORT_ELSE)

    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        planes = images.transpose(0, 3, 1, 2) if source.channels_first else images
        size = source.batch or 1
        rest = -len(planes) % size  # a fixed batch is filled with the first images again
        padded = np.concatenate([planes, planes[:rest]]) if rest else planes
        parts = [padded[start : start + size] for start in range(0, len(padded), size)]
        with _told_of_the_original(path), failures_of(str(path), remedy=_EXPORT_ELSE):
            found = [session.run(None, {source.input_name: np.ascontiguousarray(part)})[0] for part in parts]
        answers: NDArray[np.float32] = np.concatenate(found).reshape(len(padded), -1)[: len(planes)]
        return answers

    return _Original(sha256=sha256_bytes(data), proto=proto, source=source, answer=answer)


@contextlib.contextmanager
def _told_of_the_original(path: Path) -> Iterator[None]:
    """Turn what a foreign file causes into an error about the user's data: it is no artefact of ours."""
    try:
        yield
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInputError(f"{path} is not a valid ONNX model: {reason}", remedy=_EXPORT_ELSE) from error
    except ArtefactError as error:
        raise BadInputError(error.what, remedy=_EXPORT_ELSE) from error


def _refuse_external_data(proto: ModelProto, path: Path) -> None:
    """Refuse tensors in other files: a name in a stranger's model decides what would be read."""
    stored = [*proto.graph.initializer]
    stored += [
        attribute.t for node in proto.graph.node for attribute in node.attribute if attribute.HasField("t")
    ]
    for tensor in stored:
        if not tensor.external_data and not tensor.data_location:
            continue
        place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "?")
        inside = not PurePosixPath(place).is_absolute() and ".." not in PurePosixPath(place).parts
        where = "another file" if inside else "a file outside its folder"
        remedy = "save it as one file: onnx.save(onnx.load(MODEL), ONE), with onnx"
        raise BadInputError(
            f"{path} keeps {tensor.name} in {where}: {place}",
            remedy=remedy if inside else "do not trust this model: a classifier reads no such file",
        )


def _refuse_operators(proto: ModelProto, path: Path) -> None:
    """Refuse what no runtime here promises to run: loops and branches, and operators that are not ONNX's own."""
    opset = max((entry.version for entry in proto.opset_import if entry.domain in _ONNX), default=0)
    strange: Counter[str] = Counter()
    for node in proto.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise BadInputError(
                f"{path} has a graph inside its node {node.name or node.op_type} ({node.op_type})",
                remedy="export it for one path of the data, without loops and branches",
            )
        if node.domain not in _ONNX:
            strange[f"{node.op_type} of {node.domain}"] += 1
        elif not onnx.defs.has(node.op_type) or onnx.defs.get_schema(node.op_type).deprecated:
            strange[node.op_type] += 1
        elif not opset:
            strange[f"{node.op_type} without a version"] += 1
    if strange or proto.graph.sparse_initializer or proto.training_info:
        names = ", ".join(sorted(strange)) or "sparse tensors or training steps"
        raise BadInputError(f"{path} uses what is not ONNX's own for inference: {names}", remedy=_EXPORT_ELSE)


def _read_keras(path: Path, size: tuple[int, int] | None) -> _Original:
    """Read a ``.keras`` file without running code from it, and convert it."""
    try:
        data = read_regular(path, LARGEST_MODEL)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}", remedy=_NAME_A_FILE) from error
    try:
        model = read_network(path)
    except ArtefactError as error:
        # Keras says first which model and last which layer.
        inner = _KERAS_REASON.findall(str(error.__cause__))
        what = f"Keras cannot load {path}: {inner[-1]}" if inner else error.what
        raise BadInputError(
            f"{what} Lambda layers and custom objects are code, which is not run from a file",
            remedy=_WHERE_ITS_CODE_IS,
        ) from error
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[3] not in (1, 3):
        raise BadInputError(
            f"{path} takes {shape}",
            remedy="adopt a network with one input [N, H, W, C] of one or three channels",
        )
    if None in shape[1:3] and size is None:
        raise _open_size(path)
    try:
        if None in shape[1:3]:
            keras = load("keras")
            image = keras.Input((*(size or ()), shape[3]), name="image")
            model = keras.Model(image, model(image), name=model.name)
        proto = convert_to_onnx(model)
    # Keras says so of a size that leaves a layer nothing; tf2onnx has no error of its own.
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(
            f"{path} cannot be converted to ONNX: {reason}",
            remedy="give a larger --size" if size else _WHERE_ITS_CODE_IS,
        ) from error

    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = model.predict(images, batch_size=8, verbose=0)
        return found.reshape(len(images), -1)

    return _Original(sha256=sha256_bytes(data), proto=proto, source=describe_source(proto), answer=answer)


def _read_images(request: AdoptRequest, contract: ModelContract) -> _Images:
    """Read images evenly from the folder that was named, or draw phantoms."""
    if request.images is None:
        grey = msgspec.structs.replace(contract, decode=DECODE_RULE)
        drawn = [
            prepare_pixels(draw_phantom(CLASSES[seed % 3], seed), grey)
            for seed in range(_PHANTOMS + contract.channels - 1)
        ]
        # For a network of colour three phantoms are one picture's red, green and blue.
        pixels = [
            np.concatenate(drawn[place : place + contract.channels], axis=2) for place in range(_PHANTOMS)
        ]
        return _Images(pixels=np.stack(pixels), classes=(None,) * _PHANTOMS, origin="phantoms")
    quiet_decoder()
    files = expand_source(str(request.images))
    chosen = [
        files[place] for place in np.linspace(0, len(files) - 1, min(len(files), JUDGED_IMAGES)).astype(int)
    ]
    read = list(read_inputs(chosen, contract))
    good = [(image.path, image.pixels) for image in read if not isinstance(image.pixels, ImageError)]
    if not good:
        raise BadInputError(
            f"none of {len(read)} images of {request.images} can be read", remedy="give real images"
        )
    places = {label: place for place, label in enumerate(request.labels)}
    return _Images(
        pixels=np.stack([pixels for _, pixels in good]),
        classes=tuple(places.get(path.parent.name) for path, _ in good),
        origin=str(request.images),
        skipped=len(read) - len(good),
    )


def _what_it_gives(source: SourceGraph, asked: str | None, raw: NDArray[np.float32], labels: int) -> str:
    """Say whether the original gives logits or probabilities, by its operators and by what it gave."""
    check_labels(raw.shape[1], labels)
    rows = np.concatenate([1 - raw, raw], axis=1) if raw.shape[1] == 1 else raw
    sums = rows.astype(np.float64).sum(axis=1)
    shares = bool(rows.min() >= -TOLERANCE and np.abs(sums - 1).max() <= TOLERANCE)
    gives = asked or source.gives or (PROBABILITIES if raw.shape[1] == 1 else None)
    if gives is None:
        raise BadInputError(
            "the network ends in Sigmoid: each output is an answer of its own, not one class of several",
            remedy="adopt one that ends in softmax; where its outputs add up to 1, say --output probabilities",
        )
    if gives == PROBABILITIES and not shares:
        worst = (
            rows[np.abs(sums - 1).argmax()]
            if np.abs(sums - 1).max() > TOLERANCE
            else rows[rows.min(axis=1).argmin()]
        )
        raise BadInputError(
            f"what the network gives for an image, {_few(worst)}, adds up to {worst.sum():.4g}: no probabilities",
            remedy="say --output logits, or adopt a network with one answer among its classes",
        )
    if gives == LOGITS and asked is None and shares:
        raise BadInputError(
            "what the network gives looks like probabilities, though no Softmax gives it",
            remedy="say --output probabilities, or --output logits",
        )
    return gives


def _few(values: NDArray[np.float32]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")


def _probabilities(raw: NDArray[np.float32], gives: str) -> NDArray[np.float64]:
    """Return ``[N, classes]`` of what the original gave."""
    wide = raw.astype(np.float64)
    if wide.shape[1] == 1:
        second = 1 / (1 + np.exp(-wide)) if gives == LOGITS else wide
        return np.concatenate([1 - second, second], axis=1)
    shares = np.exp(wide - wide.max(axis=1, keepdims=True)) if gives == LOGITS else wide
    found: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True) if gives == LOGITS else shares
    return found


def _answers_of(model: OnnxModel) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Return what runs a deployed graph, in batches of eight, as an engine may."""
    source = str(model.path)
    session = open_session(model.proto.SerializeToString(), source, threads=1, remedy=_EXPORT_ELSE)

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        name, starts = model.contract.input_name, range(0, len(pixels), 8)
        with failures_of(source, remedy=_EXPORT_ELSE):
            answers: NDArray[np.float32] = np.concatenate(
                [session.run(None, {name: pixels[start : start + 8]})[0] for start in starts]
            )
        return answers

    return run


def _doubt(answers: NDArray[np.float32]) -> str | None:
    """Say why answers like these would hide a difference: of pixels on another scale most networks give such."""
    if answers.max(axis=1).min() > 1 - TOLERANCE:
        return "every answer is 0 or 1 to four digits, so that comparing them says little"
    if np.ptp(answers, axis=0).max() <= TOLERANCE:
        return "the answers are the same for all images to four digits, so that comparing them says little"
    return None


def _right(answers: NDArray[np.float32], images: _Images) -> list[bool]:
    """Say of each labelled image whether it got its class."""
    given = zip(answers.argmax(axis=1).tolist(), images.classes, strict=True)
    return [place == wanted for place, wanted in given if wanted is not None]


def _record(
    request: AdoptRequest,
    original: _Original,
    model: OnnxModel,
    front: Front,
    images: _Images,
    check: _Check,
) -> AdoptionRecord:
    normalisation, judged = request.normalisation, len(check.right)
    return AdoptionRecord(
        source=request.source.name,
        source_sha256=original.sha256,
        onnx_sha256=model.sha256,
        contract=model.contract,
        scale=normalisation.scale,
        mean=normalisation.mean,
        std=normalisation.std,
        gives=check.gives,
        folded=front.folded,
        border=front.border,
        kept=front.kept,
        parity=check.parity,
        images=check.compared,
        images_from=images.origin,
        accuracy=sum(check.right) / judged if judged else None,
        judged=judged,
        versions={name: load(name).__version__ for name in ("numpy", "onnx", "onnxruntime")},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        edge_dsc=__version__,
    )
