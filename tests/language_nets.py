"""A small encoder whose head is its table, and recurrent layers: what language and sequences are made of."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.model import Model
from golden import model_of


class Encoder(nn.Module):
    """Ids looked up, an encoder block, and a head that shares the table, as language models have it."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.table = nn.Embedding(90, width)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(width, 96), nn.Linear(96, width, bias=False)
        self.head = nn.Linear(width, 90, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class Recurrent(nn.Module):
    """Two layers over (N, 9, 12), and what they say at every step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], both: bool) -> None:
        super().__init__()
        self.layers = kind(12, 16, num_layers=2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(32 if both else 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0])


def _seeded(make: type[nn.Module], *arguments: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments)


@cache
def encoder() -> Model:
    return model_of(_seeded(Encoder), torch.arange(22).reshape(2, 11))


@cache
def recurrent(kind: str, both: bool) -> Model:
    net = _seeded(Recurrent, getattr(nn, kind), both)
    return model_of(net, torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0)))


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 90, (count, 11))


def sequences(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 9, 12)).astype(np.float32)
