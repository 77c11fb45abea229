"""The repository as Triton's own protobuf reads it, and what is refused; no server is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.deploy.triton import (
    TritonRequest,
    find_triton,
    travelling_record,
    write_repository,
)
from edge_dsc.infer.served import RECORD_KEY
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import sha256_file
from engines.record import (
    RECORD,
    Agreement,
    BatchRange,
    Change,
    EngineRecord,
    Flip,
    Validation,
    load_record,
    save_record,
)


def config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def fields(message: Any) -> str:
    """A message as one line, which is exact and short."""
    return str(text_format.MessageToString(message, as_one_line=True)).strip()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def repository(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repository")
    write_repository(TritonRequest(engines=[engine], out=out, instances=2, queue_delay_us=300))
    return out


def test_it_holds_a_model_its_front_and_the_engine_with_its_record(repository: Path, engine: Path) -> None:
    assert names(repository) == [
        "dsc/1/dsc.engine",
        "dsc/1/dsc.engine.json",
        "dsc/1/model.py",
        "dsc/config.pbtxt",
        "dsc/labels.txt",
        "dsc_files/1/model.py",
        "dsc_files/config.pbtxt",
        "dsc_files/labels.txt",
        "edge-dsc.json",
    ]
    assert (repository / "dsc" / "labels.txt").read_text() == "clear\nfocal\ndiffuse\n"
    assert load_record(repository / "dsc" / "1" / "dsc.engine") == load_record(engine)


def test_the_model_takes_what_the_contract_says(repository: Path, engine: Path) -> None:
    found = config(repository / "dsc")
    assert (found.name, found.backend, found.platform, found.max_batch_size) == ("dsc", "python", "", 8)
    assert [fields(end) for end in (*found.input, *found.output)] == [
        'name: "image" data_type: TYPE_UINT8 dims: 224 dims: 224 dims: 1',
        'name: "probabilities" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt"',
        'name: "cam" data_type: TYPE_FP32 dims: 3 dims: 14 dims: 14',
    ]
    assert fields(found.dynamic_batching) == "preferred_batch_size: 4 max_queue_delay_microseconds: 300"
    assert [fields(group) for group in found.instance_group] == ["count: 2 kind: KIND_CPU"]
    assert fields(found.version_policy) == "latest { num_versions: 1 }"
    assert [fields(warm) for warm in found.model_warmup] == [
        f'name: "batch of {size}" batch_size: {size} inputs {{ key: "image" value {{ data_type: TYPE_UINT8 '
        "dims: 224 dims: 224 dims: 1 random_data: true } }"
        for size in (1, 4)
    ]
    record = RECORD.loads(found.parameters[RECORD_KEY].string_value, "the configuration")
    assert record == load_record(engine)


def test_the_front_takes_files_of_any_length_and_gives_a_label(repository: Path) -> None:
    found = config(repository / "dsc_files")
    assert (found.backend, found.max_batch_size) == ("python", 8)
    assert [fields(end) for end in (*found.input, *found.output)] == [
        'name: "file" data_type: TYPE_UINT8 dims: -1 allow_ragged_batch: true',
        'name: "label" data_type: TYPE_UINT8 dims: -1',
        'name: "probability" data_type: TYPE_FP32 dims: 1',
        'name: "probabilities" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt"',
    ]
    parameters = {name: value.string_value for name, value in found.parameters.items()}
    assert parameters["edge_dsc.model"] == "dsc"
    assert parameters["edge_dsc.engine"] == "dsc/1/dsc.engine"
    assert parameters["edge_dsc.unsure"] == "0.6"
    assert json.loads(parameters["edge_dsc.levels"]) == [10] * 32


def recorded(engine: Path, place: Path, **changes: Any) -> Path:
    """A copy of an engine under a record that says something else: what a device would have built."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(engine, place)
    save_record(place, msgspec.structs.replace(load_record(engine), engine=place.name, **changes))
    return place


