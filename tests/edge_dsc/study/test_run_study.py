"""Trainings as processes: heard, dealt processors, ended in order, and gone on without where one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_study import leave_answers

from edge_dsc.study.run_study import (
    Board,
    PlannedTraining,
    Problem,
    Standing,
    plan_study,
    plan_table,
    run_trainings,
    share_cores,
    share_out,
    training_command,
)
from edge_dsc.study.trainings import Setting, Study, StudyOptions, Training, open_study
from edge_dsc.training.run_folder import RECORD_FILE, STATE_FILE, TrainState, save_state
from engines.errors import EnvironmentProblem, UnstableError
from engines.text_table import render_text

ROOT = Path(__file__).resolve().parents[3]
DIVERGED = {
    "problem": {"exit_code": 7, "what": "training diverged: the loss is nan", "remedy": "another seed"}
}
FULL = {"problem": {"exit_code": 3, "what": "cannot write state.npz: No space left", "remedy": "free some"}}


def ignore(board: Board) -> None:
    pass


def test_every_training_is_heard_to_its_end(study: Study, speaking: Any) -> None:
    boards: list[Board] = []
    command = speaking(
        {"phase": "reading images 3/9"},
        {"phase": "training", "epoch": 2, "accuracy": 0.5, "validation": 0.4, "epoch_seconds": 3.0},
    )
    assert run_trainings(study, jobs=1, watch=boards.append, command=command) == {}
    seen = [board.standings[0] for board in boards]
    assert {one.state for one in seen} == {"running", "done"}
    assert "reading images 3/9" in {one.phase for one in seen}
    at_work = next(one for one in seen if one.phase == "training")
    assert (at_work.done, at_work.epochs, at_work.accuracy, at_work.validation) == (1, 50, 0.5, 0.4)
    assert boards[-1].count("done") == 8
    assert all(board.count("running") <= 1 for board in boards)


def test_what_is_done_is_left_alone(study: Study, speaking: Any) -> None:
    for training in study.trainings[:-1]:
        leave_answers(study, training, [])
    boards: list[Board] = []
    run_trainings(study, jobs=2, watch=boards.append, command=speaking())
    assert boards[0].count("done") == 7
    assert {one.training.title for board in boards for one in board.standings if one.state == "running"} == {
        "dsc aug., seed 1"
    }


def test_one_that_diverges_leaves_the_others_alone(study: Study, speaking: Any) -> None:
    end = f"print({json.dumps(DIVERGED)!r}, flush=True); sys.exit(7)"
    boards: list[Board] = []
    problems = run_trainings(
        study, jobs=2, watch=boards.append, command=speaking(only={"dsc-plain-seed0": end})
    )
    assert {one.title: problem.exit_code for one, problem in problems.items()} == {"dsc, seed 0": 7}
    assert (boards[-1].count("done"), boards[-1].count("failed")) == (7, 1)
    error = next(iter(problems.values())).error()
    assert isinstance(error, UnstableError) and "the loss is nan" in str(error)


@pytest.mark.parametrize(
    ("code", "exit_code", "what"),
    [
        ("import os; os.kill(os.getpid(), 9)", 3, "its process was killed by signal 9"),
        ("raise ValueError('what nobody foresaw')", 1, "ValueError: what nobody foresaw"),
        ("sys.exit(5)", 1, "its process ended with 5"),
        ("print('no JSON'); sys.exit(1)", 1, "no JSON"),
    ],
)
def test_a_process_that_just_ends(study: Study, speaking: Any, code: str, exit_code: int, what: str) -> None:
    problems = run_trainings(study, jobs=1, watch=ignore, command=speaking(only={"cnn-plain-seed0": code}))
    assert [(one.title, found.exit_code, found.what) for one, found in problems.items()] == [
        ("cnn, seed 0", exit_code, what)
    ]


def test_a_full_disk_ends_all_of_them(study: Study, speaking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dsc.study.run_study.usable_cores", lambda: [0, 1])
    end = f"print({json.dumps(FULL)!r}, flush=True); sys.exit(3)"
    forever = "sys.stdin.read()"  # until its standard input closes
    boards: list[Board] = []
    command = speaking(code=forever, only={"cnn-plain-seed0": end})
    with pytest.raises(EnvironmentProblem, match=r"^cnn, seed 0: cannot write state.npz") as refused:
        run_trainings(study, jobs=2, watch=boards.append, command=command)
    assert refused.value.remedy == "free some; whole epochs are kept, the same command goes on"
    assert (boards[-1].count("running"), boards[-1].count("waiting")) == (1, 6)
    assert not children()


def test_ctrl_c_ends_the_processes(study: Study, speaking: Any) -> None:
    def interrupt(board: Board) -> None:
        if board.standings[0].phase == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trainings(
            study, jobs=1, watch=interrupt, command=speaking({"phase": "training"}, code="sys.stdin.read()")
        )
    assert not children()


def children() -> str:
    """Name the processes that this one has started and that are still there."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.slow
