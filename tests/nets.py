"""The golden nets: one small, seeded network for each graph shape that real models have.

Each has at most 50,000 parameters and batch-norm statistics that are not trivial, and exports with a
dynamic batch. ``NETS[name]()`` gives the module in inference mode and an example input of batch 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Residual(nn.Module):
    """Basic blocks with an identity and a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 8, 3), nn.ReLU())
        self.layer1 = _ResidualBlock(8, 8, 1)
        self.layer2 = _ResidualBlock(8, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.layer2(self.layer1(self.stem(x)))), 1))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.expand = nn.Sequential(*_conv_bn(inputs, hidden, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(*_conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6())
        self.project = nn.Sequential(*_conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Depthwise(nn.Module):
    """Inverted residuals with ReLU6, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 8, 3, 2), nn.ReLU6())
        self.block1 = _InvertedResidual(8, 8, 1, 3)
        self.block2 = _InvertedResidual(8, 16, 2, 3)
        self.block3 = _InvertedResidual(16, 16, 1, 3)
        self.last = nn.Sequential(*_conv_bn(16, 32, 1), nn.ReLU6())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.block3(self.block2(self.block1(self.stem(x)))))
        return self.head(self.dropout(y.mean((2, 3))))


class Concat(nn.Module):
    """Dense-like: each layer reads all earlier maps; batch norm before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1, bias=False) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(26), nn.ReLU(), nn.Conv2d(26, 12, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            maps.append(conv(F.relu(norm(torch.cat(maps, 1)))))
        y = self.transition(torch.cat(maps, 1))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class _ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *_conv_bn(half, half, 1),
            nn.ReLU(),
            *_conv_bn(half, half, 3, groups=half),
            *_conv_bn(half, half, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        y = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffle(nn.Module):
    """Channel split, concatenation and channel shuffle, as in ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 16, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.unit1 = _ShuffleUnit(16)
        self.unit2 = _ShuffleUnit(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit2(self.unit1(self.stem(x))).mean((2, 3)))


class Shared(nn.Module):
    """One convolution called twice, and two layers that own the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 12, 3, 2), nn.ReLU())
        self.block = nn.Conv2d(12, 12, 3, padding=1)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = F.relu(self.block(y))
        y = F.relu(self.block(y)).mean((2, 3))
        return self.head(F.relu(self.second(F.relu(self.first(y)))))


class Attention(nn.Module):
    """A pre-norm encoder block with its own fused q, k and v; input (N, 12, 16)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(16, width)
        self.position = nn.Parameter(torch.randn(1, 12, width) * 0.1)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)
        self.norm3 = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def _attend(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.project(mixed.transpose(1, 2).reshape(n, t, c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) + self.position
        y = y + self._attend(self.norm1(y))
        y = y + self.fc2(self.act(self.fc1(self.norm2(y))))
        return self.head(self.norm3(y).mean(1))


class Linear3d(nn.Module):
    """Linear layers on (N, 9, 12), a matrix per position."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.fc2 = nn.Linear(24, 24)
        self.act = nn.Hardswish()
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.fc1(x)))
        return self.head((y + torch.tanh(self.fc2(y))).mean(1))


class Recurrent(nn.Module):
    """A two-layer LSTM over (N, 7, 12), read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.head(states[:, -1])


class SqueezeExcite(nn.Module):
    """A depthwise block whose channels are scaled by gates, with SiLU, as in EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 12, 3, 2), nn.SiLU())
        self.depthwise = nn.Sequential(*_conv_bn(12, 12, 5, groups=12), nn.Hardswish())
        self.reduce = nn.Conv2d(12, 4, 1)
        self.expand = nn.Conv2d(4, 12, 1)
        self.project = nn.Sequential(*_conv_bn(12, 12, 1))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.project(y * gate)).mean((2, 3)))


class Transposed(nn.Module):
    """Down, then up by a transposed, a depthwise transposed and a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*_conv_bn(3, 12, 3, 2), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.each = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.grouped = nn.ConvTranspose2d(8, 12, 3, 1, 1, groups=2)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(self.each(F.relu(self.up(self.down(x)))))))


class Split(nn.Module):
    """One convolution taken apart: into two halves, as in C2f, and into unequal parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.merge = nn.Conv2d(24, 14, 1)
        self.parts = [4, 10]
        self.small = nn.Conv2d(4, 6, 1)
        self.large = nn.Conv2d(10, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, 1)
        y = self.merge(torch.cat([first, second, F.relu(self.inner(second))], 1))
        small, large = F.relu(y).split(self.parts, 1)
        return self.head((self.small(small) * self.large(large)).mean((2, 3)))


