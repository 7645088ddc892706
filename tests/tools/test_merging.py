"""Where networks side by side can part, what it saves, and the edit that shares the trunk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import LoadError, RecipeError
from featherweight.graph import trace
from featherweight.model import Model, decode_edit, encode_edit
from featherweight.side_by_side import side_by_side
from featherweight.tools.costs import totals
from featherweight.tools.merging import Beside, Parting, chosen, kept, partings
from featherweight.tools.merging_edit import merged
from featherweight.tools.merging_similarity import similarities
from golden import another, beside, inputs, model, model_of
from nets import NETS


def batches(name: str, count: int = 16) -> list[tuple[Tensor, ...]]:
    return [(torch.from_numpy(inputs(name, count)),)]


def options(both: Model, examples: list[tuple[Tensor, ...]]) -> tuple[Beside, list[Parting]]:
    seen = Beside(both)
    first, second = seen.tasks
    pairs = seen.pairs(first, second)
    alike = similarities(both, [(one.value, other.value) for one, other in pairs], examples)
    return seen, partings(seen, first, second, alike)


class Plain(nn.Module):
    """Convolutions of some widths, and a head."""

    def __init__(self, widths: tuple[int, ...], classes: int, stride: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = (3, *widths)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def plain(*widths: int, classes: int = 4, stride: int = 2, seed: int = 0) -> Model:
    return model_of(Plain(widths, classes, stride, seed), torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("name", list(NETS))
class TestEveryGoldenNet:
    def test_every_place_gives_a_network_that_computes_what_was_traced_and_saves_what_was_said(
        self, name: str
    ) -> None:
        both, examples = beside(name), batches(name)
        seen, found = options(both, examples)
        whole = totals(both)
        for one in found:
            made = merged(both, seen, [one], examples)  # proves its outputs itself
            now = totals(made)
            assert 1 - now["params"] / whole["params"] == pytest.approx(one.saved["parameters"], abs=1e-9)
            assert 1 - now["macs"] / whole["macs"] == pytest.approx(one.saved["macs"], abs=1e-9)

    def test_the_deepest_place_shares_all_but_the_head(self, name: str) -> None:
        _, found = options(beside(name), batches(name))
        assert max(one.saved["macs"] for one in found) > 0.4

    def test_a_merged_network_is_rebuilt_from_data(self, name: str) -> None:
        both, examples = beside(name), batches(name)
        seen, found = options(both, examples)
        made = merged(both, seen, [found[len(found) // 2]], examples)
        read = tuple(decode_edit(encode_edit(edit)) for edit in made.edits)
        again = both.rebuild(read, made.module.state_dict())
        with torch.no_grad():
            for one, other in zip(again(*examples[0]), made.module(*examples[0]), strict=True):
                assert torch.equal(one, other)


class TestCutPoints:
    def test_nothing_inside_of_a_residual_block_is_one(self) -> None:
        names = [point.name for point in Beside(beside("residual")).points["one"]]
        assert "layer1.relu#1:0" in names
        assert not any("conv1" in name or "shortcut" in name for name in names)

    def test_dense_connections_part_only_where_they_meet(self) -> None:
        names = [point.name for point in Beside(beside("concat")).points["one"]]
        assert "stem#0:0" in names
        assert not any(name.startswith("convs.") for name in names)

    def test_a_batch_norm_and_an_activation_stay_with_their_layer(self) -> None:
        names = [point.name for point in Beside(beside("residual")).points["one"]]
        assert "stem.2#0:0" in names
        assert "stem.0#0:0" not in names
        assert "stem.1#0:0" not in names

    def test_one_network_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="several networks side by side"):
            Beside(model("residual"))


class TestDifferentNetworks:
    def test_values_of_one_shape_are_taken_over(self) -> None:
        both = side_by_side({"a": plain(8, 16, seed=1), "b": plain(8, 12, 16, stride=2, classes=3, seed=2)})
        _, found = options(both, batches("residual"))
        assert any(one.adapts is None for one in found)

    def test_an_adapter_maps_channels_and_is_counted(self) -> None:
        both = side_by_side({"a": plain(8, 16, seed=1), "b": plain(6, 12, classes=3, seed=2)})
        examples = batches("residual", 64)
        seen, found = options(both, examples)
        assert all(one.adapts is not None for one in found)
        one = max(found, key=lambda parting: parting.saved["macs"])
        made = merged(both, seen, [one], examples)
        assert 1 - totals(made)["params"] / totals(both)["params"] == pytest.approx(one.saved["parameters"])
        assert {type(layer).__name__ for layer in made.module.tasks.b.modules()} >= {"Linear"}

    def test_an_adapter_begins_as_the_least_squares_map(self) -> None:
        """A network that is another one with its channels doubled is told exactly."""
        first = plain(8, 16, seed=1)
        second = Plain((8, 32), 3, seed=1)
        layers = first.module.layers
        with torch.no_grad():
            second.layers[0].load_state_dict(layers[0].state_dict())
            for name in ("weight", "bias"):
                value = getattr(layers[1], name)
                getattr(second.layers[1], name).copy_(torch.cat([value, 2 * value]))
        both = side_by_side({"a": first, "b": model_of(second, torch.zeros(2, 3, 16, 16))})
        examples = batches("residual", 64)
        seen, found = options(both, examples)
        one = max(found, key=lambda parting: parting.saved["parameters"])
        assert one.similarity == pytest.approx(1.0, abs=1e-6)
        made = merged(both, seen, [one], examples)
        with torch.no_grad():
            wanted, now = both.module(*examples[0])[1], made.module(*examples[0])[1]
        assert float((wanted - now).square().mean() / wanted.square().mean()) < 1e-3

    def test_networks_without_a_common_shape_are_told_which_each_has(self) -> None:
        both = side_by_side({"a": plain(8, stride=1), "b": Sequences.model()})
        seen = Beside(both)
        with pytest.raises(RecipeError, match=r"'a' \(8, 16, 16\), \(8,\) and 'b' .*\(48, 5\)") as caught:
            partings(seen, "a", "b", {})
        assert caught.value.fix is not None


class Sequences(nn.Module):
    """Rows of a picture as a sequence, whose widths are nobody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.flatten(1, 2))).mean(1)

    @classmethod
    def model(cls) -> Model:
        return model_of(cls(), torch.zeros(2, 3, 16, 16))


