"""Probes: what an artifact answered to made-up inputs when it was packed, so that it can be asked again.

Inputs come from SplitMix64 (Steele, Lea and Flood, 2014) and a seed, so a bundle holds neither them nor any
example of a user. Floats are even in [-1, 1), in steps that float32 has. Integers are 0 or 1, which is an
index of every table and a value of every mask. Of each output at most 256 values are kept, evenly spaced.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.errors import BundleError
from featherweight.runtime import Signature

VALUES = 256  # kept of an output
DECIBELS = 30.0  # what another machine's answer must reach, as parity of an artifact must
SEEDS = (1, 2)  # of the calls of an entry
_SLACK = 6.0  # decibels under what the network itself makes of a tiny change of its inputs
_MOVE = 2.0**-20
_KINDS = "biuf"
_LARGEST = 1 << 26  # values of an input: a probe that asks for more is none that was packed here

Call = Callable[[tuple[np.ndarray, ...], str], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Answer:
    """What is kept of one output.

    Attributes:
        dtype: Of the output.
        shape: Of the output.
        values: Some of its values, as float32.
    """

    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def of(cls, output: np.ndarray) -> Answer:
        """Evenly spaced values of an output."""
        with np.errstate(over="ignore", invalid="ignore"):
            flat = output.reshape(-1)[spaced(output.size)].astype(np.float32)
        return cls(str(output.dtype), tuple(output.shape), flat)

    def to_json(self) -> dict[str, Any]:
        """Values as the bytes of little-endian float32, in base64."""
        text = base64.b64encode(self.values.astype("<f4").tobytes()).decode("ascii")
        return {"dtype": self.dtype, "shape": list(self.shape), "values": text}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        values = np.frombuffer(base64.b64decode(data["values"], validate=True), "<f4").astype(np.float32)
        return cls(str(data["dtype"]), tuple(int(size) for size in data["shape"]), values)


@dataclass(frozen=True)
class Asked:
    """One call with made-up inputs, and what it answered."""

    signature: Signature
    seed: int
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Probe:
    """All calls of one runtime's artifact.

    Attributes:
        runtime: Whose artifact it is.
        machine: What decides the last bits of an answer: processor, its features, versions.
        exact: A second process gave the same bits, so the same machine must.
        decibels: Signal-to-noise ratio that the answers of another machine must reach.
        calls: At least one.
    """

    runtime: str
    machine: Mapping[str, Any]
    exact: bool
    decibels: float
    calls: tuple[Asked, ...]

    def to_bytes(self) -> bytes:
        """What lies in the bundle under :func:`place`."""
        told = {
            "version": 1,
            "runtime": self.runtime,
            "machine": dict(self.machine),
            "threads": 1,
            "exact": self.exact,
            "decibels": self.decibels,
            "generator": "splitmix64",
            "calls": [
                {
                    "entry": call.signature.entry,
                    "seed": call.seed,
                    **call.signature.to_json(),
                    "answers": [answer.to_json() for answer in call.answers],
                }
                for call in self.calls
            ],
        }
        return (json.dumps(told, indent=1, sort_keys=True) + "\n").encode("utf-8")

    @classmethod
    def parse(cls, data: bytes) -> Probe:
        """Raises:
        BundleError: It is none of this version.
        """
        try:
            told = json.loads(data.decode("utf-8"))
            if told["version"] != 1 or told["generator"] != "splitmix64" or not told["calls"]:
                raise ValueError("another version")
            calls = tuple(
                Asked(
                    Signature.from_json(one, str(one["entry"])),
                    int(one["seed"]),
                    tuple(Answer.from_json(answer) for answer in one["answers"]),
                )
                for one in told["calls"]
            )
            decibels = float(told["decibels"])
            return cls(str(told["runtime"]), dict(told["machine"]), bool(told["exact"]), decibels, calls)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(
                f"a probe of the bundle cannot be read: {error}", fix="update featherweight, or pack it again"
            ) from error


def place(runtime: str) -> str:
    """Path of a runtime's probe in a bundle."""
    return f"probe/{runtime}.json"


def can_be_asked(signatures: Sequence[Signature]) -> bool:
    """Whether inputs can be made up for every entry: numbers only."""
    return bool(signatures) and all(
        dtype != "bfloat16" and np.dtype(dtype).kind in _KINDS and math.prod(shape) <= _LARGEST
        for one in signatures
        for _, dtype, shape in one.inputs
    )


def made_up(signature: Signature, seed: int) -> tuple[np.ndarray, ...]:
    """The inputs of one call; each input has a stream of its own."""
    return tuple(
        _array(shape, np.dtype(dtype), (seed << 16) + place)
        for place, (_, dtype, shape) in enumerate(signature.inputs)
    )


def spaced(size: int) -> np.ndarray:
    """Indices of the values that are kept of an output with so many."""
    kept = min(size, VALUES)
    return np.arange(kept, dtype=np.int64) * size // max(kept, 1)


