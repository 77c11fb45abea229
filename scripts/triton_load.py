"""A Triton server of this machine under several clients, against ``infer``'s loop over the same arrays in one process.

    python scripts/triton_load.py ENGINE [--clients 8] [--images 10000] [--rounds 5] [--pictures 1 8] [--instances N]
    python scripts/triton_load.py ENGINE --fall

The server has the Python backend with our runner, one copy for each processor. The clients are threads with a
connection each: a request of ``--pictures``, the next as soon as the answer is there. One picture is what a client
sends that has no more; the engine's best batch is what ``infer --server`` sends. All sides take turns on the same
prepared arrays; ratios are taken within a round. Every answer is held against this machine's, bit for bit. Where
``/proc`` is, the processor time of each picture is told apart: in this process, which is the clients, in the server,
and in its copies of the model. With ``--fall`` the server is killed at the middle of the requests and started again;
each request must end in an answer or in an error that says so.
"""

from __future__ import annotations

import itertools
import os
import resource
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
    images: int
    rounds: int
    sizes: tuple[int, ...]

    def model(self, port: int) -> ServedModel:
        """Return the model's address on a port of this machine."""
        return parse_server(f"grpc://127.0.0.1:{port}/{self.name}")


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--images", type=int, default=10_000, help="of each size of request, all rounds together"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, nargs="+", help="in a request; default: 1 and the best batch")
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
            clients=options.clients, images=options.images, rounds=options.rounds,
            sizes=tuple(options.pictures or sorted({1, runner.record.batch.best})),
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
    """Threads that send one request after the other; each is counted once, by what became of it."""

    def __init__(self, test: LoadTest, port: int, size: int) -> None:
        """Connect them; ``size`` is the pictures of a request."""
        self._runners = [ServedRunner(test.model(port), patience_s=LONGEST_S) for _ in range(test.clients)]
        starts = range(0, len(test.pixels) - size + 1, size)
        self._given = [(test.pixels[at : at + size], test.expected[at : at + size]) for at in starts]
        self.size = size
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
                self._ask_once(runner, *self._given[number % len(self._given)])

        with ThreadPoolExecutor(len(self._runners)) as pool:
            list(pool.map(ask, self._runners))
        return time.perf_counter() - started

    def _next(self, numbers: Iterator[int]) -> int | None:
        with self._lock:
            return next(numbers, None)

    def _ask_once(self, runner: ServedRunner, pixels: InputPixels, expected: NDArray[np.float32]) -> None:
        start = time.perf_counter_ns()
        try:
            outcome = "answered" if runner.run(pixels).tobytes() == expected.tobytes() else "wrong"
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
            f"{requests} requests of {self.size}: {self.outcomes['answered']} answered as here bit for bit, "
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


class Work:
    """Processor time, seconds, of this process, of the server and of its copies of models, since it was last asked."""

    def __init__(self, server: int) -> None:
        """Begin; ``server`` is the process that leads the server's group."""
        self._server, self._before = server, (0.0, 0.0, 0.0)
        self.take()

    def take(self) -> tuple[float, float, float]:
        """Return it; zeros for what cannot be seen here."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        server = models = 0.0
        for place in Path("/proc").glob("[0-9]*/stat"):
            try:
                number, _, rest = place.read_text().partition(" (")
            except OSError:  # it has just ended
                continue
            fields = rest.rpartition(") ")[2].split()
            if int(fields[2]) != self._server:
                continue
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            if int(number) == self._server:
                server += seconds
            else:
                models += seconds
        now = (own.ru_utime + own.ru_stime, server, models)
        spent = tuple(after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return spent[0], spent[1], spent[2]


def take_turns(test: LoadTest) -> None:
    """Let all sides work in turns and print rates and ratios."""
    server = start_triton(test.server)
    sides = [Clients(test, server.grpc, size) for size in test.sizes]
    part = max(1, test.images // test.rounds)
    counts = {clients.size: max(1, part // clients.size) for clients in sides}
    rates: dict[int, list[float]] = {size: [] for size in (0, *counts)}  # 0 is infer in this process
    spent = {size: np.zeros(3) for size in rates}
    work = Work(server.process.pid)
    try:
        for clients in sides:
            clients.run(min(200, counts[clients.size]))  # warm: connections, the server's memory
            clients.outcomes.clear()
            clients.latencies.clear()
        for turn in range(test.rounds):
            for side in [None, *sides] if turn % 2 else [*reversed(sides), None]:
                work.take()
                if side is None:
                    rates[0].append(here(test.runner, test.pixels, part))
                    spent[0] += work.take()
                    continue
                count = counts[side.size]
                rates[side.size].append(side.size * count / side.run(count))
                spent[side.size] += work.take()
            words = ", ".join(f"{rates[size][-1]:.1f} by {size}" for size in counts)
            say(f"round {turn + 1}: server {words} a request; infer {rates[0][-1]:.1f} images/s")
        for clients in sides:
            clients.report(counts[clients.size] * test.rounds)
    finally:
        for clients in sides:
            clients.close()
        server.stop()
    for size, count in counts.items():
        each = spent[size] * 1e3 / (size * count * test.rounds)
        ratio = statistics.median(there / local for there, local in zip(rates[size], rates[0], strict=True))
        say(
            f"{test.clients} clients, {size} pictures a request: {statistics.median(rates[size]):.1f} images/s, "
            f"infer in one process {statistics.median(rates[0]):.1f}; median of the rounds' ratios {ratio:.3f}; "
            f"processor time of a picture: clients {each[0]:.2f}, server {each[1]:.2f}, models {each[2]:.2f} ms, "
            f"infer {spent[0][0] * 1e3 / (part * test.rounds):.2f} ms"
        )


def fall(test: LoadTest) -> None:
    """Kill the server at the middle, start it again, and print what became of every request."""
    server = start_triton(test.server)
    clients = Clients(test, server.grpc, test.sizes[0])
    requests = test.images // clients.size
    running, away = [server], []

    def middle() -> None:
        began = time.perf_counter()
        running[0].stop(kill=True)
        running[0] = start_triton(replace(test.server, grpc=server.grpc))
        away.append(time.perf_counter() - began)

    try:
        seconds = clients.run(requests, middle)
        say(f"killed at request {requests // 2}, back after {away[0]:.1f} s; {seconds:.1f} s in all")
        clients.report(requests)
    finally:
        clients.close()
        running[0].stop()


if __name__ == "__main__":
    main()
