"""sparsify: as many zeros as asked, in patterns that hold; they stay in training, integers and runtimes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.errors import RecipeError, TargetError
from featherweight.formats import FloatCast, IntQuant, Sparse, Ternary
from featherweight.masks import block_sums, pattern_of
from featherweight.method import Context
from featherweight.methods.cast import Cast
from featherweight.methods.finetune import Finetune
from featherweight.methods.quantize import Quantize
from featherweight.methods.rounding import Rounding
from featherweight.methods.sparsify import Sparsify
from featherweight.model import Model
from featherweight.plugins import find_runtime, runtime_names
from featherweight.recipe import Recipe
from featherweight.tools.simulate import simulate
from featherweight.tools.sparsity import (
    global_sparsities,
    prunable,
    sensitivities,
    with_zeros,
    zeros_of,
)
from golden import context, data, decibels, folded, inputs, model, target
from heard import Heard


def around(name: str, heard: Heard | None = None) -> Context:
    begun = folded(name)
    base = replace(context(begun, data(name)), progress=heard or Heard())
    return replace(base, models={"original": begun, "float": begun})


def sparse(name: str, **settings: Any) -> Model:
    return Sparsify(**settings).apply(folded(name), around(name))


def masks(done: Model) -> dict[str, Tensor]:
    return {name: chain[0].mask for name, chain in done.formats.items() if isinstance(chain[0], Sparse)}


def share(done: Model) -> float:
    """Of zeros among all weights with masks, as they are stored."""
    stored = with_zeros(done)
    tensors = [stored.module.get_parameter(name) for name in masks(done)]
    return sum(int((one == 0).sum()) for one in tensors) / sum(one.numel() for one in tensors)


class TestAmounts:
    @pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
    @pytest.mark.parametrize("scope", ["global", "layer"])
    @pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
    def test_as_many_zeros_as_asked(self, sparsity: float, scope: str, criterion: str) -> None:
        done = sparse("residual", sparsity=sparsity, scope=scope, criterion=criterion)
        found = masks(done)
        zeros = sum(int((~mask).sum()) for mask in found.values())
        whole = sum(mask.numel() for mask in found.values())
        assert abs(zeros - sparsity * whole) <= (1 if scope == "global" else len(found))
        if scope == "layer":
            for mask in found.values():
                assert int((~mask).sum()) == round(sparsity * mask.numel())

    def test_global_takes_the_smallest_of_all(self) -> None:
        done = sparse("residual", sparsity=0.6)
        weights = {name: folded("residual").parameters[name].detach().abs() for name in masks(done)}
        kept = min(float(weights[name][mask].min()) for name, mask in masks(done).items())
        gone = max(float(weights[name][~mask].max()) for name, mask in masks(done).items() if not mask.all())
        assert kept >= gone

    def test_no_layer_loses_more_than_the_limit(self) -> None:
        done = sparse("residual", sparsity=0.8, limit=0.82)
        shares = [float((~mask).double().mean()) for mask in masks(done).values()]
        assert max(shares) <= 0.82
        assert (
            abs(
                sum(float((~m).sum()) for m in masks(done).values())
                / sum(m.numel() for m in masks(done).values())
                - 0.8
            )
            < 1e-3
        )

    def test_a_threshold(self) -> None:
        done = sparse("residual", threshold=0.08)
        for name, mask in masks(done).items():
            assert torch.equal(mask, folded("residual").parameters[name].detach().abs() >= 0.08)

    @pytest.mark.parametrize("text", ["2:4", "1:4"])
    def test_a_pattern_holds_in_every_row(self, text: str) -> None:
        heard = Heard()
        done = Sparsify(pattern=text).apply(folded("residual"), around("residual", heard))
        pattern = pattern_of(text)
        assert "stem.0.weight" not in done.formats
        assert any("stem.0.weight" in note and "does not divide" in note for note in heard.notes)
        for mask in masks(done).values():
            rows = np.moveaxis(mask.numpy(), 1, -1).reshape(-1, pattern.of)
            assert (rows.sum(1) == pattern.keep).all()

    def test_blocks(self) -> None:
        done = sparse("residual", pattern="4x2", sparsity=0.5)
        for mask in masks(done).values():
            sums, sizes = (block_sums(t, pattern_of("4x2")) for t in (mask.float(), torch.ones(mask.shape)))
            assert ((sums == 0) | (sums == sizes)).all()
        assert share(done) == pytest.approx(0.5, abs=0.01)

    def test_biases_norms_and_embeddings_never(self) -> None:
        done = sparse("attention")
        assert all(folded("attention").parameters[name].dim() == 2 for name in done.formats)
        assert "position" not in done.formats

    def test_recurrent_layers(self) -> None:
        assert {"lstm.weight_ih_l0", "lstm.weight_hh_l1", "head.weight"} <= set(sparse("lstm").formats)

    def test_where_is_obeyed_by_every_reader(self) -> None:
        done = sparse("shared", where={"exclude": ["second"]})
        assert "first.weight" not in done.formats

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sparsity": 0.5, "threshold": 0.1}, "give one of them"),
            ({"pattern": "2:4", "sparsity": 0.7}, "has a sparsity of 0.5"),
            ({"pattern": "2-4"}, "is no pattern"),
            ({"regularisation": "l0", "pattern": "2:4"}, "single weights"),
            ({"sparsity": 1.0}, "less than 1"),
        ],
    )
    def test_what_makes_no_sense(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Sparsify(**settings)

    def test_nothing_to_do(self) -> None:
        with pytest.raises(RecipeError, match="found no weight"):
            sparse("residual", where={"exclude": ["*"]})

    def test_it_says_that_zeros_shrink_nothing(self) -> None:
        heard = Heard()
        Sparsify(sparsity=0.7).apply(folded("residual"), around("residual", heard))
        assert any("70.0% of the weights zero, which shrinks nothing" in note for note in heard.notes)

    def test_ranking_leaves_the_scores_alone(self) -> None:
        scores = {"a": torch.rand(30, 20), "b": 10 * torch.rand(4, 4)}
        before = {name: one.clone() for name, one in scores.items()}
        global_sparsities(scores, 0.5, pattern_of("none"), 0.6)
        assert all(torch.equal(scores[name], before[name]) for name in scores)


class TestSensitivities:
    def test_with_labels_it_is_the_gradient_times_the_weight(self) -> None:
        given = folded("residual")
        x, y = torch.from_numpy(inputs("residual", 8)), torch.arange(8) % 10

        def loss(outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(outputs[0], targets)

        names = prunable(given, lambda path, kind: True)
        found = sensitivities(given, names, [((x,), y)], loss)
        module = given.copy_module()
        loss((module(x),), y).backward()
        for name in names:
            weight = module.get_parameter(name)
            assert weight.grad is not None
            torch.testing.assert_close(
                found[name], (weight * weight.grad).detach().abs(), rtol=1e-3, atol=1e-6
            )

    def test_without_labels_it_foretells_the_change_of_the_outputs(self) -> None:
        given = folded("linear3d")
        x = torch.from_numpy(inputs("linear3d", 16))
        batches = [((x[i : i + 1],), None) for i in range(16)]
        found = sensitivities(given, ["fc1.weight"], batches * 8, None)["fc1.weight"]
        with torch.no_grad():
            y = given.module(x)
            changes = torch.zeros(24, 12)
            for row in range(24):
                for column in range(12):
                    module = given.copy_module()
                    module.get_parameter("fc1.weight")[row, column] *= 0.99
                    changes[row, column] = (module(x) - y).square().sum().sqrt()
        both = torch.stack([found.flatten(), changes.flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9

    def test_gradients_lose_less_than_magnitudes(self) -> None:
        x = torch.from_numpy(inputs("attention", 16, 5))
        seen = {}
        unlabelled = replace(
            around("attention"), data=Data.of(x=inputs("attention", 4), calibration=inputs("attention", 32))
        )
        for criterion in ("magnitude", "gradient"):
            done = Sparsify(sparsity=0.4, criterion=criterion, schedule="none").apply(
                folded("attention"), unlabelled
            )
            with torch.no_grad():
                seen[criterion] = decibels(folded("attention").module(x), simulate(done)(x)[0])
        assert seen["gradient"] > seen["magnitude"]


class TestTraining:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"schedule": "none"},
            {"regrow": False},
            {"criterion": "gradient"},
            {"criterion": "movement"},
            {"pattern": "2:4"},
            {"pattern": "4x1", "sparsity": 0.5},
            {"regularisation": "l0", "penalty": 0.1},
        ],
        ids=str,
    )
    def test_the_sparsity_is_there_after_finetune(self, settings: dict[str, Any]) -> None:
        begun = sparse("residual", **{"sparsity": 0.8 if "pattern" not in settings else None, **settings})
        done = Finetune(steps=12, batch_size=16).apply(begun, around("residual"))
        wanted = 0.5 if "pattern" in settings else 0.8
        assert share(done) == pytest.approx(wanted, abs=0.01)
        for name, chain in done.formats.items():
            (fmt,) = chain
            assert isinstance(fmt, Sparse)
            assert fmt.final
            assert fmt.scores is None
            assert not done.module.get_parameter(name)[~fmt.mask].any()
        moved = [not torch.equal(p, begun.parameters[name]) for name, p in done.parameters.items()]
        assert all(moved)

    def test_a_second_finetune_keeps_the_mask(self) -> None:
        once = Finetune(steps=8, batch_size=16).apply(sparse("residual", sparsity=0.8), around("residual"))
        twice = Finetune(steps=8, batch_size=16).apply(once, around("residual"))
        for name, mask in masks(once).items():
            assert torch.equal(masks(twice)[name], mask)
            assert not twice.module.get_parameter(name)[~mask].any()

    def test_a_penalty_closes_gates(self) -> None:
        shares = []
        for penalty in (1e-3, 50.0):
            begun = sparse("residual", sparsity=0.05, regularisation="l0", penalty=penalty)
            settings = {"steps": 110, "batch_size": 16, "warmup": 0.0, "optimizer": "adamw"}
            shares.append(share(Finetune.model_validate(settings).apply(begun, around("residual"))))
        assert 0.05 <= shares[0] < 0.4
        assert shares[1] > shares[0] + 0.2


class TestChains:
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_integers_come_behind_the_mask_and_keep_the_zeros(self, symmetric: bool) -> None:
        begun = sparse("residual", sparsity=0.8)
        settings = {} if symmetric else {"symmetric_weights": False, "granularity": "per_tensor"}
        done = Quantize.model_validate(settings).apply(begun, around("residual"))
        found = masks(begun)
        assert all(isinstance(done.formats[name][0], Sparse) for name in found)
        grids = [name for name in found if len(done.formats[name]) > 1]
        assert grids
        assert all(isinstance(done.formats[name][1], IntQuant) for name in grids)
        assert share(done) >= 0.8 - 1e-3
        for name, zeros in zeros_of(done).items():
            assert zeros >= float((~found[name]).double().mean())

    def test_rounding_keeps_the_zeros(self) -> None:
        begun = Quantize().apply(sparse("residual", sparsity=0.8), around("residual"))
        done = Rounding(correct_bias=False).apply(begun, around("residual"))
        for name, mask in masks(begun).items():
            assert not with_zeros(done).module.get_parameter(name)[~mask].any()

    def test_gptq_makes_up_for_zeros_and_steps(self) -> None:
        where = replace(around("residual"), target=target("torch"))
        where = replace(
            where, supports=context(folded("residual"), data("residual"), target("torch")).supports
        )
        quantize = Quantize(weights="int4", activations="none")
        begun = quantize.apply(sparse("residual", sparsity=0.6, schedule="none"), where)
        x = torch.from_numpy(inputs("residual", 32, 9))
        seen = {}
        for how in ("nearest", "gptq"):
            done = Rounding.model_validate({"how": how}).apply(begun, where)
            for name, mask in masks(begun).items():
                assert not done.module.get_parameter(name)[~mask].any()
            with torch.no_grad():
                seen[how] = decibels(folded("residual").module(x), simulate(done)(x)[0])
        assert seen["gptq"] > seen["nearest"] + 0.5

    def test_ternary(self) -> None:
        where = replace(around("residual"), target=target("torch"))
        where = replace(
            where, supports=context(folded("residual"), data("residual"), target("torch")).supports
        )
        done = Quantize(weights="ternary", activations="none").apply(sparse("residual", sparsity=0.8), where)
        assert any(isinstance(chain[-1], Ternary) for chain in done.formats.values())
        assert share(done) >= 0.8 - 1e-3

    def test_binary_weights_have_no_zero(self) -> None:
        where = replace(around("residual"), target=target("torch"))
        where = replace(
            where, supports=context(folded("residual"), data("residual"), target("torch")).supports
        )
        begun = sparse("residual", sparsity=0.8)
        with pytest.raises(RecipeError, match="binary weights have no zero"):
            Quantize(weights="binary", activations="none").apply(begun, where)

    def test_half_precision(self) -> None:
        where = context(folded("residual"), data("residual"), target("openvino"))
        done = Cast().apply(sparse("residual", sparsity=0.8), where)
        assert all(isinstance(chain[-1], FloatCast) for chain in done.formats.values())
        assert share(done) >= 0.8 - 1e-3

    def test_it_leaves_what_has_formats_already(self) -> None:
        begun = Quantize(where={"include": ["layer1"]}).apply(folded("residual"), around("residual"))
        done = Sparsify().apply(begun, around("residual"))
        assert done.formats["layer1.conv1.weight"] == begun.formats["layer1.conv1.weight"]
        assert isinstance(done.formats["layer2.conv1.weight"][0], Sparse)


class TestRun:
    def test_what_trained_the_sparse_network_is_what_later_steps_hold_to(self, tmp_path: Path) -> None:
        recipe = Recipe.parse(
            """
