"""The training loop: what every setting does, resumption, and what is said when a loss is no number."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.errors import DataError, RecipeError
from featherweight.methods.sparsify import Sparsify
from featherweight.tools import training
from featherweight.tools.objectives import Net, Objective, Outputs, TaskLoss
from featherweight.tools.optimizers import rate_factor
from featherweight.tools.simulated import Simulated
from featherweight.tools.train_settings import TrainSettings
from featherweight.tools.training import train
from featherweight.tools.training_examples import training_examples
from golden import context, data, model, model_of
from training import Kept, Told, fitted, problem, same, small, weights


class TestTrains:
    def test_the_loss_falls_and_the_bar_counts_updates(self) -> None:
        told = Told()
        history, _ = fitted(epochs=15, learning_rate=0.1, told=told)
        assert np.mean(history.losses[-4:]) < 0.5 * np.mean(history.losses[:4])
        assert history.steps == len(history.losses) == 60
        assert told.bars == [("training", 60)]
        assert told.notes[0].startswith("epoch 1: loss ")

    @pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "attention", "linear3d", "lstm"])
    def test_golden_nets(self, name: str) -> None:
        net = Simulated(model(name))
        examples = training_examples(data(name), taught=False)
        settings = TrainSettings(steps=12, batch_size=32, optimizer="adamw", learning_rate=3e-3)
        history = train(net, TaskLoss(highest=9), examples, settings, context(model(name), data(name)))
        assert history.losses[-1] < history.losses[0]

    def test_the_same_every_time_and_another_seed_is_another_run(self) -> None:
        torch.manual_seed(1)
        _, one = fitted()
        torch.manual_seed(2)
        _, two = fitted()
        _, other = fitted(seed=1)
        assert same(weights(one), weights(two))
        assert not same(weights(one), weights(other))

    def test_leaves_the_random_state_alone(self) -> None:
        state = torch.random.get_rng_state()
        fitted()
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_a_fraction_of_an_epoch_and_steps(self) -> None:
        assert fitted(epochs=0.5)[0].steps == 2
        assert fitted(epochs=0.01)[0].steps == 1
        assert fitted(steps=7)[0].steps == 7

    def test_memory_does_not_grow_with_the_examples(self) -> None:
        """Rows are read when they are needed: of a file that is mapped no copy is made."""

        class Rows:
            shape, dtype, digests, taken = (2, 6, 6), np.dtype(np.float32), (), 0

            def __len__(self) -> int:
                return 10_000_000

            def take(self, indices: np.ndarray) -> np.ndarray:
                Rows.taken = max(Rows.taken, len(indices))
                return np.random.default_rng(0).standard_normal((len(indices), 2, 6, 6)).astype(np.float32)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        many = Data.of(x_train=Rows(), y_train=np.zeros(10_000_000, np.uint8))
        fitted(data=many, steps=3)
        assert Rows.taken == 16
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 1 << 20  # kB; the examples would be 2.9 GB, their order is 80 MB


class TestSettings:
    def test_rates_follow_the_schedule(self) -> None:
        history, _ = fitted(steps=20, warmup=0.2, learning_rate=0.05, schedule="linear")
        wanted = [0.05 * rate_factor(step, 20, 0.2, "linear") for step in range(20)]
        assert history.rates == wanted

    def test_clip_bounds_the_norm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        norms: list[float] = []
        step = torch.optim.SGD.step

        def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
            gradients = [one.grad for group in self.param_groups for one in group["params"]]
            norms.append(float(torch.stack([one.square().sum() for one in gradients]).sum().sqrt()))
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.SGD, "step", spy)
        fitted(clip=0.05)
        assert norms
        assert max(norms) <= 0.05 * 1.0001
        assert max(norms) > 0.0499
        norms.clear()
        fitted(clip=None)
        assert max(norms) > 0.1

    def test_parts_of_a_batch_make_the_same_update(self) -> None:
        one, net = fitted(small(norm=False), steps=6, accumulate=1)
        four, twin = fitted(small(norm=False), steps=6, accumulate=4)
        assert four.losses == pytest.approx(one.losses, rel=1e-5)
        for name, value in weights(net).items():
            assert torch.allclose(value, weights(twin)[name], atol=1e-6)

    def test_averaged_weights_are_the_result(self) -> None:
        trail: list[dict[str, Tensor]] = []

        class Spy(TaskLoss):
            def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
                trail.append(weights(net))
                return super().forward(outputs, inputs, targets)

        net = Simulated(small(norm=False))
        around = context(small(norm=False), problem())
        settings = TrainSettings(steps=6, batch_size=16, ema=0.8, learning_rate=0.1)
        train(net, Spy(highest=3), training_examples(problem(), taught=False), settings, around)
        _, plain = fitted(small(norm=False), steps=6, learning_rate=0.1)
        average = trail[0]
        for step, value in enumerate([*trail[1:], weights(plain)]):
            decay = min(0.8, (1 + step) / (10 + step))
            average = {name: decay * average[name] + (1 - decay) * value[name] for name in average}
        for name, value in weights(net).items():
            assert torch.allclose(value, average[name], atol=1e-6)
        assert not same(weights(net), weights(plain))

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
    def test_mixed_precision(self, precision: str) -> None:
        told = Told()
        history, net = fitted(epochs=10, precision=precision, learning_rate=0.1, told=told)
        exact, _ = fitted(epochs=10, learning_rate=0.1)
        assert history.losses[-1] < history.losses[0]
        assert history.losses != exact.losses
        assert all(value.dtype != torch.bfloat16 for value in weights(net).values())
        assert any("float16" in note for note in told.notes) == (precision == "16-mixed")

    def test_frozen_batch_norms_keep_their_statistics(self) -> None:
        before = weights(Simulated(small()))
        _, still = fitted(frozen=("1",))
        assert torch.equal(weights(still)["1.running_mean"], before["1.running_mean"])
        _, moved = fitted()
        assert not torch.equal(weights(moved)["1.running_mean"], before["1.running_mean"])

    def test_a_layout_that_the_code_cannot_take_is_not_used(self) -> None:
        class Views(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.conv(x).view(x.shape[0], -1))

        net = model_of(Views(), torch.randn(2, 2, 6, 6))
        history, _ = fitted(net, epochs=8)
        assert history.losses[-1] < history.losses[0]

    def test_an_objective_trains_parameters_of_its_own(self) -> None:
        class Scaled(Objective):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))
                self.net: list[Net] = []

            def attach(self, net: Net) -> None:
                self.net.append(net)
                net.watch(["0"])

            def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
                assert self.net[0].seen["0"].shape[1] == 8
                return (outputs[0].square().mean() * self.scale).exp()

        objective, around = Scaled(), context(small(), problem())
        settings = TrainSettings(steps=3, batch_size=16)
        examples = training_examples(problem(), taught=True)
        train(Simulated(small()), objective, examples, settings, around)
        assert objective.scale.item() < 1


class TestHeldBack:
    def test_the_best_epoch_is_kept_and_patience_ends_training(self) -> None:
        told = Told()
        history, net = fitted(
            data=problem(24), epochs=60, held_back=0.34, patience=3, learning_rate=0.2, told=told
        )
        best = int(np.argmin(history.validation))
        assert len(history.validation) == best + 4 < 60
        assert history.stopped == "no better for 3 epochs"
        examples = training_examples(problem(24), taught=False, held_back=0.34)
        net.eval()
        losses = [
            TaskLoss(highest=3)(net(*one.inputs), one.inputs, one.targets).item()
            for one in examples.held_back(64)
        ]
        assert losses == pytest.approx([history.validation[best]], rel=1e-4)

    def test_no_epoch_is_the_best_before_formats_stay(self) -> None:
        kept = Kept()
        history, _ = fitted(
            epochs=8, held_back=0.25, settled=0.5, learning_rate=0.5, schedule="constant", checkpoint=kept
        )
        best = int(np.argmin(history.validation[3:])) + 4
        assert kept.states[-1]["best"][1] == best
        assert all(state["best"] is None for state in kept.states if state["step"] < 12)

    def test_they_are_not_trained_on(self) -> None:
        examples = training_examples(problem(), taught=False, held_back=0.25)
        assert len(examples) == 48
        assert not set(examples.picks) & set(examples.held)
        other = training_examples(problem(), taught=False, held_back=0.25, seed=1)
        assert set(other.held) != set(examples.held)

    def test_too_few(self) -> None:
        with pytest.raises(DataError, match="none can be held back"):
            training_examples(problem(1), taught=False, held_back=0.5)


class TestDiverging:
    def test_nan_keeps_what_was_kept_last(self) -> None:
        told, kept = Told(), Kept()
        with torch.random.fork_rng(devices=[]):
            history, net = self.run(told, kept, broken_at=10)
        assert "the loss is nan at step 11 of 40" in history.stopped
        assert any("the weights of step 8 are kept" in note for note in told.notes)
        saved = kept.states[-1]
        assert saved["step"] == 8
        assert all(
            torch.equal(value, saved["learner"][f"net.module.{name}"]) for name, value in weights(net).items()
        )

    def test_infinite_before_anything_was_kept(self) -> None:
        with pytest.raises(RecipeError, match="diverged: the loss is inf at step 3") as caught:
            self.run(Told(), Kept(), broken_at=2, value=torch.inf)
        assert "learning_rate" in str(caught.value.fix)

    def test_an_exploding_loss(self) -> None:
        told = Told()
        history, _ = self.run(told, Kept(), broken_at=24, value=1e6)
        assert history.stopped.startswith("training diverged")
        assert len(history.losses) < 30

    def test_a_rate_that_is_too_large(self) -> None:
        told = Told()
        net = small(norm=False)
        history, trained = fitted(net, epochs=30, learning_rate=1e4, warmup=0.5, told=told)
        assert history.stopped
        assert all(value.isfinite().all() for value in weights(trained).values())

    def test_a_last_update_without_a_gradient(self) -> None:
        told, kept = Told(), Kept()
        history, net = self.run(told, kept, broken_at=39, value=None)  # the loss itself is a number
        assert len(history.losses) == 40
        assert any("the loss is nan at step 40 of 40; the weights of step 36" in note for note in told.notes)
        assert all(value.isfinite().all() for value in weights(net).values())
        assert kept.states[-1]["step"] == 36

    @staticmethod
    def run(told: Told, kept: Kept, broken_at: int, value: float | None = torch.nan) -> Any:
        class Breaks(TaskLoss):
            calls = 0

            def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
                Breaks.calls += 1
                loss = super().forward(outputs, inputs, targets)
                if value is None and Breaks.calls > broken_at:
                    return loss + (0 * loss).sqrt()  # whose gradient is 0 / 0
                return loss if Breaks.calls <= broken_at else loss * 0 + value

        net, around = small(), replace(context(small(), problem()), progress=told, checkpoint=kept)
        simulated = Simulated(net)
        settings = TrainSettings(epochs=10, batch_size=16)
        examples = training_examples(problem(), taught=False)
        return train(simulated, Breaks(highest=3), examples, settings, around), simulated


class TestResumes:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"ema": 0.9}, {"optimizer": "adamw"}, {"patience": 3, "held_back": 0.25}, {"accumulate": 2}],
        ids=lambda one: "-".join(one) or "plain",
    )
    def test_from_every_checkpoint_to_the_same_weights(
        self, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training, "_SAVE_S", 0.0)  # a checkpoint after every update
        kept = Kept()
        whole, net = fitted(checkpoint=kept, **settings)
        assert [state["step"] for state in kept.states] == list(range(1, whole.steps + 1))
        for at in (0, len(kept.states) // 2, len(kept.states) - 1):
            told = Told()
            again, twin = fitted(checkpoint=Kept(kept.states, at), told=told, **settings)
            assert again.losses == whole.losses
            assert same(weights(twin), weights(net))
            assert told.notes[0] == f"training goes on after step {at + 1} of {whole.steps}"

    @pytest.mark.parametrize(
        "settings",
        [{}, {"end": 0.3}, {"criterion": "movement"}, {"regularisation": "l0"}],
        ids=lambda one: "-".join(one) or "plain",
    )
    def test_masks_are_made_when_they_would_have_been(
        self, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training, "_SAVE_S", 0.0)
        begun = Sparsify(sparsity=0.8, **settings).apply(small(), context(small(), problem()))
        kept = Kept()
        whole, net = fitted(begun, checkpoint=kept, epochs=75)  # 300 steps: a mask stays for two of them
        for at in (56, 57, 180, 215, 298):
            again, twin = fitted(begun, checkpoint=Kept(kept.states, at), epochs=75)
            assert again.losses == whole.losses
            assert same(net.state_dict(), twin.state_dict())
            assert same(net.absorb().module.state_dict(), twin.absorb().module.state_dict())

    def test_that_of_another_training_is_not_used(self) -> None:
        kept = Kept()
        fitted(checkpoint=kept)
        told = Told()
        fitted(checkpoint=Kept(kept.states, 1), learning_rate=0.123, told=told)
        assert not any("goes on" in note for note in told.notes)

    def test_dropout_draws_what_it_would_have_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training, "_SAVE_S", 0.0)
        kept = Kept()
        dropout = model_of(
            nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Dropout(0.5), nn.Linear(16, 4)),
            torch.randn(2, 2, 6, 6),
        )
        whole, net = fitted(dropout, checkpoint=kept)
        again, twin = fitted(dropout, checkpoint=Kept(kept.states, 5))
        assert again.losses == whole.losses
        assert same(weights(net), weights(twin))


def test_nothing_to_train() -> None:
    net = Simulated(small())
    net.requires_grad_(False)
    examples = training_examples(problem(), taught=False)
    with pytest.raises(RecipeError, match="no parameter is left to train"):
        train(net, TaskLoss(), examples, TrainSettings(), context(small(), problem()))


def test_no_examples() -> None:
    with pytest.raises(DataError, match="there are no training examples") as caught:
        training_examples(Data.of(np.zeros((2, 2, 6, 6), np.float32)), taught=False)
    assert "x_train" in str(caught.value.fix)


def test_calibration_examples_are_trained_on_with_a_teacher() -> None:
    x = np.arange(72.0, dtype=np.float32).reshape(6, 12)
    for calibration in (x, lambda: iter([x[:4], x[4:]])):
        examples = training_examples(Data.of(calibration=calibration), taught=True)
        batch = examples.batch(0, 6)
        assert batch.targets is None
        assert torch.equal(batch.inputs[0].sort(0).values, torch.from_numpy(x))
