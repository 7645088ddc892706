"""Golden nets in few bits, for the tests of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from featherweight.formats import IntQuant, PerTensor, TensorFormat
from featherweight.model import Model
from featherweight.tools.ranges import weight_range
from featherweight.tools.simulate import simulate
from golden import folded, inputs, quantized


@cache
def in_few_bits(net: str, width: int = 4, activations: int = 8) -> Model:
    """A golden net whose weights have so many bits, per channel; activations as asked."""
    model = quantized(net)
    formats: dict[str, tuple[TensorFormat, ...]] = {}
    narrower: dict[int, TensorFormat] = {}  # values that share a format go on sharing it
    for name, (fmt,) in model.formats.items():
        assert isinstance(fmt, IntQuant)
        if name in model.parameters:
            draft = replace(fmt, width=width, symmetric=True, signed=True)
            low, high = weight_range(model.parameters[name], draft, "mse", 100.0)
            formats[name] = (replace(draft, low=low, high=high),)
        else:
            assert isinstance(fmt.granularity, PerTensor)
            formats[name] = (narrower.setdefault(id(fmt), replace(fmt, width=activations)),)
    return model.evolve(formats=formats)


def weights_of(model: Model) -> list[str]:
    """Parameters with formats."""
    return [name for name in model.formats if name in model.parameters]


def calibration(net: str, count: int = 32, size: int = 8) -> list[tuple[Tensor, ...]]:
    """Batches of a golden net's inputs, neighbours alike."""
    return [(part,) for part in smooth(net, count, 1).split(size)]


def smooth(net: str, count: int, seed: int) -> Tensor:
    """Noise whose neighbours along the last axes are alike, as those of pictures are, with a mean."""
    x = torch.from_numpy(inputs(net, count, seed))
    axes = range(2, x.dim())
    for axis in axes:
        x = x + x.roll(1, axis) + x.roll(2, axis)
    return x / 3 ** (len(axes) / 2) + 0.5


def with_values(
    model: Model,
    parameters: Mapping[str, Tensor],
    formats: Mapping[str, tuple[TensorFormat, ...]] | None = None,
) -> Model:
    """A copy with other parameters and formats."""
    module = model.copy_module()
    with torch.no_grad():
        for name, value in parameters.items():
            module.get_parameter(name).copy_(value)
    return model.evolve(module=module, formats={**model.formats, **(formats or {})})


def output_error(model: Model, net: str, seed: int = 5) -> float:
    """Mean squared error against the float net, on other examples than the calibration's."""
    x = smooth(net, 64, seed)
    with torch.inference_mode():
        made = simulate(model)(x)[0].numpy()
        wanted = folded(net).module(x).numpy()
    return float(np.square(made - wanted).mean())
