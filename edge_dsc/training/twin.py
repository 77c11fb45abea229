"""``separate``: from a trained network to its separable twin, which learns to answer as the original does."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.data.split import SPLIT_FILE, load_split
from edge_dsc.evaluate.metrics import Metrics, classification_metrics
from edge_dsc.networks import (
    NetworkChoice,
    build_network,
    identify,
    load_keras,
    load_network,
    open_network,
    save_network,
)
from edge_dsc.networks.keras_files import read_network
from edge_dsc.networks.separable import (
    Pair,
    Separation,
    SeparationOptions,
    Twin,
    fit_kernel,
    separate_network,
)
from edge_dsc.training.batches import TaughtBatches
from edge_dsc.training.fit import compile_model, fit_model, predict, seed_everything
from edge_dsc.training.recipes import NO_INGREDIENTS, OTHER, RECIPES, Recipe, ReportProgress, TrainOptions
from edge_dsc.training.run_folder import MODEL_FILE, TrainedNetwork, TrainState, load_training_record
from edge_dsc.training.train import (
    Fitted,
    RunImages,
    TrainResult,
    check_folder,
    finish_run,
    make_batches,
    read_images,
    read_run_images,
    require_validation,
)
from engines.errors import UsageError
from engines.files import KERAS_MODEL, atomic_path, require_unread, require_writable, sha256_file
from engines.runtimes import Progress

if TYPE_CHECKING:
    from keras import Layer, Model

RECIPE_NAME = "twin"
LEARNING_RATE = 5e-4
TEMPERATURE = 2.0
EPOCH_SHARE = 5  # the twin is trained for a fifth of the original's epochs
_FIT_IMAGES = 16  # on which a twin's kernels are fitted before its first epoch
_FIT_PLACES = 8192  # pixels of a convolution's output that are drawn from these
_SMALLEST_VARIANCE = 1e-6
_CODE_REMEDY = (
    "a network with code of its own is trained first, with --arch module:function, if it has no Lambda"
)


@dataclass(frozen=True, kw_only=True)
class TwinOptions:
    """What ``separate`` is asked for.

    Attributes:
        original: A trained run folder, or a ``.keras`` file.
        out: The new run folder; the new file where there are no images.
        separation: Rank, BatchNorm, which layers.
        data: Images to fine-tune on. Of a run those of its split, wherever they lie now, by default where they were at
            training; of a file any that have its classes, by default none.
        epochs: Passes over the training images; by default a fifth of the original's. 0 leaves the twin as it starts.
        seed: Decides order and augmentation, and of a file the split.
        overwrite: Replace what is in ``out``.
    """

    original: Path
    out: Path
    separation: SeparationOptions = field(default_factory=SeparationOptions)
    data: Path | None = None
    epochs: int | None = None
    seed: int = 0
    overwrite: bool = False

    @property
    def tuned(self) -> bool:
        """Whether there are images, and the twin becomes a run: of a file only where they are named."""
        return self.data is not None or self.original.suffix != ".keras" or self.original.is_dir()


@dataclass(frozen=True, kw_only=True)
class TwinResult:
    """What ``separate`` gave.

    Attributes:
        out: The run folder, or the file.
        separation: What was done to every convolution.
        trained: The twin's run; None of a file.
        validation: Accuracy on the run's validation images: of the original, of the twin before and after its
            fine-tuning; None of a file.
    """

    out: Path
    separation: Separation
    trained: TrainResult | None = None
    validation: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Original:
    """A trained network, its images, and what its run says of it."""

    model: Model
    architecture: str
    size: int
    sha256: str
    recipe: Recipe
    data: Path
    images: RunImages


def make_twin(
    options: TwinOptions, *, progress: ReportProgress | None = None, reading: Progress | None = None
) -> TwinResult:
    """Make the separable twin of a trained network.

    With images it is fine-tuned with the original as teacher and written as a run folder. The twin of a run holds the
    same split, so the images held back from the original are held back from the twin. The weights that are kept are
    those of the lowest validation loss, of an epoch or of the start. Same original, images, options, seed and machine:
    same weights. The twin of a file without images is a file, as near to the original as its
    kernels can be, with what a twin has lost.

    Raises:
        UsageError: ``out`` is the original itself or in use, a name that no convolution has, epochs without images.
        ArtefactError: No finished run, or a file that Keras cannot read in safe mode.
        BadInputError: The network has nothing to separate, or the images of the run's split are not all there.
        EnvironmentProblem: A package is missing, or ``out`` cannot be written.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    if os.path.realpath(options.out) == os.path.realpath(options.original):
        raise UsageError(f"{options.out} is the original itself", remedy="give another place with --out")
    if not options.tuned:
        return _write_file(options)
    if options.epochs is not None and options.epochs < 0:
        raise UsageError(f"{options.epochs} epochs", remedy="give 0 or more")
    require_unread(options.out / MODEL_FILE, options.original)
    original = _open(options, reading)
    twin = separate_network(original.model, options.separation)
    twin.model.name = _name_twin(twin, original.architecture)
    require_writable(options.out / MODEL_FILE, KERAS_MODEL)  # said before an epoch is trained
    return _fine_tune(options, original, twin, progress)


