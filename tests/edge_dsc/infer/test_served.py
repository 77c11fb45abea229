"""Addresses, and what is said where no server answers; a real server is asked in tests/edge_dsc/deploy."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from edge_dsc.infer.served import ServedModel, open_model, parse_server
from engines.errors import EnvironmentProblem, UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grpc://host:8001/dsc", ("host", 8001, "dsc")),
        ("grpc://10.0.0.7/dsc-int8.onnxruntime", ("10.0.0.7", 8001, "dsc-int8.onnxruntime")),
        ("grpc://[::1]:9/a", ("[::1]", 9, "a")),
    ],
)
def test_an_address_is_read(text: str, expected: tuple[str, int, str]) -> None:
    found = parse_server(text)
    assert (found.host, found.port, found.name) == expected
    assert parse_server(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/dsc", "grpc://host:8001", "grpc://host:8001/", "grpc://host:0/dsc", "grpc://host:65536/dsc",
        "grpc://host:8001/a/b", "grpc://user:pw@host/dsc", "grpc:///dsc", "grpc://host:8001/..", "dsc", "",
        "grpc://host\n:8001/dsc",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no address of a model"):
        parse_server(text)


@pytest.fixture
def nobody() -> ServedModel:
    """A port that nothing listens on."""
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        port = plug.getsockname()[1]
    return parse_server(f"grpc://127.0.0.1:{port}/dsc")


def test_no_server_is_one_line(nobody: ServedModel) -> None:
    with pytest.raises(
        EnvironmentProblem, match=rf"no server answers at grpc://127.0.0.1:{nobody.port}: "
    ) as none:
        open_model(nobody)
    assert none.value.remedy.startswith("start it: tritonserver --model-repository=")


def test_a_proxy_of_the_environment_is_not_asked(
    nobody: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(EnvironmentProblem, match=rf"127\.0\.0\.1:{nobody.port}: Failed to connect"):
        open_model(nobody)


def test_the_commands_say_so(edge_dsc: Any, nobody: ServedModel, textures: Path, tmp_path: Path) -> None:
    for words in (
        ("infer", textures, "--out", tmp_path / "a.csv"),
        ("bench", "--quick", "--out", tmp_path / "b.json"),
    ):
        done = edge_dsc(*words, "--server", nobody)
        assert (done.code, done.err.count("\n")) == (3, 1)
        assert done.err.startswith(f"error: no server answers at grpc://127.0.0.1:{nobody.port}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["infer", "x"], "infer takes an engine and a source"),
        (
            ["infer", "x", "--server", "grpc://a/b", "--slots", "2"],
            "grpc://a:8001/b runs on its server: --slots is for",
        ),
        (["bench"], "there is nothing to measure (name an engine, or a model with --server)"),
        (
            ["bench", "--server", "grpc://a/b", "--memory"],
            "--memory measures this machine, and grpc://a:8001/b runs on",
        ),
    ],
)
def test_what_does_not_fit_a_server_is_refused_before_it_is_asked(
    edge_dsc: Any, words: list[str], said: str
) -> None:
    done = edge_dsc(*words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
