"""Distillation: losses against their formulas, pairs that fit, and students that learn without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.engine.scratch import MappedScratch
from featherweight.errors import RecipeError
from featherweight.method import Context
from featherweight.model import Model
from featherweight.tools.distill_heads import Read, attention_reads, relations
from featherweight.tools.distill_losses import (
    OutputKind,
    attention_loss,
    feature_loss,
    output_kinds,
    output_loss,
    relation_loss,
    soft_target_loss,
)
from featherweight.tools.distill_pairs import layers_seen, paired
from featherweight.tools.distill_teacher import Teacher
from featherweight.tools.distillation import Distillation, Distilling, distilled
from featherweight.tools.objectives import Objective, TaskLoss, UserStep
from featherweight.tools.simulated import Simulated
from golden import context, data, folded, inputs, model, model_of, quantized
from language_nets import encoder


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def number(loss: Tensor) -> float:
    return float(loss.detach())


class Net(nn.Module):
    """A small student: a convolution, pooling, a head."""

    def __init__(self, width: int = 6, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.stem(x)).mean((2, 3)))


def student(seed: int = 0, **sizes: int) -> Model:
    torch.manual_seed(seed)
    net = Net(**sizes)
    example = torch.from_numpy(inputs("residual", 2))[:, : sizes.get("channels", 3)]
    return model_of(net, example)


def around(begun: Model, net: str = "residual", **changes: Any) -> Context:
    models = {"original": model(net), **changes.pop("models", {})}
    return replace(context(begun, data(net)), models=models, **changes)


def objective(begun: Model, task: Objective | None = None, cache: bool = False, **how: Any) -> Distillation:
    made = distilled(task, Distilling(**{"teacher": "original", **how}), begun, around(begun), cache=cache)
    assert isinstance(made, Distillation)
    return made


def batch(count: int = 8, seed: int = 5) -> tuple[Tensor, ...]:
    return (torch.from_numpy(inputs("residual", count, seed)),)


def trained(
    begun: Model, loss: Objective, examples: Tensor, steps: int = 60, rate: float = 0.01
) -> Simulated:
    """A few epochs of Adam, with anyone's loop."""
    net = Simulated(begun)
    loss.attach(net)
    adam = torch.optim.Adam([*net.parameters(), *loss.parameters()], rate)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = examples[torch.randperm(len(examples), generator=order)[:16]]
        adam.zero_grad()
        loss.step(net, (x,), None).backward()
        adam.step()
    return net.eval()


class TestSoftTargets:
    @pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
    def test_the_gradient_is_that_of_the_paper(self, temperature: float) -> None:
        """dL/ds = T (softmax(s / T) - softmax(t / T)) / N."""
        ours, theirs = randn(5, 7).double().requires_grad_(), randn(5, 7, seed=1).double()
        soft_target_loss(ours, theirs, temperature).backward()
        apart = F.softmax(ours.detach() / temperature, 1) - F.softmax(theirs / temperature, 1)
        assert ours.grad is not None
        assert torch.allclose(ours.grad, temperature * apart / 5)

    def test_is_the_divergence(self) -> None:
        ours, theirs = randn(4, 5), randn(4, 5, seed=1)
        p, q = F.softmax(theirs / 2, 1), F.softmax(ours / 2, 1)
        assert torch.allclose(soft_target_loss(ours, theirs, 2.0), 4 * (p * (p / q).log()).sum(1).mean())

    def test_temperature_squared_keeps_the_size_of_gradients(self) -> None:
        sizes = []
        for temperature in (50.0, 100.0):  # so high that the loss is the squared error of centred logits
            ours = randn(8, 6).requires_grad_()
            soft_target_loss(ours, randn(8, 6, seed=1), temperature).backward()
            assert ours.grad is not None
            sizes.append(float(ours.grad.norm()))
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)

    def test_of_equal_networks_is_zero(self) -> None:
        logits = randn(4, 5)
        assert float(soft_target_loss(logits, logits, 4.0)) == pytest.approx(0, abs=1e-6)

    def test_classes_may_be_on_any_axis_and_some_masked(self) -> None:
        ours, theirs = randn(2, 5, 3), randn(2, 5, 3, seed=1)
        theirs[:, 0] = -math.inf
        ours.requires_grad_()
        loss = soft_target_loss(ours, theirs, 2.0, axis=1)
        turned = soft_target_loss(ours.movedim(1, -1), theirs.movedim(1, -1), 2.0, axis=-1)
        assert torch.allclose(loss, turned)
        loss.backward()
        assert ours.grad is not None
        assert ours.grad.isfinite().all()

    def test_ignored_positions_teach_nothing(self) -> None:
        ours, theirs = randn(2, 3, 5), randn(2, 3, 5, seed=1)
        targets = torch.tensor([[1, 2, -100], [0, -100, -100]])
        kind = OutputKind("logits", -1)
        whole = output_loss(ours, theirs, kind, 2.0, targets)
        counted = targets != -100
        assert torch.allclose(whole, soft_target_loss(ours[counted], theirs[counted], 2.0, -1))
        changed = torch.where(counted[..., None], ours, 9.0)
        assert torch.allclose(whole, output_loss(changed, theirs, kind, 2.0, targets))


