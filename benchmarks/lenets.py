"""The two networks of Deep Compression (Han et al. 2016, arXiv:1510.00149), with random weights.

Both take float32 images (N, 1, 28, 28) and return logits (N, 10). LeNet-5 is Caffe's: no padding, one ReLU.
"""

from __future__ import annotations

import torch
from torch import nn

PARAMETERS = {"lenet_300_100": 266_610, "lenet_5": 431_080}


def lenet_300_100() -> nn.Module:
    """784, 300, 100 and 10 units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


class LeNet5(nn.Module):
    """Two convolutions of 5x5 with max pooling, then 500 units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        return self.fc2(self.relu(self.fc1(torch.flatten(x, 1))))


def lenet_5() -> nn.Module:
    """Caffe's LeNet-5."""
    return LeNet5()
