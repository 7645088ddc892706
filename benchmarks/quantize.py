"""Quantization in depth: ours beside the peers, few bits, what each method adds (``make bench-quantize``).

One network, one calibration set for each seed, one set of scored pictures for everyone. Eight bits run on the
real runtimes; fewer bits are simulated and say so. Nothing is asserted: the bars are printed, kept or not,
and losing rows stay. An interrupted run goes on part by part when it is started again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import calibration_memory
import quantize_bits
import quantize_int8
import quantize_layers
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import EFFICIENTNET
from quantize_bits import ABLATION, FEW_BITS, BitsSettings, Case
from quantize_int8 import Int8, Int8Settings
from quantize_recipes import Benches
from quantize_subjects import Subject, subject

from featherweight.engine.targets import fit_targets

Json = dict[str, Any]
TABLES = ("int8", "bits", "ablation", "layers", "memory")
EXAMPLES = ("resnet20", "depthwise")
_RUNTIMES = ("onnxruntime", "openvino", "litert", "executorch")


@dataclass(frozen=True)
class Settings:
    """What the parts depend on."""

    calibration: int
    scored: int | None
    seeds: tuple[int, ...]
    seconds: float
    iterations: int | None
    memory: tuple[int, ...]
    fit_minutes: tuple[float, ...]
    thorough: bool


class Benchmark:
    """All tables, one after the other.

    Args:
        settings: What the parts depend on.
        networks: Which of the networks.
        runtimes: For eight bits.
        folder: Takes what is made.
        shown: Progress.
    """

    def __init__(
        self, settings: Settings, networks: Sequence[str], runtimes: Sequence[str], folder: Path, shown: Shown
    ) -> None:
        self.settings, self.networks, self.runtimes, self.shown = settings, networks, runtimes, shown
        self.parts = Parts("quantize", asdict(settings), shown)
        self.benches = Benches(folder, shown)
        self.rows: dict[str, list[Json]] = {}
        self.bars: list[Bar] = []
        self._subjects: dict[str, Subject | None] = {}

    def subject(self, name: str) -> Subject | None:
        """A network with its data; None where a package cannot be had, which is told once."""
        if name not in self._subjects:
            try:
                scored = self.settings.scored
                work = RESULTS / "work" / "weights"
                self._subjects[name] = subject(name, work, self.settings.calibration, scored)
            except SystemExit as error:
                self.shown.note(f"{name} is left out: {error}")
                self.bars.append(Bar(name, "is measured", str(error), None))
                self._subjects[name] = None
        return self._subjects[name]

    def int8(self) -> None:
        """Eight bits through the runtimes."""
        one = self.subject(EFFICIENTNET) if EFFICIENTNET in self.networks else None
        if one is None:
            return
        rows: list[Json] = []
        for runtime in self.runtimes:
            seeds = self.settings.seeds
            fields = Int8Settings(
                self.settings.calibration,
                seeds if self.settings.thorough or runtime == self.runtimes[0] else seeds[:1],
                self.settings.seconds,
                self.settings.fit_minutes,
            )
            rows += Int8(one, runtime, fields, self.parts, self.benches, self.shown).rows()
        title = f"{one.name}, 8 bits, scored on {one.words}; others: {one.others_words}"
        print(f"\n{title}; mean and ends over so many calibration sets of {self.settings.calibration}")
        print(table(quantize_int8.HEADERS, quantize_int8.cells(rows)))
        self.rows["int8"], self.bars = rows, self.bars + quantize_int8.bars(rows)

    def bits(self) -> None:
        """Few bits, simulated."""
        self._cases("bits", FEW_BITS, "few bits, simulated on runtime torch")

    def ablation(self) -> None:
        """What each method adds."""
        self._cases("ablation", ABLATION, "what each method adds")

    def _cases(self, name: str, cases: Sequence[Case], title: str) -> None:
        settings, rows = self._bits_settings(), list[Json]()
        chosen = [case for case in cases if case.network in self.networks]
        for case in chosen:
            one = self.subject(case.network)
            if one is not None:
                rows += quantize_bits.rows_of(case, one, settings, self.parts, self.benches, self.shown)
        print(f"\n{title}; calibration sets of {settings.calibration}; what a bar is about over several")
        print(table(quantize_bits.HEADERS, quantize_bits.cells(rows)))
        for words in dict.fromkeys(f"{row['network']}: scored on {row['scored']}" for row in rows):
            print(words)
        self.rows[name], self.bars = rows, self.bars + quantize_bits.bars(chosen, rows)

    def _bits_settings(self) -> BitsSettings:
        return BitsSettings(
            self.settings.calibration,
            self.settings.seeds,
            self.settings.iterations,
            self.settings.thorough,
        )

    def layers(self) -> None:
        """GPTQ and AdaRound against nearest rounding, layer by layer."""
        rows: list[Json] = []
        for name in [name for name in EXAMPLES if name in self.networks]:
            one = self.subject(name)
            if one is not None:
                rows += quantize_layers.rows_of(one, self._bits_settings(), self.parts, self.benches)
        print("\nerror of each layer's output on calibration data / that of nearest rounding")
        print(table(quantize_layers.HEADERS, [quantize_layers.cells(row) for row in rows]))
        self.rows["layers"], self.bars = rows, self.bars + quantize_layers.bars(rows)

    def memory(self) -> None:
        """Peak memory of a whole recipe, by the number of calibration examples."""
        counts = self.settings.memory
        rows = [
            self.parts.get(
                f"memory-{count}",
                lambda count=count: calibration_memory.measured(
                    count, 1, self.shown, calibration_memory.WHOLE
                ),
            )
            for count in counts
        ]
        print(f"\npeak memory of {' -> '.join(calibration_memory.WHOLE)} with examples of a generator")
        print(table(calibration_memory.HEADERS, calibration_memory.cells(rows)))
        self.rows["memory"], self.bars = rows, self.bars + calibration_memory.bars(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--networks", nargs="+", choices=(EFFICIENTNET, *EXAMPLES))
    parser.add_argument("--runtimes", nargs="+", choices=_RUNTIMES, help="default: those that are installed")
    parser.add_argument("--calibration", type=int, default=100, help="examples (default 100)")
    parser.add_argument("--scored", type=int, help="examples (default 1,000 views, the full test set)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of calibration sets (0 1)")
    parser.add_argument("--seconds", type=float, default=15.0, help="longest timing of a group (default 15)")
    parser.add_argument(
        "--thorough", action="store_true", help="all seeds, recipes and iterations; fit in 5 and 30 minutes"
    )
    parser.add_argument("--quick", action="store_true", help="few examples: numbers mean little")
    args = parser.parse_args()
    settings = Settings(
        args.calibration,
        args.scored,
        tuple(args.seeds),
        args.seconds,
        None,
        (100, 400, 1600),
        (5.0, 30.0) if args.thorough else (),
        args.thorough,
    )
    if args.quick:
        settings = replace(settings, calibration=16, scored=args.scored or 40, seeds=(0,), seconds=4.0)
        settings = replace(settings, iterations=20, memory=(16, 64))
    shown = Shown()
    tell_load(shown)
    found = {target.runtime for target in fit_targets("any", 1, "local", "")}
    runtimes = args.runtimes or [name for name in _RUNTIMES if name in found]
    networks = args.networks or (EFFICIENTNET, *EXAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(settings, networks, runtimes, Path(folder), shown)
        made: dict[str, Callable[[], None]] = {name: getattr(benchmark, name) for name in TABLES}
        for number, name in enumerate(args.tables, 1):
            shown.note(f"table {number} of {len(args.tables)}: {name}")
            made[name]()
    described = {**asdict(settings), "runtimes": runtimes, "tables": args.tables, "cpus": os.cpu_count()}
    finish("quantize", [benchmark.rows], benchmark.bars, described, 1)
    benchmark.parts.forget()


if __name__ == "__main__":
    main()
