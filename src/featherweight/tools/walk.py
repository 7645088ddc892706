"""A network run one call at a time over all calibration examples, as float and as its formats will hold it.

Layer-wise methods (rounding, bias correction, ranges by output error) need, for each layer, what it reads
in the float network and what it will read once everything before it is stored in few bits. Running both
networks call by call makes each value once; a value lives until its last reader is done, in the context's
scratch memory, so that peak memory does not grow with the number of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.formats import TensorFormat
from featherweight.graph import Graph, Node, trace
from featherweight.method import Scratch
from featherweight.model import Model
from featherweight.tools.simulate import module_tensors, project, readers_of

_SMALL = 1 << 16  # bytes; a smaller value stays in memory


class Stream:
    """The values of one network over all batches, made call by call.

    Args:
        model: Whose module the parameters come from.
        entry: Which way of calling it.
        formats: By parameter or value; {} for the float network.
        batches: Flat inputs of each call.
        scratch: Where values live.
    """

    def __init__(
        self,
        model: Model,
        entry: str,
        formats: Mapping[str, tuple[TensorFormat, ...]],
        batches: Sequence[tuple[Tensor, ...]],
        scratch: Scratch,
    ) -> None:
        self.graph: Graph = trace(model, entry)
        self.count = len(batches)
        self._formats = dict(formats)
        self._scratch = scratch
        self._module = self.graph.program.graph_module
        self._by_name = {node.name: node for node in self._module.graph.nodes}
        self._names = {value.fx_name: name for name, value in self.graph.values.items()}
        self._operators = {node.fx_name: node.op for node in self.graph.nodes}
        self._tensors = module_tensors(model, self.graph)
        for name in self._tensors:
            if name in self._formats:
                self._tensors[name] = project(self._tensors[name].detach(), self._formats[name])
        self._values: dict[str, list[Any]] = {}  # fx name -> one item per batch
        inputs = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        inputs = [node for node in inputs if node.target not in self.graph.parameters]
        for place, node in enumerate(inputs):
            made = [self._stored(node, batch[place]) for batch in batches]
            self._values[node.name] = [self._kept(value, ()) for value in made]

    # ---- parameters

    def parameter(self, name: str) -> Tensor:
        """A parameter as this network holds it."""
        return self._tensors[name]

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Take another value from here on, stored in the parameter's formats."""
        self._tensors[name] = project(value, self._formats.get(name, ()))

    def set_format(self, name: str, formats: tuple[TensorFormat, ...]) -> None:
        """Store a value or parameter that is yet to be read in other formats."""
        self._formats[name] = formats

    # ---- values

    def value(self, name: str, batch: int) -> Tensor:
        """A traced value that is alive, as its readers see it."""
        made: Tensor = self._values[self.graph.values[name].fx_name][batch]
        return made

    def has(self, name: str) -> bool:
        """Whether a traced value is alive."""
        return self.graph.values[name].fx_name in self._values

    def compute(
        self,
        node: Node,
        batch: int,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        values: Mapping[str, Tensor] | None = None,
        rounded: bool = False,
    ) -> Any:
        """What a call makes of one batch; nothing is kept, and gradients flow.

        Args:
            node: The call; what it reads is alive or among ``values``.
            batch: Which batch.
            parameters: Instead of the network's own, by parameter name.
            values: Instead of the network's own, by traced name.
            rounded: Store the result in its formats.

        Returns:
            A tensor, or what the operator returns.
        """
        call = self._by_name[node.fx_name]
        result = self._run(call, batch, parameters or {}, values or {})
        return self._stored(call, result) if rounded else result

    def outputs(self, node: Node) -> Iterator[Tensor]:
        """A call's (first) output, batch by batch, before it is stored; nothing is kept, no gradients."""
        for batch in range(self.count):
            with torch.no_grad():
                result = self.compute(node, batch)
            yield result if isinstance(result, Tensor) else result[0]

    def make(self, fx_name: str) -> None:
        """Compute a node of the program over all batches and keep what it makes."""
        call = self._by_name[fx_name]
        made = []
        for batch in range(self.count):
            with torch.no_grad():
                result = self._stored(call, self._run(call, batch, {}, {}))
            sources = [self._read(call, read, batch, {}, {}) for read in call.all_input_nodes]
            made.append(self._kept(result, sources))
        self._values[fx_name] = made

    def drop(self, fx_names: Iterable[str]) -> None:
        """Forget values that nobody reads any more."""
        for name in fx_names:
            self._values.pop(name, None)

    # ---- inside

    def _run(
        self, call: fx.Node, batch: int, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Any:
        def read(argument: fx.Node) -> Any:
            return self._read(call, argument, batch, parameters, values)

        args, kwargs = fx.node.map_arg(call.args, read), fx.node.map_arg(call.kwargs, read)
        assert callable(call.target)
        return call.target(*args, **kwargs)

    def _read(
        self,
        call: fx.Node,
        argument: fx.Node,
        batch: int,
        parameters: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> Any:
        parameter = self.graph.parameters.get(argument.name)
        if parameter is not None:
            return parameters.get(parameter, self._tensors[parameter])
        name = self._names.get(argument.name, "")
        value = values[name] if name in values else self._values[argument.name][batch]
        operator = self._operators.get(call.name, "")
        chain = tuple(fmt for fmt in self._formats.get(name, ()) if operator in readers_of(fmt))
        return project(value, chain) if chain else value

    def _stored(self, call: fx.Node, result: Any) -> Any:
        chain = self._formats.get(self._names.get(call.name, ""), ())
        chain = tuple(fmt for fmt in chain if not readers_of(fmt))
        return project(result, chain) if chain and isinstance(result, Tensor) else result

    def _kept(self, result: Any, sources: Sequence[Any]) -> Any:
        """The result where values live; a view of what lives there already stays a view."""
        if not isinstance(result, Tensor) or result.nbytes < _SMALL:
            return result
        home = result.untyped_storage().data_ptr()
        tensors = [source for source in sources if isinstance(source, Tensor)]
        if any(source.untyped_storage().data_ptr() == home for source in tensors):
            return result
        return self._scratch(result)


@dataclass(frozen=True)
class Stop:
    """A call that both networks are about to make: what it reads is there in both.

    Attributes:
        node: The call, as the network with formats names it.
        exact: The float network.
        stored: The network with formats; its parameters may be set before the walk goes on.
    """

    node: Node
    exact: Stream
    stored: Stream

    @property
    def twin(self) -> Node:
        """The same call in the float network."""
        return next(node for node in self.exact.graph.nodes if node.name == self.node.name)


def walk(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    scratch: Scratch,
    entry: str = "forward",
) -> Iterator[Stop]:
    """Stop at every call of a network, in the order of execution.

    Args:
        model: With formats.
        reference: The same network as float; its formats are ignored.
        batches: Flat inputs.
        scratch: Where values live.
        entry: Which way of calling it.

    Yields:
        Before each call that ``model``'s graph lists. What the caller sets on ``stop.stored`` is what the
        call, and every later one, is made with.
    """
    exact = Stream(reference, entry, {}, batches, scratch)
    stored = Stream(model, entry, model.formats, batches, scratch)
    known = {node.fx_name: node for node in stored.graph.nodes}
    theirs = {node.name: node.fx_name for node in exact.graph.nodes}
    done, dead = set[str](), _last_readers(exact)
    last = _last_readers(stored)
    for fx_name in _calls(stored):
        node = known.get(fx_name)
        if node is not None:
            done |= _catch_up(exact, theirs[node.name], done, dead)
            yield Stop(node, exact, stored)
        stored.make(fx_name)
        stored.drop(last.get(fx_name, ()))


def steps(
    model: Model, batches: Sequence[tuple[Tensor, ...]], scratch: Scratch, entry: str = "forward"
) -> Iterator[tuple[Node, Stream]]:
    """Stop at every call of one network, as its formats will hold it, in the order of execution.

    Args:
        model: Which network.
        batches: Flat inputs.
        scratch: Where values live.
        entry: Which way of calling it.

    Yields:
        A call, before it is made, and the values that are alive.
    """
    stream = Stream(model, entry, model.formats, batches, scratch)
    known = {node.fx_name: node for node in stream.graph.nodes}
    last = _last_readers(stream)
    for fx_name in _calls(stream):
        if fx_name in known:
            yield known[fx_name], stream
        stream.make(fx_name)
        stream.drop(last.get(fx_name, ()))


def _catch_up(exact: Stream, until: str, done: set[str], dead: Mapping[str, Sequence[str]]) -> set[str]:
    """Make what the float network makes before a call; what was made."""
    made: set[str] = set()
    for fx_name in _calls(exact):
        if fx_name == until:
            break
        if fx_name not in done:
            exact.make(fx_name)
            exact.drop(dead.get(fx_name, ()))
            made.add(fx_name)
    return made


def _calls(stream: Stream) -> list[str]:
    nodes = stream.graph.program.graph_module.graph.nodes
    return [node.name for node in nodes if node.op == "call_function"]


def _last_readers(stream: Stream) -> dict[str, list[str]]:
    """Call -> what nobody reads after it."""
    last: dict[str, str] = {}
    for node in stream.graph.program.graph_module.graph.nodes:
        if node.op == "call_function":
            last[node.name] = node.name
        for read in node.all_input_nodes:
            last[read.name] = node.name
    found: dict[str, list[str]] = {}
    for name, reader in last.items():
        if name not in stream.graph.parameters:
            found.setdefault(reader, []).append(name)
    return found
