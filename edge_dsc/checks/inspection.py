"""``inspect`` and ``networks``: what any file of ours is and says, and which networks there are."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from calibration.table import CalibrationTable
from edge_dsc.evaluate.evaluation import format_validation
from engines.contract import NVJPEG_RULE
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.files import read_regular, sha256_file
from engines.record import RECORD, EngineRecord, load_record, record_path
from engines.runtimes import (
    LAYER_RUNS,
    RUNTIME_NAMES,
    EngineLayer,
    Progress,
    get_runtime,
    refuse_on_processor,
)
from engines.text_table import align_rows, printable

_OUR_KIND = re.compile("edge-dsc/[a-z-]{1,64}")
_LISTED_CLASSES = 3
_LONG = 12  # entries of a list or mapping that are still printed whole


def inspect_path(path: Path) -> dict[str, Any]:
    """Say what a file or run folder is, and what it says of itself.

    Args:
        path: An engine, its record, an ONNX model, a JSON document of ours, ``model.keras``, a bundle or a run folder.

    Returns:
        JSON-ready values; ``what`` names the kind.

    Raises:
        BadInputError: Nothing is there, or it is no file of ours.
        ArtefactError: It is ours, but damaged or not what its record says.
    """
    if path.is_dir():
        return _inspect_run(path)
    if not path.is_file():
        raise BadInputError(f"there is no {path}", remedy="name a file that edge-dsc wrote, or a run folder")
    if record_path(path).is_file():
        return {"what": "engine", "path": str(path), "record": msgspec.to_builtins(load_record(path))}
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if path.suffix == ".json":
        return _inspect_document(path)
    if path.suffix == ".keras":
        return _inspect_keras(path)
    if path.suffix == ".tar":
        return _inspect_bundle(path)
    if path.suffix == ".engine":
        load_record(path)  # raises: there is no record
    raise BadInputError(
        f"{path} is no file that edge-dsc wrote",
        remedy="name an .engine, .onnx, .json or .keras file, or a run folder",
    )


def _inspect_bundle(path: Path) -> dict[str, Any]:
    from edge_dsc.deploy.bundle import verify_bundle  # needs what building needs

    bundle = msgspec.to_builtins(verify_bundle(path, None))
    return {"what": "bundle, its signature not looked at", "path": str(path), "document": bundle}


def list_networks(*, progress: Progress | None = None) -> dict[str, Any]:
    """Build every network that has a name, for three classes, and count what is in it.

    Args:
        progress: Called before each network.

    Returns:
        JSON-ready values: ``networks`` with parameters, multiply-adds for one grey image as it is deployed, and sizes
        of input; ``runtimes`` with the precisions that each builds, and why it does not work on this machine.

    Raises:
        EnvironmentProblem: TensorFlow is missing.
    """
    from edge_dsc.networks import (
        ARCHITECTURES,
        INPUT_SIDE,
        NAMES,
        build_network,
        count_parameters,
        fold_network,
        multiply_adds,
        smallest_size,
    )

    networks = {}
    for done, name in enumerate(NAMES):
        if progress:
            progress(f"building {name}", done, len(NAMES))
        model = build_network(name, _LISTED_CLASSES)
        smallest = smallest_size(name)
        networks[name] = {
            "parameters": count_parameters(model),
            "multiply_adds": multiply_adds(fold_network(model) if name in ARCHITECTURES else model),
            "size": INPUT_SIDE,
            "smallest_size": smallest,
            "imagenet": name not in ARCHITECTURES,
        }
    runtimes = {}
    for name in RUNTIME_NAMES:
        runtime = get_runtime(name)
        found = runtime.availability()
        runtimes[name] = {
            "precisions": [one.value for one in runtime.precisions],
            "version": found.version,
            "no_build": found.no_build,
            "no_run": found.no_run,
        }
    return {"classes": _LISTED_CLASSES, "networks": networks, "runtimes": runtimes}


def format_networks(found: Mapping[str, Any]) -> str:
    """Set the networks and the runtimes as tables."""
    rows = []
    for name, network in found["networks"].items():
        parameters, size, smallest = network["parameters"], network["size"], network["smallest_size"]
        sizes = f"{size}" if smallest == size else f"{size}, {smallest} or more"
        counts = (parameters["feature_extractor"], parameters["total"], network["multiply_adds"])
        rows.append((name, *(f"{count:,}" for count in counts), sizes))
    header = ("network", "features", "parameters", "multiply-adds", "input")
    lines = [align_rows(header, rows), ""]
    runtimes = [
        (name, " ".join(one["precisions"]), one["no_build"] or "yes", one["no_run"] or "yes")
        for name, one in found["runtimes"].items()
    ]
    lines.append(align_rows(("runtime", "precisions", "builds here", "runs here"), runtimes, numeric=False))
    lines.append(
        f"\nfeatures: trainable parameters before the dense layers; parameters: all, for {found['classes']} classes;"
        "\nmultiply-adds: of one grey image in the deployed graph"
    )
    return "\n".join(lines)


def inspect_layers(path: Path, device: int | None = None) -> dict[str, Any]:
    """Run an engine's smallest batch and say which layers it has, how each is computed and how long it takes.

    Args:
        path: The engine; where it cannot run, its record gives the names and precisions of its layers.
        device: Which GPU; None takes the first. Where one is named, an engine that cannot run there is refused.

    Returns:
        JSON-ready values: ``layers``, and in ``not_timed`` why they have no times.

    Raises:
        BadInputError: Nothing is there, or it is no file of ours.
        ArtefactError: The engine is not what its record says.
        EnvironmentProblem: A GPU is named, and the engine cannot run on it.
        UsageError: It is no engine, or a GPU is named for one that runs on the processor.
    """
    if not (path.is_file() and record_path(path).is_file()):
        what = inspect_path(path)["what"]
        raise UsageError(f"--layers wants an engine; {path} is: {what}", remedy="name an .engine file")
    record, why = load_record(path), None
    runtime = get_runtime(record.runtime)
    refuse_on_processor(runtime, ["--device"] if device is not None else [], path)
    try:
        layers, _ = runtime.inspect_layers(path, record, device or 0)
    except (ArtefactError, EnvironmentProblem) as error:  # the engine is sound, but not for this machine
        if device is not None:
            raise
        layers = tuple(EngineLayer(name=name, precision=kind) for name, kind in record.layer_types.items())
        why = f"they are those of its record, because {error.what}"
    total = sum(layer.microseconds or 0.0 for layer in layers)
    if not total and why is None:
        why = f"{record.runtime} reported no times"
    rows = [
        {
            **msgspec.to_builtins(layer),
            "share": layer.microseconds / total if total and layer.microseconds is not None else None,
        }
        for layer in layers
    ]
    return {
        "what": "layers of an engine",
        "path": str(path),
        "runtime": record.runtime,
        "batch": record.batch.smallest,
        "runs": LAYER_RUNS,
        "not_timed": why,
        "layers": rows,
    }


def format_layers(found: Mapping[str, Any]) -> str:
    """Return what :func:`inspect_layers` found as a table; a column that says nothing is left out."""
    rows = [
        {
            "layer": layer["name"],
            f"{'us':>9}": "" if layer["microseconds"] is None else f"{layer['microseconds']:9.1f}",
            f"{'share':>6}": "" if layer["share"] is None else f"{layer['share']:6.1%}",
            "precision": layer["precision"],
            "kind": layer["kind"],
            "kernel": layer["kernel"],
            "ONNX layers": ", ".join(layer["onnx"]),
        }
        for layer in found["layers"]
    ]
    header = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    total = sum(layer["microseconds"] or 0.0 for layer in found["layers"])
    if found["not_timed"] is None:
        images = "one image" if found["batch"] == 1 else f"{found['batch']} images"
        how = f"medians of {found['runs']} runs with {images}, {total:.1f} us together"
    else:
        how = f"without times: {found['not_timed']}"
    title = printable(f"{found['path']}, {len(rows)} layers on {found['runtime']}: {how}")
    if not rows:
        return title
    return f"{title}\n\n{align_rows(header, [[row[name] for name in header] for row in rows], numeric=False)}"


def _inspect_run(folder: Path) -> dict[str, Any]:
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    found = []
    for entry in files:
        if entry.name.endswith(".engine.json"):
            continue
        try:
            what = inspect_path(entry)["what"]
        except ArtefactError as error:
            what = f"refused: {error}"
        except BadInputError:
            what = "other"
        found.append({"file": entry.name, "what": what, "bytes": entry.stat().st_size})
    if not found:
        raise BadInputError(f"{folder} is empty", remedy="name a run folder that train wrote")
    return {"what": "run folder", "path": str(folder), "files": found}


def _inspect_onnx(path: Path) -> dict[str, Any]:
    from engines.graph import count_multiply_adds, count_parameters, load_model, weighted_layers

    model = load_model(path)
    return {
        "what": "ONNX model",
        "path": str(path),
        "sha256": model.sha256,
        "contract": msgspec.to_builtins(model.contract),
        "parameters": count_parameters(model.proto),
        "multiply_adds": count_multiply_adds(model.proto),
        "layers": dict(weighted_layers(model.proto)),
        "operators": [node.op_type for node in model.proto.graph.node],
    }


def _inspect_keras(path: Path) -> dict[str, Any]:
    from edge_dsc.training.run_folder import MODEL_FILE, RECORD_FILE, load_training_record

    if path.name == MODEL_FILE and (path.parent / RECORD_FILE).is_file():
        load_training_record(path.parent)  # refuses a model that is not the record's
    elif not zipfile.is_zipfile(path):
        raise ArtefactError(f"{path} is no whole Keras model", remedy="make it again: edge-dsc train DATA")
    size = path.stat().st_size
    return {"what": "Keras model", "path": str(path), "bytes": size, "sha256": sha256_file(path)}


def _inspect_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path} is no JSON document: {error}", remedy="name a file that edge-dsc wrote"
        ) from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or not _OUR_KIND.fullmatch(kind):
        raise BadInputError(
            f"{path} is no document of edge-dsc (kind: {kind})", remedy="name a file that it wrote"
        )
    if kind == RECORD.name:
        record = load_record(path.with_suffix(""))
        return {"what": "engine record", "path": str(path), "record": msgspec.to_builtins(record)}
    load = _document_readers().get(kind)
    if load is not None:
        load(path)  # refuses it where it was edited, or has a field of another type
    return {"what": kind.partition("/")[2].replace("-", " "), "path": str(path), "document": document}


def _document_readers() -> dict[str, Callable[[Path], object]]:
    """Return what reads and checks a document, by its kind; results that ``--json`` printed have no reader."""
    from bench.report import load_report
    from calibration.coverage import COVERAGE
    from calibration.table import TABLE, load_table
    from edge_dsc.build.adopt import ADOPTION
    from edge_dsc.checks.selftest import SELFTEST
    from edge_dsc.data.split import load_split
    from edge_dsc.data.synthetic import SYNTHESIS
    from edge_dsc.evaluate.evaluation import EVALUATION
    from edge_dsc.study.findings import REPORT
    from edge_dsc.study.trainings import ANSWERS, STUDY
    from edge_dsc.training.run_folder import METRICS, TRAINING_RECORD
    from engines.trt.cache import MEMORY

    return {
        ADOPTION.name: ADOPTION.load,
        COVERAGE.name: COVERAGE.load,
        "edge-dsc/latency-report": load_report,
        "edge-dsc/split": load_split,
        EVALUATION.name: EVALUATION.load,
        **{kind.name: kind.load for kind in (STUDY, ANSWERS, REPORT)},
        MEMORY.name: MEMORY.load,
        METRICS.name: METRICS.load,
        SELFTEST.name: SELFTEST.load,
        SYNTHESIS.name: SYNTHESIS.load,
        TABLE.name: load_table,
        TRAINING_RECORD.name: TRAINING_RECORD.load,
    }


def describe_table(table: CalibrationTable) -> dict[str, Any]:
    """Return a calibration table's key facts, JSON-ready."""
    return {
        "method": table.method,
        "images": len(table.images),
        "ranges": {name: list(bounds) for name, bounds in table.ranges.items()},
        "onnx_sha256": table.onnx_sha256,
        "preprocess_sha256": table.preprocess_sha256,
        "seed": table.seed,
        "rounded": sorted(name for name, each in table.corrections.items() if each.rounded_up),
        "bias_corrected": sorted(name for name, each in table.corrections.items() if each.bias),
    }


