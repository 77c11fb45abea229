"""A classifier of another exporter becomes a model folder; what cannot is refused by name, and nothing is written."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from foreign_models import MEAN, MODELS, STD, Exporter
from onnx import TensorProto, helper, numpy_helper

from edge_dsc.build import adopt
from edge_dsc.build.adopt import ADOPTION, AdoptRequest, adopt_model
from edge_dsc.build.conform import Normalisation
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.checks.inspection import inspect_path
from edge_dsc.data import discover
from edge_dsc.data.purposes import images_to_judge, split_beside
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.networks import load_keras, save_network
from engines.errors import AccuracyGateError, BadInputError, UsageError
from engines.files import sha256_file
from engines.graph import load_model
from engines.images import read_inputs
from engines.runtimes import open_engine

LABELS = ("clear", "focal", "diffuse")
IMAGENET = Normalisation(scale=1 / 255, mean=MEAN, std=STD)
INSIDE = Normalisation(scale=1 / 255)


drawn_once = functools.cache(adopt.draw_phantom)


@pytest.fixture(autouse=True)
def _phantoms_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopt, "draw_phantom", drawn_once)


def written(folder: Path, model: onnx.ModelProto, name: str = "net.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def request(path: Path, out: Path, **changes: Any) -> AdoptRequest:
    fields: dict[str, Any] = {"labels": LABELS, "normalisation": IMAGENET, "out": out}
    return AdoptRequest(source=path, **{**fields, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "folded", "border"),
    [
        ("residual", {}, ("Reshape", "Concat", "Mul", "Add"), ("a constant plane",)),
        ("residual", {"colour": True}, ("Transpose", "Mul", "Add"), ("a constant plane",)),
        (
            "mobile",
            {"normalisation": INSIDE},
            ("Reshape", "Concat", "Mul", "Sub", "Div"),
            ("a constant plane",),
        ),
        ("grey", {"normalisation": INSIDE, "size": (64, 64)}, ("Reshape", "Mul"), ()),
    ],
)
def test_a_foreign_classifier_becomes_a_model_folder(
    name: str, changes: dict[str, Any], folded: tuple[str, ...], border: tuple[str, ...], tmp_path: Path
) -> None:
    source, out = written(tmp_path, MODELS[name](), f"{name}.onnx"), tmp_path / "runs" / name
    made = adopt_model(request(source, out, **changes))
    assert sorted(path.name for path in out.iterdir()) == ["adoption.json", "model.onnx"]
    record = ADOPTION.load(out / "adoption.json")
    assert record == made.record
    assert record.source_sha256 == sha256_file(source)
    assert record.onnx_sha256 == sha256_file(out / "model.onnx")
    assert (record.folded, record.border, record.kept) == (folded, border, None)
    assert (record.images, record.images_from, record.accuracy, record.judged) == (8, "phantoms", None, 0)
    assert 0 < record.parity <= 1e-6
    assert record.gives == ("probabilities" if name == "mobile" else "logits")
    contract = load_model(out / "model.onnx").contract
    assert contract == record.contract
    assert (contract.labels, contract.architecture) == (LABELS, name)
    assert contract.input_shape == (64, 64, 3 if "colour" in changes else 1)
    assert inspect_path(out / "adoption.json")["what"] == "adoption"


def test_the_same_file_gives_the_same_bytes_and_may_be_adopted_again(tmp_path: Path) -> None:
    source, out = written(tmp_path, MODELS["residual"]()), tmp_path / "out"
    adopt_model(request(source, out))
    first = (out / "model.onnx").read_bytes()
    adopt_model(request(source, out))
    assert (out / "model.onnx").read_bytes() == first


def test_a_fixed_batch_of_several_is_filled_and_freed(tmp_path: Path) -> None:
    model = MODELS["residual"]()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    (constant,) = (node for node in model.graph.node if node.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array([3, -1])))
    made = adopt_model(request(written(tmp_path, model), tmp_path / "out"))
    assert made.record.images == 8  # three batches, and the last has one more than there are images
    assert 0 < made.record.parity <= 1e-6


def test_an_engine_of_it_answers_like_the_original(tmp_path: Path) -> None:
    source, out = written(tmp_path, MODELS["residual"]()), tmp_path / "out"
    adopt_model(request(source, out))
    engine = build_engine(BuildRequest(model=out / "model.onnx", runtime="onnxruntime"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), np.repeat(pixels[:, :, :1], 3, axis=2))
    summary = infer_source(InferRequest(engine=engine.path, source=str(tmp_path / "a.png"), keep_rows=True))
    planes = IMAGENET.apply(pixels[None, :, :, :1], 3).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(source.read_bytes(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": planes})[0][0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    row = summary.rows[0]
    np.testing.assert_allclose([row[f"p_{label}"] for label in LABELS], expected, atol=2e-6)


def test_an_engine_of_colour_sees_red_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = written(tmp_path, MODELS["residual"]()), tmp_path / "out"
    adopt_model(request(source, out, colour=True))
    engine = build_engine(BuildRequest(model=out / "model.onnx", runtime="onnxruntime"))
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), rgb[:, :, ::-1])
    summary = infer_source(InferRequest(engine=engine.path, source=str(tmp_path / "a.png"), keep_rows=True))
    planes = IMAGENET.apply(rgb[None], 3).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(source.read_bytes(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": planes})[0][0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    row = summary.rows[0]
    np.testing.assert_allclose([row[f"p_{label}"] for label in LABELS], expected, atol=2e-6)
    camera = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr("edge_dsc.infer.inference._open_source", lambda *_: camera)
    with pytest.raises(UsageError, match=r"csi://0 gives grey pictures, and .* takes colour"):
        infer_source(InferRequest(engine=engine.path, source="csi://0"))


def test_labelled_images_judge_it(tmp_path: Path, textures: Path) -> None:
    source, out = written(tmp_path, MODELS["residual"]()), tmp_path / "out"
    shutil.copytree(textures, tmp_path / "data")
    (tmp_path / "data" / "clear" / "bad.png").write_bytes(b"no image")
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "clear" / "000.png").rename(tmp_path / "data" / "other" / "000.png")
    made = adopt_model(request(source, out, images=tmp_path / "data"))
    assert (made.record.images, made.record.judged, made.skipped) == (32, 149, 1)
    proto = load_model(out / "model.onnx").proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    right = 0
    for path in (tmp_path / "data").rglob("*.png"):
        if path.parent.name in LABELS and path.name != "bad.png":
            pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)[None, :, :, None]
            right += LABELS[int(session.run(None, {"image": pixels})[0].argmax())] == path.parent.name
    assert made.record.accuracy == right / 149
    assert f"accuracy on 149 labelled images: {right / 149:.1%}" in made.text()


def test_pixels_on_another_scale_are_pointed_out(tmp_path: Path) -> None:
    source, out = written(tmp_path, MODELS["grey"]()), tmp_path / "out"

    def text(scale: float) -> str:
        normalisation = Normalisation(scale=scale)
        return adopt_model(request(source, out, normalisation=normalisation, size=(64, 64))).text()

    bare = text(1)
    assert "it is fed pixels 0..255: name --scale, --mean and --std if it was trained on others" in bare
    assert (
        "  every answer is 0 or 1 to four digits, so that comparing them says little: is --scale right?"
        in bare
    )
    dark = text(1e-6)
    assert (
        "the answers are the same for all images to four digits, so that comparing them says little" in dark
    )
    right = text(1 / 255)
    assert "0..255" not in right and "four digits" not in right


def test_a_model_that_answers_differently_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adopt.deploy_any

    def spoiled(*arguments: Any, **options: Any) -> Any:
        made = real(*arguments, **options)
        bias = next(tensor for tensor in made.proto.graph.initializer if tensor.name == "fc.bias")
        bias.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([0.01, 0, 0]), "fc.bias")
        )
        return made

    monkeypatch.setattr(adopt, "deploy_any", spoiled)
    with pytest.raises(
        AccuracyGateError, match=r"differs from .*net\.onnx by .* on 8 images, more than 1e-04"
    ):
        adopt_model(request(written(tmp_path, MODELS["residual"]()), tmp_path / "out"))
    assert not (tmp_path / "out" / "model.onnx").exists()


def changed(change: Callable[[onnx.ModelProto], object], name: str = "residual") -> bytes:
    model = MODELS[name]()
    change(model)
    return bytes(model.SerializeToString())


def kept_in(place: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.append(onnx.StringStringEntryProto(key="location", value=place))

    return change


def renamed(op: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        node.op_type, node.domain = op, domain
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def with_branch(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    constant = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    body = helper.make_graph([constant], "body", [], [value])
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], "choice", then_branch=body, else_branch=body)
    )


def with_room(model: onnx.ModelProto) -> None:
    """A graph of a few bytes that asks for 64 GiB."""
    for name, value in (("room", np.array([1 << 34])), ("one", np.ones(1, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.node.append(helper.make_node("Expand", ["one", "room"], ["/room/Expand_output_0"]))


@pytest.mark.parametrize(
    ("data", "message", "remedy"),
    [
        (b"", "is not an ONNX model", "name an .onnx"),
        (b"hello", "is not an ONNX model", "name an .onnx"),
        (MODELS["grey"]().SerializeToString()[:500], "is not an? ", ""),
        (
            changed(kept_in("weights.bin")),
            r"keeps conv1.weight in another file: weights.bin",
            "save it as one file",
        ),
        (
            changed(kept_in("../../etc/passwd")),
            r"keeps conv1.weight in a file outside its folder: ../../etc/passwd",
            "do not trust",
        ),
        (changed(kept_in("/etc/passwd")), "in a file outside its folder: /etc/passwd", "do not trust"),
        (
            changed(renamed("FancyAct")),
            "uses what is not ONNX's own for inference: FancyAct",
            "opset 13 to 20",
        ),
        (changed(renamed("Gelu", "com.microsoft")), "inference: Gelu of com.microsoft", "opset 13 to 20"),
        (changed(with_room), "computes /room/Expand_output_0 of 17179869184 numbers", "opset 13 to 20"),
        (changed(with_branch), r"has a graph inside its node choice \(If\)", "without loops"),
        (
            changed(lambda m: m.graph.input.append(helper.make_tensor_value_info("age", 1, [1]))),
            "the model has 2 inputs: input, age",
            "one input",
        ),
    ],
)
def test_what_cannot_be_adopted_is_refused_by_name(
    data: bytes, message: str, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=message) as caught:
        adopt_model(request(path, tmp_path / "out"))
    assert remedy in caught.value.remedy
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_missing_file_and_one_of_ours_are_refused(tmp_path: Path, deployed_models: dict[str, Path]) -> None:
    for name in ("none.onnx", "none.keras"):
        with pytest.raises(BadInputError, match=f"cannot read .*{name}: No such file"):
            adopt_model(request(tmp_path / name, tmp_path / "out"))
    with pytest.raises(UsageError, match="is a model of edge-dsc already"):
        adopt_model(request(deployed_models["dsc"], tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": ("a", "b")}, BadInputError, "the network has 3 outputs, and there are 2 labels"),
        ({"labels": ("a", "a", "b")}, UsageError, "no model can have this contract: a class is named twice"),
        ({"labels": ("a",)}, UsageError, "no model can have this contract: .*length >= 2"),
        ({"labels": ("a", "", "b")}, UsageError, "no model can have this contract"),
        ({"size": (96, 96)}, UsageError, "the network's height is 64, not 96"),
        (
            {"normalisation": Normalisation(mean=(1.0, 2.0))},
            UsageError,
            "--mean has 2 numbers, the network 3 channels",
        ),
        (
            {"gives": "probabilities"},
            BadInputError,
            "what the network gives for an image, .*, adds up to .*: no probabilities",
        ),
    ],
)
def test_what_does_not_fit_the_network_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        adopt_model(request(written(tmp_path, MODELS["residual"]()), tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_an_open_size_must_be_named_and_be_large_enough(tmp_path: Path) -> None:
    source = written(tmp_path, MODELS["grey"]())
    with pytest.raises(UsageError, match="leaves the size of its input open") as caught:
        adopt_model(request(source, tmp_path / "out", normalisation=INSIDE))
    assert "--size 224" in caught.value.remedy
    with pytest.raises(BadInputError, match="the network's height is 16"):
        adopt_model(request(source, tmp_path / "out", normalisation=INSIDE, size=(16, 64)))


def ending_in(op: str) -> onnx.ModelProto:
    net = Exporter(0)
    x = net.add("GlobalAveragePool", "pool", net.conv("input", "conv", 1, 3, 3))
    x = net.add("Flatten", "flat", x)
    if op == "shares":
        x = net.add("Exp", "exp", x)
        x = net.add("Div", "div", x, net.add("ReduceSum", "sum", x, net.constant("one", np.array([1]))))
    else:
        x = net.add(op, "end", x)
    return net.model(x, ["N", 1, 64, 64], ["N", 3])


def test_what_the_outputs_mean_is_asked_where_the_graph_does_not_say(tmp_path: Path) -> None:
    sigmoid, shares = (written(tmp_path, ending_in(op), f"{op}.onnx") for op in ("Sigmoid", "shares"))
    with pytest.raises(
        BadInputError, match="the network ends in Sigmoid: each output is an answer of its own"
    ):
        adopt_model(request(sigmoid, tmp_path / "out", normalisation=INSIDE))
    with pytest.raises(BadInputError, match="looks like probabilities, though no Softmax gives it"):
        adopt_model(request(shares, tmp_path / "out", normalisation=INSIDE))
    made = adopt_model(request(shares, tmp_path / "out", normalisation=INSIDE, gives="probabilities"))
    assert made.record.gives == "probabilities"
    assert [node.op_type for node in made.model.proto.graph.node][-1] == "Div"


@pytest.mark.parametrize("end", ["Sigmoid", "Identity"])
def test_one_answer_is_the_probability_of_the_second_class(end: str, tmp_path: Path) -> None:
    net = Exporter(0)
    x = net.add("GlobalAveragePool", "pool", net.conv("input", "conv", 3, 1, 3, bias=False))
    x = net.add(end, "end", net.add("Flatten", "flat", x))
    path = written(tmp_path, net.model(x, [1, 3, 64, 64], [1, 1]))
    made = adopt_model(request(path, tmp_path / "out", labels=("normal", "pneumonia")))
    assert made.record.gives == ("probabilities" if end == "Sigmoid" else "logits")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1), dtype=np.uint8)
    planes = IMAGENET.apply(pixels, 3).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    second = np.concatenate([session.run(None, {"input": planes[n : n + 1]})[0] for n in range(2)])
    second = second if end == "Sigmoid" else 1 / (1 + np.exp(-second))
    deployed = onnxruntime.InferenceSession(
        made.model.proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    answers = deployed.run(None, {"image": pixels})[0]
    np.testing.assert_allclose(answers, np.concatenate([1 - second, second], axis=1), atol=1e-6)
    with pytest.raises(BadInputError, match="the network has 1 output, and there are 3 labels") as caught:
        adopt_model(request(path, tmp_path / "out"))
    assert caught.value.remedy == "name two labels, the one that it answers last"


@pytest.mark.parametrize("there", ["training.json", "model.onnx"])
def test_a_folder_of_another_model_is_left_alone(there: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text("{}")
    with pytest.raises(UsageError, match=f"holds {there}, which adopt did not write"):
        adopt_model(request(written(tmp_path, MODELS["residual"]()), tmp_path / "out"))
    assert (tmp_path / "out" / there).read_text() == "{}"


def test_what_would_be_replaced_must_be_of_adopt_and_not_the_original(tmp_path: Path) -> None:
    source, out = written(tmp_path, MODELS["residual"]()), tmp_path / "out"
    adopt_model(request(source, out))
    (out / "model.onnx").unlink()
    (out / "model.onnx").symlink_to(source)
    before = source.read_bytes()
    with pytest.raises(UsageError, match=r"model\.onnx is read, and would be replaced"):
        adopt_model(request(source, out))
    assert source.read_bytes() == before
    (out / "adoption.json").write_text('{"kind": "else"}')
    with pytest.raises(UsageError, match=r"holds model\.onnx, which adopt did not write"):
        adopt_model(request(source, out))
    (out / "model.onnx").unlink()
    with pytest.raises(UsageError, match=r"adoption\.json is JSON of another program"):
        adopt_model(request(source, out))
    assert [path.name for path in out.iterdir()] == ["adoption.json"]


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small networks as their authors save them: one of grey, one of any size, one with a Lambda, one with a class."""
    keras = load_keras()
    layers = keras.layers
    folder = tmp_path_factory.mktemp("keras")

    class Doubled(layers.Layer):  # type: ignore[name-defined, misc]
        def call(self, inputs: Any) -> Any:
            return 2 * inputs

    def network(first: list[Any], shape: tuple[int | None, ...]) -> Any:
        body = [
            layers.Conv2D(6, 5, strides=2, padding="same", name="stem"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(3, activation="softmax", name="answers"),
        ]
        return keras.Sequential([keras.Input(shape), *first, *body])

    keras.utils.set_random_seed(0)
    made = {
        "plain": keras.Sequential(
            [
                keras.Input((40, 48, 1)),
                layers.Rescaling(1 / 255),
                layers.Conv2D(4, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(3, activation="softmax"),
            ]
        ),
        "open": network(
            [layers.Normalization(mean=[110, 120, 130.0], variance=[9, 16, 25.0])], (None, None, 3)
        ),
        "deep": network([layers.Conv2D(2, 40)], (None, None, 1)),
        "lambda": network([layers.Lambda(lambda x: x / 255)], (40, 48, 1)),
        "custom": network([Doubled()], (40, 48, 1)),
    }
    image = keras.Input((40, 48, 1))
    three = layers.Concatenate()([layers.Rescaling(1 / 127.5, offset=-1)(image)] * 3)
    made["grey"] = keras.Model(image, network([], (40, 48, 3))(three))
    for name, model in made.items():
        for layer in model.layers:
            layer.set_weights(
                [value + 0.05 * np.random.default_rng(1).random(value.shape) for value in layer.get_weights()]
            )
        save_network(model, folder / f"{name}.keras")
    return {name: folder / f"{name}.keras" for name in made}


@pytest.mark.slow  # TensorFlow alone takes seconds to start
@pytest.mark.parametrize(
    ("name", "size", "shape", "border"),
    [
        ("grey", None, (40, 48, 1), "padded with grey 127.5"),
        ("open", (64, 32), (64, 32, 1), "a constant plane"),
    ],
)
def test_a_keras_file_is_adopted_and_folded(
    name: str,
    size: tuple[int, int] | None,
    shape: tuple[int, ...],
    border: str,
    keras_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    made = adopt_model(request(keras_files[name], tmp_path / "out", normalisation=Normalisation(), size=size))
    assert made.model.contract.input_shape == shape
    assert (made.record.kept, made.record.border, made.record.gives) == (None, (border,), "probabilities")
    assert made.record.parity <= 1e-6
    kinds = [node.op_type for node in made.model.proto.graph.node]
    assert kinds[:5] == ["Cast", "Reshape", "Pad", "Conv", "Relu"]


@pytest.mark.slow
def test_layers_in_a_row_and_a_flatten_are_adopted(keras_files: dict[str, Path], tmp_path: Path) -> None:
    made = adopt_model(request(keras_files["plain"], tmp_path / "out", normalisation=Normalisation()))
    kinds = [node.op_type for node in made.model.proto.graph.node]
    assert kinds[:5] == ["Cast", "Reshape", "Conv", "Relu", "Reshape"]
    assert kinds[5] in ("MatMul", "Gemm") and kinds[-1] == "Softmax"
    assert 0 < made.record.parity <= 1e-5  # sums of thousands of products


@pytest.mark.slow
def test_a_keras_file_of_any_size_needs_one_that_leaves_something(
    keras_files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"open\.keras leaves the size of its input open"):
        adopt_model(request(keras_files["open"], tmp_path / "out", normalisation=Normalisation()))
    with pytest.raises(BadInputError, match=r"deep\.keras cannot be converted to ONNX: ") as caught:
        adopt_model(
            request(keras_files["deep"], tmp_path / "out", normalisation=Normalisation(), size=(32, 32))
        )
    assert caught.value.remedy == "give a larger --size"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), [("lambda", "Lambda"), ("custom", "Doubled")])
def test_code_inside_a_keras_file_is_not_run(
    name: str, reason: str, keras_files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=rf"Keras cannot load .*{name}\.keras: .*{reason}") as caught:
        adopt_model(request(keras_files[name], tmp_path / "out"))
    assert caught.value.remedy == "export it to ONNX where its code is, and adopt that"
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_temperature_is_fitted_on_images_that_cannot_judge_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original is three times too sure: its logits are divided by three, whatever order its classes have."""
    data, out = tmp_path / "data", tmp_path / "out"
    rng = np.random.default_rng(0)
    for label in LABELS:
        (data / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            cv2.imwrite(str(data / label / f"{number}.png"), pixels)
    source = written(tmp_path, MODELS["residual"]())
    asked: dict[str, Any] = {}

    def fit(true: Any, probabilities: Any) -> float:
        asked.update(true=true, probabilities=probabilities)
        return 3.0

    monkeypatch.setattr(adopt, "fit_temperature", fit)
    made = adopt_model(request(source, out, fit=data))
    assert np.bincount(asked["true"]).tolist() == [12, 12, 12] and asked["probabilities"].shape == (36, 3)
    assert load_model(out / "model.onnx").contract.temperature == made.record.contract.temperature == 3.0
    assert made.record.onnx_sha256 == sha256_file(out / "model.onnx")
    assert f"temperature 3, fitted on the images in {out / 'split.json'}" in made.text()
    split = split_beside(out / "model.onnx")
    assert split is not None and len(split.samples("validation")) == 36
    with pytest.raises(BadInputError, match="training or calibration saw all 36 images"):
        images_to_judge(discover(data), split, frozenset())
    # An engine gives the probabilities of the logits over the temperature; without one the split is gone.
    engine = build_engine(BuildRequest(model=out / "model.onnx", runtime="onnxruntime"))
    picture = data / "focal" / "0.png"
    (answer,) = infer_source(InferRequest(engine=engine.path, source=str(picture), keep_rows=True)).rows
    adopt_model(request(source, out))
    assert sorted(path.name for path in out.iterdir() if "engine" not in path.name) == [
        "adoption.json",
        "model.onnx",
    ]
    plain = build_engine(BuildRequest(model=out / "model.onnx", runtime="onnxruntime"))
    image = next(read_inputs([picture], plain.record.contract)).pixels
    with open_engine(plain.path) as runner:
        shares = runner.run(image[None])[0].astype(np.float64) ** (1 / 3)
    assert [answer[f"p_{label}"] for label in LABELS] == pytest.approx(shares / shares.sum(), abs=1e-6)


def test_a_temperature_is_not_fitted_on_classes_that_the_model_does_not_know(tmp_path: Path) -> None:
    for label in ("clear", "covid19"):
        (tmp_path / "data" / label).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "data" / label / "a.png"), np.zeros((64, 64), np.uint8))
    source = written(tmp_path, MODELS["residual"]())
    with pytest.raises(BadInputError, match="does not know the class covid19"):
        adopt_model(request(source, tmp_path / "out", fit=tmp_path / "data"))
    assert not (tmp_path / "out" / "model.onnx").exists()