class TestOutputs:
    def test_are_known_by_the_metric_and_by_their_values(self) -> None:
        vectors = F.normalize(randn(4, 8), dim=1)
        shares = F.softmax(randn(4, 8), 1)
        labels = np.zeros(4, np.int64)
        classes = Data.of(np.zeros((4, 3), np.float32), labels)
        values = Data.of(np.zeros((4, 3), np.float32), labels.astype(np.float32))
        words = Data.of(np.zeros((4, 3), np.float32), np.zeros((4, 6), np.int64), metric="perplexity")
        for output, known, kind in (
            (randn(4, 8), classes, OutputKind("logits", 1)),
            (randn(4, 8), values, OutputKind("values")),
            (shares, classes, OutputKind("probabilities", 1)),
            (randn(4, 6, 9), words, OutputKind("logits", -1)),
            (vectors, values, OutputKind("unit", -1)),
            (randn(4, 1), Data(), OutputKind("values")),
            (randn(4, 5), Data(), OutputKind("logits", 1)),
            (torch.ones(4, 5, dtype=torch.int64), classes, OutputKind("none")),
        ):
            assert output_kinds([output], known) == (kind,)
        assert output_kinds([randn(4, 8), randn(4, 8)], classes)[1] == OutputKind("values")

    def test_probabilities_are_taken_back_to_logits(self) -> None:
        ours, theirs = randn(4, 5), randn(4, 5, seed=1)
        shares = [F.softmax(one, 1) for one in (ours, theirs)]
        loss = output_loss(*shares, OutputKind("probabilities"), 3.0)
        assert torch.allclose(loss, soft_target_loss(ours, theirs, 3.0), atol=1e-5)

    def test_unit_vectors_are_compared_by_their_angle_and_values_by_their_error(self) -> None:
        ours, theirs = F.normalize(randn(4, 8), dim=1), F.normalize(randn(4, 8, seed=1), dim=1)
        cosine = output_loss(ours, theirs, OutputKind("unit"), 1.0)
        assert torch.allclose(cosine, (1 - (ours * theirs).sum(1)).mean())
        assert torch.allclose(output_loss(ours, theirs, OutputKind("values"), 1.0), F.mse_loss(ours, theirs))


