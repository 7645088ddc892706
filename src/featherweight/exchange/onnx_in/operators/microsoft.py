"""Operators of com.microsoft that ONNX Runtime's optimizers leave in a file: fused layers, norms, embeddings.

Those that compute with integers are written as ordinary ones before a graph is built (``onnx_in.quantized``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight, blank
from featherweight.exchange.onnx_in.operators import conv, matmul, norm


def _gelu(_: Node) -> Call:
    return Call(nn.GELU())


def _fast_gelu(node: Node) -> Call:
    if not node.has(1):
        return Call(nn.GELU("tanh"))
    return Call(lambda x, bias: F.gelu(x + bias, approximate="tanh"), inputs=(0, 1))


def _bias_gelu(_: Node) -> Call:
    return Call(lambda x, bias: F.gelu(x + bias), inputs=(0, 1))


def _quick_gelu(node: Node) -> Call:
    alpha = node.number("alpha", 1.702)
    return Call(lambda x: x * torch.sigmoid(alpha * x))


def _activation(node: Node) -> Callable[[Tensor], Tensor]:
    """What a fused operator does to its result."""
    kind = node.text("activation", "")
    given = node.numbers("activation_params") or ()
    alpha = given[0] if given else node.number("activation_alpha", 0.01 if kind == "LeakyRelu" else 0.2)
    beta = given[1] if len(given) > 1 else node.number("activation_beta", 0.5)
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x,
        "Relu": torch.relu,
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
        "LeakyRelu": partial(F.leaky_relu, negative_slope=alpha),
        "Clip": lambda x: torch.clamp(x, alpha, beta),
        "HardSigmoid": lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0),
    }
    if kind not in known:
        raise UnsupportedError(f"its activation is '{kind}'")
    return known[kind]


def _fused_conv(node: Node) -> Call:
    call, after = conv.ENTRIES["Conv"](node), _activation(node)
    if not node.has(3):
        return replace(call, after=after)
    if call.before is not None or isinstance(call.run, nn.Module):
        run = conv.convolved(node, 0, 1)
        return Call(lambda x, weight, bias, more: after(run(x, weight, bias) + more), inputs=(0, 1, 2, 3))
    product = call.run
    return Call(lambda x, weight, bias, more: after(product(x, weight, bias) + more), inputs=(0, 1, 2, 3))


def _fused_gemm(node: Node) -> Call:
    return replace(matmul.ENTRIES["Gemm"](node), after=_activation(node))


def _fused_matmul(node: Node) -> Call:
    alpha = node.number("alpha", 1.0)
    a_turned, b_turned = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    if node.integer("transBatchA", 0) or node.integer("transBatchB", 0):
        raise UnsupportedError("it transposes batches")
    weight = node.constant(1)
    if weight is not None and weight.ndim == 2 and alpha == 1.0 and not a_turned and node.is_float():
        rows, columns = weight.shape if b_turned else weight.shape[::-1]
        layer = blank(nn.Linear, columns, rows, bias=False)
        turn = Weight("weight", 1) if b_turned else Weight("weight", 1, "transposed", np.transpose)
        return Call(layer, weights=(turn,))

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = torch.matmul(a.mT if a_turned else a, b.mT if b_turned else b)
        return product if alpha == 1.0 else product * alpha

    return Call(run, inputs=(0, 1))


def _simplified_norm(node: Node) -> Call:
    """The root mean square is of the axes behind ``axis``, as in RMSNormalization."""
    if any(node.outputs[1:]):
        raise UnsupportedError("somebody reads its statistics")
    return norm.ENTRIES["RMSNormalization"](node)


class SkipNorm(nn.Module):
    """A norm of a sum; also returns the sum."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, skip: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        total = x + skip if bias is None else x + skip + bias
        return self.norm(total), None, None, total


