"""Attention, rotary embeddings and causal convolutions with a state (opsets 23 and later).

Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245; rotary
embeddings: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError
from featherweight.exchange.onnx_in.operators.casts import numpy_type


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(N, T, heads * size) -> (N, heads, T, size)."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """(N, heads, T, size) -> (N, T, heads * size)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def repeated(x: Tensor, times: int) -> Tensor:
    """Each key or value head as often as queries share it."""
    return x if times == 1 else x.repeat_interleave(times, 1)


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where attention is allowed, minus infinity elsewhere."""
    return torch.where(allowed, 0.0, -torch.inf).to(dtype)


@dataclass(frozen=True)
class _Attention:
    """One node's settings, as the specification names them."""

    query_heads: int
    key_heads: int
    causal: bool
    scale: float | None
    softcap: float
    precision: torch.dtype | None
    mode: int
    left: int
    right: int
    asked: int  # outputs that somebody reads

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        past_key: Tensor | None,
        past_value: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        flat = query.dim() == 3
        if flat:
            query = heads_first(query, self.query_heads)
            key, value = heads_first(key, self.key_heads), heads_first(value, self.key_heads)
        past = 0 if past_key is None else past_key.shape[2]
        if past_key is not None and past_value is not None:
            key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
        bias = self._bias(query, key, mask, past, lengths)
        share = query.shape[1] // key.shape[1]
        scale = self.scale if self.scale is not None else 1 / math.sqrt(query.shape[3])
        scores = torch.matmul(query * scale, repeated(key, share).transpose(2, 3))
        seen = scores
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        seen = scores if self.mode in (0, 1) else seen
        if bias is not None:
            scores = scores + bias
        seen = scores if self.mode == 2 else seen
        shares = torch.softmax(scores, -1, dtype=self.precision)
        if mask is not None or lengths is not None or self.left >= 0 or self.right >= 0:
            assert bias is not None  # a row without any key gives zeros, not NaN
            shares = torch.where(torch.amax(bias, -1, keepdim=True) == -torch.inf, 0.0, shares)
        shares = shares.to(query.dtype)
        seen = shares if self.mode == 3 else seen
        result = torch.matmul(shares, repeated(value, share))
        result = heads_last(result) if flat else result
        return (result, key, value, seen) if self.asked > 1 else result

    def _bias(
        self, query: Tensor, key: Tensor, mask: Tensor | None, past: int, lengths: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores; None: nothing."""
        keys, bias = key.shape[2], None
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = bias_of(mask, query.dtype)
            short = keys - mask.shape[-1]
            bias = F.pad(mask, (0, short), value=-torch.inf) if type(short) is not int or short else mask
        if self.causal or self.left >= 0 or self.right >= 0:
            rows = torch.arange(query.shape[2])[:, None] + past
            if lengths is not None:
                rows = rows + (lengths.reshape(-1, 1, 1, 1) - query.shape[2])
            distance = rows - torch.arange(keys)
            allowed = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            allowed = allowed & (distance <= self.left) if self.left >= 0 else allowed
            allowed = allowed & (-distance <= self.right) if self.right >= 0 else allowed
            frontier = bias_of(allowed, query.dtype)
            bias = frontier if bias is None else bias + frontier
        if lengths is not None:
            filled = bias_of(torch.arange(keys) < lengths.reshape(-1, 1, 1, 1), query.dtype)
            bias = filled if bias is None else bias + filled
        return bias


def _attention(node: Node) -> Call:
    wide = node.rank() == 4
    settings = _Attention(
        query_heads=node.shape()[1] if wide else node.integer("q_num_heads", 0),
        key_heads=node.shape(1)[1] if wide else node.integer("kv_num_heads", 0),
        causal=bool(node.integer("is_causal", 0)),
        scale=node.number("scale", 0.0) if "scale" in node.attributes else None,
        softcap=node.number("softcap", 0.0),
        precision=host.torch_dtype(numpy_type(node.integer("softmax_precision", 0)))
        if "softmax_precision" in node.attributes
        else None,
        mode=node.integer("qk_matmul_output_mode", 0),
        left=node.integer("left_window_size", -1),
        right=node.integer("right_window_size", -1),
        asked=sum(bool(name) for name in node.outputs[1:]) + 1,
    )
    if settings.query_heads < 1 or settings.key_heads < 1 or settings.query_heads % settings.key_heads:
        raise UnsupportedError(f"{settings.query_heads} heads of queries share {settings.key_heads} of keys")
    return Call(settings, inputs=(0, 1, 2, 3, 4, 5, 6))


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of features; cosine and sine broadcast to half of the last axis."""
    width = 2 * cosine.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, -1)
    real, imaginary = cosine * first - sine * second, sine * first + cosine * second
    if interleaved:
        turned = torch.stack((real, imaginary), -1).flatten(-2)
    else:
        turned = torch.cat((real, imaginary), -1)
    return torch.cat((turned, rest), -1) if width < x.shape[-1] else turned


def _rotary(node: Node) -> Call:
    heads, width = node.integer("num_heads", 0), node.integer("rotary_embedding_dim", 0)
    interleaved = bool(node.integer("interleaved", 0))

    def run(x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None) -> Tensor:
        flat = x.dim() == 3
        work = heads_first(x, heads) if flat else x
        if positions is not None:
            cosine, sine = F.embedding(positions, cosine), F.embedding(positions, sine)
        half = width // 2 or work.shape[-1] // 2
        cosine, sine = cosine[..., :half].unsqueeze(1), sine[..., :half].unsqueeze(1)
        turned = rotated(work, cosine, sine, interleaved)
        return heads_last(turned) if flat else turned

    return Call(run, inputs=(0, 1, 2, 3))


def _causal_conv(node: Node) -> Call:
    kind = node.text("activation", "none")
    if kind not in ("none", "silu", "swish"):
        raise UnsupportedError(f"its activation is '{kind}'")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
        back = weight.shape[2] - 1
        wide = F.pad(x, (back, 0)) if past is None else torch.cat((past, x), 2)
        result = F.conv1d(wide, weight, bias, groups=x.shape[1])
        present = wide[:, :, wide.shape[2] - back :]
        return result if kind == "none" else F.silu(result), present

    return Call(run, inputs=(0, 1, 2, 3))


ENTRIES: dict[str, Entry] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "CausalConvWithState": _causal_conv,
}
