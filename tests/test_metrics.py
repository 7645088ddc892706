"""Metrics against torchmetrics and brute force; drops and their intervals against the truth."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import (
    mean_absolute_error,
    mean_squared_error,
    pearson_corrcoef,
)
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.text import char_error_rate, perplexity, word_error_rate

from featherweight.errors import DataError, PluginError
from featherweight.metrics import (
    METRICS,
    UserMetric,
    drop,
    find_metric,
    paired_bootstrap,
    predicted_classes,
    sqnr_db,
)

QUICK = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def score(name, outputs, targets):
    metric = find_metric(name)
    return metric.reduce(metric.rows((outputs,), targets))


def classification(seed, classes=6, examples=40):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, classes)).astype(np.float32), rng.integers(0, classes, examples)


@QUICK
@given(seeds, st.integers(2, 9), st.integers(1, 30))
def test_accuracy_rows_are_right_or_wrong(seed, classes, examples):
    scores, labels = classification(seed, classes, examples)
    rows = find_metric("accuracy").rows((scores,), labels)
    expected = [
        [float(max(range(classes), key=lambda c: row[c]) == label)]
        for row, label in zip(scores, labels, strict=True)
    ]
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, expected)


@QUICK
@given(seeds)
def test_accuracy_and_top5_equal_torchmetrics(seed):
    scores, labels = classification(seed, classes=8)
    for name, k in (("accuracy", 1), ("top5", 5)):
        theirs = multiclass_accuracy(torch.tensor(scores), torch.tensor(labels), 8, average="micro", top_k=k)
        assert score(name, scores, labels) == pytest.approx(float(theirs), abs=1e-6)


def test_of_equal_scores_the_lowest_index_counts():
    scores = np.zeros((3, 8), np.float32)
    labels = np.array([0, 4, 5])
    assert find_metric("accuracy").rows((scores,), labels).ravel().tolist() == [1, 0, 0]
    assert find_metric("top5").rows((scores,), labels).ravel().tolist() == [1, 1, 0]


@QUICK
@given(seeds)
def test_f1_equals_torchmetrics(seed):
    scores, labels = classification(seed)
    labels[labels == 3] = 2  # a class that nobody means, but that may be predicted
    theirs = multiclass_f1_score(torch.tensor(scores), torch.tensor(labels), 6, average="macro")
    assert score("f1", scores, labels) == pytest.approx(float(theirs), abs=1e-6)


@QUICK
@given(seeds, st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_regression_equals_torchmetrics(seed, shape):
    rng = np.random.default_rng(seed)
    output, target = rng.normal(size=(2, 30, *shape))
    ours = [score(name, output, target) for name in ("mse", "mae", "pearson")]
    a, b = torch.tensor(output).reshape(30, -1), torch.tensor(target).reshape(30, -1)
    theirs = [
        mean_squared_error(a, b),
        mean_absolute_error(a, b),
        pearson_corrcoef(a.squeeze(1), b.squeeze(1)),
    ]
    assert ours == pytest.approx([float(one.mean()) for one in theirs], rel=1e-5)


@QUICK
@given(seeds)
def test_perplexity_equals_torchmetrics_and_leaves_padding_out(seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(4, 7, 11)).astype(np.float32), rng.integers(0, 11, (4, 7))
    labels[1, 3:] = -100
    theirs = perplexity(torch.tensor(logits), torch.tensor(labels), ignore_index=-100)
    assert score("perplexity", logits, labels) == pytest.approx(float(theirs), rel=1e-4)


def test_perplexity_of_certain_wrong_tokens_is_infinite_not_a_crash():
    logits = np.array([[[2000.0, 0.0]]], np.float32)
    assert score("perplexity", logits, np.array([[1]])) == math.inf


words = st.lists(st.sampled_from(["a", "bb", "cat", "der", "é"]), max_size=6).map(" ".join)


@QUICK
@given(st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=5))
def test_error_rates_equal_torchmetrics(pairs):
    said, meant = [a for a, _ in pairs], [b for _, b in pairs]
    for name, theirs in (("wer", word_error_rate), ("cer", char_error_rate)):
        ours = score(name, np.array(said), np.array(meant))
        assert ours == pytest.approx(float(theirs(said, meant)), abs=1e-6)


def test_dense_outputs_score_positions():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(3, 4, 5, 6)), rng.integers(0, 4, (3, 5, 6))
    rows = find_metric("accuracy").rows((scores,), labels)
    assert rows.shape == (3, 1)
    assert rows.mean() == pytest.approx((scores.argmax(1) == labels).mean())
    agreement = find_metric("agreement").rows((scores,), scores[:, ::-1])
    assert agreement.mean() == pytest.approx((scores.argmax(1) == scores[:, ::-1].argmax(1)).mean())


def test_agreement_and_sqnr_of_the_original_are_one():
    scores, _ = classification(0)
    for name in ("agreement", "sqnr"):
        metric = find_metric(name)
        assert metric.reduce(metric.rows((scores,), (scores,))) == 1.0
    assert sqnr_db(find_metric("sqnr").rows((scores,), scores)) == math.inf


def test_sqnr_of_a_tenth_of_noise_is_20_db():
    scores, _ = classification(0)
    rows = find_metric("sqnr").rows((scores * 1.1,), scores)
    assert find_metric("sqnr").reduce(rows) == pytest.approx(0.99, abs=1e-6)
    assert sqnr_db(rows) == pytest.approx(20.0, abs=1e-4)


def test_sqnr_counts_every_floating_output_and_passes_masks():
    a, b = np.ones((2, 3), np.float32), np.array([[1.0, -np.inf], [2.0, 3.0]], np.float32)
    ids = np.array([1, 2])
    metric = find_metric("sqnr")
    assert metric.reduce(metric.rows((a, b, ids + 5), (a, b, ids))) == 1.0
    assert metric.reduce(metric.rows((a, b * 2, ids), (a, b, ids))) < 1.0


def test_nan_outputs_are_wrong_answers():
    scores, labels = classification(1)
    scores[0], labels[0] = np.nan, 0  # numpy's argmax of NaN is 0
    assert predicted_classes(scores)[0] == -1
    for name in ("accuracy", "top5"):
        assert find_metric(name).rows((scores,), labels)[0, 0] == 0
    assert find_metric("agreement").rows((scores,), scores)[0, 0] == 0
    wrong = scores.copy()
    wrong[0] = np.eye(6)[1]
    assert score("f1", scores, labels) <= score("f1", np.where(labels[:, None] == 0, scores, wrong), labels)
    values = np.array([[1.0], [np.nan]])
    assert score("mse", values, np.zeros((2, 1))) == math.inf
    assert score("sqnr", values, np.ones((2, 1))) == -math.inf
    assert score("pearson", values, np.array([[1.0], [2.0]])) == 0.0
    assert score("perplexity", np.full((1, 2, 3), np.nan), np.zeros((1, 2), int)) == math.inf


def test_all_nan_scores_nothing():
    scores, labels = np.full((4, 3), np.nan), np.array([0, 1, 2, 0])
    assert score("f1", scores, labels) == 0.0
    assert score("accuracy", scores, labels) == 0.0


def test_scores_of_subsets_come_from_rows():
    scores, labels = classification(3, examples=60)
    half = np.arange(0, 60, 2)
    for name in ("accuracy", "top5", "f1"):
        metric = find_metric(name)
        rows = metric.rows((scores,), labels)
        assert metric.reduce(rows[half]) == pytest.approx(score(name, scores[half], labels[half]))


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "said"),
    [
        ("accuracy", np.zeros((2, 1)), np.zeros(2, int), r"\(2, 1\)"),
        ("accuracy", np.zeros((2, 3)), np.zeros((2, 3)), "float64"),
        ("accuracy", np.zeros((2, 3)), None, "needs labels"),
        ("f1", np.zeros((2, 3, 4)), np.zeros((2, 4), int), r"\(N, C\)"),
        ("mse", np.zeros((2, 3)), np.zeros((2, 4)), r"\(2, 4\)"),
        ("perplexity", np.zeros((2, 3)), np.zeros(2, int), r"\(N, T, V\)"),
        ("wer", np.zeros(2), np.array(["a", "b"]), "output is float64"),
        ("agreement", np.zeros((2, 3)), None, "original"),
    ],
)
def test_outputs_that_do_not_fit_are_named(name, outputs, targets, said):
    with pytest.raises(DataError, match=said) as caught:
        find_metric(name).rows((outputs,), targets)
    assert caught.value.fix


def test_unknown_metric_names_the_nearest():
    with pytest.raises(PluginError, match="acuracy") as caught:
        find_metric("acuracy")
    assert "'accuracy'" in str(caught.value.fix)


def test_user_metric_from_a_file(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "def error_mm(outputs, targets):\n"
        "    return np.abs(outputs - targets).max(axis=1)\n"
        "error_mm.higher_is_better = False\n"
        "error_mm.bounded = False\n"
    )
    metric = find_metric(f"{path}:error_mm")
    assert (metric.name, metric.higher_is_better, metric.bounded) == ("error_mm", False, False)
    rows = metric.rows((np.array([[1.0, 5.0], [0.0, np.nan]]),), np.zeros((2, 2)))
    assert rows.tolist() == [[5.0], [math.inf]]


def test_user_metric_errors_show_the_line(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("def broken(outputs, targets):\n    return outputs[:, 99]\n")
    with pytest.raises(DataError, match="IndexError") as caught:
        find_metric(f"{path}:broken").rows((np.zeros((2, 3)),), None)
    assert caught.value.where == f"{path}:2: return outputs[:, 99]"


@pytest.mark.parametrize(
    ("returned", "said"),
    [(np.zeros((2, 3)), r"\(2, 3\)"), (0.5, r"\(\)"), (np.array([0.5, 7.0]), "outside 0..1")],
)
def test_user_metric_must_score_each_example(returned, said):
    def mine(outputs, targets):
        return returned

    with pytest.raises(DataError, match=said) as caught:
        find_metric(mine).rows((np.zeros((2, 3)),), None)
    assert "def mine(outputs, targets):" in str(caught.value.where)


def test_a_metric_without_a_function_says_so():
    with pytest.raises(DataError, match="no function"):
        UserMetric("map").rows((np.zeros(1),), None)


def test_drop_is_positive_when_worse():
    assert drop(METRICS["accuracy"], 0.93, 0.925) == pytest.approx(0.005)
    assert drop(METRICS["wer"], 0.10, 0.12) == pytest.approx(0.02)
    assert drop(METRICS["mse"], 2.0, 2.2) == pytest.approx(0.1)
    assert drop(METRICS["mse"], 0.0, 0.0) == 0.0
    assert drop(METRICS["mse"], 0.0, 1.0) == math.inf
    assert drop(METRICS["mse"], 1.0, math.inf) == math.inf


def test_every_named_metric_is_found_by_its_name():
    assert all(find_metric(name).name == name for name in METRICS)


@pytest.mark.parametrize("name", ["accuracy", "mse", "sqnr", "wer"])
def test_the_interval_is_that_of_the_index_bootstrap(name):
    rng = np.random.default_rng(5)
    metric, n = METRICS[name], 300
    before = (
        rng.random((n, 2)) + np.array([0, 3]) if name in ("sqnr", "wer") else (rng.random((n, 1)) < 0.9) * 1.0
    )
    after = before.copy()
    after[:, :1] += (rng.random((n, 1)) < 0.2) * 0.5
    picks = rng.integers(0, n, (2000, n))
    brute = [drop(metric, metric.reduce(before[i]), metric.reduce(after[i])) for i in picks]
    expected = np.quantile(brute, [0.025, 0.975])
    got = paired_bootstrap(metric, before, after, seed=0, resamples=2000)
    assert got == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))


def test_the_interval_covers_the_true_drop():
    rng = np.random.default_rng(0)
    metric, truth, hits = METRICS["accuracy"], 0.02, 0
    for seed in range(200):
        before = rng.random(400) < 0.9
        after = np.where(rng.random(400) < 0.05, ~before, before)  # loses 4.5 %, wins 0.5 %: -4 points
        low, high = paired_bootstrap(metric, before[:, None] * 1.0, after[:, None] * 1.0, seed, 300)
        truth = 0.9 * 0.05 - 0.1 * 0.05
        hits += low <= truth <= high
    assert 0.89 <= hits / 200 <= 0.99


@pytest.mark.parametrize("name", ["f1", "pearson"])
def test_other_metrics_are_resampled_whole(name):
    rng = np.random.default_rng(0)
    before = rng.integers(0, 3, (80, 1)).repeat(2, axis=1).astype(float)
    after = before.copy()
    after[:20, 0] = (after[:20, 0] + 1) % 3
    metric = METRICS[name]
    low, high = paired_bootstrap(metric, before, after, seed=1)
    assert 0 < low < drop(metric, metric.reduce(before), metric.reduce(after)) < high


def test_the_bootstrap_is_seeded_and_survives_the_extremes():
    rng = np.random.default_rng(0)
    before, metric = rng.random((50, 1)), METRICS["mse"]
    after = before.copy()
    assert paired_bootstrap(metric, before, after, seed=0) == (0.0, 0.0)
    after[3] = np.inf
    low, high = paired_bootstrap(metric, before, after, seed=0)
    assert (low, high) == paired_bootstrap(metric, before, after, seed=0)
    assert high == math.inf
    assert paired_bootstrap(metric, before[:1], before[:1] * 2, seed=0) == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="same examples"):
        paired_bootstrap(metric, before, after[:3], seed=0)
