"""Commands that make things: train, separate, synthesize, export, adopt, calibrate, build-engine, debug."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from edge_dsc.cli import INTERRUPTED
from edge_dsc.cli.console import give, give_json, progress_bar, say
from edge_dsc.cli.options import (
    MAX_IMAGES,
    MAX_SEED,
    Device,
    Json,
    Out,
    Seed,
    finite,
    model_of,
    parse_fold,
    parse_numbers,
    parse_size,
)
from engines.errors import UsageError
from engines.text_table import printable

if TYPE_CHECKING:
    from edge_dsc.build.engine import BuiltEngine
    from edge_dsc.build.gate import GateOptions
    from edge_dsc.build.qat import QatOptions
    from edge_dsc.training import TrainOptions
    from edge_dsc.training.synthesis.generate import Synthesis
    from edge_dsc.training.twin import TwinOptions
    from engines.record import Precision


class Colour(str, enum.Enum):
    """What a network is fed with; the decode rules of engines.contract."""

    GREY = "grey"
    RGB = "rgb"


class Gives(str, enum.Enum):
    """What a foreign classifier gives; the names of edge_dsc.build.conform."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"


# Those of edge_dsc.networks.NAMES, for the shell to complete; any other network is a file or a function.
NETWORKS = (
    "dsc",
    "cnn",
    "resnet50v2",
    "inceptionv3",
    "inceptionresnetv2",
    "xception",
    "mobilenetv2",
    "vgg19",
    "densenet121",
)


def _complete_network(incomplete: str) -> list[str]:
    return [name for name in NETWORKS if name.startswith(incomplete)]


class RecipeName(str, enum.Enum):
    """The names of edge_dsc.training.RECIPES."""

    DEFAULT = "default"
    QUICK = "quick"
    PAPER = "paper"
    PAPER_TEXT = "paper-text"


class GeneratorName(str, enum.Enum):
    """The names of edge_dsc.training.synthesis.began.ARCHITECTURES."""

    DEPTHWISE_BEGAN = "depthwise-began"
    BEGAN = "began"


class CalibMethod(str, enum.Enum):
    """How ranges are chosen; the names of calibration.table.METHODS and TENSORRT_METHODS."""

    MSE = "mse"
    ENTROPY = "entropy"
    MINMAX = "minmax"
    PERCENTILE = "percentile"
    TENSORRT_ENTROPY = "tensorrt-entropy"
    TENSORRT_MINMAX = "tensorrt-minmax"


class Rounding(str, enum.Enum):
    """How the weights of the signed INT8 graph are rounded; the names of calibration.table.ROUNDINGS."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class PrecisionName(str, enum.Enum):
    """The values of engines.record.Precision."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    MIXED = "mixed"


class Backend(str, enum.Enum):
    """The runtimes' table and ``auto``."""

    AUTO = "auto"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class InputType(str, enum.Enum):
    """What an engine takes; the values of a contract's dtype."""

    UINT8 = "uint8"
    INT8 = "int8"
    FLOAT16 = "float16"


class DecoderName(str, enum.Enum):
    """The names of engines.contract.DECODERS."""

    OPENCV = "opencv"
    NVJPEG = "nvjpeg"


