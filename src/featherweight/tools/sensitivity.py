"""How much a network suffers when one layer alone is stored in few bits. Simulated, never measured.

``alone`` is the network with one layer rounded to the nearest of symmetric integers; activations stay float.

``predicted_losses`` foretells many candidates of every layer from one backward pass an example. A change dW
of a layer's weights, and dx of what it reads, changes the outputs by J dW + J dx; with random signs v::

    loss = E |J dW + J dx|² / E |y|² = E_v (<v'J_W, dW> + <v'J_x, dx>)² / E |y|²

which is the Gauss-Newton (Fisher) form of second order (Hassibi and Stork 1993; FIT, Zandonati et al. 2022,
arXiv:2210.08502), with Hutchinson's estimate (1990) of the trace. It is the noise-to-signal ratio of the
outputs; those of several layers add up as far as their errors are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.formats import IntQuant, PerChannel, PerTensor, TensorFormat
from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.tools.ranges import weight_range
from featherweight.tools.simulate import module_tensors, project, simulate

_CHANNELS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "embedding"), 0),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
}
_SMALLEST = 2  # axes of a weight; biases and scales stay float


def layer_weights(model: Model, entry: str = "forward") -> dict[str, dict[str, int | None]]:
    """Layer (or traced name of a function) -> {weight: axis of its channels}; None: one scale for all."""
    parameters = model.parameters
    found: dict[str, dict[str, int | None]] = {}
    for node in trace(model, entry):
        for name in node.parameters.values():
            weight = parameters.get(name)
            if weight is None or weight.dim() < _SMALLEST or not weight.is_floating_point():
                continue
            owner = node.layer if "/" not in node.name else node.name
            axis = _CHANNELS.get(node.op)
            if node.op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
                axis = 0
            if axis == 1 and node.attributes.get("groups", 1) != 1:
                axis = None
            found.setdefault(owner, {}).setdefault(name, axis)
    return found


def alone(
    model: Model, weights: Mapping[str, int | None], bits: int, entry: str = "forward"
) -> Callable[..., tuple[Tensor, ...]]:
    """The model with these weights in integers of so many bits, everything else float."""
    formats = {name: (_nearest(model.parameters[name], axis, bits),) for name, axis in weights.items()}
    return simulate(model.evolve(formats=formats), entry)


def _nearest(weight: Tensor, axis: int | None, bits: int) -> IntQuant:
    draft = IntQuant(-torch.ones(()), torch.ones(()), bits, True, PerTensor(), signed=True)
    if axis is not None:
        draft = IntQuant(-torch.ones(1), torch.ones(1), bits, True, PerChannel(axis), signed=True)
    low, high = weight_range(weight, draft, "minmax", 100.0)
    return IntQuant(low, high, bits, True, draft.granularity, signed=True)


# ---- all candidates at once


@dataclass(frozen=True)
class Candidate:
    """What may become of a layer.

    Attributes:
        changes: Parameter -> what is added to it; none: it stays as it is.
        rounded: Whether the layer reads its inputs in their formats.
    """

    changes: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: bool = False


@dataclass(frozen=True)
class Subject:
    """Layers that are decided on together, since they share parameters.

    Attributes:
        nodes: Their calls, by traced name.
        candidates: What may become of them, by name.
    """

    nodes: tuple[str, ...]
    candidates: Mapping[str, Candidate]


def predicted_losses(
    model: Model,
    examples: Iterable[tuple[Tensor, ...]],
    subjects: Mapping[str, Subject],
    formats: Mapping[str, tuple[TensorFormat, ...]],
    *,
    seed: int = 0,
    entry: str = "forward",
) -> dict[str, dict[str, float]]:
    """The noise-to-signal ratio of the outputs that each candidate alone would make, to second order.

    Args:
        model: The float network; its formats are ignored.
        examples: Flat inputs of calls, best of one example each: their errors are told apart by call.
        subjects: By name.
        formats: Of the values that layers read, by traced name.
        seed: Of the random signs.
        entry: Which way of calling it.

    Returns:
        Subject -> candidate -> loss; 0 for one that changes nothing.
    """
    graph = trace(model, entry)
    signs = torch.Generator().manual_seed(seed)
    changed = {name for one in subjects.values() for c in one.candidates.values() for name in c.changes}
    tensors = {name: tensor.detach() for name, tensor in module_tensors(model, graph).items()}
    leaves = {name: tensors[name].requires_grad_() for name in sorted(changed & set(tensors))}
    reads = {
        name: values for one in subjects.values() for name, values in _reads(one, graph, formats).items()
    }
    losses = {name: dict.fromkeys(one.candidates, 0.0) for name, one in subjects.items()}
    signal = 0.0
    for inputs in examples:
        with torch.enable_grad():
            run = _Tapped(graph, tensors, reads)
            outputs = [y for y in run.outputs(inputs) if isinstance(y, Tensor) and y.is_floating_point()]
            signal += sum(float(y.detach().double().square().sum()) for y in outputs)
            weighed = torch.stack([(y * _signs(y, signs)).sum() for y in outputs]).sum()
            wanted = [*leaves.values(), *run.taps.values()]
            found = torch.autograd.grad(weighed, wanted, allow_unused=True) if wanted else ()
        slopes = dict(zip([*leaves, *run.taps], found, strict=True))
        with torch.no_grad():
            for name, one in subjects.items():
                inner = _inner(one, reads, run.taps, slopes, formats)
                for label, candidate in one.candidates.items():
                    losses[name][label] += _change(candidate, slopes, inner) ** 2
    return {
        name: {label: loss / max(signal, 1e-30) for label, loss in found.items()}
        for name, found in losses.items()
    }


def measured_losses(
    model: Model,
    examples: Iterable[tuple[Tensor, ...]],
    subjects: Mapping[str, Subject],
    formats: Mapping[str, tuple[TensorFormat, ...]],
    *,
    entry: str = "forward",
) -> dict[str, dict[str, float]]:
    """What :func:`predicted_losses` foretells, found by running the network with each candidate alone."""
    graph = trace(model, entry)
    tensors = {name: tensor.detach() for name, tensor in module_tensors(model, graph).items()}
    losses = {name: dict.fromkeys(one.candidates, 0.0) for name, one in subjects.items()}
    signal = 0.0
    with torch.no_grad():
        for inputs in examples:
            exact = _Tapped(graph, tensors, {}).outputs(inputs)
            signal += _energy(exact)
            for name, one in subjects.items():
                for label, candidate in one.candidates.items():
                    if not candidate.changes and not candidate.rounded:
                        continue
                    own = {key: tensors[key] + change for key, change in candidate.changes.items()}
                    taps = _reads(one, graph, formats) if candidate.rounded else {}
                    made = _Tapped(graph, tensors | own, taps, formats).outputs(inputs)
                    pairs = zip(made, exact, strict=True)
                    losses[name][label] += _energy([one - other for one, other in pairs])
    return {
        name: {label: loss / max(signal, 1e-30) for label, loss in found.items()}
        for name, found in losses.items()
    }


def _reads(subject: Subject, graph: Graph, formats: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Call of a subject -> the values with formats that it reads."""
    found = {
        node.name: tuple(value for value in node.inputs if value in formats)
        for node in graph
        if node.name in subject.nodes
    }
    return {name: values for name, values in found.items() if values}


