"""Small vision transformers: patches as tokens (Dosovitskiy et al. 2020, arXiv:2010.11929).

Ti and S are the sizes of Touvron et al. 2020 (DeiT, arXiv:2012.12877): heads of 64 numbers, widths 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.errors import RecipeError
from featherweight.nets._parts import checked, side

_WIDTH, _HEADS, _DEPTH = 192, 3, 12
_TOKENS = 14  # along a side, at 224 pixels in patches of 16
_LEAST_TOKENS = 7  # along a side of a small picture


class Attention(nn.Module):
    """Each token takes from all others what its query finds."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, channels // heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.project(mixed.transpose(1, 2).reshape(n, t, c))
        return result


class Block(nn.Module):
    """Attention, then two layers for each token, each with a norm before it and a skip beside it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attention = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return result


class ViT(nn.Module):
    """Made by ``vit``."""

    def __init__(
        self, channels: int, width: int, heads: int, depth: int, patch: int, tokens: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, tokens + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        result: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return result


def vit(
    *,
    width: float = 1.0,
    depth: float = 1.0,
    patch: int | None = None,
    heads: int | None = None,
    resolution: int | tuple[int, int] = 224,
    channels: int = 3,
    classes: int = 1000,
) -> nn.Module:
    """The network for pictures of a size.

    Args:
        width: Multiplier of the 192 numbers of a token, in whole heads: 1 is Ti, 2 is S.
        depth: Multiplier of the 12 blocks.
        patch: Side of a patch; None: 16 at 224 pixels, less where a small picture would be few tokens.
        heads: Of the attention; None: one for 64 numbers of a token.
        resolution: Side, or sides, of the pictures, which is a multiple of the patch.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range, or patches do not fill the picture.
    """
    checked(
        "vit",
        width=width,
        depth=depth,
        kernel=None,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    patch = _usual_patch(sides) if patch is None else patch
    if patch < 1 or any(one % patch for one in sides):
        raise RecipeError(
            f"vit: patches of {patch} do not fill a picture of {sides[0]} x {sides[1]}",
            fix=f"a patch that divides both sides, as {_usual_patch(sides)}",
        )
    heads = max(1, round(_HEADS * width)) if heads is None else heads
    if heads < 1:
        raise RecipeError(f"vit: heads is {heads}", fix="at least one head")
    size = max(4, 4 * round(_WIDTH * width / heads / 4))
    tokens = (sides[0] // patch) * (sides[1] // patch)
    net = ViT(channels, heads * size, heads, max(1, round(_DEPTH * depth)), patch, tokens, classes)
    _initialise(net)
    return net


def _usual_patch(sides: tuple[int, int]) -> int:
    """16 or the largest divisor below it that leaves enough tokens; at least one position."""
    least = min(_LEAST_TOKENS, *sides)
    fits = [one for one in range(1, 17) if all(side % one == 0 and side // one >= least for side in sides)]
    return max(fits)


def _initialise(net: ViT) -> None:
    """Truncated normal values as in DeiT; the patches as a linear layer of its inputs (LeCun)."""
    nn.init.trunc_normal_(net.token, std=0.02)
    nn.init.trunc_normal_(net.position, std=0.02)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    nn.init.kaiming_normal_(net.patches.weight, mode="fan_in", nonlinearity="linear")
    if net.patches.bias is not None:
        nn.init.zeros_(net.patches.bias)
