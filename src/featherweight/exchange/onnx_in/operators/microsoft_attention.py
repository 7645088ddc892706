"""The attention operators of com.microsoft: their projections are linear layers, the rest are functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight, blank
from featherweight.exchange.onnx_in.operators.attention import (
    bias_of,
    heads_first,
    heads_last,
    repeated,
    rotated,
)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, softcap: float = 0.0
) -> Tensor:
    """Heads first in, heads last out: (N, heads, T, size) -> (N, T, heads * size)."""
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    scores = torch.matmul(query, key.transpose(2, 3)) * factor
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return heads_last(torch.matmul(torch.softmax(scores, -1), value))


def _causal(rows: Tensor, keys: int, filler: float) -> Tensor:
    """What is added where a key comes after its query; ``rows`` are the queries' positions."""
    return torch.where(torch.arange(keys) <= rows[..., None], 0.0, filler)


def _key_mask(mask: Tensor, keys: int, filler: float) -> Tensor:
    """Key lengths (N,), or masks (N, keys), (N, T, keys), as something to add to scores."""
    if mask.dim() == 1:
        allowed = (torch.arange(keys) < mask[:, None])[:, None, None]
    else:
        allowed = {2: lambda: mask[:, None, None], 3: lambda: mask[:, None]}.get(
            mask.dim(), lambda: mask
        )() > 0
    return torch.where(allowed, 0.0, filler)


def _added(*terms: Tensor | None) -> Tensor | None:
    found = [term for term in terms if term is not None]
    total = found[0] if found else None
    for term in found[1:]:
        total = term if total is None else total + term
    return total