def _write_file(options: TwinOptions) -> TwinResult:
    if options.epochs is not None:
        raise UsageError("fine-tuning needs images", remedy="add --data DIR, or leave --epochs out")
    if options.out.exists() and not options.overwrite:
        raise UsageError(
            f"{options.out} exists", remedy="choose another --out, or replace it with --overwrite"
        )
    require_writable(options.out, KERAS_MODEL)
    twin = separate_network(read_network(options.original, remedy=_CODE_REMEDY), options.separation)
    with atomic_path(options.out, KERAS_MODEL) as temporary:
        save_network(twin.model, temporary)
    return TwinResult(out=options.out, separation=twin.separation)


def _open(options: TwinOptions, reading: Progress | None) -> _Original:
    """Read the original and its images."""
    if options.original.suffix == ".keras" and not options.original.is_dir():
        assert options.data is not None
        wanted = _train_options(options, options.data)
        check_folder(wanted)
        network = open_network(NetworkChoice(architecture=str(options.original)))
        images = read_images(wanted, network.size, reading)
        return _Original(
            model=network.make(len(images.split.labels)),
            architecture=network.name,
            size=network.size,
            sha256=sha256_file(options.original),
            recipe=RECIPES["default"][OTHER],
            data=options.data,
            images=images,
        )
    record = load_training_record(options.original)
    split = load_split(options.original / SPLIT_FILE)
    require_validation(split, options.original)
    data = options.data or split.root
    check_folder(_train_options(options, data))
    size = record.network.size
    images = read_run_images(data, split, run=options.original, size=size, reading=reading)
    model = load_network(
        options.original / MODEL_FILE,
        record.architecture,
        len(record.labels),
        config_sha256=record.network.config_sha256,
    )
    # Recipes of other versions have other fields.
    known = {name: value for name, value in record.recipe.items() if name in Recipe.__dataclass_fields__}
    recipe = Recipe(**{**asdict(RECIPES["default"][OTHER]), **known})
    return _Original(
        model=model,
        architecture=record.architecture,
        size=size,
        sha256=record.model_sha256,
        recipe=recipe,
        data=data,
        images=images,
    )


def _train_options(options: TwinOptions, data: Path) -> TrainOptions:
    return TrainOptions(data=data, out=options.out, seed=options.seed, overwrite=options.overwrite)


def _name_twin(twin: Twin, architecture: str) -> str:
    """Return what the twin's network is called: the one that it is, if that has a name."""
    if architecture == "cnn" and identify(twin.model) == identify(
        build_network("dsc", twin.model.output_shape[-1])
    ):
        return "dsc"
    name = f"{architecture.removesuffix('.keras')}-separable"
    return name[-64:].lstrip("._-")


