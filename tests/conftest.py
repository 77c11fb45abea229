"""Fixtures for every test: deployed graphs with seeded random weights, and small folders of images."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything that reads them is imported: the processes of a run share the cores, one each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.contract import ModelContract

LABELS = ("clear", "focal", "diffuse")

# A shell's background job is started with Ctrl-C ignored; the tests that press it would then test nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _leaves(host: object) -> bool:
    """Whether a host is anything but this machine; a path (a UNIX socket) and no host at all are this machine."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str) or host in ("", "localhost"):
        return False
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return True


@pytest.fixture(scope="session", autouse=True)
def _calls_out() -> Iterator[list[str]]:
    """Refuse every connection and name look-up beyond loopback, and keep them: code may swallow the refusal."""
    seen: list[str] = []

    def guarded(original: Any, host_of: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if _leaves(host_of(*arguments)):
                seen.append(f"{original.__name__}{arguments[-1:] if len(arguments) > 1 else arguments}")
                raise ConnectionRefusedError(f"no test leaves this machine: {seen[-1]}")
            return original(*arguments, **options)

        return call

    def peer(_socket: socket.socket, address: Any) -> object:
        return address[0] if isinstance(address, tuple) else None

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), peer))
        patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host))
        yield seen


@pytest.fixture(autouse=True)
def _stays_here(_calls_out: list[str]) -> Iterator[None]:
    """Fail a test that tried to reach another machine."""
    yield
    tried, _calls_out[:] = list(_calls_out), []
    assert not tried, f"a test reached for another machine: {tried}"


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """``make_once(name, make)``: what ``make(folder)`` returned in the first process of this run that wanted it.

    The other processes wait for it; what it returns passes through pickle, and its files are shared: read only.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the folders of all processes

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        folder, kept = shared / name, shared / f"{name}.pickle"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if kept.exists():
                return pickle.loads(kept.read_bytes())  # noqa: S301  written below
            folder.mkdir()
            made = make(folder)
            kept.write_bytes(pickle.dumps(made))
            return made

    return once


def deployed_graph(architecture: str, seed: int = 0) -> onnx.ModelProto:
    """Build the deployed graph of a network by hand, with He-initialised random weights."""
    rng = np.random.default_rng(seed)
    contract = ModelContract(labels=LABELS, architecture=architecture)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(name: str, *shape: int, scale: float = 1.0) -> str:
        fan_in = int(np.prod(shape[1:]))
        return constant(name, (rng.standard_normal(shape) * scale * (2 / fan_in) ** 0.5).astype(np.float32))

    def bias(name: str, size: int) -> str:
        return constant(name, (rng.standard_normal(size) * 0.05).astype(np.float32))

    def add(op: str, *inputs: str, **attributes: object) -> str:
        nodes.append(
            helper.make_node(op, inputs, [f"{op}_{len(nodes)}"], name=f"{op}_{len(nodes)}", **attributes)
        )
        return nodes[-1].output[0]

    def conv(
        x: str, name: str, inputs: int, outputs: int, kernel: int, group: int = 1, scale: float = 1.0
    ) -> str:
        w = weight(f"{name}.weight", outputs, inputs // group, kernel, kernel, scale=scale)
        pads = [kernel // 2] * 4
        # A depthwise convolution has no bias: the pointwise one after it has.
        b = [bias(f"{name}.bias", outputs)] if group == 1 else []
        return add("Conv", x, w, *b, group=group, pads=pads, kernel_shape=[kernel, kernel])

    x = add("Cast", contract.input_name, to=TensorProto.FLOAT)
    x = add("Reshape", x, constant("planes", np.array([-1, 1, 224, 224], np.int64)))
    x = add("Relu", conv(x, "stem", 1, 32, 3, scale=1 / 255))
    for block in range(3):
        x = add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        if architecture == "dsc":
            x = conv(x, f"depthwise{block}", 32, 32, 3, group=32)
            x = conv(x, f"pointwise{block}", 32, 32, 1)
        else:
            x = conv(x, f"conv{block}", 32, 32, 3)
        x = add("Relu", x)
    x = add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = add("Reshape", x, constant("flat", np.array([-1, 32 * 14 * 14], np.int64)))
    x = add("MatMul", x, weight("dense.weight", 32 * 14 * 14, 64, scale=0.1))
    x = add("Relu", add("Add", x, bias("dense.bias", 64)))
    x = add("MatMul", x, weight("logits.weight", 64, len(LABELS)))
    x = add("Add", x, bias("logits.bias", len(LABELS)))
    nodes.append(helper.make_node("Softmax", [x], [contract.output_name], name="softmax", axis=1))
    graph = helper.make_graph(
        nodes,
        architecture,
        [helper.make_tensor_value_info(contract.input_name, TensorProto.UINT8, ["N", 224, 224, 1])],
        [helper.make_tensor_value_info(contract.output_name, TensorProto.FLOAT, ["N", len(LABELS)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, contract.to_metadata())
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def deployed_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``{"dsc": path, "cnn": path}``: ONNX files of the deployed form. Read only; copy before you change one."""
    folder = tmp_path_factory.mktemp("deployed")
    paths = {}
    for architecture in ("dsc", "cnn"):
        paths[architecture] = folder / f"{architecture}.onnx"
        onnx.save(deployed_graph(architecture), paths[architecture])
    return paths


TEXTURES = {"clear": 70, "diffuse": 50, "focal": 30}


def write_texture(path: Path, seed: int) -> None:
    """Smooth seeded noise, 64x64 pixels, with a few values that stand out."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (8, 8), dtype=np.uint8)
    pixels = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_LINEAR)
    pixels[rng.integers(0, 64), rng.integers(0, 64)] = 255
    cv2.imwrite(str(path), pixels)


@pytest.fixture(scope="session")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 150 different images in three unequal classes. Read only; copy before you change it."""
    root = tmp_path_factory.mktemp("textures")
    seed = 0
    for label, count in TEXTURES.items():
        (root / label).mkdir()
        for index in range(count):
            write_texture(root / label / f"{index:03}.png", seed)
            seed += 1
    return root