class TestFeatureLosses:
    def test_features_are_told_in_variances_of_the_teacher(self) -> None:
        theirs = randn(6, 4, 4, 3) * 7 + 2
        assert float(feature_loss(theirs, theirs)) == 0
        mean = theirs.flatten(0, -2).mean(0).expand_as(theirs)
        assert float(feature_loss(mean, theirs)) == pytest.approx(1)
        assert torch.allclose(feature_loss(2 * mean, 2 * theirs), feature_loss(mean, theirs))

    def test_attention_is_where_the_energy_is(self) -> None:
        theirs = randn(3, 4, 4, 8)
        turned = theirs @ torch.linalg.qr(randn(8, 8))[0]  # a rotation of channels keeps energies
        assert float(attention_loss(turned * 5, theirs)) == pytest.approx(0, abs=1e-6)
        one, other = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 5)
        one[0, 0, 0], other[0, 1, 1] = 1, 1
        assert float(attention_loss(one, other)) == pytest.approx(2)

    def test_relations_do_not_ask_for_equal_widths(self) -> None:
        tokens = randn(2, 5, 8)
        assert float(relation_loss(tokens, tokens, 4)) == pytest.approx(0, abs=1e-6)
        assert float(relation_loss(tokens, randn(2, 5, 32, seed=3), 4)) > 0.1


class TestPairs:
    def find(self, mine: Model, theirs: Model, names: Any = "auto") -> dict[str, str]:
        x = mine.entries["forward"].example_inputs
        pairs = paired(names, layers_seen(mine, x), layers_seen(theirs, x), "features")
        return {pair.student.layer: pair.teacher.layer for pair in pairs}

    def test_ends_of_stages_are_paired_by_resolution(self) -> None:
        assert self.find(student(), model("residual")) == {"stem": "layer1", "down": "layer2"}

    def test_a_network_of_the_same_names_is_paired_by_name(self) -> None:
        for same in (folded("residual"), quantized("residual")):
            found = self.find(same, model("residual"))
            assert found == {name: name for name in found}
            assert "layer2" in found

    def test_a_network_without_two_resolutions_is_paired_by_depth(self) -> None:
        def deep(blocks: int, width: int) -> Model:
            layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(blocks)]
            return model_of(nn.Sequential(nn.Linear(8, width), *layers, nn.Linear(width, 4)), randn(2, 5, 8))

        pairs = self.find(deep(2, 6), deep(5, 12))
        assert list(pairs)[-1] == "2"
        assert pairs["2"] == "5"
        assert [int(name) for name in pairs.values()] == sorted(int(name) for name in pairs.values())

    def test_layers_of_tokens_and_of_maps_have_their_channels_where_they_are(self) -> None:
        seen = layers_seen(model("residual"), model("residual").entries["forward"].example_inputs)
        assert (seen["layer2.bn2"].axis, seen["layer2.bn2"].width) == (1, 16)
        tokens = layers_seen(model("attention"), model("attention").entries["forward"].example_inputs)
        assert {one.axis for one in tokens.values() if len(one.shape) == 3} == {2}

    @pytest.mark.parametrize(
        ("names", "says"),
        [
            ({"stemm": "layer1"}, "'stemm', which is no layer of the student"),
            ({"stem": "layer9"}, "'layer9', which is no layer of the teacher"),
            ({"stem": "pool.2"}, "no layer of the teacher"),
            ({"stem": "head"}, "'head'"),
        ],
    )
    def test_names_that_are_none_are_told(self, names: Mapping[str, str], says: str) -> None:
        with pytest.raises(RecipeError, match="features") as error:
            self.find(student(), model("residual"), names)
        assert says in error.value.what
        assert error.value.fix

    def test_layers_of_other_positions_are_told(self) -> None:
        tokens = model_of(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), randn(2, 5, 8))
        longer = model_of(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), randn(2, 7, 8))
        with pytest.raises(RecipeError, match="differ in channels only"):
            paired(
                {"0": "0"},
                layers_seen(tokens, tokens.entries["forward"].example_inputs),
                layers_seen(longer, longer.entries["forward"].example_inputs),
                "features",
            )

    def test_nothing_in_common_is_told(self) -> None:
        flat = model_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), randn(2, 3, 8, 8))
        x = flat.entries["forward"].example_inputs
        with pytest.raises(RecipeError, match="finds no layers"):
            paired("auto", {}, layers_seen(flat, x), "attention")


