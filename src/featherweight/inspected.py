"""What ``featherweight inspect`` shows of what it found: tables and sentences."""

from __future__ import annotations

from typing import Any

from featherweight import figures

_COUNTED = ("params", "bytes", "macs", "activation_bytes")
_SHOWN = 4  # layers that a sentence names


def table(told: dict[str, Any], entry: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one entry; columns of what was not looked at are left out."""
    layers = [row for row in told["layers"] if row["entry"] == entry]
    timed = any("latency_share" in row for row in layers)
    columns = ["layer", "type", "output", "params", "bytes", "MACs", "activation bytes"]
    columns += ["time (measured)", "share"] if timed else []
    bits = told["sensitivity"]["bits"] if told["sensitivity"] and entry == "forward" else []
    columns += [f"int{count} drop, SQNR (simulated)" for count in bits]
    return columns, [_row(row, timed, bits) for row in layers]


def _row(row: dict[str, Any], timed: bool, bits: list[int]) -> list[str]:
    cells = [row["name"], row["type"], "x".join(map(str, row["shape"]))]
    cells += [f"{row[key]:,}" for key in _COUNTED]
    if timed:
        cells += [_time(row), figures.percent(row["latency_share"]) if row["latency_share"] else ""]
    return cells + [_suffers(row.get("sensitivity", {}).get(f"int{count}")) for count in bits]


def _suffers(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    drop = figures.MISSING if found["drop"] is None else f"{found['drop']:.4f}"
    return f"{drop}, {figures.decibel(found['sqnr_db'])}"


def _time(row: dict[str, Any]) -> str:
    if row["latency_s"]:
        return figures.seconds(row["latency_s"])
    first, *others = row["fused_into"] or [""]
    return f"in {_near(first, row['name'])}{', ...' if others else ''}" if first else ""


def _near(name: str, other: str) -> str:
    """A layer's path without the folders that it shares with another one's."""
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(parts[shared:])


def caption(told: dict[str, Any], entry: str) -> str:
    """The totals of an entry, in a sentence."""
    seen = told["entries"][entry]
    parts = [f"total: {told['params']:,} parameters, {told['bytes']:,} bytes, {seen['macs']:,} MACs"]
    parts.append(f"activations at their peak: {seen['peak_activation_bytes']:,} bytes, in {seen['peak_at']}")
    if "latency_s" in seen:
        threads = f"{seen['threads']} thread{'s' if seen['threads'] > 1 else ''}"
        parts.append(
            f"a call takes {figures.seconds(seen['latency_s'])}, "
            f"its kernels {figures.seconds(seen['kernel_s'])} while profiled "
            f"({seen['calls']} calls, {threads})"
        )
    text = "\n".join(parts)
    return text if len(told["entries"]) == 1 else f"entry {entry}\n{text}\n"


def remarks(told: dict[str, Any]) -> list[str]:
    """What runtimes refuse, how the sensitivity was found, and notes."""
    lines = []
    for runtime, about in told["refused"].items():
        missing = "" if about["installed"] else " (not installed)"
        for kind, words in (
            ("float", "does not run"),
            ("int8", "keeps in float, though 8 bits are asked for"),
            ("int4_weights", "does not store in 4 bits the weights of"),
        ):
            if about[kind]:
                ops = "; ".join(f"{op} ({_named(layers)})" for op, layers in about[kind].items())
                lines.append(f"{runtime}{missing} {words}: {ops}")
    if told["sensitivity"]:
        found = told["sensitivity"]
        lines.append(
            f"sensitivity is simulated on {found['examples']} examples: the drop of {found['metric']} "
            f"({found['baseline']:.4f} in float) when the weights of that layer alone have so few bits"
        )
    return lines + [f"note: {note}" for note in told["notes"]]


def _named(layers: list[str]) -> str:
    names = [name or "the model itself" for name in layers]
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
