"""Two trained networks into one: the shipped ResNet-20 (ten classes), and one that tells how much ink there
is in a picture.

The second task's labels are read off the pictures: in which fifth of the 60,000 training pictures the mean
brightness lies. The class tells it badly: the likeliest fifth of each class is right for 44 % of them. So it
is no function of what the first network says, and the labels are exact. Its network is another ResNet-20,
trained from scratch on the same pictures.

``python benchmarks/merge.py`` merges both with the method ``merge`` at one place or several (``--at``), and
holds parameters, multiply-accumulates and the latency through ONNX Runtime, measured in turn, against the
two networks side by side, and each task's accuracy on the 10,000 test pictures against its own network's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import DEBIAN, EXAMPLES, read_idx
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight.data import Data
from featherweight.drops import drop_of_rows, paired_bootstrap
from featherweight.engine.evaluate import Scales
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.engine.timing import Limits
from featherweight.method import Context, Precision
from featherweight.methods.finetune import Finetune
from featherweight.methods.merge import Merge
from featherweight.model import Entry, Model
from featherweight.side_by_side import side_by_side
from featherweight.tasks import TasksMetric, tasks_data

Json = dict[str, Any]
AUGMENT = ("flip",)  # a shift pushes ink out of the picture, and the labels would be false
PRECISION: Precision = "bf16-mixed"  # of all that trains here
FIFTHS = 5
KEEP, DROP = 0.6, 0.005
_BATCH = 250


def pictures(train: int | None, scored: int | None) -> dict[str, Data]:
    """Data of both tasks on the same pictures; the first so many of each set.

    Raises:
        SystemExit: The data set is not installed.
    """
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        raise SystemExit("Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")
    x_train, y_train = (read_idx(f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    x, y = (read_idx(f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    limits = np.quantile(_ink(x_train), np.arange(1, FIFTHS) / FIFTHS)
    targets = {
        "classes": (y, y_train),
        "ink": (np.digitize(_ink(x), limits), np.digitize(_ink(x_train), limits)),
    }
    return {
        name: Data.of(
            _scaled(x[:scored]),
            own[:scored].astype(np.int64),
            x_train=_scaled(x_train[:train]),
            y_train=others[:train].astype(np.int64),
            batch_size=_BATCH,
        )
        for name, (own, others) in targets.items()
    }


def _ink(images: np.ndarray) -> np.ndarray:
    """Mean brightness of each picture, 0 to 255."""
    means: np.ndarray = images.reshape(len(images), -1).mean(axis=1)
    return means


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32)[:, None] / 255


def resnet20(classes: int, weights: Path | None = None, seed: int = 0) -> Model:
    """A ResNet-20 of the examples: trained, or with fresh weights."""
    spec = importlib.util.spec_from_file_location("nets", EXAMPLES / "nets.py")
    assert spec is not None and spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    torch.manual_seed(seed)
    module: nn.Module = nets._init(nets.ResNet(3, classes))
    if weights is not None:
        module.load_state_dict(load_file(weights))
    x = torch.zeros(2, 1, 28, 28)
    return Model(module.eval(), {"forward": Entry((x,), ("x",), ("y",), {"x": {0: "batch"}})})


def trained_ink(data: Data, work: Path, epochs: float, run: Run, key: str) -> Model:
    """The second network, trained from scratch on its labels; its weights are kept for the next run."""
    model, file = resnet20(FIFTHS), work / f"ink-{key}.safetensors"
    if not file.is_file():
        step = Finetune(epochs=epochs, learning_rate=0.1, augment=AUGMENT)
        context: Context = dataclasses.replace(run.context(), data=data, models={})
        made = step.apply(model, context)
        work.mkdir(parents=True, exist_ok=True)
        save_file({name: one.contiguous() for name, one in made.module.state_dict().items()}, file)
    return resnet20(FIFTHS, file)


def merged_row(run: Run, scales: Scales, both: Model, step: Merge, words: str) -> Json:
    """One merge, trained, lowered and measured."""
    model = run.step(both, step)
    weighed = scales.weigh(model)
    seen, base = scales.measurement(weighed), scales.baseline(weighed)
    metric = run.data.metric
    assert isinstance(metric, TasksMetric)
    before, after = (scored.rows[metric.name] for scored in (scales.twin_scored, weighed.scored))
    tasks = {}
    for task, (own, one), (_, other) in zip(
        metric.tasks, metric.parts(before), metric.parts(after), strict=True
    ):
        tasks[task.name] = {
            "before": own.reduce(one),
            "after": own.reduce(other),
            "drop": drop_of_rows(own, one, other),
            "ci95": paired_bootstrap(own, one, other, run.seed),
        }
    assert seen.params and base.params and seen.macs and base.macs and seen.bytes and base.bytes
    return {
        "merge": words,
        "seed": run.seed,
        "params": seen.params / base.params,
        "macs": seen.macs / base.macs,
        "bytes": seen.bytes / base.bytes,
        "latency_ratio": seen.latency_ratio,
        "latency_ratio_ci95": seen.latency_ratio_ci95,
        "resolved": seen.resolved,
        "latency_s": None if seen.latency_s is None else seen.latency_s.median,
        "twin_s": None if base.latency_s is None else base.latency_s.median,
        "training_s": run.training_s,
        "tasks": tasks,
    }


def told(row: Json) -> list[str]:
    """A line of the table."""
    low, high = row["latency_ratio_ci95"] or (float("nan"),) * 2
    cells = [row["merge"], str(row["seed"]), *(f"{row[key]:.1%}" for key in ("params", "macs", "bytes"))]
    cells.append(f"{row['latency_ratio']:.3f} [{low:.3f}, {high:.3f}]")
    for task in row["tasks"].values():
        low, high = (100 * end for end in task["ci95"])
        cells.append(f"{task['before']:.2%} -> {task['after']:.2%}")
        cells.append(f"{100 * task['drop']:+.2f} [{low:+.2f}, {high:+.2f}]")
    return cells


HEADERS = ["merge", "seed", "params", "MACs", "bytes", "latency ratio", "classes", "drop", "ink", "drop"]


def bars_of(row: Json) -> list[Bar]:
    """What the project promises of a merge, and this one."""
    about = f"{row['merge']}, seed {row['seed']}"
    found = [
        Bar(about, f"at most {KEEP:.0%} of the {name}", f"{row[key]:.1%}", row[key] <= KEEP)
        for name, key in (("parameters", "params"), ("summed latency", "latency_ratio"))
    ]
    for name, task in row["tasks"].items():
        lost, asked = task["drop"], f"{name}: a drop of at most {100 * DROP:g} points"
        found.append(Bar(about, asked, f"{100 * lost:+.2f}", lost <= DROP))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pictures: does it run?")
    parser.add_argument("--epochs", type=float, default=10.0, help="of the merge's training")
    parser.add_argument("--ink-epochs", type=float, default=10.0, help="of the second network's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the merge's training")
    parser.add_argument("--at", nargs="+", default=["auto"], help="where the networks part")
    parser.add_argument("--balance", nargs="+", default=["uncertainty"], help="uncertainty, equal, pcgrad")
    parser.add_argument("--alpha", type=float, default=0.9, help="share of the networks' answers in the loss")
    parser.add_argument("--rate", type=float, help="of learning; else what the method takes by itself")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    quick = args.quick
    settings = {"quick": quick, "epochs": args.epochs, "ink_epochs": args.ink_epochs, "threads": args.threads}
    settings |= {"alpha": args.alpha, "rate": args.rate}
    each = pictures(2000 if quick else None, 500 if quick else None)
    work = RESULTS / "work" / "merge"
    (target,) = fit_targets("onnxruntime", args.threads, "local", "")
    limits = Limits(seconds=4.0, least_seconds=0.5) if quick else Limits()
    parts = Parts("merge", settings, shown)
    store = Store()
    first = resnet20(10, EXAMPLES / "resnet20.safetensors")
    alone = Run(first, each["classes"], target, store, progress=shown, precision=PRECISION)
    second = trained_ink(each["ink"], work, args.ink_epochs, alone, f"{args.ink_epochs:g}-{int(quick)}")
    both = side_by_side({"classes": first, "ink": second})
    data = tasks_data(each, {"classes": 1, "ink": 1})
    rows: list[Json] = []
    for seed in args.seeds:
        run = Run(both, data, target, store, seed=seed, progress=shown, precision=PRECISION)
        scales: Scales | None = None
        for at in args.at:
            for balance in args.balance:
                words = f"at {at}, {balance}"
                step = Merge(
                    at=at,
                    epochs=args.epochs,
                    augment=AUGMENT,
                    balance=balance,
                    alpha=args.alpha,
                    learning_rate=args.rate or "auto",
                )

                def measured(step: Merge = step, words: str = words, run: Run = run) -> Json:
                    nonlocal scales
                    scales = scales or Scales(run, limits)
                    return merged_row(run, scales, run.original, step, words)

                rows.append(parts.get(f"{at}-{balance}-{seed}".replace("/", "."), measured))
                print("\n" + table(HEADERS, [told(row) for row in rows]), flush=True)
    finish("merge", rows, _all_bars(rows), settings, args.threads)
    parts.forget()


def _all_bars(rows: Sequence[Json]) -> list[Bar]:
    return [bar for row in rows for bar in bars_of(row)]


if __name__ == "__main__":
    main()
