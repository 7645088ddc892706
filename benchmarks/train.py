"""What training gives back: distillation, low bits, sparsity (``make bench-train``).

Every row starts from a trained example, trains it with ``finetune`` and is scored on the 10,000 test images
of Fashion-MNIST: int8 through ONNX Runtime (measured), fewer bits and zeros by PyTorch (simulated). Low
bits and zeros have at most five epochs, students three times as many, and what keeps a quarter of the MACs
twice as many, of most of the training set. Students and zeros are trained on labels too, everything else
with the original as teacher. Nothing is asserted; an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, RESULTS, Bar, Parts, Shown, finish, table, tell_load
from fine_tuned import AUGMENT, accuracy, grouped, images, mean_and_ends, options, pooled, run_of
from interleaved import against_original

from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.model import Model
from featherweight.recipe import Recipe, Step
from featherweight.tools.costs import totals
from featherweight.tools.simulate import as_run, simulate

Json = dict[str, Any]
TABLES = ("pruned", "student", "quantized", "sparse")
_ENDS = {"resnet20": ["conv1", "fc"], "depthwise": ["conv1", "fc"]}  # first and last layer


@dataclass(frozen=True)
class Settings:
    """What the parts depend on.

    Attributes:
        examples: Training images.
        epochs: At most; the student's are three times as many.
        seeds: Of the students.
        many: Training images of the row that is distilled for long, twice as many epochs.
    """

    examples: int
    epochs: int
    seeds: tuple[int, ...]
    many: int = 50_000


@dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
        table: Which table.
        network: The original.
        name: What was done, in words.
        steps: Of the recipe: (method, parameters).
        seed: Of everything.
        examples: Training images.
        runtime: That the formats are for.
        student: Callable of another network to start from.
        most: Points that may be lost; None: no bar.
    """

    table: str
    network: str
    name: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    seed: int
    examples: int
    runtime: str = "torch"
    student: str = ""
    most: float | None = None

    @property
    def recipe(self) -> Recipe:
        """The steps as a recipe."""
        return Recipe(tuple(Step(method, parameters) for method, parameters in self.steps))

    @property
    def part(self) -> str:
        """Of its file."""
        words = f"{self.table}-{self.network}-{self.name}-{self.seed}"
        return "".join(c if c.isalnum() else "-" for c in words)


def _tuned(epochs: float, teacher: bool = True, **more: Any) -> tuple[str, Mapping[str, Any]]:
    return "finetune", {
        "epochs": epochs,
        "augment": AUGMENT,
        "teacher": "original" if teacher else "none",
        **more,
    }


def jobs_of(settings: Settings, tables: Sequence[str]) -> list[Job]:
    """Every row of the tables."""
    few, epochs = settings.examples, settings.epochs
    found: list[Job] = []  # the longest one first
    taught = _tuned(2 * epochs, alpha=1.0, learning_rate=0.08)
    smaller = (("shrink", {"macs": 0.6}), ("prune", {"macs": 0.45}), taught)
    int8 = (("fold", {}), ("quantize", {}), ("rounding", {}))
    words = "a quarter of the MACs, int8"
    found.append(Job("pruned", "resnet20", words, smaller + int8, 0, settings.many, "onnxruntime", most=0.7))
    for seed in settings.seeds:
        for teacher in (False, True):
            steps = (_tuned(3 * epochs, teacher, learning_rate=0.1, batch_size=64),)
            words = "student, teacher" if teacher else "student, labels"
            spec = f"{HERE / 'students.py'}:student"
            found.append(Job("student", "resnet20", words, steps, seed, few, student=spec))
    for network, weights, bits, most in (
        ("resnet20", "int4", "int4", 0.5),
        ("resnet20", "ternary", "none", 1.0),
        ("resnet20", "binary", "none", 2.0),
        ("depthwise", "int4", "int4", 1.0),
    ):
        end = {"weights": "int8"} | ({} if bits == "none" else {"activations": "int8"})
        layers = dict.fromkeys(_ENDS[network], end)
        quantized = ("quantize", {"weights": weights, "activations": bits, "layers": layers})
        words = f"weights {weights}, activations {bits}"
        steps = (("fold", {}), quantized, _tuned(epochs, alpha=1.0))
        if bits != "none":  # few bits for activations too: a good start, and small steps from there
            blocks = ("rounding", {"how": "blocks", "iterations": 500})
            tuned = _tuned(epochs, alpha=1.0, learning_rate=2e-4)
            steps = (("fold", {}), ("equalize", {}), quantized, blocks, tuned)
        found.append(Job("quantized", network, words, steps, 0, few, most=most))
    for teacher in (False, True):
        words = f"90 % zeros, {'teacher' if teacher else 'labels'}"
        tuned = _tuned(epochs, teacher, optimizer="sgd", learning_rate=0.05)
        steps = (("sparsify", {"sparsity": 0.9, "schedule": "cubic"}), tuned)
        bar = 1.0 if teacher else None
        found.append(Job("sparse", "resnet20", words, steps, 0, few, most=bar))
    return [job for job in found if job.table in tables]


