"""One network pruned by one side and fine-tuned, a job in a process: the rows of ``prune.py``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Parts, Shown
from networks import DEBIAN, EXAMPLES, read_idx
from pruning_peers import Setting, torch_pruning

from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.method import Silent
from featherweight.methods.finetune import Finetune
from featherweight.methods.prune import Prune
from featherweight.model import Model
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.costs import totals

Json = dict[str, Any]
AUGMENT = ["shift", "flip"]
_HELD = 4000  # training images that nobody trains on, by which settings are chosen


@dataclass(frozen=True)
class Job:
    """What one row is about.

    Attributes:
        network: Of the examples.
        macs: Fraction of the multiply-accumulates to keep.
        peer: Torch-Pruning's setting; None: ours.
        teacher: Distilled from the original; else labels only.
        seed: Of the training.
        epochs: Of the fine-tuning; 0: none.
        examples: Training images.
        rate: Of learning.
    """

    network: str
    macs: float
    peer: Setting | None
    teacher: bool
    seed: int
    epochs: int
    examples: int
    rate: float

    @property
    def name(self) -> str:
        """Of its file."""
        terms = "teacher" if self.teacher else "labels"
        return f"{self.pruning}-{self.epochs}-{terms}-{self.rate:g}-{self.seed}"

    @property
    def pruning(self) -> str:
        """Of the file of what is pruned, whatever comes after."""
        side = "ours" if self.peer is None else f"peer-{self.peer.importance}-{self.peer.scope}"
        return f"{self.network}-{self.macs:g}-{side}"


@cache
def images(examples: int) -> Data:
    """Fashion-MNIST: the test set is scored, so many others train, the 2,000 that ship calibrate (no labels).

    Raises:
        SystemExit: The data set is not installed, or so many images do not train.
    """
    train, labels, order = _training_images()
    if examples > len(train) - _HELD:
        raise SystemExit(f"--examples {examples}: {len(train) - _HELD} images train, {_HELD} choose settings")
    shipped = np.load(EXAMPLES / "data.npz")
    x, y = (read_idx(f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    picks = np.sort(order[:examples])
    return Data.of(
        x=_scaled(x),
        y=y.astype(np.int64),
        x_train=_scaled(train[picks]),
        y_train=labels[picks].astype(np.int64),
        calibration=shipped["x_train"],
        batch_size=250,
    )


@cache
def held_out() -> Data:
    """Training images that :func:`images` never trains on."""
    train, labels, order = _training_images()
    picks = np.sort(order[-_HELD:])
    return Data.of(x=_scaled(train[picks]), y=labels[picks].astype(np.int64))


@cache
def _training_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, labels, and the order in which they are taken."""
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        raise SystemExit("Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")
    train, labels = (read_idx(f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return train, labels, np.random.default_rng(0).permutation(len(train))


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32)[:, None] / 255


def run_of(network: str, examples: int, folder: Path, seed: int = 0, runtime: str = "onnxruntime") -> Run:
    """An example network with its data, as a user's run would have it."""
    sources = load_sources(
        f"{EXAMPLES / 'nets.py'}:{network}",
        weights=str(EXAMPLES / f"{network}.safetensors"),
        data=images(examples),
    )
    target = fit_targets(runtime, 1, "local", "")[0]
    return Run(sources.model, sources.data, target, Store(folder), seed=seed, progress=Silent())


def accuracy(module: torch.nn.Module, data: Data) -> float:
    """Percent of the scored examples, in float32."""
    scored = data.scored
    assert scored is not None and scored.targets is not None
    module.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(scored), 500):
            picks = np.arange(start, min(start + 500, len(scored)))
            predicted = module(torch.from_numpy(scored.take(picks)[0])).argmax(1).numpy()
            right += int((predicted == scored.targets[picks]).sum())
    return 100 * right / len(scored)


