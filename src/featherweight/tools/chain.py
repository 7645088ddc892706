"""What both networks, the float and the stored one, make between two blocks, over all examples.

Only values that a later block reads are kept, in the context's scratch memory; what lies inside of a block
is made anew whenever it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from featherweight.formats import TensorFormat
from featherweight.graph import trace
from featherweight.method import Scratch
from featherweight.model import Model
from featherweight.tools.partition import Block, BlockRun, Picker
from featherweight.tools.simulate import module_tensors, project, readers_of


@dataclass
class State:
    """What is learned so far.

    Attributes:
        learned: Parameters by name.
        changed: Formats by name.
        done: Weights and values that may not change any more.
    """

    model: Model
    entry: str
    start: Mapping[str, Tensor]
    done: set[str]
    learned: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, tuple[TensorFormat, ...]] = field(default_factory=dict)

    def formats(self, name: str) -> tuple[TensorFormat, ...]:
        """The formats that hold for a parameter or value by now."""
        return self.changed.get(name, self.model.formats.get(name, ()))

    def store(self, name: str, value: Tensor) -> Tensor:
        """A traced value as it will be stored."""
        chain = tuple(fmt for fmt in self.formats(name) if not readers_of(fmt))
        return project(value, chain) if chain else value

    def read_as(self, name: str, operator: str, value: Tensor) -> Tensor:
        """A traced value as an operator will read it."""
        chain = tuple(fmt for fmt in self.formats(name) if operator in readers_of(fmt))
        return project(value, chain) if chain else value


class Chain:
    """The values between blocks, of both networks, over all batches."""

    def __init__(
        self,
        model: Model,
        reference: Model,
        batches: Sequence[tuple[Tensor, ...]],
        entry: str,
        scratch: Scratch,
    ) -> None:
        self.graph = trace(model, entry)
        own = module_tensors(model, self.graph)
        theirs: dict[str, Tensor] = {}
        theirs.update(reference.module.named_parameters(remove_duplicate=False))
        theirs.update(reference.module.named_buffers(remove_duplicate=False))
        self.exact_tensors = {
            name: theirs.get(name, torch.zeros_like(tensor) if name.endswith("bias") else tensor).detach()
            for name, tensor in own.items()
        }
        self.tensors = {
            name: project(tensor.detach(), model.formats.get(name, ())) for name, tensor in own.items()
        }
        self._scratch = scratch
        nodes = [n for n in self.graph.program.graph_module.graph.nodes if n.op == "placeholder"]
        nodes = [node for node in nodes if node.name not in self.graph.parameters]
        names = {value.fx_name: name for name, value in self.graph.values.items()}
        self.exact: dict[str, list[Any]] = {}
        self.stored: dict[str, list[Any]] = {}
        for place, node in enumerate(nodes):
            self.exact[node.name] = [batch[place] for batch in batches]
            chain = model.formats.get(names[node.name], ())
            chain = tuple(fmt for fmt in chain if not readers_of(fmt))
            self.stored[node.name] = [project(batch[place], chain) for batch in batches]
        self.picker = Picker(self.graph, [len(batch[0]) for batch in batches])
        self.count = len(batches)
        self._readers = {
            node.name: {user.name for user in node.users}
            for node in self.graph.program.graph_module.graph.nodes
        }
        self._done: set[str] = set()

    @torch.no_grad()
    def exact_outputs(self, block: Block) -> dict[str, list[Any]]:
        """What a block makes in the float network."""
        run = BlockRun(self.graph, block.calls)
        return self._all(block, lambda inputs: run(inputs, self.exact_tensors), self.exact)

    @torch.no_grad()
    def go_on(self, block: Block, exact: Mapping[str, list[Any]], state: State) -> None:
        """Make a block's outputs as they will be stored, and forget what nobody reads any more."""
        for name, tensor in state.learned.items():
            self.tensors[name] = tensor
        run = BlockRun(self.graph, block.calls)
        made = self._all(
            block, lambda inputs: run(inputs, self.tensors, state.store, state.read_as), self.stored
        )
        self.stored |= made
        self.exact |= exact
        self._done |= set(block.calls)
        for name in list(self.stored):
            if self._readers[name] <= self._done:
                del self.stored[name], self.exact[name]

    def _all(
        self, block: Block, run: Callable[[dict[str, Any]], dict[str, Any]], values: Mapping[str, list[Any]]
    ) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in block.outputs}
        for batch in range(self.count):
            result = run({name: values[name][batch] for name in block.inputs})
            for name in block.outputs:
                value = result[name]
                made[name].append(self._scratch(value) if isinstance(value, Tensor) else value)
        return made
