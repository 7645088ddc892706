"""The node tests that ship with onnx, for every operator that the importer's table has.

A case is claimed when the table has all of its operators: those of the default domain, of every opset that
is read (7 and later). It passes when the import computes the expected outputs, to the case's own tolerance,
without any node left to ONNX Runtime. Axes, sizes and counts are inputs in many cases: a function reads them
here, where an import, which torch.export shall follow, would leave the node to ONNX Runtime. Cases of
strings, sequences and optional values of a claimed operator count as failures; so do random ones. Types that
torch has not (int4, uint4, int2, uint2, float4) are carried in larger ones and compared by value.
"""

from __future__ import annotations

import collections
import functools
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.build import build_module
from featherweight.exchange.onnx_in.operators import OPERATORS
from featherweight.exchange.onnx_in.read import OLDEST_OPSET, read_model
from featherweight.exchange.opaque import opaque_layers

_WANTED = 0.97


@functools.cache
def claimed() -> list[Any]:
    """Cases whose operators are all in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero on purpose
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    return [case for case in cases if _is_claimed(case.model)]


def _is_claimed(model: onnx.ModelProto) -> bool:
    return _opset(model) >= OLDEST_OPSET and all(
        (node.domain, node.op_type) in OPERATORS for node in model.graph.node
    )


def _opset(model: onnx.ModelProto) -> int:
    return next((item.version for item in model.opset_import if not item.domain), 0)


def _array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _reason(case: Any) -> str:
    """Why a case fails; '' when it passes."""
    try:
        for inputs, outputs in case.data_sets:
            source = read_model(case.model.SerializeToString(), case.name)
            given = [host.tensor_of(_array(value)) for value in inputs]
            module = build_module(source, given, traced=False).module
            if opaque_layers(module):
                return "left to ONNX Runtime"
            with torch.no_grad():
                result = module(*given)
            results = result if isinstance(result, tuple) else (result,)
            for ours, theirs in zip(results, outputs, strict=True):
                expected = host.array_of(host.tensor_of(_array(theirs)))
                if reason := _difference(host.array_of(ours), expected, case.rtol, case.atol):
                    return reason
    except LoadError as error:
        return error.what
    return ""


def _difference(ours: np.ndarray, theirs: np.ndarray, relative: float, absolute: float) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {ours.shape}, not {theirs.dtype} {theirs.shape}"
    if theirs.dtype.name == "bfloat16":
        relative = max(relative, 2**-7)  # one in its last place
    elif theirs.dtype.name.startswith("float8"):
        relative = absolute = 0.0
    elif theirs.dtype.kind not in "fc":
        return "" if np.array_equal(ours, theirs) else "other numbers"
    if theirs.dtype.kind != "c":
        with np.errstate(invalid="ignore"):  # a NaN that signals
            ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if np.allclose(ours, theirs, relative, absolute, equal_nan=True):
        return ""
    return f"off by {np.nanmax(np.abs(ours - theirs)):.2g}"


def test_one_case_of_each_operator() -> None:
    """The fast part: the first case of every operator that has one."""
    first: dict[str, Any] = {}
    for case in claimed():
        if len(case.model.graph.node) == 1:
            first.setdefault(case.model.graph.node[0].op_type, case)
    assert len(first) > 150
    failed = {name: reason for name, case in first.items() if (reason := _reason(case))}
    assert not failed


@pytest.mark.slow
def test_the_node_suite(capsys: pytest.CaptureFixture[str]) -> None:
    """All of it: passed / claimed, and what fails with its reason."""
    failures = collections.defaultdict(list)
    for case in claimed():
        if reason := _reason(case):
            failures[reason.replace(case.name, "...")].append(case.name)
    count = len(claimed())
    passed = count - sum(map(len, failures.values()))
    failed = {name for names in failures.values() for name in names}
    older = {case.name for case in claimed() if _opset(case.model) <= 24}
    share = f"{passed} / {count} passed ({passed / count:.1%})"
    share += f"; of opsets up to 24: {len(older - failed)} / {len(older)}"
    with capsys.disabled():
        print(f"\nnode tests of onnx {onnx.__version__}: {share}")  # noqa: T201
        for reason, names in sorted(failures.items()):
            print(f"  {len(names)} x {reason}: {', '.join(sorted(names))}")  # noqa: T201
    assert passed / count >= _WANTED
