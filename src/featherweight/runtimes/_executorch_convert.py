"""The converter's side of ``executorch.py``: a saved program becomes a .pte file. Runs in a child process."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path


def convert(program: str, out: str) -> None:
    """Delegate what XNNPACK takes, plan memory, write the file, and call it once: then XNNPACK checks it.

    Args:
        program: A file of ``torch.export.save``; sizes are fixed.
        out: The .pte file to write.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("executorch").setLevel(logging.ERROR)
    import torch
    import torch.ao.quantization.fx._decomposed  # noqa: F401, RUF100 - the program's operators
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import _portable_lib as bindings

    exported = torch.export.load(program)
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    Path(out).write_bytes(edge.to_executorch().buffer)
    bindings._load_for_executorch(out).run_method("forward", list((exported.example_inputs or ((),))[0]))
