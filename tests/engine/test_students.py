"""Students that are named: a family of featherweight.nets built for the original, or chosen by the budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import featherweight as fw
from featherweight import bundle, nets, report
from featherweight.data import Data
from featherweight.engine import student_choice
from featherweight.engine.effort import Pace, pace_of, planned
from featherweight.engine.question import Question
from featherweight.engine.run import Run
from featherweight.engine.sources import Given, load_beside
from featherweight.engine.start import auto_run
from featherweight.engine.store import Store
from featherweight.engine.student_choice import SHARE, StudentChoice, choose_student
from featherweight.engine.student_table import Counted, Found, Ladder, Table, count
from featherweight.engine.students import Task, build_student, lesson_of, names_family, task_of
from featherweight.engine.template import Shape
from featherweight.engine.timing import Limits
from featherweight.errors import BudgetError, DataError, LoadError, RecipeError
from featherweight.exchange.load import model_of_module
from featherweight.method import Silent
from featherweight.methods import finetune
from featherweight.model import Model
from featherweight.outcome import Budget, Preference, Result
from featherweight.recipe import Recipe
from featherweight.tools.costs import totals
from golden import target

QUICK = Limits(seconds=0.2, least_seconds=0.0, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)
SMALL = "ds-cnn:width=0.1,depth=0.25"
TASK = Task("picture", 1, (12, 12), 4, False)


class Net(nn.Module):
    """An original for pictures of 12 x 12 and four classes."""

    def __init__(self, ends: nn.Module | None = None, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, 2, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        self.last = nn.Linear(width, 4)
        self.ends = ends or nn.Identity()

    def forward(self, picture: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(picture))))
        out: Tensor = self.ends(self.last(y.mean((2, 3))))
        return out


class Two(Net):
    def forward(self, picture: Tensor) -> Tensor:
        y = super().forward(picture)
        return y, y  # type: ignore[return-value]


class Map(Net):
    def forward(self, picture: Tensor) -> Tensor:
        return torch.relu(self.first(picture))


class Wave(nn.Module):
    """An original for signals."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 9, 4, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, wave: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(wave)).mean(2))
        return out


def model(module: nn.Module, *shape: int) -> Model:
    torch.manual_seed(0)
    for value in module.parameters():
        nn.init.normal_(value, 0.0, 0.2)
    return model_of_module(module.eval(), "net", (np.ones((2, *(shape or (1, 12, 12))), np.float32),))


def bars(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a bar in one of four places, in noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, size)
    x = random.normal(0, 0.3, (size, 1, 12, 12)).astype(np.float32)
    for index, label in enumerate(labels):
        x[index, 0, 3 * label : 3 * label + 2] += 1
    return x, labels


def examples(labels: bool = True) -> Data:
    x, y = bars(400)
    return Data.of(x[:120], y[:120], x_train=x[120:], y_train=y[120:] if labels else None)


@pytest.fixture
def original() -> Model:
    return model(Net())


class TestSpec:
    @pytest.mark.parametrize(
        "text", ["ds-cnn", "mobilenetv2:width=0.35", "efficientnet-lite0:depth=0.5,width=1", "auto", "dscnn"]
    )
    def test_of_a_family(self, text: str) -> None:
        assert names_family(text)
        assert Given(text).name == text

    @pytest.mark.parametrize(
        "text", ["nets.py:small", "package.nets:small", "package:small", "folder/net.onnx", "net.pt2"]
    )
    def test_of_code_or_a_file(self, text: str) -> None:
        assert not names_family(text)

    def test_a_file_of_that_name_is_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "ds-cnn").write_text("")
        assert not names_family("ds-cnn")

    def test_fresh_is_what_nobody_trained(self) -> None:
        assert Given("ds-cnn").fresh
        assert not Given("ds-cnn", "weights.safetensors").fresh
        assert not Given("nets.py:small").fresh


