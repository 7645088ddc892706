"""``--student auto`` on ResNet-20 of Fashion-MNIST in 60 KB on ONNX Runtime, beside families named by hand.

55,000 training images teach, the 5,000 others select (the student, and among the search's artifacts); the
10,000 test images are scored once, through the session of the artifact that was handed back. ``auto`` has
--time for everything: looking at candidates, training a few of them briefly, distillation, quantization,
measuring. A named family is first lowered untrained, at its papers' widths; one that keeps the budget has
as much time. Parts resume.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import EXAMPLES, read_idx

import featherweight as fw
from featherweight import nets
from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.student_table import Table, count
from featherweight.plugins import find_runtime
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact, Target

Json = dict[str, Any]

NAMED = ("mobilenetv1", "mobilenetv2", "mobilenetv3-small", "shufflenetv1", "shufflenetv2", "ds-cnn", "vit")
SPEC, WEIGHTS = f"{EXAMPLES / 'nets.py'}:resnet20", str(EXAMPLES / "resnet20.safetensors")
_SELECT = 5000  # training images that select and do not teach


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        bytes: The budget.
        time_s: Of each fit.
        examples: Training images at most.
        scored: Test images.
        trials: Of each search.
        named: Whether named families that keep the budget are trained too.
        least: Accuracy that is asked for, percent.
    """

    bytes: int = 60_000
    time_s: float = 1800.0
    examples: int = 60_000
    scored: int = 10_000
    trials: int = 2
    named: bool = True
    least: float = 91.5


