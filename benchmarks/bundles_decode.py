"""How fast bundles open: ``python benchmarks/bundles_decode.py``.

Imports of the loader, and unpacked int8 weights a second on one core, decoded and checked against their
digests by the Python loader and by the C decoder (gcc -O2). Weights are rounded normal and Laplace values,
of one table and of rows of four spreads with a table each. Times are those of the processor, the least of
some runs, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import constriction
import numpy as np
from common import Bar, Shown, finish, table, tell_load

import featherweight_loader
from featherweight_loader.coder import FREQUENCIES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from handmade import CODES, Bundle, piece, varint

MB_S, IMPORT_S = 25, 0.2
SOURCE = Path(featherweight_loader.__file__).parent
_ROW, _TABLES, _RUNS = 1024, 4, 5
_IMPORTS = {
    "featherweight_loader": "import featherweight_loader",
    "with numpy and the coder": "import featherweight_loader.files, constriction, zstandard",
}


def weights(kind: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Integers, and the class of each row of them where rows differ."""
    rng = np.random.default_rng(0)
    name, _, spread = kind.partition(" ")
    if name == "rows":
        classes = rng.integers(0, _TABLES, count // _ROW)
        values = rng.normal(0, 1, (len(classes), _ROW)) * np.array([6, 12, 24, 48])[classes][:, None]
    else:
        classes = None
        values = (rng.normal if name == "normal" else rng.laplace)(0, float(spread), count)
    return np.clip(np.rint(values), -127, 127).astype(np.int8).reshape(-1), classes


def bundle(values: np.ndarray, classes: np.ndarray | None) -> bytes:
    """A bundle of one file that is one coded piece."""
    made, encoder = Bundle(), constriction.stream.queue.RangeEncoder()
    symbols = values.view(np.uint8) ^ 128  # from -128 on

    def push(part: np.ndarray, lo: int) -> bytes:
        counts = np.bincount(part)
        wanted = counts / counts.max() * FREQUENCIES[-1]
        told = np.abs(FREQUENCIES[:, None] - wanted).argmin(0)
        model = constriction.stream.model.Categorical(FREQUENCIES[told], perfect=False)
        encoder.encode(part.astype(np.int32), model)
        return varint(made.table(lo, told.tolist()))

    if classes is None:
        told = b"\1\0" + push(symbols, 128)
    else:
        told = b"\1\1" + varint(_ROW) + varint(len(classes)) + varint(_TABLES) + push(classes, 0)
        rows = symbols.reshape(-1, _ROW)
        for one in range(_TABLES):
            told += push(rows[classes == one].reshape(-1), 128)
    made.section(np.asarray(encoder.get_compressed(), "<u4").tobytes(), CODES)
    made.file("weights.bin", values.tobytes(), codes=1, pieces=[(0, piece(len(values), 8, told))])
    return made.bytes()


def python_seconds(path: Path, digest: str) -> float:
    """Of reading the bundle and decoding its file."""
    times = []
    for _ in range(_RUNS):
        begun = time.process_time()
        data = featherweight_loader.read(path).data("weights.bin")
        times.append(time.process_time() - begun)
    if hashlib.sha256(data).hexdigest() != digest:
        raise SystemExit("the loader decoded something else")
    return min(times)


def c_seconds(command: Path, path: Path) -> float:
    """Of ``fw check``."""
    times = []
    for _ in range(_RUNS):
        child = subprocess.Popen([command, "check", path], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit("the C decoder refused a bundle")
        times.append(used.ru_utime + used.ru_stime)
    return min(times)


def import_seconds(program: str) -> float:
    """In a fresh interpreter, beyond what that takes itself."""
    text = f"import time; begun = time.process_time(); {program}; print(time.process_time() - begun)"
    environment = os.environ | {"PYTHONPATH": os.fspath(SOURCE.parent)}

    def once() -> float:
        done = subprocess.run(
            [sys.executable, "-c", text], check=True, capture_output=True, text=True, env=environment
        )
        return float(done.stdout)

    return min(once() for _ in range(2 * _RUNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=16, help="of weights in each bundle (default 16)")
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    rows: list[dict[str, Any]] = [
        {"what": f"import {name}", "seconds": import_seconds(program)} for name, program in _IMPORTS.items()
    ]
    bars = [
        Bar(row["what"], f"< {IMPORT_S} s", f"{row['seconds']:.3f} s", row["seconds"] < IMPORT_S)
        for row in rows
    ]
    count = args.megabytes * 1_000_000 // _ROW * _ROW
    with tempfile.TemporaryDirectory() as temporary:
        command, path = Path(temporary) / "fw", Path(temporary) / "m.fw"
        sources = [SOURCE / "c" / name for name in ("fw.c", "fw_cli.c")]
        subprocess.run(["gcc", "-std=c99", "-O2", "-o", command, *sources, "-lzstd", "-lm"], check=True)
        for kind in ("normal 10", "normal 30", "laplace 10", "rows"):
            shown.note(kind)
            values, classes = weights(kind, count)
            path.write_bytes(bundle(values, classes))
            digest = hashlib.sha256(values).hexdigest()
            speeds = {
                "python": count / 1e6 / python_seconds(path, digest),
                "c": count / 1e6 / c_seconds(command, path),
            }
            bits = path.stat().st_size * 8 / count
            rows.append({"what": kind, "bits": bits, **speeds})
            for reader, speed in speeds.items():
                bars.append(Bar(f"{kind}, {reader}", f">= {MB_S} MB/s", f"{speed:.1f} MB/s", speed >= MB_S))
    lines = [
        (
            row["what"],
            f"{row['seconds']:.3f} s" if "seconds" in row else f"{row['bits']:.2f}",
            *(f"{row[name]:.1f}" if name in row else "" for name in ("python", "c")),
        )
        for row in rows
    ]
    print(table(("import or weights", "seconds or bits a weight", "python, MB/s", "C, MB/s"), lines))
    finish("bundles_decode", rows, bars, {"megabytes": args.megabytes, "runs": _RUNS}, threads=1)


if __name__ == "__main__":
    main()
