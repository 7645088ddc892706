"""Room for many tensors: each one in a mapped file that has no name any more.

A file is unlinked as soon as it is mapped, so the kernel frees it with the last reference to its tensor,
also when the process is killed. The files lie beside the store, on a disk, since a machine's folder for
temporary files may itself be memory.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

from featherweight.engine.store import left_by_killed, machine_mark, mine, told_as_machine_error

_LEAST = 1 << 16  # bytes; a smaller tensor is cheaper in memory than in a file of its own
_TRIM = 1 << 26  # bytes moved between two calls that hand free memory back to the kernel
_COUNT = itertools.count()


class MappedScratch:
    """Moves tensors to mapped files; what it returns may be read and written like any other tensor.

    Args:
        folder: Where the files lie; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swept = False
        self._moved = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """An equal tensor in a mapped file; a small one, or one on another device, as it is.

        Raises:
            MachineError: The disk is full, or the folder cannot be written.
        """
        if tensor.nbytes < _LEAST or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        path = self._folder / f"tensor-{next(_COUNT)}-{mine()}"
        with told_as_machine_error("the scratch memory for layer inputs"):
            self._make_folder()
            try:
                with path.open("wb", buffering=0) as file:
                    left = flat.numpy().data
                    while left:
                        left = left[file.write(left) :]
                mapped = torch.from_file(str(path), shared=False, size=flat.numel(), dtype=torch.uint8)
            finally:
                path.unlink(missing_ok=True)
        self._hand_back(tensor.nbytes)
        return mapped.view(tensor.dtype).view(tensor.shape)

    def _hand_back(self, size: int) -> None:
        """What was moved leaves holes in the heap that small objects settle in: give their pages back.

        Without it, a process that moves 16 MB at a time and frees them keeps every one of them.
        """
        self._moved += size
        if self._moved >= _TRIM and sys.platform == "linux":
            self._moved = 0
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl needs none
            if trim is not None:
                trim(0)

    def _make_folder(self) -> None:
        if self._swept:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in left_by_killed(self._folder, f"tensor-*-{machine_mark()}-*"):
            path.unlink(missing_ok=True)
        self._swept = True
