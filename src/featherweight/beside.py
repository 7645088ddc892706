"""The report's section on what compression did beside the score: cells, curves, rows of before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherweight import figures
from featherweight.figures import MISSING, Row, Scale, scale_of
from featherweight.metrics import METRICS
from featherweight.outcome import Attack, Calibration, Confidence, Privacy, Result, Robustness, TaskRobustness

CURVE_WIDTH, CURVE_HEIGHT = 72, 24  # of a small curve, in the units of its drawing
WHAT = {
    "robustness": "Corrupted pictures",
    "calibration": "Calibration",
    "privacy": "Membership",
}
_NAMES = {"jpeg": "JPEG"}


@dataclass(frozen=True)
class Aside:
    """What is known beside the score; the fields are those of ``Result``.

    Attributes:
        metric: Its name.
        scale: How its scores are written.
        robustness: On corrupted pictures.
        calibration: Of class probabilities.
        privacy: Of training examples.
        omitted: What is not told, and why.
    """

    metric: str
    scale: Scale
    robustness: Robustness | None
    calibration: Calibration | None
    privacy: Privacy | None
    omitted: Mapping[str, str]

    @classmethod
    def of(cls, result: Result) -> Aside:
        """Of a fit."""
        kept = result.robustness, result.calibration, result.privacy, result.omitted
        return cls(result.metric, scale_of(result), *kept)

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Aside:
        """Of what the command ``robustness`` found, as JSON."""
        seen, calibration, privacy = (told[name] for name in WHAT)
        robustness = None if seen is None else Robustness.model_validate(seen)
        known = METRICS.get(told["metric"])
        clean = 0.0 if robustness is None else robustness.clean_after
        return cls(
            told["metric"],
            Scale(0 <= clean <= 1 if known is None else known.bounded),
            robustness,
            None if calibration is None else Calibration.model_validate(calibration),
            None if privacy is None else Privacy.model_validate(privacy),
            told["omitted"],
        )


def summary(told: Aside) -> list[Row]:
    """One row for each of the three that was looked at; nothing for the others."""
    rows: list[Row] = []
    seen, scale = told.robustness, told.scale
    if seen is not None:
        label = f"Drop by corruption ({seen.examples} pictures, {len(seen.rows)} ways)"
        rows += [_drop_row(label, seen, scale), *task_rows(told)]
    if told.calibration is not None:
        before, after = told.calibration.before, told.calibration.after
        rows.append(_points("Calibration error (ECE)", None if before is None else before.ece, after.ece))
    if told.privacy is not None:
        rows.append(_attack_row("Membership attack (AUC)", told))
    return rows


def task_rows(told: Aside) -> list[Row]:
    """What corruption costs each of several tasks."""
    tasks = () if told.robustness is None else told.robustness.tasks
    return [
        _drop_row(f"Drop by corruption, {task.name} ({task.metric})", task, Scale(task.bounded))
        for task in tasks
    ]


def _drop_row(label: str, seen: Robustness | TaskRobustness, scale: Scale) -> Row:
    change = scale.change(seen.extra_drop)
    if seen.extra_drop_ci95 is not None:
        change += f" {scale.interval(seen.extra_drop_ci95)}"
    return Row(label, scale.drop(seen.drop_before), scale.drop(seen.drop_after), change)


def corruption_rows(told: Aside) -> list[dict[str, Any]]:
    """Two rows for each corruption, one a network: scores at severity 0 to 5 and their mean, and a curve."""
    seen, scale = told.robustness, told.scale
    if seen is None:
        return []
    ends = [seen.clean_before, seen.clean_after, *(one.before for one in seen.rows)]
    known = [value for value in (*ends, *(one.after for one in seen.rows)) if value is not None]
    low, high = min(known), max(known)
    found = []
    for kind in dict.fromkeys(one.kind for one in seen.rows):
        own = sorted((one for one in seen.rows if one.kind == kind), key=lambda one: one.severity)
        before = [value for value in (seen.clean_before, *(one.before for one in own)) if value is not None]
        after = [seen.clean_after, *(one.after for one in own)]
        found.append(
            {
                "kind": _NAMES.get(kind, kind.capitalize()),
                "networks": [
                    (name, [_score(scale, value) for value in values], _mean(scale, values[1:]))
                    for name, values in (("Original", before), ("Artifact", after))
                    if values
                ],
                "curves": [_curve(values, low, high) for values in (before, after)],
            }
        )
    return found


def confidence_rows(told: Aside) -> list[Row]:
    """Calibration and membership, figure by figure."""
    rows: list[Row] = []
    if told.calibration is not None:
        before, after = told.calibration.before, told.calibration.after
        for name, label in (
            ("ece", "Calibration error (ECE, 15 bins of equal width)"),
            ("adaptive_ece", "The same, bins of equally many examples"),
            ("confidence", "Mean confidence of the predicted class"),
            ("accuracy", "Share of right predictions"),
        ):
            rows.append(_points(label, _of(before, name), getattr(after, name)))
        rows.append(_nats("Cross-entropy, nats", _of(before, "loss"), after.loss))
    if told.privacy is not None:
        old, new = told.privacy.before, told.privacy.after
        rows.append(_attack_row("Membership attack by the loss (AUC; 0.5 tells nothing)", told))
        rows.append(_nats("Loss of training examples, nats", _of(old, "member_loss"), new.member_loss))
        rows.append(_nats("Loss of scored examples, nats", _of(old, "other_loss"), new.other_loss))
    return rows


def remarks(told: Aside) -> list[str]:
    """What is not told, and why."""
    return [f"{WHAT.get(name, name)}: {reason}." for name, reason in told.omitted.items()]


def corruption_caption(told: Aside) -> str:
    """What the table of corruptions shows, and the two figures that sum it up."""
    seen, scale = told.robustness, told.scale
    if seen is None:
        return ""
    text = (
        f"{told.metric} on {seen.examples} scored pictures ({seen.pictures}), as they are (0) and with "
        f"corruptions of rising severity, constants of {seen.constants}."
    )
    if seen.drop_before is None:
        text += f" On average corruption costs {scale.drop(seen.drop_after)}."
    else:
        text += (
            f" On average corruption costs the original {scale.drop(seen.drop_before)} and the artifact "
            f"{scale.drop(seen.drop_after)}."
        )
    if seen.error_ratio is not None:
        ratio = figures.ratio(seen.error_ratio)
        text += f" The artifact's error is {ratio} the original's (mean over corruptions)."
    return text


def _of(record: Confidence | Attack | None, name: str) -> float | None:
    return None if record is None else getattr(record, name)


def _points(label: str, before: float | None, after: float) -> Row:
    change = MISSING if before is None else f"{100 * (after - before):+.2f} points"
    return Row(label, figures.percent(before), figures.percent(after), change)


def _nats(label: str, before: float | None, after: float) -> Row:
    change = MISSING if before is None else f"{after - before:+.4f}"
    return Row(label, MISSING if before is None else f"{before:.4f}", f"{after:.4f}", change)


def _attack_row(label: str, told: Aside) -> Row:
    seen = told.privacy
    assert seen is not None
    change = MISSING
    if seen.change is not None and seen.change_ci95 is not None:
        low, high = seen.change_ci95
        change = f"{seen.change:+.3f} [{low:+.3f}, {high:+.3f}]"
    return Row(label, _auc(seen.before), _auc(seen.after), change)


def _auc(attack: Attack | None) -> str:
    if attack is None:
        return MISSING
    return f"{attack.auc:.3f} [{attack.auc_ci95[0]:.3f}, {attack.auc_ci95[1]:.3f}]"


def _score(scale: Scale, value: float) -> str:
    return f"{100 * value:.1f}%" if scale.bounded else scale.score(value)


def _mean(scale: Scale, values: list[float]) -> str:
    return _score(scale, sum(values) / len(values))


def _curve(values: list[float], low: float, high: float) -> str:
    """A path from severity 0 on the left to 5 on the right, the highest score at the top."""
    span, last = (high - low) or 1.0, max(len(values) - 1, 1)
    points = [
        f"{CURVE_WIDTH * i / last:.1f} {CURVE_HEIGHT * (1 - (value - low) / span):.1f}"
        for i, value in enumerate(values)
    ]
    return "M" + " L".join(points) if points else ""
