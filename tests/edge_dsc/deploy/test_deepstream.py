"""nvinfer's configuration: what it computes from a frame is the contract's input, by its documented formula."""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from calibration.tensorrt import read_cache
from edge_dsc.deploy.deepstream import LIMITS, settings, take_planar_floats, write_deepstream
from engines.contract import COLOUR_RULE, ModelContract
from engines.errors import ArtefactError, UsageError
from engines.graph import OnnxModel, load_model
from engines.record import Precision, load_record, save_record
from engines.runtimes import open_engine

INT8 = "dsc-int8.onnxruntime.engine"


def nvinfer_input(frame: NDArray[np.uint8], keys: dict[str, str]) -> NDArray[np.float32]:
    """What nvinfer hands to the engine from frames ``uint8 [N, H, W, C]`` of the network's size, red first.

    y = net-scale-factor * (x - offsets[c]), float32, channels first.
    """
    channels, height, width = map(int, keys["infer-dims"].split(";"))
    assert frame.shape[1:] == (height, width, channels) and keys["network-input-order"] == "0"
    offsets = np.array([float(value) for value in keys["offsets"].split(";")], np.float32)
    factor = np.float32(keys["net-scale-factor"])
    return np.ascontiguousarray(np.moveaxis(factor * (frame.astype(np.float32) - offsets), -1, 1))


def read_keys(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read_string((folder / "config_infer.txt").read_text())
    assert parser.sections() == ["property"]
    return dict(parser["property"])


def answer(folder: Path, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"frames": pixels})[0]


def test_nvinfer_s_formula_gives_the_contract_s_input_bit_for_bit(engine: Path, tmp_path: Path) -> None:
    made = write_deepstream(engine, tmp_path / "out")
    keys = read_keys(tmp_path / "out")
    assert (made.network_mode, keys["network-mode"], keys["network-type"]) == (0, "0", "1")
    assert (keys["model-color-format"], keys["infer-dims"], keys["batch-size"]) == ("2", "1;224;224", "4")
    assert (keys["maintain-aspect-ratio"], keys["output-blob-names"]) == ("0", "probabilities")
    assert (tmp_path / "out" / "labels.txt").read_text() == "clear;focal;diffuse\n"
    grey = np.random.default_rng(3).integers(0, 256, (4, 224, 224, 1), np.uint8)
    grey[0, 0, :256, 0] = np.arange(224)
    pixels = nvinfer_input(grey, keys)
    assert pixels.dtype == np.float32 and np.array_equal(np.moveaxis(pixels, 1, -1), grey)
    with open_engine(engine) as runner:
        assert np.allclose(answer(tmp_path / "out", pixels), runner.run(grey), atol=1e-6)
    assert "int8-calib-file" not in keys


def test_the_configuration_says_where_it_cannot_be_equal(engine: Path, tmp_path: Path) -> None:
    write_deepstream(engine, tmp_path / "out")
    text = (tmp_path / "out" / "config_infer.txt").read_text()
    assert all(f"# - {limit}\n" in text for limit in LIMITS)
    assert [limit.partition(":")[0] for limit in LIMITS] == [
        "resize",
        "decoder",
        "input",
        "confidence",
        "files",
    ]


def test_colour_is_red_first_with_an_offset_for_each_channel(engine: Path) -> None:
    contract = ModelContract(
        labels=("a", "b"), architecture="theirs", decode=COLOUR_RULE, height=96, width=128
    )
    found = settings(load_record(engine), contract)
    assert (found["model-color-format"], found["infer-dims"], found["offsets"]) == (0, "3;96;128", "0;0;0")