def original_accuracy(network: str) -> float:
    """Percent of the test images, of the network as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(network, 1, Path(folder))
        return accuracy(run.original.module, run.data)


def prunes(run: Run, job: Job) -> Model:
    """The pruned network of a job."""
    if job.peer is None:
        context = run.context(run.original)
        return Prune.model_validate({"macs": job.macs}).apply(run.original, context)
    train = run.data.train
    assert train is not None and train.targets is not None
    picks = np.arange(min(2000, len(train)))
    labelled = torch.from_numpy(train.take(picks)[0]), torch.from_numpy(train.targets[picks])
    return torch_pruning(run.original, job.peer, job.macs, labelled)


def pruned_row(job: Job, folder: Path) -> Json:
    """Prune, score, re-estimate batch norms and score again; the network goes to a file of the folder."""
    torch.set_num_threads(1)
    run = run_of(job.network, job.examples, folder)
    began = time.monotonic()
    pruned = prunes(run, job)
    seconds = time.monotonic() - began
    whole, left = totals(run.original), totals(pruned)
    torch.save(pruned.module, _place(job, folder))
    return {
        "macs_left": left["macs"] / whole["macs"],
        "params_left": left["params"] / whole["params"],
        "before": accuracy(pruned.module, run.data),
        "before_bn": _with_statistics(pruned, run),
        "prune_s": seconds,
    }


def tuned_row(job: Job, folder: Path) -> Json:
    """Fine-tune what was pruned before, and score it."""
    torch.set_num_threads(1)
    run = run_of(job.network, job.examples, folder, job.seed)
    # What an earlier process of this benchmark wrote; an interrupted run makes it again.
    if not _place(job, folder).is_file():
        pruned_row(job, folder)
    pruned = run.original.evolve(module=torch.load(_place(job, folder), weights_only=False))
    teacher = "original" if job.teacher else "none"
    step = Finetune.model_validate(
        {"epochs": job.epochs, "learning_rate": job.rate, "augment": AUGMENT, "teacher": teacher}
    )
    began = time.monotonic()
    tuned = step.apply(pruned, run.context(pruned))
    seconds = time.monotonic() - began
    return {
        "after": accuracy(tuned.module, run.data),
        "held_out": accuracy(tuned.module, held_out()),
        "tune_s": seconds,
    }


def _place(job: Job, folder: Path) -> Path:
    return folder / f"{job.pruning}.pt"


def _with_statistics(pruned: Model, run: Run) -> float:
    """Accuracy with batch norms re-estimated on the calibration images."""
    batches = [tuple(map(torch.from_numpy, batch)) for batch in run.data.calibration()]
    module = pruned.copy_module()
    module.load_state_dict(reestimate(pruned, batches), strict=False)
    return accuracy(module, run.data)


def rows_of(jobs: Sequence[Job], parts: Parts, folder: Path, workers: int, shown: Shown) -> list[Json]:
    """The rows of jobs in their order, several at once; those of an interrupted run are read."""
    firsts = {job.pruning: partial(pruned_row, job, folder) for job in jobs}
    pruned = dict(zip(firsts, pooled(firsts, parts, workers, shown), strict=True))
    tuned = pooled({job.name: partial(tuned_row, job, folder) for job in jobs}, parts, workers, shown)
    return [
        {**asdict(job), "peer": job.peer and str(job.peer), **pruned[job.pruning], **row}
        for job, row in zip(jobs, tuned, strict=True)
    ]


def pooled(calls: Mapping[str, Callable[[], Json]], parts: Parts, workers: int, shown: Shown) -> list[Json]:
    """What calls return, in their order, several at once; those of an interrupted run are read.

    Args:
        calls: Name of the part -> what makes its row; it travels to another process.
        parts: Where finished rows are kept.
        workers: Processes with one thread each.
        shown: Progress.
    """
    done = {name: parts.get(name, dict) for name in calls if parts.known(name)}
    with _pool(workers) as start:
        waiting = {start(call): name for name, call in calls.items() if name not in done}
        for future in shown.track(as_completed(waiting), "training", len(waiting)):
            row = future.result()
            done[waiting[future]] = parts.get(waiting[future], lambda row=row: row)
            shown.note(f"{waiting[future]}: {row['after' if 'after' in row else 'before']:.2f} %")
    return [done[name] for name in calls]


class _pool:  # noqa: N801  a context manager that reads as a function
    """Processes with one thread each; they die with this one."""

    def __init__(self, workers: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Callable[..., Any]:
        return self._pool.submit

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def options(about: str | None, tables: Sequence[str], epochs: int) -> argparse.ArgumentParser:
    """The options of a benchmark that trains."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 2,000 images, one epoch, few rows")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--examples", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each timing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser


def mean_and_ends(values: Sequence[float]) -> str:
    """``93.10 [93.05, 93.20]``."""
    found = f"{np.mean(values):.2f}"
    return found if len(values) < 2 else f"{found} [{min(values):.2f}, {max(values):.2f}]"


def grouped(rows: Sequence[Json], keys: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], list[Json]]]:
    """Rows by the values of these columns, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from found.items()