class Int8Backend(str, enum.Enum):
    """The runtimes that run INT8 graphs."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


DEFAULT_RUN = Path("runs/dsc")
Model = Annotated[Path, typer.Argument(help="A run folder that train wrote, or an ONNX model of export.")]
CalibData = Annotated[
    Optional[Path],
    typer.Option("--calib-data", help="Folder of real X-rays, DIR/class/file.", show_default=False),
]
CalibImages = Annotated[
    int, typer.Option("--calib-images", min=1, max=MAX_IMAGES, help="Images to draw, stratified by class.")
]
Data = Annotated[Path, typer.Argument(help="Folder of X-rays: DIR/class/file, or the Kaggle layout.")]
Fold = Annotated[
    Optional[str],
    typer.Option(
        "--fold",
        metavar="K/N",
        help="Hold out fold K of N, whole patients; over all K every image is held out once.",
        show_default=False,
    ),
]
KeepSplit = Annotated[
    bool,
    typer.Option("--keep-split", help="Keep the split of a folder with train|validation|evaluation|test."),
]
Kinds = Annotated[
    Optional[bool],
    typer.Option(
        "--kinds/--no-kinds",
        help="NORMAL and PNEUMONIA as normal, bacteria and virus, by file name; default: where the names say.",
        show_default=False,
    ),
]
Method = Annotated[
    CalibMethod,
    typer.Option("--calib-method", help="How the ranges are chosen; tensorrt-*: by TensorRT 8.6 to 10.x."),
]
Roundings = Annotated[
    Optional[Rounding],
    typer.Option(
        "--rounding",
        help="How TensorRT's INT8 weights are rounded; default: adaround with mse, for chains of layers.",
        show_default=False,
    ),
]
BiasCorrection = Annotated[
    Optional[bool],
    typer.Option(
        "--bias-correction/--no-bias-correction",
        help="Take the mean error of INT8 out of TensorRT's biases; default: with mse, for chains of layers.",
        show_default=False,
    ),
]


def train(
    data: Data,
    arch: Annotated[
        str,
        typer.Option(
            "--arch",
            metavar="NETWORK",
            autocompletion=_complete_network,
            help="A name that edge-dsc networks lists, FILE.keras, or a function: module:function, FILE.py:function.",
        ),
    ] = "dsc",
    size: Annotated[
        Optional[int],
        typer.Option(
            "--size",
            min=1,
            max=1024,
            help="Height and width of the images; default: 224, or what FILE.keras takes.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Optional[str],
        typer.Option(
            "--weights",
            metavar="none|imagenet|FILE",
            help="Where it starts; imagenet is Keras' own loader, which downloads. Default: none, or the file's own.",
            show_default=False,
        ),
    ] = None,
    unfreeze: Annotated[
        Optional[int],
        typer.Option(
            "--unfreeze",
            min=0,
            max=10_000,
            help="With weights: train the last N layers of the features too; default: the head alone.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[RecipeName, typer.Option("--recipe", help="How to train.")] = RecipeName.DEFAULT,
    epochs: Annotated[
        Optional[int],
        typer.Option("--epochs", min=1, max=10_000, help="Instead of the recipe's.", show_default=False),
    ] = None,
    augmentation: Annotated[
        bool, typer.Option(help="Change the images as the recipe says, or show them as they are.")
    ] = True,
    mixup: Annotated[
        Optional[float],
        typer.Option(
            "--mixup",
            min=0,
            callback=finite,
            metavar="ALPHA",
            help="Mix each image with another of its batch, by a share that Beta(ALPHA, ALPHA) draws; such as 0.2.",
            show_default=False,
        ),
    ] = None,
    cutmix: Annotated[
        Optional[float],
        typer.Option(
            "--cutmix",
            min=0,
            callback=finite,
            metavar="ALPHA",
            help="Paste a rectangle of another image instead, of a share drawn so; such as 1. With both, by a toss.",
            show_default=False,
        ),
    ] = None,
    erasing: Annotated[
        Optional[float],
        typer.Option(
            "--erasing",
            min=0,
            max=1,
            callback=finite,
            metavar="P",
            help="Put noise into a rectangle of so many of the images; such as 0.25.",
            show_default=False,
        ),
    ] = None,
    weight_decay: Annotated[
        Optional[float],
        typer.Option(
            "--weight-decay",
            min=0,
            callback=finite,
            metavar="W",
            help="Take W times the learning rate off every kernel in each step (AdamW); such as 0.01.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        Optional[str],
        typer.Option(
            "--teacher",
            metavar="RUN[,RUN...]",
            help="Follow the mean answer of these finished runs of the same split, too.",
            show_default=False,
        ),
    ] = None,
    distillation: Annotated[
        Optional[float],
        typer.Option(
            "--distillation",
            min=0,
            max=1,
            callback=finite,
            metavar="ALPHA",
            help="With --teacher: share of the loss that is theirs; the labels have the rest. Default: 0.5.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        Optional[float],
        typer.Option(
            "--temperature",
            min=1,
            max=100,
            callback=finite,
            metavar="T",
            help="With --teacher: soften both answers by it; default: 2.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    fold: Fold = None,
    keep_split: KeepSplit = False,
    kinds: Kinds = None,
    qat: Annotated[
        Optional[Path],
        typer.Option(
            "--qat",
            help="Fine-tune this finished run of the same images for INT8, 5 epochs; needs no calibration after.",
            show_default=False,
        ),
    ] = None,
    last: Annotated[
        bool,
        typer.Option(
            "--last", help="Keep the last epoch's weights: no epoch is chosen, validation images train."
        ),
    ] = False,
    refit: Annotated[
        Optional[Path],
        typer.Option(
            "--refit",
            metavar="RUN",
            help="For deployment: the recipe of this finished run on all of its images. None is left to judge by.",
            show_default=False,
        ),
    ] = None,
    synthetic: Annotated[
        Optional[Path],
        typer.Option(
            "--synthetic",
            metavar="DIR",
            help="Mix in the images that synthesize wrote there, of the same split.",
            show_default=False,
        ),
    ] = None,
    synthetic_share: Annotated[
        Optional[float],
        typer.Option(
            "--synthetic-share",
            min=0,
            max=1,
            callback=finite,
            help="Of the images of their class in every epoch; default: 0.3.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the run folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the run folder.")
    ] = False,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            help="The run folder; default: runs/ARCH, with --qat RUN-qat, with --refit RUN-refit.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The network is then measured on the images held back from training."""
    asked = {"mixup": mixup, "cutmix": cutmix, "erasing": erasing, "weight_decay": weight_decay}
    asked |= {"distillation": distillation, "temperature": temperature}
    added = {name: value for name, value in asked.items() if value is not None}
    ways = (size, unfreeze, fold, kinds, synthetic, None if refit else weights, *added)
    another_way = not augmentation or keep_split or last or any(value is not None for value in ways)
    if refit is not None and (another_way or qat or epochs or recipe is not RecipeName.DEFAULT):
        raise UsageError(
            "--refit takes the network, the recipe and the images of its run",
            remedy="leave out --size, --unfreeze, --recipe, --epochs, --no-augmentation, --fold, --keep-split, --kinds,"
            " --last, --qat, --synthetic, and what is added to a recipe but --teacher",
        )
    if qat is None:
        from edge_dsc.training.recipes import TrainOptions, add_ingredients

        options = TrainOptions(
            data=data,
            out=out or _default_run(arch, refit),
            architecture=arch,
            size=size,
            weights=weights,
            unfreeze=unfreeze,
            recipe=recipe.value,
            epochs=epochs,
            augmentation=augmentation,
            seed=seed,
            fold=parse_fold(fold),
            keep_split=keep_split,
            kinds=kinds,
            last=last,
            ingredients=add_ingredients(added, taught=teacher is not None and refit is None),
            teachers=tuple(map(Path, teacher.split(","))) if teacher else (),
            refit=refit,
            synthetic=synthetic,
            synthetic_share=_share_of(synthetic, synthetic_share),
            resume=resume,
            overwrite=overwrite,
        )
        _train(options, json=json)
        return
    from edge_dsc.build.qat import EPOCHS, QatOptions

    if resume:
        raise UsageError(
            "--resume has no use with --qat", remedy="a fine-tuning run takes minutes: start it again"
        )
    if another_way or teacher is not None:
        raise UsageError(
            "--qat takes the network, the images and the split of its run",
            remedy="leave out --size, --weights, --unfreeze, --no-augmentation, --fold, --keep-split, --kinds, --last,"
            " --synthetic, and what is added to a recipe",
        )
    fine_tuning = QatOptions(
        data=data,
        run=qat,
        out=out or qat.with_name(f"{qat.name}-qat"),
        epochs=epochs or EPOCHS,
        seed=seed,
        overwrite=overwrite,
    )
    _fine_tune(fine_tuning, json=json)


