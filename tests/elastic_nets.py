"""Networks of every graph shape, for tests of what is elastic in them."""

from __future__ import annotations

import torch
from torch import Tensor

import golden
import language_nets
from featherweight.model import Model
from nets import NETS

ALL = [*NETS, "encoder", "LSTM", "GRU both"]


def model(name: str) -> Model:
    """A golden net, or one of the language nets."""
    if name == "encoder":
        return language_nets.encoder()
    if name in ("LSTM", "GRU both"):
        return language_nets.recurrent(name.split()[0], "both" in name)
    return golden.model(name)


def inputs(net: Model) -> tuple[Tensor, ...]:
    """Example inputs of a net's first entry."""
    return next(iter(net.entries.values())).example_inputs


def outputs(net: Model, *given: Tensor) -> list[Tensor]:
    """What the net makes in inference mode."""
    with torch.no_grad():
        made = net.module.eval()(*given)
    return list(made) if isinstance(made, tuple) else [made]
