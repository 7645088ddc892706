"""The sandwich: one step trains the largest network, the smallest and random ones between, on shared weights.

For a batch x, with weights w and the parts w_s of them that subnet s has::

    loss = mean of  L(f(x; w)),  d(f_s(x; w_s), f(x; w))  for s = smallest, and some that are drawn

The subnets learn what the largest one says of the same batch, which has no gradient there (the sandwich
rule and in-place distillation: Yu and Huang 2019, arXiv:1903.05134). Where there is a teacher that stays as
it is, they learn from it instead, L(f_s(x; w_s)), and the largest one, which then teaches nobody and takes
most of a step's time, need not run in every step. What may be drawn opens while training goes on (progressive
shrinking: Cai et al. 2020, arXiv:1908.09791).

Where it is known which networks will be taken, they are drawn instead, one more of them in the place of the
smallest: what others learn on the shared weights costs them (attentive sampling: Wang et al. 2021,
arXiv:2011.09011).

A subnet is the module that is cut one day (tools/elastic_cut.py), run with slices of the supernet's
parameters: nothing is masked, so a small one costs little, and gradients flow into the supernet. Norms of a
subnet use the statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.elastic import AxisKind, Openness, Space, Subnet
from featherweight.model import Model
from featherweight.tools.distill_check import tensors
from featherweight.tools.distill_losses import OutputKind
from featherweight.tools.distillation import Watched, outputs_loss
from featherweight.tools.elastic_cut import Extractor, Slices, called
from featherweight.tools.objectives import Net, Objective, Outputs

_OPENING: tuple[AxisKind, ...] = ("kernels", "depths", "widths")
_DRAW, _CHOOSE = range(2)  # streams of random numbers


@dataclass(frozen=True)
class Layers:
    """What a step is made of.

    Attributes:
        random: Subnets of a step beside the smallest one.
        drawn: Different ones that are cut in the whole training: each takes some time.
        pool: The last ones that were cut, from which a step takes its own.
        shrink: Share of the training in which the space opens.
        steps: Of the whole training.
        every: The largest network runs in one of so many steps.
        inplace: Subnets learn from the largest network, in every step; else its objective is theirs too.
        temperature: Softens class scores that subnets learn in place.
        seed: Of what is drawn.
    """

    random: int = 2
    drawn: int = 256
    pool: int = 16
    shrink: float = 0.0
    steps: int = 1
    every: int = 1
    inplace: bool = True
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.inplace and self.every > 1:
            raise ValueError("the largest network teaches in every step")


def opened(space: Space, layers: Layers, share: float) -> Openness:
    """What may be drawn when this share of the training is over.

    Kernels open first, then depths, then widths; pictures of all sizes are open from the start, as Cai et al.
    have it.
    """
    if share >= layers.shrink:
        return Openness()
    kinds = [kind for kind in _OPENING if any(axis.kind == kind for axis in space.axes)]
    turns = share / layers.shrink * len(kinds)
    shares = {kind: min(max(turns - turn, 0.0), 1.0) for turn, kind in enumerate(kinds)}
    return Openness(**{kind: shares.get(kind, 1.0) for kind in _OPENING})


class Sandwich(Objective):
    """The largest network's own objective, and how far subnets are from what it says.

    Which subnets a step has follows from the seed and from how far training is, so that a run which goes on
    makes the same steps, and processes that share a batch cut the same.

    Args:
        largest: What the whole network learns.
        space: What is drawn from; where networks were chosen among it, these are drawn alone.
        extractor: Of the network as training begins.
        kinds: What each output holds.
        layers: How many.
        entry: Which way of calling it.
        still: Paths of layers that run as in inference.
    """

    def __init__(
        self,
        largest: Objective,
        space: Space,
        extractor: Extractor,
        kinds: tuple[OutputKind, ...],
        layers: Layers,
        entry: str,
        *,
        still: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.largest = largest
        self.layers = layers
        self._kinds = kinds
        self._pool = _Pool(space, extractor, layers, entry, frozenset(still))
        self._share = 0.0

    def attach(self, net: Net) -> None:
        """Watch what the largest network's objective asks for."""
        self.largest.attach(net)

    def advance(self, share: float) -> None:
        """Open the space."""
        self.largest.advance(share)
        self._share = share

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The loss of the largest network alone."""
        loss: Tensor = self.largest(outputs, inputs, targets)
        return loss

    def step(self, net: Net, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """Run the largest network, and in training the subnets on parts of its parameters."""
        if not self.training:
            return self.largest.step(net, inputs, targets)
        watched, losses = Watched(net), []
        if round(self._share * self.layers.steps) % self.layers.every == 0:
            losses.append(self.largest.step(watched, inputs, targets))
        said = tuple(one.detach() for one in watched.outputs)
        parameters = dict(cast(_Holds, net).module.named_parameters())
        for sub in self._pool.chosen(self._share):
            outputs = sub(parameters, inputs)
            losses.append(
                outputs_loss(outputs, said, self._kinds, self.layers.temperature, targets)
                if self.layers.inplace
                else self.largest(outputs, inputs, targets)
            )
        return torch.stack(losses).mean()


class _Holds(Protocol):
    """A network in training holds the module that is trained."""

    module: nn.Module


class _Sub:
    """A subnet that is ready to run."""

    def __init__(self, model: Model, slices: Slices, entry: str, still: frozenset[str]) -> None:
        for path, layer in model.module.named_modules():
            layer.training = path not in still
        self._model, self._slices, self._entry = model, slices, entry

    def __call__(self, parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Outputs:
        self._model.module.to(inputs[0].device)
        return tensors(called(self._model, self._slices.of(parameters), inputs, self._entry))


class _Pool:
    """The subnets that were drawn last. Number k is drawn at the share (k - pool) / drawn of the training."""

    def __init__(
        self, space: Space, extractor: Extractor, layers: Layers, entry: str, still: frozenset[str]
    ) -> None:
        self._space, self._extractor, self._layers = space, extractor, layers
        self._entry, self._still = entry, still
        self._ready: dict[int, _Sub] = {}
        self._smallest: tuple[str, _Sub] | None = None

    def chosen(self, share: float) -> list[_Sub]:
        """The subnets of a step: the smallest one, then random ones; or some of those that were chosen."""
        how = self._layers
        if self._space.among:
            return self._some(share)
        last = int(share * how.drawn) + how.pool
        numbers = range(last - how.pool, last)
        for old in [number for number in self._ready if number not in numbers]:
            del self._ready[old]
        rng = np.random.default_rng((how.seed, _CHOOSE, round(share * 2**40)))
        picks = rng.choice(len(numbers), min(how.random, len(numbers)), replace=False)
        return [self._least(share), *(self._numbered(numbers[int(pick)]) for pick in picks)]

    def _some(self, share: float) -> list[_Sub]:
        how, among = self._layers, self._space.among
        rng = np.random.default_rng((how.seed, _CHOOSE, round(share * 2**40)))
        found = []
        for pick in rng.choice(len(among), min(how.random + 1, len(among)), replace=False):
            number = int(pick)
            if number not in self._ready:
                self._ready[number] = self._cut(among[number])
            found.append(self._ready[number])
        return found

    def _numbered(self, number: int) -> _Sub:
        if number not in self._ready:
            how = self._layers
            rng = np.random.default_rng((how.seed, _DRAW, number))
            share = max(0, number - how.pool) / max(how.drawn, 1)
            self._ready[number] = self._cut(self._space.sample(rng, opened(self._space, self._layers, share)))
        return self._ready[number]

    def _least(self, share: float) -> _Sub:
        smallest = self._space.smallest(opened(self._space, self._layers, share))
        if self._smallest is None or self._smallest[0] != smallest.key:
            self._smallest = smallest.key, self._cut(smallest)
        return self._smallest[1]

    def _cut(self, subnet: Subnet) -> _Sub:
        model = self._extractor.extract(subnet)
        return _Sub(model, self._extractor.slices(model), self._entry, self._still)
