"""A student takes the original's place; a teacher stands beside: from the command's words to the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import featherweight as fw
from featherweight import bundle, report
from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.sources import NOTHING, Given, check_examples_to_learn, load_beside
from featherweight.engine.store import Store
from featherweight.engine.timing import Limits
from featherweight.errors import DataError, LoadError, RecipeError, UserError
from featherweight.exchange.load import load_model
from featherweight.method import Context, Silent
from featherweight.methods import finetune
from featherweight.model import Model
from featherweight.outcome import Result
from featherweight.recipe import Recipe
from golden import target

QUICK = Limits(seconds=0.2, least_seconds=0.0, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)
CODE = '''"""An original, what may stand for it, and what may not."""
import torch
from torch import nn


def block(inputs, outputs, stride):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    def __init__(self, width=16, classes=4, channels=3):
        super().__init__()
        self.stem = block(channels, width, 1)
        self.down = block(width, width, 2)
        self.head = nn.Linear(width, classes)

    def forward(self, picture):
        return self.head(self.down(self.stem(picture)).mean((2, 3)))


class Small(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.first = block(3, 4, 2)
        self.last = nn.Linear(4, classes)

    def forward(self, image):
        return self.last(self.first(image).mean((2, 3)))


class Two(Small):
    def forward(self, image):
        y = super().forward(image)
        return y, y


def seeded(make, *sizes, **more):
    torch.manual_seed(0)
    return make(*sizes, **more).eval()


def net():
    module = seeded(Net)
    with torch.no_grad():  # so that every class is said of some inputs
        x = torch.randn(256, 3, 8, 8) + torch.randn(256, 3, 1, 1)
        y = module(x)
        module.head.weight /= y.std(0)[:, None]
        module.head.bias.copy_((module.head.bias - y.mean(0)) / y.std(0))
    return module


def small():
    return seeded(Small)


def two():
    return seeded(Two)


def seven():
    return seeded(Small, 7)


def gray():
    return seeded(Net, channels=1)


def nan():
    module = seeded(Small)
    module.last.bias.data[0] = float("nan")
    return module
'''
RECIPE = """version: 1
steps:
  - finetune: {teacher: original, epochs: 20, batch_size: 32, learning_rate: 0.05}
  - fold: {}
  - quantize: {samples: 32}
"""


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Noise of some colour."""
    random = np.random.default_rng(seed)
    noise, colour = (random.standard_normal((count, 3, *size)) for size in ((8, 8), (1, 1)))
    return (noise + colour).astype(np.float32)


def examples(labels: bool = True) -> Data:
    x, y = pictures(160), np.arange(160) % 4
    return Data.of(x[:64], y[:64], x_train=x[64:], y_train=y[64:] if labels else None)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "nets.py").write_text(CODE)
    (folder / "distil.yaml").write_text(RECIPE)
    data = examples()
    assert data.scored is not None
    assert data.train is not None
    np.savez(
        folder / "data.npz",
        x=data.scored.take(np.arange(64))[0],
        y=np.arange(64) % 4,
        x_train=data.train.take(np.arange(96))[0],
    )
    return folder


@pytest.fixture(scope="module")
def original(code: Path) -> Model:
    return load(code, "net")


def load(code: Path, name: str) -> Model:
    return load_model(f"{code / 'nets.py'}:{name}", example_inputs=examples().example_inputs())


def given(code: Path, name: str) -> Given:
    return Given(f"{code / 'nets.py'}:{name}")


