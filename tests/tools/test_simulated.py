"""Simulated: trains as the module, behaves as the artifact, and is read back to the last bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

import featherweight as fw
from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.formats import (
    Binary,
    Dynamic,
    FloatCast,
    IntQuant,
    Palette,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorFormat,
    Ternary,
)
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.tools.ranges import weight_format
from featherweight.tools.sim_learned import Learned
from featherweight.tools.simulate import simulate
from featherweight.tools.simulated import Simulated
from golden import context, folded, inputs, model, model_of, quantized, target
from language_nets import encoder, ids, recurrent, sequences
from nets import NETS
from rounded import in_few_bits

FORMATS: dict[str, TensorFormat] = {
    "int4 per channel": IntQuant(-torch.ones(1), torch.ones(1), 4, True, PerChannel(), True),
    "int4 per tensor": IntQuant(-torch.tensor(1.0), torch.tensor(1.0), 4, True, PerTensor(), True),
    "int4 in groups": IntQuant(-torch.ones(1, 1), torch.ones(1, 1), 4, True, PerGroup(1, 8), True),
    "int8 asymmetric": IntQuant(-torch.ones(1), torch.ones(1), 8, False, PerChannel()),
    "ternary": Ternary(torch.ones(1), torch.ones(1) / 2),
    "binary": Binary(torch.ones(1)),
    "palette": Palette(torch.tensor([-0.4, -0.1, 0.1, 0.3]), zero=True),
    "float16": FloatCast("float16"),
    "bfloat16": FloatCast("bfloat16"),
}


def batch(net: str, count: int = 16) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(inputs(net, count)), torch.arange(count) % 10


def stored_as(net: str, kind: str, activations: bool = False) -> Model:
    """A golden net whose weight matrices and kernels have one format."""
    whole = quantized(net) if activations else folded(net)
    draft = FORMATS[kind]
    formats = {name: chain for name, chain in whole.formats.items() if name not in whole.parameters}
    for name, parameter in whole.parameters.items():
        if parameter.dim() > 1 and "position" not in name:
            made = (
                draft
                if isinstance(draft, FloatCast)
                else weight_format(parameter.detach(), draft, "mse", 99.9)
            )
            formats[name] = (made,)
    return whole.evolve(formats=formats)


def train(net: nn.Module, name: str, steps: int, rate: float = 3e-3) -> list[float]:
    """Losses of a plain loop on one batch."""
    x, y = batch(name)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    losses = []
    net.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            loss = F.cross_entropy(net(x)[0], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@dataclass(frozen=True, eq=False)
class Falling:
    """A format with a schedule: a mask that keeps fewer of the first rows' elements as training advances."""

    mask: Tensor
    fraction: float = 0.0
    width: int = 32

    def project(self, x: Tensor) -> Tensor:
        return x * self.mask

    def advanced(self, value: Tensor, fraction: float) -> Falling:
        kept = round(value.numel() * (1 - fraction))
        mask = torch.arange(value.numel()) < kept
        return Falling(mask.reshape(value.shape).float(), fraction)

    def bits(self, elements: int) -> float:
        return 32.0

    def stored_bytes(self, elements: int) -> int:
        return 4 * elements

    def learned(self) -> dict[str, Tensor]:
        return {}

    def with_learned(self, values: Mapping[str, Tensor]) -> Falling:
        return self


MODELS: dict[str, Callable[[str], Model]] = {
    "float": model,
    "int8": quantized,
    "W4A4": lambda name: quantized(name) if name == "lstm" else in_few_bits(name, 4, 4),
}


