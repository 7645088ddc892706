"""A subnet cut out of a supernet: the very module that the ``subnet`` step makes, and slices to train it by.

A supernet trains through its subnets: each is cut as it will be when it is chosen, and called with slices of
the supernet's own parameters, so that gradients flow back into these::

    sub = extractor.extract(subnet)
    slices = extractor.slices(sub)
    outputs = called(sub, slices.of(dict(supernet.module.named_parameters())), inputs)
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.elastic import Space, Subnet
from featherweight.errors import RecipeError
from featherweight.model import Cut, Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import Cutter
from featherweight.tools.groups import ChannelGroup, Channels
from featherweight.tools.kernels import Kernel, with_smaller_kernels
from featherweight.tools.removal import removed
from featherweight.tools.residuals import residual_blocks
from featherweight.tools.resolution import with_smaller_input

_BASES = 1 << 29  # bytes of parameters that bases may hold together
_FEWEST = 4  # bases that are held, whatever they take
BaseKey = tuple[tuple[str, ...], float]  # blocks that are gone, share of the input


@dataclass(frozen=True)
class Slice:
    """Where a tensor of a subnet comes from.

    Attributes:
        source: Name of the supernet's tensor.
        kept: Axis -> the indices that are left, ascending.
    """

    source: str
    kept: tuple[tuple[int, Tensor], ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The part, through which gradients flow: a view where the indices are neighbours."""
        for axis, indices in self.kept:
            count, first = len(indices), int(indices[0])
            if int(indices[-1]) - first + 1 == count:
                tensor = tensor.narrow(axis, first, count)
            else:
                tensor = tensor.index_select(axis, indices.to(tensor.device))
        return tensor


@dataclass(frozen=True)
class Slices:
    """The tensors of a subnet as parts of the supernet's.

    Attributes:
        parts: Name in the subnet -> part.
    """

    parts: Mapping[str, Slice]

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The subnet's tensors.

        Args:
            tensors: The supernet's parameters or buffers, by their first names; parts of others are left out.
        """
        return {
            name: part.of(tensors[part.source]) for name, part in self.parts.items() if part.source in tensors
        }


def slices_of(model: Model, sub: Model) -> Slices:
    """Where each parameter and buffer of a subnet comes from, by the cuts among its edits.

    Args:
        model: The supernet.
        sub: Whose edits begin with those of the supernet.
    """
    first = _first_names(model.module)
    tensors = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    kept: dict[str, dict[int, Tensor]] = {}
    for edit in sub.edits[len(model.edits) :]:
        if isinstance(edit, Cut) and (source := first.get(edit.tensor)) is not None:
            axes = kept.setdefault(source, {})
            left = axes.get(edit.axis, torch.arange(tensors[source].shape[edit.axis]))
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[list(edit.dropped)] = False
            axes[edit.axis] = left[stays]
    own = (*sub.module.named_parameters(), *sub.module.named_buffers())
    return Slices(
        {
            name: Slice(first[name], tuple(kept.get(first[name], {}).items()))
            for name, _ in own
            if name in first
        }
    )


def called(
    model: Model, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...], entry: str = "forward"
) -> Any:
    """What a model returns with other tensors in the place of its own; those left out are its own.

    Args:
        model: Whose module is called, in its mode.
        tensors: By name.
        inputs: Flat inputs of the entry.
        entry: Which way of calling it.
    """
    how = model.entries[entry]
    call = _Call(model.module, how.method)
    with _recurrent_weights(model.module, tensors):
        given = {f"module.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(call, given, how.arguments(inputs))


class _Call(nn.Module):
    """Calls a method by its name."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