def test_three_channels_are_turned_as_the_model_wants_them(tmp_path: Path) -> None:
    contract = ModelContract(
        labels=("a", "b", "c"), architecture="theirs", decode=COLOUR_RULE, height=8, width=6
    )
    nodes = [
        helper.make_node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["grey"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Softmax", ["means"], ["probabilities"]),
    ]
    ends = (("image", TensorProto.UINT8, ["N", 8, 6, 3]), ("probabilities", TensorProto.FLOAT, ["N", 3]))
    given, wanted = ([helper.make_tensor_value_info(*end)] for end in ends)
    proto = helper.make_model(
        helper.make_graph(nodes, "g", given, wanted),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=9,
    )
    taken = take_planar_floats(OnnxModel(tmp_path / "a.onnx", "", proto, contract))
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)
    keys = {"infer-dims": "3;8;6", "network-input-order": "0", "offsets": "0;0;0", "net-scale-factor": "1"}
    feeds = ((proto, {"image": frames}), (taken, {"frames": nvinfer_input(frames, keys)}))
    here, there = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feed
        )[0]
        for model, feed in feeds
    )
    assert here.tobytes() == there.tobytes()


def test_int8_has_a_scale_for_every_tensor_up_to_the_new_input(built_run: Path, tmp_path: Path) -> None:
    made = write_deepstream(built_run / INT8, tmp_path / "out", tensorrt="8.6.2")
    keys = read_keys(tmp_path / "out")
    assert (made.network_mode, keys["network-mode"], keys["int8-calib-file"]) == (1, "1", "calibration.cache")
    cache = read_cache((tmp_path / "out" / "calibration.cache").read_text(), source="cache")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    front = [
        *(value.name for value in graph.input),
        *(name for node in graph.node[:2] for name in node.output),
    ]
    assert front == ["frames", "image", "Cast_0"]
    # All three hold the same whole values, 0 to 255.
    assert {cache.scales[name] for name in front} == {cache.scales["frames"]}
    assert cache.scales["frames"] == pytest.approx(255 / 127)
    outputs = {name for node in graph.node for name in node.output} | {"frames"}
    assert set(cache.scales) <= outputs and len(cache.scales) > 10
    with pytest.raises(UsageError, match="11"):
        write_deepstream(built_run / INT8, tmp_path / "out", tensorrt="11.1")


@pytest.mark.parametrize("place", ["tensor", "node"])
def test_what_has_the_new_input_s_name_keeps_it(deployed_models: dict[str, Path], place: str) -> None:
    model = load_model(deployed_models["dsc"])
    graph = model.proto.graph
    if place == "node":
        graph.node[3].name = "frames"
    old = graph.node[3].output[0] if place == "tensor" else ""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["frames" if name == old else name for name in names]
    taken = take_planar_floats(model)
    assert [value.name for value in taken.graph.input] == ["frames2"]
    onnxruntime.InferenceSession(taken.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"precision": Precision.MIXED}, UsageError, "nvinfer knows no mixed precision"),
        ({"onnx": "gone.onnx"}, ArtefactError, "cannot read .*gone.onnx"),
    ],
)
def test_what_nvinfer_cannot_run_is_refused(
    built_run: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    folder = Path(shutil.copytree(built_run, tmp_path / "run"))
    save_record(folder / INT8, msgspec.structs.replace(load_record(folder / INT8), **changes))
    with pytest.raises(error, match=said):
        write_deepstream(folder / INT8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_engine_that_nvinfer_built_may_go_and_a_stranger_s_file_may_not(
    engine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_deepstream(engine, out)
    (out / "model.onnx_b4_gpu0_fp32.engine").write_text("built")
    write_deepstream(engine, out)
    assert sorted(path.name for path in out.iterdir()) == ["config_infer.txt", "labels.txt", "model.onnx"]
    (out / "pipeline.txt").write_text("theirs")
    with pytest.raises(UsageError, match=r"also holds pipeline\.txt"):
        write_deepstream(engine, out)


def test_the_command_prints_the_line_for_the_pipeline(edge_dsc: Any, engine: Path, tmp_path: Path) -> None:
    done = edge_dsc("deploy", "deepstream", engine, "--out", tmp_path / "out")
    assert (done.code, done.out) == (0, f"nvinfer config-file-path={tmp_path / 'out' / 'config_infer.txt'}\n")
    assert done.err.count("not equal to infer: ") == 5
    assert (
        edge_dsc("deploy", "deepstream", engine, "--out", tmp_path / "out", "--json").json["network_mode"]
        == 0
    )
