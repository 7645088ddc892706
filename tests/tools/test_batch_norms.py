"""Batch norms: the statistics are those that torch finds in training mode."""

from __future__ import annotations

import torch
from torch import nn

from featherweight.tools.batch_norms import reestimate, with_statistics
from golden import inputs, model


def test_statistics_are_those_of_torch_in_training_mode() -> None:
    net, x = model("depthwise"), torch.from_numpy(inputs("depthwise", 256, seed=4))
    found = reestimate(net, [(part,) for part in x.split(16)])
    oracle = net.copy_module().train()
    for layer in oracle.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
        elif isinstance(layer, nn.Dropout):
            layer.eval()
    with torch.no_grad():
        for part in x.split(128):
            oracle(part)
    buffers = {name: value for name, value in oracle.named_buffers() if "running" in name}
    assert set(found) == set(buffers)
    for name, value in buffers.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_the_model_is_untouched_and_where_is_obeyed() -> None:
    net, x = model("residual"), torch.from_numpy(inputs("residual", 32))
    before = {name: value.clone() for name, value in net.module.named_buffers()}
    found = reestimate(net, [(x,)], lambda path, kind: path.startswith("layer2") and kind == "BatchNorm2d")
    assert all(torch.equal(value, before[name]) for name, value in net.module.named_buffers())
    assert found
    assert all(name.startswith("layer2") for name in found)
    changed = with_statistics(net, found)
    assert torch.equal(changed.module.get_buffer("layer2.bn1.running_mean"), found["layer2.bn1.running_mean"])


def test_nothing_without_batch_norms() -> None:
    assert reestimate(model("attention"), [(torch.from_numpy(inputs("attention", 4)),)]) == {}
