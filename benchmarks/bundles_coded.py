"""Sizes of artifacts in a bundle beside zstd -19 and xz -9, and beside the entropy of what is coded.

``python benchmarks/bundles_coded.py``. The shipped networks in fp32, 8 bits, weights of 4 bits, and with 90 %
zeros (not trained again: sizes only) on every installed runtime. A peer packs all files of an artifact as
one; a bundle counts whole, head and digests too.
"""

from __future__ import annotations

import argparse
import io
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

import zstandard
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import load_network

import featherweight_loader
from featherweight.bundles.write import Coded, Member, write_bundle
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.errors import FeatherweightError
from featherweight.plugins import find_runtime, runtime_names
from featherweight.recipe import Recipe

NETWORKS = ("resnet20", "depthwise")
_SPARSE = {"sparsify": {"sparsity": 0.9, "schedule": "none"}}
KINDS: dict[str, list[dict[str, Any]]] = {
    "fp32": [],
    "int8": [{"quantize": {"samples": 64}}],
    "int4": [{"quantize": {"weights": "int4", "activations": "none"}}],
    "pruned": [_SPARSE],
    "pruned int8": [_SPARSE, {"quantize": {"samples": 64}}],
}
_LARGE = 100_000  # bytes of a file from which on its streams count
_SIZES = ("bytes", "zstd", "xz", "bundle", "head", "streams", "entropy")


def row(files: list[tuple[str, bytes]], runtime: str) -> dict[str, Any]:
    """What becomes of the files of one artifact."""
    members = [Member(path, data, runtime=runtime) for path, data in files]
    out = io.BytesIO()
    started = time.perf_counter()
    packed = write_bundle(out, members)
    encoding = time.perf_counter() - started
    bundle = featherweight_loader.read(out.getvalue())
    started = time.perf_counter()
    same = all(bundle.data(path) == data for path, data in files)
    decoding = time.perf_counter() - started
    whole = b"".join(data for _, data in files)
    return {
        "bytes": len(whole),
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(whole)),
        "xz": len(lzma.compress(whole, preset=9)),
        "bundle": packed.bytes,
        "head": packed.head,
        "coded": sum(one.coded for one in packed.files),
        "streams": _large(packed.files, "streams"),
        "entropy": _large(packed.files, "entropy"),
        "same": same,
        "encode_s": encoding,
        "decode_mb_s": len(whole) / decoding / 1e6,
    }


def _large(files: tuple[Coded, ...], what: str) -> float:
    return float(sum(getattr(one, what) for one in files if one.bytes > _LARGE))


def rows_of(name: str, runtime: str, kinds: list[str], shown: Shown) -> list[dict[str, Any]]:
    """Every kind of one network on one runtime."""
    network = load_network(name, RESULTS / "work" / "weights", calibration=64, scored=64)
    sources = load_sources(network.spec, weights=str(network.weights), data=network.data)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        target = fit_targets(runtime, 1, "local", "")[0]
        run = Run(sources.model, sources.data, target, Store(Path(folder) / "store"), progress=shown)
        for kind in kinds:
            told = {"network": name, "runtime": runtime, "kind": kind}
            try:
                model = run.apply(Recipe.from_dict({"version": 1, "steps": [{"fold": {}}, *KINDS[kind]]}))
                artifact = run.lower(model)
            except FeatherweightError as error:
                rows.append({**told, "failed": error.what})
                continue
            files = [(path, (artifact.folder / path).read_bytes()) for path in artifact.files]
            rows.append(told | row(files, runtime))
    return rows


def _shown(rows: list[dict[str, Any]]) -> str:
    headers = ("network", "runtime", "kind", "bytes", "zstd -19", "xz -9", "bundle", "head", "streams")
    headers += ("entropy", "ratio", "encode s", "decode MB/s")
    lines = []
    for one in rows:
        names = [one["network"], one["runtime"], one["kind"]]
        if "failed" in one:
            lines.append([*names, "-", *[""] * 9])
            continue
        ratio = f"{one['streams'] / one['entropy']:.4f}" if one["entropy"] else "-"
        sizes = [f"{one[key]:,.0f}" for key in _SIZES]
        lines.append([*names, *sizes, ratio, f"{one['encode_s']:.1f}", f"{one['decode_mb_s']:.0f}"])
    return table(headers, lines)


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the project promises of coded sizes."""
    made = [one for one in rows if "failed" not in one]
    if not made:
        return []
    streams, entropy = (sum(one[key] for one in made) for key in ("streams", "entropy"))
    worst = max(one["bundle"] / min(one["zstd"], one["xz"]) for one in made)
    larger = [one for one in made if one["coded"] > min(one["zstd"], one["xz"])]
    return [
        Bar(
            "all artifacts",
            "the same bytes again",
            f"{len(made)} artifacts",
            all(one["same"] for one in made),
        ),
        Bar(
            f"files of more than {_LARGE // 1000} KB",
            "coded streams within 2 % of their entropy",
            f"{100 * (streams / max(entropy, 1) - 1):.2f} % above",
            streams <= 1.02 * entropy,
        ),
        Bar(
            "all artifacts",
            "coded <= zstd -19 and xz -9",
            f"{len(larger)} larger; the whole bundle is at most {worst:.3f} of the smaller",
            not larger,
        ),
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    installed = [name for name in runtime_names() if find_runtime(name).installed()]
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", default=installed, choices=installed)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="one network on one runtime")
    asked = parser.parse_args()
    if asked.quick:
        asked.networks, asked.runtimes = asked.networks[:1], asked.runtimes[:1]
    shown = Shown()
    tell_load(shown)
    settings = {"networks": asked.networks, "runtimes": asked.runtimes, "kinds": asked.kinds}
    parts = Parts("bundles_coded", {"kinds": asked.kinds}, shown)
    rows: list[dict[str, Any]] = []
    for name in asked.networks:
        for runtime in asked.runtimes:
            shown.note(f"{name} on {runtime}")
            rows += parts.get(
                f"{name}-{runtime}", lambda a=name, b=runtime: rows_of(a, b, asked.kinds, shown)
            )
    print(_shown(rows))
    finish("bundles_coded", rows, bars(rows), settings, 1)
    parts.forget()


if __name__ == "__main__":
    main()