def row_of(job: Job, folder: Path) -> Json:
    """Carry a job's recipe out and score what it makes."""
    torch.set_num_threads(1)
    run = run_of(job.network, job.examples, folder, job.seed, job.runtime)
    whole = totals(run.original)
    if job.student:
        torch.manual_seed(job.seed)
        start = load_sources(job.student, data=images(job.examples)).model
        run = Run(run.original, run.data, run.target, run.store, seed=job.seed, student=start)
    changed = run.apply(job.recipe)
    left = totals(changed)
    return {
        "table": job.table,
        "network": job.network,
        "name": job.name,
        "seed": job.seed,
        "steps": [[method, dict(parameters)] for method, parameters in job.steps],
        "original": accuracy(run.original.module, run.data),
        "most": job.most,
        "macs_left": left["macs"] / whole["macs"],
        "params_left": left["params"] / whole["params"],
        "bytes_left": left["bytes"] / whole["bytes"],
        "measured": job.runtime != "torch",
        "after": _scored(run, changed),
    }


def _scored(run: Run, model: Model) -> float:
    """Percent of the test images: through the runtime's session, or as the formats will behave."""
    if run.target.runtime == "torch":
        call = as_run(simulate(model))
    else:
        call = run.runtime.open(run.lower(model), run.target)
    (rows,) = run.data.evolve(metric="accuracy").score(call).values()
    return 100 * float(np.mean(rows))


def _latency(job: Job, folder: Path, seconds: float) -> Json:
    """How much faster the artifact of a job is than the original, on the runtime."""
    run = run_of(job.network, job.examples, folder, job.seed, job.runtime)
    seen = against_original(run, run.apply(job.recipe), seconds, folder / "timing").ratio
    return {"ratio": seen.median, "ci95": seen.ci95}


HEADERS = ("network", "what", "MACs", "params", "bytes", "scored", "accuracy, %", "drop")


def cells(rows: Sequence[Json]) -> list[list[str]]:
    """The table's rows: mean and ends over seeds."""
    shown = []
    for (network, name), mine in grouped(rows, ("network", "name")):
        first, after = mine[0], [row["after"] for row in mine]
        shown.append(
            [
                network,
                name,
                f"{first['macs_left']:.3f}",
                f"{first['params_left']:.3f}",
                f"{first['bytes_left']:.3f}",
                "measured" if first["measured"] else "simulated",
                mean_and_ends(after),
                f"{first['original'] - np.mean(after):.2f}",
            ]
        )
    return shown


def bars_of(rows: Sequence[Json]) -> list[Bar]:
    """Drops that were asked for, and the teacher's worth for the student."""
    bars = [
        Bar(
            f"{row['network']}, {row['name']}",
            f"drop <= {row['most']:g} points",
            f"{row['original'] - row['after']:.2f}",
            row["original"] - row["after"] <= row["most"],
        )
        for row in rows
        if row["most"] is not None
    ]
    found = {name: rows for (name,), rows in grouped([r for r in rows if r["table"] == "student"], ("name",))}
    if len(found) == 2:
        labels, teacher = (
            float(np.mean([row["after"] for row in found[f"student, {kind}"]]))
            for kind in ("labels", "teacher")
        )
        seen = f"{teacher:.2f} against {labels:.2f}"
        bars.append(Bar("student of a tenth", "better with a teacher", seen, teacher > labels))
        small = found["student, teacher"][0]["params_left"]
        bars.append(Bar("student", "at most 0.1 of the parameters", f"{small:.3f}", small <= 0.1))
    return bars


def main() -> None:
    parser = options(__doc__, TABLES, epochs=5)
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    settings = Settings(args.examples, args.epochs, tuple(args.seeds))
    if args.quick:
        settings = Settings(2000, 1, (0,), 2000)
    parts = Parts("train", asdict(settings), shown)
    jobs = jobs_of(settings, args.tables)
    work = RESULTS / "work" / "train"  # steps and checkpoints live on, so that an interrupted run goes on
    work.mkdir(parents=True, exist_ok=True)
    calls = {job.part: partial(row_of, job, work / job.part) for job in jobs}
    rows = pooled(calls, parts, args.workers, shown)
    for job, row in zip(jobs, rows, strict=True):
        if job.runtime != "torch":
            seconds = 5.0 if args.quick else args.seconds
            timed = partial(_latency, job, work / job.part, seconds)
            row |= parts.get(f"{job.part}-latency", timed)
    print(f"\nFashion-MNIST: {settings.examples} training images, {settings.epochs} epochs at most")
    print(f"(students three times as many; a quarter of the MACs: {settings.many}, twice as many);")
    print("10,000 test images; simulated: by PyTorch, measured: through ONNX Runtime")
    print(table(HEADERS, cells(rows)))
    bars = bars_of(rows)
    for row in rows:
        if "ratio" in row:
            faster = 1 / row["ratio"]
            bars.append(Bar(row["name"], "at least 3 times as fast", f"{faster:.2f}", faster >= 3))
    finish("train", rows, bars, asdict(settings), 1)
    if set(args.tables) == set(TABLES):
        parts.forget()


if __name__ == "__main__":
    main()