class TestBuilding:
    def test_takes_and_gives_what_the_original_does(self, original: Model) -> None:
        student = load_beside(Given(SMALL), "student", original, seed=3)
        assert student is not None
        entry, wanted = (one.entries["forward"] for one in (student, original))
        assert (entry.input_names, entry.output_names) == (wanted.input_names, wanted.output_names)
        with torch.no_grad():
            assert student.module(torch.zeros(3, 1, 12, 12)).shape == (3, 4)

    def test_the_seed_and_the_spec_tell_students_apart(self, original: Model) -> None:
        def key(spec: str, seed: int) -> str:
            return build_student(spec, original, seed=seed).key

        keys = [key(SMALL, 0), key(SMALL, 1), key("ds-cnn:width=0.2,depth=0.25", 0)]
        assert len(set(keys)) == 3
        assert key(SMALL, 0) == keys[0]

    def test_weights_of_its_own(self, original: Model, tmp_path: Path) -> None:
        trained = build_student(SMALL, original, seed=5)
        save_file(trained.module.state_dict(), tmp_path / "w.safetensors")
        read = build_student(SMALL, original, weights=str(tmp_path / "w.safetensors"), seed=0)
        for name, value in trained.module.state_dict().items():
            assert torch.equal(read.module.state_dict()[name], value)
        with pytest.raises(LoadError, match=r"w\.safetensors"):
            build_student("ds-cnn", original, weights=str(tmp_path / "w.safetensors"))

    def test_of_a_signal(self) -> None:
        original = model(Wave(), 2, 64)
        assert task_of(original) == Task("signal", 2, (64,), 3, False)
        student = build_student("ds-cnn-1d:width=0.25", original)
        with torch.no_grad():
            assert student.module(torch.zeros(2, 2, 64)).shape == (2, 3)
        with pytest.raises(LoadError, match="is for a picture, and the original takes a signal"):
            build_student("ds-cnn", original)

    def test_probabilities_stay_probabilities(self) -> None:
        original = model(Net(nn.Softmax(1)))
        student = build_student(SMALL, original)
        with torch.no_grad():
            sums = student.module(torch.randn(5, 1, 12, 12)).sum(1)
        torch.testing.assert_close(sums, torch.ones(5))

    @pytest.mark.parametrize(
        ("spec", "says", "fix"),
        [
            ("mobilnetv2:width=0.5", "no family of featherweight.nets", "did you mean 'mobilenetv2'?"),
            ("ds-cnn-1d", "ds-cnn-1d is for a signal, and the original takes a picture", "ds-cnn"),
            ("ds-cnn:widht=0.5", "no setting 'widht'", "did you mean 'width'?"),
            ("ds-cnn:width=-1", "width is -1", "above 0"),
        ],
    )
    def test_what_is_wrong_is_told(self, original: Model, spec: str, says: str, fix: str) -> None:
        with pytest.raises((LoadError, RecipeError), match=says) as error:
            build_student(spec, original)
        assert fix in str(error.value.fix)

    @pytest.mark.parametrize(
        ("module", "says"),
        [(Two(), "one row of numbers"), (Map(), r"gives float32 \(48, 6, 6\)")],
    )
    def test_other_outputs_are_refused(self, module: nn.Module, says: str) -> None:
        with pytest.raises(LoadError, match=says) as error:
            build_student(SMALL, model(module))
        assert "path.py:callable" in str(error.value.fix)

    def test_other_inputs_are_refused(self) -> None:
        flat = model(nn.Sequential(nn.Linear(7, 4)), 7)
        with pytest.raises(LoadError, match=r"takes float32 \(7,\)"):
            build_student(SMALL, flat)

    def test_auto_needs_fit(self, original: Model) -> None:
        with pytest.raises(LoadError, match="which only fit has"):
            load_beside(Given("auto"), "student", original)


class TestLessons:
    def test_fresh_weights_learn_at_another_rate(self, original: Model) -> None:
        convolutions = lesson_of(build_student(SMALL, original))
        attention = lesson_of(build_student("vit:width=0.1,depth=0.25", original))
        assert convolutions["learning_rate"] > attention["learning_rate"]

    def test_come_first_and_say_how(self) -> None:
        pace = Pace(
            0.002, 2.0, training=2000, student=True,
            lesson={"learning_rate": 0.1}, training_s=0.004, teacher_s=0.01,
        )  # fmt: skip
        made = planned(pace, Shape(0.0, False), 600.0)
        for recipe in made.ways.values():
            first = recipe.steps[0]
            assert first.method == "finetune"
            assert first.parameters == {
                "epochs": pace.lessons(600.0),
                "learning_rate": 0.1,
                "teacher": "original",
            }
        assert made.level == "standard"

    def test_the_teacher_is_asked_once_where_it_remembers(self) -> None:
        pace = Pace(0.002, 2.0, training=1000, student=True, training_s=0.01, teacher_s=0.05)
        assert pace.training_of(3.0) == pytest.approx(3 * 10 + 50)
        assert pace.training_of(0.5) == pytest.approx(5 + 25)
        again = replace(pace, asked_again=True)
        assert again.training_of(3.0) == pytest.approx(3 * 60)
        assert pace.lessons(1000.0) == pytest.approx((0.4 * 1000 - 50) / 10)
        assert replace(pace, lesson={"learning_rate": 0.1}).lessons(1000.0) > pace.lessons(1000.0)

    def test_their_pace_is_timed(self, original: Model, tmp_path: Path) -> None:
        student = load_beside(Given(SMALL), "student", original)
        run = Run(original, examples(), target(), Store(tmp_path), student=student)
        seen = pace_of(run, {"learning_rate": 0.1})
        assert seen.training_s > 0
        assert seen.teacher_s > 0
        assert pace_of(run, {"learning_rate": 0.1}) == seen  # remembered
        assert pace_of(run).training_s == 0


