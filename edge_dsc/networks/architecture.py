"""Which network: what ``--arch`` names, built; and a saved network held against what its run says it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_dsc.networks.backbones import (
    BACKBONES,
    IMAGENET,
    build_backbone,
    flat_layers,
    freeze_layers,
    give_weights,
    has_head,
    hash_weights,
    read_weights,
)
from edge_dsc.networks.keras_files import load_function, load_keras, read_network
from edge_dsc.networks.paper import ARCHITECTURES, INPUT_SIDE, build_paper_network, deployed_network
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.files import canonical_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from keras import Layer, Model

NAMES = (*ARCHITECTURES, *BACKBONES)
NO_WEIGHTS = "none"
LARGEST_SIDE = 1024
_CODE_REMEDY = "a network with code of its own needs the function that builds it: --arch module:function"
_EXPORT_REMEDY = (
    "train again; with code of its own name its function: edge-dsc export RUN --arch module:function"
)
# What a layer's configuration says of how it started, or where it is; the rest is what it does.
_NOT_ITS_FORM = re.compile(
    r"name|trainable|dtype|seed|momentum|module|registered_name|build_config|.*_(initializer|regularizer|constraint)"
)


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """Which network is asked for, and what it starts from.

    Attributes:
        architecture: One of :data:`NAMES`, ``FILE.keras``, or a function: ``module:function``, ``FILE.py:function``.
        size: Height and width of its input; None takes 224, or what a file's network takes.
        weights: ``none``, ``imagenet`` or a file; None is ``none``, and the file's own weights of ``FILE.keras``.
        unfreeze: Train no more of the features than their last layers with weights, this many. None: of a network of
            Keras that was given weights none, of every other network all.
    """

    architecture: str = "dsc"
    size: int | None = None
    weights: str | None = None
    unfreeze: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network that is known and not yet built.

    Attributes:
        name: What runs, engines and reports call it.
        size: Height and width of its input.
        source: What was named: the architecture, a file's name, or a function.
        make: Builds it for a number of classes, with its weights, frozen as asked.
        source_sha256: Hash of the file that it was read from.
        weights: ``none``, ``imagenet`` or a file's name.
        weights_sha256: Hash of that file.
        unfreeze: As it was asked for.
    """

    name: str
    size: int
    source: str
    make: Callable[[int], Model]
    source_sha256: str | None = None
    weights: str = NO_WEIGHTS
    weights_sha256: str | None = None
    unfreeze: int | None = None


def open_network(choice: NetworkChoice) -> Network:
    """Find a network by what names it, with all that can be refused before images are read.

    A network of a file or a function takes ``float32 [N, H, W, 1]`` or three channels, raw pixels 0..255, and gives
    ``[N, classes]``: probabilities, or logits of a last layer without an activation, which get a softmax.

    Raises:
        UsageError: No such network, or a size or weights that it does not take.
        ArtefactError: A file that is missing, damaged, of another network, or that holds code.
        BadInputError: A function that cannot be imported.
        EnvironmentProblem: TensorFlow is missing, where a file must be read.
    """
    text, size, unfreeze = choice.architecture, choice.size, choice.unfreeze
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise UsageError(f"images of {size} x {size}", remedy=f"give a size from 1 to {LARGEST_SIDE}")
    if choice.weights == IMAGENET and text not in BACKBONES:
        raise UsageError(
            f"there are no ImageNet weights of {text}", remedy=f"choose of {', '.join(BACKBONES)}"
        )
    if unfreeze is not None and (unfreeze < 0 or (text in NAMES and choice.weights in (None, NO_WEIGHTS))):
        raise UsageError(
            f"--unfreeze {unfreeze} has no use with weights that were drawn",
            remedy="everything is trained then; or add --weights imagenet or FILE",
        )
    if text in NAMES:
        network = _of_name(choice)
    elif ":" in text:
        network = _of_function(choice)
    elif text.endswith(".keras"):
        network = _of_file(choice)
    else:
        raise UsageError(
            f"there is no network {text!r}",
            remedy=f"choose one of {', '.join(NAMES)}, or give FILE.keras or module:function",
        )
    return _with_start(network, choice)


def default_name(architecture: str) -> str:
    """Return the name of the network that ``--arch`` names, without opening it."""
    if architecture in NAMES:
        return architecture
    module, _, function = architecture.rpartition(":")
    stem = Path(module).stem if module.endswith(".py") else module
    return _path_name(f"{stem}.{function}" if module else Path(architecture).name)


