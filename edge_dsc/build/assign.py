"""Mixed precision: which layers stay in floating point, searched for, or as an earlier engine has them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calibration.mixed import search
from edge_dsc.data.loading import load_images
from edge_dsc.data.purposes import images_to_choose_layers
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.record import EngineRecord, Precision, load_record, record_path
from engines.runtimes import Progress

if TYPE_CHECKING:
    from edge_dsc.build.engine import Build


def assign_layers(build: Build, progress: Progress | None = None) -> Build:
    """Take the assignment of a named engine, else that of the engine which is to be replaced, else search.

    The engine that is to be replaced is followed where it is mixed and of the same model, calibration, runtime and
    budget: a build that is repeated gives the same engine.

    Args:
        build: A mixed build with its table, and with images unless it names an engine.
        progress: Called with (phase, done, total) while the search runs.

    Returns:
        The build with its float layers and where they come from.

    Raises:
        ArtefactError: The named engine is no sound engine of ours.
        UsageError: It is not mixed, or there are no images to search on.
        BadInputError: The images have classes that the model does not know.
    """
    gate, layers = build.request.gate, build.request.layers
    if gate is None:
        raise UsageError(
            "mixed precision is searched and judged on labelled images", remedy="add --validate DIR"
        )
    if layers is not None:
        record = load_record(layers)
        if record.precision is not Precision.MIXED:
            raise UsageError(
                f"{layers} is in {record.precision.value}: it has no assignment of layers",
                remedy="give an engine that --precision mixed built",
            )
        return as_before(build, record.float_layers, f"as in {layers.name}")
    earlier = _earlier_engine(build, gate.max_drop)
    if earlier is not None:
        return as_before(build, earlier.float_layers, "as in the engine before (remove it to search again)")
    return _search(build, gate.max_drop, progress)


def as_before(build: Build, float_layers: tuple[str, ...], source: str) -> Build:
    """Return a mixed build with the layers of an engine that was built before."""
    words = f"mixed: {', '.join(float_layers) or 'no layer'} in floating point"
    return replace(build, float_layers=float_layers, layers_origin=f"{words}, {source}")


def _earlier_engine(build: Build, max_drop: float) -> EngineRecord | None:
    if not record_path(build.path).is_file():
        return None
    try:
        record = load_record(build.path)
    except ArtefactError:
        return None  # it is being replaced
    same = (
        record.precision is Precision.MIXED
        and record.onnx_sha256 == build.model.sha256
        and record.calibration_sha256 == build.table_sha256
        and record.runtime == build.runtime.name
        and record.validation is not None
        and record.validation.max_drop == max_drop
    )
    return record if same else None


def _search(build: Build, max_drop: float, progress: Progress | None) -> Build:
    dataset, table, labels = build.dataset, build.table, build.model.contract.labels
    assert dataset is not None and table is not None, "a mixed build has a table and the images of its gate"
    images = images_to_choose_layers(dataset, build.split, {image.sha256 for image in table.images})
    loaded = load_images(dataset.root, images.samples, build.model.contract, progress=progress)
    unknown = sorted({sample.label for sample in loaded.samples} - set(labels))
    if unknown:
        raise BadInputError(
            f"the model does not know the class {', '.join(unknown)}",
            remedy=f"name the folders after its classes: {', '.join(labels)}",
        )
    found = search(
        build.model.proto,
        table,
        loaded.pixels,
        [labels.index(sample.label) for sample in loaded.samples],
        signed=build.runtime.signed_activations,
        weight_bits=build.runtime.weight_bits(),
        max_drop=max_drop,
        progress=progress,
    )
    return replace(
        build,
        float_layers=tuple(found.float_layers),
        layers_origin=found.text,
        searched=images.spent,
    )
