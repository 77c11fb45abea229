"""The trainings of a study as processes: each on its own processors, heard while it works, gone on with after a stop.

python -m edge_dsc.study.run_study FOLDER TRAINING PROCESSORS all|epoch

is what each of them runs: it trains, exports, calibrates, builds, answers the images of its split, and writes one JSON
object a line to standard output. It ends with the study that started it, however that ends.
"""

from __future__ import annotations

import collections
import functools
import heapq
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from edge_dsc import IMPORTED_FROM
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.engine import BuiltEngine, build_everywhere, open_to_answer
from edge_dsc.build.export import export_run
from edge_dsc.data.purposes import PARTS_FOR, Purpose
from edge_dsc.data.split import PARTS, SPLIT_FILE, load_split
from edge_dsc.infer.classify import classify_files
from edge_dsc.study.trainings import (
    ANSWERS,
    ANSWERS_FILE,
    REFERENCE,
    AnsweredImage,
    Answers,
    BuiltFile,
    Setting,
    Study,
    Training,
    hold_folder,
    load_study,
    usable_cores,
)
from edge_dsc.training import TrainProgress, train
from engines.errors import ArtefactError, BadInputError, EdgeDscError, EnvironmentProblem
from engines.graph import count_multiply_adds
from engines.images import usable_processors
from engines.record import BatchRange
from engines.runtimes import Progress, Runner
from engines.text_table import Table

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_SPOKEN_S = 0.5  # between two words of a training's process
_LISTEN_S = 1.0  # until the board is shown again though nothing was heard
_PATIENCE_S = 20.0  # until a process that was told to end is killed
_ALL, _EPOCH = "all", "epoch"
_BATCH = BatchRange(1, 8, 32)
_TAB = "\t"  # what follows it changes while a phase lasts


class Problem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a training failed.

    Attributes:
        exit_code: As its process ended, or would have.
        what: What happened.
        remedy: What to do.
    """

    exit_code: int
    what: str
    remedy: str

    @classmethod
    def of(cls, error: EdgeDscError) -> Problem:
        """Return an error as a process says it."""
        return cls(exit_code=error.exit_code, what=error.what, remedy=error.remedy)

    def error(self, what: str = "") -> EdgeDscError:
        """Return the error again, in the class of its exit code."""
        kinds = {kind.exit_code: kind for kind in EdgeDscError.__subclasses__()}
        return kinds.get(self.exit_code, EdgeDscError)(what or self.what, remedy=self.remedy)


class Word(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a training's process says in one line.

    Attributes:
        phase: What it does.
        epoch: Epoch at work, counted from 1, and one more than the last once all are done; 0 leaves it as it was.
        accuracy: On the training images of this epoch so far.
        validation: Accuracy on the validation images after the last whole epoch.
        epoch_seconds: What one epoch takes, validation and all.
        problem: Why it ends.
    """

    phase: str = ""
    epoch: int = 0
    accuracy: float | None = None
    validation: float | None = None
    epoch_seconds: float | None = None
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one training stands.

    Attributes:
        training: Which.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        epochs: In all.
        done: Whole epochs done.
        phase: What it does.
        accuracy: On training images.
        validation: On validation images.
        epoch_seconds: What one epoch takes, once it is known.
        problem: Why it failed.
    """

    training: Training
    state: str
    epochs: int
    done: int = 0
    phase: str = ""
    accuracy: float | None = None
    validation: float | None = None
    epoch_seconds: float | None = None
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class Board:
    """Where all trainings of a study stand.

    Attributes:
        standings: In the study's order.
        jobs: Trainings at a time.
    """

    standings: tuple[Standing, ...]
    jobs: int

    def count(self, state: str) -> int:
        """Return how many trainings are in a state."""
        return sum(one.state == state for one in self.standings)

    @property
    def seconds_left(self) -> float | None:
        """Time of the epochs that are left, shared by the jobs; None before any network's pace is known.

        A network of which nothing is known yet is taken to be as quick as the others are on average.
        """
        paces: dict[Setting, float] = {}
        for one in self.standings:
            if one.epoch_seconds is not None:
                paces[one.training.setting] = one.epoch_seconds
        if not paces:
            return None
        usual = sum(paces.values()) / len(paces)
        left = [
            (one.epochs - one.done) * paces.get(one.training.setting, usual)
            for one in sorted(self.standings, key=lambda one: one.state != RUNNING)
            if one.state in (RUNNING, WAITING)
        ]
        return share_out(left, self.jobs)


def share_out(seconds: Sequence[float], jobs: int) -> float:
    """Return how long pieces of work take where each goes, in order, to the job that is free first."""
    busy = [0.0] * jobs
    for piece in seconds:
        heapq.heappush(busy, heapq.heappop(busy) + piece)
    return max(busy)


Watch: TypeAlias = Callable[[Board], None]
Command: TypeAlias = Callable[[Study, Training, Sequence[int], str], list[str]]


@dataclass(frozen=True, kw_only=True)
class PlannedTraining:
    """A training in a plan.

    Attributes:
        training: Which.
        done: Whole epochs done.
        epochs: In all.
        epoch_seconds: What one takes, timed; None where none is left.
    """

    training: Training
    done: int
    epochs: int
    epoch_seconds: float | None

    @property
    def seconds(self) -> float:
        """Time of the epochs that are left."""
        return (self.epochs - self.done) * (self.epoch_seconds or 0.0)


def training_command(study: Study, training: Training, cores: Sequence[int], scope: str) -> list[str]:
    """Return the command line of a training's process."""
    processors = ",".join(map(str, cores))
    module = [sys.executable, "-m", "edge_dsc.study.run_study"]
    return [*module, str(study.folder), training.folder, processors, scope]


