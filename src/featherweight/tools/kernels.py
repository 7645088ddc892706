"""Kernels of convolutions cut to smaller ones around the same centre, and solved again.

What a filter of k x k makes of its patches x (rows of X, bias b) is made as well as possible of their inner
part x_S of k' x k', by least squares over calibration data::

    min |X_S W' - X W|^2    =>    W' = (X_S' X_S + r I)^-1 X_S' X W

Without data the inner part of the weight stays as it is. Padding shrinks with the kernel, so that every shape
but the kernel's own stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.graph import trace
from featherweight.model import Cut, Edit, Model, SetAttr, make_edit
from featherweight.tools.costs import node_macs
from featherweight.tools.simulate import Replay

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LARGEST = 3000  # unknowns of one filter that are solved for
_ROWS = 1 << 15  # patches of a batch that are looked at
_RIDGE = 1e-6  # of the mean diagonal


@dataclass(frozen=True)
class Kernel:
    """A convolution whose kernel can be cut.

    Attributes:
        path: Of the layer.
        size: Of its kernel along each axis.
        smaller: What it becomes.
        macs: Multiply-accumulates of one example that go.
        params: Parameters that go.
    """

    path: str
    size: tuple[int, ...]
    smaller: tuple[int, ...]
    macs: int
    params: int


def cuttable_kernels(model: Model, sizes: Mapping[int, int]) -> list[Kernel]:
    """Convolutions with kernels of these sizes, whose padding can shrink as much as they do.

    Args:
        model: Any model.
        sizes: Size -> smaller size, both odd or both even.
    """
    macs: dict[str, int] = {}
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            macs[node.layer] = macs.get(node.layer, 0) + node_macs(graph, node)
    names = {id(layer): path for path, layer in reversed(list(model.module.named_modules()))}
    found = []
    for path, layer in model.module.named_modules():
        if not isinstance(layer, _CONVS) or not macs.get(path) or names[id(layer)] != path:
            continue
        size = tuple(layer.kernel_size)
        smaller = tuple(sizes.get(k, k) for k in size)
        if smaller != size and _padding(layer, smaller) is not None and "weight" in layer._parameters:
            kept = torch.Size(smaller).numel() / torch.Size(size).numel()
            gone = round(layer.weight.numel() * (1 - kept))
            found.append(Kernel(path, size, smaller, round(macs[path] * (1 - kept)), gone))
    return found


def _padding(layer: nn.Module, smaller: Sequence[int]) -> tuple[int, ...] | str | None:
    """What its padding becomes; None: shapes would change."""
    assert isinstance(layer, _CONVS)
    if layer.padding_mode != "zeros":
        return None
    if layer.padding == "same":
        return "same"
    if isinstance(layer.padding, str):
        return None
    triples = zip(layer.kernel_size, smaller, layer.dilation, strict=True)
    less = [(k - s) * d // 2 for k, s, d in triples]
    even = all((k - s) % 2 == 0 for k, s in zip(layer.kernel_size, smaller, strict=True))
    left = tuple(p - gone for p, gone in zip(layer.padding, less, strict=True))
    return left if even and min(left) >= 0 else None


def with_smaller_kernel(
    model: Model, kernel: Kernel, batches: Iterable[tuple[Tensor, ...]] = (), entry: str = "forward"
) -> Model:
    """The model with one kernel cut.

    Args:
        model: Untouched.
        kernel: One of its :func:`cuttable_kernels`.
        batches: Flat inputs to solve the weights on; none: they are cut alone.
        entry: Which way of calling it.
    """
    solved = _solved(model, kernel, batches, entry)
    made = with_smaller_kernels(model, [kernel])
    if solved is not None:
        with torch.no_grad():
            made.module.get_parameter(f"{kernel.path}.weight").copy_(solved)
    return made


def with_smaller_kernels(model: Model, kernels: Iterable[Kernel]) -> Model:
    """The model with some kernels cut, their inner parts as they were."""
    edits = [edit for kernel in kernels for edit in _edits(model, kernel)]
    module = model.copy_module()
    for edit in edits:
        module = make_edit(module, edit)
    return model.evolve(module=module, edits=tuple(edits))


def _edits(model: Model, kernel: Kernel) -> Iterator[Edit]:
    layer = model.module.get_submodule(kernel.path)
    first = next(own for own, tensor in model.module.named_parameters() if tensor is layer.weight)
    for axis, (size, smaller) in enumerate(zip(kernel.size, kernel.smaller, strict=True), 2):
        side = (size - smaller) // 2
        gone = (*range(side), *range(size - side, size))
        if gone:
            yield Cut(first, axis, gone)
    yield SetAttr(kernel.path, "kernel_size", list(kernel.smaller))
    padding = _padding(layer, kernel.smaller)
    yield SetAttr(kernel.path, "padding", list(padding) if isinstance(padding, tuple) else padding)


def _solved(model: Model, kernel: Kernel, batches: Iterable[tuple[Tensor, ...]], entry: str) -> Tensor | None:
    """The smaller weight by least squares; None: nothing to solve it on, or too much of it."""
    layer = model.module.get_submodule(kernel.path)
    if not isinstance(layer, nn.Conv2d):
        return None
    unknowns = layer.weight[0].numel()
    if unknowns > _LARGEST:
        return None
    moments = _moments(model, layer, kernel.path, batches, entry)
    if moments is None:
        return None
    weight = layer.weight.detach().double()
    kept = _inner(kernel, weight.shape[1])
    rows = weight.reshape(layer.groups, -1, unknowns)  # (groups, filters, unknowns)
    inner = moments[:, kept][:, :, kept]
    ridge = _RIDGE * inner.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    inner = inner + ridge[:, None, None] * torch.eye(len(kept), dtype=inner.dtype)
    right = moments[:, kept] @ rows.transpose(1, 2)  # (groups, kept, filters)
    solution: Tensor = torch.linalg.solve(inner, right).transpose(1, 2)
    return solution.reshape(weight.shape[0], weight.shape[1], *kernel.smaller).to(layer.weight.dtype)


def _inner(kernel: Kernel, channels: int) -> Tensor:
    """Places of the inner part in a flattened filter."""
    mask = torch.zeros(channels, *kernel.size, dtype=torch.bool)
    sides = [(k - s) // 2 for k, s in zip(kernel.size, kernel.smaller, strict=True)]
    mask[(slice(None), *(slice(side, k - side) for side, k in zip(sides, kernel.size, strict=True)))] = True
    return mask.flatten().nonzero().flatten()


def _moments(
    model: Model, layer: nn.Conv2d, path: str, batches: Iterable[tuple[Tensor, ...]], entry: str
) -> Tensor | None:
    """X' X of what the filters read: (groups, unknowns, unknowns); None: it was never called."""
    replay = Replay(model, entry)
    readers = [node for node in replay.graph if node.layer == path and node.op.startswith("conv")]
    wanted = {node.inputs[0] for node in readers}
    total: Tensor | None = None

    def observe(name: str, value: Tensor) -> Tensor:
        nonlocal total
        if name in wanted:
            seen = _products(layer, value)
            total = seen if total is None else total + seen
        return value

    with torch.no_grad():
        for batch in batches:
            for name, value in zip(replay.graph.inputs, batch, strict=True):
                observe(name, value)
            replay(batch, observe)
    return total


def _products(layer: nn.Conv2d, x: Tensor) -> Tensor:
    pads: list[int] = []
    for axis in (1, 0):  # F.pad begins with the last one
        whole = (layer.kernel_size[axis] - 1) * layer.dilation[axis]
        same = layer.padding == "same"
        before = whole // 2 if same else int(layer.padding[axis])
        pads += [before, whole - before if same else before]
    patches = F.unfold(F.pad(x, pads), layer.kernel_size, layer.dilation, 0, layer.stride)
    patches = patches.reshape(x.shape[0], layer.groups, -1, patches.shape[-1])
    patches = patches.permute(1, 0, 3, 2).flatten(1, 2)  # (groups, patches, unknowns)
    step = max(1, patches.shape[1] // _ROWS)
    patches = patches[:, ::step].double()
    return patches.transpose(1, 2) @ patches
