"""Static costs against numbers that one can count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.formats import IntQuant, PerChannel
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.tools.costs import layer_costs, node_macs, stored_bytes, totals
from golden import model, model_of, quantized
from nets import NETS


class Function(nn.Module):
    """A module whose forward is a function of its inputs."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)  # type: ignore[operator]


def macs(module: nn.Module, *shape: int) -> int:
    return totals(model_of(module, torch.randn(*shape)))["macs"]


class TestMacs:
    @pytest.mark.parametrize("batch", [2, 3])
    @pytest.mark.parametrize(
        ("module", "shape", "expected"),
        [
            (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10), 8 * 10 * 10 * 3 * 9),
            (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), (8, 10, 10), 8 * 5 * 5 * 9),
            (nn.Conv2d(8, 16, 1, groups=2), (8, 4, 4), 16 * 16 * 4),
            (nn.Conv1d(4, 6, 5), (4, 20), 6 * 16 * 4 * 5),
            (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 3 * 27 * 2 * 8),
            (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 4 * 25 * 6 * 9),
            (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 4 * 25 * 3 * 9),
            (nn.Linear(12, 7), (12,), 84),
            (nn.Linear(12, 7, bias=False), (5, 12), 5 * 84),
            (nn.LSTM(6, 4, batch_first=True), (9, 6), 9 * 4 * 4 * (6 + 4)),
            (nn.GRU(6, 4, num_layers=2, batch_first=True), (9, 6), 9 * 3 * 4 * (6 + 4 + 4 + 4)),
            (nn.LSTM(6, 4, bidirectional=True, batch_first=True), (9, 6), 2 * 9 * 4 * 4 * (6 + 4)),
            (nn.BatchNorm2d(3), (3, 4, 4), 0),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
    )
    def test_of_one_layer(self, module: nn.Module, shape: tuple[int, ...], expected: int, batch: int) -> None:
        outputs = 3 if isinstance(module, nn.LSTM) else 2 if isinstance(module, nn.GRU) else 1
        made = model_of(module, torch.randn(batch, *shape), outputs=outputs)
        assert totals(made)["macs"] == expected

    def test_of_matrix_products(self) -> None:
        a, b = torch.randn(2, 5, 6), torch.randn(2, 6, 7)
        assert totals(model_of(Function(torch.matmul), a, b))["macs"] == 5 * 6 * 7
        assert totals(model_of(Function(torch.bmm), a, b))["macs"] == 5 * 6 * 7
        q, k = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 9, 6)
        attend = Function(lambda q, k: F.scaled_dot_product_attention(q, k, k))
        assert totals(model_of(attend, q, k))["macs"] == 4 * (5 * 9 * 6) * 2

    def test_a_constant_on_the_left_of_a_product(self) -> None:
        class Mix(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mixing = nn.Parameter(torch.randn(9, 5))

            def forward(self, x: Tensor) -> Tensor:
                return self.mixing @ x

        assert macs(Mix(), 2, 5, 6) == 9 * 5 * 6

    def test_a_layer_that_is_called_twice_counts_twice(self) -> None:
        rows = {row.name: row for row in layer_costs(model("shared"))}
        assert rows["block"].macs == 2 * 12 * 8 * 8 * 12 * 9
        assert rows["block"].params == 12 * 12 * 9 + 12

    def test_a_layer_whose_first_output_nobody_reads(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(6, 4, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.lstm(x)[1][0][-1]

        assert macs(Last(), 2, 9, 6) == 9 * 4 * 4 * 10


class TestRows:
    @pytest.mark.parametrize("name", NETS)
    def test_add_up_to_the_totals(self, name: str) -> None:
        rows = layer_costs(model(name))
        all_of = totals(model(name))
        for key in ("macs", "params", "bytes"):
            assert sum(getattr(row, key) for row in rows) == all_of[key]
        assert all_of["params"] == sum(p.numel() for p in model(name).module.parameters())
        assert all_of["bytes"] == 4 * all_of["params"]
        assert len({row.name for row in rows}) == len(rows)

    def test_are_in_order_of_the_first_call(self) -> None:
        rows = layer_costs(model("residual"))
        assert [row.name for row in rows][:3] == ["stem.0", "stem.1", "stem.2"]
        assert rows[0].type == "Conv2d"
        assert rows[0].shape == (8, 16, 16)
        assert rows[0].activation_bytes == 4 * 8 * 16 * 16
        assert [row.name for row in rows][-1] == "head"

    def test_functions_with_work_have_a_row(self) -> None:
        names = {row.name: row for row in layer_costs(model("attention"))}
        assert names["/scaled_dot_product_attention#0"].macs == 2 * 12 * 12 * 32
        assert "/add#1" not in names

    def test_a_tied_parameter_counts_once(self) -> None:
        rows = {row.name: row for row in layer_costs(model("shared"))}
        assert rows["first"].params == 12 * 12 + 12
        assert rows["second"].params == 12

    def test_formats_count(self) -> None:
        rows = {row.name: row for row in layer_costs(quantized("residual"))}
        # int8 weights, a scale a channel, a float32 bias
        assert rows["layer1.conv1"].bytes == 8 * 8 * 9 + 8 * 4 + 8 * 4
        assert rows["layer1.conv1"].activation_bytes == 4 * 8 * 16 * 16
        assert rows["layer1.relu"].activation_bytes == 2 * (8 * 16 * 16 + 5)
        before, after = totals(model("residual")), totals(quantized("residual"))
        assert after["bytes"] < 0.4 * before["bytes"]
        assert after["macs"] == before["macs"]


def test_stored_bytes_are_those_of_the_last_format() -> None:
    int8 = IntQuant(torch.tensor(0.0), torch.tensor(1.0))
    int4 = IntQuant(torch.zeros(2), torch.ones(2), 4, granularity=PerChannel(0))
    assert stored_bytes(10, ()) == 40
    assert stored_bytes(10, (int8,)) == 15
    assert stored_bytes(10, (int8, int4)) == 14


def test_entries_add_their_macs_and_share_their_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def twice(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    x = torch.randn(2, 4)
    entries = {name: Entry((x,), ("x",), ("y",), {}, name) for name in ("forward", "twice")}
    assert totals(Model(Net(), entries)) == {"macs": 48, "params": 20, "bytes": 80}


def test_elementwise_work_is_not_counted() -> None:
    graph = trace(model("residual"))
    assert {node.op for node in graph if node_macs(graph, node)} == {"conv2d", "linear"}
