"""An elastic network, as data: which subnets it holds, and one of them.

A supernet is a plain network whose channels are sorted by importance, the most important ones first in every
group, and that was trained so that the first channels of each group, the first blocks of each stage, the
inner parts of kernels and smaller pictures work by themselves (Cai et al. 2020, "Once-for-all",
arXiv:1908.09791; Yu and Huang 2019, arXiv:1903.05134). A subnet is a number for each of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from featherweight.model import Model, SetAttr

AxisKind = Literal["widths", "depths", "kernels", "input"]
_ATTRIBUTE = "elastic"
_KIND_SPREAD = 0.5  # how far widths, depths, kernels and the input of a sample are from its level, at most
_OWN_SPREAD = 0.35  # how far each group, stage and kernel is from that, at most


class Random(Protocol):
    """What numpy's Generator and the standard library's Random have in common."""

    def random(self) -> float:
        """The next number between 0 and 1."""
        ...


@dataclass(frozen=True)
class Openness:
    """Which part of a space is open yet (progressive shrinking): shares of the choices, the largest first.

    Attributes:
        widths: 0: every group is whole; 1: all numbers of channels.
        depths: 0: no block goes; 1: all that may.
        kernels: 0: every kernel is whole; 1: all sizes.
        inputs: 0: pictures are whole; 1: all sizes.
    """

    widths: float = 1.0
    depths: float = 1.0
    kernels: float = 1.0
    inputs: float = 1.0

    def of(self, kind: AxisKind) -> float:
        """The share of one kind of choice."""
        shares = {"widths": self.widths, "depths": self.depths, "kernels": self.kernels}
        return shares.get(kind, self.inputs)


WHOLE = Openness()


@dataclass(frozen=True)
class Subnet:
    """One network of a space.

    Attributes:
        widths: Channel group -> how many of its channels stay, the first ones.
        depths: Stage -> how many of its blocks are gone.
        kernels: Path of a convolution -> its side length.
        input: Share of the pictures' side.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    depths: Mapping[str, int] = field(default_factory=dict)
    kernels: Mapping[str, int] = field(default_factory=dict)
    input: float = 1.0

    @property
    def key(self) -> str:
        """The same text for the same subnet."""
        return json.dumps(self.to_json(), sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "widths": dict(self.widths),
            "depths": dict(self.depths),
            "kernels": dict(self.kernels),
            "input": self.input,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subnet:
        """What :meth:`to_json` wrote."""
        return cls(
            {name: int(width) for name, width in data.get("widths", {}).items()},
            {name: int(gone) for name, gone in data.get("depths", {}).items()},
            {name: int(size) for name, size in data.get("kernels", {}).items()},
            float(data.get("input", 1.0)),
        )


@dataclass(frozen=True)
class Axis:
    """One choice of a space.

    Attributes:
        kind: What is chosen.
        name: Of the group, stage or layer; '' for the input.
        options: From the smallest network to the largest: numbers of channels, blocks gone (the most first),
            side lengths, shares.
    """

    kind: AxisKind
    name: str
    options: tuple[float, ...]

    def at(self, level: float, share: float = 1.0) -> float:
        """The option at a level between 0, the smallest, and 1, where only the largest ones are open."""
        count = len(self.options)
        opened = 1 + math.floor(share * (count - 1) + 0.5)
        place = min(int(level * opened), opened - 1)
        return self.options[count - opened + place]


@dataclass(frozen=True)
class Space:
    """Everything that may be chosen of an elastic network.

    Attributes:
        widths: Channel group -> numbers of channels that it may keep, ascending; the last one is whole.
        depths: Stage -> its residual blocks that may go, in the order in which they go.
        kernels: Path of a convolution -> side lengths, ascending; the last one is whole.
        inputs: Shares of the pictures' side, ascending; the last one is 1.
        among: Networks of it that were trained more than others; none where all were alike.
    """

    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    depths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: tuple[float, ...] = (1.0,)
    among: tuple[Subnet, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Its choices, those with a single option left out."""
        found = [Axis("widths", name, tuple(sizes)) for name, sizes in self.widths.items()]
        found += [
            Axis("depths", name, tuple(range(len(blocks), -1, -1))) for name, blocks in self.depths.items()
        ]
        found += [Axis("kernels", name, tuple(sizes)) for name, sizes in self.kernels.items()]
        found.append(Axis("input", "", tuple(self.inputs)))
        return tuple(axis for axis in found if len(axis.options) > 1)

    @property
    def is_trivial(self) -> bool:
        """Whether there is nothing to choose."""
        return not self.axes

    @property
    def count(self) -> int:
        """How many subnets it holds."""
        return math.prod(len(axis.options) for axis in self.axes)

    def largest(self) -> Subnet:
        """The whole network."""
        return self.at(1.0)

    def smallest(self, open: Openness = WHOLE) -> Subnet:
        """The smallest network of the open part."""
        return self.at(0.0, open)

    def at(self, level: float, open: Openness = WHOLE) -> Subnet:
        """The network with every choice at the same level: 0 is the smallest, 1 the largest."""
        return self.chosen([axis.at(level, open.of(axis.kind)) for axis in self.axes])

    def sample(self, rng: Random, open: Openness = WHOLE) -> Subnet:
        """A random network of the open part.

        The sum of many independent choices is nearly the same each time, so that samples would all cost
        about the same. So one level is drawn for the network, one around it for each kind of choice, and
        one around that for each choice.
        """
        level = rng.random()
        levels = {kind: _near(level, _KIND_SPREAD, rng) for kind in ("widths", "depths", "kernels", "input")}
        return self.chosen(
            [axis.at(_near(levels[axis.kind], _OWN_SPREAD, rng), open.of(axis.kind)) for axis in self.axes]
        )

    def chosen(self, options: Sequence[float]) -> Subnet:
        """The subnet with one option for each of the axes; everything else is whole."""
        picked = {(axis.kind, axis.name): one for axis, one in zip(self.axes, options, strict=True)}

        def of(kind: AxisKind, name: str, whole: float) -> int:
            return int(picked.get((kind, name), whole))

        return Subnet(
            {name: of("widths", name, sizes[-1]) for name, sizes in self.widths.items()},
            {name: of("depths", name, 0) for name in self.depths},
            {name: of("kernels", name, sizes[-1]) for name, sizes in self.kernels.items()},
            float(picked.get(("input", ""), 1.0)),
        )

    def options(self, subnet: Subnet) -> tuple[float, ...]:
        """What a subnet chose of each of the axes: the reverse of :meth:`chosen`."""
        found: list[float] = []
        for axis in self.axes:
            match axis.kind:
                case "widths":
                    found.append(subnet.widths.get(axis.name, axis.options[-1]))
                case "depths":
                    found.append(subnet.depths.get(axis.name, axis.options[-1]))
                case "kernels":
                    found.append(subnet.kernels.get(axis.name, axis.options[-1]))
                case "input":
                    found.append(subnet.input)
        return tuple(found)

    def contains(self, subnet: Subnet) -> bool:
        """Whether a subnet is one of these; what it does not name is whole."""
        return not list(self.misfits(subnet))

    def misfits(self, subnet: Subnet) -> Iterator[str]:
        """What a subnet asks for that there is not, for the user."""
        for word, asked, known in (
            ("group", subnet.widths, self.widths),
            ("kernel", subnet.kernels, self.kernels),
        ):
            for name, size in asked.items():
                if name not in known:
                    yield f"there is no elastic {word} '{name}'"
                elif size not in known[name]:
                    yield f"'{name}' can have {', '.join(map(str, known[name]))}, not {size}"
        for name, gone in subnet.depths.items():
            if name not in self.depths:
                yield f"there is no elastic stage '{name}'"
            elif not 0 <= gone <= len(self.depths[name]):
                yield f"'{name}' can lose 0 to {len(self.depths[name])} blocks, not {gone}"
        if subnet.input not in self.inputs:
            yield f"input can be {', '.join(map(str, self.inputs))}, not {subnet.input}"

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "widths": {name: list(sizes) for name, sizes in self.widths.items()},
            "depths": {name: list(blocks) for name, blocks in self.depths.items()},
            "kernels": {name: list(sizes) for name, sizes in self.kernels.items()},
            "inputs": list(self.inputs),
            **({"among": [one.to_json() for one in self.among]} if self.among else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        """What :meth:`to_json` wrote."""
        return cls(
            {name: tuple(map(int, sizes)) for name, sizes in data["widths"].items()},
            {name: tuple(blocks) for name, blocks in data["depths"].items()},
            {name: tuple(map(int, sizes)) for name, sizes in data["kernels"].items()},
            tuple(map(float, data["inputs"])),
            tuple(map(Subnet.from_json, data.get("among", ()))),
        )


def _near(level: float, spread: float, rng: Random) -> float:
    """A number between 0 and 1 around a level; what would lie beyond an end is that end."""
    return min(max(level + spread * (rng.random() - rng.random()), 0.0), 1.0)


def mark(space: Space | None) -> SetAttr:
    """The edit by which a space travels with its supernet; None: it is a supernet no longer."""
    return SetAttr(path="", name=_ATTRIBUTE, value=None if space is None else space.to_json())


def space_of_supernet(model: Model) -> Space | None:
    """The space that a supernet was trained for; None where the model is no supernet (any more).

    It is read from the edits, since a module whose code became data has lost its attributes.
    """
    for edit in reversed(model.edits):
        if isinstance(edit, SetAttr) and edit.path == "" and edit.name == _ATTRIBUTE:
            return None if edit.value is None else Space.from_json(edit.value)
    return None
