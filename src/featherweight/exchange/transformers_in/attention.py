"""Fused attention whose result is laid out anew. Imports transformers: to be imported inside functions.

The fused kernel of a CPU hands its result over in the order that the next layer wants, and tracing then drops
the copy that other machines need; traced again, without that kernel, the graph would not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "featherweight_sdpa"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    made, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return made.clone(memory_format=torch.contiguous_format), None


def register() -> str:
    """Make it known to transformers; its name."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
