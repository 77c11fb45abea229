"""A whole study at the smallest size: real trainings in processes of their own, real engines, a real measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from bench.plan import choose_plan
from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.study.findings import LATENCY_FILE, REPORT, REPORT_FILE, conclude
from edge_dsc.study.run_study import Board, plan_study, run_trainings, training_command
from edge_dsc.study.trainings import Study, StudyOptions, Training, open_study
from edge_dsc.training.run_folder import STATE_FILE


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """Nothing here learns: two epochs in large batches of one network, the quicker one."""
    folder = tmp_path_factory.mktemp("whole")
    write_phantoms(folder / "phantoms", 24, seed=0)
    options = StudyOptions(
        data=folder / "phantoms",
        out=folder / "study",
        networks=("dsc",),
        augmentation=(True,),
        seeds=1,
        epochs=2,
    )
    with open_study(options) as found:
        yield found


def ignore(phase: str, done: int, total: int) -> None:
    pass


def command(study: Study, training: Training, cores: Sequence[int], scope: str) -> list[str]:
    """A training's process on few and small images, as this one."""
    code = (
        "import sys, calibration.select, calibration.table, edge_dsc.networks.architecture as networks\n"
        "calibration.select.MINIMUM_IMAGES = calibration.table.MINIMUM_IMAGES = 24\n"
        "import edge_dsc.networks.paper\n"
        "edge_dsc.networks.paper.INPUT_SIDE = networks.INPUT_SIDE = 64\n"
        "networks.build_network.__defaults__ = (64,)\n"
        "from edge_dsc.study.run_study import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    python, _, _, *arguments = training_command(study, training, cores, scope)
    return [python, "-c", code, *arguments]


@pytest.mark.slow
@pytest.mark.usefixtures("few_calibrate", "small_networks")
def test_from_a_plan_over_an_interrupted_run_to_the_report(study: Study) -> None:
    (training,) = study.trainings
    state = study.run_folder(training) / STATE_FILE
    (planned,) = plan_study(study, jobs=1, watch=lambda board: None, command=command)
    assert (planned.done, planned.epochs) == (1, 2)
    assert 0 < (planned.epoch_seconds or 0) < 600
    assert state.is_file()

    boards: list[Board] = []
    assert run_trainings(study, jobs=1, watch=boards.append, command=command) == {}
    assert boards[0].standings[0].done == 1  # the timed epoch was kept
    assert (boards[-1].count("done"), state.exists()) == (1, False)

    result = conclude(study, {}, bench=choose_plan(seconds=0.2, warmup_seconds=0), progress=ignore)
    assert result.problem is None
    (found,) = REPORT.load(study.folder / REPORT_FILE).networks
    assert (found.parameters["feature_extractor"], found.multiply_adds) == (4_640, 2_975_936)
    assert found.quality.rows == sum(map(sum, found.confusion["testing"]))
    assert found.engines[0].accuracy == found.quality.accuracy
    measured = {one.precision: one.answered_by for one in found.engines if one.median_ms is not None}
    assert measured == {"fp32": "engine", "int8": "engine"}
    assert {one.answered_by for one in found.engines if one.median_ms is None} <= {"graph"}

    # The same command again: nothing is trained, and the measurement is the one that was made.
    kept = (study.folder / LATENCY_FILE).read_bytes()
    assert run_trainings(study, jobs=1, watch=boards.append) == {}
    assert conclude(study, {}, bench=choose_plan("quick"), progress=ignore).report.networks == (found,)
    assert (study.folder / LATENCY_FILE).read_bytes() == kept