def _fine_tune(
    options: TwinOptions, original: _Original, twin: Twin, progress: ReportProgress | None
) -> TwinResult:
    images, recipe = original.images, _recipe(options, original.recipe)
    seed_everything(options.seed)
    started = time.monotonic()
    state = TrainState()
    batches = TaughtBatches(**vars(make_batches(images, recipe, options.seed)), teacher=original.model)
    stride = max(1, len(batches.pixels) // _FIT_IMAGES)
    separation = fit_pairs(twin, batches.pixels[::stride][:_FIT_IMAGES].astype(np.float32))
    before, start = (_validate(model, images) for model in (original.model, twin.model))
    fitted_weights = twin.model.get_weights()
    interrupted = False
    if recipe.epochs:
        trained = compile_model(twin.model, recipe, batches.steps)
        interrupted = fit_model(trained, batches, images.pixels["validation"], state, progress)
        if start.loss < min(state.history["validation_loss"]):
            # A start may be better than all that few images make of it.
            twin.model.set_weights(fitted_weights)
            state.best_epoch = 0
    fitted = Fitted(
        model=twin.model,
        architecture=twin.model.name,
        network=TrainedNetwork(
            size=original.size,
            source=original.architecture,
            weights=options.original.name,
            weights_sha256=original.sha256,
        ),
        recipe=recipe,
        state=state,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        parent_sha256=original.sha256,
        separation=separation,
    )
    after = _validate(twin.model, images)
    return TwinResult(
        out=options.out,
        separation=separation,
        trained=finish_run(_train_options(options, original.data), images, fitted),
        validation=(before.accuracy, start.accuracy, after.accuracy),
    )


def _recipe(options: TwinOptions, base: Recipe) -> Recipe:
    """Return the original's recipe, its batches and its augmentation, as a network needs it that is trained already."""
    return replace(
        base,
        name=RECIPE_NAME,
        epochs=max(1, base.epochs // EPOCH_SHARE) if options.epochs is None else options.epochs,
        learning_rate=LEARNING_RATE,
        warmup=1,
        cosine=True,
        label_smoothing=0.0,
        dense_start=False,
        convolution_start=False,
        **{**asdict(NO_INGREDIENTS), "temperature": TEMPERATURE},  # the original is the only teacher
    )


def _validate(model: Model, images: RunImages) -> Metrics:
    pixels, targets = images.pixels["validation"]
    return classification_metrics(targets, predict(model, pixels), images.split.labels)


def fit_pairs(twin: Twin, images: NDArray[np.floating]) -> Separation:
    """Fit every pair to what the original's convolution gives on some images, before anything is trained.

    The kernels are those of :func:`edge_dsc.networks.separable.fit_kernel`; a pair that is pointwise first keeps its
    own. Then every output channel gets the original's mean and deviation: a new BatchNorm takes the pair's statistics
    as its moving ones and the original's as scale and shift, one of the original gets new moving statistics alone, and
    without one the pair's last kernel and bias are scaled. Every network is run once, so that a pair is fitted on what
    the fitted ones before it give.

    Args:
        twin: Changed in place.
        images: ``float32 [N, ...]``, inputs of the network, a dozen of all classes.

    Returns:
        The twin's separation with what each pair misses.
    """
    wanted: dict[int, _Responses] = {}
    missed: dict[int, float] = {}

    def learn(pair: Pair, outputs: Any) -> None:
        wanted[id(pair)] = _Responses.of(pair.original, outputs)

    def fit(pair: Pair, inputs: Any) -> None:
        _fit_kernels(pair, wanted[id(pair)], inputs)

    def match(pair: Pair, outputs: Any) -> None:
        found = _Responses.of(pair.original, outputs)
        missed[id(pair)] = found.missed(wanted[id(pair)])
        _match(pair, wanted[id(pair)], found)

    with contextlib.ExitStack() as watched:
        for pair in twin.pairs:
            watched.enter_context(_watching(pair.original, after=partial(learn, pair)))
        twin.original(images, training=False)
    with contextlib.ExitStack() as watched:
        for pair in twin.pairs:
            watched.enter_context(_watching(pair.layers[-1], after=partial(match, pair)))
            if not pair.pointwise_first:
                watched.enter_context(_watching(pair.layers[0], before=partial(fit, pair)))
        twin.model(images, training=False)
    layers = zip(twin.separation.layers, twin.pairs, strict=True)
    fitted = tuple(msgspec.structs.replace(layer, missed=missed[id(pair)]) for layer, pair in layers)
    return msgspec.structs.replace(twin.separation, layers=fitted)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Responses:
    """What a convolution gives on some images, before its activation.

    Attributes:
        mean: Of every channel.
        variance: Of every channel.
        places: Indices of drawn pixels, in the order of images, rows and columns.
        values: There, ``[places, channels]``.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    places: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, layer: Layer, outputs: Any) -> _Responses:
        """Look at a convolution's outputs."""
        rows = _rows(layer, outputs)
        places = np.sort(np.random.default_rng(0).permutation(len(rows))[:_FIT_PLACES])
        return cls(
            mean=rows.mean(axis=0, dtype=np.float64),
            variance=np.maximum(rows.var(axis=0, dtype=np.float64), _SMALLEST_VARIANCE),
            places=places,
            values=rows[places].astype(np.float64),
        )

    def missed(self, wanted: _Responses) -> float:
        """Return how far these are from others at the same places, against their deviation; a bias does not count."""
        aims = wanted.values - wanted.values.mean(axis=0)
        total = float(np.linalg.norm(aims))
        return float(np.linalg.norm(self.values - self.values.mean(axis=0) - aims)) / total if total else 0.0


def _rows(layer: Layer, tensor: Any) -> NDArray[np.float32]:
    """Return a tensor as ``[pixels of all images, channels]``."""
    values = np.asarray(tensor)
    if layer.data_format == "channels_first":
        values = np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1])