def _default_run(arch: str, refit: Path | None) -> Path:
    """Return the run folder where none is named."""
    from edge_dsc.networks import default_name

    return refit.with_name(f"{refit.name}-refit") if refit else Path("runs") / default_name(arch)


def _share_of(synthetic: Path | None, share: float | None) -> float:
    """Return the share of synthetic images that was asked for."""
    from edge_dsc.training import TrainOptions

    if share is None:
        return TrainOptions.synthetic_share
    if synthetic is None:
        raise UsageError("--synthetic-share is of nothing", remedy="add --synthetic DIR")
    return share


def _train(options: TrainOptions, *, json: bool) -> None:
    from edge_dsc.evaluate.evaluation import format_metrics
    from edge_dsc.training import train as run_training
    from edge_dsc.training.train import step_progress

    with progress_bar() as progress:
        result = run_training(
            options, progress=step_progress(options.architecture, progress), reading=progress, say=say
        )
    for path, reason in result.record.skipped:
        say(f"skipped {path}: {reason}")
    if result.record.skipped:
        say(f"{len(result.record.skipped)} images were left out")
    for note in result.notes:
        say(note)
    if (mixed := result.record.synthetic) is not None:
        say(f"every epoch mixed in {mixed.mixed} of {mixed.images} synthetic images of {mixed.label}")
    known = result.record.refit
    if json:
        body = {"run": str(result.run), "metrics": result.metrics, "refit": known}
        give_json("edge-dsc/train-result", body, schema_version=2)
    elif known is not None:
        give(f"{printable(result.run)}: trained on all images; none is left to judge this network by")
        give(
            f"accuracy of the recipe, as {printable(known.run)} had it on images that were held back from it:"
        )
        give(format_metrics(known.held_out))
    else:
        give(f"{printable(result.run)}: evaluation and test images together, none seen in training")
        give(format_metrics(result.metrics["held_out"]))
    if known is not None:
        say("note: an accuracy gate needs images from elsewhere: build-engine --validate DIR")
    if result.record.interrupted:
        kept = "weights" if result.record.recipe.get("fixed") else "best weights so far,"
        say(f"interrupted: kept the {kept} of epoch {result.record.best_epoch} (--resume goes on)")
        raise typer.Exit(INTERRUPTED)


