"""More networks to cut: one for each way in which published architectures move channels about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Selective(nn.Module):
    """Branches stacked and weighed by a softmax over branches, as in SKNet."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 5, padding=2)
        self.squeeze, self.gates = nn.Linear(12, 6), nn.Linear(6, 24)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.gates(F.relu(self.squeeze(both.sum(1).mean((2, 3))))).view(-1, 2, 12).softmax(1)
        return self.head((both * weights[..., None, None]).sum(1).mean((2, 3)))


class Hierarchical(nn.Module):
    """Quarters of the maps that are filtered one after another, as in Res2Net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.inner = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = F.relu(self.stem(x)).split(4, 1)
        made = [first]
        for conv, part in zip(self.inner, rest, strict=True):
            made.append(F.relu(conv(part + made[-1])))
        return self.head(torch.cat(made, 1).mean((2, 3)))


class Rotary(nn.Module):
    """Rotated queries and keys, kv heads expanded to those of the queries, as in LLaMA; token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.q, self.k, self.v = (nn.Linear(32, size, bias=False) for size in (32, 16, 16))
        self.out, self.head = nn.Linear(32, 32), nn.Linear(32, 5)
        self.register_buffer("rates", 100.0 ** (-torch.arange(0, 8, 2) / 8))

    def _turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.rates
        angles = torch.cat([angles, angles], -1)
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angles.cos() + turned * angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self._turn(q), self._turn(k)
        k, v = (one[:, :, None].expand(n, 2, 2, t, 8).reshape(n, 4, t, 8) for one in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(n, t, 32)))


class LinearAttention(nn.Module):
    """Channels that attend to channels, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 3, 2, 1)
        self.qkv = nn.Conv2d(16, 48, 1, bias=False)
        self.out, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, c, h, w = x.shape
        q, k, v = (part.reshape(n, 4, 4, h * w) for part in self.qkv(x).chunk(3, 1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        mixed = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.head((x + self.out(mixed.reshape(n, c, h, w))).mean((2, 3)))


class Lines(nn.Module):
    """Columns of maps read by a bidirectional LSTM, as in CRNN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, (4, 1), 1)
        self.lstm = nn.LSTM(16, 10, bidirectional=True)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        n, c, h, w = y.shape
        return self.head(self.lstm(y.permute(3, 0, 1, 2).reshape(w, n, c * h))[0])


class Cells(nn.Module):
    """Steps of a GRU and an LSTM written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRUCell(4, 8), nn.LSTMCell(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, out = x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 6)
        memory = torch.zeros_like(out)
        for step in range(3):
            hidden = self.first(x[:, step], hidden)
            out, memory = self.second(hidden, (out, memory))
        return self.head(out)


class Matrices(nn.Module):
    """Parameters without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(12))
        self.second = nn.Parameter(torch.randn(5, 12))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.addmm(self.bias, x, self.first)) @ self.second.t())


class Pieces(nn.Module):
    """Maxima of three, halves that gate halves, maps multiplied with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.gated = nn.Linear(6, 24), nn.Linear(8, 12)
        self.conv, self.head = nn.Linear(6, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.gated(self.three(x).view(-1, 8, 3).max(-1)[0]))
        z = self.conv(y)
        z = torch.where(z > 0, z, -z)
        return self.head((z[:, :, None] * z[:, None]).flatten(1))


def _ids() -> Tensor:
    return torch.arange(12).reshape(2, 6)


MORE_NETS: dict[str, tuple[type[nn.Module], Callable[[], Tensor]]] = {
    "selective": (Selective, lambda: torch.randn(2, 3, 8, 8)),
    "hierarchical": (Hierarchical, lambda: torch.randn(2, 3, 8, 8)),
    "rotary": (Rotary, _ids),
    "linear_attention": (LinearAttention, lambda: torch.randn(2, 3, 8, 8)),
    "lines": (Lines, lambda: torch.randn(2, 1, 8, 12)),
    "cells": (Cells, lambda: torch.randn(2, 3, 4)),
    "matrices": (Matrices, lambda: torch.randn(2, 6)),
    "pieces": (Pieces, lambda: torch.randn(2, 6)),
}
