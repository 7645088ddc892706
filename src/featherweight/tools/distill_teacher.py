"""A teacher: a network that is only asked, and what it said of examples that come again."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.method import Scratch, in_memory
from featherweight.model import Model
from featherweight.tools.distill_check import inference, tensors
from featherweight.tools.distill_pairs import first_tensor

_LARGEST = 1 << 30  # bytes of answers that are kept


class Teacher:
    """Asks a network in inference mode without gradients. It is no submodule, so nothing trains it.

    Args:
        model: The network; it is not changed.
        layers: Whose outputs are wanted besides the network's.
        entry: Which way of calling it.
        keep: Remember answers by the content of each example: for inputs that are the same in every epoch.
        room: Where remembered answers live.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[str] = (),
        *,
        entry: str = "forward",
        keep: bool = False,
        room: Scratch = in_memory,
    ) -> None:
        self.asked = 0  # examples that went through the network
        self._entry = model.entries[entry]
        self._module = model.module
        self._layers = tuple(layers)
        self._keep = keep
        self._room = room
        self._batches: list[tuple[Tensor, ...]] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        self._held = 0
        self._latest: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = (), ()

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Its flat outputs, and those of the layers by path, on the device of the inputs."""
        last = self._latest[0]  # a batch of mixed examples comes twice, with the labels of both
        if len(last) != len(inputs) or any(map(operator.is_not, last, inputs)):
            self._latest = inputs, self._remembered(inputs) if self._keep else self._ask(inputs)
        answers = self._latest[1]
        count = len(answers) - len(self._layers)
        return answers[:count], dict(zip(self._layers, answers[count:], strict=True))

    def _ask(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs, then what the layers gave."""
        module = self._on(inputs[0].device)
        seen: dict[str, Tensor] = {}

        def note(path: str, _: nn.Module, __: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None:
                seen[path] = value

        hooks = [
            module.get_submodule(path).register_forward_hook(partial(note, path)) for path in self._layers
        ]
        try:
            with inference(module):
                called = getattr(module, self._entry.method)(*self._entry.arguments(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        self.asked += len(inputs[0])
        return tuple(map(_in_float32, (*tensors(called), *(seen[path] for path in self._layers))))

    def _on(self, device: torch.device) -> nn.Module:
        """The module on the device where the student is trained."""
        own = next(self._module.parameters(), None)
        if own is not None and own.device != device:
            self._module = copy.deepcopy(self._module).to(device)
        return self._module

    def _remembered(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The answers, from memory for those examples that it holds."""
        keys = digests(inputs)
        fresh = {
            row: place for place, row in enumerate(r for r, key in enumerate(keys) if key not in self._rows)
        }
        if len(fresh) == len(keys):
            new = self._ask(inputs)
        else:
            new = self._ask(tuple(value[list(fresh)] for value in inputs)) if fresh else ()
        self._remember([keys[row] for row in fresh], new)
        if len(fresh) == len(keys):
            return new
        return tuple(
            torch.stack(
                [
                    new[number][fresh[row]].cpu() if row in fresh else self._kept_row(key, number)
                    for row, key in enumerate(keys)
                ]
            ).to(inputs[0].device)
            for number in range(len(self._batches[0]))
        )

    def _remember(self, keys: Sequence[bytes], answers: tuple[Tensor, ...]) -> None:
        """Keep answers while there is room; not at all where they are not one row for each example."""
        size = sum(answer.nbytes for answer in answers)
        rows = all(answer.dim() and len(answer) == len(keys) for answer in answers)
        if not keys or not rows or self._held + size > _LARGEST:
            return
        self._held += size
        self._rows |= {key: (len(self._batches), row) for row, key in enumerate(keys)}
        self._batches.append(tuple(self._room(answer.detach().cpu()) for answer in answers))

    def _kept_row(self, key: bytes, number: int) -> Tensor:
        batch, row = self._rows[key]
        return self._batches[batch][number][row]


def _in_float32(answer: Tensor) -> Tensor:
    """Answers of 16 bits, as mixed precision gives them, in float32: files know no bfloat16."""
    return answer.float() if answer.dtype in (torch.bfloat16, torch.float16) else answer


def digests(inputs: tuple[Tensor, ...]) -> list[bytes]:
    """A hash of the content of each example."""
    whole = [value.detach().cpu().contiguous() for value in inputs]
    arrays = [value.reshape(len(value), -1).view(torch.uint8).numpy() for value in whole]  # bfloat16 too
    found = []
    for row in range(len(arrays[0])):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array[row].tobytes())
        found.append(digest.digest())
    return found
