"""A synthesis of phantoms: what is written, going on after a stop, what is refused, and training with the images."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.data import PARTS, load_split
from edge_dsc.data.synthetic import is_synthetic, load_synthesis
from edge_dsc.networks import load_keras
from edge_dsc.training import TrainOptions, train
from edge_dsc.training.run_folder import TrainState, load_state, load_training_record, save_state
from edge_dsc.training.synthesis import generate
from edge_dsc.training.synthesis.began import Began, convergence, draw_latent
from edge_dsc.training.synthesis.generate import (
    STATE_FILE,
    Synthesis,
    SynthesisOptions,
    choose_began,
    count_halvings,
    format_synthesis,
    learn,
    make_images,
    paint,
    synthesize,
)
from edge_dsc.training.synthesis.worth import Neighbours
from edge_dsc.training.train import read_images
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UnstableError, UsageError
from engines.files import output_problem, sha256_file
from engines.packages import load

TINY = Began(architecture="began", size=32, filters=2, latent=3, batch=4, steps=1)
EPOCHS = 2


def options_for(data: Path, out: Path, **changes: Any) -> SynthesisOptions:
    options = SynthesisOptions(data=data, label="focal", out=out, count=6, began=TINY, epochs=EPOCHS, seed=3)
    return replace(options, **changes)


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """To compile a step takes longer than all the steps here; test_began has a compiled one."""
    load_keras()
    tensorflow = load("tensorflow")
    tensorflow.config.run_functions_eagerly(True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Even though the `tf.config.experimental_run_functions_eagerly`"
        )
        yield
    tensorflow.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def made(
    _nothing_compiled: None, phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Synthesis:
    """Two epochs of the smallest networks, to the end. Read only."""
    return synthesize(options_for(phantom_folder, tmp_path_factory.mktemp("made") / "out"))


@pytest.fixture
def nothing_to_measure(made: Synthesis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are those of the finished folder, and not measured again."""
    monkeypatch.setattr(generate, "measure_worth", lambda *_, **__: made.record.worth)
    monkeypatch.setattr(generate, "count_costs", lambda _: made.record.costs[0])
    monkeypatch.setattr(generate, "draw_contact_sheet", lambda *_, **__: None)


@pytest.fixture
def copied(made: Synthesis, tmp_path: Path) -> Path:
    """A copy of the finished folder that a test may change."""
    return Path(shutil.copytree(made.out, tmp_path / "copied"))


@pytest.mark.slow
def test_a_folder_holds_marked_images_and_their_record(made: Synthesis, phantom_folder: Path) -> None:
    record = load_synthesis(made.out)
    assert record == made.record
    named = {image.path for image in record.images}
    assert named == {path.relative_to(made.out).as_posix() for path in made.out.glob("images/focal/*.png")}
    assert len(named) == record.asked == 6
    for image in record.images:
        file = made.out / image.path
        assert sha256_file(file) == image.sha256 and is_synthetic(file)
        assert f"seed 3; draw {image.draw}; generator {record.generator_sha256}".encode() in file.read_bytes()
    files = {path.name for path in made.out.iterdir()}
    assert files == {
        "images",
        "generator.keras",
        "synthesis.json",
        "contact.png",
    }  # the state is not needed any more
    assert sha256_file(made.out / "generator.keras") == record.generator_sha256

    split = read_images(TrainOptions(data=phantom_folder, out=made.out, seed=3), 32, None).split
    train_part = [sample for sample in split.samples("train") if sample.label == "focal"]
    assert record.split_sha256 == split.sha256
    assert record.seen == tuple(sample.sha256 for sample in train_part)
    assert {image.nearest_sha256 for image in record.images} <= set(record.seen)

    history = record.history
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(
        ("real", "fake", "balance", "convergence", "learning_rate"), EPOCHS
    )
    assert history["convergence"] == [
        convergence(real, fake, TINY) for real, fake in zip(history["real"], history["fake"], strict=True)
    ]
    assert record.best_epoch == 1 + int(np.argmin(history["convergence"]))
    assert record.ended == "epochs"
    assert [note.partition(": ")[0] for note in made.notes] == ["skipped clear/damaged.png"]
    assert [cost.architecture for cost in record.costs] == ["began", "depthwise-began"]


