"""Statements: the form that in-toto and model signing give them, and what does not fit a bundle."""

from __future__ import annotations

import json

import pytest

from featherweight.bundles.signing import canonical
from featherweight.bundles.statement import check_statement, statement
from featherweight.errors import BundleError

FILES = {"b/model.bin": "22" * 32, "a.json": "11" * 32}
IDENTITY = "ab" * 32
MADE = statement("model.fw", IDENTITY, FILES)


def test_has_the_form_of_model_signing() -> None:
    told = json.loads(MADE)
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert told["predicateType"] == "https://model_signing/signature/v1.0"
    assert told["subject"] == [{"name": "model.fw", "digest": {"sha256": IDENTITY}}]
    assert told["predicate"]["resources"] == [
        {"name": "a.json", "algorithm": "sha256", "digest": "11" * 32},
        {"name": "b/model.bin", "algorithm": "sha256", "digest": "22" * 32},
    ]
    assert told["predicate"]["serialization"]["method"] == "fw"


def test_the_order_of_the_files_does_not_count() -> None:
    assert statement("model.fw", IDENTITY, dict(reversed(FILES.items()))) == MADE


def test_fits_its_bundle_under_any_name() -> None:
    assert check_statement(MADE, IDENTITY, FILES) == "model.fw"
    assert check_statement(statement("ü", IDENTITY, FILES), IDENTITY, FILES) == "ü"


def test_another_bundle() -> None:
    with pytest.raises(BundleError, match="that of another bundle"):
        check_statement(MADE, "cd" * 32, FILES)


@pytest.mark.parametrize(
    "files", [{}, {**FILES, "c": "33" * 32}, {**FILES, "a.json": "33" * 32}], ids=["none", "more", "other"]
)
def test_other_files(files: dict[str, str]) -> None:
    with pytest.raises(BundleError, match="does not name the files"):
        check_statement(MADE, IDENTITY, files)


def test_another_predicate() -> None:
    told = json.loads(MADE)
    told["predicateType"] = "https://slsa.dev/provenance/v1"
    with pytest.raises(BundleError, match="does not name the files"):
        check_statement(canonical(told), IDENTITY, FILES)


@pytest.mark.parametrize("payload", [b"", b"{}", b"[1]", b'{"subject":[]}', b'{"subject":[1]}', b"\xff"])
def test_no_statement(payload: bytes) -> None:
    with pytest.raises(BundleError, match="no statement"):
        check_statement(payload, IDENTITY, FILES)