def build_network(architecture: str, classes: int, size: int = INPUT_SIDE) -> Model:
    """Build one of :data:`NAMES` with drawn weights.

    Raises:
        UsageError: Another name, fewer than two classes, or a size that it does not take.
        EnvironmentProblem: TensorFlow is missing.
    """
    if architecture not in NAMES:
        raise UsageError(f"there is no network {architecture!r}", remedy=f"choose one of {', '.join(NAMES)}")
    if classes < 2:
        raise UsageError(f"a classifier of {classes} classes", remedy="give at least two class folders")
    check_size(architecture, size)
    if architecture in BACKBONES:
        return build_backbone(architecture, classes, size)
    return build_paper_network(architecture, classes)


def smallest_size(architecture: str) -> int:
    """Return the least height and width that one of :data:`NAMES` takes; the paper's two take no other."""
    return BACKBONES[architecture].smallest if architecture in BACKBONES else INPUT_SIDE


def check_size(architecture: str, size: int) -> None:
    """Refuse a size that one of :data:`NAMES` does not take.

    Raises:
        UsageError: It is another one than the paper's, or below what the backbone takes.
    """
    smallest = smallest_size(architecture)
    if size < smallest or (architecture in ARCHITECTURES and size != INPUT_SIDE):
        more = " or more" if architecture in BACKBONES else ", or leave it out"
        raise UsageError(
            f"{architecture} takes no images of {size} x {size}", remedy=f"give --size {smallest}{more}"
        )


def load_network(
    path: Path,
    architecture: str,
    classes: int,
    *,
    config_sha256: str | None = None,
    network: Network | None = None,
) -> Model:
    """Read a ``.keras`` file, without running code from it (safe mode), and hold it against what it should be.

    Args:
        path: The file.
        architecture: Its name. ``dsc`` and ``cnn`` may be in the trained or in the deployed form.
        classes: Number of classes.
        config_sha256: What :func:`identify` gave of it; None for records of a time that had none.
        network: Of a function that a person named: it builds the network, and the file's weights alone are read.

    Raises:
        ArtefactError: Keras cannot read it, or it is another network.
        EnvironmentProblem: TensorFlow is missing.
    """
    if network is not None:
        loaded = network.make(classes)
        read_weights(loaded, path)
    elif architecture in NAMES:
        loaded = read_network(path)
    else:
        loaded = read_network(path, remedy=_EXPORT_REMEDY)
    right = config_sha256 in (None, identify(loaded)) and loaded.output_shape == (None, classes)
    if architecture in ARCHITECTURES:
        forms = build_paper_network(architecture, classes), deployed_network(architecture, classes)
        right = right and _form_of(loaded) in map(_form_of, forms)
    elif config_sha256 is None:
        right = False
    if not right:
        raise ArtefactError(
            f"{path} is not the {architecture} of {classes} classes that its run records",
            remedy="train again: edge-dsc train DATA --overwrite",
        )
    return loaded


def identify(model: Model) -> str:
    """Return the hash of a network's architecture: its layers, what they do and how they are joined.

    Names, weights, their starting values and what is frozen do not count, so that the hash is the same in every
    process and before and after training.
    """
    return sha256_bytes(canonical_json(_structure(model.get_config())))


def count_parameters(model: Model) -> dict[str, int]:
    """Count weights: ``feature_extractor``, ``trainable`` and ``total``.

    The feature extractor is what stands before the dense layers at the end. Its weights count whether they are frozen
    or not, without BatchNorm's two moving averages, which are in the total alone.
    """
    dense = load_keras().layers.Dense
    layers = flat_layers(model)
    while layers and (not layers[-1].weights or isinstance(layers[-1], dense)):
        layers.pop()
    features = [
        weight
        for layer in layers
        for weight in layer.weights
        if weight.name not in ("moving_mean", "moving_variance")
    ]
    return {
        "feature_extractor": _elements(features),
        "trainable": _elements(model.trainable_weights),
        "total": _elements(model.weights),
    }


def multiply_adds(model: Model) -> int:
    """Count the multiply-adds of one image, as :func:`engines.graph.count_multiply_adds` counts them of a graph.

    What takes the three equal channels counts as taking one, for the deployed graph is folded to one.

    Raises:
        ArtefactError: There is a layer of another kind that has kernels.
    """
    grey = _equal_channels(model)
    return sum(layer_multiply_adds(layer, grey=layer in grey) for layer in flat_layers(model))