class TestLoading:
    def test_a_student_answers_to_the_names_of_the_original(self, code: Path, original: Model) -> None:
        student = load_beside(given(code, "small"), "student", original)
        assert student is not None
        (entry, wanted) = (one.entries["forward"] for one in (student, original))
        assert entry.input_names == wanted.input_names == ("picture",)
        assert entry.output_names == wanted.output_names
        assert entry.dynamic_axes == {"picture": {0: "batch"}}
        assert student.key not in ("", load(code, "small").key)

    def test_nothing_is_nothing(self, original: Model) -> None:
        assert load_beside(NOTHING, "student", original) is None
        assert NOTHING.name == ""
        assert Given("code/nets.py:small").name == "small"
        assert Given("code/small.onnx").name == "small"

    def test_weights_need_a_network(self, original: Model) -> None:
        with pytest.raises(LoadError, match="--teacher-weights are there and no teacher"):
            load_beside(Given(None, "w.safetensors"), "teacher", original)

    @pytest.mark.parametrize("role", ["student", "teacher"])
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("seven", "gives float32 (3, 7), and the original gives float32 (3, 4)"),
            ("two", "gives float32 (3, 4) and float32 (3, 4), and the original"),
            ("gray", "takes other inputs than the original"),
            ("nan", "NaN"),
            ("nothing", "has no 'nothing'"),
        ],
    )
    def test_what_does_not_fit_is_told(
        self, code: Path, original: Model, role: Any, name: str, says: str
    ) -> None:
        with pytest.raises(UserError) as error:
            load_beside(given(code, name), role, original)
        assert says in error.value.what
        assert error.value.fix

    def test_a_student_needs_examples(self) -> None:
        x = np.zeros((4, 3, 8, 8), np.float32)
        check_examples_to_learn(Data.of(x, x_train=x))
        check_examples_to_learn(Data.of(x, calibration=x))
        with pytest.raises(DataError, match="learns from examples"):
            check_examples_to_learn(Data.of(x))


Make = Callable[..., Run]


@pytest.fixture
def make(code: Path, original: Model, tmp_path: Path) -> Make:
    def one(student: str | None = "small", teacher: str | None = None, labels: bool = True) -> Run:
        beside = {"student": student, "teacher": teacher}
        models: dict[str, Any] = {
            role: None if name is None else load_beside(given(code, name), role, original)  # type: ignore[arg-type]
            for role, name in beside.items()
        }
        return Run(original, examples(labels), target(), Store(tmp_path / "store"), **models)

    return one


TRAIN = "version: 1\nsteps:\n  - finetune: {{teacher: {}, epochs: 4, batch_size: 32, learning_rate: 0.05}}\n"


def training(teacher: str = "original") -> Recipe:
    return Recipe.parse(TRAIN.format(teacher))


def agreement(model: Model, other: Model) -> float:
    x = torch.from_numpy(pictures(512, 9))
    with torch.no_grad():
        one, two = (net.module(x).argmax(1) for net in (model, other))
    return float((one == two).float().mean())


