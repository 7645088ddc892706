"""Pictures for networks of 224 px: what calibrates, what is scored, and others that are tried as well.

Calibration: photographs and scenes, made of the stamps and templates of Debian's ``tuxpaint`` (GPL). Scored:
seeded crops and flips (views) of the 20 ImageNet photographs in PyPI's ``foolbox``. Others: views of the
photographs in Debian's ``lomiri-wallpapers``. Packages are read where they are installed, else fetched and
unpacked into the benchmarks' results; none of their pictures is kept with this code.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from packaged import fetch
from PIL import Image

SIZE = 224
STAMPS, TEMPLATES = "tuxpaint-stamps-default", "tuxpaint-data"
PHOTOS = "foolbox==3.3.4"
WALLPAPERS = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")

_DRAWN = (
    "cartoon",
    "symbols",
    "seasonal",
    "clothes",
    "roadsigns",
    "flags",
)  # folders that hold no photographs
_SMALLEST = 20_000  # bytes of a stamp: smaller files are icons
_SCENES = 0.6  # share of the calibration pictures that have stamps on a photograph
_LOOSEST = 0.55  # side of a view, in units of the shorter side of its photograph
_ABSTRACT = ("umang", "Fossa", "Infinite-Sea", "Painting-Colors", "analogpattern")


def debian(package: str, folder: Path, place: str) -> Path:
    """Where a Debian package's files under ``place`` (e.g. ``usr/share/backgrounds``) can be read.

    Raises:
        SystemExit: It is not installed, and apt cannot get it.
    """
    listed = Path(f"/var/lib/dpkg/info/{package}.list")
    if listed.is_file():
        return Path("/") / place
    unpacked = folder / package
    if unpacked.is_dir():
        return unpacked / place
    unfinished = folder / f"{package}.partial"
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "--quiet=2", "download", package], check=True, cwd=unfinished)
        for archive in unfinished.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(archive), str(unfinished)], check=True)
            archive.unlink()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise SystemExit(f"apt cannot get {package}: {error}") from error
    unfinished.replace(unpacked)
    return unpacked / place


def scenes(count: int, seed: int, folder: Path) -> np.ndarray:
    """Pictures to calibrate with: uint8 (count, 224, 224, 3); another seed gives other pictures.

    Views of photographs, most of them with one or two cut-out animals, plants and things in front.

    Raises:
        SystemExit: A package cannot be had.
    """
    stamps = debian(STAMPS, folder, "usr/share/tuxpaint/stamps")
    backs = sorted((debian(TEMPLATES, folder, "usr/share/tuxpaint/templates")).glob("*.jpg"))
    fronts = [
        path
        for path in sorted(stamps.rglob("*.png"))
        if not set(_DRAWN) & set(path.parts) and path.stat().st_size > _SMALLEST
    ]
    if not backs or not fronts:
        raise SystemExit(f"{STAMPS} and {TEMPLATES} hold no pictures")
    random = np.random.default_rng((11, seed))
    photographs = [Image.open(path).convert("RGB") for path in backs]
    queue = [fronts[i] for _ in range(1 + 2 * count // len(fronts)) for i in random.permutation(len(fronts))]
    made = []
    for index in range(count):
        picture = view(photographs[index % len(photographs)], random)
        if random.random() < _SCENES:
            for _ in range(int(random.integers(1, 3))):
                _paste(picture, queue.pop(), random)
        made.append(np.asarray(picture))
    return np.stack(made)


def _paste(picture: Image.Image, path: Path, random: np.random.Generator) -> None:
    """Put a cut-out of 0.4 to 1.2 of the picture's side somewhere in front."""
    stamp = Image.open(path).convert("RGBA")
    stamp = stamp.crop(stamp.getbbox())
    factor = SIZE * random.uniform(0.4, 1.2) / max(stamp.size)
    wide, high = (max(8, int(side * factor)) for side in stamp.size)
    stamp = stamp.resize((wide, high), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x, y = (int(random.integers(-side // 4, SIZE - 3 * side // 4 + 1)) for side in (wide, high))
    picture.paste(stamp, (x, y), stamp)


def view(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    """A square crop of 0.55 to 1 of the shorter side, flipped every second time, at 224 px."""
    side = min(photograph.size) * random.uniform(_LOOSEST, 1)
    x, y = (random.uniform(0, length - side) for length in photograph.size)
    box = (x, y, x + side, y + side)
    made = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else made


def views(files: Sequence[Path], count: int, seed: int) -> np.ndarray:
    """So many views of these photographs, equally many of each, photograph by photograph.

    Returns:
        uint8 (count, 224, 224, 3); the first of each photograph first, so that a shorter prefix of the
        rounds still holds every photograph.
    """
    random, found = np.random.default_rng(seed), []
    rounds = -(-count // len(files))
    for path in files:
        photograph = Image.open(path).convert("RGB")
        found.append([np.asarray(view(photograph, random)) for _ in range(rounds)])
    return np.stack([one[turn] for turn in range(rounds) for one in found])[:count]


def photographs(folder: Path) -> list[Path]:
    """The ImageNet photographs of foolbox.

    Raises:
        SystemExit: pip cannot get it, or it holds none.
    """
    place = fetch(PHOTOS, folder)
    return _some([path for path in place.rglob("imagenet_*") if path.suffix in (".jpg", ".png")], PHOTOS)


def wallpapers(folder: Path) -> list[Path]:
    """Photographs of landscapes, plants, animals and things; what shows none of these is left out.

    Raises:
        SystemExit: apt cannot get them.
    """
    places = [debian(package, folder, "usr/share/backgrounds") for package in WALLPAPERS]
    found = [path for place in places for path in place.glob("*_by_*.jpg")]
    return _some([path for path in found if not path.name.startswith(_ABSTRACT)], WALLPAPERS[0])


def _some(paths: list[Path], package: str) -> list[Path]:
    if not paths:
        raise SystemExit(f"{package} holds no pictures")
    return sorted(set(paths))


def prepared(pictures: np.ndarray) -> np.ndarray:
    """As EfficientNet-Lite takes them: float32 (count, 3, 224, 224), from -1 to 1."""
    return ((pictures.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2).copy()
