"""What makes ONNX files smaller changes no answer, and loses no name that somebody looks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from featherweight.exchange import compact as module
from featherweight.exchange.compact import compact
from featherweight.exchange.export import OnnxExport
from featherweight.plugins import find_runtime
from golden import inputs, model, quantized, target
from nets import NETS

RUNTIME = find_runtime("onnxruntime")
HERE = target()
Form = Literal["float", "int8"]


@dataclass(frozen=True)
class Seen:
    """A lowered net: its bytes, what it answers, what is stored and what is computed inside."""

    bytes: int
    answers: tuple[np.ndarray, ...]
    stored: frozenset[str]
    values: Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    @cache
    def lowered(name: str, form: Form, smaller: bool) -> Seen:
        net = (model if form == "float" else quantized)(name)
        folder: Path = tmp_path_factory.mktemp("compact")
        with pytest.MonkeyPatch.context() as patch:
            if not smaller:
                patch.setattr(module, "compact", lambda export, keep: None)
            artifact = RUNTIME.lower(net, HERE, folder)
        x = [inputs(name, 2)]
        return Seen(
            artifact.bytes,
            RUNTIME.open(artifact, HERE)(*x),
            frozenset(RUNTIME.stored(artifact)),
            RUNTIME.values(artifact, HERE, x),
        )

    return lowered


@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("name", NETS)
class TestNets:
    def test_answers_are_the_same_bit_for_bit(self, name: str, form: Form, lower) -> None:  # type: ignore[no-untyped-def]
        before, after = lower(name, form, False), lower(name, form, True)
        assert after.bytes < before.bytes
        for mine, theirs in zip(after.answers, before.answers, strict=True):
            np.testing.assert_array_equal(mine, theirs)

    def test_parameters_and_what_is_computed_inside_are_found(self, name: str, form: Form, lower) -> None:  # type: ignore[no-untyped-def]
        before, after = lower(name, form, False), lower(name, form, True)
        parameters = set(model(name).parameters)
        assert after.stored & parameters == before.stored & parameters
        assert after.values.keys() == before.values.keys()
        for traced, array in after.values.items():
            np.testing.assert_array_equal(array, before.values[traced])


def test_an_int8_file_is_a_sixth_smaller_or_more(lower) -> None:  # type: ignore[no-untyped-def]
    for name in ("residual", "depthwise", "shuffle"):
        assert lower(name, "int8", True).bytes < lower(name, "int8", False).bytes * 5 / 6


def compacted(text: str, keep: Collection[str] = ()) -> onnx.ModelProto:
    export = OnnxExport(ir.from_proto(onnx.parser.parse_model(text)), {}, {})
    compact(export, keep)
    return ir.to_proto(export.model)


HEADER = '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>\n'


class TestConstants:
    CONSTANTS = "float one = {1}, float two = {1}, int32 three = {1}, float kept = {1}"
    TEXT = f"""{HEADER}g (float[2] x) => (float[2] y) <{CONSTANTS}> {{
        a = Add(x, one)
        b = Add(a, two)
        c = Cast<to = 1>(three)
        d = Add(b, c)
        y = Add(d, kept)
    }}"""

    def test_equal_ones_of_one_type_are_one(self) -> None:
        graph = compacted(self.TEXT, {"kept"}).graph
        first, second, _, _, last = graph.node
        assert len(graph.initializer) == 3  # one, three, kept
        assert first.input[1] == second.input[1]
        assert last.input[1] == "kept"

    def test_names_are_short_where_nobody_looks_for_them(self) -> None:
        graph = compacted(self.TEXT, {"kept", "d"}).graph
        assert [value.name for value in (*graph.input, *graph.output)] == ["x", "y"]
        assert [node.output[0] for node in graph.node][3:] == ["d", "y"]
        assert all(len(node.output[0]) == 2 for node in graph.node[:3])

    def test_a_short_name_that_is_taken_stays_with_its_owner(self) -> None:
        text = HEADER + "g (float[2] x) => (float[2] y) { long = Neg(x)\n _0 = Neg(long)\n y = Neg(_0) }"
        assert [node.output[0] for node in compacted(text, {"_0"}).graph.node] == ["_1", "_0", "y"]


def test_names_inside_of_branches_hide_none_outside() -> None:
    text = f"""{HEADER}g (float[2] x, bool which) => (float[2] y) {{
        long = Neg(x)
        y = If (which) <then_branch = a () => (float[2] u) {{ _0 = Abs(long)\n u = Neg(_0) }},
                        else_branch = b () => (float[2] v) {{ _1 = Neg(long)\n v = Abs(_1) }}>
    }}"""
    assert compacted(text).graph.node[0].output[0] == "_2"


def test_names_that_a_loop_gives_its_body_hide_none_outside() -> None:
    text = f"""{HEADER}g (float[2] x, int64 times, bool go) => (float[2] y) {{
        long = Neg(x)
        y = Loop (times, go, x) <body = b (int64 _0, bool _1, float[2] _2) => (bool on, float[2] sum)
                                     <float _3 = {{2}}>
            {{ on = Identity(_1)\n scaled = Mul(_2, _3)\n sum = Add(scaled, long) }}>
    }}"""
    assert compacted(text).graph.node[0].output[0] == "_4"


class TestDefaults:
    def attributes(self, node: str) -> set[str]:
        text = f"{HEADER}g (float[1,2,8,8] x, float[2,2,3,3] w) => (float[1,2,8,8] y) {{ y = {node} }}"
        return {attribute.name for attribute in compacted(text).graph.node[0].attribute}

    @pytest.mark.parametrize("operator", ["Conv", "com.microsoft.FusedConv"])
    def test_those_of_a_convolution_are_left_out(self, operator: str) -> None:
        given = 'auto_pad = "NOTSET", group = 1, strides = [1, 1], dilations = [1, 1], pads = [0, 0, 0, 0]'
        assert self.attributes(f"{operator}<{given}>(x, w)") == set()

    def test_what_is_none_stays(self) -> None:
        given = 'auto_pad = "NOTSET", group = 2, strides = [1, 2], dilations = [2, 2], pads = [1, 0, 0, 1]'
        assert self.attributes(f"Conv<{given}>(x, w)") == {"group", "strides", "dilations", "pads"}

    def test_floats_are_compared_as_they_are_stored(self) -> None:
        assert self.attributes("LeakyRelu<alpha = 0.01>(x)") == set()
        assert self.attributes("LeakyRelu<alpha = 0.011>(x)") == {"alpha"}

    def test_operators_of_others_keep_theirs(self) -> None:
        assert self.attributes("com.microsoft.QuickGelu<alpha = 1.702>(x)") == {"alpha"}
