"""Bundles put together at random from all that the format has: contexts, palettes, differences, sharing."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

import handmade
from handmade import LZMA, PREFIXED, PROBE, RAW, STORED, ZSTD, Bundle, Codes, Map, piece


@dataclass(frozen=True)
class Sample:
    """A bundle in the making, its base's bytes (empty where it needs none), and what its files hold."""

    bundle: Bundle
    base: bytes
    files: dict[str, bytes]


def random_map(rng: np.random.Generator, n: int) -> Map | None:
    if rng.random() < 0.5:
        return None
    inner, most, many = int(rng.integers(1, max(n, 1) + 1)), max(n, 1), int(rng.integers(2, 17))
    if rng.random() < 0.5:
        inner = int(rng.integers(1, 10))
    most = (most - 1) // inner + 1
    count = int(rng.integers(1, most + 1)) if rng.random() < 0.7 else most
    return Map(inner, [int(one) for one in rng.integers(0, many, count)], many)


def random_plane(rng: np.random.Generator, codes: Codes, values: np.ndarray, modulus: int | None) -> bytes:
    n = len(values)
    common = int(values[rng.integers(n)]) if n and rng.random() < 0.4 else None
    lo = int(rng.integers(0, 2**63 - 1)) if modulus and rng.random() < 0.2 else None
    maps = (random_map(rng, n), random_map(rng, n))
    return codes.plane([int(one) for one in values], modulus=modulus, maps=maps, common=common, lo=lo)


def taken_apart(data: np.ndarray, bits: int, rotated: bool) -> list[np.ndarray]:
    """The planes of bytes."""
    if bits < 8:
        return [(data[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1).reshape(-1)]
    words = data.view(f"<u{bits // 8}").astype(np.uint64)
    if rotated:
        words = (words << np.uint64(1) | words >> np.uint64(bits - 1)) & np.uint64(2**bits - 1)
    return [words >> np.uint64(8 * place) & np.uint64(255) for place in range(bits // 8)]


@dataclass(frozen=True)
class Part:
    """How the head tells a piece, its bytes, those of its planes that are not coded, and whether any is."""

    told: bytes
    data: bytes
    raw: bytes
    coded: bool


def random_part(rng: np.random.Generator, codes: Codes, old: bytes) -> Part:
    bits = int(2 ** rng.integers(0, 6))
    size = max(1, bits // 8)
    count = int(rng.choice([0, 1, 5, 40, 300, 12000 // size], p=[0.05, 0.1, 0.2, 0.4, 0.2, 0.05]))
    data = np.clip(rng.normal(20, 9, count * size), 0, 255).astype(np.uint8)
    n = count * 8 // min(bits, 8)
    if bits >= 8 and rng.random() < 0.3:
        values = rng.integers(0, 256, (int(rng.integers(1, 300)), size), np.uint8)
        picks = np.minimum(rng.geometric(0.05, n) - 1, len(values) - 1)
        told = random_plane(rng, codes, picks, None)
        return Part(piece(n, bits, told, palette=values.tobytes()), values[picks].tobytes(), b"", True)
    rotated = bits >= 16 and rng.random() < 0.5
    planes = taken_apart(data, bits, rotated)
    modulus, base = min(256, 1 << bits), None
    if len(old) > len(data) and rng.random() < 0.4:
        base = ("old/model.bin", int(rng.integers(0, len(old) - len(data))))
        before = np.frombuffer(old, np.uint8, len(data), base[1])
        pairs = zip(planes, taken_apart(before, bits, rotated), strict=True)
        planes = [(one.astype(np.int64) - two.astype(np.int64)) % modulus for one, two in pairs]
    told, raw = [], b""
    for plane in planes:
        stored = bits >= 8 and rng.random() < 0.2
        told.append(RAW if stored else random_plane(rng, codes, plane, modulus))
        raw += plane.astype(np.uint8).tobytes() if stored else b""
    coded = any(one != RAW for one in told)
    return Part(piece(n, bits, *told, rotated=rotated, base=base), data.tobytes(), raw, coded)


def identity(data: bytes) -> bytes:
    return handmade.digest(data[: 64 + struct.unpack_from("<I", data, 12)[0]])


def sample(seed: int) -> Sample:
    """A bundle of a few files, with anything in them that the format has."""
    rng = np.random.default_rng(seed)
    before, old = b"", b""
    if rng.random() < 0.5:
        base, old = Bundle(), rng.integers(0, 256, 900, np.uint8).tobytes()
        base.plain("old/model.bin", old)
        base.plain("old/about.md", old, handmade.DOCUMENT)
        before = base.bytes(ZSTD)
    bundle, files = Bundle(base=identity(before) if before else b""), {}
    codes, parts = [], []
    for number in range(int(rng.integers(1, 4))):
        own = Codes(bundle)
        found = [
            (b"gap" * int(rng.integers(0, 3)), random_part(rng, own, old)) for _ in range(rng.integers(4))
        ]
        files[f"folder/{number}.bin"] = b"".join(gap + part.data for gap, part in found) + b"the end"
        codes.append(own)
        parts.append(found)
    rests = [b"".join(gap for gap, _ in found) + b"the end" for found in parts]
    raws = [b"".join(part.raw for _, part in found) for found in parts]
    packings = [STORED, ZSTD, LZMA, *([PREFIXED] if old else [])]

    def sections(contents: list[bytes]) -> list[int]:
        if rng.random() < 0.5:
            contents = [b"".join(contents)]
        made = [bundle.section(one, int(rng.choice(packings)), old) if one else 0 for one in contents]
        return made if len(made) == len(parts) else made * len(parts)

    rest, raw = sections(rests), sections(raws)
    for i, (path, data) in enumerate(files.items()):
        words = codes[i].section() if any(part.coded for _, part in parts[i]) else 0
        pieces = [(len(gap), part.told) for gap, part in parts[i]]
        bundle.file(path, data, rest=rest[i], raw=raw[i], codes=words, pieces=pieces)
    if rng.random() < 0.5:
        files["copy.bin"] = files["folder/0.bin"]
        bundle.copy("copy.bin", files["copy.bin"], 0, PROBE)
    return Sample(bundle, before, files)
