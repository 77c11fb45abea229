"""Help, version, completion and errors of the command line itself; what is loaded for each, in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import typer.main

from edge_dsc import __version__
from edge_dsc.cli import COMMANDS
from edge_dsc.cli.app import CommandGroup, app, reported
from engines.errors import ArtefactError

GROUP = typer.main.get_command(app)
assert isinstance(GROUP, CommandGroup)
# Each command that does something, a part of a group by both names: "deploy triton".
LEAVES = {
    **{name: command for name, command in COMMANDS.items() if not command.parts},
    **{
        f"{name} {part}": found for name, command in COMMANDS.items() for part, found in command.parts.items()
    },
}
NOT_FOR_HELP = {"numpy", "cv2", "onnx", "onnxruntime", "tensorflow", "keras", "msgspec", "rich"}


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program and print, last of all to standard error, the modules that it has loaded."""
    code = """
import sys
try:
    from edge_dsc.cli import main
    main()
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def loaded(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(done.stderr.splitlines()[-1].split())


def test_help_lists_every_command_and_loads_none() -> None:
    done = child("--help")
    for name, command in COMMANDS.items():
        assert f"\n  {name.ljust(12)}  {command.summary}\n" in done.stdout
    assert "For research and engineering only: not a medical device." in done.stdout
    modules = loaded(done)
    assert not NOT_FOR_HELP & modules
    assert not {name for name in modules if name.startswith("edge_dsc.cli.")} - {
        "edge_dsc.cli.app",
        "edge_dsc.cli.console",
    }


@pytest.mark.parametrize(
    "arguments", [("--version",), ("infer", "--version"), ("bench", "a.engine", "--batch", "2", "--version")]
)
def test_version_stands_anywhere(edge_dsc: Any, arguments: tuple[str, ...]) -> None:
    done = edge_dsc(*arguments)
    assert (done.code, done.out, done.err) == (0, f"edge-dsc {__version__}\n", "")


def test_version_loads_nothing_heavy() -> None:
    assert not NOT_FOR_HELP & loaded(child("infer", "--version"))


def test_the_help_of_a_command_loads_its_module_and_no_other() -> None:
    modules = loaded(child("infer", "--help"))
    assert not NOT_FOR_HELP & modules
    folders = {command.function.partition(":")[0] for command in LEAVES.values()}
    assert {name for name in folders if f"edge_dsc.cli.{name}" in modules} == {"using"}


def test_a_group_lists_its_parts_and_loads_none() -> None:
    done = child("deploy", "--help")
    assert done.stdout.startswith("Usage: edge-dsc deploy [OPTIONS] COMMAND")
    for name, command in COMMANDS["deploy"].parts.items():
        assert f"\n  {name.ljust(10)}  {command.summary}" in done.stdout
    assert not (NOT_FOR_HELP | {"edge_dsc.cli.deploying"}) & loaded(done)


def test_a_group_alone_shows_its_help_and_a_wrong_part_is_one_line(edge_dsc: Any) -> None:
    done = edge_dsc("deploy")
    assert (done.code, done.err) == (2, "") and done.out == edge_dsc("deploy", "--help").out
    done = edge_dsc("deploy", "tritn")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "No such command 'tritn'. Did you mean 'triton'? (see edge-dsc deploy --help)" in done.err


def leaf(name: str) -> Any:
    """The command of one or two names, as the program loads it."""
    found: Any = GROUP
    for word in name.split():
        found = found.load_command(word)
    return found


@pytest.mark.parametrize("name", LEAVES)
def test_help_begins_with_the_summary_and_explains_every_option(edge_dsc: Any, name: str) -> None:
    done = edge_dsc(*name.split(), "-h")
    assert done.code == 0
    assert done.out.startswith(f"Usage: edge-dsc {name} ")
    assert done.out.split("\n\n")[1].split() == LEAVES[name].summary.split()
    command = leaf(name)
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name}"
    names = {parameter.name for parameter in command.params}
    assert {"json", "version"} <= names
    assert name in ("infer", "demo", "doctor", "inspect", "networks") or "out" in names


def test_without_a_command_the_help_is_shown_and_the_code_is_2(edge_dsc: Any) -> None:
    done = edge_dsc()
    assert (done.code, done.err) == (2, "")
    assert done.out == edge_dsc("--help").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "No such option: --bogus (see edge-dsc --help)"),
        (["trian"], "No such command 'trian'. Did you mean 'train'? (see edge-dsc --help)"),
        (["infer"], "Missing argument 'engine' (see edge-dsc infer --help)"),
        (["infer", "a", "b", "--bogus"], "No such option: --bogus"),
        (["infer", "a", "b", "--threads", "0"], "Invalid value for '--threads'"),
        (["train", "d", "--arch", "vgg"], "there is no network 'vgg' (choose one of dsc, cnn, "),
    ],
)
def test_a_usage_error_is_one_line(edge_dsc: Any, arguments: list[str], words: str) -> None:
    done = edge_dsc(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert words in done.err


RANGES = {
    "infer": "--threads 256 --limit 1000000000000 --give-up nan --slots 64 --device 255 --abstain nan",
    "evaluate": "--threads 256 --device 255 --abstain nan",
    "bench": "--threads 256 --batch 4096 --offline 16384 --iterations 10000000 --duration 604800 --warmup 604800 "
    "--fps 100000 --power 604800 --builds 1000 --openings 1000 --slots 64 --device 255 --seed 4294967295",
    "import-times": "--batch 4096",
    "calibrate": "--seed 4294967295 --calib-images 1000000 --device 255",
    "separate": "--seed 4294967295 --rank 1024 --epochs 10000",
    "study": "--seeds 1000 --folds 100 --epochs 10000 --jobs 256 --margin nan",
    "train": "--seed 4294967295 --epochs 10000 --size 1024 --unfreeze 10000 --mixup nan --cutmix nan --erasing nan "
    "--weight-decay nan --distillation nan --temperature nan --synthetic-share nan",
    "synthesize": "--seed 4294967295 --epochs 100000 --seconds 604800 --size 224 --count 1000000",
    "build-engine": "--seed 4294967295 --calib-images 1000000 --workspace 1048576 --max-drop 100 "
    "--optimization-level 5 --max-aux-streams 64 --dla 15 --device 255",
    "debug": "--seed 4294967295 --images 1000000 --device 255",
    "inspect": "--device 255",
    "demo": "--seed 4294967295",
    "selftest": "--seed 4294967295 --device 255",
    "deploy triton": "--instances 64 --queue-delay 1000000 --unsure nan",
    "deploy bundle": "--port 65535",
    "compare": "--margin nan --fail-if-slower inf",
}
NUMBERS = [
    (name, *pair)
    for name, text in RANGES.items()
    for pair in zip(text.split()[::2], text.split()[1::2], strict=True)
]


@pytest.mark.parametrize("batch", ["1:8:4097", "99999", "1_0", "\u0661", " 8", "8\n", "2:1", "0", "9" * 5000])
def test_a_batch_range_is_three_plain_numbers(edge_dsc: Any, batch: str) -> None:
    done = edge_dsc("build-engine", "m", "--batch", batch)
    assert (done.code, done.out) == (2, "")
    assert "is no batch range (write N or MIN:OPT:MAX" in done.err


@pytest.mark.parametrize(("name", "option", "largest"), NUMBERS)
def test_every_number_has_a_range(edge_dsc: Any, name: str, option: str, largest: str) -> None:
    beyond = [largest] if largest in ("nan", "inf") else ["-1", str(int(largest) + 1), "9" * 20]
    for value in beyond:
        done = edge_dsc(*name.split(), option, value)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert f"Invalid value for '{option}'" in done.err


def test_no_number_is_left_without_a_range() -> None:
    named = {(name, option) for name, option, _ in NUMBERS} | {("infer", "--serve")}
    for name, command in LEAVES.items():
        module, _, function = command.function.partition(":")
        found = getattr(importlib.import_module(f"edge_dsc.cli.{module}"), function)
        for hint in get_type_hints(found, include_extras=True).values():
            # Python 3.10 puts an Optional around the whole where the default is None.
            kind, *info = get_args(get_args(hint)[0] if get_origin(hint) is Union else hint) or (None,)
            if {kind, *get_args(kind)} & {int, float} and get_origin(kind) is not tuple:
                assert (name, info[0].default) in named  # where typer keeps the first name inside Annotated


def complete(words: str) -> list[str]:
    done = child(
        _EDGE_DSC_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)
    )
    assert not NOT_FOR_HELP & loaded(done)
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_choices() -> None:
    assert complete("edge-dsc in") == ["infer", "inspect"]
    assert complete("edge-dsc deploy t") == ["triton"]
    assert complete("edge-dsc deploy triton --tri") == ["--triton-backend"]
    assert complete("edge-dsc train --re") == ["--recipe", "--refit", "--resume"]
    assert complete("edge-dsc train --arch ")[:3] == ["dsc", "cnn", "resnet50v2"]
    assert complete("edge-dsc train --arch in") == ["inceptionv3", "inceptionresnetv2"]


def test_it_shows_the_script_for_the_shell(edge_dsc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    done = edge_dsc("--show-completion")
    assert done.code == 0
    assert "_EDGE_DSC_COMPLETE=complete_bash" in done.out


def test_python_m_runs_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_dsc", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"edge-dsc {__version__}\n"


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ArtefactError("it is stale", remedy="build it"), 4, "error: it is stale (build it)"),
        (KeyboardInterrupt(), 130, "interrupted: files are whole, the old one or the new one"),
        (
            ModuleNotFoundError("No module named 'tf2onnx'"),
            3,
            "error: cannot import tf2onnx: No module named",
        ),
        (
            ZeroDivisionError("a\nb"),
            1,
            "error: unexpected ZeroDivisionError: a b (EDGE_DSC_DEBUG=1 shows where)",
        ),
    ],
)
def test_every_way_to_fail_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stop:
        reported(fail)(error)
    assert stop.value.exit_code == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_details_come_before_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        reported(fail)(ArtefactError("what", remedy="do", details="layer  1\nlayer  2"))
    assert capsys.readouterr().err == "layer  1\nlayer  2\nerror: what (do)\n"


def test_the_traceback_is_shown_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_DSC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        reported(fail)(ZeroDivisionError())


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(deployed_models: dict[str, Path]) -> None:
    command = [
        sys.executable,
        "-c",
        "from edge_dsc.cli import main; main()",
        "inspect",
        deployed_models["dsc"],
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
