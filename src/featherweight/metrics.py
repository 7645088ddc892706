"""Metrics by name: per-example rows of statistics, and the score that a set of rows reduces to.

Rows and reduction are apart so that any subset or resample of the examples can be scored without
running the model again: halves for the search, flips, and the paired bootstrap.

An *additive* metric is a function of the mean of its rows (accuracy, mse, and ratios of sums such as
perplexity and word error rate); f1 and pearson reduce all rows at once, by torchmetrics. Edit
distances are torchmetrics' too. What torchmetrics only gives summed over a batch is computed here per
example; the tests hold every metric to its torchmetrics function.

A NaN in an output is a wrong answer: never a correct class, an infinite error.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from featherweight.drops import drop, drop_of_rows, paired_bootstrap
from featherweight.errors import DataError, PluginError, nearest
from featherweight.usercode import call_user, defined_at, load_callable

__all__ = [
    "F1",
    "METRICS",
    "Agreement",
    "ElementError",
    "ErrorRate",
    "Metric",
    "Outputs",
    "Pearson",
    "Perplexity",
    "Sqnr",
    "Targets",
    "TopK",
    "UserMetric",
    "drop",
    "drop_of_rows",
    "find_metric",
    "paired_bootstrap",
    "predicted_classes",
    "sqnr_db",
]

Outputs = tuple[np.ndarray, ...]
Targets = np.ndarray | Outputs | None
UserScore = Callable[[Any, Any], Any]

IGNORED = -100  # the label that cross entropy leaves out, in torch and so here


@dataclass(frozen=True)
class Metric(ABC):
    """How good outputs are, per example and over a set.

    Attributes:
        name: As the user writes it.
        higher_is_better: Else it is an error or a loss.
        bounded: A rate on a fixed scale, so drops are absolute; else they are fractions of the baseline.
        classes: The first output holds class scores on axis 1.
        needs_labels: Compares with targets; else with the original's outputs.
        text: Compares strings, so the data must bring ``decode``.
    """

    name: str
    higher_is_better: bool = True
    bounded: bool = True
    classes: bool = False
    needs_labels: bool = True
    text: bool = False

    additive: ClassVar[bool] = True

    @property
    def compares(self) -> bool:
        """Whether rows compare with the original's outputs."""
        return not self.needs_labels

    def beside(self, targets: Targets, original: Outputs) -> Targets:
        """What rows take where they compare: labels, if there are any, and the original's outputs."""
        return original

    def parts(self, rows: np.ndarray) -> list[tuple[Metric, np.ndarray]]:
        """The metrics of several tasks and the rows of each; none where the rows are of one."""
        return []

    @abstractmethod
    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        """Statistics of each example, float64 (N, k).

        Args:
            outputs: The model's flat outputs for N examples; for a text metric, one array of strings.
            targets: Labels, or the original's outputs for a metric that needs none.

        Raises:
            DataError: Outputs or targets do not have the shape that the metric needs.
        """

    def of_means(self, means: np.ndarray) -> np.ndarray:
        """Scores (...) of row means (..., k), for an additive metric."""
        return np.asarray(means[..., 0])

    def reduce(self, rows: np.ndarray) -> float:
        """The score of a set of examples."""
        return float(self.of_means(rows.mean(axis=0)))


@dataclass(frozen=True)
class TopK(Metric):
    """Share of examples whose label is among the k highest scores; of equal scores the lower index counts.

    Dense outputs (N, C, ...) with targets (N, ...): the share of positions, per example (k = 1 only).
    """

    name: str = "accuracy"
    classes: bool = True
    k: int = 1

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        scores = _class_scores(self, outputs)
        labels = _labels(self, scores, targets)
        if self.k == 1:
            return _per_example(predicted_classes(scores) == labels)
        if scores.ndim != 2:
            raise DataError(f"metric '{self.name}' needs outputs (N, C), not {scores.shape}", fix=_OTHER)
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        before = np.arange(scores.shape[1]) < labels[:, None]
        ahead = ((scores > own) | ((scores == own) & before)).sum(axis=1)
        return _per_example((ahead < self.k) & ~np.isnan(scores).any(axis=1))