@pytest.mark.parametrize(
    ("runtime", "asked", "platform", "backend", "kind"),
    [
        ("tensorrt", "auto", "tensorrt_plan", "", "KIND_GPU"),
        ("tensorrt", "python", "", "python", "KIND_GPU"),
        ("onnxruntime", "onnxruntime", "onnxruntime_onnx", "", "KIND_CPU"),
        ("tensorrt-rtx", "auto", "", "python", "KIND_GPU"),
    ],
)
def test_each_runtime_has_its_backend(
    engine: Path, tmp_path: Path, runtime: str, asked: str, platform: str, backend: str, kind: str
) -> None:
    plan = recorded(engine, tmp_path / "dsc-fp16.tensorrt.engine", runtime=runtime)
    made = write_repository(TritonRequest(engines=[plan], out=tmp_path / "out", backend=asked, front=False))
    found = config(tmp_path / "out" / "dsc-fp16.tensorrt")
    assert (found.platform, found.backend, found.instance_group[0].name) == (platform, backend, "")
    assert fields(found.instance_group[0]) == f"count: 1 kind: {kind}"
    # Triton loads the plan by the name that its record knows it by.
    assert found.default_model_filename == ("dsc-fp16.tensorrt.engine" if platform else "")
    assert (made.models[0].front, made.models[0].backend) == (
        None,
        asked if asked != "auto" else (backend or "tensorrt"),
    )
    assert made.models[0].engine_sha256 == sha256_file(plan)


def test_other_pixels_are_declared_as_they_are(engine: Path, tmp_path: Path) -> None:
    contract = load_record(engine).contract.with_input("int8", border=1)
    plan = recorded(engine, tmp_path / "a.engine", runtime="tensorrt", contract=contract)
    write_repository(TritonRequest(engines=[plan], out=tmp_path / "out"))
    assert fields(config(tmp_path / "out" / "a").input[0]) == (
        'name: "image" data_type: TYPE_INT8 dims: 1 dims: 226 dims: 226'
    )


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        (
            {"batch": BatchRange(2, 4, 8)},
            "auto",
            "takes batches of 2 and more; a server's requests come one by one",
        ),
        ({}, "tensorrt", "is of onnxruntime, which Triton's tensorrt backend cannot load"),
    ],
)
def test_what_a_server_cannot_run_is_refused(
    engine: Path, tmp_path: Path, changes: dict[str, Any], asked: str, said: str
) -> None:
    plan = recorded(engine, tmp_path / "a.engine", **changes)
    with pytest.raises(UsageError, match=said):
        write_repository(TritonRequest(engines=[plan], out=tmp_path / "out", backend=asked))
    assert not (tmp_path / "out").exists()


def test_two_engines_of_one_name_are_refused(engine: Path, tmp_path: Path) -> None:
    twin = recorded(engine, tmp_path / "dsc.engine")
    with pytest.raises(UsageError, match="two engines are called dsc"):
        write_repository(TritonRequest(engines=[engine, twin], out=tmp_path / "out"))


def test_a_damaged_engine_is_refused_and_the_old_repository_stays(engine: Path, tmp_path: Path) -> None:
    plan = recorded(engine, tmp_path / "a.engine")
    out = tmp_path / "out"
    write_repository(TritonRequest(engines=[plan], out=out))
    before = {name: (out / name).read_bytes() for name in names(out)}
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtefactError, match="is not the engine of its record"):
        write_repository(TritonRequest(engines=[plan], out=out))
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engine", "a.engine.json", "out"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_replacement_that_fails_half_way_leaves_the_old_repository(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    out = tmp_path / "out"
    write_repository(TritonRequest(engines=[recorded(engine, tmp_path / "a.engine")], out=out))
    before = {name: (out / name).read_bytes() for name in names(out)}
    rename, failed = Path.replace, []

    def replace(source: Path, target: Path) -> Path:
        if target == out / "dsc" and not failed:  # the old models are away by then
            assert not (out / "a").exists()
            failed.append(target)
            raise failure
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises((EnvironmentProblem, KeyboardInterrupt)):
        write_repository(TritonRequest(engines=[engine], out=out))
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert failed and sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


