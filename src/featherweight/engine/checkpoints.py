"""Where a long step keeps how far it is: a file in the store under the step's key, replaced as a whole.

A state is written under a temporary name and renamed, so that kill -9 leaves the old one or the new one.
It is tensors and JSON data, and read without pickle. When the step itself is stored its checkpoint goes.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featherweight.engine.store import Store, mine, told_as_machine_error

KIND = "checkpoints"
_FILE = "state.pt"


class StoredCheckpoint:
    """The checkpoint of one step.

    Args:
        store: Where it lies; trimmed like every other entry when it is not used for long.
        key: Of the step.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    @property
    def _folder(self) -> Path:
        return self._store.folder / KIND / self._key

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None: nothing, or what a broken disk left of it."""
        if self._store.get(KIND, self._key) is None:  # marks it as used
            return None
        try:
            state = torch.load(self._folder / _FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None
        return state if isinstance(state, dict) else None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state instead of the one before.

        Raises:
            MachineError: The disk is full, or the folder cannot be written.
        """
        temporary = self._folder / f".{_FILE}-{mine()}"
        with told_as_machine_error("the checkpoint"):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    torch.save(dict(state), file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._folder / _FILE)
            finally:
                temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """The step is done: nothing is resumed any more."""
        shutil.rmtree(self._folder, ignore_errors=True)
