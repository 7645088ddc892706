"""Writes the generated tables of docs/methods.md, runtimes.md, onnx.md and nets.md from the code.

``python docs/generate.py`` rewrites them, ``--check`` leaves with 1 where they differ.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from featherweight.engine.catalog import methods
from featherweight.errors import TargetError
from featherweight.exchange.onnx_in.operators.about import operator_table
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, PerTensor, TensorFormat
from featherweight.model import Entry, Model
from featherweight.nets import FAMILIES, build
from featherweight.nets.published import PUBLISHED, Published
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import Role, Target
from featherweight.tools.costs import totals

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
        told = {key: text.replace("|", "\\|") for key, text in about["parameters"].items()}
        lines += [f"| | | | `{key}` | {text} |" for key, text in told.items()]
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


_KINDS: Mapping[str, tuple[TensorFormat | None, TensorFormat | None]] = {
    "int8": (_format("weight", True, True), _format("activation", False, False)),
    "int8 activations": (None, _format("activation", False, False)),
    "int8 weights": (_format("weight", True, True), None),
    "int4 weights": (IntQuant(-torch.ones(1, 1), torch.ones(1, 1), 4, True, PerGroup(1, 32)), None),
    "float16 weights": (FloatCast("float16"), None),
}


def _supported(name: str, op: str) -> str:
    """Everything that a runtime stores and runs of an operator, static integers first."""
    if name == "torch":
        return "simulated"
    runtime, target = find_runtime(name), Target(runtime=name, isa="vnni")
    found = [kind for kind, (w, a) in _KINDS.items() if runtime.supports(op, w, a, target)]
    if "int8" in found:
        found = [kind for kind in found if kind != "int8 activations"]
    return ", ".join(found) or "float"


def runtime_tables() -> str:
    """Which runtimes there are, what each one stores of each operator, and on which grids."""
    lines = ["| runtime | to install | |", "|---|---|---|"]
    for name in runtime_names():
        runtime = find_runtime(name)
        told = runtime.unmeasured or ("simulated" if name == "torch" else "measured")
        lines.append(f"| `{name}` | {_install(name)} | {told} |")
    for name in runtime_names():
        told = find_runtime(name).unmeasured
        lines += ["", f"### {name}" + (f" ({told})" if told else ""), ""]
        if name == "torch":
            lines.append("Every operator, simulated.")
            continue
        by_support: dict[str, list[str]] = {}
        for op in OPERATORS:
            by_support.setdefault(_supported(name, op), []).append(op)
        lines += ["| stored and run as | operators |", "|---|---|"]
        lines += [f"| {kinds} | {', '.join(ops)} |" for kinds, ops in by_support.items()]
        lines += ["", *_grids(name)]
    return "\n".join(lines)


def _install(name: str) -> str:
    if name == "torch":
        return "always there"
    if name == "onnxruntime-web":
        return "`npm install --prefix .venv onnxruntime-web` beside Node"
    if name == "tensorrt":
        return "nothing: it writes ONNX"
    return f'`pip install "featherweight[{find_runtime(name).extra}]"`'


def _grids(name: str) -> list[str]:
    """The integers of each kind of grid."""
    lines = ["| 8-bit grid | vnni, arm | avx2, avx512 |", "|---|---|---|"]
    roles: tuple[Role, ...] = ("weight", "activation")
    for role in roles:
        for symmetric in (True, False):
            for per_channel in (True, False):
                if role == "activation" and per_channel:
                    continue
                what = f"{role}, {'symmetric' if symmetric else 'asymmetric'}, "
                what += "per channel" if per_channel else "per tensor"
                cells = [_stores(name, role, symmetric, per_channel, isa) for isa in ("vnni", "avx2")]
                lines.append(f"| {what} | {cells[0]} | {cells[1]} |")
    return lines


def net_tables() -> str:
    """The families of networks, then what each one has at the settings of its paper."""
    lines = ["| family | settings | widths worth trying | paper |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        widths = ", ".join(f"{width:.3g}" for width in family.widths)
        lines.append(f"| `{name}` | {', '.join(family.settings)} | {widths} | {family.paper} |")
    lines += ["", "Multiply-accumulates are of one example, as `featherweight inspect` counts them.", ""]
    lines += [
        "| network | input | parameters | paper | multiply-accumulates | paper | |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_published(row) for row in PUBLISHED)])


def _published(row: Published) -> str:
    sides = (row.resolution, row.resolution) if isinstance(row.resolution, int) else row.resolution
    net = build(row.spec, channels=row.channels, classes=row.classes, resolution=row.resolution)
    entry = Entry((torch.zeros(1, row.channels, *sides),), ("x",), ("y",))
    found = totals(Model(net.eval(), {"forward": entry}))
    shape = " x ".join(str(size) for size in (row.channels, *sides))
    cells = [
        f"`{row.spec}`",
        shape,
        f"{found['params']:,}",
        row.params or "not told",
        f"{found['macs'] / 1e6:,.1f}M",
        f"{row.macs or 'not told'}{' (differs)' * row.differs}",
        row.note,
    ]
    return f"| {' | '.join(cells)} |"


def written(text: str, name: str, table: str) -> str:
    """The page with its generated part replaced."""
    pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def main() -> int:
    """Write the pages, or compare them."""
    stale = 0
    tables = (
        ("methods", method_table()),
        ("runtimes", runtime_tables()),
        ("onnx", operator_table()),
        ("nets", net_tables()),
    )
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
