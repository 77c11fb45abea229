"""What a step of training takes: the paper's networks as they stand against the form that trains.

    python scripts/training_step.py [--batch 32] [--rounds 15]

Both forms of a network take turns, on the processors that the process may use. The images are noise; a step of the
``paper`` recipe: the gradient of every variable, and Adam.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
from turns import script_parser, time_in_turns

from edge_dsc.networks import ARCHITECTURES, build_network, load_keras, training_form
from edge_dsc.training.fit import seed_everything


def main() -> None:
    """Measure and print, milliseconds."""
    parser = script_parser(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    seed_everything(0)
    for architecture in ARCHITECTURES:
        whole, form = build_network(architecture, 3), training_form(build_network(architecture, 3))
        steps = {
            "as it stands": step_of(whole, options.batch),
            "form that trains": step_of(form, options.batch),
        }
        times = time_in_turns(steps, options.rounds, warm_up=3)
        wall = {name: [1e3 * one.wall for one in found] for name, found in times.items()}
        ratios = [after / before for before, after in zip(*wall.values(), strict=True)]
        medians = ", ".join(f"{name} {statistics.median(found):.0f} ms" for name, found in wall.items())
        low, _, high = statistics.quantiles(ratios, n=4)
        print(  # noqa: T201
            f"{architecture}: {medians}; ratio {statistics.median(ratios):.2f}, quartiles {low:.2f} to {high:.2f}"
        )


def step_of(model: object, batch: int) -> Callable[[], object]:
    """Return a call that trains a model by one step."""
    keras = load_keras()
    model.compile(keras.optimizers.Adam(1e-4), loss="categorical_crossentropy", jit_compile=False)  # type: ignore[attr-defined]
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 1)).astype(np.float32)
    targets = np.eye(3, dtype=np.float32)[np.arange(batch) % 3]
    return lambda: model.train_on_batch(images, targets)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
