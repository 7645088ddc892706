"""cluster: values that weights share, what other steps make of them, and what files hold."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.errors import DataError, RecipeError
from featherweight.formats import FloatCast, IntQuant, Palette, Sparse
from featherweight.method import Context
from featherweight.methods.cast import Cast
from featherweight.methods.cluster import Cluster
from featherweight.methods.finetune import Finetune
from featherweight.methods.quantize import Quantize
from featherweight.methods.rounding import Rounding
from featherweight.methods.sparsify import Sparsify
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.recipe import Recipe
from featherweight.tools.costs import stored_bytes
from featherweight.tools.kmeans import kmeans
from featherweight.tools.palettes import in_floats
from featherweight.tools.simulate import projected_parameters, simulate
from featherweight.tools.simulated import Simulated
from golden import context, data, decibels, folded, inputs, model, model_of, target
from nets import NETS

RESIDUAL = "residual"


def around(net: str, runtime: str = "onnxruntime", seed: int = 0) -> Context:
    begun = folded(net)
    made = context(begun, data(net), target(runtime), seed=seed)
    return replace(made, models={"original": model(net), "float": begun})


@cache
def clustered(net: str = RESIDUAL, **settings: object) -> Model:
    return Cluster.model_validate(settings).apply(folded(net), around(net))


@cache
def sparse(net: str = RESIDUAL) -> Model:
    return Sparsify(sparsity=0.6, schedule="none").apply(folded(net), around(net))


def palettes(net: Model) -> dict[str, Palette]:
    pairs = [(name, fmt) for name, chain in net.formats.items() for fmt in chain]
    return {name: fmt for name, fmt in pairs if isinstance(fmt, Palette)}


def quality(net: Model, of: str = RESIDUAL) -> float:
    """Decibels of the outputs over their error."""
    x = torch.from_numpy(inputs(of, 32, 9))
    with torch.no_grad():
        return decibels(folded(of).module(x), simulate(net)(x)[0])


def distinct(x: Tensor) -> int:
    return len(x.detach().unique())


class TestPalettes:
    @pytest.mark.parametrize("net", NETS)
    def test_every_weight_has_so_many_values(self, net: str) -> None:
        done = clustered(net, bits=2)
        stored = projected_parameters(done)
        assert len(stored) >= 3
        for name, value in stored.items():
            assert distinct(value) <= 4
            assert done.parameters[name].dim() >= 2
            assert torch.equal(done.parameters[name], folded(net).parameters[name])

    def test_values_are_those_of_kmeans(self) -> None:
        for name, fmt in palettes(clustered(colors=6, init="density")).items():
            weight = folded(RESIDUAL).parameters[name].detach().numpy()
            wanted = kmeans(weight, 6, init="density")
            np.testing.assert_allclose(np.sort(fmt.centroids.numpy()), wanted, rtol=1e-6)

    def test_optimal_has_the_least_error(self) -> None:
        def error(init: str) -> float:
            done = clustered(bits=3, init=init)
            stored = projected_parameters(done)
            weights = {name: done.parameters[name].detach() for name in stored}
            return sum(float((one - weights[name]).square().sum()) for name, one in stored.items())

        others = [error(init) for init in ("linear", "density", "kmeans++")]
        assert error("optimal") <= min(others) * (1 + 1e-6)

    def test_the_seed_draws(self) -> None:
        step = Cluster(init="kmeans++", iterations=0)
        one, two, three = (step.apply(folded(RESIDUAL), around(RESIDUAL, seed=seed)) for seed in (1, 1, 2))
        first = [fmt.centroids.tolist() for fmt in palettes(one).values()]
        assert first == [fmt.centroids.tolist() for fmt in palettes(two).values()]
        assert first != [fmt.centroids.tolist() for fmt in palettes(three).values()]

    def test_groups_of_channels_lose_less_and_cost_more(self) -> None:
        whole, parts = clustered(bits=2), clustered(bits=2, granularity="per_group", group=4)
        for name, fmt in palettes(parts).items():
            weight = folded(RESIDUAL).parameters[name].detach()
            assert fmt.centroids.shape == (-(-weight.shape[0] // 4), 4)
            one = palettes(whole)[name]
            assert fmt.stored_bytes(weight.numel()) > one.stored_bytes(weight.numel())
            assert (fmt.project(weight) - weight).norm() <= (one.project(weight) - weight).norm() * 1.0001

    def test_a_scale_of_each_channel(self) -> None:
        for name, fmt in palettes(clustered(bits=2, scale="per_channel")).items():
            weight = folded(RESIDUAL).parameters[name].detach()
            assert fmt.scale is not None
            assert fmt.scale.shape == weight.shape[:1]
            rows = weight.flatten(1)
            torch.testing.assert_close(fmt.scale, rows.square().mean(1).sqrt())
            shades = fmt.project(weight).flatten(1) / fmt.scale[:, None]
            assert len((shades * 1e4).round().unique()) <= 4

    def test_transposed_kernels_have_their_channels_on_the_second_axis(self) -> None:
        net = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 8, 2, 2), torch.nn.Conv2d(8, 2, 1))
        begun = model_of(net, torch.randn(2, 3, 4, 4))
        ctx = replace(around(RESIDUAL), models={"original": begun})
        done = Cluster(bits=2, granularity="per_group", group=4, scale="per_channel").apply(begun, ctx)
        fmt = palettes(done)["0.weight"]
        assert (fmt.axis, fmt.centroids.shape[0]) == (1, 2)
        assert fmt.scale is not None
        assert fmt.scale.shape == (8,)

    def test_a_tensor_that_is_no_smaller_stays(self) -> None:
        done = clustered("depthwise", bits=8)
        floats = [name for name, one in folded("depthwise").parameters.items() if one.numel() < 200]
        assert floats
        assert not set(floats) & set(done.formats)

    def test_the_file_holds_floats_and_the_cost_says_so(self) -> None:
        for name, chain in clustered().formats.items():
            count = folded(RESIDUAL).parameters[name].numel()
            assert stored_bytes(count, chain) == 4 * count
            assert chain[-1].stored_bytes(count) < 4 * count


class TestShared:
    @pytest.mark.parametrize("scale", ["auto", "none", "per_channel"])
    def test_one_codebook_for_all(self, scale: str) -> None:
        found = palettes(clustered(bits=3, granularity="shared", scale=scale))
        assert len({fmt.codebook for fmt in found.values()}) == 1
        first = next(iter(found.values()))
        assert first.codebook in found
        for fmt in found.values():
            assert torch.equal(fmt.centroids, first.centroids)
            assert fmt.tensors == len(found)

    def test_where_says_who_shares(self) -> None:
        step = Cluster.model_validate({"granularity": "shared", "where": {"include": ["layer1"]}})
        done = step.apply(folded(RESIDUAL), around(RESIDUAL))
        assert set(palettes(done)) == {"layer1.conv1.weight", "layer1.conv2.weight"}

    def test_training_moves_it_once_for_all(self) -> None:
        begun = clustered(bits=3, granularity="shared")
        done = Finetune(steps=6, batch_size=16).apply(begun, around(RESIDUAL))
        before, after = palettes(begun), palettes(done)
        first = next(iter(after.values()))
        assert not torch.equal(first.centroids, next(iter(before.values())).centroids)
        for name, fmt in after.items():
            assert torch.equal(fmt.centroids, first.centroids)
            assert torch.equal(fmt.project(done.parameters[name]), done.parameters[name])

    def test_its_gradient_is_the_sum_over_all_tensors(self) -> None:
        begun = clustered(bits=3, granularity="shared")
        net = Simulated(begun)
        steps = net.groups()["steps"]
        assert len(steps) == 1
        x = torch.from_numpy(inputs(RESIDUAL, 8))
        net.eval()
        (net(x)[0] ** 2).sum().backward()
        stored = {
            name: value.detach().clone().requires_grad_()
            for name, value in projected_parameters(begun).items()
        }
        plain = torch.func.functional_call(begun.copy_module(), stored, (x,))
        (plain**2).sum().backward()
        levels = next(iter(palettes(begun).values())).centroids
        wanted = torch.zeros(len(levels), dtype=torch.float64)
        for name, fmt in palettes(begun).items():
            slope, codes = stored[name].grad, fmt.codes(begun.parameters[name].detach())
            assert slope is not None
            assert fmt.scale is not None
            wanted.index_add_(0, codes.flatten(), (slope * fmt.scale).double().flatten())
        unit = next(one for one in net.formats.values()).get_buffer("first_centroids")
        seen = steps[0].grad
        assert seen is not None  # plain descent on the parameter moves centroids by exactly the sum
        torch.testing.assert_close((seen * unit).double(), wanted, rtol=1e-3, atol=1e-4)

    def test_copies_and_what_is_read_back_share_one_too(self) -> None:
        net = Simulated(clustered(bits=3, granularity="shared"))
        twin = copy.deepcopy(net)
        (own,), (other,) = net.groups()["steps"], twin.groups()["steps"]
        with torch.no_grad():
            other.add_(0.1)
        assert not torch.equal(own, other)
        net.load_state_dict(twin.state_dict())
        assert torch.equal(own, other)
        assert len(net.groups()["steps"]) == 1
        found = list(palettes(net.absorb()).values())
        assert all(torch.equal(fmt.centroids, found[0].centroids) for fmt in found)

    def test_an_average_of_the_weights_is_one_of_the_codebook(self) -> None:
        begun = clustered(bits=3, granularity="shared")
        done = Finetune(steps=6, batch_size=16, ema=0.5).apply(begun, around(RESIDUAL))
        found = list(palettes(done).values())
        assert all(torch.equal(fmt.centroids, found[0].centroids) for fmt in found)
        for name, fmt in palettes(done).items():
            assert torch.equal(fmt.project(done.parameters[name]), done.parameters[name])

    def test_a_codebook_stays_where_some_of_its_layers_must(self) -> None:
        begun = clustered(bits=3, granularity="shared")
        step = Finetune.model_validate({"steps": 4, "batch_size": 16, "where": {"exclude": ["head"]}})
        done = step.apply(begun, around(RESIDUAL))
        for name, fmt in palettes(done).items():
            assert torch.equal(fmt.centroids, palettes(begun)[name].centroids)
        assert not torch.equal(done.parameters["stem.0.weight"], begun.parameters["stem.0.weight"])


class TestFinetune:
    @pytest.mark.parametrize("net", ["residual", "depthwise", "attention", "lstm", "shared"])
    def test_values_are_trained_and_stay_few(self, net: str) -> None:
        begun = clustered(net, bits=2)
        done = Finetune(steps=4, batch_size=16, teacher="original").apply(begun, around(net))
        for name, fmt in palettes(done).items():
            assert not torch.equal(fmt.centroids, palettes(begun)[name].centroids)
            assert distinct(done.parameters[name]) <= 4
            assert torch.equal(fmt.project(done.parameters[name]), done.parameters[name])

    def test_it_wins_quality_back(self) -> None:
        begun = clustered(bits=1)
        done = Finetune(steps=60, batch_size=16, teacher="original", alpha=1.0).apply(begun, around(RESIDUAL))
        assert quality(done) > quality(begun) + 1

    def test_beside_integers_of_activations(self) -> None:
        both = Quantize().apply(clustered(bits=4), around(RESIDUAL))
        done = Finetune(steps=3, batch_size=16).apply(both, around(RESIDUAL))
        assert any(name not in done.parameters for name in done.formats)
        for name in palettes(done):
            assert distinct(projected_parameters(done)[name]) <= 16 * done.parameters[name].shape[0]


class TestZeros:
    def test_stay_exactly_zero_through_every_step(self) -> None:
        begun = Cluster(bits=3).apply(sparse(), around(RESIDUAL))
        tuned = Finetune(steps=5, batch_size=16).apply(begun, around(RESIDUAL))
        rounded = Rounding().apply(begun, around(RESIDUAL))
        for name, chain in sparse().formats.items():
            (mask,) = chain
            assert isinstance(mask, Sparse)
            for net in (begun, tuned, rounded):
                head, fmt = net.formats[name]
                assert isinstance(head, Sparse)
                assert isinstance(fmt, Palette)
                assert fmt.zero
                assert fmt.colors <= 8
                stored = in_floats(net).parameters[name]
                assert not stored[~mask.mask].any()
                assert distinct(stored) <= 8
            assert (fmt.centroids != 0).all()

    def test_have_no_say_in_the_other_values(self) -> None:
        done = Cluster(bits=3).apply(sparse(), around(RESIDUAL))
        for name, fmt in palettes(done).items():
            weight = projected_parameters(sparse())[name].numpy()
            wanted = kmeans(weight[weight != 0], 7, init="optimal", zero=True)
            np.testing.assert_allclose(np.sort(fmt.centroids.numpy()), wanted, rtol=1e-5, atol=1e-7)

    def test_weights_without_zeros_have_none_pinned(self) -> None:
        assert not any(fmt.zero for fmt in palettes(clustered()).values())

    def test_to_fill_masks_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="would fill the zeros that sparsify put into"):
            Cluster(zero="free").apply(sparse(), around(RESIDUAL))

    def test_a_layer_of_zeros(self) -> None:
        begun = folded(RESIDUAL).evolve(module=folded(RESIDUAL).copy_module())
        begun.parameters["layer1.conv1.weight"].data.zero_()
        for settings in ({}, {"granularity": "per_group"}, {"granularity": "shared"}):
            done = Cluster.model_validate(settings).apply(begun, around(RESIDUAL))
            assert not projected_parameters(done)["layer1.conv1.weight"].any()


class TestRounding:
    @pytest.mark.parametrize("settings", [{}, {"granularity": "shared"}, {"scale": "per_channel"}])
    def test_gptq_takes_values_that_serve_the_output(self, settings: dict[str, str]) -> None:
        begun = clustered(bits=2, **settings)
        seen = {}
        for how in ("nearest", "gptq"):
            done = Rounding.model_validate({"how": how}).apply(begun, around(RESIDUAL))
            assert done.formats == begun.formats
            for name, fmt in palettes(done).items():
                assert torch.equal(fmt.project(done.parameters[name]), done.parameters[name])
            seen[how] = quality(done)
        assert seen["gptq"] > seen["nearest"] + 0.5

    @pytest.mark.parametrize("how", ["hqq", "adaround", "blocks"])
    def test_other_ways_leave_the_nearest(self, how: str) -> None:
        begun = clustered(bits=2)
        done = Rounding.model_validate({"how": how, "iterations": 5}).apply(begun, around(RESIDUAL))
        for name, fmt in palettes(done).items():
            assert torch.equal(fmt.project(done.parameters[name]), done.parameters[name])


class TestAuto:
    def test_bits_follow_what_the_outputs_lose_within_the_mean(self) -> None:
        done = clustered(bits="auto", mean_bits=6.0)
        found = palettes(done)
        sizes = {name: folded(RESIDUAL).parameters[name].numel() for name in found}
        spent = 8 * sum(fmt.stored_bytes(sizes[name]) for name, fmt in found.items())
        assert 4 < spent / sum(sizes.values()) <= 6.0
        assert len({fmt.width for fmt in found.values()}) > 1
        even = next(
            one
            for one in (clustered(bits=bits) for bits in (8, 6, 5, 4, 3, 2))
            if 8 * sum(f.stored_bytes(sizes[name]) for name, f in palettes(one).items()) <= spent
        )
        assert quality(done) > quality(even)

    def test_zeros_stay(self) -> None:
        done = Cluster(bits="auto", mean_bits=6.0).apply(sparse(), around(RESIDUAL))
        for name, chain in done.formats.items():
            assert isinstance(chain[0], Sparse)
            assert not in_floats(done).parameters[name][~chain[0].mask].any()

    def test_a_mean_out_of_reach_says_the_least(self) -> None:
        with pytest.raises(RecipeError, match="cannot be reached: the least is") as told:
            clustered(bits="auto", mean_bits=1.0)
        assert told.value.fix
        least = float(told.value.fix.split()[1].rstrip(","))
        assert palettes(clustered(bits="auto", mean_bits=least))

    @pytest.mark.parametrize("more", [{"colors": 5}, {"granularity": "shared"}])
    def test_it_says_what_it_cannot_go_with(self, more: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="values of its own"):
            Cluster.model_validate({"bits": "auto", **more})


class TestChains:
    def test_integers_of_the_values(self) -> None:
        done = Quantize(granularity="per_tensor").apply(clustered(bits=3), around(RESIDUAL))
        chains = [chain for name, chain in done.formats.items() if name in done.parameters and len(chain) > 1]
        assert chains
        assert all(isinstance(head, Palette) and isinstance(last, IntQuant) for head, last in chains)
        stored = projected_parameters(done)
        assert all(distinct(stored[name]) <= 8 for name in palettes(done))

    def test_halves_of_the_values(self) -> None:
        done = Cast().apply(clustered(bits=3), around(RESIDUAL, "openvino"))
        assert all(isinstance(chain[-1], FloatCast) for chain in done.formats.values())
        assert all(distinct(value) <= 8 for value in projected_parameters(done).values())

    @pytest.mark.parametrize("kind", ["ternary", "binary"])
    def test_other_palettes_are_refused(self, kind: str) -> None:
        step = Quantize.model_validate({"weights": kind, "activations": "none"})
        with pytest.raises(RecipeError, match="are a palette of their own"):
            step.apply(clustered(), around(RESIDUAL, "torch"))

    def test_cluster_comes_before_integers(self) -> None:
        begun = Quantize().apply(folded(RESIDUAL), around(RESIDUAL))
        with pytest.raises(RecipeError, match=r"found no float weight: .* has a format already") as told:
            Cluster().apply(begun, around(RESIDUAL))
        assert "before quantize" in str(told.value.fix)

    def test_cluster_takes_what_is_left(self) -> None:
        begun = Quantize(where={"include": ["layer1"]}).apply(folded(RESIDUAL), around(RESIDUAL))
        done = Cluster().apply(begun, around(RESIDUAL))
        assert done.formats["layer1.conv1.weight"] == begun.formats["layer1.conv1.weight"]
        assert isinstance(done.formats["layer2.conv1.weight"][0], Palette)

    def test_nothing_to_share(self) -> None:
        with pytest.raises(RecipeError, match="no weight that may share values") as told:
            Cluster.model_validate({"where": {"exclude": ["*"]}}).apply(folded(RESIDUAL), around(RESIDUAL))
        assert told.value.fix

    def test_broken_weights_are_named(self) -> None:
        begun = folded(RESIDUAL).evolve(module=folded(RESIDUAL).copy_module())
        begun.parameters["layer1.conv1.weight"].data[0, 0, 0, 0] = torch.nan
        with pytest.raises(DataError, match=r"layer1\.conv1\.weight"):
            Cluster().apply(begun, around(RESIDUAL))


class TestFiles:
    def test_a_file_holds_exactly_the_values(self, tmp_path: Path) -> None:
        done = Rounding().apply(clustered(bits=3), around(RESIDUAL))
        artifact = find_runtime("onnxruntime").lower(done, target(), tmp_path)
        graph = onnx.load(tmp_path / artifact.files[0]).graph
        arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        for name, fmt in palettes(done).items():
            wanted = {0.0, *fmt.levels().flatten().tolist()}
            assert set(np.unique(arrays[name]).tolist()) <= wanted

    def test_of_zeros_and_halves_each_runtime_gets_what_is_stored(self) -> None:
        done = Cluster(bits=3).apply(sparse(), around(RESIDUAL))
        plain = in_floats(done)
        assert not plain.formats
        for name, value in projected_parameters(done).items():
            assert torch.equal(plain.parameters[name], value)
        half = in_floats(Cast().apply(done, around(RESIDUAL, "openvino")))
        assert all(len(chain) == 1 and isinstance(chain[0], FloatCast) for chain in half.formats.values())
        assert in_floats(folded(RESIDUAL)) is folded(RESIDUAL)

    def test_a_recipe_from_the_store_is_what_was_computed(self, tmp_path: Path) -> None:
        recipe = Recipe.parse(
            """
version: 1
steps:
  - fold: {}
  - sparsify: {sparsity: 0.5, schedule: none}
  - cluster: {bits: 3, granularity: shared}
  - finetune: {steps: 2, batch_size: 16}
"""
        )
        made = []
        for _ in range(2):
            run = Run(model(RESIDUAL), data(RESIDUAL), target(), Store(tmp_path))
            made.append(run.apply(recipe))
        one, two = (projected_parameters(net) for net in made)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert {fmt.codebook for fmt in palettes(made[1]).values()} == {"stem.0.weight"}