@pytest.mark.slow
def test_the_written_generator_makes_the_written_images(made: Synthesis) -> None:
    generator = load_keras().models.load_model(made.out / "generator.keras", compile=False)
    image = made.record.images[2]
    latent = np.repeat(draw_latent([2, 3, image.draw], 1, TINY), 50, axis=0)
    pixels = cv2.imread(str(made.out / image.path), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(paint(generator, latent)[0], pixels)


@pytest.mark.slow
def test_after_ctrl_c_it_goes_on_to_the_same_weights(
    made: Synthesis, phantom_folder: Path, tmp_path: Path, nothing_to_measure: None
) -> None:
    """Ctrl-C in the second epoch writes images of the first; then the rest is learnt as if nothing had happened."""
    options = options_for(phantom_folder, tmp_path / "out")

    def press(phase: str, done: int, total: int) -> None:
        assert (phase.partition("\t")[0], total) == ("learning focal", EPOCHS * TINY.steps)
        if done == TINY.steps + 1:
            raise KeyboardInterrupt

    stopped = synthesize(options, progress=press)
    assert (stopped.record.ended, stopped.record.best_epoch) == ("interrupted", 1)
    assert len(stopped.record.history["real"]) == 1 and len(stopped.record.images) == 6
    state = load_state(tmp_path / "out" / STATE_FILE)
    assert state.epoch == 1
    before = {image.path for image in stopped.record.images}

    finished = synthesize(replace(options, resume=True))
    assert finished.record.history == made.record.history
    assert not (tmp_path / "out" / STATE_FILE).exists()
    ours, theirs = (
        load_keras().models.load_model(folder / "generator.keras", compile=False).get_weights()
        for folder in (tmp_path / "out", made.out)
    )
    assert all(map(np.array_equal, ours, theirs))
    for ours, theirs in zip(finished.record.images, made.record.images, strict=True):
        one, other = (
            cv2.imread(str(folder / image.path))
            for folder, image in ((finished.out, ours), (made.out, theirs))
        )
        assert np.array_equal(one, other)
    after = {path.relative_to(finished.out).as_posix() for path in finished.out.glob("images/focal/*")}
    assert after == {image.path for image in finished.record.images}, before


REAL = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)


class Scripted:
    """A pair of networks without weights: each step gives the next losses, and the balances are kept."""

    def __init__(self, losses: Iterable[tuple[float, float]]) -> None:
        self.losses, self.balances = iter(losses), []
        self.began = replace(TINY, steps=2)
        self.variables = self.optimizer_variables = ()
        self.average = SimpleNamespace(
            get_weights=lambda: [np.array(len(self.balances))], set_weights=lambda weights: None
        )

    def step(self, real: np.ndarray, latent: np.ndarray, balance: float) -> tuple[float, float]:
        assert real.shape == (4, 32, 32, 1) and -1 <= real.min() < -0.5 < 0.5 < real.max() <= 1
        assert latent.shape == (4, 3)
        self.balances.append(balance)
        return next(self.losses)

    def set_learning_rate(self, rate: float) -> None:
        self.learning_rate = rate


def learn_from(
    losses: Iterable[tuple[float, float]], out: Path, **changes: Any
) -> tuple[str, TrainState, Scripted]:
    state, pair = TrainState(file=out / STATE_FILE), Scripted(losses)
    progress = changes.pop("progress", None)
    options = options_for(Path("data"), out, began=pair.began, **{"epochs": 3, **changes})
    ended = learn(pair, REAL, state, options, progress)
    return ended, state, pair


def test_the_balance_of_an_epoch_is_where_the_next_one_begins(tmp_path: Path) -> None:
    ended, state, pair = learn_from([(1.0, 0.25)] * 4, tmp_path, epochs=2)
    assert ended == "epochs"
    assert pair.balances == pytest.approx([0, 0.00025, 0.0005, 0.00075])  # 0.001 (0.5 * 1 - 0.25) each time
    assert state.history["balance"] == pytest.approx([0.0005, 0.001])
    again = Scripted([(1.0, 0.25)] * 2)
    learn(again, REAL, load_state(tmp_path / STATE_FILE), options_for(Path("data"), tmp_path, epochs=3))
    assert again.balances == pytest.approx([0.001, 0.00125])