@dataclass(frozen=True)
class Agreement(Metric):
    """Share of examples (of positions, for dense outputs) on which the original predicts the same class."""

    name: str = "agreement"
    classes: bool = True
    needs_labels: bool = False

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        ours = predicted_classes(_class_scores(self, outputs))
        theirs = predicted_classes(_class_scores(self, _original(self, targets)))
        return _per_example((ours == theirs) & (ours >= 0))


@dataclass(frozen=True)
class Sqnr(Metric):
    """1 - noise power / signal power against the original's outputs: 1 is identical, 0.99 is 20 dB.

    Rows are (noise, signal) energies over all floating-point outputs (over all, if none is).
    """

    name: str = "sqnr"
    needs_labels: bool = False

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        originals = _original(self, targets)
        pairs = list(zip(outputs, originals, strict=False))  # one array of targets: the first output
        total = np.zeros((len(originals[0]), 2))
        for ours, theirs in [pair for pair in pairs if pair[1].dtype.kind == "f"] or pairs:
            signal = np.asarray(theirs, np.float64).reshape(len(theirs), -1)
            output = np.asarray(ours, np.float64).reshape(len(ours), -1)
            with np.errstate(invalid="ignore"):
                noise = np.where(output == signal, 0.0, output - signal)  # also where both are -inf, a mask
            total[:, 0] += np.square(noise).sum(axis=1)
            total[:, 1] += np.square(np.where(np.isfinite(signal), signal, 0.0)).sum(axis=1)
        total[np.isnan(total[:, 0]), 0] = np.inf
        return total

    def of_means(self, means: np.ndarray) -> np.ndarray:
        return 1.0 - _ratio(means)


@dataclass(frozen=True)
class ElementError(Metric):
    """Mean of |output - target| ** power over the elements of an example: mae (1) or mse (2)."""

    name: str = "mse"
    higher_is_better: bool = False
    bounded: bool = False
    power: int = 2

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        output, target = _values(self, outputs, targets)
        error = np.abs(output - target) ** self.power
        rows = error.mean(axis=1, keepdims=True)
        return np.where(np.isnan(rows), np.inf, rows)


@dataclass(frozen=True)
class Perplexity(Metric):
    """exp(sum of -log p(token) / tokens) of logits (N, T, V) and targets (N, T); label -100 is left out.

    Rows are (negative log likelihood, tokens).
    """

    name: str = "perplexity"
    higher_is_better: bool = False
    bounded: bool = False

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        import torch
        from torch.nn.functional import cross_entropy

        logits, labels = outputs[0], np.asarray(targets)
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise DataError(
                f"metric 'perplexity' needs outputs (N, T, V) and targets (N, T), "
                f"not {logits.shape} and {labels.shape}",
                fix="give the next token of every position as y",
            )
        rows = np.empty((len(logits), 2))
        for i, (one, label) in enumerate(zip(logits, labels.astype(np.int64), strict=True)):
            tokens = torch.from_numpy(np.asarray(one, np.float32))
            lost = cross_entropy(tokens, torch.from_numpy(label), reduction="sum", ignore_index=IGNORED)
            rows[i] = (lost.item(), np.count_nonzero(label != IGNORED))
        rows[np.isnan(rows[:, 0]), 0] = np.inf
        return rows

    def of_means(self, means: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(_ratio(means)))


@dataclass(frozen=True)
class ErrorRate(Metric):
    """Edits / length of the reference, in words (wer) or characters (cer). Rows are (edits, length)."""

    name: str = "wer"
    higher_is_better: bool = False
    text: bool = True
    words: bool = True

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        from torchmetrics.functional.text import edit_distance

        said, meant = _texts(self, outputs[0], "output"), _texts(self, np.asarray(targets), "target")
        if self.words:
            said, meant = _as_characters(said, meant)
        edits = edit_distance(said, meant, reduction="none")
        return np.stack([edits.numpy().astype(np.float64), [float(len(one)) for one in meant]], axis=1)

    def of_means(self, means: np.ndarray) -> np.ndarray:
        return _ratio(means)


