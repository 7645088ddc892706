"""What the command line shows: bars, tables, one JSON object, and errors in words.

Results go to standard output; progress, remarks, errors and whatever a user's code prints go to
standard error. Imports nothing heavy at its top.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featherweight.errors import FeatherweightError, MachineError, nearest

if TYPE_CHECKING:
    from featherweight.outcome import Result

T = TypeVar("T")
_WIDTH = 160  # of tables that are not shown on a terminal
_WIDE = 240  # of those with long names


class Bars:
    """Progress on standard error: a bar with an ETA for what takes longer than a moment, and remarks.

    A context manager. Inside of it, what others print to standard output goes to standard error
    too, so that standard output holds the result alone.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._undo = ExitStack()

    def __enter__(self) -> Bars:
        self._undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # third parties warn of their own internals; ours are notes
        if not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._console = Console(stderr=True)
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                disable=not self._console.is_terminal,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._undo.enter_context(self._bars)
        self._undo.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while a bar grows."""
        if self._quiet:
            yield from items
            return
        task = self._bars.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)

    def note(self, message: str) -> None:
        """One line for the user."""
        if not self._quiet:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """One JSON object on standard output."""
    print_text(json.dumps(data, indent=2, default=str, allow_nan=False))


def print_text(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(text + "\n")


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """What a command has done, one 'key: value' a line."""
    if as_json:
        print_json(summary)
        return
    for key, value in summary.items():
        if value is not None:
            print_text(f"{key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")


def print_result(result: Result, out: Path, as_json: bool) -> None:
    """Before and after, and the verdict in words."""
    from featherweight.report import explain, terminal_table
    from featherweight.summary import RUNTIME_HEADERS, runtime_cells

    if as_json:
        sys.stdout.write(result.to_json())
        return
    print_table(["", "before", "after", "change"], [list(row) for row in terminal_table(result)])
    for sentence in explain(result):
        print_text(sentence)
    if len(result.runtimes) > 1:
        print_table(list(RUNTIME_HEADERS), [runtime_cells(row) for row in result.runtimes])
    print_text(f"Written to {out}: open {out / 'report.html'}")
    print_text(f"One small file of it: featherweight pack {out} model.fw")


def print_comparison(told: dict[str, Any], as_json: bool) -> None:
    """The values that both artifacts show, and where they part."""
    from featherweight import figures

    if as_json:
        print_json(told)
        return
    rows = [
        [
            row["value"],
            " x ".join(map(str, row["shape"])),
            figures.decibel(row["sqnr_db"]),
            figures.MISSING if row["loss_db"] is None else f"{row['loss_db']:+.1f}",
            f"{row['largest_error']:.2g}",
        ]
        for row in told["values"]
    ]
    if rows:
        print_table(["value", "shape", "SQNR", "loss, dB", "largest error"], rows)
    for note in told["notes"]:
        print_text(note)
    first, second = told["first"]["runtime"], told["second"]["runtime"]
    print_text(f"Outputs: {figures.decibel(told['outputs_db'])} ({second} against {first})")
    if told["parts_at"] is not None:
        print_text(f"They part at {told['parts_at']}: the first value under {told['below_db']:g} dB")
    elif rows:
        print_text(f"They do not part: no value is under {told['below_db']:g} dB")
    if told["largest_loss_at"] is not None:
        print_text(f"Most is lost at {told['largest_loss_at']}")


def print_measurement(told: dict[str, Any], as_json: bool) -> None:
    """What was seen of an artifact, and of its twin where there is one."""
    from featherweight import figures
    from featherweight.outcome import Measurement

    if as_json:
        print_json(told)
        return
    seen = Measurement(**{name: told[name] for name in Measurement.model_fields if name in told})
    twin = Measurement(**told["baseline"]) if "baseline" in told else Measurement()

    def score(value: float | None) -> str:
        return figures.MISSING if value is None else f"{value:.4f}"

    rows = [
        [f"Quality ({told['metric']})", score(twin.quality), score(seen.quality)],
        ["Quality drop", figures.MISSING, score(seen.quality_drop)],
        ["Agreement with the twin", figures.MISSING, figures.percent(seen.agreement)],
        ["SQNR of the outputs", figures.MISSING, figures.decibel(seen.sqnr_db)],
        ["Flipped predictions", figures.MISSING, figures.flips(seen)],
        ["Size", figures.size(twin.bytes), figures.size(seen.bytes)],
        ["Latency (median, quartiles)", figures.latency(twin.latency_s), figures.latency(seen.latency_s)],
        ["Latency ratio", figures.MISSING, figures.ratio(seen.latency_ratio)],
        ["... its 95% interval", figures.MISSING, figures.interval(seen.latency_ratio_ci95)],
        ["Throughput", figures.rate(twin.throughput), figures.rate(seen.throughput)],
        ["Memory above the runtime", figures.MISSING, figures.size(seen.memory_bytes)],
        ["Memory of the process (peak)", figures.MISSING, figures.size(seen.peak_rss_bytes)],
        ["Energy of a call", figures.joules(twin.energy_j), figures.joules(seen.energy_j)],
    ]
    measured = [row for row in rows if row[1:] != [figures.MISSING, figures.MISSING]]
    if "baseline" in told:
        print_table(["", "twin", "artifact"], measured)
    else:
        print_table(["", "artifact"], [[label, after] for label, _, after in measured])
    if not seen.resolved:
        print_text(
            "The latency is unresolved: its 95% interval stayed too wide; measure longer (--measure-time)."
        )


def print_beside(told: dict[str, Any], as_json: bool) -> None:
    """Scores by corruption and severity, calibration and membership, of an artifact and of its twin."""
    if as_json:
        print_json(told)
        return
    from featherweight import beside

    aside = beside.Aside.read(told)
    rows = beside.corruption_rows(aside)
    if rows:
        print_table(
            ["corruption", "network", "0", "1", "2", "3", "4", "5", "mean of 1 to 5"],
            [[row["kind"], name, *scores, mean] for row in rows for name, scores, mean in row["networks"]],
        )
        print_text(beside.corruption_caption(aside))
    told_rows = (*beside.task_rows(aside), *beside.confidence_rows(aside))
    figures = [[row.label, row.before, row.after, row.change] for row in told_rows]
    if figures:
        print_table(["", "twin", "artifact", "change"], figures)
    for remark in beside.remarks(aside):
        print_text(remark)


def print_packed(told: dict[str, Any], as_json: bool) -> None:
    """What each file takes in a bundle, what the whole takes, and what an update saves."""
    from featherweight import figures

    if as_json:
        print_json(told)
        return
    rows = [
        [
            file["path"],
            f"{file['bytes']:,}",
            f"{file['packed']:,}",
            f"{file['coded']:,}" if file["coded"] else figures.MISSING,
            f"{file['entropy']:,.0f}" if file["coded"] else figures.MISSING,
            figures.percent(file["packed"] / file["bytes"]) if file["bytes"] else figures.MISSING,
        ]
        for file in told["files"]
    ]
    print_table(["file", "bytes", "packed", "coded", "entropy", "share"], rows)
    size, unpacked = told["bytes"], told["unpacked_bytes"]
    print_text(f"{told['out']}: {size:,} bytes, {figures.percent(size / unpacked)} of {unpacked:,}")
    if "alone_bytes" in told:
        print_text(
            f"An update for {told['base']}: {figures.percent(size / told['alone_bytes'])} of the "
            f"{told['alone_bytes']:,} bytes that it takes without it"
        )
    print_text(f"Identity: {told['identity']}")
    print_text("Not signed" if told["key"] is None else f"Signed with key {told['key']}")


def print_verified(told: dict[str, Any], as_json: bool) -> None:
    """What was checked of a bundle, and who vouches for it."""
    if as_json:
        print_json(told)
        return
    print_text(f"Identity: {told['identity']}")
    print_text(f"Signature: {told['signature']}")
    print_text(f"Digests: right, of all that is stored and of {told['files']} files")
    for runtime, seen in told["artifacts"].items():
        what = (
            "what was measured" if seen["measured"] else "what artifact.json tells of; nothing was measured"
        )
        print_text(f"Artifact for {runtime}: {what}")
        print_text(f"Probe of {runtime}: {seen['parity']}")
    print_text("Right" if told["vouched"] else "Nothing is damaged, but nobody vouches for it")


def print_inspected(told: dict[str, Any], as_json: bool) -> None:
    """Layers, totals of each entry, and what runtimes refuse."""
    if as_json:
        print_json(told)
        return
    from featherweight import inspected

    for entry in told["entries"]:
        columns, rows = inspected.table(told, entry)
        print_table(columns, rows, inspected.caption(told, entry), width=_WIDE)
    for line in inspected.remarks(told):
        print_text(line)


def print_table(columns: list[str], rows: list[list[str]], caption: str = "", width: int = _WIDTH) -> None:
    """Aligned columns on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else width)
    console.print(table, highlight=False)
    if caption:
        console.print(caption, highlight=False, markup=False)


