"""Weight sharing: what palettes of 2 to 6 bits cost, by where k-means begins and who shares; and integers.

ResNet-20 of the examples on the test images of Fashion-MNIST. Palettes are measured through ONNX Runtime,
whose file holds the shared values as floats, and simulated; integers of as few bits have no kernel there and
are simulated alone. Nothing is trained in the first table: ``nearest`` is the nearest value, ``rounded`` is
GPTQ on the palette and corrected biases. The second has one epoch of ``finetune``, taught by the original.
Nothing is asserted; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Parts, Shown, finish, table, tell_load
from fine_tuned import AUGMENT, run_of

from featherweight.engine.run import Run
from featherweight.formats import TensorFormat
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.recipe import Recipe, Step
from featherweight.tools.simulate import as_run, simulate

Json = dict[str, Any]
_BATCH = 250


@dataclass(frozen=True)
class Settings:
    """What the parts depend on.

    Attributes:
        bits: Of the codes.
        scored: Test images.
        examples: Training images of the second table.
        every: Whether each of the starts is rounded, too; else only the best one.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6)
    scored: int = 10_000
    examples: int = 10_000
    every: bool = True


@dataclass(frozen=True)
class Way:
    """How weights become few values.

    Attributes:
        name: In words.
        method: Of the step.
        settings: Of the method, but for the bits.
        measured: Whether ONNX Runtime stores it.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    measured: bool = True

    def step(self, bits: int) -> Step:
        """The step of a recipe."""
        if self.method == "quantize":
            return Step("quantize", {"weights": f"int{bits}", "activations": "none", **self.settings})
        if self.name == _AUTO:
            return Step("cluster", {"bits": "auto", "mean_bits": bits + 0.1, **self.settings})
        return Step("cluster", {"bits": bits, **self.settings})


_AUTO = "bits of each layer (mean)"
_BEST = "optimal"
WAYS = (
    Way("linear", "cluster", {"init": "linear"}),
    Way("density", "cluster", {"init": "density"}),
    Way("k-means++", "cluster", {"init": "kmeans++"}),
    Way(_BEST, "cluster", {}),
    Way("groups of 16 channels", "cluster", {"granularity": "per_group", "group": 16}),
    Way("one codebook for all layers", "cluster", {"granularity": "shared"}),
    Way(_AUTO, "cluster", {}),
    Way("integers per tensor", "quantize", {"granularity": "per_tensor"}, measured=False),
    Way("integers per channel", "quantize", {"granularity": "per_channel"}, measured=False),
)
TRAINED = (_BEST, "groups of 16 channels", "one codebook for all layers")


class Bench:
    """The network on one runtime, and what its recipes score.

    Args:
        settings: Of the run.
        folder: Takes the store.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self._folder = folder
        self._runs: dict[str, Run] = {}

    def run(self, measured: bool) -> Run:
        """ONNX Runtime's, or the one that simulates."""
        name = "onnxruntime" if measured else "torch"
        if name not in self._runs:
            self._runs[name] = run_of("resnet20", self.settings.examples, self._folder / name, runtime=name)
        return self._runs[name]

    def scored(self, model: Model, measured: bool) -> Json:
        """Percent of the test images: of the file that runs, and simulated."""
        found = {"simulated": self._accuracy(as_run(simulate(model)))}
        if measured:
            run = self.run(True)
            session = find_runtime("onnxruntime").open(run.lower(model), run.target)
            found["measured"] = self._accuracy(session)
        return found

    def _accuracy(self, call: Any) -> float:
        scored = self.run(True).data.scored
        assert scored is not None
        assert scored.targets is not None
        right = 0
        for start in range(0, self.settings.scored, _BATCH):
            picks = np.arange(start, min(start + _BATCH, self.settings.scored))
            right += int((call(scored.take(picks)[0])[0].argmax(1) == scored.targets[picks]).sum())
        return 100 * right / self.settings.scored

    def row(self, way: Way, bits: int, more: Sequence[Step], words: str) -> Json:
        """What one recipe makes and scores."""
        run = self.run(way.measured)
        model = run.apply(Recipe((Step("fold"), way.step(bits), *more)))
        return {
            "bits": bits,
            "way": way.name,
            "then": words,
            "stored_bits": stored_bits(model),
            **self.scored(model, way.measured),
        }