class TestRun:
    def test_steps_start_from_the_student_and_see_the_others(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Context] = []
        apply = finetune.Finetune.apply

        def watched(self: Any, model: Model, context: Context) -> Model:
            seen.append(context)
            return apply(self, model, context)

        monkeypatch.setattr(finetune.Finetune, "apply", watched)
        run = make(teacher="net")
        run.apply(training("teacher"))
        (context,) = seen
        assert context.models["original"] is run.original
        assert context.models["student"] is run.student
        assert context.models["teacher"] is run.teacher
        assert run.start is run.student

    @pytest.mark.parametrize("labels", [False, True])
    def test_it_learns_what_the_original_says(self, make: Make, labels: bool) -> None:
        run = make(labels=labels)
        assert run.student is not None
        trained = run.apply(training())
        assert agreement(trained, run.original) > agreement(run.student, run.original) + 0.1

    def test_what_the_store_gives_back_is_what_was_trained(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = Recipe.parse(RECIPE)
        first = make().apply(recipe)
        monkeypatch.setattr(finetune.Finetune, "apply", _fails)
        again = make().apply(recipe)
        assert again.key == first.key
        assert again.edits == first.edits
        assert again.entries["forward"].input_names == ("picture",)
        for name, value in first.module.state_dict().items():
            assert torch.equal(again.module.state_dict()[name], value)

    def test_another_original_or_teacher_is_another_result(self, make: Make, code: Path) -> None:
        (method,) = training().methods()

        def key(run: Run) -> str:
            return run._step_key(run.start, "finetune", method)

        keys = [key(make()), key(make(teacher="net")), key(make(student=None)), key(make(student="net"))]
        keys.append(key(make(student=None, teacher="small")))
        assert len(set(keys)) == len(keys)
        assert key(make()) == keys[0]

    def test_costs_are_those_of_the_student(self, make: Make) -> None:
        assert make().costs.seconds("first.0", integers=False) is not None
        assert make().costs.seconds("down.0", integers=False) is None

    def test_a_teacher_that_is_missing_is_told_with_its_step(self, make: Make) -> None:
        with pytest.raises(RecipeError, match="there is none") as error:
            make().apply(training("teacher"))
        assert error.value.where == "step 1 (finetune)"


def _fails(*_: Any) -> Model:
    raise AssertionError("computed again")


@dataclass(frozen=True)
class Fitted:
    result: Result
    out: Path
    cache: Path


@pytest.fixture(scope="module")
def fitted(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(home / "cache"))
        result = fit(code, home / "out")
    return Fitted(result, home / "out", home / "cache")


def fit(code: Path, out: Path, **changes: Any) -> Result:
    return fw.fit(
        f"{code / 'nets.py'}:net",
        str(code / "data.npz"),
        out=out,
        limits=QUICK,
        tune=False,
        **{
            "student": f"{code / 'nets.py'}:small",
            "recipe": str(code / "distil.yaml"),
            **changes,
        },
    )


class TestFit:
    def test_figures_are_against_the_original(self, fitted: Fitted, original: Model, code: Path) -> None:
        result = fitted.result
        assert result.baseline.params == sum(p.numel() for p in original.module.parameters())
        small = load(code, "small").module
        assert result.chosen.params is not None
        assert result.chosen.params <= sum(p.numel() for p in small.parameters())
        assert result.chosen.bytes < result.baseline.bytes
        assert result.chosen.agreement is not None
        assert result.chosen.agreement > 0.4  # a quarter is chance
        assert result.chosen.latency_ratio is not None

    def test_everything_says_whose_it_is(self, fitted: Fitted) -> None:
        assert json.loads((fitted.out / "result.json").read_text())["student"] == "small"
        assert fitted.result.teacher == ""
        card = (fitted.out / "model_card.md").read_text()
        assert "These steps changed another network, small" in card
        assert "from the network <strong>small</strong>" in (fitted.out / "report.html").read_text()
        assert [row.name for row in fitted.result.layers] == ["first.0", "last"]

    def test_without_a_student_nothing_is_said(self, fitted: Fitted) -> None:
        plain = fitted.result.model_copy(update={"student": "", "teacher": "larger"})
        assert "These steps changed the original network" in bundle.model_card(plain)
        assert "`teacher` is the network larger" in bundle.model_card(plain)
        assert "The steps started from" not in report.render(plain)

    def test_running_again_is_from_the_store(
        self, fitted: Fitted, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(fitted.cache))
        monkeypatch.setattr(finetune.Finetune, "apply", _fails)
        assert fit(code, tmp_path / "again") == fitted.result
        other = fit(code, tmp_path / "plain", student=None, recipe=Recipe(()))
        assert other.student == ""
        assert other.run != fitted.result.run

    def test_an_idle_teacher_is_told(
        self, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes: list[str] = []
        told = Silent()
        monkeypatch.setattr(Silent, "note", lambda self, message: notes.append(message))
        fw.apply(
            f"{code / 'nets.py'}:net",
            Recipe.parse("version: 1\nsteps:\n  - fold: {}\n"),
            data=examples(),
            teacher=f"{code / 'nets.py'}:small",
            out=tmp_path / "out",
            progress=told,
        )
        assert any("no step of the recipe learns from the teacher" in note for note in notes)


class TestApply:
    def test_writes_the_student(self, code: Path, tmp_path: Path) -> None:
        small = load(code, "small").module
        save_file(small.state_dict(), tmp_path / "small.safetensors")
        summary = fw.apply(
            f"{code / 'nets.py'}:net",
            training(),
            data=str(code / "data.npz"),
            student=f"{code / 'nets.py'}:small",
            student_weights=str(tmp_path / "small.safetensors"),
            out=tmp_path / "out",
        )
        assert summary["student"] == "small"
        assert summary["before"]["params"] > summary["after"]["params"]
        tensors = load_file(tmp_path / "out" / "weights.safetensors")
        assert set(tensors) == set(small.state_dict())
        small.load_state_dict(tensors)
        assert json.loads((tmp_path / "out" / "model.json").read_text())["edits"] == []