class TestCounting:
    def test_shapes_alone_tell_what_running_does(self, original: Model) -> None:
        for spec in ("ds-cnn:width=0.5", "mobilenetv2:width=0.1,depth=0.25"):
            counted, built = count(spec, TASK), build_student(spec, original)
            assert counted.params == sum(value.numel() for value in built.module.parameters())
            assert counted.macs == totals(built)["macs"]
        assert counted.paper.startswith("Sandler")

    def test_the_widest_is_found_by_halving(self) -> None:
        ladder = Ladder("ds-cnn", 0.5, (0.1, 0.2, 0.4, 0.8, 1.6), TASK)
        for limit in (0, 500, 1500, 4000, 10**9):
            wanted = max((index for index in range(5) if ladder[index].params <= limit), default=-1)
            assert ladder.widest(lambda one, limit=limit: one.params <= limit) == wanted


class FakeTable(Table):
    """Files of 100 bytes a layer and 5 a channel beside the weights; calls of a nanosecond a MAC."""

    lowered: ClassVar[list[str]] = []

    def _measured(self, spec: str) -> Found:
        self.lowered.append(spec)
        one = count(spec, self.task)
        return Found(
            one.weights + 100 * one.layers + 5 * one.channels, 1e-9 * one.macs + 1e-6 * one.layers, 1
        )