def test_a_killed_study_takes_its_trainings_with_it(options: StudyOptions, tmp_path: Path) -> None:
    with open_study(options):
        pass
    child = (
        "import os, sys; from edge_dsc.study.run_study import end_with_parent; end_with_parent()\n"
        "print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True)\n"
        "import time\nwhile True: time.sleep(60)"
    )
    parent = (
        "import sys; from pathlib import Path\n"
        "from edge_dsc.study.run_study import run_trainings; from edge_dsc.study.trainings import load_study\n"
        f"command = lambda *_: [sys.executable, '-c', {child!r}, sys.argv[2]]\n"
        "run_trainings(load_study(Path(sys.argv[1])), jobs=1, watch=lambda board: None, command=command)"
    )
    told = tmp_path / "pid"
    os.mkfifo(told)
    with subprocess.Popen([sys.executable, "-c", parent, options.out, told], cwd=ROOT) as process:
        pid = int(told.read_text())
        # Readable once the process is gone, whoever its parent is by then.
        handle = os.pidfd_open(pid)
        process.send_signal(signal.SIGKILL)
    import select

    ended, _, _ = select.select([handle], [], [], 30)
    os.close(handle)
    assert ended, "the training outlived its study"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "exit_code", "what", "remedy"),
    [
        ("data", 9, "does not exist", "one folder a class"),
        ("record", 4, "is not valid JSON", "dsc-plain-seed0, and the same command trains it again"),
        ("state", 4, "state.npz is", "dsc-plain-seed0, and the same command trains it again"),
    ],
)
def test_what_a_real_process_says_of_its_end(
    options: StudyOptions, tmp_path: Path, spoil: str, exit_code: int, what: str, remedy: str
) -> None:
    with open_study(options) as study:
        pass
    training = study.trainings[1]
    run = study.run_folder(training)
    run.mkdir()
    if spoil == "data":
        import msgspec

        plan = msgspec.structs.replace(study.plan, data=str(tmp_path / "gone"))
        from edge_dsc.study.trainings import STUDY, STUDY_FILE

        STUDY.save(study.folder / STUDY_FILE, plan)
    elif spoil == "record":
        (run / RECORD_FILE).write_text("half a rec")
    else:
        save_state(TrainState(file=run / STATE_FILE, epoch=1))
        (run / STATE_FILE).write_bytes((run / STATE_FILE).read_bytes()[:-30])
    command = training_command(study, training, [0], "all")
    # Its standard input stays open, as the study keeps it while it lives.
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        words = process.stdout.read().splitlines()
        assert process.wait() == exit_code
    problem = json.loads(words[-1])["problem"]
    assert problem["exit_code"] == exit_code
    assert what in problem["what"] and remedy in problem["remedy"]


def test_processors_are_dealt_to_neighbours() -> None:
    assert share_cores([0, 1, 2, 3, 4], 2) == [[0, 1, 2], [3, 4]]
    assert share_cores([3, 7], 2) == [[3], [7]]
    assert share_cores([0, 1], 1) == [[0, 1]]