@dataclass(frozen=True)
class F1(Metric):
    """Mean over classes of 2 TP / (2 TP + FP + FN); classes that nobody predicts or means are left out.

    Rows are (predicted class, label); -1 is a prediction that is not a number.
    """

    name: str = "f1"
    classes: bool = True
    additive: ClassVar[bool] = False

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        scores = _class_scores(self, outputs)
        if scores.ndim != 2:
            raise DataError(f"metric 'f1' needs outputs (N, C), not {scores.shape}", fix=_OTHER)
        labels = _labels(self, scores, targets)
        return np.stack([predicted_classes(scores), labels], axis=1).astype(np.float64)

    def reduce(self, rows: np.ndarray) -> float:
        import torch
        from torchmetrics.functional.classification import multiclass_f1_score

        predicted, label = torch.from_numpy(rows.astype(np.int64)).T
        count = int(torch.maximum(predicted.max(), label.max())) + 1
        predicted = torch.where(predicted < 0, count, predicted)  # one class more, for no prediction
        each = multiclass_f1_score(
            predicted, label, num_classes=count + 1, average="none", validate_args=False
        )
        met = torch.zeros(count + 1, dtype=torch.bool)
        met[predicted] = met[label] = True
        return float(each[:count][met[:count]].mean())


@dataclass(frozen=True)
class Pearson(Metric):
    """Linear correlation of outputs and targets, mean over the values of an example; 0 where one is constant.

    Rows are (outputs ..., targets ...).
    """

    name: str = "pearson"
    additive: ClassVar[bool] = False

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        return np.concatenate(_values(self, outputs, targets), axis=1)

    def reduce(self, rows: np.ndarray) -> float:
        import torch
        from torchmetrics.functional.regression import pearson_corrcoef

        output, target = torch.from_numpy(rows).chunk(2, dim=1)
        if len(rows) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of a constant, which is 0 here
            each = pearson_corrcoef(output.squeeze(1), target.squeeze(1))
        return float(torch.nan_to_num(each, nan=0.0).mean())


@dataclass(frozen=True)
class UserMetric(Metric):
    """A user's ``function(outputs, targets)``, which scores each example; the score is the mean.

    The function gets an array when the model has one output, else the tuple; ``targets`` is None
    without labels. Its attributes ``higher_is_better`` and ``bounded`` count; both are true if absent.
    """

    needs_labels: bool = False
    function: UserScore | None = None

    @property
    def compares(self) -> bool:
        return False

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        if self.function is None:
            raise DataError(
                f"metric '{self.name}' has no function to score examples with",
                fix="give function=, or a Data whose score() returns its rows",
            )
        given = outputs[0] if len(outputs) == 1 else outputs
        with np.errstate(all="ignore"):
            said = call_user(self.function, given, targets, error=DataError)
        scores, where = np.asarray(said), defined_at(self.function)
        if scores.shape != (len(outputs[0]),) or scores.dtype.kind not in "fiub":
            raise DataError(
                f"metric '{self.name}' returned {scores.dtype} {scores.shape}, not {len(outputs[0])} scores",
                where=where,
                fix="return one number for each example, shape (N,)",
            )
        worst = -np.inf if self.higher_is_better else np.inf
        if self.bounded:
            worst = 0.0 if self.higher_is_better else 1.0
        rows = np.where(np.isnan(scores), worst, scores.astype(np.float64))[:, None]
        if self.bounded and not ((rows >= 0) & (rows <= 1)).all():
            outside = rows[(rows < 0) | (rows > 1)][0]
            raise DataError(
                f"metric '{self.name}' returned {outside:g}, outside 0..1",
                where=where,
                fix=f"write {self.name}.bounded = False below the function: drops become relative",
            )
        return rows


_OTHER = "use a metric for these outputs, or your own: --metric path.py:callable"

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": TopK(),
        "top5": TopK("top5", k=5),
        "f1": F1(),
        "mse": ElementError(),
        "mae": ElementError("mae", power=1),
        "pearson": Pearson(),
        "perplexity": Perplexity(),
        "wer": ErrorRate(),
        "cer": ErrorRate("cer", words=False),
        "agreement": Agreement(),
        "sqnr": Sqnr(),
    }
)


def find_metric(name: str | Metric | UserScore) -> Metric:
    """The metric of that name, of ``path.py:callable``, or of a function that scores examples.

    Raises:
        PluginError: There is none of that name; names the nearest one.
        DataError: The user's file is missing, does not parse or raises.
    """
    if isinstance(name, Metric):
        return name
    if callable(name):
        return _user_metric(name)
    if name in METRICS:
        return METRICS[name]
    if ":" in name or name.endswith(".py"):
        return _user_metric(load_callable(name, DataError))
    raise PluginError(f"no metric is called '{name}'", fix=f"{nearest(name, METRICS)} (or path.py:callable)")


