"""Programs that load an ``.mlpackage`` on a Mac or a phone."""

from __future__ import annotations

from featherweight.runtime import Signature

_SWIFT = {"float32": "float32", "float16": "float16", "float64": "double"}  # others travel as int32


def load_py(package: str, signature: Signature) -> str:
    """With coremltools, on a Mac."""
    arrays = ", ".join(
        f"{name!r}: np.zeros({tuple(shape)}, np.{dtype if dtype in _SWIFT else 'int32'})"
        for name, dtype, shape in signature.inputs
    )
    return (
        "from pathlib import Path\n"
        "import coremltools as ct  # on a Mac\n"
        "import numpy as np\n"
        f"model = ct.models.MLModel(str(Path(__file__).with_name({package!r})))\n"
        f"outputs = model.predict({{{arrays}}})\n"
        f"for name in {list(signature.outputs)!r}:\n"
        "    print(outputs[name].shape)\n"
    )


def load_swift(package: str, signature: Signature) -> str:
    """With Core ML, in an app or with ``swift load.swift`` on a Mac."""
    made = "\n".join(
        f'    "{name}": try MLMultiArray(shape: {list(shape)}, dataType: .{_SWIFT.get(dtype, "int32")}),'
        for name, dtype, shape in signature.inputs
    )
    shapes = "\n".join(
        f'print(outputs.featureValue(for: "{name}")!.multiArrayValue!.shape)' for name in signature.outputs
    )
    return (
        "import CoreML\n"
        'let package = URL(fileURLWithPath: CommandLine.arguments.dropFirst().first ?? "'
        f'{package}")\n'
        "let model = try MLModel(contentsOf: MLModel.compileModel(at: package))\n"
        f"let inputs = try MLDictionaryFeatureProvider(dictionary: [\n{made}\n])\n"
        "let outputs = try model.prediction(from: inputs)\n"
        f"{shapes}\n"
    )
