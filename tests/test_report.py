"""The report is complete, loads nothing, lets nothing break out, and survives what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from featherweight import figures, outcome
from featherweight.charts import kind, pareto_plots, sparkline
from featherweight.outcome import Budget, Latency, Result, TaskRobustness, Violation
from featherweight.report import explain, render, terminal_table
from sample_results import (
    BASELINE,
    HOSTILE,
    SPREAD,
    bare_result,
    chosen,
    full_result,
    hostile_result,
    missed_result,
    trials,
)

SECTIONS = [
    "verdict",
    "asked",
    "before-after",
    "why",
    "steps",
    "pareto",
    "importances",
    "dropped",
    "trials",
    "recipe",
    "layers",
    "classes",
    "robustness",
    "examples",
    "warnings",
    "environment",
]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page: elements, nesting, text, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.stack[-1] if self.stack else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(render(full_result()))


@pytest.fixture(scope="module")
def hostile() -> tuple[str, Page]:
    text = render(hostile_result())
    return text, Page(text)


def test_every_section_is_there_in_order_and_every_element_closed(full: Page) -> None:
    assert [attributes["id"] for attributes in full.attributes("section")] == SECTIONS
    assert full.stack == []


def test_nothing_is_loaded(full: Page) -> None:
    for tag, attributes in full.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
    policy = next(tag["content"] for tag in full.attributes("meta") if "http-equiv" in tag)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy


def test_tables_and_plots_are_readable_without_eyes(full: Page) -> None:
    tables = full.attributes("table")
    assert len(full.attributes("caption")) == len(tables) >= 5
    assert all(head.get("scope") in ("row", "col") for head in full.attributes("th"))
    plot = next(tag for tag in full.attributes("div") if tag.get("id") == "plot")
    assert plot["role"] == "img"
    assert "trial 3" in str(plot["aria-label"])
    assert [tag for tag, _ in full.tags if tag in ("h1", "h2")] == ["h1", *["h2"] * (len(SECTIONS) - 1)]


def test_the_figures_are_written_for_people(full: Page) -> None:
    for words in (
        "0.25 points worse [-0.10, 0.60]",
        "2.13 ms (2.10 to 2.19)",
        "0.41× [0.40, 0.42]",
        "297 KB",
        "27.3 dB",
        "31 lost, 26 won",
        "3.7× smaller",
        "272k",
        "rejected, simulated",
        "rejected, measured",
        "quantize: no examples",
        "fold → quantize(weights: int8, range: mse, where: exclude head)",
        "int8 per channel",
        "calibration falls back to 512 training examples",
        "Example CPU @ 2.80GHz",
    ):
        assert words in full.text, words


def test_what_is_missing_is_a_dash() -> None:
    page = Page(render(bare_result()))
    assert [attributes["id"] for attributes in page.attributes("section")] == SECTIONS
    assert not re.search(r"\b(None|nan|undefined|null)\b", page.text.replace("None.", ""))
    assert "was –" in page.text
    assert terminal_table(bare_result()) == []


def test_every_field_may_be_missing() -> None:
    for name, field in outcome.Chosen.model_fields.items():
        if field.is_required() or field.default is not None:  # a list is empty instead
            continue
        result = full_result(
            chosen=chosen(**{name: None}),
            baseline=BASELINE.model_copy(update={name: None}),
            trials=[
                trial.model_copy(
                    update={
                        "measurement": trial.measurement and trial.measurement.model_copy(update={name: None})
                    }
                )
                for trial in trials()
            ],
        )
        said = " ".join([*explain(result), *(cell for row in terminal_table(result) for cell in row)])
        assert "None" not in said, name
        if name in ("quality_drop", "bytes", "latency_s", "latency_ratio", "memory_bytes"):
            json.dumps(pareto_plots(result), allow_nan=False)


def test_user_text_never_becomes_markup(hostile: tuple[str, Page]) -> None:
    text, page = hostile
    assert HOSTILE not in text
    assert HOSTILE in page.text
    assert page.attributes("img") == []
    assert len(page.scripts) == len(page.attributes("script")) == 3
    assert "</script" not in page.scripts[0]
    plots = json.loads(page.scripts[0])
    assert HOSTILE in json.dumps(plots)


def test_infinite_figures_are_written_and_not_plotted() -> None:
    bad = trials()[0]
    seen = bad.measurement
    assert seen is not None
    seen = seen.model_copy(update={"quality_drop": float("inf"), "latency_ratio": float("nan")})
    result = full_result(
        metric="mse",
        chosen=chosen(
            quality=float("inf"), quality_drop=float("inf"), sqnr_db=float("inf"), latency_ratio=0.0
        ),
        trials=[bad.model_copy(update={"measurement": seen}), *trials()[1:]],
    )
    page = Page(render(result))
    json.loads(page.scripts[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "∞" in page.text


def test_the_verdict_names_what_blocks_and_what_would_help() -> None:
    said = explain(missed_result())
    assert said[0] == "Not met: the best artifact so far does not keep every limit."
    assert "Latency blocks: 2.13 ms, above the limit; the limit is 1.50 ms." in said
    assert "Cheapest relaxation: --max-latency 2.2ms would do (trial 3)." in said
    assert any("unresolved" in sentence for sentence in said)
    assert any(sentence.startswith("Trial 3 is the best so far") for sentence in said)
    page = Page(render(missed_result()))
    assert "Not met" in page.text
    assert any(tag.get("class") == "tile broken" for tag in page.attributes("div"))


def test_an_artifact_worse_than_the_original_is_not_held_against_a_limit() -> None:
    reason = "slower than the original: latency ratio 1.21 [1.18, 1.24]"
    worse = Violation(axis="latency_s", limit=1.0, value=1.21, reason=reason)
    said = explain(full_result(met=False, budget=Budget(), blocking=[worse]))
    assert said[0] == "Not met: the best artifact so far is worse than the original where it counts."
    assert f"Latency blocks: {reason}." in said


def test_the_verdict_grows_with_confidence() -> None:
    assert explain(full_result())[0].startswith(
        "Met: the measured artifact keeps every limit, its quality by"
    )
    sure = full_result(met_confident=True, chosen=chosen(quality_drop_ci95=(0.001, 0.004)))
    assert explain(sure)[0].startswith("Met with confidence:")
    assert not any("interval ends at" in sentence for sentence in explain(sure))
    assert explain(bare_result()) == ["Met: nothing was limited."]


def test_examples_needed_follow_from_the_interval() -> None:
    assert any(
        "some 7,840 scored examples instead of 4,000" in sentence for sentence in explain(full_result())
    )
    unsure = full_result(met=False, chosen=chosen(quality_drop=0.006, quality_drop_ci95=(0.004, 0.008)))
    said = next(sentence for sentence in explain(unsure) if "95% interval begins at 0.40 points" in sentence)
    assert "not sure that the limit is broken; some 7,840 scored examples" in said
    told = " ".join(explain(full_result(examples_needed=None)))
    assert "interval ends at" in told and "would settle it" not in told


def test_the_choice_is_derived_from_the_trials() -> None:
    said = " ".join(explain(full_result()))
    assert "12 recipes were tried: 9 measured, 2 rejected, 1 failed; 7 of them keep every limit." in said
    assert "Trial 3 was chosen: its product of latency ratio and size ratio is 0.111, the smallest" in said
    other = [trial.model_copy(update={"chosen": trial.number == 1}) for trial in trials()]
    assert "the smallest" not in " ".join(explain(full_result(trials=other)))
    assert "Trial 3 was chosen: its latency ratio is 0.409" in " ".join(
        explain(full_result(prefer="latency"))
    )


def test_the_torch_runtime_is_called_a_simulation() -> None:
    assert any("simulates" in sentence for sentence in explain(full_result(chosen=chosen(runtime="torch"))))


def test_plots_offer_each_axis_with_its_limit() -> None:
    plots = {plot["axis"]: plot for plot in pareto_plots(full_result())}
    assert list(plots) == ["latency_ratio", "bytes", "memory_bytes", "size_latency"]
    assert "largest latency" in json.dumps(plots["latency_ratio"]["spec"])
    assert "largest memory" not in json.dumps(plots["memory_bytes"]["spec"])
    assert f"{3e-3 / 5.21e-3}"[:8] in json.dumps(plots["latency_ratio"]["spec"])
    assert pareto_plots(bare_result()) == []


def test_the_front_holds_no_simulated_and_no_beaten_trial() -> None:
    spec = pareto_plots(full_result())[0]["spec"]
    lines = [layer for layer in spec["layer"] if layer["mark"]["type"] == "line"]
    front = spec["datasets"][lines[0]["data"]["name"]]
    drops = [point["y"] for point in front]
    assert drops == sorted(drops, reverse=True)
    assert front[-1]["kind"] == "original"
    assert not any("simulated" in point["kind"] for point in front)


def test_simulated_and_measured_are_told_apart() -> None:
    groups = {trial.number: kind(trial) for trial in trials()}
    assert (groups[3], groups[5]) == ("chosen", "failed")
    assert (groups[6], groups[9]) == ("rejected, measured", "rejected, simulated")


def test_importing_the_report_imports_no_heavy_library() -> None:
    code = (
        "import sys, featherweight.report, featherweight.bundle;"
        "print([name for name in ('altair', 'jinja2', 'vl_convert', 'torch', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figures.size(999), "999 B"),
        (figures.size(999_600), "1.00 MB"),
        (figures.size(1_093_412), "1.09 MB"),
        (figures.size(0), "0 B"),
        (figures.seconds(2.126e-3), "2.13 ms"),
        (figures.seconds(0.00085), "850 us"),
        (figures.seconds(0), "0 us"),
        (figures.seconds(750), "12.5 min"),
        (figures.count(40_813_000), "40.8M"),
        (figures.ratio(0.041), "0.041×"),
        (figures.gain(0.27, "smaller", "larger"), "3.7× smaller"),
        (figures.gain(1.25, "smaller", "larger"), "1.2× larger"),
        (figures.gain(0.0, "smaller", "larger"), "–"),
        (figures.decibel(float("inf")), "∞ dB"),
        (figures.latency(Latency(median=1.2e-3, q1=9e-4, q3=1.3e-3)), "1.20 ms (900 us to 1.30 ms)"),
        (figures.Scale(True).change(-0.001), "0.10 points better"),
        (figures.Scale(True).drop(-0.00001), "0.00 points"),
        (figures.Scale(False).drop(0.012), "1.20%"),
        (figures.Scale(False).score(4.3123), "4.312"),
        (
            figures.recipe_line({"steps": [{"fold": {}}, {"prune": {"macs": 0.5, "where": None}}]}),
            "fold → prune(macs: 0.5, where: –)",
        ),
    ],
)
def test_formats(written: str, expected: str) -> None:
    assert written == expected


def test_a_metric_of_the_user_is_read_off_its_numbers() -> None:
    relative = full_result(
        metric="score.py:f",
        baseline=BASELINE.model_copy(update={"quality": 0.5}),
        chosen=chosen(quality=0.49, quality_drop=0.02),
    )
    assert not figures.scale_of(relative).bounded
    absolute = relative.model_copy(update={"chosen": chosen(quality=0.49, quality_drop=0.01)})
    assert figures.scale_of(absolute).bounded
    assert not figures.scale_of(full_result(metric="mse")).bounded


def test_docs_describe_every_field_and_no_other() -> None:
    text = (Path(__file__).parents[1] / "docs" / "result.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    records = [
        cls
        for cls in vars(outcome).values()
        if isinstance(cls, type) and issubclass(cls, Result.__bases__[0]) and cls.__name__[0] != "_"
    ]
    assert len(records) >= 26  # else nothing is held against the page
    for cls in records:
        inherited = outcome.Measurement.model_fields if cls is outcome.Chosen else {}
        fields = {field.alias or name for name, field in cls.model_fields.items() if name not in inherited}
        described = set(re.findall(r"^\| `(\w+)` \|", sections[cls.__name__], re.M))
        assert described == fields, cls.__name__


class TestErrorsOfLayers:
    def test_have_a_row_each_with_both_figures_and_the_clipped_share(self) -> None:
        page = render(full_result())
        table = page[page.index('id="losses"') :]
        table = table[: table.index("</table>")]
        assert table.count("<tr>") == 1 + 9
        for text in ("35.0 dB", "32.0 dB", "-1.50 to 1.00", "1.23%", ">0<"):
            assert text in table
        assert table.count("<svg") == 9 + 8  # one layer read nothing that was seen

    def test_sort_by_the_bare_numbers(self) -> None:
        page = render(full_result())
        assert 'data-sort="0.0123"' in page
        assert 'data-sort="2.5"' in page  # the width of the range

    def test_draw_each_bin_as_the_square_root_of_its_count(self) -> None:
        drawn = sparkline(SPREAD)
        assert drawn is not None
        tops = [float(top) for top in re.findall(r"V([\d.]+)h6", drawn["path"])]
        assert tops == pytest.approx([12 - 12 * (count / 100) ** 0.5 for count in SPREAD.counts], abs=0.06)
        assert drawn["low"] == 8.0  # a sixth of the way from -2 to 1
        assert drawn["high"] is None  # the end of what was seen is the end of the range

    def test_of_nothing_draw_nothing(self) -> None:
        assert sparkline(None) is None
        flat = SPREAD.model_copy(update={"seen_low": 1.0, "seen_high": 1.0, "counts": [5]})
        drawn = sparkline(flat)
        assert drawn is not None
        assert drawn["low"] is drawn["high"] is None

    def test_leave_the_page_small(self) -> None:
        """A layer with two full histograms takes 2.5 KB at most."""
        row = full_result().layers[4]
        spread = SPREAD.model_copy(update={"counts": [i * 37 % 1000 for i in range(48)]})
        row = row.model_copy(update={"weight": spread, "activation": spread})
        few, many = (
            len(render(full_result(layers=[row.model_copy(update={"name": f"l{i}"}) for i in range(count)])))
            for count in (1, 101)
        )
        assert many - few < 100 * 2_500

    def test_are_left_out_where_nothing_was_seen(self) -> None:
        assert 'id="losses"' not in render(bare_result())


class TestEffort:
    def test_is_said_on_the_page_and_in_the_terminal(self) -> None:
        page, told = render(full_result()), " ".join(explain(full_result()))
        for text in (
            "Effort standard: 61.5 s of 5.00 min, where a pass of one example takes 2.40 ms",
            "ways tried, with their trials: gptq (2)",
            "not tried: nearest",
            "--time 15m or more adds the reconstruction of blocks.",
        ):
            assert text in told
            assert text in page

    def test_of_a_given_recipe_is_not_told(self) -> None:
        assert "Effort" not in render(full_result(effort=None))
        assert not any("Effort" in sentence for sentence in explain(full_result(effort=None)))


def test_energy_of_a_call_is_told_where_it_was_read() -> None:
    result = full_result(
        baseline=BASELINE.model_copy(update={"energy_j": 0.042}), chosen=chosen(energy_j=0.0105)
    )
    rows = {label: cells for label, *cells in terminal_table(result)}
    assert rows["Energy of a call"] == ["42.0 mJ", "10.5 mJ", "0.25×"]
    assert "Energy of a call 42.0 mJ 10.5 mJ 0.25×" in Page(render(result)).text
    assert "Energy of a call" not in {label for label, *_ in terminal_table(full_result())}


class TestBesideTheScore:
    def test_corruptions_are_a_table_with_curves(self) -> None:
        text = render(full_result())
        page = Page(text)
        assert "accuracy on 500 scored pictures (28 x 28, grey, 0..1" in page.text
        assert "costs the original 27.00 points and the artifact 27.80 points" in page.text
        assert "Original 93.0% 82.0% 74.0% 66.0% 58.0% 50.0% 66.0%" in page.text
        assert "Artifact 92.8% 80.9% 72.8% 64.7% 56.6% 48.5% 64.7%" in page.text
        curves = [tag["d"] for tag in page.attributes("path") if tag.get("class") in ("before", "after")]
        assert len(curves) == 12
        assert all(str(curve).startswith("M0.0 ") and str(curve).count(" L") == 5 for curve in curves)

    def test_confidence_and_the_attack_are_told_with_intervals(self) -> None:
        text = Page(render(full_result())).text
        assert "Calibration error (ECE, 15 bins of equal width) 3.58% 4.12% +0.54 points" in text
        assert "0.531 [0.513, 0.549] 0.527 [0.509, 0.545] -0.004 [-0.009, +0.001]" in text
        rows = {label: cells for label, *cells in terminal_table(full_result())}
        assert rows["Calibration error (ECE)"] == ["3.58%", "4.12%", "+0.54 points"]
        assert rows["Drop by corruption (500 pictures, 30 ways)"] == [
            "27.00 points",
            "27.80 points",
            "0.80 points worse [0.30, 1.31]",
        ]

    def test_each_of_several_tasks_has_a_row_in_its_own_unit(self) -> None:
        told = {"clean_after": 0.9, "drop_before": 0.2, "drop_after": 0.25, "extra_drop": 0.05}
        tasks = [
            TaskRobustness(name="kind", metric="accuracy", extra_drop_ci95=(0.01, 0.08), **told),
            TaskRobustness(name="ink", metric="mse", bounded=False, **told),
        ]
        robust = full_result().robustness
        assert robust is not None
        result = full_result(robustness=robust.model_copy(update={"tasks": tasks}))
        rows = {label: cells for label, *cells in terminal_table(result)}
        kind = ["20.00 points", "25.00 points", "5.00 points worse [1.00, 8.00]"]
        assert rows["Drop by corruption, kind (accuracy)"] == kind
        assert rows["Drop by corruption, ink (mse)"] == ["20.00%", "25.00%", "5.00% worse"]
        assert "Drop by corruption, ink (mse) 20.00% 25.00% 5.00% worse" in Page(render(result)).text

    def test_what_is_left_out_says_why(self) -> None:
        nothing = {"robustness": None, "calibration": None, "privacy": None}
        result = full_result(**nothing, omitted={"robustness": "corruptions are for pictures"})
        assert "Corrupted pictures: corruptions are for pictures." in Page(render(result)).text
        assert "Nobody looked at corrupted pictures" in Page(render(bare_result())).text
        assert not any("ECE" in label for label, *_ in terminal_table(bare_result()))


def test_mean_bits_of_the_weights_are_told() -> None:
    result = full_result(
        baseline=BASELINE.model_copy(update={"weight_bits": 32.0}),
        chosen=chosen().model_copy(update={"weight_bits": 4.25}),
    )
    rows = {label: cells for label, *cells in terminal_table(result)}
    assert rows["Bits of a weight (mean, scales included)"] == ["32.0 bits", "4.25 bits", "0.13×"]
    assert "4.25 bits" in render(result)


class TestDecision:
    def test_importances_are_a_table_with_what_they_rest_on(self) -> None:
        page = Page(render(full_result()))
        assert "PED-ANOVA over 24 measured trials, of which the best 25% count as good" in page.text
        assert "quantize: range 80% < 1% –" in page.text

    def test_too_few_trials_are_said(self) -> None:
        few = outcome.Importances(trials=3, reason="3 measured trials are too few to tell: it takes 12")
        assert "3 measured trials are too few" in Page(render(full_result(importances=few))).text
        assert "Nothing was left open" in Page(render(full_result(importances=None))).text

    def test_groups_of_dropped_trials_lead_to_their_rows(self) -> None:
        page = Page(render(full_result()))
        assert "Quality drop above the limit 0.7 % (limit 0.5 %)" in page.text
        links = {tag["href"] for tag in page.attributes("a") if str(tag["href"]).startswith("#trial-")}
        assert links == {"#trial-1", "#trial-4", "#trial-5"}
        assert "cost 20 8 500 ms 11 – 2.00% –" in page.text

    def test_what_was_only_predicted_is_drawn_hollow_and_never_on_the_front(self) -> None:
        predicted = [
            outcome.Prediction(rung="cost", bytes=100_000, latency_ratio=0.1),
            outcome.Prediction(rung="simulated", quality_drop=-0.01),
        ]
        dropped = outcome.Trial(
            number=12, recipe={"steps": [{"fold": {}}]}, state="dropped", reason="no use", predicted=predicted
        )
        result = full_result(trials=[*trials(), dropped])
        assert kind(dropped) == "dropped, predicted"
        plot = pareto_plots(result)[0]
        assert any(point["trial"] == "12" for point in plot["points"])
        assert "trial 12" not in plot["words"]
        page = Page(render(result))
        assert "dropped, predicted fold no use -1.00 points 100 KB – 0.10×" in page.text
        assert any(
            tag.get("class") == "unseen" for tag in page.attributes("tr") if tag.get("id") == "trial-12"
        )

    def test_points_are_told_in_words_from_left_to_right(self) -> None:
        points = pareto_plots(full_result())[0]["points"]
        assert points[0]["words"] == (
            "Trial 3, chosen: fold → quantize(weights: int8, range: mse, where: exclude head). "
            "Quality drop 0.25 points, size 297 KB, latency 2.13 ms, 0.41×."
        )
        assert points[-1]["words"].startswith("The original: as it was.")

    def test_noise_of_the_drop_is_said(self) -> None:
        assert (
            "A change of quality below 0.35 points, half of the 95% interval"
            in Page(render(full_result())).text
        )
