"""What is written is read again byte for byte, whatever it is, and takes few bytes."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import featherweight_loader
from featherweight.bundles.write import Member, Packed, write_bundle
from featherweight_loader.errors import DamagedBundle

HEAD = 300  # bytes of a bundle beside a file that is packed whole, with its path and digests


def _written(members: Sequence[Member], base: Path | None = None) -> tuple[Packed, bytes]:
    out = io.BytesIO()
    return write_bundle(out, members, base=base), out.getvalue()


def _round_trip(members: Sequence[Member]) -> Packed:
    packed, written = _written(members)
    bundle = featherweight_loader.read(written)
    assert bundle.identity == packed.identity
    assert list(bundle.files) == [one.path for one in members]
    for member in members:
        assert bundle.data(member.path) == member.read()
    return packed


def _smallest(data: bytes) -> int:
    return min(len(lzma.compress(data, preset=9)), len(zstandard.ZstdCompressor(level=19).compress(data)))


def _safetensors(arrays: dict[str, np.ndarray], kind: str) -> bytes:
    head, at = {}, 0
    for name, array in arrays.items():
        head[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values())


def _weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.05)


def _int8(weights: np.ndarray) -> np.ndarray:
    rows = np.abs(weights).max(axis=1, keepdims=True)
    return np.round(weights / rows * 127).astype(np.int8)


def _pruned(rows: int, columns: int) -> np.ndarray:
    """A layer whose columns and rows differ much in density."""
    rng = np.random.default_rng(1)
    dense = np.outer(rng.choice([0.02, 0.3, 1.0], rows), rng.choice([0.0, 0.05, 0.6], columns))
    return rng.random((rows, columns)) < dense


@pytest.mark.parametrize("data", [b"", b"x", b"hello world" * 9, bytes(3000)])
def test_the_smallest_files(data: bytes) -> None:
    packed = _round_trip([Member("a/b.bin", data)])
    assert packed.bytes <= len(data) + HEAD


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["random", "small", "sparse", "floats", "halves", "text", "zeros", "nibbles"]),
            st.integers(0, 3000),
        ),
        max_size=5,
    ),
    seed=st.integers(0, 2**16),
    ending=st.sampled_from([".bin", ".onnx", ".tflite", ".safetensors", ".mnn", ".pt2"]),
)
def test_any_bytes(parts: list[tuple[str, int]], seed: int, ending: str) -> None:
    data = _mixture(parts, seed)
    packed = _round_trip([Member("model" + ending, data)])
    assert packed.bytes <= _smallest(data) + HEAD


def _mixture(parts: Sequence[tuple[str, int]], seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    made = []
    for kind, size in parts:
        normal = rng.standard_normal(size)
        made.append(
            {
                "random": rng.integers(0, 256, size, dtype=np.uint8),
                "small": np.round(normal * 9).astype(np.int8),
                "sparse": np.round(normal * 20 * (rng.random(size) < 0.1)).astype(np.int8),
                "floats": normal.astype(np.float32),
                "halves": normal.astype(np.float16),
                "text": np.frombuffer(b"layer.weight, " * size, np.uint8)[:size],
                "zeros": np.zeros(size, np.uint8),
                "nibbles": np.clip(np.round(normal * 2 + 8), 0, 15).astype(np.uint8) * 17,
            }[kind].tobytes()
        )
    return b"".join(made)


@pytest.mark.parametrize("start", [b"TFL3", b"ET12eh00", b"PK\3\4", b"\xff" * 8])
@pytest.mark.parametrize("ending", [".onnx", ".tflite", ".pte", ".safetensors", ".pt2"])
def test_formats_that_lie(start: bytes, ending: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    _round_trip([Member("model" + ending, b"\x20\0\0\0" + start + noise)])


@pytest.mark.parametrize("shape", [[7, 10**12], [-3, 4], [0, 5], [3, 3], [2] * 60, ["x"]])
def test_shapes_that_lie(shape: list[object]) -> None:
    layer = _int8(_weights(100, 100)) * (np.random.default_rng(0).random((100, 100)) < 0.2)
    told = {"w": {"dtype": "I8", "shape": shape, "data_offsets": [0, layer.size]}}
    text = json.dumps(told).encode()
    _round_trip([Member("m.safetensors", len(text).to_bytes(8, "little") + text + layer.tobytes())])


def test_whole_networks_are_smaller_than_other_packers_make_them() -> None:
    weights = {
        "one": _weights(300, 784),
        "two": _weights(100, 300, seed=1),
        "three": _weights(10, 100, seed=2),
    }
    floats = _safetensors(weights, "F32")
    whole = _safetensors({name: _int8(one) for name, one in weights.items()}, "I8")
    halves = _safetensors({name: one.astype(np.float16) for name, one in weights.items()}, "F16")
    for data, share in ((floats, 0.91), (whole, 1.0), (halves, 0.95)):
        packed = _round_trip([Member("model.safetensors", data)])
        assert packed.bytes < share * _smallest(data)
        one = packed.files[0]
        assert one.streams <= 1.001 * one.entropy + 8


def test_streams_take_what_their_entropy_says() -> None:
    """Within 2 percent, here within a thousandth: frequencies are stored in one byte each."""
    data = _safetensors({"layer": _int8(_weights(256, 1000))}, "I8")
    one = _round_trip([Member("model.safetensors", data)]).files[0]
    assert one.streams > 200_000
    assert one.entropy <= one.streams <= 1.001 * one.entropy


def test_rows_and_columns_of_their_own_density_pay() -> None:
    mask = _pruned(300, 400)
    layer = _int8(_weights(300, 400)) * mask
    packed = _round_trip([Member("model.safetensors", _safetensors({"layer": layer}, "I8"))])
    share = mask.mean()
    plain = -mask.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    values = layer[layer != 0]
    counts = np.unique(values, return_counts=True)[1]
    coded = -(counts * np.log2(counts / len(values))).sum() / 8
    assert packed.bytes < 0.9 * (plain + coded)


def test_a_palette_of_floats() -> None:
    levels = np.linspace(-0.1, 0.1, 16).astype(np.float32)
    codes = np.random.default_rng(0).integers(0, 16, (200, 300))
    packed = _round_trip([Member("model.safetensors", _safetensors({"layer": levels[codes]}, "F32"))])
    assert packed.bytes < codes.size / 2 + 500


def test_files_of_equal_bytes_are_stored_once() -> None:
    data = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    alone = _round_trip([Member("a.bin", data)])
    twice = _round_trip([Member("a.bin", data), Member("b.bin", data), Member("c.txt", data, "document")])
    assert twice.bytes < alone.bytes + 150


def test_documents_and_probes_are_counted_apart() -> None:
    text = json.dumps({"accuracy": list(range(500))}).encode()
    packed = _round_trip(
        [
            Member("model.bin", _weights(50, 50).tobytes()),
            Member("card.md", text, "document"),
            Member("probe/x.npz", text[::-1], "probe"),
        ]
    )
    assert 0 < packed.documents < len(text)
    assert packed.bytes == packed.head + sum(one.coded for one in packed.files)


def test_the_same_members_give_the_same_bytes() -> None:
    members = [Member("model.safetensors", _safetensors({"layer": _int8(_weights(60, 90))}, "I8"))]
    assert _written(members) == _written(members)


def test_an_update_takes_what_changed(tmp_path: Path) -> None:
    old = _int8(_weights(300, 300))
    new = old.copy()
    new[::20] += 1
    base = tmp_path / "old.fw"
    write_bundle(base, [Member("model.safetensors", _safetensors({"layer": old}, "I8"))])
    member = Member("model.safetensors", _safetensors({"layer": new}, "I8"))
    whole = _round_trip([member])
    packed, written = _written([member], base)
    update = featherweight_loader.read(written, base=base)
    assert update.data("model.safetensors") == member.data
    assert packed.bytes < 0.15 * whole.bytes


def test_an_update_whose_arrays_moved(tmp_path: Path) -> None:
    old = {"one": _int8(_weights(200, 200)), "two": _int8(_weights(200, 200, seed=1))}
    new = {"a longer name": old["one"] + (np.arange(200) % 20 == 0).astype(np.int8), "two": old["two"]}
    base = tmp_path / "old.fw"
    write_bundle(base, [Member("model.safetensors", _safetensors(old, "I8"))])
    member = Member("model.safetensors", _safetensors(new, "I8"))
    packed, written = _written([member], base)
    assert featherweight_loader.read(written, base=base).data("model.safetensors") == member.data
    assert packed.bytes < 0.15 * len(member.read())


def test_an_update_of_bytes_that_moved(tmp_path: Path) -> None:
    """What codes gain nothing of is taken from the base by zstd, wherever it lies there."""
    noise = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
    base = tmp_path / "old.fw"
    write_bundle(base, [Member("a.bin", bytes(100)), Member("model.bin", noise)])
    packed, written = _written([Member("model.bin", b"new" + noise)], base)
    assert featherweight_loader.read(written, base=base).data("model.bin") == b"new" + noise
    assert packed.bytes < 500


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "con.txt"])
def test_paths_that_no_reader_takes_are_refused(path: str) -> None:
    with pytest.raises(DamagedBundle):
        _written([Member(path, b"")])


def test_paths_that_collide_are_refused() -> None:
    with pytest.raises(DamagedBundle):
        _written([Member("A.bin", b""), Member("a.bin", b"1")])
