"""BEGAN with depthwise separable convolutions, and the conventional one: the networks, one step, balance and measure.

The discriminator is an autoencoder. It learns to rebuild real images and to fail on the generator's; the generator
learns to make what the discriminator rebuilds. The balance k keeps one from running away from the other.

Source: Berthelot, Schumm and Metz, Boundary Equilibrium Generative Adversarial Networks, arXiv 1703.10717 (2017).
The separable form: Iklima, Kadarina and Ihsanto, IJECE 12(5), 2022, doi 10.11591/ijece.v12i5.pp5444-5454, which gives
no layers; what is separable here is this project's reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_dsc.networks import load_keras
from engines.packages import load

if TYPE_CHECKING:
    from keras import KerasTensor, Model, Variable
    from keras.optimizers import Optimizer

DEPTHWISE = "depthwise-began"
CONVENTIONAL = "began"
ARCHITECTURES = (DEPTHWISE, CONVENTIONAL)
SIZES = (64, 128, 224)
_SMALLEST_MAP = 8  # pixels a side: images are halved until they have no more
_BETA = 0.5  # Adam's first moment; 0.9 lets the two networks swing


@dataclass(frozen=True, kw_only=True)
class Began:
    """What decides the two networks and how they learn.

    Attributes:
        architecture: One of :data:`ARCHITECTURES`.
        size: Height and width of the images.
        filters: Channels of the generator, and of the encoder's first level.
        latent: Numbers that an image is made of, and that the autoencoder squeezes one into.
        gamma: The diversity ratio, L(G(z)) / L(x) at equilibrium; lower gives sharper and more similar images.
        balance_rate: lambda_k, the step of the balance.
        learning_rate: Adam's, of both networks, before it is halved.
        batch: Real images in each step, and generated ones.
        steps: In each epoch. A class of few images would have epochs of two or three.
        averaging: Share that the moving average of the generator's weights keeps in each step.
    """

    architecture: str = DEPTHWISE
    size: int = 64
    filters: int = 32
    latent: int = 64
    gamma: float = 0.5
    balance_rate: float = 0.001
    learning_rate: float = 4e-4
    batch: int = 16
    steps: int = 50
    averaging: float = 0.99

    @property
    def levels(self) -> int:
        """How often an image is halved: 64 to 8, 128 to 8, 224 to 7."""
        side, levels = self.size, 0
        while side > _SMALLEST_MAP:
            side, levels = side // 2, levels + 1
        return levels


def next_balance(balance: float, real: float, fake: float, began: Began) -> float:
    """Return k of the next step: k + lambda_k (gamma L(x) - L(G(z))), held in [0, 1].

    Args:
        balance: k of this step.
        real: L(x), mean absolute error of the real images rebuilt.
        fake: L(G(z)), that of the generated ones.
        began: gamma and lambda_k.

    Source: Berthelot et al. (2017), section 3.4.
    """
    return min(max(balance + began.balance_rate * (began.gamma * real - fake), 0.0), 1.0)


def convergence(real: float, fake: float, began: Began) -> float:
    """Return the measure of convergence M = L(x) + abs(gamma L(x) - L(G(z))); lower is better.

    Source: Berthelot et al. (2017), section 3.4.1.
    """
    return real + abs(began.gamma * real - fake)


def build_generator(began: Began) -> Model:
    """Build a generator: ``float32 [N, latent]`` from -1 to 1 to images ``[N, size, size, 1]``, about -1 to 1."""
    keras = load_keras()
    latent = keras.layers.Input((began.latent,), name="latent")
    return keras.Model(latent, _decode(latent, began), name="generator")


def build_discriminator(began: Began) -> Model:
    """Build a discriminator: an autoencoder of images ``float32 [N, size, size, 1]``.

    The encoder has two convolutions at each level, of ``filters`` times 1, 2, 3 and so on, the second one with stride 2
    into the next; its decoder is built as the generator is. In the separable form every convolution but the first, of
    one channel, and the last, to one channel, is separable: there a separable one would cost more.
    """
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((began.size, began.size, 1), name="image")
    x = layers.Conv2D(began.filters, 3, padding="same", activation="elu")(image)
    for level in range(1, began.levels + 1):
        x = _convolve(x, began, began.filters * level)
        x = _convolve(x, began, began.filters * (level + 1), strides=2)
    x = layers.Flatten()(x)
    x = layers.Dense(began.latent, name="code")(x)
    return keras.Model(image, _decode(x, began), name="discriminator")


def _decode(x: KerasTensor, began: Began) -> KerasTensor:
    """Return an image made of numbers ``[N, latent]``: two convolutions at each level, then twice the side."""
    layers = load_keras().layers
    side = began.size >> began.levels
    x = layers.Dense(side * side * began.filters)(x)
    x = layers.Reshape((side, side, began.filters))(x)
    for level in range(began.levels + 1):
        if level:
            x = layers.UpSampling2D(2, interpolation="nearest")(x)
        x = _convolve(x, began, began.filters)
        x = _convolve(x, began, began.filters)
    return layers.Conv2D(1, 3, padding="same", name="pixels")(x)


def _convolve(x: KerasTensor, began: Began, filters: int, strides: int = 1) -> KerasTensor:
    layers = load_keras().layers
    kind = layers.SeparableConv2D if began.architecture == DEPTHWISE else layers.Conv2D
    return kind(filters, 3, strides=strides, padding="same", activation="elu")(x)


class BeganPair:
    """A generator, its moving average, and the discriminator, with their optimizers and one compiled step.

    Attributes:
        began: What decides them.
        generator: The one that learns.
        average: The one that is kept: each weight the moving average of the generator's.
        discriminator: The autoencoder.
    """

    def __init__(self, began: Began) -> None:
        """Build everything; Keras' seed decides the first weights."""
        keras = load_keras()
        self.began = began
        self.generator, self.discriminator = build_generator(began), build_discriminator(began)
        self.average = build_generator(began)
        self.average.set_weights(self.generator.get_weights())
        self._optimizers: list[Optimizer] = []
        for model in (self.generator, self.discriminator):
            optimizer = keras.optimizers.Adam(began.learning_rate, beta_1=_BETA)
            optimizer.build(model.trainable_variables)
            self._optimizers.append(optimizer)
        self._compiled = self._compile()

    @property
    def variables(self) -> list[Variable]:
        """All weights: of the generator, its average and the discriminator."""
        return [*self.generator.variables, *self.average.variables, *self.discriminator.variables]

    @property
    def optimizer_variables(self) -> list[Variable]:
        """All variables of both optimizers."""
        return [variable for optimizer in self._optimizers for variable in optimizer.variables]

    @property
    def learning_rate(self) -> float:
        """The learning rate of both networks."""
        return float(self._optimizers[0].learning_rate)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of both networks."""
        for optimizer in self._optimizers:
            optimizer.learning_rate = rate

    def step(
        self, real: NDArray[np.float32], latent: NDArray[np.float32], balance: float
    ) -> tuple[float, float]:
        """Move both networks once.

        Both gradients are taken at the same weights and of the same generated images, so that these pass once.

        Args:
            real: Images ``[B, size, size, 1]``, -1 to 1.
            latent: What the generated images are made of, ``[B, latent]``.
            balance: k.

        Returns:
            L(x) and L(G(z)) before the move.
        """
        found = self._compiled(real, latent, np.float32(balance))
        return float(found[0]), float(found[1])

    def _compile(self) -> Callable[..., Sequence[Any]]:
        tensorflow = load("tensorflow")
        generator, discriminator, average = self.generator, self.discriminator, self.average
        of_generator, of_discriminator = self._optimizers
        keep = self.began.averaging

        def rebuild_error(images: Any) -> Any:
            return tensorflow.reduce_mean(tensorflow.abs(images - discriminator(images, training=True)))

        def values(model: Model) -> list[Any]:
            return [variable.value for variable in model.trainable_variables]

        def step(real: Any, latent: Any, balance: Any) -> tuple[Any, Any]:
            with tensorflow.GradientTape() as tape:
                loss_real = rebuild_error(real)
            from_real = tape.gradient(loss_real, values(discriminator))
            with tensorflow.GradientTape() as tape:
                loss_fake = rebuild_error(generator(latent, training=True))
            from_fake, upwards = tape.gradient(loss_fake, (values(discriminator), values(generator)))
            # L_D = L(x) - k L(G(z)); L_G = L(G(z)).
            downwards = [one - balance * other for one, other in zip(from_real, from_fake, strict=True)]
            of_discriminator.apply(downwards, discriminator.trainable_variables)
            of_generator.apply(upwards, generator.trainable_variables)
            for kept, weight in zip(values(average), values(generator), strict=True):
                kept.assign(keep * kept + (1 - keep) * weight)
            return loss_real, loss_fake

        return tensorflow.function(step, jit_compile=False)  # type: ignore[no-any-return]


def draw_latent(seed: Sequence[int], count: int, began: Began) -> NDArray[np.float32]:
    """Draw what images are made of: ``[count, latent]``, uniform from -1 to 1, the same for the same seed."""
    drawn = np.random.default_rng(seed).uniform(-1, 1, (count, began.latent))
    return drawn.astype(np.float32)
