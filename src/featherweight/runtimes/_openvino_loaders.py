"""Short programs that load an IR: Python and C++.

Part of ``openvino.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from featherweight.runtime import Artifact, Signature, Target
from featherweight.runtimes._openvino_session import settings


def loaders(artifact: Artifact, target: Target, signature: Signature) -> dict[str, str]:
    """File name -> text."""
    file = artifact.entries[signature.entry]
    return {
        "load.py": _python(file, settings(artifact, target), signature),
        "load.cpp": _cpp(file, settings(artifact, target), signature),
    }


def _python(file: str, options: Mapping[str, Any], signature: Signature) -> str:
    shapes = ", ".join(f"{name!r}: {list(shape)}" for name, _, shape in signature.inputs)
    inputs = ", ".join(f"np.zeros({shape}, np.{dtype})" for _, dtype, shape in signature.inputs)
    return f"""import sys
from pathlib import Path

sys.modules["openvino_telemetry"] = None  # or importing openvino reports to its vendor
import numpy as np
import openvino as ov

options = {dict(options)!r}
core = ov.Core()
model = core.read_model(Path(__file__).with_name({file!r}))
model.reshape({{{shapes}}})  # kernels for one shape are faster
request = core.compile_model(model, "CPU", options).create_infer_request()
request.infer([{inputs}])
for output in request.output_tensors:
    print(tuple(output.data.shape))
"""


def _cpp(file: str, options: Mapping[str, Any], signature: Signature) -> str:
    shapes = ", ".join(
        f"{{{json.dumps(name)}, ov::PartialShape{{{', '.join(map(str, shape))}}}}}"
        for name, _, shape in signature.inputs
    )
    properties = ", ".join(f"{{{json.dumps(name)}, {json.dumps(value)}}}" for name, value in options.items())
    return f"""#include <openvino/openvino.hpp>
#include <cstring>
#include <iostream>

int main() {{
    ov::AnyMap options{{{properties}}};
    std::map<std::string, ov::PartialShape> shapes{{{shapes}}};  // kernels for one shape are faster
    ov::Core core;
    auto model = core.read_model({json.dumps(file)});
    model->reshape(shapes);
    auto request = core.compile_model(model, "CPU", options).create_infer_request();
    for (std::size_t i = 0; i < model->inputs().size(); ++i) {{
        auto input = request.get_input_tensor(i);
        std::memset(input.data(), 0, input.get_byte_size());
    }}
    request.infer();
    for (std::size_t i = 0; i < model->outputs().size(); ++i)
        std::cout << request.get_output_tensor(i).get_shape() << std::endl;
}}
"""
