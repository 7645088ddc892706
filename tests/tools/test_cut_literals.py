"""Code with sizes written into it: each kind of call follows, and computes what zeroed channels would."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import golden
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cut, cuttable
from featherweight.tools.groups import ChannelGroup

_OVER_CHANNELS = frozenset({"layer_norm", "rms_norm", "group_norm", "instance_norm"})


class Net(nn.Module):
    """Two layers with code between them."""

    def __init__(
        self, first: nn.Module, last: nn.Module, between: Callable[..., Tensor], **more: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.last, self.between = first, last, between
        for name, layer in more.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def _lines(last: int, between: Callable[..., Tensor], **more: nn.Module) -> tuple[nn.Module, Tensor]:
    return Net(nn.Linear(6, 24), nn.Linear(last, 5), between, **more), torch.randn(2, 6)


def _maps(last: int, between: Callable[..., Tensor], **more: nn.Module) -> tuple[nn.Module, Tensor]:
    return Net(nn.Conv2d(3, 24, 3), nn.Conv2d(last, 5, 1), between, **more), torch.randn(2, 3, 8, 8)


def _tokens(last: int, between: Callable[..., Tensor], **more: nn.Module) -> tuple[nn.Module, Tensor]:
    return Net(nn.Linear(6, 24), nn.Linear(last, 5), between, **more), torch.randn(2, 7, 6)


def _query_groups(net: nn.Module, y: Tensor) -> Tensor:
    """Six query heads of size 4 share two heads of keys and values."""
    n, t, _ = y.shape
    q = net.q(y).view(n, t, 6, 4).transpose(1, 2)
    k, v = (layer(y).view(n, t, 2, 4).transpose(1, 2).repeat_interleave(3, 1) for layer in (net.k, net.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 24)


def _batched_heads(net: nn.Module, y: Tensor) -> Tensor:
    """Heads in the batch, as older code has it: a size that is computed from the batch."""
    n, t, _ = y.shape
    q, k, v = (p.reshape(n, t, 4, 6).transpose(1, 2).reshape(n * 4, t, 6) for p in net.qkv(y).split(24, 2))
    mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 6**0.5).softmax(-1), v)
    return mixed.view(n, 4, t, 6).transpose(1, 2).reshape(n, t, 24)


def _windows(net: nn.Module, y: Tensor) -> Tensor:
    a, b, c = y.split([8, 4, 12], 1)
    return torch.cat([a[:, :4] * 2, b, F.relu(c[:, 2:10]), a[:, 4:]], 1)


CODE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "view": lambda: _lines(24, lambda net, y: F.relu(y.view(-1, 4, 6)).transpose(1, 2).flatten(1)),
    "unflatten": lambda: _lines(24, lambda net, y: F.relu(y.unflatten(1, (3, 8))).flatten(1)),
    "split": lambda: _lines(24, lambda net, y: torch.cat([F.relu(p) for p in y.split(8, 1)], 1)),
    "sections": lambda: _lines(20, _windows),
    "gated": lambda: _lines(12, lambda net, y: y[:, :12] * torch.sigmoid(y[:, 12:])),
    "chunk": lambda: _lines(12, lambda net, y: torch.mul(*y.chunk(2, 1))),
    "narrow": lambda: _lines(10, lambda net, y: F.relu(y.narrow(1, 5, 10))),
    "zeros": lambda: _lines(24, lambda net, y: y + torch.zeros(24) + y.new_ones(1, 24)),
    "repeat": lambda: _lines(48, lambda net, y: F.relu(y).repeat(1, 2)),
    "expand": lambda: _tokens(24, lambda net, y: y + y.mean(1, keepdim=True).expand(-1, 7, 24)),
    "flatten": lambda: (
        Net(nn.Conv2d(3, 6, 3), nn.Linear(216, 5), lambda net, y: y.reshape(-1, 216)),
        torch.randn(2, 3, 8, 8),
    ),
    "pad": lambda: _maps(
        24, lambda net, y: F.pad(net.side(y), (0, 0, 0, 0, 6, 6)) + y, side=nn.Conv2d(24, 12, 1)
    ),
    "shuffle": lambda: _maps(24, lambda net, y: y.view(-1, 3, 8, 6, 6).transpose(1, 2).reshape(-1, 24, 6, 6)),
    "pixel shuffle": lambda: _maps(6, lambda net, y: F.relu(F.pixel_shuffle(y, 2))),
    "grouped": lambda: _maps(24, lambda net, y: net.middle(y), middle=nn.Conv2d(24, 24, 3, groups=4)),
    "transposed": lambda: _maps(16, lambda net, y: net.middle(y), middle=nn.ConvTranspose2d(24, 16, 2, 2)),
    "transposed depthwise": lambda: _maps(
        24, lambda net, y: net.up(y), up=nn.ConvTranspose2d(24, 24, 2, 2, groups=24)
    ),
    "group norm": lambda: _maps(24, lambda net, y: net.norm(y), norm=nn.GroupNorm(4, 24)),
    "functional norm": lambda: _tokens(24, lambda net, y: F.layer_norm(y, (24,))),
    "instance norm": lambda: _maps(24, lambda net, y: net.norm(y), norm=nn.InstanceNorm2d(24, affine=True)),
    "prelu": lambda: _maps(24, lambda net, y: net.act(y), act=nn.PReLU(24)),
    "circular": lambda: _maps(
        24, lambda net, y: net.c(y), c=nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular")
    ),
    "query groups": lambda: _tokens(
        24, _query_groups, q=nn.Linear(24, 24), k=nn.Linear(24, 8), v=nn.Linear(24, 8)
    ),
    "batched heads": lambda: _tokens(24, _batched_heads, qkv=nn.Linear(24, 72)),
    "attention layer": lambda: _tokens(
        24,
        lambda net, y: net.mha(y, y, y, need_weights=False)[0],
        mha=nn.MultiheadAttention(24, 4, batch_first=True),
    ),
    "encoder layer": lambda: _tokens(
        24, lambda net, y: net.block(y), block=nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    ),
    "gru": lambda: _tokens(16, lambda net, y: net.gru(y)[0], gru=nn.GRU(24, 16, batch_first=True)),
    "rnn": lambda: _tokens(16, lambda net, y: net.rnn(y)[1][0], rnn=nn.RNN(24, 16, batch_first=True)),
    "states": lambda: _tokens(
        16,
        lambda net, y: net.lstm(y, (torch.zeros(1, y.shape[0], 16), torch.ones(1, y.shape[0], 16)))[0],
        lstm=nn.LSTM(24, 16, batch_first=True),
    ),
    "own cell": lambda: _lines(12, lambda net, y: torch.tanh(net.ih(y).chunk(2, 1)[0]), ih=nn.Linear(24, 24)),
}


def _made(name: str) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = CODE[name]()
        return golden.model_of(module, x)


def _drop(groups: dict[str, ChannelGroup], seed: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)].tolist()
        for name, group in groups.items()
    }


@pytest.mark.parametrize("name", CODE)
def test_code_follows(name: str) -> None:
    model = _made(name)
    found = channel_groups(model)
    channels = cuttable(model, found)
    assert channels.groups, channels.fixed
    assert set(channels.groups) == set(found.groups), channels.fixed
    x = torch.cat([*model.entries["forward"].example_inputs] * 2)
    norms = {node.layer for node in trace(model) if node.op in _OVER_CHANNELS}
    mixed = any(node.op in _OVER_CHANNELS and not node.parameters for node in trace(model))
    for seed in range(3):
        drop = _drop(dict(channels.groups), seed)
        done = cut(model, channels, drop)
        ours = done.module(x)
        assert ours.shape == model.module(x).shape
        if mixed or any(member.layer in norms for key in drop for member in channels.groups[key].members):
            continue
        module = model.copy_module()
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for key, gone in drop.items():
                for member in channels.groups[key].members:
                    indices = sorted({index for channel in gone for index in member.indices[channel]})
                    tensors[member.tensor].index_fill_(member.axis, torch.tensor(indices), 0)
        assert torch.allclose(ours, module(x), atol=1e-5)


def test_a_constant_of_a_fixed_size_is_told() -> None:
    module, x = _lines(24, lambda net, y: y * torch.linspace(1, 2, 24))
    model = golden.model_of(module, x)
    channels = cuttable(model, channel_groups(model))
    assert not channels.groups
    assert "linspace" in channels.fixed["first"]
