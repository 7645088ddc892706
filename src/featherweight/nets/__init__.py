"""Small networks of the field, built for a number of channels, classes and a resolution.

``build("mobilenetv2:width=0.35", channels=1, classes=10, resolution=28)`` gives an untrained ``nn.Module``
of plain torch layers. What it may be called and how it may be set is in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Literal

from torch import nn

from featherweight.errors import RecipeError, nearest
from featherweight.nets.ds_cnn import ds_cnn, ds_cnn_1d
from featherweight.nets.efficientnet_lite import efficientnet_lite
from featherweight.nets.mobilenet_v1 import mobilenet_v1
from featherweight.nets.mobilenet_v2 import mobilenet_v2
from featherweight.nets.mobilenet_v3 import mobilenet_v3
from featherweight.nets.shufflenet_v1 import shufflenet_v1
from featherweight.nets.shufflenet_v2 import shufflenet_v2
from featherweight.nets.vit import vit

__all__ = [
    "FAMILIES",
    "Family",
    "build",
    "ds_cnn",
    "ds_cnn_1d",
    "efficientnet_lite",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3",
    "shufflenet_v1",
    "shufflenet_v2",
    "vit",
]


@dataclass(frozen=True)
class Family:
    """A kind of network.

    Attributes:
        name: As a spec begins.
        build: Makes one: keywords of its settings, ``resolution``, ``channels`` and ``classes``.
        widths: Multipliers of its channels that are worth trying, narrow ones first.
        paper: Where it is from.
        inputs: ``picture``: (batch, channels, height, width); ``signal``: (batch, channels, length).
    """

    name: str
    build: Callable[..., nn.Module]
    widths: tuple[float, ...]
    paper: str
    inputs: Literal["picture", "signal"]

    @property
    def settings(self) -> tuple[str, ...]:
        """What a spec may set."""
        names = signature(self.build).parameters
        return tuple(name for name in names if name in _READ)


_READ: Mapping[str, Callable[[str], float | str]] = MappingProxyType(
    {"size": str, "groups": int, "width": float, "depth": float, "kernel": int, "patch": int, "heads": int}
)
_EFFICIENTNET = "Tan and Le 2019, arXiv:1905.11946; tensorflow/tpu 2020"
_HELLO = "Zhang et al. 2017, arXiv:1711.07128"
_V3 = "Howard et al. 2019, arXiv:1905.02244"
_NARROW = (0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0)
_WIDER = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family("mobilenetv1", mobilenet_v1, _NARROW, "Howard et al. 2017, arXiv:1704.04861", "picture"),
            Family(
                "mobilenetv2",
                mobilenet_v2,
                (*_NARROW, 1.4),
                "Sandler et al. 2018, arXiv:1801.04381",
                "picture",
            ),
            Family("mobilenetv3-small", partial(mobilenet_v3, "small"), _NARROW, _V3, "picture"),
            Family("mobilenetv3-large", partial(mobilenet_v3, "large"), _NARROW, _V3, "picture"),
            Family(
                "shufflenetv1",
                shufflenet_v1,
                _WIDER,
                "Zhang et al. 2017, arXiv:1707.01083",
                "picture",
            ),
            Family(
                "shufflenetv2",
                shufflenet_v2,
                _WIDER,
                "Ma et al. 2018, arXiv:1807.11164",
                "picture",
            ),
            *(
                Family(
                    f"efficientnet-lite{variant}",
                    partial(efficientnet_lite, variant),
                    _NARROW,
                    _EFFICIENTNET,
                    "picture",
                )
                for variant in range(5)
            ),
            Family("ds-cnn", ds_cnn, _WIDER, _HELLO, "picture"),
            Family("ds-cnn-1d", ds_cnn_1d, _WIDER, _HELLO, "signal"),
            Family(
                "vit",
                vit,
                (1 / 6, 1 / 3, 2 / 3, 1.0, 2.0),
                "Dosovitskiy et al. 2020, arXiv:2010.11929",
                "picture",
            ),
        )
    }
)


def build(spec: str, *, channels: int, classes: int, resolution: int | tuple[int, ...]) -> nn.Module:
    """An untrained network from a line such as ``mobilenetv2:width=0.35,depth=0.5,kernel=3``.

    Args:
        spec: A family, then its settings.
        channels: Of the input.
        classes: Outputs.
        resolution: Side or sides of the pictures, or the length of a signal.

    Raises:
        RecipeError: There is no such family or setting, or a value is out of its range.
    """
    name, _, rest = spec.strip().partition(":")
    family = FAMILIES.get(name.strip())
    if family is None:
        raise RecipeError(
            f"there is no network '{name.strip()}'", where=f"'{spec}'", fix=nearest(name, FAMILIES)
        )
    axes = 1 if isinstance(resolution, int) else len(resolution)
    if family.inputs == "signal" and axes != 1:
        raise RecipeError(
            f"{family.name} is for signals of one axis; the examples have {axes}",
            where=f"'{spec}'",
            fix=f"a network for pictures: {', '.join(_for('picture'))}",
        )
    if family.inputs == "picture" and not isinstance(resolution, int) and axes != 2:
        raise RecipeError(
            f"{family.name} is for pictures of two axes; the examples have {axes}",
            where=f"'{spec}'",
            fix=f"a network for signals: {', '.join(_for('signal'))}" if axes == 1 else "another network",
        )
    settings = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, value = _setting(family, item, spec)
        if key in settings:
            raise RecipeError(f"'{key}' is set twice", where=f"'{spec}'", fix="say it once")
        settings[key] = value
    try:
        return family.build(resolution=resolution, channels=channels, classes=classes, **settings)
    except RecipeError as error:
        raise RecipeError(error.what, where=f"'{spec}'", fix=error.fix) from error


def _setting(family: Family, item: str, spec: str) -> tuple[str, float | str]:
    key, _, text = (part.strip() for part in item.partition("="))
    if key not in family.settings:
        raise RecipeError(
            f"{family.name} has no setting '{key}'",
            where=f"'{spec}'",
            fix=f"{nearest(key, family.settings)} (resolution, channels and classes come from the data)",
        )
    read = _READ[key]
    try:
        return key, read(text)
    except ValueError as error:
        raise RecipeError(
            f"{family.name}: {key} is '{text}'",
            where=f"'{spec}'",
            fix=f"a whole number, as in {key}=3" if read is int else f"a number, as in {key}=0.5",
        ) from error


def _for(inputs: str) -> list[str]:
    return [family.name for family in FAMILIES.values() if family.inputs == inputs]