@pytest.fixture
def run(original: Model, tmp_path: Path) -> Run:
    return Run(original, examples(), target(), Store(tmp_path / "store"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three families instead of all."""
    names = ("mobilenetv1", "shufflenetv2", "ds-cnn")
    monkeypatch.setattr(nets, "FAMILIES", {name: nets.FAMILIES[name] for name in names})


@pytest.fixture
def fake(few: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    FakeTable.lowered = []
    monkeypatch.setattr(student_choice, "_MOST_EPOCHS", 2.0)
    monkeypatch.setattr(student_choice, "Table", FakeTable)
    yield FakeTable.lowered


class TestTable:
    def test_predicts_what_it_learned_from(self, run: Run) -> None:
        table = FakeTable(run)
        specs = ["ds-cnn:width=0.5", "mobilenetv1:width=0.1", "shufflenetv2:width=0.25"]
        candidates = [count(spec, table.task) for spec in specs]
        assert table.predicted(candidates[0]) is None
        table.lower(candidates[0])
        rough = table.predicted(candidates[1])
        table.lower(candidates[1])
        exact, true = table.predicted(candidates[2]), table._measured(specs[2])
        assert rough is not None
        assert exact is not None
        assert exact.bytes == pytest.approx(true.bytes, abs=2)
        assert exact.latency_s == pytest.approx(true.latency_s)

    def test_lowering_is_done_once(self, run: Run, fake: list[str]) -> None:
        candidate = count(SMALL, FakeTable(run).task)
        assert FakeTable(run).lower(candidate) == FakeTable(run).lower(candidate)
        assert fake == [SMALL]

    def test_an_untrained_file_is_as_large_as_a_trained_one(self, original: Model, run: Run) -> None:
        table = Table(run)
        found = table.lower(count(SMALL, table.task))
        assert found is not None
        assert found.latency_s is not None
        student = Run(
            original, run.data, run.target, run.store, student=load_beside(Given(SMALL), "student", original)
        )
        recipe = (
            "version: 1\nsteps: [{finetune: {teacher: original, epochs: 2}}, {fold: {}}, {quantize: {}}]\n"
        )
        trained = student.lower(student.apply(Recipe.parse(recipe)))
        assert trained.bytes == pytest.approx(found.bytes, rel=0.02)


def question(prefer: Preference = "quality", time_s: float = 600.0, **limits: Any) -> Question:
    return Question(
        budget=Budget(**limits), prefer=prefer, confident=False, recipe=Recipe(()), open_ended=True,
        trials=3, time_limit=time_s,
    )  # fmt: skip


class TestShares:
    def test_what_is_enough_for_all_is_the_same_for_all(self) -> None:
        assert student_choice._shares([500.0, 12.0, 11.0]) == [1.0, 1.0, 1.0]

    def test_what_cannot_learn_enough_learns_less(self) -> None:
        assert student_choice._shares([40.0, 10.0, 5.0, 1.0]) == [1.0, 1.0, 0.5, 0.1]

    def test_where_none_can_all_take_as_long(self) -> None:
        seconds = [1.0, 2.0, 4.0]
        shares = student_choice._shares([4.0 / one for one in seconds])
        assert [share * one for share, one in zip(shares, seconds, strict=True)] == [1.0, 1.0, 1.0]


class TestChoosing:
    def test_keeps_the_budget_and_says_why(self, run: Run, fake: list[str]) -> None:
        notes: list[str] = []
        run.progress = type("Told", (Silent,), {"note": lambda self, text: notes.append(text)})()
        made = choose_student(run, question(bytes=30_000))
        best = made.rows[0]
        assert best.chosen
        assert best.student == made.student.model
        assert best.bytes is not None
        assert best.bytes <= 30_000
        assert sum(row.chosen for row in made.rows) == 1
        assert any("student auto" in note and best.student in note for note in notes)
        trained = [row for row in made.rows if row.quality_drop is not None]
        assert len(trained) > 1
        assert best.quality_drop == min(row.quality_drop for row in trained if row.epochs == best.epochs)
        papers = [count(row.student, TASK).paper for row in trained]
        assert len(set(papers)) == len(papers)

    @pytest.mark.parametrize(("time_s", "equal"), [(600.0, True), (1.0, False)])
    def test_all_learn_as_often_where_the_time_is_enough_for_each(
        self, time_s: float, equal: bool, run: Run, fake: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow = iter(range(1, 100))

        def pace(one: Run, lesson: dict[str, Any]) -> Pace:
            return replace(pace_of(one, lesson), training_s=1e-4 * next(slow), teacher_s=0.0)

        monkeypatch.setattr(student_choice, "pace_of", pace)
        monkeypatch.setattr(student_choice, "_FEWEST", 1)
        made = choose_student(run, question("balanced", bytes=30_000, time_s=time_s))
        epochs = {row.epochs for row in made.rows if row.quality_drop is not None}
        assert (len(epochs) == 1) is equal

    def test_is_kept(self, run: Run, fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        first = choose_student(run, question(bytes=30_000))
        monkeypatch.setattr(finetune.Finetune, "apply", _fails)
        count_ = len(fake)
        assert choose_student(run, question(bytes=30_000)) == first
        assert len(fake) == count_

    def test_without_time_the_largest_is_taken(
        self, run: Run, fake: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(finetune.Finetune, "apply", _fails)
        made = choose_student(run, question(bytes=14_000, time_s=0.01))
        assert "most capacity" in made.said
        assert all(row.quality_drop is None for row in made.rows)

    def test_a_latency_limit_leaves_out_what_is_slow(self, run: Run, fake: list[str]) -> None:
        made = choose_student(run, question(time_s=0.01, latency_s=3e-5))
        assert made.rows[0].latency_s is not None
        assert made.rows[0].latency_s <= 3e-5

    def test_less_is_chosen_where_the_objective_asks_for_less(self, run: Run, fake: list[str]) -> None:
        largest = choose_student(run, question("quality", bytes=14_000)).rows[0]
        smallest = choose_student(run, question("bytes", bytes=14_000, quality_drop=1.0)).rows[0]
        assert smallest.bytes is not None
        assert largest.bytes is not None
        assert smallest.bytes < largest.bytes

    def test_without_a_budget_it_is_smaller_than_the_original(self, run: Run, fake: list[str]) -> None:
        best = choose_student(run, question(time_s=0.01)).rows[0]
        assert best.params < totals(run.original)["params"]
        assert best.macs <= totals(run.original)["macs"]

    def test_a_budget_below_the_smallest(self, run: Run, fake: list[str]) -> None:
        with pytest.raises(BudgetError) as error:
            choose_student(run, question(bytes=300))
        said = error.value.what
        assert "the smallest, ds-cnn:width=0.1,depth=0.25, takes" in said
        assert "size above the limit" in said
        assert error.value.fix

    def test_a_runtime_that_takes_none(self, run: Run, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuses(self: Table, spec: str) -> Found:
            raise RecipeError("it is too odd")

        monkeypatch.setattr(Table, "_measured", refuses)
        with pytest.raises(BudgetError, match="could be lowered: it is too odd"):
            choose_student(run, question(bytes=30_000))

    def test_needs_no_weights_and_some_examples(self, original: Model) -> None:
        def made(data: Data, weights: str | None = None) -> Run:
            sources = fw_sources(original, data)
            return auto_run(
                sources,
                target(),
                Given("auto", weights),
                Given(),
                seed=0,
                progress=Silent(),
                allow_pickle=False,
            )

        with pytest.raises(LoadError, match="--student auto has yet to choose it"):
            made(examples(), "w.safetensors")
        x, y = bars(20)
        with pytest.raises(DataError, match="learns from examples"):
            made(Data.of(x, y))


def fw_sources(original: Model, data: Data) -> Any:
    from featherweight.engine.sources import Sources

    return Sources(original, data, ())


def _fails(*_: Any) -> Model:
    raise AssertionError("computed again")


CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4),
    )
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained original, its data, and a recipe."""
    folder = tmp_path_factory.mktemp("students")
    (folder / "nets.py").write_text(CODE)
    x, y = bars(700)
    np.savez(folder / "data.npz", x=x[:200], y=y[:200], x_train=x[200:], y_train=y[200:])
    summary = fw.apply(
        f"{folder / 'nets.py'}:net",
        Recipe.parse("version: 1\nsteps:\n  - finetune: {epochs: 4, batch_size: 32, learning_rate: 0.05}\n"),
        data=str(folder / "data.npz"),
        out=folder / "trained",
    )
    assert summary["edits"] == 0
    (folder / "int8.yaml").write_text(
        "version: 1\nsteps:\n"
        "  - finetune: {teacher: original, epochs: 3, batch_size: 32, learning_rate: 0.1}\n"
        "  - fold: {}\n  - quantize: {samples: 32}\n"
    )
    return folder


def fit(code: Path, out: Path, **changes: Any) -> Result:
    return fw.fit(
        f"{code / 'nets.py'}:net",
        str(code / "data.npz"),
        weights=str(code / "trained" / "weights.safetensors"),
        out=out,
        limits=QUICK,
        tune=False,
        **changes,
    )


class TestFit:
    def test_a_named_student_and_its_recipe_again(self, code: Path, tmp_path: Path) -> None:
        first = fit(code, tmp_path / "one", student="ds-cnn:width=0.25", recipe=str(code / "int8.yaml"))
        assert first.student == "ds-cnn:width=0.25"
        assert first.students == []
        again = fit(
            code, tmp_path / "two", student=first.student, recipe=str(tmp_path / "one" / "recipe.yaml")
        )
        assert again.chosen.sha256 == first.chosen.sha256
        assert "ds-cnn:width=0.25" in (tmp_path / "one" / "model_card.md").read_text()
        assert "ds-cnn:width=0.25" in (tmp_path / "one" / "report.html").read_text()

    def test_auto_from_the_budget_to_the_artifact(self, code: Path, few: None, tmp_path: Path) -> None:
        result = fit(
            code, tmp_path / "out", student="auto", budget=Budget(bytes=14_000), prefer="quality",
            time_limit=12.0, trials=1,
        )  # fmt: skip
        assert result.met
        assert result.chosen.bytes <= 14_000
        (chosen,) = [row for row in result.students if row.chosen]
        assert chosen.student == result.student
        first = result.recipe["steps"][0]["finetune"]
        assert first["teacher"] == "original"
        told = json.loads((tmp_path / "out" / "result.json").read_text())
        assert [row["student"] for row in told["students"]] == [row.student for row in result.students]
        page = (tmp_path / "out" / "report.html").read_text()
        assert all(row.student in page for row in result.students if row.bytes is not None)

    def test_apply_refuses_auto(self, code: Path, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="which only fit has"):
            fw.apply(
                f"{code / 'nets.py'}:net",
                str(code / "int8.yaml"),
                data=str(code / "data.npz"),
                student="auto",
                out=tmp_path / "out",
            )
        assert not (tmp_path / "out").exists()


def test_a_plan_leaves_the_time_of_the_choice_out() -> None:
    assert 0 < SHARE < 0.5
    assert StudentChoice(Given("ds-cnn"), (), "").student.fresh
    assert Counted("a", "b", 10, 10, 5, 3, 4).capacity == 30.0


def test_a_result_without_a_choice_says_nothing(code: Path, tmp_path: Path) -> None:
    result = fit(code, tmp_path / "out", recipe=Recipe(()))
    assert result.students == []
    assert "Students" not in report.render(result)
    assert "student" not in bundle.model_card(result)
