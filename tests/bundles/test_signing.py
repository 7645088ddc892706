"""Signatures: keys as openssl writes them, the envelope's one form, and what openssl says of it."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from featherweight.bundles import signing
from featherweight.bundles.signing import Envelope, keyid, private_key, public_key
from featherweight.errors import BundleError

PAYLOAD = b'{"a":"\xc3\xa9"}'


def openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem", folder=folder)
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "key.pub", folder=folder)
    openssl("genpkey", "-algorithm", "ed25519", "-out", "other.pem", folder=folder)
    openssl("pkey", "-in", "other.pem", "-pubout", "-out", "other.pub", folder=folder)
    openssl("pkey", "-in", "key.pem", "-aes256", "-passout", "pass:x", "-out", "locked.pem", folder=folder)
    openssl("genpkey", "-algorithm", "x25519", "-out", "x.pem", folder=folder)
    curve = ("-pkeyopt", "ec_paramgen_curve:P-256")
    openssl("genpkey", "-algorithm", "EC", *curve, "-out", "ec.pem", folder=folder)
    openssl("pkey", "-in", "ec.pem", "-pubout", "-out", "ec.pub", folder=folder)
    text = (folder / "key.pem").read_text()
    (folder / "torn.pem").write_text(text[:60] + text[70:])
    (folder / "torn.pub").write_text((folder / "key.pub").read_text()[:50] + "\n-----END PUBLIC KEY-----\n")
    (folder / "notes.txt").write_text("no key")
    (folder / "large.pem").write_text(text + "#" * 100_000)
    return folder


def test_what_is_signed_can_be_checked(keys: Path) -> None:
    envelope = Envelope.parse(Envelope.signed(PAYLOAD, private_key(keys / "key.pem")).to_bytes())
    envelope.check(public_key(keys / "key.pub"))
    assert envelope.payload == PAYLOAD
    assert envelope.keyid == keyid(public_key(keys / "key.pub"))


def test_openssl_checks_it_too(keys: Path, tmp_path: Path) -> None:
    envelope = Envelope.signed(PAYLOAD, private_key(keys / "key.pem"))
    kind = b"application/vnd.in-toto+json"
    (tmp_path / "pae").write_bytes(b"DSSEv1 28 " + kind + b" 10 " + PAYLOAD)
    (tmp_path / "sig").write_bytes(envelope.signature)
    command = ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(keys / "key.pub")]
    openssl(*command, "-sigfile", "sig", "-in", "pae", folder=tmp_path)
    (tmp_path / "pae").write_bytes(PAYLOAD)
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*command, "-sigfile", "sig", "-in", "pae", folder=tmp_path)


def test_the_key_is_known_by_its_32_bytes(keys: Path, tmp_path: Path) -> None:
    import hashlib

    openssl(
        *("pkey", "-pubin", "-in", str(keys / "key.pub"), "-outform", "DER", "-out", "der"), folder=tmp_path
    )
    assert (
        keyid(public_key(keys / "key.pub"))
        == hashlib.sha256((tmp_path / "der").read_bytes()[-32:]).hexdigest()
    )


def test_the_envelope_has_the_form_of_the_page(keys: Path) -> None:
    data = Envelope.signed(PAYLOAD, private_key(keys / "key.pem")).to_bytes()
    told = json.loads(data)
    assert data.startswith(b'{"payload":"')
    assert told["payloadType"] == "application/vnd.in-toto+json"
    assert base64.b64decode(told["payload"]) == PAYLOAD
    assert set(told["signatures"][0]) == {"keyid", "sig"}
    assert b" " not in data


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.pem", "does not exist"),
        ("locked.pem", "encrypted"),
        ("ec.pem", "is a key of another kind (E"),
        ("x.pem", "(X25519)"),
        ("torn.pem", "is damaged"),
        ("key.pub", "is a public key"),
        ("notes.txt", "is no key in PEM"),
        ("large.pem", "too large"),
        (".", "is a folder"),
    ],
)
def test_refuses_what_cannot_sign(keys: Path, name: str, says: str) -> None:
    with pytest.raises(BundleError) as caught:
        private_key(keys / name)
    assert says in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.pub", "does not exist"),
        ("ec.pub", "of another kind"),
        ("torn.pub", "is damaged"),
        ("key.pem", "is a private key"),
        ("locked.pem", "is a private key"),
        ("notes.txt", "is no public key in PEM"),
    ],
)
def test_refuses_what_cannot_check(keys: Path, name: str, says: str) -> None:
    with pytest.raises(BundleError) as caught:
        public_key(keys / name)
    assert says in str(caught.value)
    assert caught.value.fix


def test_another_key_is_named(keys: Path) -> None:
    envelope = Envelope.signed(PAYLOAD, private_key(keys / "key.pem"))
    with pytest.raises(BundleError, match="with another key"):
        envelope.check(public_key(keys / "other.pub"))


def test_a_lie_about_the_key_is_found(keys: Path) -> None:
    real = Envelope.signed(PAYLOAD, private_key(keys / "other.pem"))
    public = public_key(keys / "key.pub")
    with pytest.raises(BundleError, match="the signature is wrong"):
        Envelope(PAYLOAD, keyid(public), real.signature).check(public)


def test_every_flipped_bit_of_an_envelope_is_found(keys: Path) -> None:
    public = public_key(keys / "key.pub")
    data = Envelope.signed(PAYLOAD, private_key(keys / "key.pem")).to_bytes()
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(BundleError):
                Envelope.parse(bytes(changed)).check(public)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"payload":1,"signatures":[]}',
        b"\xff",
        b"[" * 100_000,
        b'{"signatures":7}',
    ],
)
def test_what_is_no_envelope_is_told(data: bytes) -> None:
    with pytest.raises(BundleError, match="damaged"):
        Envelope.parse(data)


def test_other_ways_to_write_it_are_refused(keys: Path) -> None:
    data = Envelope.signed(PAYLOAD, private_key(keys / "key.pem")).to_bytes()
    told = json.loads(data)
    others = [json.dumps(told).encode(), data + b"\n", signing.canonical({**told, "more": 1})]
    twice = {**told, "signatures": told["signatures"] * 2}
    for other in (*others, signing.canonical(twice)):
        with pytest.raises(BundleError):
            Envelope.parse(other)


def test_keys_of_python_sign_too() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    Envelope.signed(b"", key).check(key.public_key())