class TestAttentions:
    def test_of_golden_nets_are_found(self) -> None:
        fused = attention_reads(model("attention"))
        assert fused == (tuple(Read("qkv", part, 32, 4) for part in range(3)),)
        separate = attention_reads(encoder())
        assert separate == (tuple(Read(name, None, 48, 2) for name in "qkv"),)

    def test_of_code_without_fused_attention_are_found(self) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = (nn.Linear(8, width) for width in (12, 12, 12))

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = (one(x).unflatten(-1, (3, 4)).transpose(1, 2) for one in (self.q, self.k, self.v))
                return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)

        plain = attention_reads(model_of(Plain(), randn(2, 5, 8)))
        assert plain == (tuple(Read(name, None, 12, 3) for name in "qkv"),)
        assert attention_reads(model("squeeze_excite")) == ()

    def test_are_paired_by_depth_and_split_alike(self) -> None:
        def deep(count: int, width: int, heads: int) -> tuple[tuple[Read, ...], ...]:
            return tuple((Read(str(place), None, width, heads),) for place in range(count))

        found = relations(deep(2, 24, 2), deep(6, 48, 4))
        assert [(one.student.layer, one.teacher.layer, one.heads) for one in found] == [
            ("0", "2", 4),
            ("1", "5", 4),
        ]
        (odd,) = relations(deep(1, 18, 6), deep(1, 48, 4))
        assert odd.heads == 2


class TestTeacher:
    def test_is_in_inference_mode_and_stays_as_it_was(self) -> None:
        module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten())
        master = model_of(module, randn(2, 3, 4, 4))
        module.train()
        module[1].eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        (first,), _ = Teacher(master)((randn(4, 3, 4, 4),))
        (second,), _ = Teacher(master)((randn(4, 3, 4, 4),))
        assert torch.equal(first, second)
        assert not first.requires_grad
        assert [layer.training for layer in module.modules()] == [True, True, False, True, True]
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_remembers_what_it_said(self) -> None:
        (x,) = batch(12)
        plain, kept = (
            Teacher(model("residual"), ["layer1"]),
            Teacher(model("residual"), ["layer1"], keep=True),
        )
        order = np.random.default_rng(0)
        for _ in range(6):
            pick = torch.from_numpy(order.permutation(12)[:5])
            (wanted,), layers = plain((x[pick],))
            (said,), seen = kept((x[pick],))
            assert torch.allclose(said, wanted, atol=1e-5)
            assert torch.allclose(seen["layer1"], layers["layer1"], atol=1e-5)
        plain((x[pick],))
        assert plain.asked == 35
        assert kept.asked <= 12
        changed = x.clone()
        changed[0, 0, 0, 0] += 1
        (said,), _ = kept((changed,))
        (wanted,), _ = plain((changed,))
        assert torch.allclose(said, wanted, atol=1e-5)

    def test_files_hold_what_it_says_in_mixed_precision(self, tmp_path: Path) -> None:
        (x,) = batch(8)
        kept = Teacher(model("residual"), keep=True, room=MappedScratch(tmp_path))
        with torch.autocast("cpu", torch.bfloat16):
            (first,), _ = kept((x,))
            (again,), _ = kept((x.flip(0),))
            kept((x.bfloat16(),))  # other inputs, which numpy has no type for
        assert kept.asked == 16
        assert first.dtype == again.dtype == torch.float32
        assert torch.equal(again.flip(0), first)

    def test_is_asked_once_about_one_batch(self) -> None:
        master, (x,) = Teacher(model("residual")), batch()
        first, again = master((x,))[0][0], master((x,))[0][0]
        assert master.asked == len(x)
        assert torch.equal(first, again)
        master((x.clone(),))
        assert master.asked == 2 * len(x)

    def test_asks_again_where_there_is_no_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featherweight.tools.distill_teacher._LARGEST", 4 * 10 * 4)
        (x,) = batch(8)
        kept = Teacher(model("residual"), keep=True)
        kept((x[:4],))
        kept((x[4:],))
        (said,), _ = kept((x,))
        assert kept.asked == 12
        (wanted,), _ = Teacher(model("residual"))((x,))
        assert torch.allclose(said, wanted, atol=1e-5)

    def test_keeps_large_answers_where_the_context_has_room(self) -> None:
        moved: list[int] = []

        def room(tensor: Tensor) -> Tensor:
            moved.append(tensor.nbytes)
            return tensor.clone()

        begun = student()
        made = distilled(
            None,
            Distilling(teacher="original", features="auto"),
            begun,
            around(begun, scratch=room),
            cache=True,
        )
        assert made is not None
        net = Simulated(begun)
        made.attach(net)
        made.step(net, batch(), None)
        assert len(moved) == 3  # outputs and two layers