def ask(signatures: Sequence[Signature], call: Call) -> tuple[Asked, ...]:
    """Call every entry with each seed."""
    return tuple(
        Asked(one, seed, tuple(Answer.of(np.asarray(out)) for out in call(made_up(one, seed), one.entry)))
        for one in signatures
        for seed in SEEDS
    )


def reached_when_moved(calls: Sequence[Asked], call: Call) -> float:
    """Decibels that answers to inputs reach which differ by a millionth: a network may amplify rounding."""
    lowest = math.inf
    for asked in calls:
        inputs = tuple(_moved(x, asked.seed) for x in made_up(asked.signature, asked.seed))
        seen = [Answer.of(np.asarray(out)) for out in call(inputs, asked.signature.entry)]
        lowest = min(
            lowest, *(decibels(a.values, b.values) for a, b in _floats(seen, asked.answers)), math.inf
        )
    return lowest


def tolerated(moved: float) -> float:
    """What another machine must reach; never more than the network itself does."""
    return round(min(DECIBELS, moved - _SLACK), 1)


def same(first: Sequence[Asked], second: Sequence[Asked]) -> bool:
    """Whether two processes gave the same bits."""
    return all(
        [_bits(answer) for answer in one.answers] == [_bits(answer) for answer in other.answers]
        for one, other in zip(first, second, strict=True)
    )


def compare(probe: Probe, call: Call, *, exact: bool) -> float:
    """Ask again, and hold the answers against those that were kept.

    Args:
        probe: What was asked.
        call: The artifact's session.
        exact: Every bit must be the same; otherwise ``probe.decibels`` must be reached.

    Returns:
        The lowest signal-to-noise ratio of an output, in decibels; infinite where all are equal.

    Raises:
        BundleError: The artifact answers something else.
    """
    lowest = math.inf
    for asked in probe.calls:
        where = f"{probe.runtime}, entry '{asked.signature.entry}', probe {asked.seed}"
        inputs = made_up(asked.signature, asked.seed)
        seen = [Answer.of(np.asarray(out)) for out in call(inputs, asked.signature.entry)]
        forms = [[(one.dtype, one.shape) for one in answers] for answers in (seen, asked.answers)]
        if forms[0] != forms[1]:
            raise _differs(f"its outputs are {forms[0]}, and were {forms[1]}", where)
        if [_bits(one) for one in seen] == [_bits(one) for one in asked.answers]:
            continue
        reached = min(
            (decibels(a.values, b.values) for a, b in _floats(seen, asked.answers)), default=math.inf
        )
        lowest = min(lowest, reached)
        if exact:
            raise _differs(f"other bits on the same machine ({reached:.1f} dB)", where)
        if not reached >= probe.decibels:
            raise _differs(f"{reached:.1f} dB, and at least {probe.decibels:g} dB are asked for", where)
    return lowest


def decibels(seen: np.ndarray, wanted: np.ndarray) -> float:
    """Signal-to-noise ratio; minus infinite where what is not finite stands elsewhere."""
    finite = np.isfinite(wanted)
    if (finite != np.isfinite(seen)).any() or not np.array_equal(
        seen[~finite], wanted[~finite], equal_nan=True
    ):
        return -math.inf
    signal, answer = wanted[finite].astype(np.float64), seen[finite].astype(np.float64)
    power, error = float(np.square(signal).sum()), float(np.square(answer - signal).sum())
    if not error:
        return math.inf
    return 10 * math.log10(power / error) if power else -math.inf


def _differs(what: str, where: str) -> BundleError:
    return BundleError(
        f"the artifact does not answer its probe as it did when it was packed: {what}",
        where=where,
        fix="use the versions of the runtime that artifact.json names, or pack the artifact again",
    )


def _floats(seen: Sequence[Answer], wanted: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Outputs of real numbers; of integers, as of class numbers, a difference has no size."""
    pairs = zip(seen, wanted, strict=True)
    return [(a, b) for a, b in pairs if np.dtype(b.dtype).kind == "f" and a.shape == b.shape]


def _bits(answer: Answer) -> tuple[str, tuple[int, ...], bytes]:
    return answer.dtype, answer.shape, answer.values.tobytes()


def _array(shape: Sequence[int], dtype: np.dtype[Any], stream: int) -> np.ndarray:
    if min(shape, default=0) < 0 or math.prod(shape) > _LARGEST:
        raise BundleError(
            f"a probe asks for an input of {list(shape)}", fix="do not use this bundle, or pack it again"
        )
    words = splitmix64(stream, math.prod(shape))
    if dtype.kind == "f":
        values = (words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    else:
        values = (words >> np.uint64(63)).astype(np.float64)
    return values.astype(dtype).reshape(tuple(shape))


def splitmix64(seed: int, count: int) -> np.ndarray:
    """The first numbers of SplitMix64 from a seed, as uint64."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + step * np.arange(1, count + 1, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def _moved(array: np.ndarray, seed: int) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    signs = _array(array.shape, np.dtype(np.float64), (seed << 16) + 0xFFFF)
    moved: np.ndarray = (array * (1.0 + _MOVE * np.sign(signs))).astype(array.dtype)
    return moved