class SeparateAttention(nn.Module):
    """q, k and v of their own matrices, products of matrices written out, fewer kv heads than query heads."""

    def __init__(self, heads: int = 4, shared: int = 4) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, 8
        self.embed = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.q = nn.Linear(16, heads * self.size)
        self.k = nn.Linear(16, shared * self.size, bias=False)
        self.v = nn.Linear(16, shared * self.size)
        self.out = nn.Linear(heads * self.size, 16)
        self.gate, self.up = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.rand(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        n, t, _ = y.shape
        q = self.q(y).view(n, t, self.heads, self.size).transpose(1, 2)
        k = self.k(y).view(n, t, self.shared, self.size).transpose(1, 2)
        v = self.v(y).view(n, t, self.shared, self.size).transpose(1, 2)
        k, v = (one.repeat_interleave(self.heads // self.shared, dim=1) for one in (k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.35, -1)
        x = x + self.scale * self.out((weights @ v).transpose(1, 2).reshape(n, t, -1))
        return self.head((x + self.down(F.silu(self.gate(x)) * self.up(x))).mean(1))


class GroupedQuery(SeparateAttention):
    """Four query heads on two key and value heads."""

    def __init__(self) -> None:
        super().__init__(4, 2)


class Grouped(nn.Module):
    """Convolutions in four groups, group norm, and a depthwise one that makes two maps of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 24)
        self.merge = nn.Conv2d(24, 8, 1)
        self.twice = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))))
        return self.head(F.relu(self.twice(F.relu(self.merge(y)))).mean((2, 3)))


class Flattened(nn.Module):
    """Maps that are flattened whole, a matrix per position and channel, as in LeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, 2, 1)
        self.conv2 = nn.Conv2d(6, 8, 3, 2, 1)
        self.slopes = nn.PReLU(8)
        self.fc = nn.Linear(8 * 3 * 3, 20)
        self.norm = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slopes(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.norm(self.fc(y.flatten(1)))))


class Multihead(nn.Module):
    """torch's own encoder layer, then its attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.embed(x))
        return self.head((y + self.attention(y, y, y, need_weights=False)[0]).mean(1))


class Gated(nn.Module):
    """A bidirectional GRU, its states taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(12, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 14)
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.head(F.relu(self.fc(states.mean(1))))


class Projected(nn.Module):
    """An LSTM that hands on fewer values than it has units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, batch_first=True, proj_size=6)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, (last, _) = self.lstm(x)
        return self.head(states[:, -1] + last[0])


class Padded(nn.Module):
    """The shortcut of the first ResNets for CIFAR: every second position, channels padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 3, 2, 1)
        self.conv2 = nn.Conv2d(12, 16, 3, 1, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv2(F.relu(self.conv1(x)))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class SuperResolution(nn.Module):
    """Convolutions over time and space: 1-D, 3-D, and maps that become pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1))
        self.squeeze = nn.Conv2d(12, 8, 3, padding=1)
        self.shuffled = nn.Conv2d(8, 24, 3, padding=1)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.space(x)).flatten(1, 2)
        return self.last(F.relu(F.pixel_shuffle(self.shuffled(F.relu(self.squeeze(y))), 2)))


def _settle(module: nn.Module) -> nn.Module:
    """Batch-norm statistics and scales as training leaves them: neither zeros nor ones."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0.0, 0.3)
            nn.init.uniform_(layer.running_var, 0.3, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
    return module.eval()


def _net(kind: type[nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _settle(kind()), torch.randn(2, *shape)

    return build


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "residual": _net(Residual, 3, 16, 16),
    "depthwise": _net(Depthwise, 3, 16, 16),
    "concat": _net(Concat, 3, 16, 16),
    "shuffle": _net(Shuffle, 3, 16, 16),
    "shared": _net(Shared, 3, 16, 16),
    "attention": _net(Attention, 12, 16),
    "linear3d": _net(Linear3d, 9, 12),
    "lstm": _net(Recurrent, 7, 12),
    "squeeze_excite": _net(SqueezeExcite, 3, 16, 16),
}

# Shapes that matter to what can be cut; runtimes need not run them.
CHANNEL_NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "transposed": _net(Transposed, 3, 8, 8),
    "split": _net(Split, 3, 8, 8),
    "separate_attention": _net(SeparateAttention, 5, 12),
    "grouped_query": _net(GroupedQuery, 5, 12),
    "grouped": _net(Grouped, 3, 8, 8),
    "flattened": _net(Flattened, 1, 12, 12),
    "multihead": _net(Multihead, 5, 12),
    "gru": _net(Gated, 7, 12),
    "projected": _net(Projected, 7, 12),
    "padded": _net(Padded, 3, 8, 8),
    "super_resolution": _net(SuperResolution, 3, 2, 8, 8),
}