def format_record(record: EngineRecord) -> str:
    """Return an engine record's key facts as text."""
    layers = ", ".join(f"{count} in {name}" for name, count in sorted(record.layers.items()))
    lines = [
        f"  {record.contract.architecture} in {record.precision.value}, {record.engine_bytes:,} bytes,"
        f" {record.runtime} {record.runtime_version}, batch {record.batch}, built in {record.build_seconds:.2f} s",
        f"  layers with weights: {layers} ({record.layers_source})",
        *_layer_lines(record),
        *_place_lines(record),
        *(f"  note: {note}" for note in record.notes),
    ]
    if record.validation is not None:
        text = format_validation(record.validation, precision=record.precision.value)
        lines += [f"  {line}" for line in text.splitlines()]
    return "\n".join(map(printable, lines))


def _place_lines(record: EngineRecord) -> list[str]:
    """Say what goes into an engine where that is not grey uint8, and what runs on the Deep Learning Accelerator."""
    contract, core = record.contract, record.tuning.dla
    sides = ", ".join(map(str, contract.input_shape))
    lines = [f"  takes {contract.dtype} [N, {sides}]"] if contract.dtype != "uint8" else []
    if contract.cam is not None:
        lines.append(f"  class activation maps of {contract.cam[0]} x {contract.cam[1]} places")
    if contract.temperature != 1:
        lines.append(f"  temperature of its probabilities {contract.temperature:g}")
    if contract.decode == NVJPEG_RULE:
        lines.append(f"  JPEGs decoded by nvJPEG ({contract.decode})")
    if core is not None:
        lines.append(f"  DLA core {core}, on the GPU: {', '.join(record.gpu_layers) or 'nothing'}")
    return lines