def test_the_epoch_with_the_lowest_m_is_kept(tmp_path: Path) -> None:
    losses = [(2.0, 1.0)] * 2 + [(1.0, 0.25), (1.0, 0.75)] + [(1.0, 0.25)] * 2
    _, state, _ = learn_from(losses, tmp_path)
    # M of the means of an epoch's losses: 2, 1 and 1.25.
    assert state.history["convergence"] == [2.0, 1.0, 1.25]
    assert (state.best_epoch, state.best_weights) == (2, [4])


def test_ctrl_c_in_the_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    def press(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_from([(1.0, 0.5)], tmp_path, progress=press)
    assert not list(tmp_path.iterdir())


def test_a_limit_of_time_ends_it_after_a_whole_epoch_and_keeps_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    # Looked at after 10, 20 and 30 s: with one epoch done a second would end at 40, with two a third at 45.
    ended, _, _ = learn_from([(1.0, 0.5)] * 99, tmp_path, seconds=44.0, epochs=50)
    assert ended == "seconds"
    assert load_state(tmp_path / STATE_FILE).epoch == 2


def test_losses_that_are_no_numbers_end_it_and_keep_the_best(tmp_path: Path) -> None:
    with pytest.raises(UnstableError, match=r"the losses are \(nan, 0.25\) in epoch 2, step 1") as caught:
        learn_from([(1.0, 0.25)] * 2 + [(float("nan"), 0.25)], tmp_path)
    assert caught.value.remedy == (
        "--resume --epochs 1 writes the images of epoch 1; or begin anew with another --seed"
    )
    kept = load_state(tmp_path / STATE_FILE)
    assert (kept.epoch, kept.best_epoch) == (1, 1)
    with pytest.raises(UnstableError, match="epoch 1, step 2") as caught:
        learn_from([(1.0, 0.25), (1.0, float("inf"))], tmp_path)
    assert caught.value.remedy == "begin anew with another --seed"


def test_it_ends_where_m_has_converged(tmp_path: Path) -> None:
    ended, state, _ = learn_from([(1.0, 0.25)] * 200, tmp_path, epochs=100)
    rates = state.history["learning_rate"]
    assert (ended, len(rates)) == ("converged", 41)
    assert rates == pytest.approx([4e-4] * 11 + [2e-4] * 10 + [1e-4] * 10 + [5e-5] * 10)


def test_the_learning_rate_is_halved_where_m_stands_still() -> None:
    falling = [1 / step for step in range(1, 40)]
    assert count_halvings([]) == count_halvings(falling) == 0
    assert count_halvings([1.0] * 10) == 0
    assert count_halvings([1.0] * 11) == 1  # ten epochs after the lowest
    assert count_halvings([1.0] * 21) == 2
    assert count_halvings([1.0] * 10 + [0.5] + [0.6] * 9) == 0
    assert count_halvings([1.0] * 11 + [0.5] + [0.6] * 10) == 2


class Copying:
    """A generator that gives a training image for every second input, else one that is none."""

    def __init__(self, real: np.ndarray, every: int = 2) -> None:
        self.real, self.every = real, every

    def predict_on_batch(self, latent: np.ndarray) -> np.ndarray:
        images = np.zeros((len(latent), 32, 32), np.float32)
        images[:: self.every] = self.real[0] / 127.5 - 1
        return images[..., None]


def test_near_copies_are_counted_and_dropped() -> None:
    real = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    options = options_for(Path("data"), Path("out"))
    found = make_images(Copying(real), Neighbours.of(real), options)
    assert (found.draws, found.copies) == ([1, 3, 5, 7, 9, 11], 6)
    assert found.pixels.shape == (6, 32, 32) and found.pixels.max() == 128
    with pytest.raises(UnstableError, match="200 of 200 images are near copies of training images") as caught:
        make_images(Copying(real, every=1), Neighbours.of(real), options)
    assert "fewer --epochs" in caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"label": "covid19"}, UsageError, "has no class 'covid19' .choose one of clear, diffuse, focal"),
        ({"began": replace(TINY, batch=16)}, BadInputError, r"\d+ images of 'focal' .* needs 16 at least"),
        ({"count": 0}, UsageError, "0 images .ask for at least 2"),
        ({"epochs": 0}, UsageError, "no time to learn in"),
        ({"seconds": -1.0}, UsageError, "no time to learn in"),
        ({"resume": True}, UsageError, "out holds no synthesis, there is nothing to resume"),
        ({"resume": True, "overwrite": True}, UsageError, "--resume and --overwrite exclude each other"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    phantom_folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        synthesize(options_for(phantom_folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_images_are_never_written_among_real_ones(phantom_folder: Path) -> None:
    with pytest.raises(UsageError, match="is in the data folder"):
        synthesize(options_for(phantom_folder, phantom_folder / "focal" / "more"))


@pytest.mark.parametrize(
    ("architecture", "size", "words"),
    [("gan", 64, "generator 'gan'"), ("began", 100, "images of 100 pixels")],
)
def test_networks_that_there_are_not(architecture: str, size: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_began(architecture, size)


@pytest.fixture
def nothing_to_learn(made: Synthesis, nothing_to_measure: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning ends at once with what the finished folder has."""
    weights = load_keras().models.load_model(made.out / "generator.keras", compile=False).get_weights()

    def learnt(pair: object, real: object, state: TrainState, *_: object) -> str:
        state.history = {name: list(values) for name, values in made.record.history.items()}
        state.epoch = state.best_epoch = 1
        state.best_weights = weights
        save_state(state)
        return "interrupted"

    monkeypatch.setattr(generate, "learn", learnt)


@pytest.mark.slow
def test_a_finished_folder_is_only_replaced_where_that_is_asked(
    phantom_folder: Path, copied: Path, nothing_to_learn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(phantom_folder, copied)
    with pytest.raises(UsageError, match=r"holds a finished synthesis .replace it with --overwrite"):
        synthesize(options)
    with pytest.raises(UsageError, match="holds a finished synthesis, there is nothing to resume"):
        synthesize(replace(options, resume=True))
    (copied / "images" / "focal" / "holiday.png").write_bytes(b"mine")
    replaced = synthesize(replace(options, overwrite=True, count=3, label="clear"))
    left = {path.relative_to(copied / "images").as_posix() for path in copied.glob("images/*/*")}
    assert left == {"focal/holiday.png", *(f"clear/{image.path[-10:]}" for image in replaced.record.images)}

    def full(target: Path, data: bytes, kind: str | None = None) -> None:
        raise output_problem(target, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(generate, "write_bytes", full)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*\d{6}.png: No space left on device"):
        synthesize(replace(options, overwrite=True))
    assert not (copied / "synthesis.json").exists()  # half a folder is none
    assert load_state(copied / STATE_FILE).epoch == 1  # and --resume writes the images later


@pytest.mark.slow
def test_an_unfinished_folder_goes_on_with_the_options_it_was_begun_with(
    phantom_folder: Path, tmp_path: Path, nothing_to_learn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(phantom_folder, tmp_path / "out")
    synthesize(options)
    with pytest.raises(UsageError, match=r"holds an unfinished synthesis .go on with --resume, replace it"):
        synthesize(options)
    with pytest.raises(UsageError, match="was begun with other options") as caught:
        synthesize(replace(options, resume=True, label="clear"))
    assert "--class focal --arch began --size 32 --seed 3" in caught.value.remedy
    with pytest.raises(ArtefactError, match="or their split, changed since"):
        synthesize(replace(options, resume=True, fold=(1, 2)))
    state = tmp_path / "out" / STATE_FILE
    monkeypatch.setattr(generate, "learn", learn)
    with pytest.raises(ArtefactError, match="does not fit these networks"):  # it has no variables
        synthesize(replace(options, resume=True))
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(ArtefactError, match=r"is damaged: .* .begin anew with --overwrite"):
        synthesize(replace(options, resume=True))


@pytest.mark.slow
def test_a_network_trains_with_the_images(
    made: Synthesis, phantom_folder: Path, tmp_path: Path, small_networks: None
) -> None:
    options = TrainOptions(
        data=phantom_folder, out=tmp_path / "run", epochs=1, seed=3, synthetic=made.out, synthetic_share=0.2
    )
    done = train(options)
    mixed = load_training_record(tmp_path / "run").synthetic
    assert mixed is not None and mixed == done.record.synthetic
    real = sum(sample.label == "focal" for sample in done.split.samples("train"))
    assert (mixed.label, mixed.images, mixed.share, mixed.mixed) == ("focal", 6, 0.2, round(real / 4))
    assert (mixed.folder, mixed.synthesis_sha256) == ("out", sha256_file(made.out / "synthesis.json"))
    # None of them is in the split, so none validates or judges.
    kept = load_split(tmp_path / "run" / "split.json")
    known = {sample.sha256 for part in PARTS for sample in kept.samples(part)}
    assert not known & {image.sha256 for image in made.record.images}
    with pytest.raises(UsageError, match="was trained with synthetic images"):
        train(TrainOptions(data=phantom_folder, out=tmp_path / "again", refit=tmp_path / "run"))


@pytest.mark.slow
def test_another_split_that_holds_back_what_the_generator_saw_is_refused(
    made: Synthesis, phantom_folder: Path, tmp_path: Path, small_networks: None
) -> None:
    options = TrainOptions(data=phantom_folder, out=tmp_path / "run", epochs=1, seed=4, synthetic=made.out)
    with pytest.raises(BadInputError, match=r"out learnt from \d+ images that this run holds back"):
        train(options)
    assert not (tmp_path / "run" / "training.json").exists()


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, "a share of 0 "), (1.0, "a share of 1 "), (float("nan"), "a share of nan ")]
)
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float, words: str) -> None:
    options = TrainOptions(data=tmp_path, out=tmp_path / "run", synthetic=tmp_path, synthetic_share=share)
    with pytest.raises(UsageError, match=words):
        options.resolve_recipe()


@pytest.mark.slow
def test_the_command_prints_what_the_images_are_worth(
    made: Synthesis, edge_dsc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def known(options: SynthesisOptions, **callbacks: Any) -> Synthesis:
        asked.append(options)
        return replace(made, notes=("2 were not made",))

    monkeypatch.setattr(generate, "synthesize", known)
    words = ("data", "--class", "focal", "--arch", "began", "--size", 128, "--count", 9, "--fold", "1/3")
    done = edge_dsc("synthesize", *words)
    assert (done.code, done.out) == (0, f"{made.out}: {format_synthesis(made.record)}\n")
    assert done.err == f"2 were not made\nnext: edge-dsc train DATA --synthetic {made.out} --seed 3\n"
    assert asked[0] == SynthesisOptions(
        data=Path("data"),
        label="focal",
        out=Path("runs/synthetic-focal"),
        count=9,
        began=Began(architecture="began", size=128),
        fold=(1, 3),
    )
    assert "6 synthetic images of focal, learnt from" in done.out
    assert "no Frechet distance, precision and recall: --features RUN" in done.out
    found = edge_dsc("synthesize", *words, "--json").json
    assert (found["kind"], found["images"], found["worth"]["copies"]) == (
        "edge-dsc/synthesize-result", 6, made.record.worth.copies
    )  # fmt: skip


def test_the_command_refuses_what_has_no_use(edge_dsc: Callable[..., Any], tmp_path: Path) -> None:
    for words, said in (
        (("synthesize", tmp_path, "--class", "x", "--count", 0), "greater than or equal to 2"),
        (("synthesize", tmp_path, "--class", "x", "--size", 100), "no generator makes images of 100 pixels"),
        (("synthesize", tmp_path, "--class", "x", "--seconds", "nan"), "Invalid value for '--seconds'"),
        (("synthesize", tmp_path), "Missing option '--class'"),
        (("train", tmp_path, "--synthetic-share", "0.2"), "--synthetic-share is of nothing"),
        (("train", tmp_path, "--qat", tmp_path, "--synthetic", tmp_path), "--qat takes"),
        (("train", tmp_path, "--refit", tmp_path, "--synthetic", tmp_path), "--refit takes"),
    ):
        done = edge_dsc(*words)
        assert (done.code, done.out) == (2, "") and said in done.err, (words, done)
    document = json.dumps({"kind": "edge-dsc/synthesis-record", "schema_version": 9})
    (tmp_path / "synthesis.json").write_text(document)
    done = edge_dsc("inspect", tmp_path / "synthesis.json")
    assert done.code == 4 and "schema version 9" in done.err