def images(settings: Settings) -> Data:
    """What teaches and what selects."""
    x, y = _split("train", settings.examples)
    few = min(_SELECT, len(x) // 4)
    return Data.of(x[-few:], y[-few:], x_train=x[:-few], y_train=y[:-few])


def _split(split: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    x = read_idx(f"{split}-images-idx3-ubyte.gz")[:most].astype(np.float32)[:, None] / 255
    return x, read_idx(f"{split}-labels-idx1-ubyte.gz")[:most].astype(np.int64)


def row_of(
    student: str, seed: int, settings: Settings, work: Path, shown: Shown, recipe: Json | None = None
) -> Json:
    """Fit, and score what is handed back on the test images; with a recipe nothing is searched."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    result = fw.fit(
        SPEC,
        images(settings),
        weights=WEIGHTS,
        student=student,
        budget=fw.Budget(bytes=settings.bytes),
        prefer="quality",
        trials=settings.trials,
        time_limit=settings.time_s,
        seed=seed,
        recipe=None if recipe is None else Recipe.from_dict(recipe),
        out=work / "fitted",
        resume=recipe is None,
        force=True,
        progress=shown,
    )
    return {
        "asked": student,
        "student": result.student,
        "seed": seed,
        "met": result.met,
        "bytes": result.chosen.bytes,
        "params": result.chosen.params,
        "macs": result.chosen.macs,
        "ratio": result.chosen.latency_ratio,
        "selected_by": 100 * (result.chosen.quality or 0.0),
        "test": accuracy(work / "fitted", settings.scored),
        "recipe": result.recipe,
        "seconds": None if result.effort is None else result.effort.seconds,
        "considered": [row.model_dump() for row in result.students],
    }


def trained_on(recipe: Json, epochs: float) -> Json:
    """The recipe with a second training behind the first one, at half of its rate."""
    first, *others = recipe["steps"]
    again = {**first["finetune"], "epochs": epochs, "learning_rate": first["finetune"]["learning_rate"] / 2}
    return {**recipe, "steps": [first, {"finetune": again}, *others]}


def accuracy(folder: Path, count: int) -> float:
    """Percent of the test images, through the runtime's session."""
    x, y = _split("t10k", count)
    artifact = Artifact("onnxruntime", folder, ("model.onnx",), {"forward": "model.onnx"})
    session = find_runtime("onnxruntime").open(artifact, Target("onnxruntime").resolved())
    seen = [session(x[start : start + 100])[0].argmax(1) for start in range(0, len(x), 100)]
    return 100 * float(np.mean(np.concatenate(seen) == y))


def named_rows(settings: Settings, work: Path) -> list[Json]:
    """Families at their papers' widths, lowered untrained: what each takes."""
    sources = load_sources(SPEC, weights=WEIGHTS, data=images(Settings(examples=4000)))
    run = Run(sources.model, sources.data, Target("onnxruntime").resolved(), Store(work / "store"))
    prices, found = Table(run), []
    for name in NAMED:
        for width in sorted(nets.FAMILIES[name].widths):
            candidate = count(f"{name}:width={width:g}", prices.task)
            seen = prices.lower(candidate)
            if seen is None:
                found.append({"student": candidate.spec, "failed": prices.failed[candidate.spec]})
                break
            found.append({**asdict(candidate), **asdict(seen), "student": candidate.spec})
            if seen.bytes > settings.bytes:
                break  # wider ones are larger
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2,000 images and a minute: whether it runs")
    parser.add_argument("--time", type=float, default=Settings.time_s, help="seconds of each fit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--auto-only", action="store_true", help="train no named family")
    parser.add_argument("--more", type=float, default=0.0, help="epochs of a second training, behind auto's")
    args = parser.parse_args()
    settings = Settings(time_s=args.time, named=not args.auto_only)
    if args.quick:
        settings = Settings(time_s=60.0, examples=2000, scored=1000, trials=1, named=False, least=0.0)
    shown = Shown()
    tell_load(shown)
    work = RESULTS / "work" / "student"
    os.environ["FEATHERWEIGHT_CACHE"] = str(work / "cache")
    parts = Parts("student", asdict(settings), shown)

    def fitted(student: str, seed: int) -> Json:
        name = f"{student.replace(':', '_').replace('=', '')}-{seed}"
        made: Json = parts.get(name, partial(row_of, student, seed, settings, work / name, shown))
        return made

    rows = [fitted("auto", seed) for seed in args.seeds]
    if args.more:
        auto = rows[0]
        longer = trained_on(auto["recipe"], args.more)
        made = partial(row_of, "auto", auto["seed"], settings, work / "longer", shown, longer)
        rows.append(parts.get("longer", made) | {"asked": f"auto, {args.more:g} more epochs"})
    named: list[Json] = parts.get("named", partial(named_rows, settings, work / "named"))
    fits = [row["student"] for row in named if row.get("bytes", settings.bytes + 1) <= settings.bytes]
    widest = {name.partition(":")[0]: name for name in fits}
    rows += [fitted(name, args.seeds[0]) for name in widest.values() if settings.named]
    tell(rows, named, settings)
    best = [row["test"] for row in rows if row["asked"].startswith("auto")]
    bars = [
        Bar(
            "auto",
            f"at least {settings.least} % of the test images",
            f"{min(best):.2f}",
            min(best) >= settings.least,
        ),
        Bar(
            "auto",
            f"at most {settings.bytes} bytes",
            str(rows[0]["bytes"]),
            all(row["met"] for row in rows[: len(best)]),
        ),
    ]
    finish("student", [*rows, *({"named": True, **row} for row in named)], bars, asdict(settings), 1)
    parts.forget()


def tell(rows: list[Json], named: list[Json], settings: Settings) -> None:
    """The three tables."""
    heads = (
        "student",
        "bytes predicted",
        "found",
        "latency predicted, us",
        "found",
        "epochs",
        "drop, points",
        "what became of it",
    )
    for row in rows:
        if row["asked"] != "auto":
            continue
        print(f"\nWhat auto considered (seed {row['seed']})")
        print(table(heads, [_considered(one) for one in row["considered"]]))
    print(f"\nAt most {settings.bytes} bytes, {settings.time_s:.0f} s a fit")
    print(f"{settings.scored} test images, through ONNX Runtime")
    cells = [
        [row["asked"], row["student"], str(row["bytes"]), f"{row['ratio']:.3f}", f"{row['test']:.2f}"]
        for row in rows
    ]
    print(table(("asked", "student", "bytes", "latency ratio", "accuracy, %"), cells))
    print("\nFamilies at their papers' widths, lowered untrained")
    cells = [
        [
            one["student"],
            str(one.get("bytes", one.get("failed"))),
            "yes" if one.get("bytes", settings.bytes + 1) <= settings.bytes else "no",
        ]
        for one in named
    ]
    print(table(("student", "bytes", "fits"), cells))


def _considered(one: Json) -> list[str]:
    def micro(value: float | None) -> str:
        return "-" if value is None else f"{1e6 * value:.0f}"

    return [
        one["student"],
        str(one["predicted_bytes"]),
        "-" if one["bytes"] is None else str(one["bytes"]),
        micro(one["predicted_latency_s"]),
        micro(one["latency_s"]),
        f"{one['epochs']:.2f}" if one["epochs"] else "-",
        "-" if one["quality_drop"] is None else f"{100 * one['quality_drop']:.2f}",
        "chosen" if one["chosen"] else one["reason"],
    ]


if __name__ == "__main__":
    main()