version: 1
steps:
  - fold: {}
  - sparsify: {sparsity: 0.8}
  - finetune: {steps: 12, batch_size: 16, learning_rate: 0.01, optimizer: adamw}
  - quantize: {}
  - rounding: {correct_bias: false}
"""
        )
        run = Run(model("residual"), data("residual"), target(), Store(tmp_path))
        reached = [model("residual")]
        for number, method in enumerate(recipe.methods(), 1):
            reached.append(run.step(reached[-1], method, number))
        _, plain, _, trained, _, rounded = reached
        behind = run.context(rounded).models["float"]
        assert not behind.formats
        for name, mask in masks(trained).items():
            held = trained.parameters[name].detach()
            assert torch.equal(behind.parameters[name], held)
            assert not rounded.parameters[name][~mask].any()
            left = rounded.parameters[name].detach()
            assert (left - held).norm() < 0.2 * (plain.parameters[name].detach() * mask - held).norm()
        again = Run(model("residual"), data("residual"), target(), Store(tmp_path))
        assert torch.equal(again.apply(recipe).parameters["head.weight"], rounded.parameters["head.weight"])


class TestRuntimes:
    @pytest.mark.parametrize("runtime", runtime_names())
    @pytest.mark.parametrize("integers", [False, True])
    def test_zeros_are_in_what_runs(self, runtime: str, integers: bool, tmp_path: Path) -> None:
        engine = find_runtime(runtime)
        if not engine.installed():
            pytest.skip(f"runtime '{runtime}' is not installed")
        where = target(runtime)
        asked = replace(context(folded("residual"), data("residual"), where), progress=Heard())
        done = Sparsify(sparsity=0.7).apply(folded("residual"), asked)
        if integers:
            try:
                done = Quantize().apply(done, asked)
            except RecipeError:  # this runtime has no static integers
                return
        artifact = engine.lower(done, where, tmp_path)
        if engine.unmeasured:
            with pytest.raises(TargetError, match="not measured"):
                engine.open(artifact, where)
            return
        x = inputs("residual", 4)
        (y,) = engine.open(artifact, where)(x)
        with torch.no_grad():
            (wanted,) = simulate(done)(torch.from_numpy(x))
            dense = folded("residual").module(torch.from_numpy(x))
        assert decibels(wanted, y) > (25 if integers else 60)
        assert decibels(dense, y) < 25

    def test_what_is_stored_has_no_masks_left(self) -> None:
        done = Quantize().apply(sparse("residual", sparsity=0.8), around("residual"))
        stored = with_zeros(done)
        assert not any(isinstance(fmt, Sparse) for chain in stored.formats.values() for fmt in chain)
        assert stored.key == done.key
        x = torch.from_numpy(inputs("residual", 4))
        with torch.no_grad():
            assert torch.equal(simulate(stored)(x)[0], simulate(done)(x)[0])
        assert with_zeros(model("residual")) is model("residual")