def _user_metric(function: UserScore) -> UserMetric:
    return UserMetric(
        name=str(getattr(function, "__name__", type(function).__name__)),
        higher_is_better=bool(getattr(function, "higher_is_better", True)),
        bounded=bool(getattr(function, "bounded", True)),
        function=function,
    )


def predicted_classes(scores: np.ndarray) -> np.ndarray:
    """The class of the highest score on axis 1, the lowest of equals; -1 where a score is not a number."""
    predicted: np.ndarray = scores.argmax(axis=1)
    if scores.dtype.kind == "f":
        predicted[np.isnan(scores).any(axis=1)] = -1
    return predicted


def sqnr_db(rows: np.ndarray) -> float:
    """Decibels of the rows of 'sqnr'; infinite for identical outputs."""
    noise, signal = rows.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(signal / noise)) if noise > 0 else float("inf")


def _ratio(means: np.ndarray) -> np.ndarray:
    """First column / second; 0 / 0 is 0, since nothing was wrong."""
    top, bottom = means[..., 0], means[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(top == 0, 0.0, top / bottom)


def _per_example(right: np.ndarray) -> np.ndarray:
    shares: np.ndarray = right.reshape(len(right), -1).mean(axis=1, keepdims=True, dtype=np.float64)
    return shares


def _class_scores(metric: Metric, outputs: Outputs) -> np.ndarray:
    scores = outputs[0]
    if scores.ndim < 2 or scores.shape[1] < 2:
        raise DataError(
            f"metric '{metric.name}' needs class scores (N, C), but the first output is {scores.shape}",
            fix=_OTHER,
        )
    return scores


def _labels(metric: Metric, scores: np.ndarray, targets: Targets) -> np.ndarray:
    if targets is None:
        raise _no_labels(metric)
    labels = np.asarray(targets)
    expected = (scores.shape[0], *scores.shape[2:])
    if labels.size != np.prod(expected) or labels.dtype.kind not in "iu":
        raise DataError(
            f"metric '{metric.name}' needs integer labels {expected} for outputs {scores.shape}, "
            f"not {labels.dtype} {labels.shape}",
            fix="give class numbers as y, not scores or one-hot rows",
        )
    return labels.reshape(expected).astype(np.int64)


def _values(metric: Metric, outputs: Outputs, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Output and target, float64 (N, values of an example)."""
    if targets is None:
        raise _no_labels(metric)
    output, target = outputs[0], np.asarray(targets)
    if len(output) != len(target) or output.size != target.size or target.dtype.kind not in "fiub":
        raise DataError(
            f"metric '{metric.name}' compares outputs {output.shape} with "
            f"targets {target.dtype} {target.shape}",
            fix="give y the shape of the model's first output",
        )
    shape = (len(output), -1)
    return output.reshape(shape).astype(np.float64), target.reshape(shape).astype(np.float64)


def _original(metric: Metric, targets: Targets) -> Outputs:
    if targets is None:
        raise DataError(
            f"metric '{metric.name}' compares with the original's outputs, and there are none",
            fix="score(run, original=...)",
        )
    return targets if isinstance(targets, tuple) else (targets,)


def _no_labels(metric: Metric) -> DataError:
    return DataError(f"metric '{metric.name}' needs labels", fix="add y, or use --metric agreement or sqnr")


def _texts(metric: Metric, texts: np.ndarray, role: str) -> list[str]:
    if texts.dtype.kind != "U":
        raise DataError(
            f"metric '{metric.name}' compares texts, but the {role} is {texts.dtype}",
            fix="give strings as y, and Data.of(..., decode=function) that makes strings of outputs",
        )
    return [str(one) for one in texts]


def _as_characters(said: Sequence[str], meant: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts with one character for each word, so that edits of characters are edits of words."""
    codes: dict[str, str] = {}

    def encode(text: str) -> str:
        for word in text.split():
            codes.setdefault(word, chr(0x10000 + len(codes)))  # above the surrogates
        return "".join(codes[word] for word in text.split())

    return [encode(text) for text in said], [encode(text) for text in meant]