def layer_multiply_adds(layer: Layer, *, grey: bool = False) -> int:
    """Count the multiply-adds of a layer for one image; biases, BatchNorm and activations are not counted.

    Args:
        layer: Of a built model.
        grey: Count one input channel, whatever it has.

    Raises:
        ArtefactError: It has kernels and is of an unknown kind.
    """
    layers = load_keras().layers
    places = int(np.prod(layer.output.shape[1:-1]))
    kernels = [tuple(weight.shape) for weight in layer.weights if len(weight.shape) > 1]
    if not kernels:
        return 0
    if isinstance(layer, layers.Dense):
        return places * int(np.prod(kernels[0]))
    if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)):
        return places * sum(int(np.prod(kernel)) // (kernel[2] if grey else 1) for kernel in kernels)
    raise ArtefactError(
        f"the multiply-adds of {type(layer).__name__} {layer.name} are not known",
        remedy="they are counted of Conv2D, DepthwiseConv2D, SeparableConv2D and Dense",
    )


def _equal_channels(model: Model) -> list[Layer]:
    """Return the layers that take the three equal channels, or these scaled or padded."""
    layers = load_keras().layers
    names = [layer.name for layer in model.layers]
    if "colour" not in names:
        return []
    tensors = {id(model.get_layer("colour").output)}
    found = []
    for layer in model.layers[names.index("colour") + 1 :]:
        if isinstance(layer.input, list) or id(layer.input) not in tensors:
            continue
        if isinstance(layer, (layers.Rescaling, layers.ZeroPadding2D)):
            tensors.add(id(layer.output))
        else:
            found.append(layer)
    return found


def _elements(weights: list[Any]) -> int:
    return sum(int(weight.shape.num_elements()) for weight in weights)


def _with_start(network: Network, choice: NetworkChoice) -> Network:
    """Add to a network the weights of a file, and what of it is not trained."""
    path = Path(choice.weights) if choice.weights not in (None, NO_WEIGHTS, IMAGENET) else None
    if path is not None:
        network = replace(network, weights=path.name, weights_sha256=hash_weights(path))

    def make(classes: int) -> Model:
        model = network.make(classes)
        if path is not None:
            give_weights(model, path)
        features_alone = network.weights != NO_WEIGHTS and has_head(model)
        if choice.unfreeze is not None or features_alone:
            freeze_layers(model, choice.unfreeze or 0)
        return model

    return replace(network, make=make, unfreeze=choice.unfreeze)


def _of_name(choice: NetworkChoice) -> Network:
    """Return one of :data:`NAMES`."""
    name, size = choice.architecture, choice.size or INPUT_SIDE
    check_size(name, size)
    if choice.weights == IMAGENET:
        make = partial(build_backbone, name, size=size, imagenet=True)
        return Network(name=name, size=size, source=name, make=make, weights=IMAGENET)
    return Network(name=name, size=size, source=name, make=partial(build_network, name, size=size))


def _of_file(choice: NetworkChoice) -> Network:
    """Return the network of a ``.keras`` file, which is read at once; ``--weights none`` draws its weights again."""
    path = Path(choice.architecture)
    if not path.is_file():
        raise ArtefactError(f"there is no {path}", remedy="give a .keras file, or the name of a network")
    loaded = read_network(path, remedy=_CODE_REMEDY)
    size = _size_of(loaded, choice.size, str(path))

    def make(classes: int) -> Model:
        model = load_keras().models.clone_model(loaded)
        if choice.weights is None:
            model.set_weights(loaded.get_weights())
        return _fit_in(model, classes, size, str(path))

    digest = sha256_file(path)
    network = Network(
        name=default_name(str(path)), size=size, source=path.name, make=make, source_sha256=digest
    )
    return replace(network, weights=path.name, weights_sha256=digest) if choice.weights is None else network


def _of_function(choice: NetworkChoice) -> Network:
    """Return the network that a function builds: ``function(classes, size)`` gives a Keras model."""
    text, size = choice.architecture, choice.size or INPUT_SIDE
    load_keras()  # before the person's own code imports it, without what TensorFlow says then
    function = load_function(text)

    def make(classes: int) -> Model:
        try:
            built = function(classes, size)
        except Exception as error:  # whatever the function's own code raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInputError(
                f"{text} called with {classes} classes and size {size} failed: {type(error).__name__}: {reason}",
                remedy="it must be a function (classes, size) that returns a Keras model",
            ) from error
        _size_of(built, size, text)
        return _fit_in(built, classes, size, text)

    module, _, name = text.rpartition(":")
    file = Path(module) if module.endswith(".py") else None
    source = f"{file.name if file else module}:{name}"
    digest = sha256_file(file) if file else None
    return Network(name=default_name(text), size=size, source=source, make=make, source_sha256=digest)