def _fit_kernels(pair: Pair, wanted: _Responses, inputs: Any) -> None:
    """Give a pair, depthwise first, the kernels that come nearest to the original on its own inputs."""
    layer = pair.original
    patches = _patches(layer, inputs, wanted.places)
    rank = pair.layers[0].depth_multiplier
    split = fit_kernel(np.asarray(layer.kernel), patches, wanted.values, rank=rank, groups=layer.groups)
    kernels = [split.depthwise, split.pointwise]
    bias = [np.asarray(layer.bias)] if layer.use_bias else []
    if len(pair.layers) == 1:
        pair.layers[0].set_weights([*kernels, *bias])
    else:
        pair.layers[0].set_weights(kernels[:1])
        pair.layers[1].set_weights([*kernels[1:], *bias])


def _patches(layer: Layer, inputs: Any, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the pixels that lie under a convolution's kernel at some places, ``[inputs, places, h * w]``.

    A depthwise convolution with one filter for each pixel of the kernel takes them out, strides, dilation and padding
    as the layer has them; image by image, for the memory's sake.
    """
    ops = load_keras().ops
    height, width = layer.kernel_size
    taps, channels = height * width, layer.kernel.shape[2] * layer.groups
    one_each = np.tile(np.eye(taps, dtype=np.float32).reshape(height, width, 1, taps), (1, 1, channels, 1))
    found, before = [], 0
    for image in range(inputs.shape[0]):
        taken = ops.depthwise_conv(
            inputs[image : image + 1],
            one_each,
            strides=layer.strides,
            padding=layer.padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )
        rows = _rows(layer, taken)
        here = places[(places >= before) & (places < before + len(rows))] - before
        found.append(rows[here].astype(np.float64))
        before += len(rows)
    by_place = np.concatenate(found).reshape(len(places), channels, taps)
    patches: NDArray[np.float64] = by_place.transpose(1, 0, 2)
    return patches


def _match(pair: Pair, wanted: _Responses, found: _Responses) -> None:
    """Give a pair's output channels the mean and the deviation that is wanted."""
    norm, last = pair.norm, pair.layers[-1]
    if norm is not None:
        if pair.added:
            # BatchNorm divides by sqrt(variance + epsilon), which is not the deviation where that is small.
            norm.gamma.assign(np.sqrt(wanted.variance * (found.variance + norm.epsilon) / found.variance))
            norm.beta.assign(wanted.mean)
        norm.moving_mean.assign(found.mean)
        norm.moving_variance.assign(found.variance)
        return
    factor = np.sqrt(wanted.variance / found.variance)
    *before, kernel, bias = last.get_weights() if last.use_bias else [*last.get_weights(), None]
    # A depthwise kernel is [h, w, channels, 1], any other [..., outputs].
    scaled = kernel * (factor[:, None] if pair.pointwise_first else factor)
    shifted = [] if bias is None else [(bias - found.mean) * factor + wanted.mean]
    last.set_weights([*before, scaled, *shifted])


@contextlib.contextmanager
def _watching(
    layer: Layer,
    *,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Show what a layer takes, or gives before its activation, while a model runs eagerly, and let its weights change.

    Works through models within models, where no graph of the whole has the tensor.
    """
    linear, call = load_keras().activations.linear, layer.call
    kept = vars(layer).get("call")  # watched already

    def run(inputs: Any, *args: Any, **options: Any) -> Any:
        if before:
            before(inputs)
        if after:
            activation, layer.activation = layer.activation, linear
            try:
                after(call(inputs, *args, **options))
            finally:
                layer.activation = activation
        return call(inputs, *args, **options)

    layer.call = run
    try:
        yield
    finally:
        del layer.call
        if kept is not None:
            layer.call = kept
