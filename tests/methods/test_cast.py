"""Cast: which weights become 16-bit floats, and what is said where a runtime has none."""

from __future__ import annotations

import pytest
import torch

from featherweight.errors import RecipeError
from featherweight.formats import FloatCast
from featherweight.methods.cast import Cast
from golden import context, data, folded, target


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_and_kernels_become_short_floats(dtype: str) -> None:
    net = folded("lstm")
    done = Cast(weights=dtype).apply(net, context(net, data("lstm"), target("torch")))  # type: ignore[arg-type]
    assert set(done.formats) == {name for name, weight in net.parameters.items() if weight.dim() > 1}
    for name, (fmt,) in done.formats.items():
        assert fmt == FloatCast(dtype)  # type: ignore[arg-type]
        weight = net.parameters[name].detach()
        stored = fmt.project(weight)
        assert torch.equal(stored, weight.to(getattr(torch, dtype)).float())
        assert torch.equal(fmt.project(stored), stored)
        assert fmt.bits(weight.numel()) == 16


def test_a_type_that_the_runtime_lacks_is_refused_with_the_one_it_has() -> None:
    net = folded("residual")
    with pytest.raises(RecipeError, match="no weight that onnxruntime stores as bfloat16") as told:
        Cast(weights="bfloat16").apply(net, context(net, data("residual"), target("onnxruntime")))
    assert told.value.fix == "use weights: float16, which onnxruntime stores"


def test_where_nothing_is_left_there_is_nothing_else_to_say() -> None:
    net = folded("residual")
    step = Cast.model_validate({"where": {"exclude": ["*"]}, "weights": "bfloat16"})
    with pytest.raises(RecipeError) as told:
        step.apply(net, context(net, data("residual"), target("executorch")))
    assert told.value.fix == "check where, or take another runtime"