def _energy(outputs: Iterable[Any]) -> float:
    floats = (y for y in outputs if isinstance(y, Tensor) and y.is_floating_point())
    return sum(float(y.double().square().sum()) for y in floats)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1


_Taps = Mapping[tuple[str, str], Tensor]  # (call, value that it reads) -> the value


def _inner(
    subject: Subject,
    reads: Mapping[str, tuple[str, ...]],
    taps: _Taps,
    slopes: Mapping[Any, Tensor | None],
    formats: Mapping[str, tuple[TensorFormat, ...]],
) -> float:
    """What rounding the inputs of the layers adds to the outputs, along the random signs."""
    total = 0.0
    for call in subject.nodes:
        for value in reads.get(call, ()):
            slope = slopes.get((call, value))
            if slope is not None:
                x = taps[call, value].detach()
                total += float((slope * (project(x, formats[value]) - x)).sum())
    return total


def _change(candidate: Candidate, slopes: Mapping[Any, Tensor | None], inner: float) -> float:
    total = inner if candidate.rounded else 0.0
    for name, change in candidate.changes.items():
        slope = slopes.get(name)
        if slope is not None:
            total += float(torch.dot(slope.reshape(-1), change.reshape(-1)))
    return total


class _Tapped(fx.Interpreter):
    """Runs a program so that what chosen calls read can be told apart from what others read of the same.

    Args:
        graph: The program.
        tensors: Its parameters.
        reads: Call -> values that are tapped there.
        formats: Stores tapped values; none: they stay as they are and take gradients of their own.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        reads: Mapping[str, tuple[str, ...]],
        formats: Mapping[str, tuple[TensorFormat, ...]] | None = None,
    ) -> None:
        super().__init__(graph.program.graph_module)
        self._parameters = graph.parameters
        self._tensors = tensors
        self._values = {value.fx_name: name for name, value in graph.values.items()}
        self._calls = {node.fx_name: node.name for node in graph if node.name in reads}
        self._reads = reads
        self._formats = formats
        self._inputs: list[Tensor] = []
        self.taps: dict[tuple[str, str], Tensor] = {}

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Flat outputs of one call."""
        self._inputs, self.taps = list(inputs), {}
        return tuple(self.run(enable_io_processing=False))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._parameters:
            return self._tensors[self._parameters[target]]
        return self._inputs.pop(0)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        call = self._calls.get(n.name)
        if call is None:
            return super().fetch_args_kwargs_from_env(n)

        def read(argument: fx.Node) -> Any:
            name = self._values.get(argument.name, "")
            value = self.env[argument]
            if name not in self._reads[call]:
                return value
            if self._formats is not None:
                return project(value, self._formats[name])
            if (call, name) not in self.taps:
                fresh = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
                self.taps[call, name] = fresh
            return self.taps[call, name]

        return fx.node.map_arg(n.args, read), fx.node.map_arg(n.kwargs, read)