class TestDistillation:
    def test_of_the_teacher_itself_is_zero(self) -> None:
        same = model("residual")
        loss = objective(same, features="auto", attention="auto", temperature=7)
        net = Simulated(same).eval()
        loss.attach(net)
        with torch.no_grad():
            assert number(loss.step(net, batch(), None)) == pytest.approx(0, abs=1e-5)
        assert list(loss.parameters()) == []  # equal widths need no projection

    def test_labels_have_the_rest_of_alpha(self) -> None:
        begun, targets = student(), torch.arange(8) % 10
        net = Simulated(begun).eval()
        losses = {}
        for alpha in (0.0, 0.25, 1.0):
            loss = objective(begun, TaskLoss(highest=9), alpha=alpha)
            loss.attach(net)
            losses[alpha] = number(loss.step(net, batch(), targets))
        assert losses[0.0] == pytest.approx(number(F.cross_entropy(net(*batch())[0], targets)), rel=1e-5)
        assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)
        assert number(objective(begun, TaskLoss(), alpha=0.25).step(net, batch(), None)) == pytest.approx(
            losses[1.0], rel=1e-5
        )

    def test_a_users_step_keeps_its_own_call(self) -> None:
        begun, targets = student(), torch.arange(8) % 10

        def step(module: Any, given: Any) -> Tensor:
            return F.cross_entropy(module(given[0] * 2), given[1])

        net = Simulated(begun).eval()
        made = objective(begun, UserStep(step), alpha=0.0)
        made.attach(net)
        assert number(made.step(net, batch(), targets)) == pytest.approx(
            number(F.cross_entropy(net(batch()[0] * 2)[0], targets)), rel=1e-5
        )

    def test_other_widths_are_projected_and_the_projections_trained(self) -> None:
        begun = student()
        loss = objective(begun, features="auto", feature_weight=2.0)
        assert [tuple(one.shape) for one in loss.parameters()] == [(8, 6), (8,), (16, 6), (16,)]
        again = objective(begun, features="auto")
        torch.manual_seed(99)  # its own seed counts
        for one, other in zip(loss.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)
        net = Simulated(begun)
        loss.attach(net)
        loss.step(net, batch(), None).backward()
        assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in loss.parameters())
        assert net.module.get_submodule("stem.0").weight.grad is not None

    def test_named_maps_of_two_sizes_are_averaged_to_the_smaller(self) -> None:
        begun = student()
        loss = objective(begun, features={"stem": "layer2"}, attention={"stem": "layer2"})
        net = Simulated(begun)
        loss.attach(net)
        assert loss.step(net, batch(), None).isfinite()

    def test_tokens_are_compared_by_their_relations(self) -> None:
        master = model("attention")
        x = master.entries["forward"].example_inputs
        small = master.evolve(module=master.copy_module())
        loss = distilled(
            None, Distilling(teacher="original", attention="auto"), small, around(small, "attention")
        )
        assert isinstance(loss, Distillation)
        assert [one.student.layer for one in loss.links.reads] == ["qkv"] * 3
        net = Simulated(small).eval()
        loss.attach(net)
        assert number(loss.step(net, x, None)) == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.3)
        assert number(loss.step(net, x, None)) > 1e-3

    def test_half_floats_are_compared_as_single_ones(self) -> None:
        begun = student()
        losses = []
        for enabled in (False, True):
            loss, net = objective(begun, features="auto", attention="auto"), Simulated(begun).eval()
            loss.attach(net)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(loss.step(net, batch(), None))
        assert losses[1].dtype == torch.float32
        assert number(losses[1]) == pytest.approx(number(losses[0]), rel=0.05)

    def test_the_teacher_is_neither_trained_nor_stored(self) -> None:
        loss = objective(student())
        assert list(loss.parameters()) == []
        assert loss.state_dict() == {}

    @pytest.mark.parametrize("cache", [False, True])
    def test_a_student_learns_without_labels(self, cache: bool) -> None:
        begun, examples = student(), torch.from_numpy(inputs("residual", 128, 3))
        fresh = torch.from_numpy(inputs("residual", 128, 4))
        wanted = model("residual").module(fresh)
        (before,) = Simulated(begun).eval()(fresh)
        loss = objective(begun, cache=cache, temperature=2.0)
        (after,) = trained(begun, loss, examples)(fresh)
        apart = [number(soft_target_loss(one, wanted, 2.0)) for one in (before, after)]
        assert apart[1] < 0.5 * apart[0]
        assert loss.teacher.asked <= 128 if cache else loss.teacher.asked == 60 * 16

    def test_what_is_kept_trains_as_what_is_asked(self) -> None:
        begun, examples = student(), torch.from_numpy(inputs("residual", 64, 3))
        fresh = torch.from_numpy(inputs("residual", 32, 4))
        plain, kept = (
            trained(begun, objective(begun, cache=cache, features="auto"), examples, 20)
            for cache in (False, True)
        )
        assert torch.allclose(plain(fresh)[0], kept(fresh)[0], atol=1e-3)

    def test_a_quantized_student_learns_from_its_float_self(self) -> None:
        begun = quantized("residual")
        ctx = around(begun, models={"float": folded("residual")})
        loss = distilled(None, Distilling(teacher="float", features="auto"), begun, ctx)
        assert loss is not None
        net = Simulated(begun)
        loss.attach(net)
        value = loss.step(net, batch(), None)
        value.backward()
        assert 0 < number(value) < 1
        assert any(one.grad is not None for one in net.parameters())


