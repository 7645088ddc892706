"""Subnets: cut as edits, equal to slices of their supernet, trained through it."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
import torch
from torch import Tensor

import elastic_nets
import golden
from featherweight.elastic import Space, Subnet
from featherweight.errors import RecipeError
from featherweight.model import Model, decode_edit, encode_edit
from featherweight.tools.elastic_cut import Extractor, called
from featherweight.tools.elastic_space import find_space
from featherweight.tools.groups import Channels


@cache
def found(name: str) -> tuple[Model, Space, Channels]:
    model = elastic_nets.model(name)
    space, channels, _ = find_space(model, multiple=2, inputs=(0.5, 1.0))
    return model, space, channels


def _random(name: str, count: int) -> list[Subnet]:
    rng = random.Random(7)
    _, space, _ = found(name)
    return [space.smallest(), *(space.sample(rng) for _ in range(count)), space.largest()]


def _all(outputs: object) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]  # type: ignore[list-item]


@pytest.mark.parametrize("name", elastic_nets.ALL)
def test_slices_of_the_supernet_are_the_subnet(name: str) -> None:
    model, space, channels = found(name)
    assert not space.is_trivial
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    extractor = Extractor(model, space, channels)
    x = elastic_nets.inputs(model)
    for subnet in _random(name, 3):
        sub = extractor.extract(subnet)
        own = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
        slices = extractor.slices(sub).of(own)
        state = dict(sub.module.named_parameters()) | dict(sub.module.named_buffers())
        for key, tensor in slices.items():
            assert torch.equal(tensor, state[key]), key
        assert set(dict(sub.module.named_parameters())) <= set(slices)
        wanted = elastic_nets.outputs(sub, *x)
        zeroed = {key: torch.zeros_like(value) for key, value in sub.module.state_dict().items()}
        kept = {key: value.clone() for key, value in sub.module.named_buffers()}
        sub.module.load_state_dict(zeroed)  # so that only the slices count
        with torch.no_grad():
            made = _all(called(sub, {**slices, **_constants(kept, slices)}, x))
        assert all(map(torch.equal, made, wanted))
        assert [one.shape for one in made] == [one.shape for one in elastic_nets.outputs(model, *x)]
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())


def _constants(kept: dict[str, Tensor], slices: dict[str, Tensor]) -> dict[str, Tensor]:
    """What programs hold beside the supernet's tensors."""
    return {key: value for key, value in kept.items() if key not in slices}


@pytest.mark.parametrize("name", elastic_nets.ALL)
def test_gradients_reach_what_was_kept(name: str) -> None:
    model, space, channels = found(name)
    extractor = Extractor(model, space, channels)
    parameters = {key: one.detach().clone().requires_grad_() for key, one in model.parameters.items()}
    sub = extractor.extract(space.smallest())
    slices = extractor.slices(sub)
    made = _all(called(sub, slices.of(parameters), elastic_nets.inputs(model)))
    sum(one.float().square().sum() for one in made).backward()
    kept = sum(one.numel() for one in sub.module.parameters())
    touched = sum(int((one.grad != 0).sum()) for one in parameters.values() if one.grad is not None)
    assert 0 < touched <= kept < sum(one.numel() for one in parameters.values())
    for part in slices.parts.values():  # and nothing else
        if part.source in parameters:
            mask = torch.zeros_like(parameters[part.source])
            index = [torch.arange(size) for size in mask.shape]
            for axis, indices in part.kept:
                index[axis] = indices
            mask[torch.meshgrid(*index, indexing="ij")] = 1
            gradient = parameters[part.source].grad
            assert gradient is None or not (gradient * (1 - mask)).any()


@pytest.mark.parametrize("name", elastic_nets.ALL)
def test_a_subnet_is_rebuilt_from_its_edits(name: str) -> None:
    model, space, channels = found(name)
    extractor = Extractor(model, space, channels)
    x = elastic_nets.inputs(model)
    for subnet in _random(name, 1)[:2]:
        sub = extractor.extract(subnet)
        edits = tuple(decode_edit(json.loads(json.dumps(encode_edit(edit)))) for edit in sub.edits)
        rebuilt = model.rebuild(edits, sub.module.state_dict()).eval()
        with torch.no_grad():
            assert all(map(torch.equal, _all(rebuilt(*x)), elastic_nets.outputs(sub, *x)))


def test_values_are_those_of_now() -> None:
    model = golden.model("residual")
    own = model.evolve(module=model.copy_module())
    space, channels, _ = find_space(own, multiple=2)
    extractor = Extractor(own, space, channels)
    extractor.extract(space.smallest())
    with torch.no_grad():
        own.module.get_parameter("head.weight").add_(1.0)
    sub = extractor.extract(space.smallest())
    width = sub.module.get_parameter("head.weight").shape[1]
    assert torch.equal(
        sub.module.get_parameter("head.weight"), own.module.get_parameter("head.weight")[:, :width]
    )


def test_what_the_space_does_not_hold() -> None:
    model, space, channels = found("residual")
    with pytest.raises(RecipeError, match=r"no such subnet: 'stem.0' can have 2, 4, 6, 8, not 3"):
        Extractor(model, space, channels).extract(Subnet(widths={"stem.0": 3}))


def test_few_bases_are_held() -> None:
    model, space, channels = found("depthwise")
    extractor = Extractor(model, space, channels, room=0)
    subnets = [space.sample(random.Random(seed)) for seed in range(6)]
    made = [extractor.extract(subnet) for subnet in subnets]
    assert len(extractor._bases) <= 4
    again = [extractor.extract(subnet) for subnet in subnets]
    assert [one.edits for one in made] == [one.edits for one in again]
