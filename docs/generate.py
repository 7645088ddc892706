"""Writes the generated tables of docs/methods.md, runtimes.md and onnx.md from the code that they describe.

``python docs/generate.py`` rewrites them, ``--check`` leaves with 1 where they differ.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from featherweight.engine.catalog import methods
from featherweight.errors import TargetError
from featherweight.exchange.onnx_in.operators.about import operator_table
from featherweight.formats import IntQuant, PerChannel, PerTensor
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import Role, Target

FOLDER = Path(__file__).parent
OPERATORS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "add", "mul", "cat"),
    *("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "relu", "hardtanh", "sigmoid", "leaky_relu"),
    *("softmax", "layer_norm", "lstm"),
)


def method_table() -> str:
    """One row a parameter."""
    lines = ["| method | kind | needs | parameter | type and default |", "|---|---|---|---|---|"]
    for name, about in methods().items():
        needs = ", ".join(about["needs"]) or "nothing"
        head = f"| `{name}` | {about['kind']} | {needs} "
        lines.append(f"{head}| | {about['summary']} |")
        lines += [f"| | | | `{key}` | {text} |" for key, text in about["parameters"].items()]
    return "\n".join(lines)


def _format(role: Role, symmetric: bool, per_channel: bool) -> IntQuant:
    shape = (1,) if per_channel else ()
    granularity = PerChannel(0) if per_channel else PerTensor()
    return IntQuant(-torch.ones(shape), torch.ones(shape), 8, symmetric, granularity, signed=role == "weight")


def _stores(name: str, role: Role, symmetric: bool, per_channel: bool, isa: str) -> str:
    try:
        grid = find_runtime(name).realise(
            _format(role, symmetric, per_channel), Target(runtime=name, isa=isa), role
        )
    except TargetError:
        return "no"
    if not isinstance(grid, IntQuant):
        return "no"
    return f"{'int' if grid.signed else 'uint'}8 in {grid.quant_min}..{grid.quant_max}"


def runtime_tables() -> str:
    """Operators that run in integers, and the grids that are stored."""
    weight, activation = _format("weight", True, True), _format("activation", False, False)
    lines = ["| operator | " + " | ".join(runtime_names()) + " |", "|---|" + "---|" * len(runtime_names())]
    for op in OPERATORS:
        cells = []
        for name in runtime_names():
            runtime, target = find_runtime(name), Target(runtime=name, isa="vnni")
            static = runtime.supports(op, weight, activation, target)
            plain = runtime.supports(op, None, activation, target)
            word = "int8 weights and activations" if static else "int8 activations" if plain else "float"
            cells.append("simulated" if name == "torch" else word)
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    lines += ["", "| stored | vnni, arm | avx2, avx512 |", "|---|---|---|"]
    roles: tuple[Role, ...] = ("weight", "activation")
    for name in runtime_names():
        for role in roles:
            for symmetric in (True, False):
                for per_channel in (True, False):
                    what = f"{name}: {role}, {'symmetric' if symmetric else 'asymmetric'}, "
                    what += "per channel" if per_channel else "per tensor"
                    cells = [_stores(name, role, symmetric, per_channel, isa) for isa in ("vnni", "avx2")]
                    lines.append(f"| {what} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def written(text: str, name: str, table: str) -> str:
    """The page with its generated part replaced."""
    pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def main() -> int:
    """Write the pages, or compare them."""
    stale = 0
    tables = (("methods", method_table()), ("runtimes", runtime_tables()), ("onnx", operator_table()))
    for name, table in tables:
        page = FOLDER / f"{name}.md"
        fresh = written(page.read_text(), name, table)
        if fresh != page.read_text():
            stale = 1
            if "--check" not in sys.argv:
                page.write_text(fresh)
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
