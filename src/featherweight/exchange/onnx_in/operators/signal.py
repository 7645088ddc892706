"""Fourier transforms as products with constant matrices, windows, and the filter bank of mel spectra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, check_size
from featherweight.exchange.onnx_in.operators.casts import numpy_type


def _transform(x: Tensor, rows: int, columns: int, inverse: bool) -> Tensor:
    """(..., rows, 1 or 2) -> (..., columns, 2), as a product with a matrix that is known when exported."""
    check_size([rows, columns, 2])
    place = torch.arange(rows, dtype=torch.float64)[:, None] * torch.arange(columns, dtype=torch.float64)
    angle = torch.remainder(place, rows) * (2 * math.pi / rows)
    share = 1 / rows if inverse else 1.0
    cosine, sine = (torch.cos(angle) * share).to(x.dtype), (torch.sin(angle) * share).to(x.dtype)
    sine = sine if inverse else -sine
    real = x[..., 0]
    if x.shape[-1] == 1:
        return torch.stack((torch.matmul(real, cosine), torch.matmul(real, sine)), -1)
    return torch.stack(
        (
            torch.matmul(real, cosine) - torch.matmul(x[..., 1], sine),
            torch.matmul(real, sine) + torch.matmul(x[..., 1], cosine),
        ),
        -1,
    )


def _dft(node: Node) -> Call:
    inverse, onesided = bool(node.integer("inverse", 0)), bool(node.integer("onesided", 0))
    fixed = node.integer("axis", 1) if node.opset < 20 else -2

    def run(x: Tensor, length: host.Host | None, axis: host.Host | None) -> Tensor:
        where = (fixed if axis is None else int(host.to_list(axis)[0])) % x.dim()
        rows = x.shape[where] if length is None else int(host.to_list(length)[0])
        work = x.movedim(where, -2)
        if inverse and onesided:  # half of a spectrum whose other half mirrors it
            rows = 2 * (work.shape[-2] - 1) if length is None else rows
            mirror = torch.flip(work[..., 1 : (rows + 1) // 2, :], (-2,)) * torch.tensor([1.0, -1.0])
            work = torch.cat((work[..., : rows // 2 + 1, :], mirror), -2)
        short = rows - work.shape[-2]
        if short > 0:
            work = torch.nn.functional.pad(work, (0, 0, 0, short))
        work = work[..., :rows, :]
        columns = rows // 2 + 1 if onesided and not inverse else rows
        result = _transform(work, rows, columns, inverse)
        result = result[..., :1] if onesided and inverse else result
        return result.movedim(-2, where)

    return Call(run, inputs=(0, 1, 2), sizes=frozenset({1, 2}))


def _stft(node: Node) -> Call:
    onesided = bool(node.integer("onesided", 1))

    def run(x: Tensor, step: host.Host, window: Tensor | None, length: host.Host | None) -> Tensor:
        if length is None and window is None:
            raise UnsupportedError("it has neither window nor frame_length")
        given = window.shape[0] if length is None and window is not None else None
        size = int(host.to_list(length)[0]) if length is not None else int(given or 0)
        frames = x.unfold(1, size, int(host.to_list(step)[0])).transpose(2, 3)  # (N, frames, size, 1 or 2)
        if window is not None:
            frames = frames * window[:, None]
        columns = size // 2 + 1 if onesided and x.shape[-1] == 1 else size
        return _transform(frames, size, columns, inverse=False)

    return Call(run, inputs=(0, 1, 2, 3), sizes=frozenset({1, 3}))


def _window(*terms: float) -> Entry:
    """A sum of cosines: a0 - a1 cos(2 pi n / N) + a2 cos(4 pi n / N)."""

    def entry(node: Node) -> Call:
        periodic, kind = bool(node.integer("periodic", 1)), numpy_type(node.integer("output_datatype", 1))

        def run(size: host.Host) -> Tensor:
            count = int(host.to_list(size)[0])
            check_size([count])
            steps = torch.arange(count, dtype=torch.float64) * (2 * math.pi)
            turn = steps / (count if periodic else max(count - 1, 1))
            waves = [(-1) ** index * term * torch.cos(index * turn) for index, term in enumerate(terms)]
            return torch.stack(waves).sum(0).to(host.torch_dtype(kind))

        return Call(run, sizes=frozenset({0}))

    return entry


def _mel_weights(node: Node) -> Call:
    kind = numpy_type(node.integer("output_datatype", 1))

    def run(*given: host.Host) -> Tensor:
        bins, length, rate = (int(host.to_list(item)[0]) for item in given[:3])
        low, high = (float(host.to_list(item)[0]) for item in given[3:])
        check_size([length // 2 + 1, bins])
        return host.tensor_of(_mel(bins, length, rate, low, high).astype(kind))

    return Call(run, inputs=(0, 1, 2, 3, 4), sizes=frozenset(range(5)))


def _mel(bins: int, length: int, rate: int, low: float, high: float) -> np.ndarray:
    """Triangles that rise and fall between points that are evenly spaced in mel."""
    to_mel: Callable[[float], float] = lambda hertz: 2595 * math.log10(1 + hertz / 700)  # noqa: E731
    step = (to_mel(high) - to_mel(low)) / (bins + 2)
    edges = np.arange(bins + 2) * step + to_mel(low)
    places = ((length + 1) * (700 * (10 ** (edges / 2595) - 1)) // rate).astype(int)
    result: Any = np.zeros((length // 2 + 1, bins))
    for column in range(bins):
        begin, middle, end = places[column : column + 3]
        if begin == middle:
            result[middle, column] = 1
        else:
            for row in range(begin, middle + 1):
                result[row, column] = (row - begin) / (middle - begin)
        for row in range(middle, end if end > middle else middle):
            result[row, column] = (end - row) / (end - middle)
    return np.asarray(result)


ENTRIES: dict[str, Entry] = {
    "DFT": _dft,
    "STFT": _stft,
    "HannWindow": _window(0.5, 0.5),
    "HammingWindow": _window(25 / 46, 21 / 46),
    "BlackmanWindow": _window(0.42, 0.5, 0.08),
    "MelWeightMatrix": _mel_weights,
}
