"""Batch-norm statistics as the network has them now, from examples without labels.

A network that was cut makes other values than those its running statistics tell of. Over batches b of n_b
values a channel, each normalised by its own statistics as in training, the running ones become (Ioffe and
Szegedy 2015, arXiv:1502.03167, algorithm 2; ``momentum=None`` in torch)::

    mean = average_b mean_b        var = average_b var_b * n_b / (n_b - 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.model import Model

_MANY = 128  # examples of a batch; statistics of few vary too much for the layers behind
Selects = Callable[[str, str], bool]


def reestimate(
    model: Model,
    batches: Iterable[tuple[Tensor, ...]],
    selects: Selects = lambda path, kind: True,
    entry: str = "forward",
) -> dict[str, Tensor]:
    """New running statistics of the batch norms that a call runs through, in one pass.

    Args:
        model: Untouched; its formats are ignored.
        batches: Flat inputs; neighbours are put together while they are small.
        selects: Whether the statistics of the layer at a path, of a class of that name, may change.
        entry: Which way of calling the module.

    Returns:
        Buffers by name (``running_mean``, ``running_var``), float as they were; none without batch norms.
    """
    module = model.copy_module().eval()
    norms = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.running_mean is not None
        and selects(path, type(layer).__name__)
    }
    if not norms:
        return {}
    for layer in norms.values():
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    how = model.entries[entry]
    with torch.no_grad():
        for batch in _joined(batches):
            getattr(module, how.method)(*how.arguments(batch))
    found: dict[str, Tensor] = {}
    for path, layer in norms.items():
        if layer.num_batches_tracked:  # a layer that was not called keeps what it had
            found[f"{path}.running_mean"] = _tensor(layer.running_mean)
            found[f"{path}.running_var"] = _tensor(layer.running_var)
    return found


def with_statistics(model: Model, buffers: Mapping[str, Tensor]) -> Model:
    """The model with other values of some buffers."""
    module = model.copy_module()
    for name, value in buffers.items():
        module.get_buffer(name).copy_(value)
    return model.evolve(module=module)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().clone()


def _joined(batches: Iterable[tuple[Tensor, ...]]) -> Iterable[tuple[Tensor, ...]]:
    """The same examples in batches of many, where all inputs have them on their first axis."""
    held: list[tuple[Tensor, ...]] = []
    count = 0
    for batch in batches:
        fits = not held or all(a.shape[1:] == b.shape[1:] for a, b in zip(batch, held[0], strict=True))
        sizes = {x.shape[0] if x.dim() else 0 for x in batch}
        if len(sizes) > 1 or 0 in sizes or not fits:
            yield from _flushed(held)
            held, count = [], 0
            if len(sizes) > 1 or 0 in sizes:
                yield batch
                continue
        held.append(batch)
        count += batch[0].shape[0]
        if count >= _MANY:
            yield from _flushed(held)
            held, count = [], 0
    yield from _flushed(held)


def _flushed(held: list[tuple[Tensor, ...]]) -> Iterable[tuple[Tensor, ...]]:
    if held:
        yield tuple(torch.cat(parts) for parts in zip(*held, strict=True))
