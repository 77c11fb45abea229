"""A Triton server of this machine under several clients, against ``infer``'s loop over the same arrays in one process.

    python scripts/triton_load.py ENGINE [--clients 8] [--requests 10000] [--rounds 5] [--instances N]
    python scripts/triton_load.py ENGINE --fall

The server has the Python backend with our runner, one copy for each processor. The clients are threads with a
connection each: one picture a request, the next as soon as the answer is there. Both sides take turns on the same
prepared arrays; ratios are taken within a round. Every answer is held against this machine's, bit for bit. With
``--fall`` the server is killed at the middle of the requests and started again; each request must end in an answer or
in an error that says so.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from turns import script_parser

from bench.report import as_samples
from bench.statistics import tail
from edge_dsc.deploy.triton import ServerRequest, TritonRequest, start_triton, write_repository
from edge_dsc.infer.classify import Prepared, classify
from edge_dsc.infer.served import ServedModel, ServedRunner, parse_server
from engines.errors import UnansweredError
from engines.images import InputPixels, usable_processors
from engines.runtimes import Runner, open_engine

PICTURES = 256  # different ones, gone through again and again
LONGEST_S = 60.0  # a server that is away for longer is a failure of the measurement


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """What both sides work on."""

    server: ServerRequest
    name: str
    runner: Runner
    pixels: InputPixels
    expected: NDArray[np.float32]
    clients: int
    requests: int
    rounds: int

    def model(self, port: int) -> ServedModel:
        """Return the model's address on a port of this machine."""
        return parse_server(f"grpc://127.0.0.1:{port}/{self.name}")


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instances", type=int, default=usable_processors())
    parser.add_argument("--queue-delay", type=int, default=0, help="microseconds")
    parser.add_argument("--fall", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_engine(options.engine) as runner:
        repository = Path(folder, "repository")
        made = write_repository(
            TritonRequest(
                engines=[options.engine], out=repository, backend="python", instances=options.instances,
                queue_delay_us=options.queue_delay, front=False,
            )
        )  # fmt: skip
        shape = (PICTURES, *runner.record.contract.input_shape)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        test = LoadTest(
            server=ServerRequest(repository=repository, work=Path(folder, "work")), name=made.models[0].name,
            runner=runner, pixels=pixels, expected=np.concatenate([runner.run(one[None]) for one in pixels]),
            clients=options.clients, requests=options.requests, rounds=options.rounds,
        )  # fmt: skip
        (fall if options.fall else take_turns)(test)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)  # noqa: T201


def here(runner: Runner, pixels: InputPixels, requests: int) -> float:
    """Return the pictures a second of ``infer``'s loop over arrays that are ready."""
    ready = [Prepared("", picture, 0.0) for picture in pixels]
    items = itertools.islice(itertools.cycle(ready), requests)
    started = time.perf_counter()
    answered = sum(1 for _ in classify(items, lambda item: item, runner, threads=usable_processors()))
    assert answered == requests
    return requests / (time.perf_counter() - started)


class Clients:
    """Threads that ask for one picture after the other; each request is counted once, by what became of it."""

    def __init__(
        self, model: ServedModel, count: int, pixels: InputPixels, expected: NDArray[np.float32]
    ) -> None:
        """Connect ``count`` clients."""
        self._runners = [ServedRunner(model, patience_s=LONGEST_S) for _ in range(count)]
        self._pixels, self._expected = pixels, expected
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[int] = []
        self.errors: Counter[str] = Counter()

    def run(self, requests: int, middle: Callable[[], None] | None = None) -> float:
        """Send requests and return the seconds that all took; ``middle`` is called before the one in the middle."""
        numbers = iter(range(requests))
        started = time.perf_counter()

        def ask(runner: ServedRunner) -> None:
            while (number := self._next(numbers)) is not None:
                if middle is not None and number == requests // 2:
                    middle()
                self._ask_once(runner, number % len(self._pixels))

        with ThreadPoolExecutor(len(self._runners)) as pool:
            list(pool.map(ask, self._runners))
        return time.perf_counter() - started

    def _next(self, numbers: Iterator[int]) -> int | None:
        with self._lock:
            return next(numbers, None)

    def _ask_once(self, runner: ServedRunner, index: int) -> None:
        start = time.perf_counter_ns()
        try:
            answer = runner.run(self._pixels[index : index + 1])
            outcome = "answered" if answer.tobytes() == self._expected[index].tobytes() else "wrong"
        except UnansweredError as error:
            outcome = "error"
            self.errors[error.what] += 1
        taken = time.perf_counter_ns() - start
        with self._lock:
            self.outcomes[outcome] += 1
            if outcome != "error":
                self.latencies.append(taken)

    def report(self, requests: int) -> None:
        """Print what became of the requests, and the latencies of those that were answered."""
        lost = requests - sum(self.outcomes.values())
        say(
            f"{requests} requests: {self.outcomes['answered']} answered as here bit for bit, "
            f"{self.outcomes['wrong']} otherwise, {self.outcomes['error']} errors, {lost} lost"
        )
        samples = as_samples(sorted(self.latencies))
        tails = [(name, tail(samples, name)) for name in (50.0, 99.0)]
        words = [f"p{name:g} {found.value / 1e6:.2f} ms" for name, found in tails if found is not None]
        say(
            f"latency of a request: {', '.join(words)}, max {samples[-1] / 1e6:.2f} ms ({len(samples)} samples)"
        )
        for words_of, count in self.errors.most_common(3):
            say(f"  {count} x {words_of}")

    def close(self) -> None:
        """Disconnect."""
        for runner in self._runners:
            runner.close()


def take_turns(test: LoadTest) -> None:
    """Let both sides work in turns and print rates and ratios."""
    server = start_triton(test.server)
    clients = Clients(test.model(server.grpc), test.clients, test.pixels, test.expected)
    part = max(1, test.requests // test.rounds)
    ratios, rates = [], []
    try:
        clients.run(min(500, part))  # warm: connections, the server's memory
        clients.outcomes.clear()
        clients.latencies.clear()
        for turn in range(test.rounds):
            if turn % 2:
                there = part / clients.run(part)
                local = here(test.runner, test.pixels, part)
            else:
                local = here(test.runner, test.pixels, part)
                there = part / clients.run(part)
            ratios.append(there / local)
            rates.append((there, local))
            say(f"round {turn + 1}: server {there:.1f}, infer {local:.1f} images/s, ratio {ratios[-1]:.3f}")
        clients.report(part * test.rounds)
    finally:
        clients.close()
        server.stop()
    there, local = (statistics.median(column) for column in zip(*rates, strict=True))
    say(
        f"{test.clients} clients: {there:.1f} images/s, infer in one process {local:.1f}; "
        f"median of the rounds' ratios {statistics.median(ratios):.3f}"
    )


def fall(test: LoadTest) -> None:
    """Kill the server at the middle, start it again, and print what became of every request."""
    server = start_triton(test.server)
    clients = Clients(test.model(server.grpc), test.clients, test.pixels, test.expected)
    running, away = [server], []

    def middle() -> None:
        began = time.perf_counter()
        running[0].stop(kill=True)
        running[0] = start_triton(replace(test.server, grpc=server.grpc))
        away.append(time.perf_counter() - began)

    try:
        seconds = clients.run(test.requests, middle)
        say(f"killed at request {test.requests // 2}, back after {away[0]:.1f} s; {seconds:.1f} s in all")
        clients.report(test.requests)
    finally:
        clients.close()
        running[0].stop()


if __name__ == "__main__":
    main()