class TestInference:
    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("name", NETS)
    def test_is_the_simulation_bit_by_bit(self, name: str, kind: str) -> None:
        subject = MODELS[kind](name)
        x, _ = batch(name, 5)
        with torch.no_grad():
            (made,) = Simulated(subject).eval()(x)
            (wanted,) = simulate(subject)(x)
        assert torch.equal(made, wanted)

    @pytest.mark.parametrize("activations", [False, True])
    @pytest.mark.parametrize("kind", FORMATS)
    def test_every_weight_format_is_simulated_and_trained(self, kind: str, activations: bool) -> None:
        subject = stored_as("residual", kind, activations)
        net = Simulated(subject).eval()
        x, _ = batch("residual", 5)
        with torch.no_grad():
            assert torch.equal(net(x)[0], simulate(subject)(x)[0])
        before = state(subject)
        losses = train(net, "residual", 25)
        assert min(losses[-5:]) < 0.97 * losses[0]
        back = net.eval().absorb()
        with torch.no_grad():
            assert torch.equal(net(x)[0], simulate(back)(x)[0])
        assert all(torch.equal(before[name], tensor) for name, tensor in subject.module.state_dict().items())

    def test_dynamic_ranges_and_readers_are_simulated(self) -> None:
        whole = quantized("linear3d")
        dynamic = {
            "input:x": (Dynamic(8, readers=frozenset({"linear"})),),
            "act#0:0": (Dynamic(8, per="token"),),
        }
        weights = {name: chain for name, chain in whole.formats.items() if name in whole.parameters}
        subject = whole.evolve(formats={**weights, **dynamic})
        x, _ = batch("linear3d", 5)
        with torch.no_grad():
            assert torch.equal(Simulated(subject).eval()(x)[0], simulate(subject)(x)[0])
        losses = train(Simulated(subject), "linear3d", 15)
        assert losses[-1] < losses[0]

    def test_integers_at_some_readers_alone_learn_their_range(self) -> None:
        whole = quantized("residual")
        name = next(name for name in whole.formats if name not in whole.parameters)
        (fmt,) = whole.formats[name]
        assert isinstance(fmt, IntQuant)
        formats = {**whole.formats, name: (replace(fmt, width=4, readers=frozenset({"conv2d"})),)}
        subject = whole.evolve(formats=formats)
        net, (x, _) = Simulated(subject).eval(), batch("residual", 5)
        with torch.no_grad():
            assert torch.equal(net(x)[0], simulate(subject)(x)[0])
        train(net, "residual", 3)
        assert net.absorb().formats[name][0].readers == {"conv2d"}  # type: ignore[attr-defined]
        with torch.no_grad():
            assert torch.equal(net.eval()(x)[0], simulate(net.absorb())(x)[0])