def _fine_tune(options: QatOptions, *, json: bool) -> None:
    from edge_dsc.build.qat import fine_tune
    from edge_dsc.evaluate.evaluation import format_metrics
    from edge_dsc.training.train import step_progress

    with progress_bar() as progress:
        result = fine_tune(options, progress=step_progress(options.run.name, progress), reading=progress)
    trained = result.trained
    for note in trained.notes:
        say(note)
    if json:
        metrics = trained.metrics
        body = {"run": str(trained.run), "onnx": str(result.onnx), "calibration": str(result.table)}
        give_json("edge-dsc/train-result", {**body, "metrics": metrics, "refit": None}, schema_version=2)
    else:
        give(f"{printable(trained.run)}: evaluation and test images together, in INT8 as it was trained")
        give(format_metrics(trained.metrics["held_out"]))
        say(f"next: edge-dsc build-engine {trained.run} --int8 --validate {options.data}")
    if trained.record.interrupted:
        say(f"interrupted: kept the best weights so far, of epoch {trained.record.best_epoch}")
        raise typer.Exit(INTERRUPTED)


def separate(
    original: Annotated[
        Path, typer.Argument(help="A run folder that train wrote, or anyone's network as FILE.keras.")
    ],
    layers: Annotated[
        Optional[str],
        typer.Option(
            "--layers",
            metavar="NAMES",
            help="Separate these alone: names or patterns, joined by commas; with ^ in front: all but these.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option("--rank", min=1, max=1024, help="Spatial filters per input channel.")
    ] = 1,
    batch_norm: Annotated[
        bool, typer.Option("--batch-norm/--no-batch-norm", help="BatchNorm after a pair that has none.")
    ] = True,
    data: Annotated[
        Optional[Path],
        typer.Option(
            "--data", help="Images to fine-tune on; default: those of the run's training.", show_default=False
        ),
    ] = None,
    epochs: Annotated[
        Optional[int],
        typer.Option(
            "--epochs",
            min=0,
            max=10_000,
            help="Of fine-tuning, with the original as teacher; default: a fifth of the original's.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out",
            help="The run folder, or the file of a FILE.keras; default: the original's name with -separable.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Every ordinary convolution larger than 1x1 becomes a depthwise and a pointwise one, the nearest to the original.

    The paper's formulas are printed layer by layer. The twin of a run then learns, for a few epochs, to answer as the
    run does, and is a run folder itself; that of a FILE.keras is a file, which train takes with --arch.
    """
    from edge_dsc.networks.separable import SeparationOptions
    from edge_dsc.training.twin import TwinOptions

    names = tuple(name.strip() for name in (layers or "").split(",") if name.strip())
    options = TwinOptions(
        original=original,
        out=out or original.with_name(_twin_name(original, data)),
        separation=SeparationOptions(rank=rank, batch_norm=batch_norm, layers=names),
        data=data,
        epochs=epochs,
        seed=seed,
        overwrite=overwrite,
    )
    _separate(options, json=json)


def _twin_name(original: Path, data: Path | None) -> str:
    """Return where a twin goes beside its original: a file beside a file, a run folder where there are images."""
    if original.suffix != ".keras" or original.is_dir():
        return f"{original.name}-separable"
    return f"{original.stem}-separable{'' if data else '.keras'}"


def _separate(options: TwinOptions, *, json: bool) -> None:
    from edge_dsc.evaluate.evaluation import format_metrics
    from edge_dsc.networks.separable import format_separation
    from edge_dsc.training.train import step_progress
    from edge_dsc.training.twin import make_twin

    with progress_bar() as progress:
        result = make_twin(options, progress=step_progress("twin", progress), reading=progress)
    trained = result.trained
    for note in trained.notes if trained else ():
        say(note)
    if json:
        body = {"path": str(result.out), "separation": result.separation, "validation": result.validation}
        give_json("edge-dsc/separate-result", {**body, "metrics": trained.metrics if trained else None})
    else:
        give(format_separation(result.separation))
    if trained is None or result.validation is None:
        say(f"{result.out}: not trained since; next: edge-dsc train DATA --arch {result.out}")
        return
    if not json:
        original, start, end = result.validation
        give(
            f"accuracy on validation images: original {original:.2%}, twin {start:.2%} at the start, {end:.2%} now"
        )
        give(f"{printable(result.out)}: evaluation and test images together, none seen in training")
        give(format_metrics(trained.metrics["held_out"]))
    if trained.record.interrupted:
        say(f"interrupted: kept the best weights so far, of epoch {trained.record.best_epoch}")
        raise typer.Exit(INTERRUPTED)


def synthesize(
    data: Data,
    label: Annotated[str, typer.Option("--class", help="The class to make images of.", show_default=False)],
    count: Annotated[int, typer.Option("--count", min=2, max=MAX_IMAGES, help="Images to write.")] = 300,
    size: Annotated[
        int, typer.Option("--size", min=64, max=224, help="Height and width: 64, 128 or 224.")
    ] = 64,
    arch: Annotated[
        GeneratorName, typer.Option("--arch", help="The networks: separable, or conventional.")
    ] = GeneratorName.DEPTHWISE_BEGAN,
    epochs: Annotated[
        Optional[int],
        typer.Option(
            "--epochs",
            min=1,
            max=100_000,
            help="At most, of 50 steps each; default: 200.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        Optional[float],
        typer.Option(
            "--seconds", min=1, max=604_800, callback=finite, help="At most, of learning.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    fold: Fold = None,
    keep_split: KeepSplit = False,
    kinds: Kinds = None,
    features: Annotated[
        Optional[Path],
        typer.Option(
            "--features",
            metavar="RUN",
            help="Judge the images by the features of this run of train, of the same split.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure a step of both networks: time and peak memory.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished synthesis in the folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the synthesis in the folder.")
    ] = False,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", help="The folder; default: runs/synthetic-CLASS.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """BEGAN learns the images of one class in the training part of the split that train makes with the same seed.

    The images can train (train --synthetic DIR) and nothing else: each carries a mark, and a folder of X-rays that
    holds one is refused. Ctrl-C writes images of the best epoch so far.
    """
    from edge_dsc.training.synthesis.generate import EPOCHS, SynthesisOptions, choose_began
    from edge_dsc.training.synthesis.generate import synthesize as run_synthesis

    options = SynthesisOptions(
        data=data,
        label=label,
        out=out or Path("runs") / f"synthetic-{label}",
        count=count,
        began=choose_began(arch.value, size),
        epochs=epochs or EPOCHS,
        seconds=seconds,
        seed=seed,
        fold=parse_fold(fold),
        keep_split=keep_split,
        kinds=kinds,
        features=features,
        compare=compare,
        resume=resume,
        overwrite=overwrite,
    )
    with progress_bar() as progress:
        made = run_synthesis(options, progress=progress, reading=progress)
    _give_synthesis(made, json=json)


def _give_synthesis(made: Synthesis, *, json: bool) -> None:
    from edge_dsc.training.synthesis.generate import describe_synthesis, format_synthesis

    for note in made.notes:
        say(note)
    if json:
        give_json("edge-dsc/synthesize-result", describe_synthesis(made))
    else:
        give(f"{printable(made.out)}: {format_synthesis(made.record)}")
    say(f"next: edge-dsc train DATA --synthetic {printable(made.out)} --seed {made.record.seed}")
    if made.record.ended == "interrupted":
        say(f"interrupted: the images are those of epoch {made.record.best_epoch} (--resume goes on)")
        raise typer.Exit(INTERRUPTED)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that train wrote.")] = DEFAULT_RUN,
    data: Annotated[
        Optional[Path],
        typer.Option(
            "--data", help="Images for the parity check; default: those of training.", show_default=False
        ),
    ] = None,
    arch: Annotated[
        Optional[str],
        typer.Option(
            "--arch",
            metavar="FUNCTION",
            help="For a network with code of its own: the function that built it, as train got it.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """The ONNX model takes grey uint8 images; its answers and those of Keras are compared on real images."""
    from edge_dsc.build.export import export_run

    with progress_bar() as progress:
        result = export_run(run, out=out, data=data, architecture=arch, progress=progress)
    if json:
        body = {"path": str(result.path), "parity": result.parity, "images": result.images}
        give_json("edge-dsc/export-result", {**body, "contract": result.contract})
    else:
        give(
            f"{printable(result.path)}: equal to Keras within {result.parity:.1e} on {result.images} real images"
        )


def adopt(
    model: Annotated[
        Path, typer.Argument(help="The classifier: MODEL.onnx or MODEL.keras.", show_default=False)
    ],
    labels: Annotated[
        str,
        typer.Option("--labels", help="Class names in the order of its outputs: A,B,C.", show_default=False),
    ],
    scale: Annotated[
        str,
        typer.Option("--scale", help="Factor on the pixels 0..255 that it was trained with, such as 1/255."),
    ] = "1",
    mean: Annotated[
        str, typer.Option("--mean", help="Subtracted after the scale: one number, or one for each channel.")
    ] = "0",
    std: Annotated[str, typer.Option("--std", help="Divided by after that; likewise.")] = "1",
    colour: Annotated[
        Colour, typer.Option("--colour", help="What it will see; grey makes three equal channels one.")
    ] = Colour.GREY,
    size: Annotated[
        Optional[str],
        typer.Option(
            "--size", help="SIDE or HEIGHTxWIDTH, where the file leaves it open.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Optional[Gives],
        typer.Option("--output", help="What it gives; default: by its last operator.", show_default=False),
    ] = None,
    check_on: Annotated[
        Optional[Path],
        typer.Option(
            "--check-on",
            help="Images to hold it against the original on; folders named as labels judge it. Default: phantoms.",
            show_default=False,
        ),
    ] = None,
    fit_on: Annotated[
        Optional[Path],
        typer.Option(
            "--fit-on",
            help="Labelled images to fit its temperature on, DIR/class/file; they cannot judge it afterwards.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out", help="The model's folder; default: runs/ and the file's name.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """It becomes a model that takes raw pixels, proven equal to the original, and goes the way of any other from there.

    No code from the file is run.
    """
    from edge_dsc.build.adopt import AdoptRequest, adopt_model
    from edge_dsc.build.conform import Normalisation

    (factor, *more), deviations = parse_numbers("--scale", scale), parse_numbers("--std", std)
    if more or factor <= 0 or 0 in deviations:
        raise UsageError(
            f"--scale {scale} --std {std}: nothing is left of a pixel", remedy="such as --scale 1/255"
        )
    request = AdoptRequest(
        source=model,
        labels=tuple(label.strip() for label in labels.split(",")),
        normalisation=Normalisation(scale=factor, mean=parse_numbers("--mean", mean), std=deviations),
        colour=colour is Colour.RGB,
        size=parse_size(size) if size else None,
        gives=output.value if output else None,
        out=out,
        images=check_on,
        fit=fit_on,
    )
    with progress_bar() as progress:
        made = adopt_model(request, progress)
    if made.skipped:
        say(f"{made.skipped} images could not be read and were left out")
    if json:
        give_json("edge-dsc/adopt-result", {"path": str(made.model.path), "record": made.record})
    else:
        give(made.text())
    say(f"next: edge-dsc build-engine {printable(made.model.path.parent)}")


def calibrate(
    calib_data: CalibData,
    model: Model = DEFAULT_RUN,
    calib_method: Method = CalibMethod.MSE,
    calib_images: CalibImages = 256,
    rounding: Roundings = None,
    bias_correction: BiasCorrection = None,
    seed: Seed = 0,
    trt_cache: Annotated[
        Optional[str],
        typer.Option(
            "--trt-cache",
            help="Also write TensorRT's own calibration cache, for this release: 8.6.2, 10.3.0.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """They are written to calibration.json beside the model, with the hashes of the images."""
    from msgspec import to_builtins

    from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
    from edge_dsc.checks.inspection import describe_table
    from edge_dsc.cli.console import give, give_json, progress_bar
    from engines.errors import UsageError

    if calib_data is None:
        raise UsageError("calibration needs real images", remedy="add --calib-data DIR")
    if device is not None and not calib_method.value.startswith("tensorrt-"):
        raise UsageError(
            f"ranges by {calib_method.value} are found on the processor: --device is for a GPU",
            remedy="leave --device out",
        )
    request = CalibrationRequest(
        model=model_of(model),
        data=calib_data,
        method=calib_method.value,
        images=calib_images,
        seed=seed,
        out=out,
        trt_release=trt_cache,
        device=device or 0,
        **_asked_corrections(calib_data, rounding, bias_correction),
    )
    with progress_bar() as progress:
        made = run_calibration(request, progress)
    description = {"path": str(made.path), "held_out": made.held_out, **describe_table(made.table)}
    description["trt_cache"] = str(made.trt_cache) if made.trt_cache else None
    description["coverage"] = to_builtins(made.coverage)
    if json:
        give_json("edge-dsc/calibrate-result", description, schema_version=2)
    else:
        give(
            f"{printable(made.path)}: {len(made.table.ranges)} ranges by {made.table.method}"
            f" over {len(made.table.images)} images ({made.held_out} left out as held back by the split)"
            + (f"\nfor TensorRT: {corrected}" if (corrected := made.table.describe_corrections()) else "")
            + (f"\n{made.coverage.text()}" if made.coverage else "")
            + (f"\nTensorRT's cache: {printable(made.trt_cache)}" if made.trt_cache else "")
        )


def build_engine(
    model: Model = DEFAULT_RUN,
    precision: Annotated[
        Optional[PrecisionName],
        typer.Option(
            "--precision",
            help="Precision; mixed leaves in floating point what spoils --max-drop, and no more.",
            show_default=False,
        ),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Build in FP32 (the default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Build in FP16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Build in INT8, from a calibration.")] = False,
    calib_data: CalibData = None,
    calibration: Annotated[
        Optional[Path],
        typer.Option(
            "--calibration", help="A calibration table; default: the one beside MODEL.", show_default=False
        ),
    ] = None,
    calib_method: Method = CalibMethod.MSE,
    calib_images: CalibImages = 256,
    rounding: Roundings = None,
    bias_correction: BiasCorrection = None,
    layers: Annotated[
        Optional[Path],
        typer.Option(
            "--layers",
            help="For mixed: take the layers from this engine; default: from the one that is replaced, else search.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    backend: Annotated[Backend, typer.Option("--backend", help="Which runtime builds.")] = Backend.AUTO,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, N or MIN:OPT:MAX.")] = "1:8:32",
    workspace: Annotated[
        int, typer.Option("--workspace", min=1, max=1 << 20, help="Scratch memory for the builder, MiB.")
    ] = 1024,
    optimization_level: Annotated[
        Optional[int],
        typer.Option(
            "--optimization-level",
            min=0,
            max=5,
            help="TensorRT: 0 builds quickly, 5 searches longest; default 3.",
            show_default=False,
        ),
    ] = None,
    max_aux_streams: Annotated[
        Optional[int],
        typer.Option(
            "--max-aux-streams",
            min=0,
            max=64,
            help="TensorRT: streams beside the main one; default: its own choice.",
            show_default=False,
        ),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: the engine loads in later releases too.")
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="TensorRT: it runs on all GPUs from 8.0 on; not on Jetson."
        ),
    ] = False,
    dla: Annotated[
        Optional[int],
        typer.Option(
            "--dla",
            min=0,
            max=15,
            help="TensorRT on a Jetson: run on this core of the Deep Learning Accelerator what it can; one batch size.",
            show_default=False,
        ),
    ] = None,
    input_type: Annotated[
        Optional[InputType],
        typer.Option(
            "--input",
            help="What the engine takes: int8 for --int8, float16 for --fp16: nothing in front of the first layer.",
            show_default=False,
        ),
    ] = None,
    decode: Annotated[
        Optional[DecoderName],
        typer.Option(
            "--decode",
            help="nvjpeg: JPEGs are decoded on the GPU, with pixels of its own.",
            show_default=False,
        ),
    ] = None,
    cam: Annotated[
        bool,
        typer.Option("--cam", help="Give class activation maps too: the evidence for each class, by place."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="TensorRT: print its log.")] = False,
    timing_cache: Annotated[
        bool, typer.Option(help="TensorRT: keep the timings of kernels beside the engine for the next build.")
    ] = True,
    validate: Annotated[
        Optional[Path],
        typer.Option(
            "--validate",
            help="Labelled X-rays to hold the engine against FP32 on; beyond the budget nothing is shipped.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        Optional[float],
        typer.Option(
            "--max-drop",
            min=0,
            max=100,
            callback=finite,
            help="With --validate: accuracy that may be lost, percentage points; default 0.5.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """A record is written beside the engine: what it was built from, and the precision that each layer really has."""
    from edge_dsc.build.calibrate import CALIBRATION_NAME, CalibrationRequest, run_calibration
    from edge_dsc.build.engine import BuildRequest
    from edge_dsc.build.engine import build_engine as build
    from edge_dsc.cli.options import parse_batch, parse_gate, parse_precision
    from engines.contract import DECODERS
    from engines.record import Precision, Tuning

    path = model_of(model)
    asked = parse_precision(precision=precision and precision.value, fp32=fp32, fp16=fp16, int8=int8)
    calibrated = asked in (Precision.INT8, Precision.MIXED)
    batch_range = parse_batch(batch)
    gate = parse_gate(validate, max_drop)
    corrections = _asked_corrections(calib_data, rounding, bias_correction)
    _refuse_contradictions(asked, calib_data, calibration, calib_method, layers, gate)
    made = None
    with progress_bar() as progress:
        if calib_data:
            request = CalibrationRequest(
                model=path,
                data=calib_data,
                method=calib_method.value,
                images=calib_images,
                seed=seed,
                runtime=backend.value,
                device=device or 0,
                **corrections,
            )
            made = run_calibration(request, progress)
        elif calibrated and calibration is None and (path.parent / CALIBRATION_NAME).is_file():
            calibration = path.parent / CALIBRATION_NAME
            say(f"using the calibration table {calibration}")
        built = build(
            BuildRequest(
                model=path,
                precision=asked,
                runtime=backend.value,
                batch=batch_range,
                calibration=calibration,
                out=out,
                workspace_mib=workspace,
                gate=gate,
                layers=layers,
                tuning=Tuning(
                    optimization_level=optimization_level,
                    max_aux_streams=max_aux_streams,
                    version_compatible=version_compatible,
                    hardware_compatible=hardware_compatible,
                    dla=dla,
                ),
                timing_cache=timing_cache,
                input=input_type and input_type.value,
                decode=decode and DECODERS[decode.value],
                device=device,
                cam=cam,
            ),
            progress,
            calibrated=made,
            log=say if verbose else None,
        )
    _give_engine(built, json=json)


def _asked_corrections(
    data: Path | None, rounding: Rounding | None, bias_correction: bool | None
) -> dict[str, Any]:
    """Return what a calibration is asked to learn beside its ranges; refuse that without images."""
    if data is None and (rounding or bias_correction is not None):
        raise UsageError(
            "--rounding and --bias-correction are for a calibration", remedy="add --calib-data DIR"
        )
    return {"rounding": rounding and rounding.value, "bias_correction": bias_correction}


def _give_engine(built: BuiltEngine, *, json: bool) -> None:
    from edge_dsc.checks.inspection import format_record

    say(f"runtime: {built.chosen}")
    if json:
        give_json("edge-dsc/build-engine-result", {"path": str(built.path), "record": built.record})
    else:
        give(f"{printable(built.path)}\n{format_record(built.record)}")


def _refuse_contradictions(
    asked: Precision,
    data: Path | None,
    table: Path | None,
    method: CalibMethod,
    layers: Path | None,
    gate: GateOptions | None,
) -> None:
    """Refuse options of build-engine that have no use beside each other."""
    if asked.value not in ("int8", "mixed") and (data or table):
        raise UsageError(f"calibration has no use in {asked.value}", remedy="add --int8")
    if asked.value != "mixed" and layers:
        raise UsageError(f"--layers has no use in {asked.value}", remedy="add --precision mixed")
    if asked.value == "mixed" and gate is None:
        raise UsageError("mixed precision needs images to be judged on", remedy="add --validate DIR")
    if data and table:
        raise UsageError("--calib-data and --calibration exclude each other", remedy="give one of them")
    if method.value.startswith("tensorrt-") and not (asked.value == "int8" and data):
        raise UsageError(
            f"--calib-method {method.value} is for --int8 over images",
            remedy="add --int8 --calib-data DIR, or choose another method",
        )


def debug(
    target: Annotated[
        Path, typer.Argument(help="An engine, an ONNX model or a run folder.", show_default=False)
    ],
    calib_data: Annotated[
        Path, typer.Option("--calib-data", help="Folder of real X-rays, DIR/class/file.", show_default=False)
    ],
    calibration: Annotated[
        Optional[Path],
        typer.Option(
            "--calibration", help="A calibration table; default: the one beside MODEL.", show_default=False
        ),
    ] = None,
    backend: Annotated[
        Int8Backend, typer.Option("--backend", help="For an ONNX model: whose INT8 graph to look at.")
    ] = Int8Backend.TENSORRT,
    images: Annotated[
        int, typer.Option("--images", min=1, max=MAX_IMAGES, help="Images to look at, equal by class.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the images' draw.")] = 1,
    device: Device = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Each layer alone in INT8: the error at its output and at the logits, the decisions that change, the time."""
    from edge_dsc.build.debug import DebugRequest, format_debugged
    from edge_dsc.build.debug import debug as examine
    from edge_dsc.cli.console import give, give_json, progress_bar

    request = DebugRequest(
        target=model_of(target),
        data=calib_data,
        calibration=calibration,
        runtime=backend.value,
        images=images,
        seed=seed,
        out=out,
        device=device,
    )
    with progress_bar() as progress:
        found = examine(request, progress)
    if json:
        give_json("edge-dsc/debug-result", found.to_dict(), schema_version=3)
    else:
        give(format_debugged(found))