class TestChosen:
    def test_the_most_similar_place_within_the_amount(self) -> None:
        _, found = options(beside("residual"), batches("residual"))
        (one,) = chosen([found], {"macs": 0.75}) or []
        fitting = [other for other in found if 1 - other.saved["macs"] <= 0.75]
        assert one.similarity == max(other.similarity for other in fitting)

    def test_without_limits_the_most_similar_of_all(self) -> None:
        _, found = options(beside("residual"), batches("residual"))
        (one,) = chosen([found], {}) or []
        assert one.similarity == max(other.similarity for other in found)

    def test_nothing_where_the_limit_cannot_be_kept(self) -> None:
        _, found = options(beside("residual"), batches("residual"))
        assert chosen([found], {"parameters": 0.3}) is None

    def test_three_networks_keep_the_limit_together(self) -> None:
        both = side_by_side(
            {"a": model("residual"), "b": another("residual"), "c": another("residual", seed=9)}
        )
        examples = batches("residual")
        seen = Beside(both)
        pairs = [(s.value, p.value) for task in "bc" for s, p in seen.pairs("a", task)]
        alike = similarities(both, pairs, examples)
        picked = chosen([partings(seen, "a", task, alike) for task in "bc"], {"parameters": 0.5})
        assert picked is not None
        assert kept(picked, "parameters") <= 0.5
        made = merged(both, seen, picked, examples)
        assert totals(made)["params"] / totals(both)["params"] <= 0.5
        assert [y.shape for y in made.module(*examples[0])] == [(16, 10)] * 3


class TestSimilarity:
    def test_is_one_for_the_same_network_and_smaller_for_others(self) -> None:
        same = side_by_side({"a": model("residual"), "b": model("residual")})
        _, found = options(same, batches("residual"))
        assert [one.similarity for one in found] == pytest.approx([1.0] * len(found))
        _, other = options(beside("residual"), batches("residual"))
        assert all(one.similarity < 0.9999 for one in other[1:])

    def test_is_that_of_the_paper(self) -> None:
        """<X X^T, Y Y^T> / (|X X^T| |Y Y^T|) of centred features."""
        both, examples = beside("linear3d"), batches("linear3d")
        seen, found = options(both, examples)
        one = found[0]
        features = {}

        def hook(name: str) -> object:
            return lambda layer, args, output: features.__setitem__(name, output.flatten(1).double())

        for task in seen.tasks:
            path = f"tasks.{task}.{one.point.name.partition('#')[0]}"
            both.module.get_submodule(path).register_forward_hook(hook(task))  # type: ignore[arg-type]
        with torch.no_grad():
            both.module(*examples[0])
        x, y = (value - value.mean(0) for value in features.values())
        wanted = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
        assert one.similarity == pytest.approx(float(wanted), abs=1e-6)


class TestEntries:
    def test_an_entry_a_task_calls_its_own_head_alone(self) -> None:
        both = side_by_side({"a": model("residual"), "b": another("residual")}, entries=True)
        assert list(both.entries) == ["forward", "a", "b"]
        examples = batches("residual")
        seen, found = options(both, examples)
        made = merged(both, seen, [found[-1]], examples)
        with torch.no_grad():
            whole = made.module(*examples[0])
            for name, wanted in zip("ab", whole, strict=True):
                own = getattr(made.module, made.entries[name].method)(*examples[0])
                assert torch.allclose(own, wanted)
        assert {node.layer for node in trace(made, "a")} & {"tasks.b.head"} == set()


class TestSideBySide:
    def test_gives_what_each_gives(self) -> None:
        (x,) = batches("residual")[0]
        with torch.no_grad():
            found = beside("residual").module(x)
            assert torch.equal(found[0], model("residual").module(x))
            assert torch.equal(found[1], another("residual").module(x))

    def test_outputs_have_the_names_of_tasks(self) -> None:
        assert beside("residual").entries["forward"].output_names == ("one", "other")

    def test_inputs_that_differ_are_named(self) -> None:
        with pytest.raises(LoadError, match=r"\(3, 16, 16\).*\(9, 12\)"):
            side_by_side({"a": model("residual"), "b": model("linear3d")})

    @pytest.mark.parametrize("name", ["forward", "a.b", "", "1st", "train"])
    def test_names_are_names(self, name: str) -> None:
        with pytest.raises(LoadError, match="no name for a task"):
            side_by_side({name: model("residual"), "b": another("residual")})

    def test_one_is_nothing_to_merge(self) -> None:
        with pytest.raises(LoadError, match="1 model is nothing to merge"):
            side_by_side({"a": model("residual")})

    def test_costs_are_sums(self) -> None:
        both, each = totals(beside("residual")), [totals(model("residual")), totals(another("residual"))]
        assert both["params"] == sum(one["params"] for one in each)
        assert both["macs"] == sum(one["macs"] for one in each)
        assert np.isfinite(both["bytes"])