class PackedAttention(nn.Module):
    """com.microsoft.Attention: one linear layer makes queries, keys and values."""

    def __init__(
        self,
        linear: nn.Module,
        sizes: tuple[int, ...],
        heads: int,
        causal: bool,
        scale: float | None,
        filler: float,
    ) -> None:
        super().__init__()
        self.qkv = linear
        self.sizes, self.heads, self.causal, self.scale, self.filler = sizes, heads, causal, scale, filler

    def forward(
        self, x: Tensor, mask: Tensor | None, past: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (
            heads_first(part, self.heads) for part in torch.split(self.qkv(x), list(self.sizes), -1)
        )
        before = 0 if past is None else past.shape[3]
        if past is not None:
            key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        keys = key.shape[2]
        masked = None if mask is None else _key_mask(mask, keys, self.filler)
        if self.causal:
            rows = torch.arange(query.shape[2]) + before
            masked = _added(masked, _causal(rows, keys, self.filler))
        return _attend(query, key, value, _added(masked, bias), self.scale), torch.stack((key, value))


def _attention(node: Node) -> Call:
    weight = node.fixed(1, "weight")
    sizes = node.integers("qkv_hidden_sizes") or (weight.shape[1] // 3,) * 3
    if node.integer("do_rotary", 0) or node.integer("past_present_share_buffer", 0) or node.has(6):
        raise UnsupportedError("it rotates, or shares the buffer of its past")
    linear = blank(nn.Linear, *weight.shape, bias=node.has(2))
    layer = PackedAttention(
        linear,
        tuple(sizes),
        node.integer("num_heads", 1),
        bool(node.integer("unidirectional", 0)),
        node.number("scale", 0.0) or None,
        node.number("mask_filter_value", -10000.0),
    )
    weights = [Weight("qkv.weight", 1, "transposed", np.transpose)]
    if node.has(2):
        weights.append(Weight("qkv.bias", 2))
    return Call(layer, inputs=(0, 3, 4, 5), weights=tuple(weights))


def _multi_head(node: Node) -> Call:
    heads, causal = node.integer("num_heads", 1), bool(node.integer("unidirectional", 0))
    scale, filler = node.number("scale", 0.0) or None, node.number("mask_filter_value", -10000.0)
    if node.rank() != 3 or not node.has(1) or not node.has(2):
        raise UnsupportedError("its queries, keys and values are packed into one tensor")

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        padding: Tensor | None,
        more: Tensor | None,
        past_key: Tensor | None,
        past_value: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if bias is not None:
            width = query.shape[-1]
            query = query + bias[:width]
            key = key + bias[width : 2 * width] if key.dim() == 3 else key
            value = value + bias[2 * width :] if value.dim() == 3 else value
        queries = heads_first(query, heads)
        keys, values = (heads_first(x, heads) if x.dim() == 3 else x for x in (key, value))
        before = 0
        if past_key is not None and past_value is not None:
            before = past_key.shape[2]
            keys, values = torch.cat((past_key, keys), 2), torch.cat((past_value, values), 2)
        masked = None if padding is None else _key_mask(padding, keys.shape[2], filler)
        if causal:
            rows = torch.arange(queries.shape[2]) + before
            masked = _added(masked, _causal(rows, keys.shape[2], filler))
        return _attend(queries, keys, values, _added(masked, more), scale), keys, values

    return Call(run, inputs=tuple(range(8)))


@dataclass(frozen=True)
class _Grouped:
    """com.microsoft.GroupQueryAttention with the cache that grows by what is new."""

    heads: int
    key_heads: int
    scale: float | None
    softcap: float
    window: int
    rotary: bool
    interleaved: bool

    def __call__(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        past_key: Tensor | None,
        past_value: Tensor | None,
        lengths: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if key is None or value is None:
            size = query.shape[-1] // (self.heads + 2 * self.key_heads)
            sizes = [self.heads * size, self.key_heads * size, self.key_heads * size]
            query, key, value = torch.split(query, sizes, -1)
        queries = heads_first(query, self.heads)
        keys, values = heads_first(key, self.key_heads), heads_first(value, self.key_heads)
        new = queries.shape[2]
        before = lengths.reshape(-1, 1).to(torch.int64) + 1 - new  # tokens in the cache, each example's own
        if past_key is None or past_key.shape[2] == 0:
            before = torch.zeros_like(before)
        rows = before + torch.arange(new)
        if self.rotary and cosine is not None and sine is not None:
            turn = [F.embedding(rows, table).unsqueeze(1) for table in (cosine, sine)]
            queries = rotated(queries, turn[0], turn[1], self.interleaved)
            keys = rotated(keys, turn[0], turn[1], self.interleaved)
        if past_key is not None and past_value is not None:
            keys, values = torch.cat((past_key, keys), 2), torch.cat((past_value, values), 2)
        distance = rows[:, None, :, None] - torch.arange(keys.shape[2])
        allowed = distance >= 0
        if self.window > 0:
            allowed = allowed & (distance < self.window)
        share = self.heads // self.key_heads
        mixed = _attend(
            queries,
            repeated(keys, share),
            repeated(values, share),
            bias_of(allowed, queries.dtype),
            self.scale,
            self.softcap,
        )
        return mixed, keys, values


def _grouped(node: Node) -> Call:
    past = node.shape(3)[2] if node.has(3) else 0
    new = node.shape()[1]
    known = node.constant(6)
    total = known
    if known is None and node.has(6):
        value = node.examples[node.inputs[6]]
        total = value if isinstance(value, np.ndarray) else host.array_of(value)
    if total is not None and int(total.reshape(-1)[0]) != past + new:
        raise UnsupportedError("its cache is a buffer that is longer than what is in it")
    unread = [index for index in range(9, len(node.inputs)) if node.has(index)]
    if unread or node.integer("smooth_softmax", 0):
        raise UnsupportedError("it has positions, a bias or a smooth softmax of its own")
    settings = _Grouped(
        node.integer("num_heads", 1),
        node.integer("kv_num_heads", 1),
        node.number("scale", 0.0) or None,
        node.number("softcap", 0.0),
        node.integer("local_window_size", -1),
        bool(node.integer("do_rotary", 0)),
        bool(node.integer("rotary_interleaved", 0)),
    )
    return Call(settings, inputs=(0, 1, 2, 3, 4, 5, 7, 8))


def _rotary(node: Node) -> Call:
    heads, width = node.integer("num_heads", 0), node.integer("rotary_embedding_dim", 0)
    interleaved, factor = bool(node.integer("interleaved", 0)), node.number("scale", 1.0)
    flat = node.rank() == 3
    if node.integer("is_packed_batching", 0) or factor != 1.0:
        raise UnsupportedError("it packs its batches, or scales")
    if flat and not heads:
        heads = node.shape()[2] // (2 * node.shape(2)[1]) if not width else 0
    if flat and not heads:
        raise UnsupportedError("it does not say how many heads there are")

    def run(x: Tensor, positions: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        work = heads_first(x, heads) if flat else x
        where = positions + torch.arange(work.shape[2]) if positions.dim() == 1 else positions
        where = where if where.dim() == 2 else where[None]
        turn = [F.embedding(where, table).unsqueeze(1) for table in (cosine, sine)]
        turned = rotated(work, turn[0], turn[1], interleaved)
        return heads_last(turned) if flat else turned

    return Call(run, inputs=(0, 1, 2, 3))


ENTRIES: dict[str, Entry] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
    "RotaryEmbedding": _rotary,
}