def stored_bits(model: Model) -> float:
    """Bits of a weight that has a format: codes, codebooks and scales, before entropy coding."""
    last: dict[str, TensorFormat] = {name: chain[-1] for name, chain in model.formats.items()}
    sizes = {name: model.parameters[name].numel() for name in last if name in model.parameters}
    return 8 * sum(last[name].stored_bytes(size) for name, size in sizes.items()) / sum(sizes.values())


def rows_of(bench: Bench, parts: Parts, shown: Shown) -> list[Json]:
    """Both tables."""
    settings, rows = bench.settings, []
    tuned = Step("finetune", {"epochs": 1, "teacher": "original", "augment": AUGMENT})
    jobs: list[tuple[Way, int, tuple[Step, ...], str]] = []
    for bits in settings.bits:
        for way in WAYS:
            jobs.append((way, bits, (), "nearest"))
            if settings.every or way.name not in ("linear", "density", "k-means++"):
                jobs.append((way, bits, (Step("rounding"),), "rounded"))
    for bits in settings.bits[:2] if settings.every else settings.bits[:1]:
        for way in WAYS:
            if way.name in TRAINED and (settings.every or way.name == _BEST):
                jobs.append((way, bits, (tuned,), "trained"))
                jobs.append((way, bits, (Step("rounding"), tuned), "rounded, trained"))
    for way, bits, more, words in shown.track(jobs, "recipes", len(jobs)):
        name = "".join(c if c.isalnum() else "-" for c in f"{way.name}-{bits}-{words}")
        made = parts.get(name, partial(bench.row, way, bits, more, words))
        shown.note(f"{bits} bits, {way.name}, {words}: {made.get('measured', made['simulated']):.2f} %")
        rows.append(made)
    return rows


HEADERS = ("bits", "values", "stored", "nearest", "simulated", "rounded", "simulated")
TRAINED_HEADERS = ("bits", "values", "stored", "nearest", "trained", "rounded", "rounded, trained")


def cells(rows: Sequence[Json], original: float, trained: bool) -> list[tuple[str, ...]]:
    """Drops in points, one line for each bits and way."""
    lines = []
    for key in dict.fromkeys((row["bits"], row["way"]) for row in rows):
        found = {row["then"]: row for row in rows if (row["bits"], row["way"]) == key}
        if trained and "trained" not in found:
            continue

        def drop(then: str, how: str, found: Mapping[str, Json] = found) -> str:
            seen = found.get(then, {}).get(how)
            return "" if seen is None else f"{original - seen:+.2f}"

        head = (f"{key[0]}", key[1], f"{found['nearest']['stored_bits']:.2f}")
        if trained:
            names = ("nearest", "trained", "rounded", "rounded, trained")
            lines.append((*head, *(drop(name, "measured") for name in names)))
        else:
            pairs = [(then, how) for then in ("nearest", "rounded") for how in ("measured", "simulated")]
            lines.append((*head, *(drop(*pair) for pair in pairs)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 and 4 bits, 2,000 images, few rows")
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4, 5, 6), choices=(2, 3, 4, 5, 6))
    args = parser.parse_args()
    torch.set_num_threads(1)
    shown = Shown()
    tell_load(shown)
    settings = Settings((2, 4), 2000, 2000, every=False) if args.quick else Settings(tuple(args.bits))
    parts = Parts("palettes", asdict(settings), shown)
    bench = Bench(settings, RESULTS / "work" / "palettes")
    original = parts.get("original", lambda: bench.scored(bench.run(True).original, measured=True))
    rows = rows_of(bench, parts, shown)
    print(f"\nResNet-20 ({original['measured']:.2f} % of {settings.scored:,} test images): points lost")
    print(table(HEADERS, cells(rows, original["measured"], trained=False)))
    print(f"\nOne epoch of {settings.examples:,} training images, measured")
    print(table(TRAINED_HEADERS, cells(rows, original["measured"], trained=True)))
    finish("palettes", [{"original": original}, *rows], [], asdict(settings), 1)
    parts.forget()


if __name__ == "__main__":
    main()
