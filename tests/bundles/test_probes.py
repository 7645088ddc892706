"""Probes: inputs that are the same everywhere, answers that are kept exactly, differences that are found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from featherweight.bundles import probes
from featherweight.bundles.probes import Answer, Probe, ask, compare, made_up, spaced, splitmix64
from featherweight.errors import BundleError
from featherweight.runtime import Signature

ONE = Signature((("x", "float32", (1, 3, 4)),), ("y", "label"))
MANY = Signature(
    (("ids", "int64", (1, 6)), ("mask", "bool", (1, 6)), ("x", "float64", (2,)), ("u", "uint8", (3,))),
    ("y",),
    "decode",
)


def answer(inputs: tuple[np.ndarray, ...], entry: str) -> Sequence[np.ndarray]:
    """A network: a sum, and which is the largest."""
    x = np.concatenate([np.asarray(one, np.float32).reshape(-1) for one in inputs])
    return np.outer(x, np.arange(1, 40, dtype=np.float32)), np.asarray(x.argmax()).reshape(1)


def probe(exact: bool = True, decibels: float = 30.0) -> Probe:
    return Probe("onnxruntime", {"cpu": "a"}, exact, decibels, ask([ONE, MANY], answer))


def test_splitmix64_is_that_of_its_authors() -> None:
    # the first numbers from 1234567, as the reference implementation in C gives them
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4).tolist() == wanted


def test_inputs_are_bounded_and_of_the_types_asked_for() -> None:
    ids, mask, x, u = made_up(MANY, 1)
    assert (ids.dtype, mask.dtype, x.dtype, u.dtype) == (np.int64, np.bool_, np.float64, np.uint8)
    assert set(ids.reshape(-1).tolist()) <= {0, 1}
    assert set(u.tolist()) <= {0, 1}
    large = made_up(Signature((("x", "float32", (1, 4096)),), ("y",)), 1)[0]
    assert -1 <= large.min() < -0.99
    assert 0.99 < large.max() < 1
    assert abs(large.mean()) < 0.03
    assert not np.array_equal(large, made_up(Signature((("x", "float32", (1, 4096)),), ("y",)), 2)[0])


def test_inputs_are_the_same_in_every_float_type() -> None:
    as32, as64 = (
        made_up(Signature((("x", dtype, (50,)),), ("y",)), 1)[0] for dtype in ("float32", "float64")
    )
    assert np.array_equal(as32.astype(np.float64), as64)


@pytest.mark.parametrize(("size", "kept"), [(0, 0), (1, 1), (10, 10), (256, 256), (257, 256), (100_000, 256)])
def test_at_most_256_values_are_kept_evenly(size: int, kept: int) -> None:
    places = spaced(size)
    assert len(places) == kept
    assert (np.diff(places) > 0).all()
    assert kept == 0 or (places[0] == 0 and size - size // kept - 1 <= places[-1] < size)


def test_is_the_same_when_it_is_read_again() -> None:
    made = probe()
    again = Probe.parse(made.to_bytes())
    assert again.to_bytes() == made.to_bytes()
    assert math.isinf(compare(again, answer, exact=True))


def test_what_is_not_finite_is_kept_too() -> None:
    odd = Answer.of(np.array([np.nan, np.inf, -np.inf, 1e-42], np.float32))
    again = Answer.from_json(json.loads(json.dumps(odd.to_json())))
    assert again.values.tobytes() == odd.values.tobytes()
    assert math.isinf(probes.decibels(odd.values, again.values))
    assert probes.decibels(np.zeros(4, np.float32), odd.values) == -math.inf


def test_one_bit_is_found_on_the_same_machine_only() -> None:
    def nearly(inputs: tuple[np.ndarray, ...], entry: str) -> Sequence[np.ndarray]:
        first, *others = answer(inputs, entry)
        first = first.copy()
        first[0, 0] = np.nextafter(first[0, 0], np.float32(9))
        return first, *others

    with pytest.raises(BundleError, match="other bits on the same machine"):
        compare(probe(), nearly, exact=True)
    assert 100 < compare(probe(), nearly, exact=False) < math.inf


def test_what_is_too_far_off_is_found_everywhere() -> None:
    def off(inputs: tuple[np.ndarray, ...], entry: str) -> Sequence[np.ndarray]:
        first, *others = answer(inputs, entry)
        return first * np.float32(1.1), *others

    assert compare(probe(decibels=19.0), off, exact=False) == pytest.approx(20, abs=0.01)
    with pytest.raises(BundleError, match=r"20\.0 dB, and at least 21 dB") as caught:
        compare(probe(decibels=21.0), off, exact=False)
    assert caught.value.where == "onnxruntime, entry 'forward', probe 1"


def test_other_shapes_are_found() -> None:
    with pytest.raises(BundleError, match="its outputs are"):
        compare(probe(), lambda inputs, entry: answer(inputs, entry)[:1], exact=False)


def test_a_network_that_amplifies_is_asked_for_less() -> None:
    def steps(inputs: tuple[np.ndarray, ...], entry: str) -> Sequence[np.ndarray]:
        (x,) = inputs
        return (np.sin(1e6 * np.asarray(x, np.float64)),)

    calls = ask([ONE], steps)
    assert probes.tolerated(probes.reached_when_moved(calls, steps)) < 30
    calm = ask([ONE], answer)
    assert probes.tolerated(probes.reached_when_moved(calm, answer)) == 30


def test_what_no_input_can_be_made_up_for() -> None:
    text = replace(ONE, inputs=(("x", "str_", (1,)),))
    brain = replace(ONE, inputs=(("x", "bfloat16", (1,)),))
    huge = replace(ONE, inputs=(("x", "float32", (1 << 40,)),))
    for one in (text, brain, huge):
        assert not probes.can_be_asked([ONE, one])
    assert not probes.can_be_asked([])
    assert probes.can_be_asked([ONE, MANY])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"generator": "mt19937"},
        {"calls": []},
        {"calls": [{"entry": "forward"}]},
        {"decibels": "loud"},
        {"machine": 3},
    ],
)
def test_what_is_no_probe_is_told(change: dict[str, object]) -> None:
    told = json.loads(probe().to_bytes()) | change
    with pytest.raises(BundleError, match="a probe of the bundle cannot be read"):
        Probe.parse(json.dumps(told).encode())


@pytest.mark.parametrize("shape", [(1 << 40,), (-1, 4)])
def test_a_hostile_probe_takes_no_memory(shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="asks for an input"):
        made_up(Signature((("x", "float32", shape),), ("y",)), 1)