@contextmanager
def _recurrent_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Recurrent layers read a list of weights of their own, which functional_call knows nothing of."""
    held: list[tuple[nn.RNNBase, list[Any]]] = []
    for path, layer in module.named_modules():
        if isinstance(layer, nn.RNNBase):
            held.append((layer, layer._flat_weights))
            names = [f"{path}.{name}" if path else name for name in layer._flat_weights_names]
            own = zip(names, layer._flat_weights, strict=True)
            layer._flat_weights = [tensors.get(name, weight) for name, weight in own]
    try:
        yield
    finally:
        for layer, weights in held:
            layer._flat_weights = weights


class Extractor:
    """Cuts subnets out of one supernet, many of them quickly.

    Blocks and pixels change the graph, so what is left without some of them is traced and its groups of
    channels are found anew, once: a base. Bases are kept while there is room. Cutting one to widths and
    kernels traces nothing (``cutting.Cutter``).

    Args:
        model: The supernet; its structure must not change, its values may.
        space: Of subnets.
        channels: Its groups of channels, those of the space among them.
        room: Bytes of parameters that the bases may hold.
    """

    def __init__(self, model: Model, space: Space, channels: Channels, room: int = _BASES) -> None:
        self._model, self._space, self._channels = model, space, channels
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters.values())
        self._most = max(_FEWEST, room // max(size, 1))
        self._bases: OrderedDict[BaseKey, Base] = OrderedDict()
        order = [block.name for block in residual_blocks(model)] if space.depths else []
        self._order = {name: place for place, name in enumerate(order)}

    def extract(self, subnet: Subnet) -> Model:
        """The subnet with the supernet's present values; its edits go on from the supernet's.

        Raises:
            RecipeError: It is none of the space, or the module's code cannot follow.
        """
        wrong = next(self._space.misfits(subnet), None)
        if wrong is not None:
            raise RecipeError(f"the supernet holds no such subnet: {wrong}")
        base = self.base(subnet)
        made = base.cut(subnet)
        made = _with_kernels(made, subnet.kernels)
        if made is self._model:
            made = self._model.evolve(module=self._model.copy_module())
        return self._refilled(made)

    def base(self, subnet: Subnet) -> Base:
        """The supernet without the blocks and pixels that a subnet lacks, its channels and kernels whole."""
        gone = [name for stage, count in subnet.depths.items() for name in self._space.depths[stage][:count]]
        return self._base((tuple(sorted(gone, key=self._order.__getitem__)), subnet.input))

    def signature(self, subnet: Subnet) -> str:
        """The same text for subnets that are the same network: what went with a block counts no more."""
        base = self.base(subnet)
        layers = dict(base.model.module.named_modules())
        widths = {name: len(gone) for name, gone in base.dropped(subnet).items()}
        kernels = {path: size for path, size in subnet.kernels.items() if path in layers}
        return json.dumps([base.key, widths, kernels], sort_keys=True)

    def slices(self, sub: Model) -> Slices:
        """Where the tensors of an extracted subnet come from."""
        return slices_of(self._model, sub)

    def _refilled(self, made: Model) -> Model:
        """Bases were made when the supernet had other values."""
        source = {**dict(self._model.module.named_parameters()), **dict(self._model.module.named_buffers())}
        own = {**dict(made.module.named_parameters()), **dict(made.module.named_buffers())}
        with torch.no_grad():
            for name, value in self.slices(made).of(source).items():
                own[name].copy_(value)
        return made

    def _base(self, key: BaseKey) -> Base:
        """From the base with one block more: the last ones of the network go first, so that names stay."""
        if key in self._bases:
            self._bases.move_to_end(key)
            return self._bases[key]
        gone, share = key
        if share != 1:
            made = with_smaller_input(self._base((gone, 1.0)).model, share)
        elif gone:
            before = self._base((gone[1:], 1.0)).model
            block = next((one for one in residual_blocks(before) if one.name == gone[0]), None)
            if block is None:
                raise RecipeError(f"without {', '.join(gone[1:])} the block '{gone[0]}' cannot be found")
            made = removed(before, block)
        else:
            made = self._model
        self._bases[key] = found = Base(made, self._channels, key)
        while len(self._bases) > self._most:
            self._bases.popitem(last=False)
        return found


class Base:
    """A supernet without some blocks and pixels, and its groups of channels.

    Args:
        model: What is left.
        whole: The supernet's groups.
        key: What went.

    Attributes:
        channels: The groups of what is left that are some of the supernet's.
    """

    def __init__(self, model: Model, whole: Channels, key: BaseKey) -> None:
        self.model, self.key = model, key
        found = channel_groups(model)
        self._same = {
            name: own
            for name, group in found.groups.items()
            if (own := _counterpart(group, whole)) is not None
        }
        self.channels = Channels({name: found.groups[name] for name in self._same})
        self._cutter = Cutter(model, self.channels)

    def cut(self, subnet: Subnet) -> Model:
        """With the first channels of each group alone."""
        return self._cutter.cut(self.dropped(subnet))

    def dropped(self, subnet: Subnet) -> dict[str, list[int]]:
        """Group of what is left -> its channels that a subnet lacks."""
        drop = {}
        for name, (group, channels) in self._same.items():
            width = subnet.widths.get(group)
            if width is not None:
                drop[name] = [place for place, channel in enumerate(channels) if channel >= width]
        return drop


def _counterpart(group: ChannelGroup, whole: Channels) -> tuple[str, list[int]] | None:
    """The supernet's group whose channels these are, and which of them each is."""
    own = {(member.tensor, member.axis): member for member in group.members}
    for name, other in whole.groups.items():
        for member in other.members:
            mine = own.get((member.tensor, member.axis))
            if mine is None or group.kind != other.kind:
                continue
            at = {index: channel for channel, indices in enumerate(member.indices) for index in indices}
            channels = [at.get(indices[0], -1) for indices in mine.indices]
            exact = all(
                channel >= 0 and set(indices) <= set(member.indices[channel])
                for channel, indices in zip(channels, mine.indices, strict=True)
            )
            if exact:
                return name, channels
    return None


def _with_kernels(model: Model, sizes: Mapping[str, int]) -> Model:
    layers = dict(model.module.named_modules())
    smaller: list[Kernel] = []
    for path, side in sizes.items():
        size = getattr(layers.get(path), "kernel_size", None)
        if isinstance(size, tuple) and size[0] != side:
            smaller.append(Kernel(path, size, (side,) * len(size), 0, 0))
    return with_smaller_kernels(model, smaller) if smaller else model


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first one."""
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