def _skip_norm(node: Node) -> Call:
    if any(node.outputs[1:3]):
        raise UnsupportedError("somebody reads its statistics")
    size, epsilon = node.shape()[-1:], node.number("epsilon", 1e-12)
    simple = node.op == "SkipSimplifiedLayerNormalization"
    bias = 3 if simple else 4
    if not node.all_fixed(2, 2 if simple else 3):
        raise UnsupportedError("its scale is computed while it runs")
    if simple:
        rms = SkipNorm(blank(nn.RMSNorm, size, epsilon))
        return Call(rms, inputs=(0, 1, bias), weights=(Weight("norm.weight", 2),))
    layer = SkipNorm(blank(nn.LayerNorm, size, epsilon, bias=node.has(3)))
    weights = (Weight("norm.weight", 2), Weight("norm.bias", 3))
    return Call(layer, inputs=(0, 1, bias), weights=weights if node.has(3) else weights[:1])


class Embedded(nn.Module):
    """Words, positions and segments embedded, added and normed, as BERT does."""

    def __init__(
        self, word: nn.Module, position: nn.Module, segment: nn.Module | None, norm: nn.Module
    ) -> None:
        super().__init__()
        self.word, self.position, self.segment, self.norm = word, position, segment, norm

    def forward(
        self, ids: Tensor, segments: Tensor | None, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        where = torch.arange(ids.shape[1])[None] if positions is None else positions
        total = self.word(ids) + self.position(where)
        if self.segment is not None and segments is not None:
            total = total + self.segment(segments)
        counted = torch.zeros(ids.shape[0]) if mask is None else mask.sum(1)
        return self.norm(total), counted.to(torch.int32), total


def _embedded_norm(node: Node) -> Call:
    word, position = (blank(nn.Embedding, *node.fixed(index, "table").shape) for index in (2, 3))
    segment = blank(nn.Embedding, *node.fixed(4, "table").shape) if node.has(4) else None
    normed = blank(nn.LayerNorm, node.shape(5), node.number("epsilon", 1e-12))
    weights = [Weight("word.weight", 2), Weight("position.weight", 3)]
    weights += [Weight("segment.weight", 4)] if segment is not None else []
    weights += [Weight("norm.weight", 5), Weight("norm.bias", 6)]
    return Call(Embedded(word, position, segment, normed), inputs=(0, 1, 7, 8), weights=tuple(weights))


def _matmul_few_bits(node: Node) -> Call:
    """Weights of 2, 4 or 8 bits in blocks, dequantized into a linear layer."""
    inner, outputs = node.integer("K", 0), node.integer("N", 0)
    bits, block = node.integer("bits", 4), node.integer("block_size", 32)
    if bits not in (2, 4, 8) or inner < 1 or outputs < 1 or block < 1 or node.has(4):
        raise UnsupportedError(f"it has {bits} bits in blocks of {block}, or an order of its own")
    node.fixed(1, "weight")
    scales = node.fixed(2, "scale").reshape(outputs, -1).astype(np.float32)
    zeros = node.constant(3)
    if zeros is None and node.has(3):
        raise UnsupportedError("its zero points are computed while it runs")

    def unpacked(array: np.ndarray, count: int) -> np.ndarray:
        codes = array.reshape(outputs, -1)[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)
        return (codes & ((1 << bits) - 1)).reshape(outputs, -1)[:, :count].astype(np.float32)

    def apply(array: np.ndarray) -> np.ndarray:
        blocks = scales.shape[1]
        middle = np.full((outputs, blocks), float(1 << (bits - 1)), np.float32)
        if zeros is not None and zeros.dtype == np.uint8:
            middle = unpacked(zeros, blocks)
        elif zeros is not None:
            middle = zeros.reshape(outputs, blocks).astype(np.float32)
        codes = unpacked(array, blocks * block)
        values = (codes.reshape(outputs, blocks, block) - middle[:, :, None]) * scales[:, :, None]
        return np.asarray(values.reshape(outputs, -1)[:, :inner], dtype=np.float32)

    layer = blank(nn.Linear, inner, outputs, bias=node.has(5))
    weights = [Weight("weight", 1, f"{bits} bits by {block}", apply)]
    if node.has(5):
        weights.append(Weight("bias", 5))
    return Call(layer, weights=tuple(weights))


ENTRIES: dict[str, Entry] = {
    "Gelu": _gelu,
    "FastGelu": _fast_gelu,
    "BiasGelu": _bias_gelu,
    "QuickGelu": _quick_gelu,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embedded_norm,
    "MatMulNBits": _matmul_few_bits,
}
