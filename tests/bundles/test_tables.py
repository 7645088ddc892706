"""Tables: what is stored is what the coder takes, rings begin anywhere, like streams share one."""

from __future__ import annotations

import constriction
import numpy as np

from featherweight.bundles.tables import PARTS, Table, entropy, make, shared


def test_parts_are_those_of_the_coder() -> None:
    """What the coder writes is as long as the parts of the symbols say."""
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.2, 100_000) - 1, 60).astype(np.int32)
    counts = np.bincount(symbols, minlength=256)
    table = make(counts, 256)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(
        symbols - table.lo, constriction.stream.model.Categorical(table.frequencies, perfect=False)
    )
    assert table.parts.sum() == PARTS
    assert abs(32 * len(encoder.get_compressed()) - table.bits(counts, 256)) < 128
    assert table.bits(counts, 256) < 1.002 * entropy(counts)


def test_a_ring_begins_behind_its_widest_gap() -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[[254, 255, 0, 1, 2]] = [3, 9, 40, 8, 2]
    table = make(counts, 256)
    assert (table.lo, len(table.codes)) == (254, 5)
    assert make(counts, 0).lo == 0


def test_one_symbol_takes_nothing() -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[7] = 1000
    table = make(counts, 256)
    assert (table.lo, len(table.codes), table.bits(counts, 256)) == (7, 1, 0.0)


def test_a_symbol_outside_cannot_be_coded() -> None:
    assert Table(3, b"\1\1").bits(np.array([1, 0, 0, 1, 1]), 0) == float("inf")


def test_like_streams_share_a_table() -> None:
    rng = np.random.default_rng(0)
    narrow = [np.bincount(rng.binomial(20, 0.5, 500), minlength=256) for _ in range(5)]
    wide = [np.bincount(rng.integers(0, 256, 5000), minlength=256) for _ in range(5)]
    which = shared(np.stack([*narrow, *wide]))
    assert len(set(which[:5])) == len(set(which[5:])) == 1
    assert which[0] != which[5]
