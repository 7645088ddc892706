"""What rounding will do to weights: no worse than the nearest on the columns, biases take the mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.formats import IntQuant, PerChannel
from featherweight.method import Silent, in_memory
from featherweight.model import Entry, Model
from featherweight.tools.foresight import foreseen_changes, nearest_changes
from featherweight.tools.ranges import weight_range


class Shared(nn.Module):
    """A linear layer, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.again(torch.relu(self.first(x))))
        return y


def made() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    mixing = torch.randn(6, 6)
    x = torch.randn(64, 6) @ mixing + 1.0
    return Model(Shared().eval(), {"forward": Entry((x[:2],), ("x",), ("y",), {"x": {0: "n"}})}), x


def grid(weight: Tensor, bits: int) -> IntQuant:
    draft = IntQuant(-torch.ones(1), torch.ones(1), bits, True, PerChannel(0), signed=True)
    low, high = weight_range(weight, draft, "minmax", 100.0)
    return IntQuant(low, high, bits, True, PerChannel(0), signed=True)


def formats(model: Model) -> dict[str, dict[str, IntQuant]]:
    return {
        name: {f"int{bits}": grid(weight.detach(), bits) for bits in (3, 4)}
        for name, weight in model.parameters.items()
        if weight.dim() == 2
    }


def test_error_of_the_output_is_below_that_of_the_nearest() -> None:
    model, x = made()
    asked = formats(model)
    ours = foreseen_changes(model, [(x[:40],), (x[40:],)], asked, scratch=in_memory, progress=Silent())
    plain = nearest_changes(model, asked)
    for label in ("int3", "int4"):
        change, near = ours["first.weight"][label], plain["first.weight"][label]["first.weight"]
        weight = model.parameters["first.weight"].detach()
        fmt = asked["first.weight"][label]
        assert torch.allclose(fmt.project(weight + change["first.weight"]), weight + change["first.weight"])
        error = x @ change["first.weight"].T + change["first.bias"]
        centred = x - x.mean(0)
        assert error.square().mean() < (x @ near.T).square().mean()
        assert (centred @ change["first.weight"].T).square().mean() < (centred @ near.T).square().mean()
        assert torch.allclose(error.mean(0), torch.zeros(8), atol=1e-5)


def test_a_weight_that_is_read_twice_is_rounded_to_the_nearest() -> None:
    model, x = made()
    asked = formats(model)
    ours = foreseen_changes(model, [(x,)], asked, scratch=in_memory, progress=Silent())
    plain = nearest_changes(model, asked)
    for label, change in ours["again.weight"].items():
        assert set(change) == {"again.weight"}
        assert torch.equal(change["again.weight"], plain["again.weight"][label]["again.weight"])


def test_the_model_stays_as_it_is() -> None:
    model, x = made()
    before = {name: tensor.detach().clone() for name, tensor in model.parameters.items()}
    foreseen_changes(model, [(x,)], formats(model), scratch=in_memory, progress=Silent())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.parameters.items())
