"""A callable that behaves as the formats will: simulated, never measured.

The exported graph is replayed node by node on the module's own parameters. A
parameter with formats is projected once; a traced value with formats is
projected whenever it is made, so every consumer sees what an integer runtime
would hand it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from featherweight.errors import DataError
from featherweight.formats import TensorFormat
from featherweight.graph import Graph, trace
from featherweight.model import Model

Observe = Callable[[str, Tensor], Tensor]  # traced value name, value -> what its consumers see


class Replay:
    """Runs an exported graph again, with a say over every traced value.

    Args:
        model: Whose module the parameters come from.
        entry: Which way of calling it.
        parameters: Values to use instead of the module's own, by parameter name.
    """

    def __init__(
        self, model: Model, entry: str = "forward", parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        self.graph: Graph = trace(model, entry)
        tensors = module_tensors(model, self.graph)
        self._lifted = {**tensors, **(parameters or {})}
        self._names = {value.fx_name: name for name, value in self.graph.values.items()}

    def __call__(
        self,
        inputs: tuple[Tensor, ...],
        observe: Observe | None = None,
        at_readers: Mapping[str, tuple[TensorFormat, ...]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Flat outputs of one call.

        Args:
            inputs: Flat tensors.
            observe: May look at and replace each traced value.
            at_readers: Formats of values that only some operators read rounded (``IntQuant.readers``).
        """
        interpreter = Interpreter(self.graph, self._lifted, self._names, observe, at_readers)
        return interpreter.outputs(inputs)


def module_tensors(model: Model, graph: Graph) -> dict[str, Tensor]:
    """Every lifted tensor of the program by its name in the module."""
    found: dict[str, Tensor] = {}
    state = {
        **dict(model.module.named_parameters(remove_duplicate=False)),
        **dict(model.module.named_buffers(remove_duplicate=False)),
    }
    constants: Mapping[str, Any] = graph.program.constants
    for name in graph.parameters.values():
        found[name] = state[name] if name in state else constants[name]
    return found


class Interpreter(fx.Interpreter):
    """Runs an exported graph on the parameters that it is given."""

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, str],
        observe: Observe | None,
        at_readers: Mapping[str, tuple[TensorFormat, ...]] | None = None,
    ) -> None:
        super().__init__(graph.program.graph_module)
        self._at_readers = at_readers or {}
        self._operators = {node.fx_name: node.op for node in graph.nodes} if self._at_readers else {}
        self._placeholders = graph.parameters
        self._tensors = tensors
        self._value_names = names
        self._observe = observe
        self._inputs: list[Tensor] = []

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._inputs = list(inputs)
        return tuple(self.run(enable_io_processing=False))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._placeholders:
            return self._tensors[self._placeholders[target]]
        return self._inputs.pop(0)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        operator = self._operators.get(n.name)
        if operator is None:
            return super().fetch_args_kwargs_from_env(n)

        def read(argument: fx.Node) -> Any:
            chain = self._at_readers.get(self._value_names.get(argument.name, ""), ())
            return project(self.env[argument], tuple(fmt for fmt in chain if operator in readers_of(fmt)))

        return fx.node.map_arg(n.args, read), fx.node.map_arg(n.kwargs, read)

    def run_node(self, n: fx.Node) -> Any:
        name = self._value_names.get(n.name)
        try:
            result = super().run_node(n)
        except IndexError as error:  # what a table of embeddings raises: ids come from the examples alone
            raise DataError(
                f"an example holds an index that the model has no entry for: {str(error).splitlines()[0]}",
                where=None if name is None else f"'{name}'",
                fix="give ids from 0 to the number of the table's rows - 1",
            ) from error
        if name is None or self._observe is None or not isinstance(result, Tensor):
            return result
        return self._observe(name, result)


def readers_of(fmt: TensorFormat) -> frozenset[str]:
    """The operators that alone read a value rounded to this format; none named: all do."""
    return getattr(fmt, "readers", None) or frozenset()