def test_no_two_trainings_share_a_processor(
    study: Study, speaking: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_dsc.study.run_study.usable_cores", lambda: [0, 1, 2])
    at_work: dict[str, tuple[int, ...]] = {}
    plain = speaking()

    def command(study: Study, training: Training, cores: Any, scope: str) -> list[str]:
        at_work[training.title] = tuple(cores)
        return list(plain(study, training, cores, scope))

    def watch(board: Board) -> None:
        held = [
            core for one in board.standings if one.state == "running" for core in at_work[one.training.title]
        ]
        assert len(held) == len(set(held))

    run_trainings(study, jobs=2, watch=watch, command=command)
    assert set(at_work.values()) == {(0, 1), (2,)}


def test_work_goes_to_the_job_that_is_free_first() -> None:
    assert share_out([3, 1, 1, 1, 2], 1) == 8
    assert share_out([3, 1, 1, 1, 2], 2) == 5
    assert share_out([], 2) == 0


def standing(network: str, state: str, done: int, seconds: float | None = None, seed: int = 0) -> Standing:
    return Standing(
        training=Training(Setting(network, False), seed=seed),
        state=state,
        epochs=10,
        done=done,
        epoch_seconds=seconds,
    )


def test_the_time_left_counts_the_epochs_of_all() -> None:
    assert Board(standings=(standing("cnn", "running", 0),), jobs=1).seconds_left is None
    known = (
        standing("cnn", "done", 10, 5.0),
        standing("dsc", "running", 4, 2.0),
        standing("cnn", "waiting", 0, seed=1),
        standing("dsc", "failed", 3, seed=1),
    )
    assert Board(standings=known, jobs=1).seconds_left == 6 * 2 + 10 * 5
    assert Board(standings=known, jobs=2).seconds_left == 50
    # Nothing is known of a third network: as quick as the others on average.
    unknown = (*known, standing("vgg19", "waiting", 0))
    assert Board(standings=unknown, jobs=1).seconds_left == 62 + 10 * 3.5


def test_a_plan_times_one_epoch_of_each_network(options: StudyOptions, speaking: Any) -> None:
    scopes: list[tuple[str, str]] = []
    plain = speaking({"phase": "training", "epoch": 1, "epoch_seconds": 6.0})
    with open_study(options) as study:
        leave_answers(study, study.trainings[0], [])

        def command(study: Study, training: Training, cores: Any, scope: str) -> list[str]:
            scopes.append((training.title, scope))
            state = study.run_folder(training) / STATE_FILE
            save_state(TrainState(file=state, epoch=1, history={"loss": [1.0]}))
            return list(plain(study, training, cores, scope))

        planned = plan_study(study, jobs=1, watch=ignore, command=command)
    # Of cnn the first seed is done: the second is timed.
    assert scopes == [
        (title, "epoch") for title in ("dsc, seed 0", "cnn aug., seed 0", "dsc aug., seed 0", "cnn, seed 1")
    ]
    assert [(one.done, one.seconds) for one in planned] == [
        (50, 0), (1, 294), (1, 294), (1, 294), (1, 294), (0, 300), (0, 300), (0, 300),
    ]  # fmt: skip


def test_a_plan_whose_epoch_diverges_says_so(study: Study, speaking: Any) -> None:
    end = f"print({json.dumps(DIVERGED)!r}, flush=True); sys.exit(7)"
    with pytest.raises(UnstableError, match="cnn, seed 0: training diverged"):
        plan_study(study, jobs=1, watch=ignore, command=speaking(only={"cnn-plain-seed0": end}))


def test_a_plan_as_a_table() -> None:
    planned = [
        PlannedTraining(training=Training(Setting(name, True)), done=done, epochs=50, epoch_seconds=seconds)
        for name, done, seconds in (("cnn", 1, 12.0), ("dsc", 50, None))
    ]
    text = render_text(plan_table(planned, 2))
    assert text.splitlines()[:5] == [
        "1 of 2 trainings are left: about 10 minutes",
        "",
        "training          epochs done  s an epoch  minutes left",
        "----------------  -----------  ----------  ------------",
        "cnn aug., seed 0         1/50        12.0           9.8",
    ]


def test_a_problem_keeps_its_class() -> None:
    error = EnvironmentProblem("what", remedy="how")
    again = Problem.of(error).error()
    assert (type(again), again.what, again.remedy) == (EnvironmentProblem, "what", "how")
    assert Problem(exit_code=99, what="w", remedy="r").error("other").what == "other"
