"""The form of a paper network that trains: the same function of the same variables, quicker on a processor.

Where both networks are slow is their first layer, at the full 224 x 224 places: half of a step of training goes there.
The three colours that it sees are equal, so that only the sum of its kernel over them matters, and what stands between
its convolution and the pooling behind it can wait until three quarters of the places are gone. And Keras computes
BatchNorm in a dozen passes over the features, for which TensorFlow has one operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_dsc.networks.keras_files import load_keras
from engines.packages import load

if TYPE_CHECKING:
    from keras import Model

_SIDE = 3  # of the first kernel
# The layers between the colours and the first pooling.
_STEMS = {"cnn": ["stem"], "dsc": ["stem_pointwise", "stem_depthwise"]}


def training_form(model: Model) -> Model:
    """Return what is trained in place of a network: a model over the same variables, in the same order.

    It gives the same answers and gradients up to the order of sums; its images have no gradient.

    Args:
        model: A paper network (:func:`edge_dsc.networks.paper.build_paper_network`); any other is returned as it is.

    Returns:
        A ``keras.Model`` of the same input and output. Whatever trains it, trains the network; it is not for a file.
    """
    stem = _STEMS.get(model.name, [])
    names = ["image", "scale", "colour", *stem, "block1_pool"]
    if not stem or [layer.name for layer in model.layers[: len(names)]] != names:
        return model
    keras = load_keras()
    scaled = model.get_layer("scale")(model.input)
    x = _stem_layer([model.get_layer(name) for name in stem])(scaled)
    for layer in model.layers[len(names) :]:
        x = (_norm_layer(layer) if type(layer) is keras.layers.BatchNormalization else layer)(x)
    return keras.Model(model.input, x, name=model.name)


def _stem_layer(stem: list[Any]) -> Any:
    """Return a layer for all from the three colours to the first pooling.

    ReLU and a bias keep the order of values, so that the largest of four places is the same before and after them, to
    the bit; where ReLU gives zero to several, none of them has a gradient.
    """
    keras, tf = load_keras(), load("tensorflow")

    class Stem(keras.layers.Layer):  # type: ignore[misc, name-defined]
        """``float32 [N, 224, 224, 1]`` -> ``[N, 112, 112, 32]``."""

        def __init__(self) -> None:
            super().__init__(name="stem_and_pool")
            self.parts = stem

        def call(self, image: Any) -> Any:
            kernel = tf.reduce_sum(self.parts[0].kernel, axis=2, keepdims=True)
            if len(self.parts) == 2:  # pointwise without a bias, then depthwise
                kernel = tf.transpose(self.parts[1].kernel, (0, 1, 3, 2)) * kernel
            pooled = tf.nn.max_pool2d(_convolve(image, kernel), 2, 2, "VALID")
            return tf.nn.relu(tf.nn.bias_add(pooled, self.parts[-1].bias))

    return Stem()


def _norm_layer(norm: Any) -> Any:
    """Return a layer for a BatchNorm, in one operation.

    TensorFlow corrects the variance that it returns for the degree of freedom that the mean takes, Keras does not
    (tensorflow/core/kernels/fused_batch_norm_op.cc, ``rest_size_adjust``): the correction is taken back.
    """
    keras, tf = load_keras(), load("tensorflow")

    class Norm(keras.layers.Layer):  # type: ignore[misc, name-defined]
        """``float32 [N, height, width, channels]`` -> the same shape."""

        def __init__(self) -> None:
            super().__init__(name=f"{norm.name}_at_once")
            self.norm = norm

        def call(self, features: Any, training: bool = False) -> Any:
            moving = (self.norm.moving_mean, self.norm.moving_variance)
            known = (
                [tf.zeros(0), tf.zeros(0)] if training else moving
            )  # it wants none where it finds them itself
            answers, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=features,
                scale=self.norm.gamma,
                offset=self.norm.beta,
                mean=known[0],
                variance=known[1],
                epsilon=self.norm.epsilon,
                is_training=training,
            )
            if training:
                count = tf.cast(tf.reduce_prod(tf.shape(features)[:3]), variance.dtype)
                share = 1 - self.norm.momentum
                for variable, found in zip(moving, (mean, variance * (count - 1) / count), strict=True):
                    variable.assign(variable * self.norm.momentum + found * share)
            return answers

    return Norm()


def _convolve(image: Any, kernel: Any) -> Any:
    """Convolve one channel, with a gradient for the kernel that is one product of matrices for each image.

    oneDNN's own takes ten times as long for a kernel of one or three channels.
    """
    tf = load("tensorflow")

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def convolve(image: Any, kernel: Any) -> Any:
        def gradient(upstream: Any) -> tuple[None, Any]:
            count, (height, width), filters = tf.shape(image)[0], image.shape[1:3], kernel.shape[3]
            padded = tf.pad(image[..., 0], ((0, 0), (1, 1), (1, 1)))
            taps = [padded[:, y : y + height, x : x + width] for y in range(_SIDE) for x in range(_SIDE)]
            beside = tf.reshape(tf.stack(taps, axis=1), (count, _SIDE * _SIDE, height * width))
            products = tf.matmul(beside, tf.reshape(upstream, (count, height * width, filters)))
            return None, tf.reshape(tf.reduce_sum(products, axis=0), (_SIDE, _SIDE, 1, filters))

        return tf.nn.conv2d(image, kernel, 1, "SAME"), gradient

    return convolve(image, kernel)