def project(value: Tensor, formats: tuple[TensorFormat, ...]) -> Tensor:
    """A tensor as its formats will hold it, applied left to right."""
    for fmt in formats:
        value = fmt.project(value)
    return value


def projected_parameters(model: Model) -> dict[str, Tensor]:
    """The parameters that have formats, as those will hold them."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    return {
        name: project(parameters[name].detach(), formats)
        for name, formats in model.formats.items()
        if name in parameters
    }


def simulate(model: Model, entry: str = "forward") -> Callable[..., tuple[Tensor, ...]]:
    """A callable on flat tensors that behaves as the model's formats will."""
    replay = Replay(model, entry, projected_parameters(model))
    at_readers = {name: chain for name, chain in model.formats.items() if any(map(readers_of, chain))}
    formats = {name: chain for name, chain in model.formats.items() if name not in at_readers}

    def observe(name: str, value: Tensor) -> Tensor:
        return project(value, formats[name]) if name in formats else value

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return replay(inputs, observe, at_readers)

    return run


def as_run(call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[np.ndarray, ...]]:
    """The same callable on numpy arrays, without gradients, for ``Data.score``."""

    def run(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            outputs = call(
                *(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in inputs)
            )
        return tuple(output.numpy() for output in outputs)

    return run


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of two energies, decibels; at most 120."""
    if noise <= signal * 1e-12:
        return 120.0
    return float(10 * np.log10(signal / noise)) if signal > 0 else 0.0


def layer_errors(
    model: Model, batches: Iterable[tuple[Tensor, ...]], entry: str = "forward"
) -> dict[str, float]:
    """SQNR in dB of each layer's output when that layer alone is stored in its formats.

    The layer reads float inputs projected by their formats and its projected
    parameters; everything else stays float. Simulated.

    Args:
        model: A model with formats.
        batches: Flat inputs.
        entry: Which way of calling it.

    Returns:
        Node name -> decibels, for nodes that read or hold a formatted tensor.
    """
    replay = Replay(model, entry)
    projected = projected_parameters(model)
    runner = _LayerErrors(replay.graph, module_tensors(model, replay.graph), projected, model.formats)
    with torch.inference_mode():
        for batch in batches:
            runner.outputs(batch)
    return {name: sqnr_db(signal, noise) for name, (signal, noise) in runner.energies.items()}


class _LayerErrors(Interpreter):
    """Runs each formatted node twice, float and alone in its formats, and adds up both energies."""

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        projected: Mapping[str, Tensor],
        formats: Mapping[str, tuple[TensorFormat, ...]],
    ) -> None:
        names = {value.fx_name: name for name, value in graph.values.items()}
        super().__init__(graph, tensors, names, None)
        self._projected = projected
        self._formats = formats
        self._nodes = {node.fx_name: node for node in graph.nodes}
        self.energies: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        exact = super().run_node(n)
        node = self._nodes.get(n.name)
        if node is None or not isinstance(exact, Tensor) or not exact.is_floating_point():
            return exact
        touched = [name for name in (*node.inputs, *node.parameters.values()) if name in self._formats]
        if not touched:
            return exact

        def swap(argument: fx.Node) -> Any:
            parameter = self._placeholders.get(argument.name)
            if parameter is not None:
                return self._projected.get(parameter, self.env[argument])
            chain = self._formats.get(self._value_names.get(argument.name, ""), ())
            return project(self.env[argument], chain)

        args = fx.node.map_arg(n.args, swap)
        kwargs = fx.node.map_arg(n.kwargs, swap)
        approximate = self.call_function(n.target, args, kwargs)
        signal, noise = self.energies.get(node.name, (0.0, 0.0))
        difference = (approximate - exact).double()
        self.energies[node.name] = (
            signal + float(exact.double().square().sum()),
            noise + float(difference.square().sum()),
        )
        return exact
