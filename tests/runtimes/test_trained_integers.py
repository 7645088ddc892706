"""What was trained quantized is what runtimes store: the integers of the last step, and its outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional as F

from featherweight.formats import IntQuant
from featherweight.plugins import find_runtime
from featherweight.runtime import Role
from featherweight.tools.simulated import Simulated
from golden import decibels, inputs, quantized, target


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "temporary norms"])
def test_onnxruntime_stores_what_training_used(tmp_path: Path, normalize: bool) -> None:
    where, x = target("onnxruntime"), torch.from_numpy(inputs("residual", 32))
    net = Simulated(quantized("residual"), normalize=[(x,)] if normalize else ())
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        loss = F.cross_entropy(net(x)[0], torch.arange(32) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    used = {name: value.detach() for name, value in net._stored(folded=True).items()}
    trained = net.absorb()
    runtime = find_runtime("onnxruntime")
    artifact = runtime.lower(trained, where, tmp_path)
    file = onnx.load(tmp_path / "model.onnx").graph
    held = [numpy_helper.to_array(one) for one in file.initializer]
    stored = {array.tobytes() for array in held if array.dtype in (np.int8, np.uint8)}
    weights = 0
    for name, chain in trained.formats.items():
        if name not in trained.parameters:
            continue
        assert torch.equal(trained.parameters[name], used[name])
        fmt = runtime.realise(chain[-1], where, "weight")
        assert isinstance(fmt, IntQuant)
        assert torch.equal(fmt.project(used[name]), used[name])
        whole = fmt.quantize(used[name]).numpy().astype(np.int8)
        assert whole.tobytes() in stored or whole.T.tobytes() in stored
        weights += 1
    assert weights == 7
    (made,) = runtime.open(artifact, where)(x.numpy())
    with torch.no_grad():
        assert decibels(net(x)[0].numpy(), made) > 30


@pytest.mark.parametrize(
    "name", ["onnxruntime", "onnxruntime-web", "openvino", "litert", "executorch", "mnn", "ncnn", "torch"]
)
def test_trained_ranges_are_on_the_grid_of_each_runtime(name: str) -> None:
    """A runtime has nothing left to change: what it would store is what was trained."""
    where, runtime = target(name), find_runtime(name)
    subject, x = quantized("residual", name), torch.from_numpy(inputs("residual", 16))
    net = Simulated(subject)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x)[0], torch.arange(16) % 10).backward()
        optimizer.step()
    trained, moved = net.absorb(), 0
    for value, chain in trained.formats.items():
        (fmt,) = chain
        role: Role = "weight" if value in trained.parameters else "activation"
        stored = runtime.realise(fmt, where, role)
        assert isinstance(fmt, IntQuant)
        assert isinstance(stored, IntQuant)
        for one, other in zip(stored.grid(), fmt.grid(), strict=True):
            assert torch.equal(one, other)
        before = subject.formats[value][0]
        assert isinstance(before, IntQuant)
        moved += not torch.equal(before.high, fmt.high)
    assert moved > len(trained.formats) // 2
