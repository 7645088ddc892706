"""What every benchmark needs: progress, tables, bars, JSON files, and parts that survive an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from featherweight.engine.environment import describe
from featherweight.engine.store import digest, sources_digest
from featherweight.runtime import Target

T = TypeVar("T")

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_TTY_S, _LINE_S = 0.2, 15.0  # between two looks of a terminal, and between two lines of a log


class Shown:
    """Progress on standard error; also the ``Progress`` that featherweight's own functions take."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._spoke = 0.0
        self._open = False

    def note(self, message: str) -> None:
        """One line, with the time since the start."""
        self._close()
        print(f"[{time.monotonic() - self._start:6.1f} s] {message}", file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while a line says how far it is."""
        began = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if total:
                self.far(description, done / total, began)
        self._close()

    def far(self, description: str, fraction: float, began: float) -> None:
        """Say which fraction is done, now and then, with the time that is left."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._spoke < (_TTY_S if terminal else _LINE_S) or fraction <= 0:
            return
        self._spoke = now
        left = (now - began) * (1 - min(fraction, 1.0)) / fraction
        text = f"[{now - self._start:6.1f} s] {description}: {fraction:4.0%}, {left:.0f} s left"
        print(
            f"\r{text:<100}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True
        )
        self._open = terminal

    def _close(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, rows)])


@dataclass(frozen=True)
class Bar:
    """A number that the project promises, and whether this run kept it.

    Attributes:
        about: Which network or command.
        asked: The promise.
        seen: The number of this run, as text.
        kept: Whether it is within; None where it could not be measured.
    """

    about: str
    asked: str
    seen: str
    kept: bool | None

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "n/a "}[self.kept]
        return f"{word}  {self.about}: {self.asked}: {self.seen}"


def finish(
    name: str, rows: Sequence[Any], bars: Sequence[Bar], settings: dict[str, Any], threads: int
) -> None:
    """Print the bars and write ``results/NAME.json``."""
    print("\n" + "\n".join(map(str, bars)))
    result = {
        "benchmark": name,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings,
        "environment": describe(Target(threads=threads)).model_dump(mode="json"),
        "load_average": os.getloadavg(),
        "rows": list(rows),
        "bars": [asdict(bar) for bar in bars],
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=1))
    unfinished.replace(path)
    print(f"\nwritten: {os.path.relpath(path)}")


def tell_load(shown: Shown) -> None:
    """Warn when other work is running: medians and interleaving help, quiet helps more."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        shown.note(f"this machine is busy (load {load:.1f} on {cores} cores): expect noise")


class Parts:
    """Finished parts of a long benchmark: an interrupted run goes on, a finished one is forgotten.

    Args:
        name: Of the benchmark.
        settings: What a part depends on; with the package's and the benchmarks' sources, its key.
    """

    def __init__(self, name: str, settings: dict[str, Any], shown: Shown) -> None:
        sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(HERE.glob("*.py"))]
        key = digest(settings, sources_digest(), sources)
        self._folder = RESULTS / "parts" / name / key[:16]  # a quick run leaves those of a long one alone
        self._shown = shown

    def known(self, name: str) -> bool:
        """Whether an interrupted run left this part."""
        return (self._folder / f"{name}.json").is_file()

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The part as an interrupted run left it, else computed and kept."""
        path = self._folder / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            self._shown.note(f"{name}: measured before the interruption, at {kept['at']}")
            return kept["data"]
        data = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"at": time.strftime("%Y-%m-%d %H:%M:%S"), "data": data}
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(kept))
        unfinished.replace(path)
        return data

    def forget(self) -> None:
        """The benchmark came to its end."""
        shutil.rmtree(self._folder, ignore_errors=True)
