"""Which numbers of channels ONNX Runtime's float convolutions like; ``python benchmarks/widths.py``.

Residual stacks of one width each, timed in one process in turn, in units of the one with 32 channels.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.engine.runner import pin
from featherweight.engine.timing import Call
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target

WIDTHS = (4, 8, 11, 12, 16, 20, 22, 24, 28, 32, 40, 45, 48, 56, 64)
CASES = (("conv", 28), ("conv", 14), ("depthwise", 28))
_BASE, _SECONDS, _CALLS, _BLOCKS = 32, 12.0, 5, 8


class Stack(nn.Module):
    """A stem and residual blocks, all of one width."""

    def __init__(self, width: int, depthwise: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(_block(width, depthwise) for _ in range(_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x.mean((2, 3))


def _block(width: int, depthwise: bool) -> nn.Module:
    if not depthwise:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
    spatial = nn.Conv2d(width, width, 3, padding=1, groups=width)
    return nn.Sequential(spatial, nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())


def opened(width: int, kind: str, size: int, folder: Path) -> Call:
    """A call of one stack on ONNX Runtime."""
    example = torch.randn(1, 3, size, size)
    module = Stack(width, kind == "depthwise").eval()
    model = Model(module, {"forward": Entry((example,), ("x",), ("y",))})
    runtime, target = find_runtime("onnxruntime"), Target().resolved()
    place = folder / f"{kind}{size}-{width}"
    place.mkdir()
    session = runtime.open(runtime.lower(model, target, place), target)
    x = example.numpy()
    return lambda: session(x)


def main() -> None:
    torch.manual_seed(0)
    for kind, size in CASES:
        with tempfile.TemporaryDirectory() as folder:
            calls = {width: opened(width, kind, size, Path(folder)) for width in WIDTHS}
        seen: dict[int, list[float]] = {width: [] for width in WIDTHS}
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            for width in random.sample(WIDTHS, len(WIDTHS)):
                calls[width]()  # brings its weights back into the caches; not timed
                start = time.perf_counter()
                for _ in range(_CALLS):
                    calls[width]()
                seen[width].append((time.perf_counter() - start) / _CALLS)
        base = np.array(seen[_BASE])
        ratios = (f"{width}: {np.median(np.array(times) / base):.2f}" for width, times in seen.items())
        print(f"{kind} at {size} x {size}:", ", ".join(ratios), flush=True)


if __name__ == "__main__":
    pin(1)
    main()
