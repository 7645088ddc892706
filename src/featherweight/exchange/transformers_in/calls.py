"""How a transformers model is called with flat tensors: one method for each entry.

The model's class gets these methods in front of its own, so its layers, parameters and their names stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:

    class _Base:  # a transformers model
        config: Any

        def forward(self, **kwargs: Any) -> Any: ...

else:
    _Base = object

_LEFT_OUT = frozenset(
    {"past_key_values", "loss", "hidden_states", "attentions", "cross_attentions", "decoder_hidden_states"}
    | {"decoder_attentions", "encoder_hidden_states", "encoder_attentions"}
)


class Flat(_Base):
    """Methods for entries.

    Plain settings, set by the loader: names of inputs, layers of a cache, whether places are an input.
    """

    flat_names: tuple[str, ...]
    flat_layers: int
    flat_positions: bool

    def call_model(self, **kwargs: Any) -> Any:
        """The model's own forward."""
        return super().forward(return_dict=True, **kwargs)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Tensors in the order of the entry's names -> tensors; with keywords, the model's own forward."""
        if kwargs:
            return super().forward(*inputs, **kwargs)
        outputs = self.call_model(**dict(zip(self.flat_names, inputs, strict=False)), **self._quiet())
        found = tuple(outputs_of(outputs).values())
        return found[0] if len(found) == 1 else found

    def _quiet(self) -> dict[str, Any]:
        return {"use_cache": False} if getattr(self.config, "use_cache", False) else {}

    def _positions(self, mask: Tensor, length: int) -> dict[str, Tensor]:
        """Places of the tokens in their texts, behind padding on the left."""
        if not self.flat_positions:
            return {}
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return {"position_ids": places[:, places.shape[1] - length :]}

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """The first tokens: logits, and keys and values of each layer."""
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """The next tokens, behind keys and values of those before; the mask covers both."""
        from featherweight.exchange.transformers_in.cache import cache, flat

        filled = cache(self.flat_layers, past)
        outputs = self.call_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=filled,
            use_cache=True,
            **self._positions(attention_mask, input_ids.shape[1]),
        )
        return (outputs.logits, *flat(filled))


class FlatSeq2Seq(Flat):
    """An encoder and a decoder."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the encoder makes of its tokens."""
        encoder: Any = self.get_encoder()  # type: ignore[attr-defined]
        made = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        states: Tensor = made.last_hidden_state
        return states

    def decode_first(
        self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """The first tokens: logits, and keys and values of each layer, own and of the encoder's states."""
        return self._step(decoder_input_ids, encoder_hidden_states, encoder_attention_mask, ())

    def decode_next(
        self, decoder_input_ids: Tensor, encoder_attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """The next tokens behind keys and values; those of the encoder's states do not change."""
        batch, length = encoder_attention_mask.shape
        states = past[0].new_zeros(batch, length, int(self.config.hidden_size))  # never read: cached
        return self._step(decoder_input_ids, states, encoder_attention_mask, past)

    def _step(
        self, tokens: Tensor, states: Tensor, mask: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        from transformers.modeling_outputs import BaseModelOutput

        from featherweight.exchange.transformers_in.cache import flat, two_caches

        filled = two_caches(self.flat_layers, past)
        outputs = self.call_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=tokens,
            past_key_values=filled,
            use_cache=True,
        )
        own, other = flat(filled.self_attention_cache), flat(filled.cross_attention_cache)
        if past:
            return (outputs.logits, *own)
        layers = zip(own[::2], own[1::2], other[::2], other[1::2], strict=True)
        return (outputs.logits, *(tensor for layer in layers for tensor in layer))


def outputs_of(outputs: Any) -> dict[str, Tensor]:
    """The tensors that a model returns, by name."""
    return {
        name: value
        for name, value in outputs.items()
        if isinstance(value, torch.Tensor) and name not in _LEFT_OUT
    }
