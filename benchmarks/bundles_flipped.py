"""Flips one byte of a signed bundle, again and again: ``verify`` must fail every time.

``python benchmarks/bundles_flipped.py``. Packs the shipped ResNet-20 in 8 bits for two runtimes, signs it
with a key of openssl, and changes one byte at each of 2,000 random places (``--flips``) by a random amount;
then one byte at every place of the header and of the signature. What was said is told by its words.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, Shown, finish, table
from networks import EXAMPLES

import featherweight as fw
import featherweight_loader
from featherweight.errors import BundleError

FLIPS = 2_000
_HEADER = 64
_RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"


def packed(place: Path) -> tuple[Path, Path]:
    """A signed bundle for two runtimes, and the key that checks it."""
    for command in (
        ["genpkey", "-algorithm", "ed25519", "-out", "key.pem"],
        ["pkey", "-in", "key.pem", "-pubout", "-out", "key.pub"],
    ):
        subprocess.run(["openssl", *command], cwd=place, check=True, capture_output=True)
    (place / "int8.yaml").write_text(_RECIPE)
    for runtime in ("onnxruntime", "openvino"):
        fw.lower(
            f"{EXAMPLES / 'nets.py'}:resnet20",
            weights=str(EXAMPLES / "resnet20.safetensors"),
            data=str(EXAMPLES / "data.npz"),
            recipe=str(place / "int8.yaml"),
            runtime=runtime,
            out=place / runtime,
        )
    fw.pack([place / "onnxruntime", place / "openvino"], place / "model.fw", sign=place / "key.pem")
    return place / "model.fw", place / "key.pub"


def regions(file: Path) -> list[tuple[str, int]]:
    """Names of the parts of a bundle, and where each ends."""
    bundle = featherweight_loader.read(file)
    size = file.stat().st_size
    behind = size - len(bundle.signature)
    body = behind - sum(section.packed for section in bundle.sections)
    ends = [("header", _HEADER), ("head", body)]
    return [*ends, ("sections", behind), ("signature", size)]


def said(file: Path, key: Path, data: bytes, place: int, change: int) -> str:
    """What verify says of the bundle with one byte changed; '' where it finds nothing."""
    changed = bytearray(data)
    changed[place] ^= change
    file.write_bytes(changed)
    try:
        fw.verify(file, key=key)
    except BundleError as error:
        return error.what
    return ""


def flip(
    source: Path, key: Path, places: Iterable[tuple[int, int]], shown: Shown, parts: Sequence[tuple[str, int]]
) -> dict[str, Counter[str]]:
    """Region -> what was said, and how often."""
    data, seen = source.read_bytes(), {name: Counter[str]() for name, _ in parts}
    changed = source.with_name("flipped.fw")
    for place, change in shown.track(list(places), "flipping"):
        name = next(name for name, end in parts if place < end)
        words = said(changed, key, data, place, change)
        seen[name]["found nothing" if not words else _alike(words)] += 1
    return seen


def _alike(words: str) -> str:
    """A message without its numbers and names."""
    return re.sub(r"\d+", "N", re.split(r":|'", words)[0]).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=FLIPS, help="random places")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 places")
    told = parser.parse_args(arguments)
    flips, shown = 100 if told.quick else told.flips, Shown()
    with tempfile.TemporaryDirectory() as folder:
        file, key = packed(Path(folder))
        fw.verify(file, key=key)  # as it is, it is right
        parts, size = regions(file), file.stat().st_size
        random = np.random.default_rng(told.seed)
        chosen = zip(
            random.integers(0, size, flips).tolist(), random.integers(1, 256, flips).tolist(), strict=True
        )
        started = time.monotonic()
        by_chance = flip(file, key, chosen, shown, parts)
        seconds = (time.monotonic() - started) / flips
        ends = [*range(_HEADER), *range(parts[-2][1], size)]
        one_by_one = flip(file, key, [(place, 1) for place in ends], shown, parts)
    rows = [_row(kind, name, counts) for kind, seen in (("random", by_chance), ("each byte", one_by_one))
            for name, counts in seen.items() if counts]  # fmt: skip
    print(
        table(
            ["places", "region", "flipped", "found"],
            [[str(row[k]) for k in row if k != "said"] for row in rows],
        )
    )
    for words, count in sum(
        (c for s in (by_chance, one_by_one) for c in s.values()), Counter[str]()
    ).most_common():
        print(f"{count:6,}  {words}")
    print(f"{size:,} bytes; {1000 * seconds:.1f} ms a flip")
    bars = [
        Bar(row["places"], f"all {row['flipped']:,} in the {row['region']} are found", f"{row['found']:,}",
            row["found"] == row["flipped"])
        for row in rows
    ]  # fmt: skip
    settings = {"flips": flips, "seed": told.seed, "bytes": size, "seconds_a_flip": seconds}
    finish("bundles_flipped", rows, bars, settings, 1)
    return 0 if all(bar.kept for bar in bars) else 1


def _row(places: str, region: str, counts: Counter[str]) -> dict[str, Any]:
    flipped = sum(counts.values())
    found = flipped - counts["found nothing"]
    return {"places": places, "region": region, "flipped": flipped, "found": found, "said": dict(counts)}


if __name__ == "__main__":
    sys.exit(main())
