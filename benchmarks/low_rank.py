"""Linear layers as products of low rank: weighted by activations against plain, at equal parameters.

    python benchmarks/low_rank.py [--quick]

all-MiniLM-L6-v2 (384 wide, 6 layers): every linear layer of the encoder at one rank, so that parameters are
equal by construction, and ranks chosen for a budget. The factors are made from the first sentences and judged
on the last ones: the error of each layer's output on its float inputs, that of the network's output, and the
cosine of sentence embeddings.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bar, Parts, Shown, finish, table
from language import Case, minilm
from torch import Tensor

from featherweight.data import Data
from featherweight.engine.run import TargetSupports
from featherweight.method import Context
from featherweight.methods.factorize import Factorize
from featherweight.model import Model, Replace
from featherweight.plugins import find_runtime
from featherweight.runtime import Target
from featherweight.tools.costs import totals
from featherweight.tools.simulate import Replay, simulate

_BATCH = 16
_LAYERS = "encoder.*"
_KEPT = (0.75, 0.5)  # of the parameters of the encoder's linear layers
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain SVD": {"by": "weights"},
    "weighted": {"follow": False},
    "weighted, layers follow": {"follow": True},
}


@dataclass(frozen=True)
class Row:
    """One way at one size.

    Attributes:
        kept: Fraction of the linear layers' parameters, as asked.
        way: Name of the way.
        params: Of the whole network, against float.
        layer_error: Mean over layers of the error of a layer's output on its float inputs, relative.
        worst_layer: The largest of them.
        output_error: Of the network's output at tokens, relative.
        cosine: Of sentence embeddings to those of float, mean.
        least: The smallest cosine.
    """

    kept: str
    way: str
    params: float
    layer_error: float
    worst_layer: float
    output_error: float
    cosine: float
    least: float


def context(case: Case, shown: Shown) -> Context:
    target = Target("torch").resolved()
    data = Data.of(x=case.scored, calibration=case.calibration, batch_size=_BATCH)
    return Context(
        models={"original": case.model},
        data=data,
        target=target,
        supports=TargetSupports(find_runtime("torch"), target),
        progress=shown,
    )


def batches(arrays: tuple[np.ndarray, ...]) -> list[tuple[Tensor, ...]]:
    count = len(arrays[0])
    return [
        tuple(torch.from_numpy(one[at : at + _BATCH]) for one in arrays) for at in range(0, count, _BATCH)
    ]


def layer_errors(original: Model, changed: Model, case: Case) -> dict[str, float]:
    """Error of each changed layer's output on what it reads in the float network, over its variance."""
    paths = [edit.path for edit in changed.edits if isinstance(edit, Replace)]
    replay = Replay(original)
    calls = {node.inputs[0]: [] for node in replay.graph if node.layer in paths}  # type: ignore[var-annotated]
    for node in replay.graph:
        if node.layer in paths:
            calls[node.inputs[0]].append(node.layer)
    noise, signal = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)

    def observe(name: str, value: Tensor) -> Tensor:
        for path in calls.get(name, ()):
            wanted = original.module.get_submodule(path)(value)
            noise[path] += float((changed.module.get_submodule(path)(value) - wanted).square().sum())
            flat = wanted.flatten(0, -2)
            signal[path] += float((flat - flat.mean(0)).square().sum())
        return value

    with torch.inference_mode():
        for batch in batches(case.scored):
            replay(batch, observe)
    return {path: noise[path] / signal[path] for path in paths}


def outputs(model: Model, case: Case) -> np.ndarray:
    run = simulate(model)
    with torch.inference_mode():
        return np.concatenate([run(*batch)[0].numpy() for batch in batches(case.scored)])


def row(
    case: Case, kept: str, way: str, settings: Mapping[str, Any], wanted: np.ndarray, shown: Shown
) -> Row:
    method = Factorize.model_validate({**settings, "where": {"include": [_LAYERS]}})
    changed = method.apply(case.model, context(case, shown))
    errors = layer_errors(case.model, changed, case)
    seen = outputs(changed, case)
    mask = case.scored[1][:, :, None].astype(np.float32)
    cosine = case.score(wanted, seen)
    return Row(
        kept,
        way,
        totals(changed)["params"] / totals(case.model)["params"],
        float(np.mean(list(errors.values()))),
        max(errors.values()),
        float(np.square((seen - wanted) * mask).sum() / np.square(wanted * mask).sum()),
        float(cosine.mean()),
        float(cosine.min()),
    )


def amounts(case: Case, kept: float) -> dict[str, Any]:
    """The budget of the whole network that keeps this fraction of the encoder's linear layers."""
    linear = sum(
        layer.weight.numel()
        for path, layer in case.model.module.named_modules()
        if isinstance(layer, torch.nn.Linear) and "encoder" in path
    )
    whole = totals(case.model)["params"]
    return {"parameters": 1 - (1 - kept) * linear / whole}


def bars(rows: list[Row]) -> list[Bar]:
    found = []
    for kept in dict.fromkeys(one.kept for one in rows):
        by = {one.way: one for one in rows if one.kept == kept}
        plain = by["plain SVD"]
        for way in (name for name in by if name != "plain SVD"):
            one = by[way]
            better = one.layer_error < plain.layer_error and one.output_error < plain.output_error
            seen = f"layers {one.layer_error:.4f} against {plain.layer_error:.4f}, "
            seen += f"network {one.output_error:.4f} against {plain.output_error:.4f}"
            asked = (
                f"{kept}, {way}: lower output error than plain SVD at {plain.params:.3f} of the parameters"
            )
            found.append(Bar("all-MiniLM-L6-v2", asked, seen, better and one.params <= plain.params + 1e-9))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=100, help="calibration sentences")
    parser.add_argument("--scored", type=int, default=300, help="sentences that are scored")
    parser.add_argument("--quick", action="store_true", help="few sentences, one size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shown = Shown()
    calibration, scored = (32, 48) if arguments.quick else (arguments.calibration, arguments.scored)
    settings = {"calibration": calibration, "scored": scored, "quick": arguments.quick}
    parts = Parts("low_rank", settings, shown)
    case = minilm(RESULTS / "language" / "packages", calibration, scored)
    wanted = outputs(case.model, case)
    rows: list[Row] = []
    ranks = [int(384 * 384 * kept / (2 * 384)) // 8 * 8 for kept in _KEPT]
    sizes = [(f"rank {rank}", {"rank": rank}) for rank in ranks]
    sizes += [(f"{kept:.0%} by budget", amounts(case, kept)) for kept in _KEPT]
    for name, amount in sizes[1:2] if arguments.quick else sizes:
        for way, how in WAYS.items():
            shown.note(f"{name}, {way}")
            work = partial(row, case, name, way, {**how, **amount}, wanted, shown)
            made = parts.get(f"{name}, {way}", lambda work=work: asdict(work()))  # type: ignore[misc]
            rows.append(Row(**made))
    headers = ["kept", "way", "params", "layer error", "worst", "output error", "cosine", "least"]
    cells = [
        [one.kept, one.way, *(f"{value:.4f}" for value in list(asdict(one).values())[2:])] for one in rows
    ]
    print(table(headers, cells))
    print("\nerrors: squared, relative, on sentences that the factors were not made from")
    finish("low_rank", [asdict(one) for one in rows], bars(rows), settings, 1)
    parts.forget()


if __name__ == "__main__":
    main()
