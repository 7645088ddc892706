"""What a signature stands for: an in-toto statement that names a bundle's identity and each of its files.

The predicate is that of the OpenSSF's model signing, version 1.0, whose resources are the files. The
subject's digest is the bundle's identity, which stands for all of them and for how they are coded;
``serialization`` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from featherweight.bundles.signing import canonical
from featherweight.errors import BundleError

_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_SERIALIZATION = {"method": "fw", "version": 1, "hash_type": "sha256"}


def statement(name: str, identity: str, files: Mapping[str, str]) -> bytes:
    """The statement of a bundle, in the one form that it has.

    Args:
        name: Of the bundle, as it was written.
        identity: In hexadecimal.
        files: Path -> SHA-256 in hexadecimal.
    """
    resources = [{"name": path, "algorithm": "sha256", "digest": files[path]} for path in sorted(files)]
    told: dict[str, Any] = {
        "_type": _TYPE,
        "subject": [{"name": name, "digest": {"sha256": identity}}],
        "predicateType": _PREDICATE,
        "predicate": {"serialization": _SERIALIZATION, "resources": resources},
    }
    return canonical(told)


def check_statement(payload: bytes, identity: str, files: Mapping[str, str]) -> str:
    """Hold a statement against the bundle that it lies in; the name by which the bundle was signed.

    Raises:
        BundleError: It is that of another bundle, or none.
    """
    try:
        told = json.loads(payload.decode("utf-8"))
        (subject,) = told["subject"]
        name, digest = str(subject["name"]), subject["digest"]["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError("what was signed is no statement of a bundle", fix="sign it with pack") from error
    if digest != identity:
        raise BundleError(
            f"the signature is that of another bundle: {str(digest)[:16]}..., not {identity[:16]}...",
            fix="do not use this bundle; fetch it again from who made it",
        )
    if payload != statement(name, identity, files):
        raise BundleError(
            "what was signed does not name the files that are in the bundle",
            fix="do not use this bundle; fetch it again from who made it",
        )
    return name