def run_trainings(
    study: Study, *, jobs: int, watch: Watch, command: Command = training_command
) -> dict[Training, Problem]:
    """Take every training of a study to its end; those that are done already stay as they are.

    Args:
        study: The study, held by this process.
        jobs: Trainings at a time.
        watch: Called whenever one of them says something, and every second.
        command: What a training's process runs.

    Returns:
        The trainings that failed, and why; the others went on.

    Raises:
        EnvironmentProblem: One of them could not go on here, and so none could: such as a full disk.
        KeyboardInterrupt: Ctrl-C; whole epochs are kept.
    """
    pool = _Pool(study, jobs=jobs, watch=watch, command=command)
    pool.run([one.training for one in pool.board.standings if one.state == WAITING], _ALL)
    return {one.training: one.problem for one in pool.board.standings if one.problem is not None}


def plan_study(
    study: Study, *, jobs: int, watch: Watch, command: Command = training_command
) -> tuple[PlannedTraining, ...]:
    """Say what a study would run and how long its epochs take: one epoch of each network is trained, timed and kept.

    Raises:
        EdgeDscError: That epoch failed.
        KeyboardInterrupt: Ctrl-C.
    """
    pool = _Pool(study, jobs=jobs, watch=watch, command=command)
    chosen: dict[Setting, Training] = {}
    for one in pool.board.standings:
        if one.state == WAITING and one.done < one.epochs:
            chosen.setdefault(one.training.setting, one.training)
    pool.run(list(chosen.values()), _EPOCH)
    paces = {}
    for one in pool.board.standings:
        if one.problem is not None:
            raise one.problem.error(f"{one.training.title}: {one.problem.what}")
        if one.epoch_seconds is not None:
            paces[one.training.setting] = one.epoch_seconds
    return tuple(
        PlannedTraining(
            training=one.training,
            done=one.epochs if one.state == DONE else study.epochs_done(one.training),
            epochs=one.epochs,
            epoch_seconds=paces.get(one.training.setting),
        )
        for one in pool.board.standings
    )


def plan_table(planned: Sequence[PlannedTraining], jobs: int) -> Table:
    """Return a plan as a table: what is left of each training, and how long all of it takes."""
    rows = [
        (
            one.training.title,
            f"{one.done}/{one.epochs}",
            "" if one.epoch_seconds is None else f"{one.epoch_seconds:.1f}",
            f"{one.seconds / 60:.1f}",
        )
        for one in planned
    ]
    left = [one.seconds for one in planned]
    minutes = share_out(left, jobs) / 60
    return Table(
        title=f"{sum(one > 0 for one in left)} of {len(planned)} trainings are left: about {minutes:.0f} minutes",
        header=("training", "epochs done", "s an epoch", "minutes left"),
        rows=tuple(rows),
        notes=(
            f"one epoch of each network was timed and is kept; {jobs} at a time",
            "reading the images, export, calibration, engines, answers and latency come on top",
        ),
    )