def test_our_own_repository_is_replaced(engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_repository(TritonRequest(engines=[recorded(engine, tmp_path / "a.engine")], out=out))
    write_repository(TritonRequest(engines=[recorded(engine, tmp_path / "b.engine")], out=out, front=False))
    assert sorted(path.name for path in out.iterdir()) == ["b", "edge-dsc.json"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


@pytest.mark.parametrize("foreign", ["resnet/config.pbtxt", "notes.txt"])
def test_a_foreign_file_in_it_is_named_and_nothing_is_touched(
    engine: Path, tmp_path: Path, foreign: str
) -> None:
    out = tmp_path / "out"
    write_repository(TritonRequest(engines=[engine], out=out))
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("theirs")
    before = names(out)
    with pytest.raises(UsageError, match=rf"also holds {foreign.partition('/')[0]}, which is not ours"):
        write_repository(TritonRequest(engines=[engine], out=out))
    assert names(out) == before and (out / foreign).read_text() == "theirs"


@pytest.mark.parametrize("manifest", [None, "{}", '{"kind": "edge-dsc/triton-repository"'])
def test_a_folder_of_somebody_else_is_refused(engine: Path, tmp_path: Path, manifest: str | None) -> None:
    out = tmp_path / "out"
    (out / "resnet").mkdir(parents=True)
    if manifest is not None:
        (out / "edge-dsc.json").write_text(manifest)
    with pytest.raises(UsageError, match="is not empty and was not made by edge-dsc"):
        write_repository(TritonRequest(engines=[engine], out=out))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_repository(TritonRequest(engines=[engine], out=tmp_path / "file"))


def test_names_of_pictures_stay_at_home(engine: Path) -> None:
    even = Change(0.9, 0.9, -0.01, 0.01)
    agreement = Agreement(
        reference="fp32", images=2, same_top1=1, accuracy=even, macro_f1=even, lost=1, won=0, mcnemar_p=1.0,
        reference_calibration_error=0.1, candidate_calibration_error=0.1, largest_difference=0.2,
        flipped=(Flip("ward/Jane Doe.png", "clear", "clear", "focal"),),
    )  # fmt: skip
    validation = Validation(
        images="ward",
        images_sha256="0" * 64,
        answered_by="itself",
        max_drop=0.5,
        skipped=0,
        agreement=agreement,
    )
    record: EngineRecord = msgspec.structs.replace(load_record(engine), validation=validation)
    sent = json.dumps(msgspec.to_builtins(travelling_record(record)))
    assert "Jane" not in sent and "ward" not in sent
    assert travelling_record(load_record(engine)) == load_record(engine)


def test_a_server_that_is_named_and_missing_is_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_DSC_TRITON", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=f"no tritonserver here .EDGE_DSC_TRITON={tmp_path}"):
        find_triton()


def test_the_command_says_what_the_server_needs(edge_dsc: Any, engine: Path, tmp_path: Path) -> None:
    done = edge_dsc("deploy", "triton", engine, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out == (
        f"dsc: python backend, dsc_files takes whole files\ntritonserver --model-repository={tmp_path / 'out'}\n"
    )
    assert "note: the server's Python needs edge-dsc" in done.err and "drift" not in done.err
    done = edge_dsc("deploy", "triton", engine, "--out", tmp_path / "out", "--no-front", "--json")
    assert (done.json["kind"], done.json["models"][0]["front"]) == ("edge-dsc/deploy-triton-result", None)
    (engine.parent / "calibration.json").rename(tmp_path / "calibration.json")
    try:
        done = edge_dsc("deploy", "triton", engine, "--out", tmp_path / "out")
    finally:
        (tmp_path / "calibration.json").rename(engine.parent / "calibration.json")
    assert f"dsc_files hold no drift of the input: cannot read {engine.parent}/calibration.json" in done.err


@pytest.fixture(scope="module")
def mixed_batches(deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "one.engine"
    return build_engine(
        BuildRequest(model=deployed_models["dsc"], runtime="onnxruntime", batch=BatchRange(1, 1, 1), out=out)
    ).path


def test_an_engine_for_one_picture_has_no_preferred_batch(mixed_batches: Path, tmp_path: Path) -> None:
    write_repository(TritonRequest(engines=[mixed_batches], out=tmp_path / "out"))
    found = config(tmp_path / "out" / "one")
    assert (found.max_batch_size, fields(found.dynamic_batching), len(found.model_warmup)) == (1, "", 1)
    assert found.HasField("dynamic_batching")
