"""Bundles that are wrong, through both readers: ``python benchmarks/bundles_hostile.py``.

5,000 mutated bundles (``--count``): bytes flipped, cut, moved; numbers and names of the head replaced, its
digest made right; sections changed, their digests made right, and those of the files half of the time, so
that readers hand over what they decode. Each is unpacked by the Python loader and by the C decoder
(``--sanitize``: under the address and undefined-behaviour sanitizers) in folders of their own. Counted are
what was taken and refused, where the two disagree, crashes, exceptions outside the loader's tree, files
outside the folder, and the memory that the loader takes; the C decoder has an address space of little.

Told apart are frames that only one of the two libzstd takes: 1.5.4 lets reserved bits stand, 1.5.7 does
not, and what comes out has the right digest all the same.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Bar, Shown, finish, table, tell_load

import featherweight_loader as loader
from featherweight.bundles.write import Member, write_bundle

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import handmade
from mutation import mutated

COUNT, MEMORY = 5_000, 128  # MB: of the loader beyond what whole bundles take, and all of the C decoder's
MAX_BYTES = 16 << 20
SOURCE = Path(loader.__file__).parent / "c"


def subjects(folder: Path) -> list[tuple[str, bytes, Path | None]]:
    """Whole bundles, with the base of an update."""
    found: list[tuple[str, bytes, Path | None]] = []
    for seed in range(3):
        new, old, _ = handmade.everything(seed)
        (folder / f"base{seed}.fw").write_bytes(old)
        found += [("by hand, an update", new, folder / f"base{seed}.fw"), ("by hand", old, None)]
    weights = handmade.normal(6000, 1, 8.0)
    weights[::3] = 0
    members = [
        Member("model.bin", b"a header " * 5 + weights.tobytes() + b"behind" * 9),
        Member("more/other.bin", handmade.normal(4000, 2).tobytes()),
        Member("artifact.json", b'{"runtime": "onnxruntime"}', "document"),
        Member("model_card.md", b"# A model\n" * 20, "document"),
    ]
    write_bundle(folder / "written.fw", members)
    return [*found, ("written", (folder / "written.fw").read_bytes(), None)] * 2


def tree(folder: Path) -> dict[str, bytes] | None:
    """What lies in a folder, None where there is none."""
    if not folder.exists():
        return None
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def in_python(path: Path, base: Path | None, folder: Path) -> tuple[str, str]:
    """How the loader took a bundle: 'taken', 'refused', or what it should not raise; and its error."""
    try:
        loader.read(path, base=base, max_bytes=MAX_BYTES).unpack(folder / "out")
    except loader.BundleError as error:
        return "refused", str(error)
    except BaseException:  # noqa: BLE001  # what comes here is a fault, which is counted
        return traceback.format_exc(), ""
    return "taken", ""


def in_c(command: Sequence[str | Path], path: Path, base: Path | None, folder: Path) -> str:
    """The same of the C decoder: 'taken', 'refused', or what it should not say."""
    arguments = [*command, "unpack", path, folder / "out", "--max-bytes", str(MAX_BYTES)]
    done = subprocess.run(
        [*map(os.fspath, arguments), *(["--base", os.fspath(base)] if base else [])],
        check=False,
        capture_output=True,
        cwd=folder,
    )
    said = done.stderr.decode(errors="replace")
    if done.returncode in (0, 2) and "Sanitizer" not in said and "runtime error" not in said:
        return "refused" if done.returncode else "taken"
    return f"exit code {done.returncode}: {said}"


def outside(folder: Path, answer: str) -> list[str]:
    """What lies where nothing should: beside the folder, or in it where the bundle was refused."""
    allowed = {"out"} if answer == "taken" else set()
    return [path.name for path in folder.iterdir() if path.name not in allowed]


def faults_of(ours: str, why: str, theirs: str, places: Sequence[Path]) -> dict[str, str]:
    """What is wrong with two answers, by its kind; '' where nothing is."""
    trees = [tree(place / "out") for place in places]
    return {
        "traceback": ours if ours not in ("taken", "refused") else "",
        "crash": theirs if theirs not in ("taken", "refused") else "",
        ("libzstd" if why.startswith("a zstd frame") else "disagreement"): (
            f"python: {ours[:40]} {why}, C: {theirs[:40]}" if ours != theirs else ""
        ),
        "other bytes": "the trees differ" if ours == theirs == "taken" and trees[0] != trees[1] else "",
        "outside": ", ".join(outside(places[0], ours) + outside(places[1], theirs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help=f"bundles (default {COUNT})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="compile the C decoder with sanitizers")
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    seen: Counter[tuple[str, str, str]] = Counter()
    faults: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = folder / "fw"
        extra = ["-fsanitize=address,undefined", "-g"] if args.sanitize else []
        sources = [SOURCE / name for name in ("fw.c", "fw_cli.c")]
        subprocess.run(
            ["gcc", "-std=c99", "-O2", *extra, "-o", command, *sources, "-lzstd", "-lm"], check=True
        )
        limit = [] if args.sanitize else ["sh", "-c", f'ulimit -v {MEMORY * 1000}; exec "$0" "$@"']
        whole = subjects(folder)
        for _, data, base in whole:
            loader.read(data, base=base).check()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in shown.track(range(args.count), "mutated bundles", args.count):
            rng = random.Random(f"{args.seed} {number}")
            kind, data, base = whole[number % len(whole)]
            bad = mutated(data, rng, base.read_bytes() if base else None)
            path = folder / "mutated.fw"
            path.write_bytes(bad)
            places = [folder / "python", folder / "c"]
            for place in places:
                place.mkdir()
            ours, why = in_python(path, base, places[0])
            theirs = in_c([*limit, command], path, base, places[1])
            wrong = faults_of(ours, why, theirs, places)
            faults += [
                {"number": number, "kind": kind, "fault": name, "told": told}
                for name, told in wrong.items()
                if told
            ]
            seen[kind, ours[:7], theirs[:7]] += 1
            for place in places:
                shutil.rmtree(place)
        python_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    for fault in faults[:20]:
        shown.note(str(fault))
    rows = [
        {"bundle": kind, "python": ours, "c": theirs, "count": count}
        for (kind, ours, theirs), count in sorted(seen.items())
    ]
    print(table(("bundle", "python", "C", "bundles"), [[str(cell) for cell in row.values()] for row in rows]))
    names = ("traceback", "crash", "disagreement", "other bytes", "outside")
    counts = Counter(fault["fault"] for fault in faults)
    about = f"{args.count} mutated bundles"
    bars = [Bar(about, f"no {name}", str(counts[name]), not counts[name]) for name in names]
    bars.append(Bar(about, "of libzstd alone", str(counts["libzstd"]), None))
    bars.append(
        Bar(
            "memory of the loader",
            f"< {MEMORY} MB more than for whole ones",
            f"{python_memory / 1e6:.0f} MB",
            python_memory < MEMORY * 1e6,
        )
    )
    if not args.sanitize:
        broken = sum(counts[name] for name in names)
        bars.append(Bar("C", f"as here in {MEMORY} MB of address space", str(broken), not broken))
    settings = {"count": args.count, "seed": args.seed, "sanitize": args.sanitize, "max_bytes": MAX_BYTES}
    name = "bundles_hostile_sanitized" if args.sanitize else "bundles_hostile"
    finish(name, [*rows, *faults], bars, settings, threads=1)


if __name__ == "__main__":
    main()
