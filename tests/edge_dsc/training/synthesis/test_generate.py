"""A synthesis of phantoms: what is written, going on after a stop, what is refused, and training with the images."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Callable
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
from edge_dsc.training.run_folder import load_state, load_training_record
from edge_dsc.training.synthesis import generate
from edge_dsc.training.synthesis.began import Began, BeganPair, convergence, draw_latent
from edge_dsc.training.synthesis.generate import (
    STATE_FILE,
    Synthesis,
    SynthesisOptions,
    choose_began,
    count_halvings,
    format_synthesis,
    make_images,
    paint,
    synthesize,
)
from edge_dsc.training.synthesis.worth import Neighbours
from edge_dsc.training.train import read_images
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UnstableError, UsageError
from engines.files import sha256_file

TINY = Began(size=32, filters=2, latent=3, batch=4, steps=2)
EPOCHS = 3


def options_for(data: Path, out: Path, **changes: Any) -> SynthesisOptions:
    options = SynthesisOptions(data=data, label="focal", out=out, count=6, began=TINY, epochs=EPOCHS, seed=3)
    return replace(options, **changes)


@pytest.fixture(scope="module")
def made(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Synthesis:
    """Three epochs of the smallest networks, to the end. Read only."""
    return synthesize(options_for(phantom_folder, tmp_path_factory.mktemp("made") / "out"))


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
    assert [cost.architecture for cost in record.costs] == ["depthwise-began", "began"]


@pytest.mark.slow
def test_the_written_generator_makes_the_written_images(made: Synthesis) -> None:
    generator = load_keras().models.load_model(made.out / "generator.keras", compile=False)
    image = made.record.images[2]
    latent = np.repeat(draw_latent([2, 3, image.draw], 1, TINY), 50, axis=0)
    pixels = cv2.imread(str(made.out / image.path), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(paint(generator, latent)[0], pixels)


@pytest.mark.slow
def test_after_ctrl_c_it_goes_on_to_the_same_weights(
    made: Synthesis, phantom_folder: Path, tmp_path: Path
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


@pytest.fixture
def without_learning(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that move nothing and are counted, so that nothing is compiled; losses fall from step to step."""
    steps: list[int] = []

    def step(self: BeganPair, real: np.ndarray, latent: np.ndarray, balance: float) -> tuple[float, float]:
        steps.append(len(real))
        return 1 / len(steps), 0.25

    monkeypatch.setattr(BeganPair, "step", step)
    return steps


