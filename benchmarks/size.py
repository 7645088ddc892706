"""How small downloads get: coded weights of trained and of quantized networks (``make bench-size``).

LeNet-300-100 and LeNet-5 as in Deep Compression (Han et al. 2016, arXiv:1510.00149), but on Fashion-MNIST:
zeros, few values, entropy coding, trained again with the shipped ResNet-20 as teacher. ResNet-20: the same,
taught by itself. EfficientNet-Lite0: 8 bits, nothing trained. Accuracy is that of ONNX Runtime on the
artifact; sizes are those of a bundle that holds the artifact alone. Nothing is asserted; an interrupted run
goes on.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from common import HERE, RESULTS, Bar, Parts, Shown, finish, table, tell_load
from fine_tuned import AUGMENT, grouped, pooled
from networks import DEBIAN, EFFICIENTNET, EXAMPLES, read_idx
from quantize_subjects import subject

from featherweight.bundles.write import Member, write_bundle
from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.method import Precision, Silent
from featherweight.model import Model
from featherweight.recipe import Recipe, Step
from featherweight.tools.sparsity import with_zeros

Json = dict[str, Any]
Steps = tuple[tuple[str, Mapping[str, Any]], ...]
NETWORKS = ("lenet_300_100", "lenet_5", "resnet20", EFFICIENTNET)
PAPER = {"lenet_300_100": "40", "lenet_5": "39"}  # times smaller on MNIST, table 1 of the paper
_SHIPPED_TRAINER = "resnet20"


@dataclass(frozen=True)
class Plan:
    """What is done to a network.

    Attributes:
        recipe: Steps that compress.
        least: Times smaller that is asked for.
        most: Points that may be lost; of agreement for a network without labels.
        trained: The step that trains it from random weights; none: it comes trained.
        thinned: Steps before that leave zeros; the recipe folds batch norms that they train with.
        precision: Of training.
    """

    recipe: Steps
    least: float
    most: float
    trained: Steps = ()
    thinned: Steps = ()
    precision: Precision = "32"


_ADAM = {"optimizer": "adamw", "weight_decay": 0.0, "batch_size": 256}
_TAUGHT = {**_ADAM, "teacher": "teacher", "temperature": 1.0, "alpha": 0.8}


def _zeros(sparsity: Mapping[str, float]) -> Steps:
    """Sparsity by layer; weights that are zero stay so under Adam."""
    common = {"scope": "layer", "regrow": False, "end": 0.6}
    return tuple(
        ("sparsify", {"sparsity": share, "where": {"include": [layer]}, **common})
        for layer, share in sparsity.items()
    )


def plans() -> dict[str, Plan]:
    """The recipe of each network."""
    dense = ("finetune", {**_ADAM, "epochs": 30, "learning_rate": 1e-3})
    shared = ("cluster", {"colors": 10})
    fc = {"1": 0.945, "3": 0.915, "5": 0.5}
    conv = {"conv1": 0.3, "conv2": 0.82, "fc1": 0.96, "fc2": 0.6}
    again = {"epochs": 3.5, "augment": AUGMENT, "teacher": "original", "alpha": 0.9, "learning_rate": 0.05}
    return {
        "lenet_300_100": Plan(
            (
                *_zeros(fc),
                ("finetune", {**_TAUGHT, "epochs": 36, "learning_rate": 2e-3}),
                shared,
                ("finetune", {**_TAUGHT, "epochs": 5, "learning_rate": 1e-4}),
            ),
            60,
            0.15,
            (dense,),
            precision="bf16-mixed",
        ),
        "lenet_5": Plan(
            (
                *_zeros(conv),
                ("finetune", {**_TAUGHT, "epochs": 14, "learning_rate": 2e-3}),
                shared,
                ("finetune", {**_TAUGHT, "epochs": 2, "learning_rate": 1e-4}),
            ),
            60,
            0.15,
            (("finetune", {**_ADAM, "epochs": 20, "learning_rate": 2e-3}),),
            precision="bf16-mixed",
        ),
        "resnet20": Plan(
            (
                ("fold", {}),
                ("sparsify", {"threshold": 1e-12, "schedule": "none"}),  # the zeros that are there
                shared,
                ("rounding", {}),
                ("finetune", {**again, **_ADAM, "epochs": 0.5, "learning_rate": 1e-4}),
            ),
            30,
            0.5,
            thinned=(("sparsify", {"sparsity": 0.87, "end": 0.5, "regrow": False}), ("finetune", again)),
            precision="bf16-mixed",
        ),
        EFFICIENTNET: Plan(
            (
                ("fold", {}),
                ("quantize", {"weights": "int8", "headroom": 2, "activations": "none"}),
                ("rounding", {}),
            ),
            5,
            5.0,
        ),
    }


@dataclass(frozen=True)
class Job:
    """One row."""

    network: str
    seed: int
    examples: int
    scored: int | None
    shorter: float  # share of the epochs

    @property
    def part(self) -> str:
        """Of its file."""
        return f"{self.network}-{self.seed}"

    def recipe(self, steps: Steps) -> Recipe:
        """The steps, with so many epochs."""
        made = []
        for method, parameters in steps:
            epochs = {"epochs": parameters["epochs"] * self.shorter} if method == "finetune" else {}
            made.append(Step(method, {**parameters, **epochs}))
        return Recipe(tuple(made))


@cache
def images(examples: int, scored: int | None) -> Data:
    """Fashion-MNIST as it is split: all of it trains, unless told otherwise.

    Raises:
        SystemExit: The data set is not installed.
    """
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        raise SystemExit("Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")
    x_train, x = (
        read_idx(f"{part}-images-idx3-ubyte.gz").astype(np.float32)[:, None] / 255
        for part in ("train", "t10k")
    )
    y_train, y = (read_idx(f"{part}-labels-idx1-ubyte.gz").astype(np.int64) for part in ("train", "t10k"))
    return Data.of(
        x=x[:scored],
        y=y[:scored],
        x_train=x_train[:examples],
        y_train=y_train[:examples],
        calibration=np.load(EXAMPLES / "data.npz")["x_train"],
        batch_size=250,
    )


# ---- rows


def row_of(job: Job, folder: Path) -> Json:
    """Train what has to be trained, compress, score both, and write the bundle."""
    torch.set_num_threads(1)
    plan = plans()[job.network]
    run = _trained(job, plan, folder) if plan.trained else _given(job, plan, folder)
    changed = run.apply(job.recipe(plan.recipe))
    before, after = _scored(run, run.original), _scored(run, changed)
    labelled = run.data.scored is not None and run.data.scored.targets is not None
    raw = 4 * sum(value.numel() for value in run.original.parameters.values())
    return {
        "network": job.network,
        "seed": job.seed,
        "examples": len(before),
        "fp32": 100 * float(before.mean()) if labelled else 100.0,
        "after": 100 * float(after.mean()),
        "measure": "accuracy" if labelled else "agreement",
        "raw": raw,
        **sizes_of(run, changed),
        "steps": [
            [method, dict(parameters)] for method, parameters in (*plan.trained, *plan.thinned, *plan.recipe)
        ],
    }


def _trained(job: Job, plan: Plan, folder: Path) -> Run:
    """A run whose original was trained from random weights."""
    torch.manual_seed(job.seed)
    data = images(job.examples, job.scored)
    random = load_sources(f"{HERE / 'lenets.py'}:{job.network}", data=data)
    teacher = load_sources(
        f"{EXAMPLES / 'nets.py'}:{_SHIPPED_TRAINER}",
        weights=str(EXAMPLES / f"{_SHIPPED_TRAINER}.safetensors"),
        data=data,
    )
    begun = _run(random.model, random.data, job, plan, folder)
    dense = begun.apply(job.recipe(plan.trained))
    original = begun.original.evolve(module=dense.module, key="")
    return _run(original, begun.data, job, plan, folder, teacher=teacher.model)


def _given(job: Job, plan: Plan, folder: Path) -> Run:
    """A run whose original comes trained."""
    if job.network == EFFICIENTNET:
        one = subject(job.network, RESULTS / "work", 100, job.scored)
        spec, weights, data = one.spec, str(one.weights), one.data(job.seed)
    else:
        spec, weights = f"{EXAMPLES / 'nets.py'}:{job.network}", str(EXAMPLES / f"{job.network}.safetensors")
        data = images(job.examples, job.scored)
    sources = load_sources(spec, weights=weights, data=data)
    run = _run(sources.model, sources.data, job, plan, folder)
    if not plan.thinned:
        return run
    thin = with_zeros(run.apply(job.recipe(plan.thinned))).evolve(formats={}, key="")
    return _run(run.original, run.data, job, plan, folder, student=thin)


def _run(
    model: Model,
    data: Data,
    job: Job,
    plan: Plan,
    folder: Path,
    *,
    teacher: Model | None = None,
    student: Model | None = None,
) -> Run:
    return Run(
        model,
        data,
        fit_targets("onnxruntime", 1, "local", "")[0],
        Store(folder),
        seed=job.seed,
        progress=Silent(),
        student=student,
        teacher=teacher,
        precision=plan.precision,
    )


def _scored(run: Run, model: Model) -> np.ndarray:
    """What is right of each example, through ONNX Runtime; without labels: what agrees with the original."""
    call = run.runtime.open(run.lower(model), run.target)
    scored = run.data.scored
    assert scored is not None
    if scored.targets is not None:
        (rows,) = run.data.evolve(metric="accuracy").score(call).values()
        return np.asarray(rows)
    theirs = run.runtime.open(run.lower(run.original), run.target)
    found = []
    for start in range(0, len(scored), run.data.batch_size):
        x = scored.take(np.arange(start, min(start + run.data.batch_size, len(scored))))
        mine, other = (np.asarray(one(*x)[0]).argmax(1) for one in (call, theirs))
        found.append(mine == other)
    return np.concatenate(found)


def sizes_of(run: Run, model: Model) -> dict[str, int]:
    """Bytes of the artifact, of a bundle of it alone, and of general coders at their strongest."""
    artifact = run.lower(model)
    files = {name: (artifact.folder / name).read_bytes() for name in artifact.files}
    members = [Member(name, data, runtime=artifact.runtime) for name, data in files.items()]
    packed = write_bundle(io.BytesIO(), members)
    whole = b"".join(files.values())
    return {
        "artifact": len(whole),
        "coded": packed.bytes,
        "head": packed.head,
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(whole)),
        "xz": len(lzma.compress(whole, preset=9)),
    }


# ---- the table

HEADERS = (
    "network", "seed", "fp32, %", "compressed, %", "drop", "raw bytes", "coded", "times smaller",
    "zstd -19", "xz -9", "paper, MNIST",
)  # fmt: skip


def cells(rows: Sequence[Json]) -> list[list[str]]:
    """A line for each row, and the means of networks with several seeds."""
    shown = []
    for (network,), mine in grouped(rows, ("network",)):
        lines = [(str(row["seed"]), row) for row in mine]
        if len(mine) > 1:
            lines.append(("mean", mean_of(mine)))
        for seed, row in lines:
            shown.append(
                [
                    network,
                    seed,
                    f"{row['fp32']:.2f}",
                    f"{row['after']:.2f}",
                    f"{row['fp32'] - row['after']:.2f}",
                    f"{row['raw']:.0f}",
                    f"{row['coded']:.0f}",
                    f"{row['raw'] / row['coded']:.1f}",
                    f"{row['zstd']:.0f}",
                    f"{row['xz']:.0f}",
                    PAPER.get(network, ""),
                ]
            )
    return shown


def mean_of(rows: Sequence[Json]) -> Json:
    """Mean numbers of the rows of one network."""
    names = ("fp32", "after", "raw", "coded", "zstd", "xz")
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def bars_of(rows: Sequence[Json]) -> list[Bar]:
    """What each network was to keep."""
    bars = []
    for (network,), mine in grouped(rows, ("network",)):
        plan, mean = plans()[network], mean_of(mine)
        about = network if len(mine) == 1 else f"{network}, mean of {len(mine)} seeds"
        smaller, drop = mean["raw"] / mean["coded"], mean["fp32"] - mean["after"]
        bars.append(
            Bar(about, f"at least {plan.least:g} times smaller", f"{smaller:.1f}", smaller >= plan.least)
        )
        if mine[0]["measure"] == "accuracy":
            bars.append(Bar(about, f"drop <= {plan.most:g} points", f"{drop:.2f}", drop <= plan.most))
        else:
            words = f"agreement >= {100 - plan.most:g} % of {mine[0]['examples']}"
            bars.append(Bar(about, words, f"{mean['after']:.1f}", drop <= plan.most))
        general = all(row["coded"] <= min(row["zstd"], row["xz"]) for row in mine)
        bars.append(Bar(about, "coded <= zstd -19 and xz -9", "each row", general))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 2,000 images, few epochs, 64 scored")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2, 3, 4), help="of the LeNets")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    examples, scored, shorter = (2000, 64, 0.05) if args.quick else (60_000, None, 1.0)
    jobs = [
        Job(network, seed, examples, scored, shorter)
        for network in args.networks
        for seed in (args.seeds if plans()[network].trained and not args.quick else args.seeds[:1])
    ]
    settings: Json = {"examples": examples, "scored": scored, "shorter": shorter}
    parts = Parts("size", settings, shown)
    work = RESULTS / "work" / "size"  # steps and checkpoints live on, so that an interrupted run goes on
    work.mkdir(parents=True, exist_ok=True)
    rows = pooled(
        {job.part: partial(row_of, job, work / job.part) for job in jobs}, parts, args.workers, shown
    )
    print(
        "\nFashion-MNIST: 60,000 training images, drop and accuracy on the 10,000 test images, ONNX Runtime;"
    )
    print("LeNets learn from the labels and from ResNet-20; raw: fp32 parameters; coded: a bundle of the")
    print("artifact alone. EfficientNet-Lite0: agreement of the first class with fp32, nothing is trained.")
    print(table(HEADERS, cells(rows)))
    finish("size", rows, bars_of(rows), settings, 1)
    parts.forget()


if __name__ == "__main__":
    main()
