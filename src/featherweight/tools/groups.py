"""Channel groups: the indices of many tensors that must go together, as data that prints.

A group has ``size`` channels. Each of its members is one axis of one parameter or buffer, and says for every
channel which indices of that axis go with it: one for a convolution's filter, the four gates' rows for a unit
of an LSTM, all rows of a head, several columns where maps are concatenated or flattened. The same index may
belong to channels of two groups (a head, and a position inside of all heads): it goes when either goes.

Finding groups (``channels.py``), scoring channels (``importance.py``), choosing (``selection.py``) and
cutting (``cutting.py``) are four acts; see Fang et al. 2023 (DepGraph, arXiv:2301.12900).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["writes", "carries", "reads"]
GroupKind = Literal["channel", "head", "head_dim", "hidden", "group"]
Indices = tuple[tuple[int, ...], ...]  # channel -> indices of an axis


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer that a group's channels are on.

    Attributes:
        tensor: Its (first) name in the module.
        axis: Which axis.
        indices: Channel -> the indices that go with it.
        role: ``writes``: makes the channels (a filter, a row of a matrix, its bias); ``carries``: acts on
            each alone (norms, depthwise filters, slopes); ``reads``: uses them up (columns of a matrix).
        layer: Path of the layer that owns it; '' is the root.
        node: Name of the call that uses it (the first one).
    """

    tensor: str
    axis: int
    indices: Indices
    role: Role
    layer: str
    node: str


@dataclass(frozen=True)
class Place:
    """One axis of a traced value that a group's channels are on.

    Attributes:
        value: Traced name.
        axis: Which axis.
        indices: Channel -> the indices that are it.
    """

    value: str
    axis: int
    indices: Indices


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be removed one by one, each with everything that belongs to it.

    Attributes:
        name: Path of the layer that writes it first, with ':head' and the like where it has several.
        kind: ``channel``; ``head`` (whole heads of attention), ``head_dim`` (one position of all heads),
            ``hidden`` (units of a recurrent layer), ``group`` (whole groups of a grouped convolution).
        size: How many channels there are; at least one must stay.
        members: Parameters and buffers.
        places: Traced values, by entry.
    """

    name: str
    kind: GroupKind
    size: int
    members: tuple[Member, ...]
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)

    def of(self, role: Role) -> tuple[Member, ...]:
        """The members of one role."""
        return tuple(member for member in self.members if member.role == role)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that it touches, in order."""
        return tuple(dict.fromkeys(member.layer for member in self.members))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.size} x {self.kind}"]
        for member in self.members:
            each = {len(indices) for indices in member.indices}
            many = f", {min(each)}" if each != {1} else ""
            many += f" to {max(each)} indices each" if len(each) > 1 else " indices each" if many else ""
            lines.append(f"  {member.role:<7} {member.tensor} axis {member.axis}{many}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Channels:
    """What of a model can be cut, and why the rest cannot.

    Attributes:
        groups: By name.
        fixed: Layer path -> why its output channels are in no group, for the user.
    """

    groups: Mapping[str, ChannelGroup]
    fixed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(
            [*map(str, self.groups.values()), *(f"{k}: fixed, {v}" for k, v in self.fixed.items())]
        )
