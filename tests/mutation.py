"""Bundles gone wrong: flips, cuts and lies in the file, or in head and sections with digests made right."""

from __future__ import annotations

import random
import struct

import featherweight_loader as loader
from featherweight_loader.codecs import unpacked
from featherweight_loader.files import Maker
from handmade import digest, varint, wrapped

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1)
PATHS = (b"../x", b"/x", b"C:/x", b"a\\b", b"nul", b"COM1.txt", b"a/../b", b"x.", b"x ", b"\xff\xfe", b"")


def mutated(data: bytes, rng: random.Random, base: bytes | None = None) -> bytes:
    """A bundle of which something is wrong; some come out whole, so that readers must agree on them too.

    Args:
        data: A whole bundle.
        rng: Decides what goes wrong.
        base: Of an update.
    """
    how = rng.randrange(4)
    if how == 0:
        return _bytes(data, rng)
    if how == 1:
        return _front(data, rng)
    head, body, tail = _parts(data)
    if how == 2:
        for _ in range(rng.choice((1, 1, 2, 4))):
            head = _bytes(head, rng) if rng.random() < 0.6 else _number(head, rng)
        return _whole(wrapped(head, len(head), body) + tail, rng, base)
    sections = loader.read(data).sections
    section = rng.randrange(len(sections))
    begin = sum(one.packed for one in sections[:section])
    old = body[begin : begin + sections[section].packed]
    new = _flips(old, rng) if old else old
    head = head.replace(bytes.fromhex(sections[section].sha256), digest(new))
    return _whole(wrapped(head, len(head), body[:begin] + new + body[begin + len(old) :]) + tail, rng, base)


def _parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """The head decoded, the body, the signature."""
    codec, packed, raw, body = data[10], *struct.unpack_from("<II4xQ", data, 12)
    head = unpacked(codec, data[64 : 64 + packed], raw)
    return head, data[64 + packed : 64 + packed + body], data[64 + packed + body :]


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, repeated, moved."""
    at, many = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64))
    other = rng.randrange(len(data) + 1)
    return rng.choice(
        (
            _flips(data, rng),
            data[:at],
            data[:at] + data[at + many :],
            data[:at] + rng.randbytes(many) + data[at:],
            data[:at] + data[other : other + many] + data[at:],
            data[:at] + data[other : other + many] + data[at + many :],
            data + rng.randbytes(many),
        )
    )


def _flips(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3)) if data else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _number(head: bytes, rng: random.Random) -> bytes:
    """A number or a name where some byte stood."""
    at = rng.randrange(len(head) + 1)
    if rng.random() < 0.2:
        name = rng.choice(PATHS)
        return head[:at] + varint(len(name)) + name + head[at + len(name) + 1 :]
    return head[:at] + varint(rng.choice(NUMBERS)) + head[at + 1 :]


def _front(data: bytes, rng: random.Random) -> bytes:
    """A number of the first 64 bytes is another."""
    place, size = rng.choice(((8, 2), (10, 1), (11, 1), (12, 4), (16, 4), (20, 4), (24, 8)))
    number = rng.choice(NUMBERS) % 256**size
    return data[:place] + number.to_bytes(size, "little") + data[place + size :]


def _whole(data: bytes, rng: random.Random, base: bytes | None) -> bytes:
    """Half of the time the digests of files are made right again, so that what is decoded is handed over."""
    if rng.random() < 0.5:
        return data
    try:
        bundle = loader.read(data, base=base, max_bytes=1 << 24)
        head, body, tail = _parts(data)
        for index, file in enumerate(bundle._head.files):
            if bundle._head.layouts[index].copy < 0:
                maker = Maker(bundle._head, bundle._packed, bundle._of_base, [index])
                made = digest(maker._put_together(index))
                head = head.replace(bytes.fromhex(file.sha256), made)
        return wrapped(head, len(head), body) + tail
    except loader.BundleError:
        return data
