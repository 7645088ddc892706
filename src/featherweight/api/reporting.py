"""``report``: what ``fit`` found, told again. It needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from featherweight import report as reports
from featherweight.engine.output import MARK
from featherweight.engine.store import told_as_machine_error
from featherweight.errors import OutputError
from featherweight.outcome import Result


def report(folder: str | Path) -> dict[str, Any]:
    """Write ``report.html`` again from ``result.json`` of a folder that :func:`fit` wrote.

    Raises:
        OutputError: There is no such file, or it is no result.
    """
    place = Path(folder)
    if not (place / MARK).is_file():
        raise OutputError(f"'{place}' holds no {MARK}", fix="name a folder that featherweight fit wrote")
    try:
        result = Result.model_validate_json((place / MARK).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(
            f"'{place / MARK}' is no result of this version: {_first_finding(error)}",
            fix="run featherweight fit again with --force",
        ) from error
    with told_as_machine_error("the report"):
        unfinished = place / ".report.html.partial"
        unfinished.write_text(reports.render(result), encoding="utf-8")
        unfinished.replace(place / "report.html")
    return {"report": str(place / "report.html"), "met": result.met}


def _first_finding(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg'].lower()}"
