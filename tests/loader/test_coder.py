"""The range coder and its tables, against the page of the format followed word by word in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight_loader import DamagedBundle
from featherweight_loader.coder import FREQUENCIES, Coder
from featherweight_loader.head import Table
from featherweight_loader.pieces import Coding
from handmade import Bundle, Codes, frequency

PARTS = 1 << 24
MASK = (1 << 64) - 1


def lefts(frequencies: Sequence[int]) -> list[int]:
    """Where each symbol begins."""
    numbers = [int(frequency(byte)) for byte in frequencies]
    scale = float(PARTS - len(numbers)) / float(sum(numbers))
    found, before = [], 0
    for i, number in enumerate(numbers):
        found.append(int(float(before) * scale) + i)
        before += number
    return [*found, PARTS]


def slowly(words: Sequence[int], runs: Sequence[tuple[Sequence[int], int]]) -> list[int] | None:
    """The symbols of runs by tables of these frequencies; None where the words are damaged."""
    ahead = iter(words)

    def word() -> int:
        return int(next(ahead, 0))

    lower, span = 0, MASK
    point = word() << 32 | word()
    found = []
    for frequencies, count in runs:
        left = lefts(frequencies)
        for _ in range(count):
            if len(frequencies) == 1:
                found.append(0)
                continue
            scale = span >> 24
            quantile = (point - lower & MASK) // scale
            if quantile >= PARTS:
                return None
            symbol = int(np.searchsorted(left, quantile, side="right")) - 1
            found.append(symbol)
            lower = lower + scale * left[symbol] & MASK
            span = scale * (left[symbol + 1] - left[symbol])
            if span < 1 << 32:
                lower, span, point = lower << 32 & MASK, span << 32, (point << 32 | word()) & MASK
    return found


def quickly(words: Sequence[int], runs: Sequence[tuple[Sequence[int], int]]) -> list[int] | None:
    """The same by the loader, as codes of palettes."""
    tables = [Table(0, bytes(frequencies)) for frequencies, _ in runs]
    coder = Coder(np.asarray(words, "<u4").tobytes(), tables, "here")
    found: list[int] = []
    try:
        for i, (_, count) in enumerate(runs):
            found += coder.plane(Coding((None, None), (i,)), count, 65536, wraps=False).tolist()
    except DamagedBundle:
        return None
    return found


frequencies_ = st.lists(st.integers(0, 255), min_size=1, max_size=40).filter(any)
runs_ = st.lists(st.tuples(frequencies_, st.integers(0, 60)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.integers(0, 2**32 - 1), max_size=40), runs=runs_)
def test_any_words_are_decoded_as_the_page_says(words: list[int], runs: list[tuple[list[int], int]]) -> None:
    assert quickly(words, runs) == slowly(words, runs)


@settings(max_examples=100, deadline=None)
@given(runs=runs_, seed=st.integers(0, 1000))
def test_what_was_encoded_is_decoded(runs: list[tuple[list[int], int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = Codes(Bundle())
    symbols: list[int] = []
    for frequencies, count in runs:
        part = rng.integers(0, len(frequencies), count)
        codes.push_by(part, codes.bundle.table(0, frequencies))
        symbols += part.tolist()
    words = [int(word) for word in codes.encoder.get_compressed()]
    assert quickly(words, runs) == slowly(words, runs) == symbols


@pytest.mark.parametrize("many", [2, 255, 256, 4096, 65536])
def test_large_tables(many: int) -> None:
    rng = np.random.default_rng(many)
    words = rng.integers(0, 2**32, 3000, np.uint32).tolist()
    words[0] >>= 1  # so that the first quantile is one
    frequencies = rng.integers(0, 256, many, np.uint8).tolist()
    assert any(frequencies)
    assert quickly(words, [(frequencies, 500)]) == slowly(words, [(frequencies, 500)]) != None  # noqa: E711


def test_what_a_byte_stands_for() -> None:
    assert [int(one) for one in FREQUENCIES] == [int(frequency(byte)) for byte in range(256)]
    assert (np.diff(FREQUENCIES) > 0).all()


@pytest.mark.parametrize(
    ("words", "ends"), [([], True), ([1], True), ([1, 2], True), ([1, 2, 3], False)], ids=str
)
def test_words_that_nothing_was_coded_with(words: list[int], ends: bool) -> None:
    coder = Coder(np.asarray(words, "<u4").tobytes(), [], "here")
    if ends:
        coder.end()
    else:
        with pytest.raises(DamagedBundle, match="behind their end"):
            coder.end()


def test_a_symbol_that_is_too_large() -> None:
    coder = Coder(b"\xff" * 4, [Table(2, b"\1\1\1")], "here")
    with pytest.raises(DamagedBundle, match="not below 3"):
        coder.plane(Coding((None, None), (0,)), 20, 3, wraps=False)
    coder = Coder(b"", [Table(3, b"\1")], "here")
    with pytest.raises(DamagedBundle, match="not below 3"):
        coder.plane(Coding((None, None), (0,)), 1, 3, wraps=False)
