"""A real sshd, another user and an empty environment: jobs travel, lost connections are tried again."""

from __future__ import annotations

import numpy as np
import pytest

from board import Board, board, board_sshd  # noqa: F401 - fixtures
from conftest import Lowered
from featherweight.engine.jobs import Served
from featherweight.engine.timing import Limits
from featherweight.runtime import Target, host_isa

QUICK = Limits(seconds=1.0, least_seconds=0.1, rounds=6, throughput_s=0.05, memory_repeats=1, timeout_s=60.0)


@pytest.fixture
def target(board: Board) -> Target:  # noqa: F811
    return Target("onnxruntime", host_isa(), 1, board.device)


def test_the_board_has_neither_torch_nor_the_toolkit(board: Board) -> None:  # noqa: F811
    python = str(board.python)
    assert board.run(python, "-I", "-c", "import numpy, onnxruntime") == ""
    for name in ("torch", "featherweight", "onnx"):
        assert "ModuleNotFoundError" in board.run(python, "-I", "-c", f"import {name}")


def test_a_session_answers_as_it_does_here(target: Target, lowered: Lowered) -> None:
    artifact = lowered("onnxruntime", "residual", "int8")
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    with Served(artifact, Target("onnxruntime", host_isa())) as here, Served(artifact, target) as there:
        np.testing.assert_array_equal(here.run(x)[0], there.run(x)[0])