def test_ctrl_c_in_the_first_epoch_leaves_nothing(
    phantom_folder: Path, tmp_path: Path, without_learning: list[int]
) -> None:
    def press(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(options_for(phantom_folder, tmp_path / "out"), progress=press)
    assert not list((tmp_path / "out").iterdir())


def test_a_limit_of_time_ends_it_after_a_whole_epoch_and_keeps_the_state(
    phantom_folder: Path, tmp_path: Path, without_learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    done = synthesize(options_for(phantom_folder, tmp_path / "out", seconds=45.0, epochs=50))
    # After the second epoch 30 s are gone, and the third would end at 45 s.
    assert (done.record.ended, len(done.record.history["real"])) == ("seconds", 3)
    assert load_state(tmp_path / "out" / STATE_FILE).epoch == 3


def test_losses_that_are_no_numbers_end_it_and_keep_the_best(
    phantom_folder: Path, tmp_path: Path, without_learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(phantom_folder, tmp_path / "out")
    good = BeganPair.step

    def step(self: BeganPair, *arguments: Any) -> tuple[float, float]:
        return good(self, *arguments) if len(without_learning) < TINY.steps else (float("nan"), 0.25)

    monkeypatch.setattr(BeganPair, "step", step)
    with pytest.raises(UnstableError, match=r"the losses are \(nan, 0.25\) in epoch 2, step 1") as caught:
        synthesize(options)
    assert caught.value.remedy == (
        "--resume --epochs 1 writes the images of epoch 1; or begin anew with another --seed"
    )
    kept = synthesize(replace(options, resume=True, epochs=1))
    assert (kept.record.best_epoch, len(kept.record.images)) == (1, 6)


def test_the_balance_of_an_epoch_is_where_the_next_one_begins(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def step(self: BeganPair, real: np.ndarray, latent: np.ndarray, balance: float) -> tuple[float, float]:
        assert real.shape == (4, 32, 32, 1) and -1 <= real.min() < real.max() <= 1
        seen.append(balance)
        return 1.0, 0.25

    monkeypatch.setattr(BeganPair, "step", step)
    done = synthesize(options_for(phantom_folder, tmp_path / "out", epochs=2))
    assert seen == pytest.approx([0, 0.00025, 0.0005, 0.00075])  # 0.001 (0.5 * 1 - 0.25) each time
    assert done.record.history["balance"] == pytest.approx([0.0005, 0.001])


def test_the_learning_rate_is_halved_where_m_stands_still() -> None:
    falling = [1 / step for step in range(1, 40)]
    assert count_halvings([]) == count_halvings(falling) == 0
    assert count_halvings([1.0] * 10) == 0
    assert count_halvings([1.0] * 11) == 1  # ten epochs after the lowest
    assert count_halvings([1.0] * 21) == 2
    assert count_halvings([1.0] * 10 + [0.5] + [0.6] * 9) == 0
    assert count_halvings([1.0] * 11 + [0.5] + [0.6] * 10) == 2


def test_it_ends_where_m_has_converged(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BeganPair, "step", lambda *_: (1.0, 0.25))
    done = synthesize(options_for(phantom_folder, tmp_path / "out", epochs=100))
    rates = done.record.history["learning_rate"]
    assert (done.record.ended, len(rates)) == ("converged", 41)
    assert rates == pytest.approx([4e-4] * 11 + [2e-4] * 10 + [1e-4] * 10 + [5e-5] * 10)


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


@pytest.mark.slow
def test_a_finished_folder_is_only_replaced_where_that_is_asked(
    phantom_folder: Path, copied: Path, without_learning: list[int]
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


def test_an_unfinished_folder_goes_on_with_the_options_it_was_begun_with(
    phantom_folder: Path, tmp_path: Path, without_learning: list[int]
) -> None:
    options = options_for(phantom_folder, tmp_path / "out")

    def press(phase: str, done: int, total: int) -> None:
        if done > TINY.steps:
            raise KeyboardInterrupt

    synthesize(options, progress=press)
    with pytest.raises(UsageError, match=r"holds an unfinished synthesis .go on with --resume, replace it"):
        synthesize(options)
    with pytest.raises(UsageError, match="was begun with other options") as caught:
        synthesize(replace(options, resume=True, label="clear"))
    assert "--class focal --arch depthwise-began --size 32 --seed 3" in caught.value.remedy
    with pytest.raises(ArtefactError, match="or their split, changed since"):
        synthesize(replace(options, resume=True, fold=(1, 2)))
    state = tmp_path / "out" / STATE_FILE
    whole = state.read_bytes()
    state.write_bytes(whole[:-50])
    with pytest.raises(ArtefactError, match=r"is damaged: .* .begin anew with --overwrite"):
        synthesize(replace(options, resume=True))
    state.write_bytes(whole)
    with np.load(state) as stored:
        arrays = dict(stored)
    arrays["variables1"] = arrays["variables1"][..., :1]
    np.savez(state, **arrays)
    with pytest.raises(ArtefactError, match="does not fit these networks"):
        synthesize(replace(options, resume=True))


def test_a_full_disk_is_said_and_leaves_no_record(
    phantom_folder: Path, tmp_path: Path, without_learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: Path, data: bytes, kind: str | None = None) -> None:
        from engines.files import output_problem

        raise output_problem(target, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(generate, "write_bytes", full)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*000000.png: No space left on device"):
        synthesize(options_for(phantom_folder, tmp_path / "out"))
    assert not (tmp_path / "out" / "synthesis.json").exists()
    assert load_state(tmp_path / "out" / STATE_FILE).epoch == EPOCHS  # --resume writes the images later


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
        (("synthesize", tmp_path, "--class", "x", "--count", 0), "not in the range"),
        (("synthesize", tmp_path, "--class", "x", "--size", 100), "no generator makes images of 100 pixels"),
        (("synthesize", tmp_path, "--class", "x", "--seconds", "nan"), "not a finite number"),
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
