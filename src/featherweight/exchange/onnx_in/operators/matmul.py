"""Products of matrices: with a constant matrix they are ``nn.Linear``, which methods know how to shrink."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight, blank


def _matmul(node: Node) -> Call:
    """x W, with a bias as third input where the importer found an Add behind it."""
    weight = node.constant(1)
    if weight is None or weight.ndim != 2 or not node.is_float() or weight.dtype.kind != "f":
        return Call(torch.matmul, inputs=(0, 1))
    layer = blank(nn.Linear, *weight.shape, bias=node.has(2))
    weights = [Weight("weight", 1, "transposed", np.transpose)]
    if node.has(2):
        weights.append(_bias(2, weight.shape[1]))
    return Call(layer, weights=tuple(weights))


def _gemm(node: Node) -> Call:
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    turned_a, turned_b = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    if node.rank(0) != 2 or node.rank(1) != 2:
        raise UnsupportedError("its matrices are not of rank 2")
    weight, bias = node.constant(1), node.constant(2)
    outputs = node.shape(1)[0 if turned_b else 1]
    plain = alpha == 1.0 and (beta == 1.0 or not node.has(2)) and not turned_a and node.is_float()
    if (
        weight is None
        or not plain
        or not node.all_fixed(2)
        or (bias is not None and not _is_row(bias, outputs))
    ):
        function = partial(_gemm_of, alpha=alpha, beta=beta, turned_a=turned_a, turned_b=turned_b)
        return Call(function, inputs=(0, 1, 2))
    layer = blank(nn.Linear, weight.size // max(outputs, 1), outputs, bias=bias is not None)
    weights = [Weight("weight", 1) if turned_b else Weight("weight", 1, "transposed", np.transpose)]
    if bias is not None:
        weights.append(_bias(2, outputs))
    return Call(layer, weights=tuple(weights))


def _is_row(bias: np.ndarray, outputs: int) -> bool:
    return bias.size == 1 or (bias.size == outputs and bias.shape[-1:] == (outputs,))


def _bias(index: int, outputs: int) -> Weight:
    return Weight(
        "bias", index, f"row of {outputs}", lambda array: np.broadcast_to(array.reshape(-1), (outputs,))
    )


def _gemm_of(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, turned_a: bool, turned_b: bool
) -> Tensor:
    product = torch.matmul(a.t() if turned_a else a, b.t() if turned_b else b)
    scaled = product if alpha == 1.0 else alpha * product
    if c is None:
        return scaled
    return scaled + (c if beta == 1.0 else beta * c)


def _einsum(node: Node) -> Call:
    equation = node.text("equation", "")
    return Call(lambda *factors: torch.einsum(equation, *factors), inputs=tuple(range(len(node.inputs))))


def _determinant(_: Node) -> Call:
    return Call(torch.linalg.det)


ENTRIES: dict[str, Entry] = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Det": _determinant}
