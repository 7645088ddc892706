"""Peak activation memory by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.model import Entry, Model
from featherweight.tools.liveness import peak_memory


def _model(module: nn.Module, *shape: int) -> Model:
    entry = Entry((torch.randn(2, *shape),), ("x",), ("y",), {"x": {0: "batch"}})
    return Model(module.eval(), {"forward": entry})


def test_a_chain_holds_two_neighbours() -> None:
    chain = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 20))
    peak = peak_memory(_model(chain, 10))
    assert (peak.bytes, peak.at) == (4 * 200, "1#0")
    assert peak.values == ("0#0:0", "1#0:0")


def test_a_branch_keeps_its_source_alive() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(10, 100), nn.Linear(100, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.narrow(torch.relu(self.wide(x)))
            return y

    assert peak_memory(_model(Branch(), 10)).bytes == 4 * (10 + 100 + 100)


def test_a_view_costs_nothing_and_keeps_its_source() -> None:
    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x).flatten(1)
            return y * y.sum(1, keepdim=True)

    assert peak_memory(_model(Viewed(), 4, 5)).bytes == 4 * (20 + 1 + 20)


def test_an_output_is_held_to_the_end() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(50, 50)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            early = torch.relu(x)
            return early, torch.relu(self.fc(early))

    assert peak_memory(_model(Two(), 50)).bytes == 4 * 150
