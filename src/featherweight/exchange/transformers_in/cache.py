"""Past keys and values as flat tensors. Imports transformers, so it is imported inside functions only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer; the first ones are taken as they are, not joined to an empty tensor."""

    is_initialized: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


def cache(layers: int, past: Sequence[Tensor]) -> Any:
    """A cache of so many layers, filled with key, value, key, value ... if they are given."""
    made = DynamicCache()
    made.layers = [_Layer() for _ in range(layers)]
    for index in range(len(past) // 2):
        made.layers[index].update(past[2 * index], past[2 * index + 1])
    return made


def two_caches(layers: int, past: Sequence[Tensor]) -> Any:
    """A decoder's own cache and that of the encoder's states; past: own key, value, other key, value ..."""
    own = [tensor for index, tensor in enumerate(past) if index % 4 < 2]
    other = [tensor for index, tensor in enumerate(past) if index % 4 >= 2]
    made = EncoderDecoderCache(cache(layers, own), cache(layers, other))
    made.is_updated = dict.fromkeys(range(layers), bool(other))
    return made


def flat(filled: Any) -> list[Tensor]:
    """Key, value, key, value ... of a cache."""
    return [tensor for layer in filled.layers for tensor in (layer.keys, layer.values)]