def tell_error(error: Exception, as_json: bool) -> int:
    """Say what went wrong, where, and what to do about it; the exit code.

    A full disk is told as one, wherever it showed. Whatever else is not ours is a fault of this package:
    only then is there a traceback.
    """
    told = error if isinstance(error, FeatherweightError) else _full_disk(error)
    if told is not None:
        _say(type(told).__name__, told.what, told.where, told.fix, as_json)
        return told.exit_code
    sys.stderr.write("".join(traceback.format_exception(error)))
    what = f"featherweight failed at something that it should handle: {type(error).__name__}: {error}"
    _say("InternalError", what, None, "please report it, with the lines above and the command", as_json)
    return 1


def _full_disk(error: BaseException) -> MachineError | None:
    """The error that a full disk stands behind."""
    from featherweight.engine.store import tells_full_disk

    cause: BaseException | None = error
    while cause is not None:
        if tells_full_disk(cause):
            where = getattr(cause, "filename", None)
            return MachineError(
                "the disk is full",
                where=None if where is None else str(where),
                fix="free some space and run the same command again: it resumes",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _say(kind: str, what: str, where: str | None, fix: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"error": {"kind": kind, "what": what, "where": where, "fix": fix}})
    sys.stderr.write(f"{kind}: {FeatherweightError(what, where=where, fix=fix)}\n")


def tell_usage(message: str, fix: str, as_json: bool) -> int:
    """Say why a command line cannot be understood; the exit code."""
    said, sign, options = message.partition(" (Possible options: ")  # as click says it
    if sign:
        fix = nearest(said.rpartition(" ")[2], options.rstrip(")").split(", "))
    said, sign, hint = said.partition(" Did you mean ")
    if sign:
        fix = f"did you mean {hint}"
    _say("UsageError", said.rstrip("."), None, fix, as_json)
    return 2


def tell_interrupted(as_json: bool) -> None:
    """Say that there is nothing to hand back."""
    what = "nothing was finished, so nothing is handed back"
    _say("Interrupted", what, None, "run the same command again: it resumes", as_json)
