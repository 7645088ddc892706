"""Finetune: better than before, only where it may be, and clear about what it lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.engine.template import step_holes
from featherweight.errors import DataError, RecipeError
from featherweight.method import Context
from featherweight.methods.finetune import Finetune
from featherweight.methods.fold import Fold
from featherweight.methods.quantize import Quantize
from featherweight.methods.sparsify import Sparsify
from featherweight.model import Model
from featherweight.recipe import Recipe, Step
from featherweight.tools.simulate import simulate
from golden import context, data, model, model_of, target
from training import Told, problem, same, small


def around(net: Model, given: Data | None = None, **more: Any) -> Context:
    return replace(context(net, given or problem()), models={"original": net}, **more)


def tuned(net: Model, given: Data | None = None, told: Told | None = None, **how: Any) -> Model:
    method = Finetune.model_validate({"epochs": 6, "batch_size": 16, "learning_rate": 0.1, **how})
    return method.apply(net, around(net, given, progress=told or Told()))


def loss_of(net: Model, given: Data | None = None) -> float:
    train = (given or problem()).train
    assert train is not None
    assert train.targets is not None
    with torch.no_grad():
        (output,) = simulate(net)(torch.from_numpy(train.take(np.arange(len(train)))[0]))
    return float(F.cross_entropy(output, torch.from_numpy(train.targets)))


class TestFloat:
    def test_the_loss_falls(self) -> None:
        assert loss_of(tuned(small())) < 0.8 * loss_of(small())

    def test_defaults_follow_what_is_trained(self) -> None:
        settings = Finetune()._settings
        norms = settings(small(), around(small()))
        assert (norms.optimizer, norms.learning_rate) == ("sgd", 0.03)
        plain = settings(small(norm=False), around(small()))
        assert (plain.optimizer, plain.learning_rate) == ("adamw", 1e-3)
        attention = settings(model("attention"), around(small()))
        assert (attention.optimizer, attention.learning_rate) == ("adamw", 1e-4)
        stored = Quantize().apply(model("attention"), context(model("attention"), data("attention")))
        assert settings(stored, around(small())).learning_rate == 3e-5

    def test_zeros_train_as_a_float_network_does(self) -> None:
        def chosen(net: Model) -> tuple[str, float]:
            found = Finetune()._settings(net, around(small()))
            return found.optimizer, found.learning_rate

        zeros = Sparsify().apply(small(), around(small()))
        assert chosen(zeros) == chosen(small()) == ("sgd", 0.03)
        attention = Sparsify().apply(model("attention"), context(model("attention"), data("attention")))
        assert chosen(attention) == chosen(model("attention")) == ("adamw", 1e-4)
        integers = Quantize(activations="none").apply(zeros, around(zeros))
        assert chosen(integers) == ("adamw", 5e-4)
        assert Finetune(optimizer="sgd")._settings(integers, around(small())).learning_rate == 0.01
        scores = Sparsify(criterion="movement").apply(small(), around(small()))
        gates = Sparsify(regularisation="l0").apply(small(), around(small()))
        assert chosen(scores) == chosen(gates) == ("adamw", 1e-3)

    def test_devices_and_precision_are_the_commands(self) -> None:
        asked = around(small(), devices=2, precision="bf16-mixed")
        assert Finetune()._settings(small(), asked).devices == 2
        assert Finetune()._settings(small(), asked).precision == "bf16-mixed"
        assert Finetune(precision="32")._settings(small(), asked).precision == "32"
        (step,) = Recipe.parse("version: 1\nsteps: [{finetune: {precision: 32}}]").methods()
        assert step == Finetune(precision="32")

    def test_the_result_is_a_plain_network(self) -> None:
        done = tuned(small())
        assert not done.module.training
        for parameter in done.module.parameters():
            assert parameter.requires_grad
            assert parameter.grad is None
            assert parameter.is_contiguous()

    def test_statistics_stay_or_are_estimated_anew(self) -> None:
        before = small().module.state_dict()
        frozen = tuned(small(), batch_norm="freeze").module.state_dict()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(frozen[f"1.{name}"], before[f"1.{name}"])
        assert not torch.equal(frozen["1.weight"], before["1.weight"])
        done = tuned(small(), batch_norm="reestimate")
        values = done.module[0](torch.from_numpy(problem().train.take(np.arange(64))[0]))  # type: ignore[index,union-attr]
        assert torch.allclose(done.module.state_dict()["1.running_mean"], values.mean((0, 2, 3)), atol=1e-5)

    def test_a_user_loss_and_a_training_step(self, tmp_path: Path) -> None:
        file = tmp_path / "own.py"
        file.write_text(
            "from torch.nn import functional as F\n"
            "def loss(output, y): return F.cross_entropy(output, y)\n"
            "def step(module, batch): return F.cross_entropy(module(batch[0]), batch[1])\n"
        )
        wanted = tuned(small()).module.state_dict()
        assert same(tuned(small(), loss=f"{file}:loss").module.state_dict(), wanted)
        assert same(tuned(small(), training_step=f"{file}:step").module.state_dict(), wanted)

    def test_augmented(self) -> None:
        calls = []

        def augment(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            calls.append(inputs.shape)
            return inputs[:, :, ::-1]

        train = problem().train
        assert train is not None
        x = train.take(np.arange(64))[0]
        own = Data.of(x[:4], train.targets[:4], x_train=x, y_train=train.targets, augment=augment)  # type: ignore[index]
        upside_down = tuned(small(), own)
        assert calls == [(16, 2, 6, 6)] * 24
        turned = Data.of(x_train=x[:, :, ::-1].copy(), y_train=train.targets)
        assert same(upside_down.module.state_dict(), tuned(small(), turned).module.state_dict())
        flipped = tuned(small(), augment=["flip", "mixup"])
        assert not same(flipped.module.state_dict(), tuned(small()).module.state_dict())

    def test_other_methods_than_forward(self) -> None:
        class Scores(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(72, 4)

            def scores(self, x: Tensor) -> Tensor:
                return self.layer(x.flatten(1))

        net = model_of(Scores(), torch.randn(2, 2, 6, 6), method="scores")
        done = tuned(net)
        assert not torch.equal(done.module.layer.weight, net.module.layer.weight)  # type: ignore[union-attr,arg-type]


class TestWhere:
    def test_others_stay_bit_for_bit_statistics_too(self) -> None:
        before = small().module.state_dict()
        after = tuned(small(), where={"include": ["5"]}).module.state_dict()
        assert [name for name, value in after.items() if not torch.equal(value, before[name])] == [
            "5.weight",
            "5.bias",
        ]

    def test_a_tensor_that_an_excluded_layer_shares(self) -> None:
        net = model("shared")
        names = [name for name, _ in net.module.named_parameters(remove_duplicate=False)]
        tied = [name for name in names if name not in net.parameters]
        assert tied
        done = tuned(net, data("shared"), where={"exclude": [tied[0].rpartition(".")[0]]})
        assert torch.equal(done.module.get_parameter(tied[0]), net.module.get_parameter(tied[0]))

    def test_under_formats(self) -> None:
        folded = Fold().apply(small(), around(small()))
        stored = Quantize(weights="int4", activations="none").apply(folded, around(folded))
        done = tuned(stored, where={"exclude": ["5"]}, learning_rate=0.01)
        assert torch.equal(done.parameters["5.weight"], stored.parameters["5.weight"])
        assert done.formats["5.weight"] == stored.formats["5.weight"]
        assert not torch.equal(done.parameters["0.weight"], stored.parameters["0.weight"])

    def test_nothing_is_left(self) -> None:
        with pytest.raises(RecipeError, match="where leaves finetune no layer with weights"):
            tuned(small(), where={"exclude": ["*"]})


class TestFormats:
    @pytest.mark.parametrize("batch_norm", ["train", "auto"])
    def test_the_stored_network_is_trained(self, batch_norm: str) -> None:
        folded = Fold().apply(small(), around(small()))
        stored = Quantize(weights="int2", activations="none").apply(folded, around(folded))
        done = tuned(stored, epochs=15, learning_rate=0.01, batch_norm=batch_norm)
        assert loss_of(done) < 0.9 * loss_of(stored)
        assert set(done.formats) == set(stored.formats)
        (fmt,) = done.formats["5.weight"]
        assert torch.equal(fmt.project(done.parameters["5.weight"]), done.parameters["5.weight"])

    def test_temporary_norms_and_where(self) -> None:
        with pytest.raises(RecipeError, match="temporary batch norms change every layer"):
            tuned(small(), batch_norm="temporary", where={"exclude": ["0"]})


class TestTeacher:
    def test_labels_are_optional(self) -> None:
        teacher, student = tuned(small(), epochs=12), small(seed=3)
        train = problem().train
        assert train is not None
        x = train.take(np.arange(64))[0]
        for given in (Data.of(x_train=x), Data.of(calibration=x), Data.of(calibration=lambda: iter([x]))):
            asked = replace(around(student, given), models={"original": teacher})
            method = Finetune(epochs=12, batch_size=16, learning_rate=0.1, teacher="original")
            assert loss_of(method.apply(student, asked)) < loss_of(student)


class TestErrors:
    def test_no_labels(self) -> None:
        with pytest.raises(DataError, match="training needs labels") as caught:
            tuned(small(), Data.of(x_train=np.zeros((4, 2, 6, 6), np.float32)))
        assert "teacher: original" in str(caught.value.fix)

    def test_no_training_examples(self) -> None:
        with pytest.raises(DataError, match="there are no training examples"):
            tuned(small(), Data.of(np.zeros((4, 2, 6, 6), np.float32), np.zeros(4, np.int64)))

    def test_several_entries(self) -> None:
        net = small()
        entry = net.entries["forward"]
        two = Model(net.module, {"encode": entry, "decode": entry})
        with pytest.raises(RecipeError, match="this one has decode, encode"):
            tuned(two)

    def test_a_rate_that_diverges(self) -> None:
        with pytest.raises(RecipeError, match="training diverged"):
            tuned(small(norm=False), optimizer="sgd", learning_rate=1e30, clip=0)


class TestHoles:
    def test_only_with_examples_to_train_on(self) -> None:
        holes = Finetune.holes(small(), around(small()))
        assert set(holes) == {"epochs", "learning_rate"}
        assert holes["learning_rate"].first == 0.03
        x = np.zeros((4, 2, 6, 6), np.float32)
        assert not Finetune.holes(small(), around(small(), Data.of(x)))
        for given in (Data.of(x_train=x), Data.of(calibration=x), Data.of(calibration=lambda: iter([x]))):
            assert Finetune.holes(small(), around(small(), given)) == holes

    def test_the_rate_of_a_step_with_a_teacher_is_open_without_labels(self) -> None:
        given = around(small(), Data.of(calibration=np.zeros((4, 2, 6, 6), np.float32)))
        step = Step("finetune", {"epochs": 1.0, "teacher": "original"})
        assert set(step_holes(step, small(), given)) == {"learning_rate"}


def test_an_edited_loss_is_another_step(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    text = "from torch.nn import functional as F\ndef loss(output, y): return {}F.cross_entropy(output, y)\n"
    made = []
    for factor in ("", "0.5 * ", ""):
        file.write_text(text.format(factor))
        run = Run(small(), problem(), target(), Store(tmp_path / "store"))
        run.sources = ""
        made.append(run.step(run.original, Finetune(epochs=1, batch_size=16, loss=f"{file}:loss")))
    assert made[0].key == made[2].key != made[1].key
    for devices, precision in ((2, "32"), (1, "bf16-mixed")):
        run = Run(
            small(), problem(), target(), Store(tmp_path / "store"), devices=devices, precision=precision
        )  # type: ignore[arg-type]
        run.sources = ""
        step = Finetune(epochs=1, batch_size=16, loss=f"{file}:loss")
        assert run._step_key(run.original, "finetune", step) != made[0].key
