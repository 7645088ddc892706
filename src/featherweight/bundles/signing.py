"""Signs a statement and checks who signed it: Ed25519 in a DSSE envelope, keys in PEM as openssl writes.

DSSE v1 signs its pre-authentication encoding, ``DSSEv1 LEN(type) type LEN(payload) payload``, so that what
is signed cannot be taken for something else (https://github.com/secure-systems-lab/dsse).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from featherweight.errors import BundleError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_LARGEST_KEY = 1 << 16  # bytes of a file that may be a key
_MAKE = "openssl genpkey -algorithm ed25519 -out key.pem"
_PUBLIC = "openssl pkey -in key.pem -pubout -out key.pub"


@dataclass(frozen=True)
class Envelope:
    """What lies behind a signed bundle.

    Attributes:
        payload: The statement.
        keyid: SHA-256 of the public key's 32 bytes, in hexadecimal.
        signature: 64 bytes.
    """

    payload: bytes
    keyid: str
    signature: bytes

    @classmethod
    def signed(cls, payload: bytes, key: Ed25519PrivateKey) -> Envelope:
        """The payload, signed."""
        return cls(payload, keyid(key.public_key()), key.sign(_encoded(payload)))

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Read an envelope of exactly one form: written again it is the same, byte for byte.

        Raises:
            BundleError: It is none.
        """
        try:
            told = json.loads(data.decode("utf-8"))
            (by,) = told["signatures"]
            found = cls(_bytes(told["payload"]), str(by["keyid"]), _bytes(by["sig"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(
                "the signature of the bundle is damaged: it is no DSSE envelope", fix="fetch the bundle again"
            ) from error
        if found.to_bytes() != data:
            raise BundleError(
                "the signature of the bundle was changed: its envelope is not written as packing writes it",
                fix="fetch the bundle again",
            )
        return found

    def to_bytes(self) -> bytes:
        """JSON in UTF-8 with sorted keys and no blanks."""
        told = {
            "payload": _text(self.payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": self.keyid, "sig": _text(self.signature)}],
        }
        return canonical(told)

    def check(self, key: Ed25519PublicKey) -> None:
        """Whether the owner of this key signed it.

        Raises:
            BundleError: Another one did, or nobody.
        """
        if self.keyid != keyid(key):
            raise BundleError(
                f"the bundle is signed with another key: {self.keyid[:16]}..., not {keyid(key)[:16]}...",
                fix="name the public key of who made the bundle: --key key.pub",
            )
        try:
            key.verify(self.signature, _encoded(self.payload))
        except InvalidSignature as error:
            raise BundleError(
                "the signature is wrong: what it stands for was changed after it was signed",
                fix="do not use this bundle; fetch it again from who made it",
            ) from error


def canonical(value: Any) -> bytes:
    """JSON in UTF-8 that has one form only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def keyid(key: Ed25519PublicKey) -> str:
    """SHA-256 of the public key's 32 bytes, in hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def private_key(path: str | Path) -> Ed25519PrivateKey:
    """The key of a file that signs.

    Raises:
        BundleError: It is no private Ed25519 key in PEM, or is encrypted.
    """
    data = _read(path, "--sign")
    if b"PRIVATE KEY" not in data:
        what = "is a public key, which signs nothing" if b"PUBLIC KEY" in data else "is no key in PEM"
        raise BundleError(f"'{path}' {what}", fix=f"name a private key; {_MAKE} makes one")
    if b"ENCRYPTED" in data:
        raise BundleError(
            f"'{path}' is encrypted, and no password is asked for here",
            fix=f"openssl pkey -in {path} -out key.pem, and delete key.pem when the bundle is signed",
        )
    key = _loaded(path, lambda: load_pem_private_key(data, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        _refuse_kind(path, key)
    return key


def public_key(path: str | Path) -> Ed25519PublicKey:
    """The key of a file that checks signatures.

    Raises:
        BundleError: It is no public Ed25519 key in PEM.
    """
    data = _read(path, "--key")
    if b"PRIVATE KEY" in data:
        raise BundleError(f"'{path}' is a private key; whoever verifies needs the public one", fix=_PUBLIC)
    if b"PUBLIC KEY" not in data:
        raise BundleError(f"'{path}' is no public key in PEM", fix=_PUBLIC)
    key = _loaded(path, lambda: load_pem_public_key(data))
    if not isinstance(key, Ed25519PublicKey):
        _refuse_kind(path, key)
    return key


def _read(path: str | Path, option: str) -> bytes:
    file = Path(path)
    if not file.is_file():
        what = "is a folder, not a key" if file.is_dir() else "does not exist"
        raise BundleError(f"the key '{path}' {what}", fix=f"{option} FILE; {_MAKE} makes a key")
    if file.stat().st_size > _LARGEST_KEY:
        raise BundleError(f"'{path}' is too large for a key", fix=f"{option} FILE in PEM")
    try:
        return file.read_bytes()
    except OSError as error:
        raise BundleError(
            f"the key '{path}' cannot be read: {error.strerror}", fix=f"{option} FILE"
        ) from error


def _loaded(path: str | Path, load: Callable[[], object]) -> object:
    try:
        return load()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BundleError(f"the key '{path}' is damaged", fix=f"write it again: {_MAKE}") from error


def _refuse_kind(path: str | Path, key: object) -> NoReturn:
    kind = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lstrip("_")
    raise BundleError(
        f"'{path}' is a key of another kind ({kind}); bundles are signed with Ed25519", fix=_MAKE
    )


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
