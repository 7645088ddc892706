"""What compression does beside the score: ResNet-20 in fp32, int8, a quarter of the MACs, and ternary.

Every network is lowered for ONNX Runtime and asked through its session: on the 10,000 test images of
Fashion-MNIST (accuracy, calibration), on 2,000 of them under six corruptions of five severities, and on
training images of two kinds (membership): those that the fine-tuning saw again, and those that only the
original was trained on. Nothing is asserted; an interrupted run goes on.
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
from fine_tuned import AUGMENT, images, run_of
from networks import DEBIAN, read_idx

from featherweight.calibration_error import log_probabilities
from featherweight.corruptions import KINDS, SEVERITIES
from featherweight.data import Data
from featherweight.engine.confidence import calibration
from featherweight.engine.jobs import Served
from featherweight.engine.robustness import corrupted_rows, some_indices, told
from featherweight.engine.run import Run
from featherweight.engine.store import digest
from featherweight.membership import attack_areas
from featherweight.metrics import find_metric
from featherweight.model import Model
from featherweight.outcome import Robustness
from featherweight.picture_inputs import picture_input
from featherweight.recipe import Recipe, Step
from featherweight.tools.costs import totals
from featherweight.tools.layer_report import weight_bits
from featherweight.tools.simulate import projected_parameters

Json = dict[str, Any]
NETWORKS = ("fp32", "int8", "quarter of the MACs", "ternary weights")
AS_FLOATS = ("ternary weights",)  # ONNX Runtime stores no such integers: it loads their values
_ENDS = {"conv1": {"weights": "int8"}, "fc": {"weights": "int8"}}  # first and last layer


@dataclass(frozen=True)
class Settings:
    """What the parts depend on.

    Attributes:
        examples: Training images of the fine-tuning.
        epochs: Of it.
        pictures: Test images that are corrupted.
        members: Training images of each kind that the attack knows.
        seed: Of everything.
    """

    examples: int = 10_000
    epochs: float = 3
    pictures: int = 2000
    members: int = 10_000
    seed: int = 0


def recipe_of(network: str, epochs: float) -> Recipe:
    """How a network is made of the original."""
    tuned = {"epochs": epochs, "augment": AUGMENT, "teacher": "original", "alpha": 1.0}
    ternary = {"weights": "ternary", "activations": "none", "layers": _ENDS}
    steps: Mapping[str, Sequence[tuple[str, Json]]] = {
        "fp32": (),
        "int8": (("fold", {}), ("quantize", {})),
        "quarter of the MACs": (("prune", {"macs": 0.25}), ("finetune", {**tuned, "learning_rate": 0.08})),
        "ternary weights": (("fold", {}), ("quantize", ternary), ("finetune", tuned)),
    }
    return Recipe(tuple(Step(name, parameters) for name, parameters in steps[network]))


def row_of(network: str, settings: Settings, folder: Path, shown: Shown) -> Json:
    """Make a network and ask its artifact everything."""
    torch.set_num_threads(1)
    run = run_of("resnet20", settings.examples, folder, settings.seed)
    changed = made(network, run, settings, folder)
    artifact = run.lower(_as_floats(changed) if network in AS_FLOATS else changed)
    shown.note(f"{network}: made, {artifact.bytes:,} bytes")
    data = run.data
    assert data.scored is not None and data.scored.targets is not None
    picks = some_indices(len(data.scored), settings.pictures, settings.seed)
    with Served(artifact, run.target) as served:
        rows = corrupted_rows(
            {"after": served.run}, data, picture_input(data, picks), picks, seed=settings.seed, progress=shown
        )["after"]
        test = _asked(served, data.scored.take(np.arange(len(data.scored)))[0])
        again, once = training_images(settings)
        losses = {
            "again": _losses(_asked(served, again[0]), again[1]),
            "once": _losses(_asked(served, once[0]), once[1]),
            "others": _losses(test, data.scored.targets),
        }
    seen = calibration(data, {"after": test}, np.arange(len(data.scored)))
    whole, left = totals(run.original), totals(changed)
    return {
        "network": network,
        "recipe": recipe_of(network, settings.epochs).to_dict(),
        "macs_left": left["macs"] / whole["macs"],
        "weight_bits": weight_bits(changed),
        "bytes": artifact.bytes,
        "confidence": seen.after.model_dump(),
        "rows": rows[..., 0].astype(int).tolist(),
        "losses": {name: own.round(6).tolist() for name, own in losses.items()},
    }


def made(network: str, run: Run, settings: Settings, folder: Path) -> Model:
    """The network of a row; formats that ONNX Runtime cannot store are trained for the torch runtime."""
    if network in AS_FLOATS:
        run = run_of("resnet20", settings.examples, folder, settings.seed, "torch")
    return run.apply(recipe_of(network, settings.epochs))


def _as_floats(model: Model) -> Model:
    """The same network with the values of its formats as floats."""
    module = model.copy_module()
    module.load_state_dict(projected_parameters(model), strict=False)
    return model.evolve(module=module, formats={}, key=digest("projected", model.key))


def training_images(
    settings: Settings,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images and labels that the fine-tuning saw too, and such that only the original was trained on."""
    train = images(settings.examples).train
    assert train is not None and train.targets is not None
    again = np.arange(min(settings.members, len(train)))
    pixels, labels = (read_idx(f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    order = np.random.default_rng(0).permutation(len(pixels))  # as images() takes them
    once = np.sort(order[settings.examples : settings.examples + settings.members])
    values = pixels[once].astype(np.float32)[:, None] / 255
    return (train.take(again)[0], train.targets[again]), (values, labels[once].astype(np.int64))


def _asked(served: Served, inputs: np.ndarray, size: int = 250) -> np.ndarray:
    return np.concatenate([served.run(inputs[i : i + size])[0] for i in range(0, len(inputs), size)])


def _losses(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -log_probabilities(outputs, probabilities=False)[np.arange(len(labels)), labels]


def robustness_of(rows: Sequence[Json], data: Data, settings: Settings) -> list[Robustness]:
    """What the corruptions cost each network, beside the first one."""
    picks = np.arange(len(rows[0]["rows"][0]))
    pictures = picture_input(data, picks)
    given = [np.asarray(row["rows"], np.float64)[..., None] for row in rows]
    accuracy = find_metric("accuracy")
    return [told(accuracy, {"before": given[0], "after": own}, pictures, settings.seed) for own in given]


def print_tables(rows: Sequence[Json], found: Sequence[Robustness]) -> None:
    """Everything that a row says, in three tables."""
    print("\nUnder corruption (accuracy, %; drop: against the same network on clean pictures, points)")
    header = (
        "network",
        "recipe",
        "MACs",
        "bits",
        "clean",
        "corrupted",
        "drop",
        "more than fp32",
        "error ratio",
    )
    shown = []
    for row, seen in zip(rows, found, strict=True):
        low, high = seen.extra_drop_ci95 or (0.0, 0.0)
        shown.append(
            [
                row["network"],
                " + ".join(name for step in row["recipe"]["steps"] for name in step) or "as it is",
                f"{row['macs_left']:.3f}",
                f"{row['weight_bits']:.2f}",
                f"{100 * seen.clean_after:.2f}",
                f"{100 * seen.mean_after:.2f}",
                f"{100 * seen.drop_after:.2f}",
                f"{100 * (seen.extra_drop or 0.0):.2f} [{100 * low:.2f}, {100 * high:.2f}]",
                f"{seen.error_ratio:.2f}",
            ]
        )
    print(table(header, shown))
    print("\nBy corruption (accuracy, %, at severity 1 to 5)")
    cells = [
        [kind, row["network"], *[f"{100 * one.after:.1f}" for one in seen.rows if one.kind == kind]]
        for kind in KINDS
        for row, seen in zip(rows, found, strict=True)
    ]
    print(table(("corruption", "network", *map(str, SEVERITIES)), cells))


def print_confidence(rows: Sequence[Json], attacks: Sequence[Json]) -> None:
    """Calibration and membership."""
    print("\nCalibration on all test images (ECE: 15 bins of equal width; %)")
    header = ("network", "accuracy", "confidence", "ECE", "adaptive ECE", "loss, nats")
    shown = []
    for row in rows:
        own = row["confidence"]
        figures = [f"{100 * own[name]:.2f}" for name in ("accuracy", "confidence", "ece", "adaptive_ece")]
        shown.append([row["network"], *figures, f"{own['loss']:.4f}"])
    print(table(header, shown))
    print("\nMembership by a threshold on the loss (AUC; change against fp32 on the same images)")
    kinds = {"again": "fine-tuned on too", "once": "original trained on"}
    lines = [
        [
            one["network"],
            kinds[one["kind"]],
            f"{one['auc']:.4f} [{one['ci95'][0]:.4f}, {one['ci95'][1]:.4f}]",
            f"{one['change']:+.4f} [{one['change_ci95'][0]:+.4f}, {one['change_ci95'][1]:+.4f}]",
            f"{one['member_loss']:.4f}",
            f"{one['other_loss']:.4f}",
        ]
        for one in attacks
    ]
    print(table(("network", "training images", "AUC", "change", "their loss", "others' loss"), lines))


def attacks_of(rows: Sequence[Json]) -> list[Json]:
    """The attack on every network, with as many others as there are training images of each kind."""
    found = []
    for kind in ("again", "once"):
        members = [np.asarray(row["losses"][kind]) for row in rows]
        others = [np.asarray(row["losses"]["others"])[: len(members[0])] for row in rows]
        areas = attack_areas(members, others)
        for i, row in enumerate(rows):
            change, ends = areas.change(0, i)
            found.append(
                {
                    "network": row["network"],
                    "kind": kind,
                    "auc": float(areas.values[i]),
                    "ci95": areas.interval(i),
                    "change": change,
                    "change_ci95": ends,
                    "member_loss": float(members[i].mean()),
                    "other_loss": float(others[i].mean()),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one epoch of 1,000 images, 200 pictures")
    parser.add_argument("--epochs", type=float, default=Settings.epochs, help="of fine-tuning")
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        raise SystemExit("Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")
    settings = Settings(1000, 1, 200, 1000) if args.quick else Settings(epochs=args.epochs)
    parts = Parts("robustness", asdict(settings), shown)
    work = RESULTS / "work" / "robustness"  # steps live on, so that an interrupted run goes on
    rows = [
        parts.get(name.replace(" ", "-"), partial(row_of, name, settings, work, shown)) for name in NETWORKS
    ]
    found = robustness_of(rows, images(settings.examples), settings)
    attacks = attacks_of(rows)
    print(f"\nResNet-20 on Fashion-MNIST through ONNX Runtime; {settings.epochs:g} epochs of fine-tuning on")
    print(f"{settings.examples:,} images; {settings.pictures:,} test images corrupted ({found[0].constants})")
    print_tables(rows, found)
    print_confidence(rows, attacks)
    told_of = ("network", "recipe", "macs_left", "weight_bits", "bytes", "confidence")
    kept = [
        {**{key: row[key] for key in told_of}, "robustness": seen.model_dump()}
        for row, seen in zip(rows, found, strict=True)
    ]
    finish("robustness", [*kept, *attacks], [], asdict(settings), 1)
    parts.forget()


if __name__ == "__main__":
    main()
