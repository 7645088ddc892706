"""What of a network can be made elastic: the numbers of channels, blocks, kernels and pixels it can have.

Groups of channels, residual blocks, kernels and the size of the input are looked up where the steps that cut
them do (``channels.py``, ``residuals.py``, ``kernels.py``, ``resolution.py``), and each option is tried; what
cannot follow is left whole, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from featherweight.elastic import Space
from featherweight.errors import RecipeError
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import why_not
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.excluded import free_channels, held_tensors
from featherweight.tools.groups import ChannelGroup, Channels
from featherweight.tools.kernels import cuttable_kernels
from featherweight.tools.removal import removed
from featherweight.tools.residuals import ResidualBlock, residual_blocks
from featherweight.tools.resolution import with_smaller_input
from featherweight.where import Where

_SMALLEST = 3  # side of a kernel that larger ones may shrink to; one pixel alone sees no neighbours
_LARGEST = 31


def find_space(
    model: Model,
    *,
    where: Where | None = None,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    multiple: int = 8,
    depth: bool = True,
    kernels: bool | Sequence[int] = True,
    inputs: Sequence[float] = (1.0,),
) -> tuple[Space, Channels, dict[str, str]]:
    """The subnets that a network can hold.

    Args:
        model: Without formats.
        where: Which layers may change.
        widths: Shares of the channels of a group that may stay; the whole is always one.
        multiple: Widths are multiples of it, where a group is wide enough.
        depth: Whether residual blocks may go. Of a stage of several, one stays.
        kernels: Whether kernels may shrink, down to 3; or the side lengths that they may have.
        inputs: Shares of the pictures' side.

    Returns:
        The space, the groups of channels in it, and what is fixed: layer, block or 'input' -> why.
    """
    where = where or Where()
    free = free_channels(model, where)
    reasons = dict(free.fixed)
    found = Space(
        _widths(model, free, widths, multiple, reasons),
        _depths(model, where, reasons) if depth else {},
        _kernels(model, where, kernels),
        _inputs(model, inputs, reasons),
    )
    space = _together(model, free, found, reasons)
    groups = {name: free.groups[name] for name in space.widths}
    return space, Channels(groups, free.fixed), reasons


def space_channels(model: Model, space: Space) -> Channels:
    """The groups of a supernet that its space names.

    Raises:
        RecipeError: The network has other groups, blocks or kernels than the space was made for.
    """
    found = channel_groups(model)
    blocks = {block.name for block in residual_blocks(model)} if space.depths else set()
    sizes = _sides(model)
    wrong = [name for name, own in space.widths.items() if not _is_whole(found.groups.get(name), own[-1])]
    wrong += [name for own in space.depths.values() for name in own if name not in blocks]
    wrong += [path for path, own in space.kernels.items() if sizes.get(path) != own[-1]]
    if wrong:
        raise RecipeError(
            "the network was changed after supernet made it elastic",
            where=f"'{wrong[0]}'",
            fix="put subnet directly after supernet, and other structure steps (prune, shrink) behind it",
        )
    return Channels({name: found.groups[name] for name in space.widths}, found.fixed)


def without_excluded(space: Space, channels: Channels, model: Model, where: Where) -> Space:
    """The part of a space that changes no excluded layer."""
    if not where.rules:
        return space
    held = held_tensors(model, where)
    kinds = {path: type(layer).__name__ for path, layer in model.module.named_modules()}
    blocks = {block.name: block for block in residual_blocks(model)} if space.depths else {}

    def may_go(block: str) -> bool:
        return _selects_block(blocks[block], where, kinds)

    widths = {
        name: sizes
        for name, sizes in space.widths.items()
        if not any(member.tensor in held for member in channels.groups[name].members)
    }
    depths = {name: tuple(filter(may_go, own)) for name, own in space.depths.items()}
    kernels = {path: own for path, own in space.kernels.items() if where.selects(path, kinds[path])}
    some = any(where.selects(path, kind) for path, kind in kinds.items() if path)
    depths = {name: own for name, own in depths.items() if own}
    part = Space(widths, depths, kernels, space.inputs if some else (1.0,))
    return replace(part, among=tuple(one for one in space.among if part.contains(one)))


def _is_whole(group: ChannelGroup | None, size: int) -> bool:
    return group is not None and group.size == size


# ---- widths


def _widths(
    model: Model, channels: Channels, shares: Sequence[float], multiple: int, reasons: dict[str, str]
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, group in channels.groups.items():
        sizes = []
        for width in _rounded(group, shares, multiple):
            why = why_not(model, channels, {name: range(width, group.size)})
            if why is None:
                sizes.append(width)
            else:
                reasons.setdefault(f"{name} at {width}", why)
        if sizes:
            found[name] = (*sizes, group.size)
    return found


def _rounded(group: ChannelGroup, shares: Sequence[float], multiple: int) -> list[int]:
    """Numbers of channels below the whole, ascending."""
    step = multiple if group.kind in ("channel", "hidden", "head_dim") else 1
    while step > 1 and 2 * step > group.size:
        step //= 2
    sizes = {max(step, round(share * group.size / step) * step) for share in shares}
    return sorted(size for size in sizes if size < group.size)


# ---- depths


def _depths(model: Model, where: Where, reasons: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Stage -> the blocks that may go, the last one first; of several, the first one stays."""
    kinds = {path: type(layer).__name__ for path, layer in model.module.named_modules()}
    found: dict[str, tuple[str, ...]] = {}
    for name, blocks in _stages(model).items():
        able = [block for block in blocks[1:] or blocks if _selects_block(block, where, kinds)]
        going = tuple(block.name for block in reversed(able) if _can_go(model, block, reasons))
        if going:
            found[name] = going
    return found