class TestTraining:
    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("name", NETS)
    def test_every_net_learns_and_comes_back(self, name: str, kind: str) -> None:
        subject = MODELS[kind](name)
        net = Simulated(subject)
        losses = train(net, name, 12)
        assert losses[-1] < losses[0]
        assert all(one.grad is not None for one in net.parameters())
        x, _ = batch(name, 5)
        back = net.eval().absorb()
        with torch.no_grad():
            assert torch.equal(net(x)[0], simulate(back)(x)[0])
        stored = {name: value for name, value in back.parameters.items() if name in back.formats}
        for name, value in stored.items():  # on the grid: projecting once more changes nothing
            for fmt in back.formats[name]:
                value = fmt.project(value)
            assert torch.equal(value, stored[name])

    @pytest.mark.parametrize("kind", ["W4A4", "ternary", "binary"])
    def test_few_bits_learn(self, kind: str) -> None:
        subject = in_few_bits("residual", 4, 4) if kind == "W4A4" else stored_as("residual", kind, True)
        losses = train(Simulated(subject), "residual", 100, 1e-2)
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("kind", ["float", "folded values"])
    def test_batch_norm_and_dropout_are_live(self, kind: str) -> None:
        """Of the eager module, and of the replayed graph the same: values, statistics and gradients."""
        subject = model("depthwise")
        if kind != "float":  # a value that is stored so finely that it does not change
            seen = {"input:x": (IntQuant(torch.tensor(-8.0), torch.tensor(8.0), 16),)}
            subject = subject.evolve(formats=seen)
        net, (x, _) = Simulated(subject), batch("depthwise")
        x = x.clamp(-7, 7)
        x = x if kind == "float" else subject.formats["input:x"][0].project(x)
        module = subject.copy_module().train()
        made = []
        for call in (lambda: net(x)[0], lambda: module(x)):
            torch.manual_seed(3)
            out = call()
            out.square().sum().backward()
            made.append(out.detach())
        assert torch.allclose(made[0], made[1], atol=1e-5)
        for one, other in zip(net.module.buffers(), module.buffers(), strict=True):
            assert torch.allclose(one.float(), other.float(), atol=1e-5)
        for one, other in zip(net.module.parameters(), module.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.allclose(one.grad, other.grad, atol=1e-3)
        torch.manual_seed(1)
        first = net(x)[0]
        torch.manual_seed(2)
        assert (first - net(x)[0]).abs().max() > 1e-3  # other units were dropped

    @pytest.mark.parametrize("kind", ["lstm", "gru", "attention"])
    def test_dropout_inside_of_layers_is_live(self, kind: str) -> None:
        """In the replayed graph as in the eager module, which draws the same numbers."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner: nn.Module
                if kind == "attention":
                    self.inner = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
                else:
                    recurrent = nn.LSTM if kind == "lstm" else nn.GRU
                    self.inner = recurrent(8, 8, num_layers=2, batch_first=True, dropout=0.5)

            def forward(self, x: Tensor) -> Tensor:
                if kind == "attention":
                    return self.inner(x, x, x, need_weights=False)[0]
                return self.inner(x)[0]

        torch.manual_seed(0)
        subject = model_of(Net(), torch.randn(2, 5, 8))
        fine = IntQuant(torch.tensor(-8.0), torch.tensor(8.0), 16)
        net = Simulated(subject.evolve(formats={"input:x": (fine,)}))
        x = fine.project(torch.randn(3, 5, 8))
        module = subject.copy_module()
        for training in (True, False):
            net.train(training)
            module.train(training)
            torch.manual_seed(1)
            (made,) = net(x)
            torch.manual_seed(1)
            wanted = module(x)
            assert torch.allclose(made, wanted, atol=1e-5)
            torch.manual_seed(2)
            assert torch.allclose(net(x)[0], made, atol=1e-5) != training

    def test_a_frozen_batch_norm_stays(self) -> None:
        net = Simulated(MODELS["int8"]("concat"))
        norm = net.module.get_submodule("norms.0").eval()
        before = copy.deepcopy(norm.state_dict())
        other = net.module.get_submodule("norms.1").running_mean.clone()  # type: ignore[operator, union-attr]
        net(batch("concat")[0])
        assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
        assert not torch.equal(other, net.module.get_submodule("norms.1").running_mean)  # type: ignore[arg-type]

    def test_plain_gradient_descent_moves_steps_as_lsq_says(self) -> None:
        """Oracle: s - lr * g * dL/ds with g = 1 / sqrt(N * Qp), by hand."""
        fmt = IntQuant(-torch.tensor([0.7, 0.3]), torch.tensor([0.7, 0.3]), 4, True, PerChannel(), True)
        x, weights = torch.randn(2, 50) * 0.3, torch.randn(2, 50)
        learned = Learned(fmt, 50)
        (learned(x) * weights).sum().backward()
        torch.optim.SGD(learned.parameters(), 0.01).step()
        moved = learned.current().grid()[0].detach()  # type: ignore[attr-defined]
        scale = fmt.grid()[0].clone().requires_grad_()
        v = x / scale[:, None]
        made = (v + (v.round() - v).detach()).clamp(-7, 7) * scale[:, None]
        (made * weights).sum().backward()
        assert scale.grad is not None
        wanted = scale.detach() - 0.01 * scale.grad / math.sqrt(50 * 7)
        assert torch.allclose(moved, wanted, rtol=1e-4)

    def test_values_on_one_grid_learn_one_range(self) -> None:
        """Also after their formats were written to a file and read back."""
        subject = in_few_bits("shuffle", 4, 4)
        copies = {name: tuple(replace(fmt) for fmt in chain) for name, chain in subject.formats.items()}  # type: ignore[type-var]
        net = Simulated(subject.evolve(formats=copies))
        values = [name for name in copies if name not in subject.parameters]
        assert len({net._plan.keys[name] for name in values}) < len(values)
        train(net, "shuffle", 4)
        formats = net.absorb().formats
        for name in values:
            for other in values:
                if subject.formats[name][0] is subject.formats[other][0]:
                    one, two = formats[name][0], formats[other][0]
                    assert isinstance(one, IntQuant)
                    assert isinstance(two, IntQuant)
                    assert torch.equal(one.high, two.high)

    def test_what_operators_say_of_ranges_is_kept(self) -> None:
        subject = quantized("squeeze_excite")
        inner = next(name for name in subject.formats if name.startswith("input:"))
        net = Simulated(subject, fixed=[inner])
        train(net, "squeeze_excite", 4, 1e-2)
        formats, changed = net.absorb().formats, 0
        for name, (fmt,) in subject.formats.items():
            (now,) = formats[name]
            assert isinstance(fmt, IntQuant)
            assert isinstance(now, IntQuant)
            changed += not torch.equal(fmt.high, now.high)
            if name == inner:
                assert torch.equal(fmt.low, now.low)
                assert torch.equal(fmt.high, now.high)
        assert changed > 5

    def test_ranges_stay_what_they_were(self) -> None:
        """Symmetric stays symmetric, and a range that begins at zero still does."""
        subject = in_few_bits("residual", 4, 4)
        net = Simulated(subject)
        train(net, "residual", 10, 1e-2)
        for name, (fmt,) in net.absorb().formats.items():
            (before,) = subject.formats[name]
            assert isinstance(fmt, IntQuant)
            assert isinstance(before, IntQuant)
            assert fmt.symmetric == before.symmetric
            if fmt.symmetric:
                assert torch.equal(fmt.low, -fmt.high)
            elif not before.low.any():
                assert not fmt.low.any()
            assert fmt.project(torch.zeros_like(fmt.low)).abs().max() == 0


class TestShared:
    def test_tied_parameters_stay_tied(self) -> None:
        net = Simulated(quantized("shared"))
        train(net, "shared", 4)
        module = net.absorb().module
        assert module.get_submodule("first").weight is module.get_submodule("second").weight
        assert not torch.equal(module.get_submodule("first").weight, folded("shared").module.first.weight)  # type: ignore[union-attr, arg-type]

    def test_a_tied_parameter_is_projected_once_and_reaches_both(self) -> None:
        subject = stored_as("shared", "binary")
        net = Simulated(subject)
        calls: list[str] = []
        for key, learned in net.formats.items():
            learned.register_forward_hook(lambda *_, key=key: calls.append(key))
        net(batch("shared")[0])
        assert len(calls) == len(set(calls)) == len(net.formats)

    def test_an_embedding_learns(self) -> None:
        class Words(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(20, 8)
                self.head = nn.Linear(8, 20)
                self.head.weight = self.table.weight

            def forward(self, ids: Tensor) -> Tensor:
                return self.head(torch.tanh(self.table(ids)).mean(1))

        torch.manual_seed(0)
        subject = model_of(Words(), torch.randint(0, 20, (2, 5)))
        weight = subject.parameters["table.weight"].detach()
        fmt = weight_format(weight, FORMATS["int4 per channel"], "mse", 99.9)
        net = Simulated(subject.evolve(formats={"table.weight": (fmt,)}))
        ids, optimizer, losses = torch.randint(0, 20, (16, 5)), torch.optim.Adam(net.parameters(), 1e-2), []
        for _ in range(20):
            loss = F.cross_entropy(net(ids)[0], ids[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():
            assert torch.equal(net.eval()(ids)[0], simulate(net.absorb())(ids)[0])


class TestLanguage:
    @pytest.mark.parametrize("activations", ["int8", "dynamic", "none"])
    @pytest.mark.parametrize("kind", ["encoder", "lstm", "gru"])
    def test_what_quantize_gives_is_simulated_and_trained(self, kind: str, activations: str) -> None:
        """Tables, attention, ranges at run time, gates' weights; shared tables stay shared."""
        whole = encoder() if kind == "encoder" else recurrent(kind.upper(), True)
        x = ids(24) if kind == "encoder" else sequences(24)
        where = context(whole, Data.of(x[:8], x_train=x[8:]), target("onnxruntime"))
        subject = Quantize.model_validate({"activations": activations}).apply(whole, where)
        net, inputs_ = Simulated(subject).eval(), torch.from_numpy(x)
        with torch.no_grad():
            assert torch.equal(net(inputs_)[0], simulate(subject)(inputs_)[0])
        wanted = whole.module(inputs_).detach().roll(1, 0)
        optimizer, losses = torch.optim.Adam(net.train().parameters(), 3e-3), []
        for _ in range(10):
            loss = (net(inputs_)[0] - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
        back = net.eval().absorb()
        with torch.no_grad():
            assert torch.equal(net(inputs_)[0], simulate(back)(inputs_)[0])
        if kind == "encoder":
            module = back.module
            assert module.get_submodule("head").weight is module.get_submodule("table").weight

    def test_formats_of_other_entries_are_left_alone(self) -> None:
        whole = quantized("residual")
        there = {"elsewhere/add#0:0": (IntQuant(torch.tensor(-1.0), torch.tensor(1.0)),)}
        net = Simulated(whole.evolve(formats={**whole.formats, **there}))
        train(net, "residual", 2)
        assert all(one.grad is not None for one in net.parameters())
        assert net.absorb().formats["elsewhere/add#0:0"] is there["elsewhere/add#0:0"]


class TestNorms:
    @pytest.mark.parametrize("kind", ["W4A4", "ternary", "binary", "int4 in groups"])
    @pytest.mark.parametrize("name", ["residual", "depthwise", "shuffle"])
    def test_are_the_identity_at_first_and_fold_back_exactly(self, name: str, kind: str) -> None:
        subject = in_few_bits(name, 4, 4) if kind == "W4A4" else stored_as(name, kind, True)
        x, _ = batch(name, 32)
        net = Simulated(subject, normalize=[(x[:16],), (x[16:],)])
        assert len(net.norms) >= 6
        with torch.no_grad():
            (wanted,) = simulate(subject)(x)
            assert torch.allclose(net.eval()(x)[0], wanted, atol=0.05 * float(wanted.abs().max()))
        losses = train(net, name, 12, 1e-2)
        assert losses[-1] < losses[0]
        net.eval()
        with torch.no_grad():
            net.norms[0].weight[0] = -net.norms[0].weight[0]  # a channel turned round
            back = net.absorb()
            (made,) = net(x)
            assert torch.equal(made, simulate(back)(x)[0])
            assert torch.equal(made, Simulated(back).eval()(x)[0])
        for one, chain in back.formats.items():
            if one in back.parameters:
                value = back.parameters[one]
                assert torch.equal(chain[0].project(value), value)
                assert type(chain[0]) is type(subject.formats[one][0])

    def test_in_training_they_are_batch_norms(self) -> None:
        """Oracle: the layer, then torch's batch norm of the stored weight's outputs."""
        subject = stored_as("residual", "ternary", True)
        x, _ = batch("residual", 32)
        net = Simulated(subject, normalize=[(x,)])
        name = "stem.0.weight"
        net.watch(["stem.0"])
        net(x)
        fmt = subject.formats["input:x"][0]
        (ternary,) = subject.formats[name]
        y = F.conv2d(fmt.project(x), ternary.project(subject.parameters[name]), padding=1)
        mean, deviation = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        bias = subject.parameters["stem.0.bias"]
        wanted = F.batch_norm(y, None, None, (deviation + 1e-5).sqrt(), mean + bias, True)
        made = net.seen["stem.0"]
        for one in subject.formats.get("stem.0#0:0", ()):
            wanted = one.project(wanted)
        assert torch.allclose(made, wanted, atol=1e-4)

    def test_layers_that_cannot_fold_them_have_none(self) -> None:
        x, _ = batch("attention", 8)
        assert not Simulated(in_few_bits("attention", 4, 4), normalize=[(x,)]).norms
        x, _ = batch("residual", 8)
        assert not Simulated(stored_as("residual", "int8 asymmetric", True), normalize=[(x,)]).norms
        assert not Simulated(stored_as("residual", "int4 per tensor", True), normalize=[(x,)]).norms


class TestWatch:
    @pytest.mark.parametrize("kind", ["float", "int8"])
    def test_layers_and_blocks_are_seen_with_gradients(self, kind: str) -> None:
        subject = folded("residual") if kind == "float" else quantized("residual")
        net, (x, _) = Simulated(subject).eval(), batch("residual", 4)
        net.watch(["layer1", "layer2.conv1", "head"])
        out = net(x)[0]
        assert list(net.seen) == ["layer1", "layer2.conv1", "head"]
        assert torch.equal(net.seen["head"], out)
        seen: dict[str, Tensor] = {}
        module = subject.copy_module()
        for path in net.seen:
            module.get_submodule(path).register_forward_hook(
                lambda _l, _i, y, path=path: seen.update({path: y})
            )
        module(x)
        for path, value in seen.items():
            assert net.seen[path].shape == value.shape
            relative = (net.seen[path] - value).norm() / value.norm()
            assert relative < (1e-6 if kind == "float" else 0.1)
        net.seen["layer1"].sum().backward()
        assert net.module.get_submodule("layer1.conv1").weight.grad is not None
        net.watch([])
        net(x)
        assert not net.seen

    def test_the_first_of_several_outputs(self) -> None:
        net = Simulated(model("lstm"))
        net.watch(["lstm"])
        net(batch("lstm", 4)[0])
        assert net.seen["lstm"].shape == (4, 7, 16)

    def test_unknown_layers_are_refused(self) -> None:
        with pytest.raises(RecipeError, match="no layer 'neck'"):
            Simulated(model("residual")).watch(["neck"])


class TestModule:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_a_copy_is_on_its_own(self, normalize: bool) -> None:
        x, _ = batch("residual")
        net = Simulated(in_few_bits("residual", 4, 4), normalize=[(x,)] if normalize else ())
        net(x)
        before = net.eval()(x)[0].detach()
        other = copy.deepcopy(net)
        other.watch(["layer1"])
        train(other, "residual", 3)
        assert net.seen == {}
        assert torch.equal(net(x)[0], before)
        assert not torch.equal(other.eval()(x)[0], before)
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x)[0], before)

    def test_state_goes_on_from_where_it_was(self) -> None:
        subject = in_few_bits("residual", 4, 4)
        one, other = Simulated(subject), Simulated(subject)
        train(one, "residual", 5)
        other.load_state_dict(one.state_dict())
        assert train(one, "residual", 3) == train(other, "residual", 3)

    def test_parameters_are_told_apart(self) -> None:
        x, _ = batch("residual")
        net = Simulated(in_few_bits("residual", 4, 4), normalize=[(x,)])
        groups = net.groups()
        assert set(groups) == {"weights", "steps", "norms"}
        grouped = [id(one) for group in groups.values() for one in group]
        assert sorted(grouped) == sorted(id(one) for one in net.parameters() if one.requires_grad)

    def test_formats_with_a_schedule_advance(self) -> None:
        subject = folded("residual").evolve(formats={"head.weight": (Falling(torch.ones(10, 16)),)})
        net = Simulated(subject)
        net.advance(0.5)
        mask = net.state_dict()["formats.0.state_mask"]
        assert mask.mean() == 0.5
        (fmt,) = net.absorb().formats["head.weight"]
        assert isinstance(fmt, Falling)
        assert fmt.fraction == 0.5
        assert torch.equal(fmt.mask, mask)
        assert (net.absorb().parameters["head.weight"] == 0).float().mean() == 0.5

    def test_what_is_frozen_stays_to_the_last_bit(self) -> None:
        subject = in_few_bits("residual", 4, 4)
        held = [name for name in subject.parameters if name.startswith(("stem", "head"))]
        net = Simulated(subject)
        net.freeze(held)
        train(net, "residual", 4, 1e-2)
        back = net.absorb()
        for name, parameter in subject.parameters.items():
            assert torch.equal(back.parameters[name], parameter) == (name in held)
            if name in subject.formats:
                assert (back.formats[name] == subject.formats[name]) == (name in held)
        x, _ = batch("residual")
        with torch.no_grad():
            assert torch.equal(net.eval()(x)[0], simulate(back)(x)[0])

    def test_memory_laid_out_by_channels_is_undone(self) -> None:
        one, other = (Simulated(in_few_bits("depthwise", 4, 4)) for _ in range(2))
        other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert train(one, "depthwise", 3) == pytest.approx(train(other, "depthwise", 3), rel=1e-3)
        back = other.absorb()
        assert all(tensor.is_contiguous() for tensor in back.module.state_dict().values())
        assert all(one.requires_grad and one.grad is None for one in back.module.parameters())
        assert not any(layer.training for layer in back.module.modules())

    def test_mixed_precision_runs(self) -> None:
        net, (x, y) = Simulated(in_few_bits("residual", 4, 4)), batch("residual")
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x)[0], y)
        loss.backward()
        assert all(one.grad is not None and one.grad.isfinite().all() for one in net.parameters())


class TestPublic:
    def test_what_was_wrapped_is_absorbed(self) -> None:
        subject = quantized("linear3d")
        net = nn.Sequential(fw.simulated(subject))
        assert fw.absorb(net).formats.keys() == subject.formats.keys()
        with pytest.raises(RecipeError, match="a simulated module was expected, not Linear"):
            fw.absorb(nn.Linear(2, 2))

    def test_lightning_fabric_trains_it(self) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        net = fw.simulated(in_few_bits("residual", 4, 4))
        wrapped, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 3e-3))
        x, y = batch("residual")
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(wrapped(x)[0], y)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():
            assert torch.equal(net.eval()(x)[0], simulate(fw.absorb(wrapped))(x)[0])
