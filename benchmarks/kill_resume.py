"""Kills ``featherweight fit`` at random moments, runs it again, and compares with an undisturbed run.

    python benchmarks/kill_resume.py [--kills 10] [--seed 0] [--json kill_resume.json]

Every experiment has a store of its own: the whole process group gets SIGKILL at a moment drawn over the
length of the undisturbed run, then the same command runs to its end. The artifact must have the same
digest, and the store's journal no entry twice. Exit code 1 if not. Last, the same command without
any network (``unshare -n``) and a rerun of the finished one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_mnist"
RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"
COMMAND = (
    *(str(Path(sys.executable).with_name("featherweight")), "fit", f"{EXAMPLE / 'nets.py'}:resnet20"),
    *("--weights", str(EXAMPLE / "resnet20.safetensors"), "--data", str(EXAMPLE / "data.npz")),
    *(
        "--recipe",
        "int8.yaml",
        "--max-drop",
        "0.5%",
        "--max-size",
        "350KB",
        "--no-tune",
        "--quiet",
        "--out",
        "out",
    ),
)


@dataclass(frozen=True)
class Row:
    """One experiment.

    Attributes:
        experiment: What was done.
        moment_s: When it was killed; None: it was not.
        kept: Entries in the store when it died.
        seconds: How long the run to the end took.
        computed: Entries that the store's journal counts at the end.
        twice: Those that it counts more than once.
        left: Half-written files and folders at the end.
        sha256: Of the artifact.
    """

    experiment: str
    moment_s: float | None
    kept: int
    seconds: float
    computed: int
    twice: int
    left: int
    sha256: str


def start(folder: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own and with the folder's own store."""
    environment = {**os.environ, "FEATHERWEIGHT_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    (folder / "int8.yaml").write_text(RECIPE)
    return subprocess.Popen([*prefix, *COMMAND], cwd=folder, env=environment, start_new_session=True)


def journal(folder: Path) -> Counter[tuple[str, str]]:
    """Kind and key of what was computed, and how often."""
    file = folder / "cache" / "journal.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return Counter((entry["kind"], entry["key"]) for entry in map(json.loads, lines))


def to_the_end(
    name: str, folder: Path, moment: float | None = None, prefix: tuple[str, ...] = (), kept: int = 0
) -> Row:
    """Run it to its end and count."""
    started = time.monotonic()
    code = start(folder, prefix).wait()
    if code not in (0, 3):
        raise SystemExit(f"{name}: the command ended with exit code {code}")
    counted = journal(folder)
    left = [*folder.rglob("*partial*"), *(folder / "tmp").glob("featherweight*")]
    result = json.loads((folder / "out" / "result.json").read_text())
    return Row(
        experiment=name,
        moment_s=moment,
        kept=kept,
        seconds=time.monotonic() - started,
        computed=sum(counted.values()),
        twice=sum(count > 1 for count in counted.values()),
        left=len(left),
        sha256=result["chosen"]["sha256"],
    )


def killed(number: int, folder: Path, moment: float) -> Row:
    """Kill the whole group at a moment, then run it to its end."""
    process = start(folder)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return to_the_end(f"kill {number}", folder, moment, kept=sum(journal(folder).values()))


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| | killed at, s | entries kept | run to the end, s | computed | twice | left over | sha256 |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        moment = "–" if row.moment_s is None else f"{row.moment_s:.1f}"
        lines.append(
            f"| {row.experiment} | {moment} | {row.kept} | {row.seconds:.1f} | {row.computed} | {row.twice} "
            f"| {row.left} | {row.sha256[:12]} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the experiments, print the table; the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--kills", type=int, default=10, help="experiments (10)")
    options.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options.add_argument("--json", type=Path, help="write the rows there")
    asked = options.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        rows = [to_the_end("undisturbed", home / "undisturbed")]
        for number in range(1, asked.kills + 1):
            moment = draw.uniform(0.0, rows[0].seconds)
            rows.append(killed(number, home / f"kill{number}", moment))
            print(f"{rows[-1].experiment}: killed at {moment:.1f} s, {rows[-1].kept} kept", file=sys.stderr)
        if not subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
            rows.append(to_the_end("no network", home / "alone", prefix=("unshare", "-n")))
        rows.append(to_the_end("rerun", home / "undisturbed", kept=rows[0].computed))
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    good = all(
        row.sha256 == rows[0].sha256 and row.computed == rows[0].computed and not row.twice and not row.left
        for row in rows
    )
    print("every run ended with the same artifact" if good else "NOT every run ended the same")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
