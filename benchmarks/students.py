"""A small MobileNet-like classifier of Fashion-MNIST: a tenth of ResNet-20's parameters, random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

_NETS = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "nets.py"
_spec = importlib.util.spec_from_file_location("fashion_mnist_nets", _NETS)
assert _spec is not None and _spec.loader is not None
_nets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_nets)
InvertedResidual = _nets.InvertedResidual


class Student(nn.Module):
    """Inverted residual blocks of widths 12 to 32."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(
            InvertedResidual(12, 16, 2, 3),
            InvertedResidual(16, 16, 1, 3),
            InvertedResidual(16, 24, 2, 3),
            InvertedResidual(24, 24, 1, 3),
            InvertedResidual(24, 24, 1, 3),
        )
        self.conv2 = nn.Conv2d(24, 96, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(96)
        self.relu = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(96, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(self.blocks(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


def student() -> nn.Module:
    """The classifier, seeded by torch's own generator."""
    net = Student()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out" if layer.groups == 1 else "fan_in")
    return net