def _stages(model: Model) -> dict[str, list[ResidualBlock]]:
    """Blocks on one trunk of one shape, in their order, by what their paths have in common."""
    trunks: dict[tuple[str, str], str] = {}
    for group in channel_groups(model).groups.values():
        for entry, places in group.places.items():
            trunks |= {(entry, place.value): group.name for place in places if group.kind == "channel"}
    runs: dict[object, list[ResidualBlock]] = {}
    for block in residual_blocks(model):
        shape = trace(model, block.entry).values[block.result].shape
        key = block.entry, trunks.get((block.entry, block.result), ""), shape
        runs.setdefault(key, []).append(block)
    parents = [blocks[0].path.rpartition(".")[0] for blocks in runs.values()]
    return {
        parent if parent and parents.count(parent) == 1 else blocks[0].name: blocks
        for parent, blocks in zip(parents, runs.values(), strict=True)
    }


def _selects_block(block: ResidualBlock, where: Where, kinds: Mapping[str, str]) -> bool:
    return all(where.selects(path, kinds[path]) for path in (block.path, *block.layers) if path)


def _can_go(model: Model, block: ResidualBlock, reasons: dict[str, str]) -> bool:
    try:
        removed(model, block)
    except RecipeError as error:
        reasons[block.name] = error.what
        return False
    return True


# ---- kernels and pixels


def _kernels(model: Model, where: Where, wanted: bool | Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Square kernels, with the side lengths that they may have."""
    if wanted is False:
        return {}
    sides = _sides(model)
    found: dict[str, list[int]] = {}
    for smaller in range(_SMALLEST, _LARGEST) if wanted is True else wanted:
        larger = {side: smaller for side in sides.values() if side > smaller and (side - smaller) % 2 == 0}
        for kernel in cuttable_kernels(model, larger):
            if kernel.path in sides and where.selects(
                kernel.path, type(model.module.get_submodule(kernel.path)).__name__
            ):
                found.setdefault(kernel.path, []).append(smaller)
    return {path: (*sorted(set(own)), sides[path]) for path, own in found.items()}


def _sides(model: Model) -> dict[str, int]:
    """Side lengths of the kernels that are as long along each axis."""
    found = {}
    for path, layer in model.module.named_modules():
        size = getattr(layer, "kernel_size", None)
        if isinstance(size, tuple) and len(set(size)) == 1:
            found[path] = int(size[0])
    return found


def _inputs(model: Model, shares: Sequence[float], reasons: dict[str, str]) -> tuple[float, ...]:
    found = []
    for share in sorted({float(one) for one in shares if one < 1}):
        try:
            with_smaller_input(model, share)
            found.append(share)
        except RecipeError as error:
            reasons["input"] = error.what
    return (*found, 1.0)


# ---- all of it


def _together(model: Model, channels: Channels, space: Space, reasons: dict[str, str]) -> Space:
    """The space if its smallest network can be made; else as much of it as can, one choice after another."""
    if _fault(model, channels, space) is None:
        return space
    kept = Space()
    for name, more in _parts(space):
        trial = Space(
            {**kept.widths, **more.widths},
            {**kept.depths, **more.depths},
            {**kept.kernels, **more.kernels},
            more.inputs if len(more.inputs) > 1 else kept.inputs,
        )
        why = _fault(model, channels, trial)
        if why is None:
            kept = trial
        else:
            reasons[name] = why
    return kept


def _parts(space: Space) -> Iterator[tuple[str, Space]]:
    """Each choice as a space of its own."""
    yield from ((name, Space(depths={name: own})) for name, own in space.depths.items())
    yield "input", Space(inputs=space.inputs)
    yield from ((name, Space(widths={name: own})) for name, own in space.widths.items())
    yield from ((path, Space(kernels={path: own})) for path, own in space.kernels.items())


def _fault(model: Model, channels: Channels, space: Space) -> str | None:
    """Why the smallest network of a space cannot be made; None where it can."""
    own = Channels({name: channels.groups[name] for name in space.widths}, channels.fixed)
    try:
        Extractor(model, space, own).extract(space.smallest())
    except RecipeError as error:
        return error.what
    return None
