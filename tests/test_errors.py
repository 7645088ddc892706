"""Errors: one tree, one way of saying what, where and how to go on."""

from __future__ import annotations

import inspect
import re

import pytest

from featherweight import errors
from featherweight.errors import DataError, FeatherweightError, MachineError, RunnerError, UserError, nearest

TREE = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
}


def test_the_docstring_draws_every_error_under_its_base() -> None:
    assert errors.__doc__ is not None
    drawn = dict(re.findall(r"^[ │├└─]*?(\w+)(.*)$", errors.__doc__.partition("::")[2], re.MULTILINE))
    assert set(drawn) == set(TREE)
    depth = {
        match[2]: len(match[1]) for match in re.finditer(r"^( +[│├└─ ]*)(\w+)", errors.__doc__, re.MULTILINE)
    }
    for name, kind in TREE.items():
        if kind is not FeatherweightError:
            (base,) = kind.__bases__
            assert depth[name] == depth[base.__name__] + 4, name


def test_every_error_has_its_exit_code() -> None:
    for kind in TREE.values():
        assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)
    assert issubclass(DataError, UserError)
    assert not issubclass(MachineError, UserError)
    assert not issubclass(RunnerError, UserError)


@pytest.mark.parametrize("kind", TREE.values())
def test_says_what_where_and_how_to_go_on(kind: type[FeatherweightError]) -> None:
    error = kind("the file is empty", where="data.npz", fix="write some")
    assert str(error) == "the file is empty\n  at data.npz\n  fix: write some"
    assert (error.what, error.where, error.fix) == ("the file is empty", "data.npz", "write some")
    assert str(kind("the file is empty")) == "the file is empty"
    assert str(kind("the file is empty", fix="write some")) == "the file is empty\n  fix: write some"


def test_where_may_be_told_later() -> None:
    error = FeatherweightError("the file is empty")
    error.where = "step 2"
    assert str(error).splitlines()[1] == "  at step 2"


class TestNearest:
    def test_names_the_one_that_was_meant(self) -> None:
        assert nearest("quantise", ["fold", "quantize"]) == "did you mean 'quantize'?"

    def test_names_all_when_nothing_is_near(self) -> None:
        assert nearest("zzz", ["quantize", "fold"]) == "known: fold, quantize"
        assert nearest("zzz", []) == "none is known"