def _path_name(text: str) -> str:
    """Return a name that files can carry, with a dot in it, so that it is none of :data:`NAMES`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[-64:].lstrip("._-") or "own.network"


def _size_of(model: Model, asked: int | None, source: str) -> int:
    """Return the side of the images that a network from elsewhere takes.

    Raises:
        ArtefactError: It is no network of square grey or colour images.
        UsageError: It has another size than the one asked for.
    """
    keras = load_keras()
    # A class of one's own has neither, until it is called, and Keras cannot look into it.
    inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
    if not isinstance(model, keras.Model) or not inputs or not outputs:
        raise _unfit(source, "is no Keras network of layers, Functional or Sequential")
    if (len(inputs), len(outputs)) != (1, 1):
        raise _unfit(source, f"has {len(inputs)} inputs and {len(outputs)} outputs")
    shape, dtype = tuple(inputs[0].shape), inputs[0].dtype
    if len(shape) != 4 or shape[0] is not None or shape[1] != shape[2] or shape[3] not in (1, 3):
        raise _unfit(source, f"takes {dtype} {list(shape)}")
    if dtype != "float32":
        raise _unfit(source, f"takes {dtype}")
    side = shape[1]
    if side is not None and asked not in (None, side):
        raise UsageError(
            f"{source} takes images of {side} x {side}, not {asked}",
            remedy=f"give --size {side}, or leave it out",
        )
    return int(side or asked or INPUT_SIDE)


def _unfit(source: str, what: str) -> ArtefactError:
    return ArtefactError(
        f"{source} {what}",
        remedy="a classifier takes float32 [N, side, side, 1 or 3], raw pixels, and gives [N, classes]",
    )


def _fit_in(model: Model, classes: int, size: int, source: str) -> Model:
    """Give a network from elsewhere the input and the output that ours have, where it has others.

    Raises:
        ArtefactError: It answers with another number of classes, or with what are no probabilities.
    """
    keras = load_keras()
    answers = tuple(model.output_shape)
    if answers != (None, classes):
        raise _unfit(source, f"gives {list(answers)}, and the images have {classes} classes")
    layers = keras.layers
    image = layers.Input((size, size, 1), name="image")
    x = image if model.input_shape[-1] == 1 else layers.Concatenate(name="colour")([image] * 3)
    logits = _gives_logits(model, size, source)
    if not logits and tuple(model.input_shape) == tuple(image.shape):
        return model
    x = model(x)
    if logits:
        x = layers.Softmax(name="probabilities")(x)
    return keras.Model(image, x, name=re.sub(r"[^A-Za-z0-9_]", "_", Path(source).stem) or "own")


def _gives_logits(model: Model, size: int, source: str) -> bool:
    """Look at a network's answers to noise, and at its last layer where they are no probabilities."""
    keras = load_keras()
    noise = np.random.default_rng(0).uniform(0, 255, (4, size, size, model.input_shape[-1]))
    answers = keras.ops.convert_to_numpy(model(noise.astype(np.float32), training=False))
    if (answers >= 0).all() and np.abs(answers.sum(axis=1) - 1).max() < 1e-3:
        return False
    activation = getattr(flat_layers(model)[-1], "activation", None)
    if activation not in (None, keras.activations.linear):
        raise _unfit(
            source, f"ends in {activation.__name__}, whose answers are no probabilities of one class each"
        )
    return True


def _form_of(model: Model) -> list[object]:
    """Return what has to be equal in two networks for one to stand for the other, whatever their weights."""
    layers = [
        (layer.name, type(layer).__name__, [tuple(weight.shape) for weight in layer.weights])
        for layer in model.layers
    ]
    ends = [getattr(model, end, None) for end in ("input_shape", "output_shape")]
    return [model.name, type(model).__name__, ends, layers]


def _structure(config: dict[str, Any]) -> object:
    """Return the form of a network in its configuration, with places for the layers' names."""
    if "layers" not in config:
        return _plain(config, {})
    rows = config["layers"]
    places = {row.get("name") or row["config"].get("name"): f"#{place}" for place, row in enumerate(rows)}
    layers = [
        [row["class_name"], _structure(row["config"]), _plain(row.get("inbound_nodes"), places)]
        for row in rows
    ]
    return [layers, _plain([config.get("input_layers"), config.get("output_layers")], places)]


def _plain(value: object, places: dict[str, str]) -> object:
    """Reduce a configuration to what a network does, as JSON; what is no value of JSON is left out."""
    if isinstance(value, dict):
        kept = {
            key: _plain(one, places) for key, one in value.items() if not _NOT_ITS_FORM.fullmatch(str(key))
        }
        return {str(key): one for key, one in kept.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(one, places) for one in value]
    if isinstance(value, str):
        return places.get(value, value)
    return value if isinstance(value, (bool, int, float)) else None
