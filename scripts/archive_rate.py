"""Measure ``infer --ray`` on this machine: its rate against ``infer``, an actor killed half-way, a million files.

    python scripts/archive_rate.py ENGINE ORIGINALS --files 5000 --kill
    python scripts/archive_rate.py ENGINE ORIGINALS --files 5000 --smaller 1000

The files are links to the originals, again and again, so that an archive of any size costs no space. Both ways go over
the same files, in turns; a round's rates count the whole command, start included, and the loop alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet

from edge_dsc.cli.console import give
from edge_dsc.infer.archive import ArchiveRequest, ArchiveSummary, classify_archive
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.infer.source import expand_source
from engines.images import usable_processors

MILLION = 1_000_000


def main() -> None:
    """Run the rounds that were asked for and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("originals")
    parser.add_argument("--files", type=int, default=5000, help="size of the archive")
    parser.add_argument(
        "--smaller", type=int, default=0, help="a second size, to extrapolate to a million files"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true", help="kill an actor half-way in one more run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archive-") as place:
        root = Path(place)
        folder = link_files(root / "files", options.originals, options.files)
        rates = [
            measure_round(options.engine, folder, root / str(number)) for number in range(options.rounds)
        ]
        ratios = [ray / infer for ray, infer, _ in rates]
        give(f"{options.files} files, {options.rounds} rounds in turns")
        give(f"infer:       {statistics.median(rate[1] for rate in rates):8.1f} images/s")
        give(f"infer --ray: {statistics.median(rate[0] for rate in rates):8.1f} images/s without its start")
        give(f"ratio:       {statistics.median(ratios):8.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        give(f"start:       {statistics.median(rate[2] for rate in rates):8.1f} s")
        if options.smaller:
            small = link_files(root / "fewer", options.originals, options.smaller)
            extrapolate(options.engine, {options.smaller: small, options.files: folder}, root)
        if options.kill:
            give(kill_one(options.engine, folder, root / "killed.parquet"))


def link_files(folder: Path, originals: str, count: int) -> Path:
    """Make a folder of links to the originals, the first one again after the last."""
    folder.mkdir()
    for index, path in enumerate(itertools.islice(itertools.cycle(expand_source(originals)), count)):
        (folder / f"{index:07}{path.suffix}").symlink_to(path.absolute())
    return folder


def measure_round(engine: Path, folder: Path, place: Path) -> tuple[float, float, float]:
    """Return the rates of both ways, images per second, and the seconds until Ray had its first batch."""
    place.mkdir()
    archive = run_archive(engine, folder, place / "rows.parquet")
    request = InferRequest(
        engine=engine, source=str(folder), out=place / "rows.csv", threads=usable_processors()
    )
    alone = infer_source(request)
    return (
        (archive.answered + archive.failed) / archive.seconds,
        (alone.answered + alone.failed) / alone.seconds,
        archive.start_seconds,
    )


def run_archive(
    engine: Path, folder: Path, out: Path, progress: Callable[[str, int, int], None] | None = None
) -> ArchiveSummary:
    """Classify a folder on a Ray of this machine."""
    return classify_archive(
        ArchiveRequest(engine=engine, source=str(folder), out=str(out)), progress=progress
    )


def extrapolate(engine: Path, folders: dict[int, Path], root: Path) -> None:
    """Print what a million files would take: a start, and a cost per file, from the whole times of two sizes."""
    seconds = {}
    for size, folder in folders.items():
        started = time.perf_counter()
        run_archive(engine, folder, root / f"{size}-whole.parquet")
        seconds[size] = time.perf_counter() - started
    (few, short), (many, long) = sorted(seconds.items())
    each = (long - short) / (many - few)
    start = short - few * each
    give(f"whole command: {few} files {short:.1f} s, {many} files {long:.1f} s")
    give(
        f"so {start:.1f} s and {each * 1e3:.2f} ms a file: a million files {(start + MILLION * each) / 3600:.2f} h"
    )


def kill_one(engine: Path, folder: Path, out: Path) -> str:
    """Kill an actor when half of the files are done, and say whether every file has exactly one row."""
    killed: list[int] = []

    def kill(phase: str, done: int, total: int) -> None:
        if not killed and done * 2 >= total:
            killed.append(actor_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    run_archive(engine, folder, out, kill)
    rows = Counter(pyarrow.parquet.read_table(out, columns=["path"]).column("path").to_pylist())
    expected = {str(path) for path in expand_source(str(folder))}
    right = set(rows) == expected and set(rows.values()) == {1}
    return f"actor {killed} killed: {sum(rows.values())} rows of {len(rows)} files, each file exactly one: {right}"


def actor_processes() -> list[int]:
    """Return the processes of actors that this process' Ray started."""
    parents: dict[int, int] = {}
    actors = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The second field is the name in brackets, which may hold anything.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                if (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                    actors.append(int(entry.name))

    def ours(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return sorted(filter(ours, actors))


if __name__ == "__main__":
    main()
