"""Programs that load a ``.mnn`` file without this package.

Part of ``mnn.py``. Python and C++ with MNN's ``Module``, Java and Kotlin with its bindings for Android.
"""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.errors import TargetError
from featherweight.runtime import Signature, Target
from featherweight.runtimes._mnn_session import WINOGRAD

_PYTHON = {"float": "expr.float", "uint8": "expr.uint8", "int": "expr.int"}
_CPP = {"float": "float", "uint8": "uint8_t", "int": "int32_t"}
_LEVELS = {"low": "Low", "normal": "Normal", "high": "High", "low_bf16": "Low_BF16"}


def loaders(file: str, target: Target, signature: Signature) -> dict[str, str]:
    """File name -> text; they call the file once on zeros."""
    options = {"precision": "high", **target.options}
    level = options.pop("winograd", WINOGRAD)
    if not signature.inputs:
        raise TargetError("a loader needs the names of the inputs")
    return {
        "load.py": _python(file, target, signature, options, level),
        "load.cpp": _cpp(file, target, signature, options, level),
        "Load.java": _java(file, target, signature),
        "Load.kt": _kotlin(file, target, signature),
    }


def _kind(dtype: str) -> str:
    """What MNN makes of a type: it has no longer integers or floats."""
    return "float" if dtype.startswith("float") else dtype if dtype == "uint8" else "int"


def _python(
    file: str, target: Target, signature: Signature, options: Mapping[str, object], level: object
) -> str:
    config = {"backend": "CPU", "numThread": target.threads, **options}
    names = [name for name, _, _ in signature.inputs]
    lines = ["import MNN.expr as expr", "import MNN.nn as nn", "import numpy as np", ""]
    lines.append(f"runtime = nn.create_runtime_manager(({config!r},))")
    lines.append(f"runtime.set_hint(3, {level})  # how large the tiles of Winograd's convolution may be")
    opened = f'"{file}", {names!r}, {list(signature.outputs)!r}, runtime_manager=runtime'
    lines += [f"net = nn.load_module_from_file({opened})", "inputs = ["]
    for _, dtype, shape in signature.inputs:
        kind = _kind(dtype)
        array = (
            f"np.zeros({shape}, np.{'int32' if kind == 'int' else 'uint8' if kind == 'uint8' else 'float32'})"
        )
        lines.append(f"    expr.const({array}, {list(shape)}, expr.NCHW, {_PYTHON[kind]}),")
    lines += ["]", "for y in net.forward(inputs):", "    print(expr.convert(y, expr.NCHW).read().shape)"]
    return "\n".join(lines) + "\n"


def _cpp(
    file: str, target: Target, signature: Signature, options: Mapping[str, object], level: object
) -> str:
    names = ", ".join(f'"{name}"' for name, _, _ in signature.inputs)
    outputs = ", ".join(f'"{name}"' for name in signature.outputs)
    lines = [
        "#include <MNN/expr/ExprCreator.hpp>",
        "#include <MNN/expr/Module.hpp>",
        "#include <algorithm>",
        "#include <cstdio>",
        "",
        "int main() {",
        "  using namespace MNN::Express;",
        "  MNN::BackendConfig backend;",
    ]
    for name, value in options.items():
        lines.append(f"  backend.{name} = MNN::BackendConfig::{name.capitalize()}_{_LEVELS[str(value)]};")
    lines += [
        "  MNN::ScheduleConfig config;",
        f"  config.numThread = {target.threads};",
        "  config.backendConfig = &backend;",
        "  std::shared_ptr<Executor::RuntimeManager> runtime(",
        "      Executor::RuntimeManager::createRuntimeManager(config));",
    ]
    lines.append(f"  runtime->setHint(MNN::Interpreter::WINOGRAD_MEMORY_LEVEL, {level});")
    opened = f'{{{names}}}, {{{outputs}}}, "{file}", runtime'
    lines += [f"  std::shared_ptr<Module> net(Module::load({opened}));", "  std::vector<VARP> inputs;"]
    for _, dtype, shape in signature.inputs:
        kind, dims = _CPP[_kind(dtype)], ", ".join(map(str, shape))
        lines += [
            f"  inputs.push_back(_Input({{{dims}}}, NCHW, halide_type_of<{kind}>()));",
            f"  std::fill_n(inputs.back()->writeMap<{kind}>(), inputs.back()->getInfo()->size, {kind}(0));",
        ]
    lines += [
        "  for (auto y : net->onForward(inputs)) {",
        "    y = _Convert(y, NCHW);",
        '    std::printf("%d values\\n", static_cast<int>(y->getInfo()->size));',
        "  }",
        "  return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _java(file: str, target: Target, signature: Signature) -> str:
    lines = [
        "import com.taobao.android.mnn.MNNForwardType;",
        "import com.taobao.android.mnn.MNNNetInstance;",
        "",
        "class Load {",
        "  static void run(android.content.Context context) {",
        f'    String path = new java.io.File(context.getFilesDir(), "{file}").getPath();',
        "    MNNNetInstance net = MNNNetInstance.createFromFile(path);",
        "    MNNNetInstance.Config config = new MNNNetInstance.Config();",
        "    config.forwardType = MNNForwardType.FORWARD_CPU.type;",
        f"    config.numThread = {target.threads};",
        "    MNNNetInstance.Session session = net.createSession(config);",
    ]
    for name, dtype, shape in signature.inputs:
        dims, count = ", ".join(map(str, shape)), " * ".join(map(str, shape)) or "1"
        kind, call = _java_kind(dtype)
        lines += [
            f'    session.getInput("{name}").reshape(new int[] {{{dims}}});',
            "    session.reshape();",
            f'    session.getInput("{name}").{call}(new {kind}[{count}]);',
        ]
    lines.append("    session.run();")
    for name in signature.outputs:
        lines.append(f'    System.out.println(session.getOutput("{name}").getFloatData().length);')
    return "\n".join([*lines, "    net.release();", "  }", "}"]) + "\n"


def _kotlin(file: str, target: Target, signature: Signature) -> str:
    lines = [
        "import com.taobao.android.mnn.MNNForwardType",
        "import com.taobao.android.mnn.MNNNetInstance",
        "",
        "fun run(context: android.content.Context) {",
        f'    val net = MNNNetInstance.createFromFile(java.io.File(context.filesDir, "{file}").path)',
        "    val config = MNNNetInstance.Config()",
        "    config.forwardType = MNNForwardType.FORWARD_CPU.type",
        f"    config.numThread = {target.threads}",
        "    val session = net.createSession(config)",
    ]
    for name, dtype, shape in signature.inputs:
        dims, count = ", ".join(map(str, shape)), " * ".join(map(str, shape)) or "1"
        kind, call = _java_kind(dtype)
        lines += [
            f'    session.getInput("{name}").reshape(intArrayOf({dims}))',
            "    session.reshape()",
            f'    session.getInput("{name}").{call}({kind.capitalize()}Array({count}))',
        ]
    lines.append("    session.run()")
    for name in signature.outputs:
        lines.append(f'    println(session.getOutput("{name}").floatData.size)')
    return "\n".join([*lines, "    net.release()", "}"]) + "\n"


def _java_kind(dtype: str) -> tuple[str, str]:
    return ("float", "setInputFloatData") if dtype.startswith("float") else ("int", "setInputIntData")
