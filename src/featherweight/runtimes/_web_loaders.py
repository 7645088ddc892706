"""Programs that load an artifact with onnxruntime-web alone, in Node and in a browser."""

from __future__ import annotations

import math

from featherweight.runtime import Signature

_ARRAYS = {
    "float32": "Float32Array",
    "float64": "Float64Array",
    "float16": "Uint16Array",
    "int64": "BigInt64Array",
    "int32": "Int32Array",
    "int8": "Int8Array",
    "uint8": "Uint8Array",
    "bool": "Uint8Array",
}


def load_mjs(file: str, signature: Signature, threads: int, options: str, install: str) -> str:
    """For a page (``<script type="module">`` behind a bundler or an import map) and for Node alike."""
    feeds = "\n".join(
        f"  {name!r}: new ort.Tensor({dtype!r}, new {_ARRAYS[dtype]}({math.prod(shape)}), {list(shape)}),"
        for name, dtype, shape in signature.inputs
    )
    return (
        f"import * as ort from 'onnxruntime-web'; // {install}\n"
        f"ort.env.wasm.numThreads = {threads};\n"
        f"const file = globalThis.process?.argv[2] ?? {file!r}; // a path in Node, a URL in a browser\n"
        f"const session = await ort.InferenceSession.create(file, {options});\n"
        f"const results = await session.run({{\n{feeds}\n}});\n"
        "for (const name of session.outputNames) console.log(JSON.stringify(results[name].dims));\n"
    )


def load_py(file: str) -> str:
    """Starts Node with ``load.mjs``, from a folder in which the npm package is found."""
    return (
        "import json, subprocess, sys\n"
        "from pathlib import Path\n"
        "here = Path(__file__).resolve().parent\n"
        "places = (here, *here.parents, Path(sys.prefix))\n"
        "home = next(place for place in places if (place / 'node_modules' / 'onnxruntime-web').is_dir())\n"
        f"command = ['node', '--input-type=module', '-', str(here / {file!r})]\n"
        "program = (here / 'load.mjs').read_bytes()\n"
        "done = subprocess.run(command, input=program, cwd=home, stdout=subprocess.PIPE, check=True)\n"
        "for line in done.stdout.splitlines():\n"
        "    print(tuple(json.loads(line)))\n"
    )