@dataclass(eq=False)
class _Child:
    """A training's process and the processors that it has."""

    process: subprocess.Popen[bytes]
    cores: list[int]
    last_words: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=5))
    listeners: list[threading.Thread] = field(default_factory=list)


class _Pool:
    """Trainings at work, a few at a time."""

    def __init__(self, study: Study, *, jobs: int, watch: Watch, command: Command) -> None:
        self._study, self._watch, self._command = study, watch, command
        self._standings = {training: _first_look(study, training) for training in study.trainings}
        self._children: dict[Training, _Child] = {}
        self._words: queue.Queue[tuple[Training, Word | None]] = queue.Queue()
        self._jobs = jobs

    @property
    def board(self) -> Board:
        return Board(standings=tuple(self._standings.values()), jobs=self._jobs)

    def run(self, trainings: Sequence[Training], scope: str) -> None:
        """Run some trainings to their end, or for one epoch; none is at work when this ends, however it does."""
        waiting = collections.deque(trainings)
        free = share_cores(usable_cores(), self._jobs)
        try:
            while waiting or self._children:
                while waiting and free:
                    training = waiting.popleft()
                    self._children[training] = self._start(training, free.pop(0), scope)
                    self._change(training, state=RUNNING, phase="starting")
                    self._watch(self.board)
                try:
                    training, word = self._words.get(timeout=_LISTEN_S)
                except queue.Empty:
                    self._watch(self.board)
                    continue
                if word is None:
                    free.append(self._close(training, scope))
                else:
                    self._hear(training, word)
                self._watch(self.board)
        finally:
            self._stop()

    def _start(self, training: Training, cores: list[int], scope: str) -> _Child:
        process = subprocess.Popen(
            self._command(self._study, training, cores, scope),
            cwd=IMPORTED_FROM,
            stdin=subprocess.PIPE,  # its end says that this process has ended
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C on a terminal is for this process alone: it ends the others in order
        )
        child = _Child(process, cores)
        for listen, stream in ((self._listen, process.stdout), (self._listen_for_errors, process.stderr)):
            thread = threading.Thread(target=listen, args=(training, child, stream), daemon=True)
            thread.start()
            child.listeners.append(thread)
        return child

    def _listen(self, training: Training, child: _Child, stream: IO[bytes]) -> None:
        for line in stream:
            try:
                self._words.put((training, msgspec.json.decode(line, type=Word)))
            except msgspec.DecodeError:
                child.last_words.append(line.decode(errors="replace").strip())
        self._words.put((training, None))

    def _listen_for_errors(self, training: Training, child: _Child, stream: IO[bytes]) -> None:
        for line in stream:
            child.last_words.append(line.decode(errors="replace").strip())

    def _hear(self, training: Training, word: Word) -> None:
        changes: dict[str, object] = {"phase": word.phase or self._standings[training].phase}
        for name in ("accuracy", "validation", "epoch_seconds", "problem"):
            value = getattr(word, name)
            if value is not None:
                changes[name] = value
        if word.epoch:
            changes["done"] = word.epoch - 1
        self._change(training, **changes)

    def _close(self, training: Training, scope: str) -> list[int]:
        """Take note of a process that ended, and return its processors.

        Raises:
            EnvironmentProblem: It could not go on on this machine, and so no other could.
        """
        child = self._children[training]
        code = child.process.wait()
        for thread in child.listeners[1:]:
            thread.join()
        del self._children[training]
        _close_streams(child.process)
        standing = self._standings[training]
        if code == 0:
            done = standing.epochs if scope == _ALL else self._study.epochs_done(training)
            state = DONE if scope == _ALL else WAITING
            self._change(training, state=state, phase="", done=done)
            return child.cores
        problem = standing.problem or _unsaid(code, child.last_words)
        self._change(training, state=FAILED, phase="", problem=problem)
        if standing.problem is not None and problem.exit_code == EnvironmentProblem.exit_code:
            self._watch(self.board)
            raise EnvironmentProblem(
                f"{training.title}: {problem.what}",
                remedy=f"{problem.remedy}; whole epochs are kept, the same command goes on",
            )
        return child.cores

    def _change(self, training: Training, **changes: object) -> None:
        self._standings[training] = replace(self._standings[training], **changes)  # type: ignore[arg-type]

    def _stop(self) -> None:
        """End every process that is still at work: whole epochs are on the disk."""
        for child in self._children.values():
            child.process.terminate()
        until = time.monotonic() + _PATIENCE_S
        for child in self._children.values():
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            for thread in child.listeners:
                thread.join()
            _close_streams(child.process)
        self._children.clear()


