"""Where the golden nets are cut, and that the pieces together are the whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featherweight.graph import Graph, trace
from featherweight.tools.partition import BlockRun, Picker, partition
from featherweight.tools.simulate import module_tensors
from golden import folded, inputs
from nets import NETS


def weights(graph: Graph) -> list[str]:
    """Matrices and kernels that layers multiply by."""
    nodes = [node for node in graph if node.op in ("conv2d", "linear", "lstm")]
    names = [name for node in nodes for name in node.parameters.values()]
    return [name for name in dict.fromkeys(names) if len(graph.parameter_shapes[name]) > 1]


def pieces(net: str, limit: int = 3) -> list[list[str]]:
    graph = trace(folded(net))
    blocks = partition(graph, weights(graph), limit)
    return [sorted({name.rpartition(".")[0] for name in block.weights}) for block in blocks]


def test_a_residual_block_is_a_block() -> None:
    first, second = ["layer1.conv1", "layer1.conv2"], ["layer2.conv1", "layer2.conv2", "layer2.shortcut.0"]
    assert pieces("residual") == [["stem.0"], first, second, ["head"]]


def test_an_inverted_residual_is_a_block_with_a_shortcut_and_without() -> None:
    blocks = [[f"block{i}.depthwise.0", f"block{i}.expand.0", f"block{i}.project.0"] for i in (1, 2, 3)]
    assert pieces("depthwise") == [["stem.0"], *blocks, ["last.0"], ["head"]]


def test_neighbours_are_merged_up_to_the_limit_only() -> None:
    apart = [["block2.expand.0"], ["block2.depthwise.0"], ["block2.project.0"]]
    assert pieces("depthwise", 1)[2:5] == apart
    assert pieces("depthwise", 2)[2:4] == [["block2.depthwise.0", "block2.expand.0"], ["block2.project.0"]]


def test_what_is_concatenated_stays_together() -> None:
    assert pieces("concat") == [["stem"], ["convs.0", "convs.1", "convs.2"], ["transition.2"], ["head"]]


def test_both_halves_of_a_transformers_layer_are_blocks() -> None:
    assert pieces("attention") == [["embed"], ["project", "qkv"], ["fc1", "fc2"], ["head"]]


def test_an_lstm_is_a_block() -> None:
    assert pieces("lstm") == [["lstm"], ["head"]]


@pytest.mark.parametrize("net", NETS)
def test_the_blocks_in_turn_make_what_the_network_makes_of_any_rows(net: str) -> None:
    graph = trace(folded(net))
    tensors = {name: tensor.detach() for name, tensor in module_tensors(folded(net), graph).items()}
    x = torch.from_numpy(inputs(net, 9))
    sizes = [4, 5]
    (start,) = (graph.values[name].fx_name for name in graph.inputs)
    values: dict[str, list[Any]] = {start: list(x.split(sizes))}
    picker = Picker(graph, sizes)
    picks = {0: [3, 1], 1: [4]}
    picked: dict[str, Any] = {start: picker.take(start, values[start], picks)}
    assert torch.equal(picked[start], x[[3, 1, 8]])
    for block in partition(graph, weights(graph)):
        run = BlockRun(graph, block.calls)
        with torch.no_grad():
            taken = {name: picker.take(name, values[name], picks) for name in block.inputs}
            some = run(taken, tensors)
            for batch in range(len(sizes)):
                made = run({name: values[name][batch] for name in block.inputs}, tensors)
                for name in block.outputs:
                    values.setdefault(name, []).append(made[name])
            picked |= {name: some[name] for name in block.outputs}
    (end,) = (graph.values[name].fx_name for name in graph.outputs)
    with torch.no_grad():
        whole = folded(net).module(x)
    torch.testing.assert_close(torch.cat(values[end]), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(picked[end], whole[[3, 1, 8]], rtol=1e-4, atol=1e-5)


def test_random_rows_are_drawn_without_repetition_and_mixed_by_coins() -> None:
    graph = trace(folded("residual"))
    picker = Picker(graph, [3, 2])
    picks = picker.draw(4, torch.Generator().manual_seed(0))
    rows = [(batch, row) for batch, some in picks.items() for row in some]
    assert len(set(rows)) == 4
    assert picker.count == 5
    (start,) = (graph.values[name].fx_name for name in graph.inputs)
    zeros, ones = ([torch.full((n, 3, 16, 16), value) for n in (3, 2)] for value in (0.0, 1.0))
    mixed = picker.mix(start, zeros, ones, {0: [0, 2], 1: [1]}, [True, False, True])
    assert mixed[:, 0, 0, 0].tolist() == [1.0, 0.0, 1.0]