def _layer_lines(record: EngineRecord) -> list[str]:
    """Name the layers by the precision they run in."""
    by_type: dict[str, list[str]] = {}
    for name, kind in record.layer_types.items():
        by_type.setdefault(kind, []).append(name)
    return [f"  {kind}: {', '.join(names)}" for kind, names in sorted(by_type.items())]


def format_inspection(found: Mapping[str, Any]) -> str:
    """Return an inspection as indented text; long lists are cut with their length."""
    return "\n".join(map(printable, _lines(found, 0)))


def _lines(value: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    pad = "  " * depth
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            lines.append(f"{pad}{key}:")
            shown = dict(list(entry.items())[:_LONG]) if depth else entry
            lines += _lines(shown, depth + 1)
            if len(shown) < len(entry):
                lines.append(f"{pad}  ... {len(entry) - len(shown)} more")
        elif isinstance(entry, list) and entry and isinstance(entry[0], Mapping):
            lines.append(f"{pad}{key}: {len(entry)}")
            lines += [f"{pad}  - {_row(row)}" for row in entry[:_LONG]]
            if len(entry) > _LONG:
                lines.append(f"{pad}  ... {len(entry) - _LONG} more")
        elif isinstance(entry, list):
            shown_list = ", ".join(str(item) for item in entry[:_LONG])
            more = f", ... {len(entry) - _LONG} more" if len(entry) > _LONG else ""
            lines.append(f"{pad}{key}: {shown_list}{more}")
        else:
            lines.append(f"{pad}{key}: {entry}")
    return lines


def _row(row: object) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items()) if isinstance(row, Mapping) else str(row)