def share_cores(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """Deal processors to jobs, neighbours together, as evenly as they go."""
    size, more = divmod(len(cores), jobs)
    shares, start = [], 0
    for job in range(jobs):
        end = start + size + (job < more)
        shares.append(list(cores[start:end]))
        start = end
    return shares


def _first_look(study: Study, training: Training) -> Standing:
    """Say where a training stands by its folder; a damaged one is for its own process to report."""
    epochs = study.train_options(training).resolve_recipe().epochs
    if study.answers(training) is not None:
        return Standing(training=training, state=DONE, epochs=epochs, done=epochs)
    try:
        done = study.epochs_done(training)
    except ArtefactError:
        done = 0
    return Standing(training=training, state=WAITING, epochs=epochs, done=done)


def _unsaid(code: int, last_words: Sequence[str]) -> Problem:
    """Return why a process ended that did not say so itself."""
    if code < 0:
        what = f"its process was killed by signal {-code}"
        return Problem(
            exit_code=EnvironmentProblem.exit_code,
            what=what,
            remedy="the same command goes on; with fewer --jobs it needs less memory",
        )
    said = next((line for line in reversed(last_words) if line), f"its process ended with {code}")
    return Problem(exit_code=EdgeDscError.exit_code, what=said, remedy="the same command tries it again")


def _close_streams(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


class _Voice:
    """Writes a process's words to the study that started it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = float("-inf")

    def say(self, word: Word) -> None:
        self._stream.write(msgspec.json.encode(word) + b"\n")
        self._stream.flush()
        self._last = time.monotonic()

    def mention(self, word: Word) -> None:
        """Say it unless something was just said."""
        if time.monotonic() - self._last >= _SPOKEN_S:
            self.say(word)

    def progress(self, phase: str, done: int, total: int) -> None:
        tell = self.say if done >= total else self.mention
        tell(Word(phase=f"{phase.split(_TAB)[0]} {done}/{total}"))


class _EpochDone(Exception):
    """One epoch was timed."""


def finish_training(study: Study, training: Training, voice: _Voice, *, one_epoch: bool = False) -> None:
    """Take a training from wherever it stands to its answers, in this process.

    Args:
        study: The study.
        training: Which.
        voice: Where its progress goes.
        one_epoch: Train one epoch more, time it, and stop.

    Raises:
        EdgeDscError: As the steps do.
    """
    with hold_folder(study.run_folder(training), wait=True):
        if study.trained(training) is None:
            pace = _Pace(voice, stop=one_epoch)
            try:
                train(study.train_options(training), progress=pace.hear, reading=voice.progress)
            except _EpochDone:
                return
            pace.end()
        if not one_epoch:
            _answer(study, training, voice)


class _Pace:
    """Says where training stands, and what an epoch takes: from its first step to the first step of the next."""

    def __init__(self, voice: _Voice, *, stop: bool) -> None:
        self._voice, self._stop = voice, stop
        self._starts: list[float] = []
        self._known: float | None = None

    def hear(self, state: TrainProgress) -> None:
        word = Word(
            phase="training",
            epoch=state.epoch,
            accuracy=state.accuracy,
            validation=state.validation_accuracy,
        )
        if state.step > 1:
            self._voice.mention(word)
            return
        self._starts.append(time.monotonic())
        if len(self._starts) > 1:
            self._known = self._starts[-1] - self._starts[-2]
        self._voice.say(msgspec.structs.replace(word, epoch_seconds=self._known))
        if self._known is not None and self._stop:
            raise _EpochDone

    def end(self) -> None:
        """Say what the only epoch took, where there was no second one to tell its end."""
        if self._known is None and self._starts:
            self._voice.say(Word(phase="training", epoch_seconds=time.monotonic() - self._starts[0]))


def _answer(study: Study, training: Training, voice: _Voice) -> None:
    """Export, calibrate, build everywhere, and keep what every engine answers."""
    run = study.run_folder(training)
    record = study.trained(training)
    assert record is not None, "the training went to its end"
    voice.say(Word(phase="exporting", epoch=len(record.history["loss"]) + 1))
    model = export_run(run, data=study.data).model
    notes, made = [], None
    voice.say(Word(phase="calibrating"))
    try:
        request = CalibrationRequest(model=model.path, data=study.data, seed=training.seed)
        made = run_calibration(request, voice.progress)
    except BadInputError as error:
        notes.append(f"INT8 left out of {training.title}: {error.what}")
    voice.say(Word(phase="building"))
    built, more = build_everywhere(model.path, made.path if made else None, _BATCH)
    table = made.table if made else None
    runners = {_file_of(one): functools.partial(open_to_answer, one, model, table) for one in built}
    found = Answers(
        labels=record.labels,
        model_sha256=record.model_sha256,
        onnx_bytes=model.path.stat().st_size,
        multiply_adds=count_multiply_adds(model.proto),
        engines=tuple(runners),
        images=_ask(study, training, runners, voice.progress),
        notes=(*notes, *more),
    )
    ANSWERS.save(run / ANSWERS_FILE, found)


def _file_of(built: BuiltEngine) -> BuiltFile:
    record = built.record
    return BuiltFile(
        file=built.path.name,
        runtime=record.runtime,
        precision=record.precision.value,
        engine_bytes=record.engine_bytes,
        engine_sha256=record.engine_sha256,
        answered_by="engine" if built.runs_here else "graph",
    )


def _ask(
    study: Study,
    training: Training,
    runners: Mapping[BuiltFile, Callable[[], Runner]],
    progress: Progress,
) -> tuple[AnsweredImage, ...]:
    """Let every engine answer the images that judge, and the reference those of all parts."""
    split = load_split(study.run_folder(training) / SPLIT_FILE)
    answers: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    for file, opener in runners.items():
        parts = PARTS if file.name == REFERENCE else PARTS_FOR[Purpose.JUDGE]
        asked = [(part, sample) for part in parts for sample in split.samples(part)]
        paths = [study.data / sample.path for _, sample in asked]
        with opener() as runner:
            given = classify_files(paths, runner, threads=usable_processors())
            for done, ((part, sample), answer) in enumerate(zip(asked, given, strict=True), start=1):
                progress(f"asking {file.name}", done, len(asked))
                if answer.probabilities is not None:
                    rounded = tuple(round(float(value), 7) for value in answer.probabilities)
                    answers.setdefault((part, sample.path), {})[file.name] = rounded
    return tuple(
        AnsweredImage(
            path=sample.path,
            patient=sample.patient,
            label=sample.label,
            part=part,
            probabilities=answers[part, sample.path],
        )
        for part in PARTS
        for sample in split.samples(part)
        if (part, sample.path) in answers
    )


def main(arguments: Sequence[str]) -> int:
    """Run one training of a study in this process; see the top of this module.

    Returns:
        The exit code.
    """
    folder, name, cores, scope = arguments
    voice = _Voice(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever else is printed is no word to the study
    end_with_parent()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    try:
        study = load_study(Path(folder))
        training = next(one for one in study.trainings if one.folder == name)
        finish_training(study, training, voice, one_epoch=scope == _EPOCH)
    except EdgeDscError as error:
        problem = Problem.of(error)
    except (OSError, MemoryError) as error:
        problem = Problem(
            exit_code=EnvironmentProblem.exit_code,
            what=f"this machine refuses: {' '.join(str(error).split()) or 'not enough memory'}",
            remedy="free some space or memory",
        )
    else:
        return 0
    if problem.exit_code == ArtefactError.exit_code:
        remedy = f"remove {Path(folder) / name}, and the same command trains it again"
        problem = msgspec.structs.replace(problem, remedy=remedy)
    voice.say(Word(problem=problem))
    return problem.exit_code


def end_with_parent() -> None:
    """End this process, as any is ended, when the one that started it is gone: its end of standard input closes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
