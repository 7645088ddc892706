"""The golden nets as models, with data and formats, each made once a session: tests only read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.engine.run import TargetSupports
from featherweight.exchange.key import root_key
from featherweight.method import Context
from featherweight.methods.fold import Fold
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target
from featherweight.side_by_side import side_by_side
from nets import NETS


def model_of(module: nn.Module, *examples: Tensor, outputs: int = 1, method: str = "forward") -> Model:
    """A module as the loader would hand it over: dynamic batch, one entry."""
    names = tuple(f"x{index}" if index else "x" for index in range(len(examples)))
    entry = Entry(
        example_inputs=examples,
        input_names=names,
        output_names=tuple(f"y{index}" if index else "y" for index in range(outputs)),
        dynamic_axes={name: {0: "batch"} for name in names},
        method=method,
    )
    entries = {"forward": entry}
    return Model(module.eval(), entries, key=root_key(module, entries))


def target(runtime: str = "onnxruntime", isa: str = "", options: Mapping[str, Any] | None = None) -> Target:
    """One thread of this machine."""
    return Target(runtime, isa, 1, options=options or {}).resolved()


def context(model: Model, data: Data, where: Target | None = None, seed: int = 0) -> Context:
    """What the engine would hand to a method."""
    where = where or target()
    return Context(
        models={"original": model},
        data=data,
        target=where,
        supports=TargetSupports(find_runtime(where.runtime), where),
        seed=seed,
    )


@cache
def model(name: str) -> Model:
    """A golden net as it comes."""
    module, example = NETS[name]()
    return model_of(module, example)


@cache
def inputs(name: str, count: int = 32, seed: int = 1) -> np.ndarray:
    """Random examples of a golden net's shape."""
    shape = model(name).entries["forward"].example_inputs[0].shape[1:]
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


@cache
def data(name: str) -> Data:
    """Examples to score, and others to calibrate and train with."""
    labels = np.arange(16) % 10
    return Data.of(inputs(name, 16, 2), labels, x_train=inputs(name, 32, 1), y_train=np.arange(32) % 10)


@cache
def folded(name: str) -> Model:
    """A golden net without batch norms where they fold."""
    return Fold().apply(model(name), context(model(name), data(name)))


@cache
def quantized(name: str, runtime: str = "onnxruntime") -> Model:
    """A golden net folded, then quantized for a runtime on this machine with the defaults."""
    return Quantize().apply(folded(name), context(folded(name), data(name), target(runtime)))


KINDS: Mapping[str, Callable[[str, str], Model]] = {"float": lambda name, _: model(name), "int8": quantized}


def typical_decibels(signal: np.ndarray | Tensor, other: np.ndarray | Tensor) -> float:
    """The least of all examples but one in eight: values on an edge of integers may fall to either side."""
    each = sorted(decibels(one, two) for one, two in zip(signal, other, strict=True))
    return each[len(each) // 8]


def decibels(signal: np.ndarray | Tensor, other: np.ndarray | Tensor) -> float:
    """Signal-to-noise ratio of a tensor against another one."""
    one, two = (torch.as_tensor(np.asarray(x)).double() for x in (signal, other))
    return float(10 * torch.log10(one.square().sum() / (one - two).square().sum().clamp(min=1e-30)))


@cache
def another(name: str, seed: int = 5) -> Model:
    """The same golden net as if it had been trained for another task."""
    module, example = NETS[name]()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.std().item() if parameter.numel() > 1 else 0.1
            parameter.add_(0.3 * (spread or 0.1) * torch.randn(parameter.shape, generator=drawn))
    return model_of(module, example)


@cache
def beside(name: str) -> Model:
    """A golden net and another one of its kind, side by side."""
    both = side_by_side({"one": model(name), "other": another(name)})
    return both.evolve(key=root_key(both.module, both.entries))
