"""A small MobileNet-like classifier of Fashion-MNIST: a tenth of ResNet-20's parameters, random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

_NETS = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "nets.py"
_spec = importlib.util.spec_from_file_location("fashion_mnist_nets", _NETS)
assert _spec is not None and _spec.loader is not None
_nets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_nets)

_BLOCKS = ((16, 2, 3), (16, 1, 3), (24, 2, 3), (24, 1, 3), (24, 1, 3))


def student() -> nn.Module:
    """The classifier, seeded by torch's own generator."""
    net: nn.Module = _nets._init(_nets.DepthwiseNet(stem=12, blocks=_BLOCKS, last=96))
    return net