class TestBadTeachers:
    def refused(self, master: Model, begun: Model | None = None) -> RecipeError:
        begun = begun or student()
        with pytest.raises(RecipeError) as error:
            distilled(None, Distilling(teacher="teacher"), begun, around(begun, models={"teacher": master}))
        assert error.value.fix
        return error.value

    def test_none_is_told(self) -> None:
        begun = student()
        with pytest.raises(RecipeError, match="there is none") as error:
            distilled(None, Distilling(teacher="teacher"), begun, around(begun))
        assert "--teacher" in str(error.value.fix)

    def test_without_a_teacher_the_task_stays_alone(self) -> None:
        task = TaskLoss()
        assert distilled(task, Distilling(), student(), around(student())) is task

    def test_other_classes_are_told(self) -> None:
        error = self.refused(student(classes=7))
        assert "float32 (3, 7)" in error.what
        assert "float32 (3, 10)" in error.what

    def test_more_outputs_are_told(self) -> None:
        class Two(Net):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                return y, y  # type: ignore[return-value]

        error = self.refused(model_of(Two(), torch.from_numpy(inputs("residual", 2)), outputs=2))
        assert "gives float32 (3, 10) and float32 (3, 10)" in error.what

    def test_other_inputs_are_told(self) -> None:
        error = self.refused(student(channels=1))
        assert "does not take the inputs of the student, float32 (3, 3, 16, 16)" in error.what

    def test_another_number_of_inputs_is_told(self) -> None:
        class Pair(nn.Module):
            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return a + b

        error = self.refused(model_of(Pair(), randn(2, 4), randn(2, 4)))
        assert "takes" in error.what

    def test_nan_is_told(self) -> None:
        broken = student()
        with torch.no_grad():
            broken.module.get_submodule("head").bias.fill_(math.nan)  # type: ignore[operator]
        assert "NaN" in self.refused(broken).what
