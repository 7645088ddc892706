"""What formats learn, as parameters: relative sizes of steps, with the gradient scale of LSQ.

A grid of step s that begins at s0 has the parameter r = s / s0, so that one learning rate suits every
tensor of a network under Adam. Its gradient is scaled so that plain gradient descent moves s by exactly what
LSQ says (Esser et al. 2020, arXiv:1902.08153, section 2.2)::

    dr = lr * g / s0² * dL/dr,   g = 1 / sqrt(N * Qp)   =>   ds = lr * g * dL/ds

N elements share the step (of one example, for an activation), Qp is the largest multiple of it. Ranges that
are not symmetric have a parameter for either end; an end at zero stays there.

Centroids of a palette have the parameters r = c / u in units near their root mean square u, with the factor
1 / u²: plain gradient descent moves them by the sum of what moves their members (Han et al. 2016,
arXiv:1510.00149). Tensors that share a codebook share the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.formats import Binary, IntQuant, Palette, TensorFormat, Ternary
from featherweight.straight_through import scaled_gradient

_LEAST = 1e-2  # of the first step, below which none falls


class Learned(nn.Module):
    """A format whose learned tensors are parameters; called, it projects.

    Args:
        fmt: The format that training begins with.
        elements: How many elements share one of its steps.
        fixed: Nothing of it is learned.
    """

    def __init__(self, fmt: TensorFormat, elements: int = 1, fixed: bool = False) -> None:
        super().__init__()
        self.base = fmt
        self.relative = isinstance(fmt, IntQuant | Ternary | Binary)
        self.codebook = fmt.codebook if isinstance(fmt, Palette) and not fixed else ""
        first = {} if fixed else _first(fmt)
        for name, value in first.items():
            unit = _unit(fmt, value.detach())
            begin = torch.ones_like(value) if self.relative else value.detach() / unit
            self.register_parameter(name, nn.Parameter(begin))
            self.register_buffer(f"first_{name}", unit.clone(), persistent=False)
        if first and (self.relative or isinstance(fmt, Palette)):
            self.register_buffer("factor", _factor(fmt, elements), persistent=False)
        self._names = tuple(first)
        self._state, self._numbers = (_state(fmt), _numbers(fmt)) if hasattr(fmt, "advanced") else ((), ())
        for name in self._state:
            self.register_buffer(f"state_{name}", getattr(fmt, name).detach().clone())

    @property
    def readers(self) -> frozenset[str] | None:
        """Operators that read the value as stored; None: all."""
        return getattr(self.base, "readers", None)

    def current(self) -> TensorFormat:
        """The format as it is now, differentiable in the parameters."""
        base: Any = self.base
        if self._state:
            base = replace(base, **{name: getattr(self, f"state_{name}") for name in self._state})
        if not self._names:
            return base  # type: ignore[no-any-return]
        return _with(base, {name: self._value(name) for name in self._names}, self.relative)

    def _value(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        unit = self.get_buffer(f"first_{name}")
        if isinstance(self.base, Palette):
            return scaled_gradient(value, self.get_buffer("factor")) * unit
        if not self.relative:
            return value
        return scaled_gradient(value, self.get_buffer("factor")).clamp(min=_LEAST) * unit

    def get_extra_state(self) -> Tensor:
        """Where a schedule stands: the format's numbers, for ``state_dict``."""
        return torch.tensor([getattr(self.base, name) for name in self._numbers], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with a schedule from there."""
        if self._numbers:
            base: Any = self.base
            now = zip(self._numbers, state.tolist(), strict=True)
            self.base = replace(base, **{name: type(getattr(base, name))(one) for name, one in now})

    def forward(self, x: Tensor) -> Tensor:
        return self.current().project(x)

    project = forward

    @torch.no_grad()
    def advance(self, value: Tensor, fraction: float) -> None:
        """Training is so far (0 to 1); ``value`` is the tensor that the format is of."""
        if not hasattr(self.base, "advanced"):
            return
        self.base = (
            self.base.advanced(value, fraction) if not self._state else self._advanced(value, fraction)
        )

    def _advanced(self, value: Tensor, fraction: float) -> TensorFormat:
        now: Any = self.current()
        made: TensorFormat = now.advanced(value, fraction)
        if made is now:
            return self.base
        for name in self._state:
            setattr(self, f"state_{name}", getattr(made, name).detach().clone())
        return made


def as_data(fmt: TensorFormat) -> TensorFormat:
    """A format that shares no tensor with what is trained, without what only training needs."""
    settled = getattr(fmt, "settled", None)
    fmt = fmt if settled is None else settled()
    plain = {
        one.name: value.detach().clone().cpu()
        for one in fields(fmt)  # type: ignore[arg-type]
        if isinstance(value := getattr(fmt, one.name), Tensor)
    }
    return replace(fmt, **plain) if plain else fmt  # type: ignore[type-var]


def _first(fmt: TensorFormat) -> dict[str, Tensor]:
    """What is learned, as it is at first."""
    if not isinstance(fmt, IntQuant):
        return fmt.learned()
    if fmt.symmetric:
        return {"high": torch.maximum(-fmt.low, fmt.high).clamp(min=0)}
    ends = {"low": fmt.low.clamp(max=0), "high": fmt.high.clamp(min=0)}
    return {name: end for name, end in ends.items() if end.any()}


def _unit(fmt: TensorFormat, value: Tensor) -> Tensor:
    """What a parameter is multiplied by."""
    if isinstance(fmt, Palette):
        size = value.square().mean().sqrt().clamp(min=1e-12)
        return torch.exp2(torch.log2(size).round())  # a power of two, by which dividing loses nothing
    return value if isinstance(fmt, IntQuant | Ternary | Binary) else torch.ones_like(value)


def _with(fmt: TensorFormat, values: Mapping[str, Tensor], relative: bool) -> TensorFormat:
    if not isinstance(fmt, IntQuant):
        return fmt.with_learned(values)
    if fmt.symmetric:
        return fmt.with_learned({"low": -values["high"], "high": values["high"]})
    ends = {"low": fmt.low.clamp(max=0), "high": fmt.high.clamp(min=0)}
    return fmt.with_learned({**ends, **values})


def _factor(fmt: TensorFormat, elements: int) -> Tensor:
    """The gradient's scale of a relative step."""
    if isinstance(fmt, Palette):
        return 1 / _unit(fmt, fmt.centroids.detach()).square()
    if isinstance(fmt, IntQuant):
        step = fmt.grid()[0]
        most = fmt.quant_max - fmt.quant_min
        most = most // 2 if fmt.symmetric else most
    else:
        assert isinstance(fmt, Ternary | Binary)
        step, most = fmt.scale, 1
    if step.numel():
        step = step.clamp(min=max(1e-3 * float(step.max()), 1e-8))  # rows of zeros have next to no step
    return 1 / (step.square() * math.sqrt(max(elements, 1) * most))


def _state(fmt: TensorFormat) -> tuple[str, ...]:
    """Tensors of a format with a schedule that are no parameters: a mask."""
    learned = fmt.learned()
    return tuple(
        one.name
        for one in fields(fmt)  # type: ignore[arg-type]
        if isinstance(getattr(fmt, one.name), Tensor) and one.name not in learned
    )


def _numbers(fmt: TensorFormat) -> tuple[str, ...]:
    """Numbers of a format with a schedule, some of which tell how far it is."""
    return tuple(
        one.name
        for one in fields(fmt)  # type: ignore[arg-type]
        if isinstance(getattr(fmt, one.name), int | float)
    )
