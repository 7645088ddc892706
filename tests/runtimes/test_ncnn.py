"""ncnn's files: what is stored, which layers run in integers, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Lowered
from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, PerTensor
from featherweight.graph import trace
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature
from featherweight.tools.simulate import simulate
from golden import context, decibels, inputs, model, model_of, quantized, target
from nets import NETS

pytest.importorskip("ncnn", reason="ncnn is not installed")

RUNTIME = find_runtime("ncnn")
HERE = target("ncnn")


def lower(net: Model, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, HERE, folder)


def integers(net: Model) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize().apply(net, context(net, examples, HERE))


def parity(net: Model, artifact: Artifact) -> float:
    """Decibels of the artifact's outputs against the simulation."""
    x = net.entries["forward"].example_inputs
    seen = RUNTIME.open(artifact, HERE)(*(one.numpy() for one in x))
    with torch.no_grad():
        wanted = simulate(net)(*x)
    return min(decibels(one, two) for one, two in zip(wanted, seen, strict=True))


def lines(artifact: Artifact, kind: str) -> list[str]:
    """The file's layers of a type."""
    text = (artifact.folder / "model.param").read_text()
    return [line for line in text.splitlines() if line.split()[0] == kind]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(99, 61)
        self.bare = nn.Linear(61, 33, bias=False)
        self.last = nn.Linear(33, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bare(F.relu(self.wide(x)))))


def perceptron(*shape: int) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_of(Perceptron(), torch.randn(3, *shape))


def weights(net: Model, width: int, shared: PerTensor | PerChannel | PerGroup) -> Model:
    """Every weight in this format, and nothing else."""
    formats = {}
    for name, weight in net.module.named_parameters():
        if weight.dim() == 2:
            limit = weight.detach().abs().amax(1)
            if isinstance(shared, PerGroup):
                whole = torch.zeros(len(weight), shared.groups(weight.shape[1]) * shared.size)
                whole[:, : weight.shape[1]] = weight.detach()
                limit = whole.reshape(len(weight), -1, shared.size).abs().amax(2)
            limit = limit.amax() if isinstance(shared, PerTensor) else limit
            formats[name] = (RUNTIME.realise(IntQuant(-limit, limit, width, True, shared), HERE, "weight"),)
    return net.evolve(formats=formats)


def unpacked(data: np.ndarray, shape: tuple[int, int], width: int) -> np.ndarray:
    """The integers of rows whose lowest bits come first."""
    rows = np.unpackbits(data.view(np.uint8).reshape(shape[0], -1), axis=1, bitorder="little")
    bits = rows[:, : shape[1] * width].reshape(*shape, width).astype(np.int64)
    low: np.ndarray = (bits << np.arange(width)).sum(-1)
    signed: np.ndarray = low - ((low >> (width - 1)) << width)
    return signed


class TestIntegers:
    @pytest.mark.parametrize("net", NETS)
    def test_int8_is_the_simulation(self, net: str, lowered: Lowered) -> None:
        artifact = lowered("ncnn", net, "int8")
        x = inputs(net, 4)
        (seen,) = RUNTIME.open(artifact, HERE)(x)
        with torch.no_grad():
            (wanted,) = simulate(quantized(net, "ncnn"))(torch.from_numpy(x))
        assert decibels(wanted, seen) > 60

    @pytest.mark.parametrize("net", ["residual", "attention"])
    def test_stored_integers_are_those_of_the_formats(self, net: str, lowered: Lowered) -> None:
        from featherweight.runtimes._ncnn_file import read

        artifact, made = lowered("ncnn", net, "int8"), quantized(net, "ncnn")
        names = artifact.details["parameters"]["forward"]
        layers = read(artifact.folder / "model.param", artifact.folder / "model.bin")
        found = 0
        for layer in layers:
            name = names.get(layer.name, {}).get("weight")
            if name in made.formats:
                (fmt,) = made.formats[name]
                assert isinstance(fmt, IntQuant)
                wanted = fmt.quantize(made.module.get_parameter(name).detach()).reshape(-1)
                np.testing.assert_array_equal(layer.tensors["weight"], wanted.numpy())
                found += 1
        assert found == sum(name.endswith("weight") for name in made.formats)

    def test_a_convolution_hands_integers_to_the_next(self, lowered: Lowered) -> None:
        artifact = lowered("ncnn", "residual", "int8")
        terms = [line.partition(" 8=")[2].split()[0] for line in lines(artifact, "Convolution")]
        assert sorted(terms) == ["102", "102", "2", "2", "2", "2"]

    def test_what_several_integer_layers_read_is_quantized_once(self, lowered: Lowered) -> None:
        (quantizer,) = lines(lowered("ncnn", "residual", "int8"), "Quantize")  # before conv1 and the shortcut
        assert quantizer.split()[5].endswith(".int8")

    def test_batch_norms_that_were_not_folded_first(self, tmp_path: Path) -> None:
        """pnnx folds them into the weight: integers stay, scales take the factor, a negative one too."""
        net = model_of(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(8, 3, 8, 8)
        )
        with torch.no_grad():
            net.module[1].weight.copy_(torch.linspace(-1, 1, 8))  # type: ignore[index]
        made = integers(net)
        artifact = lower(made, tmp_path)
        assert RUNTIME.stored(artifact)["0.weight"].dtype == "int8"
        assert parity(made, artifact) > 60

    def test_groups_have_a_scale_for_each_channel(self, tmp_path: Path) -> None:
        net = model_of(
            nn.Sequential(nn.Conv2d(4, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1)),
            torch.randn(4, 4, 8, 8),
        )
        rough = net.copy_module()
        with torch.no_grad():
            rough[0].weight.mul_(torch.logspace(-2, 1, 12).reshape(-1, 1, 1, 1))  # type: ignore[index]
        made = integers(net.evolve(module=rough))
        artifact = lower(made, tmp_path)
        assert {RUNTIME.stored(artifact)[name].dtype for name in ("0.weight", "0.weight.1", "2.weight")} == {
            "int8"
        }
        assert parity(made, artifact) > 60

    def test_padding_that_goes_into_a_convolution(self, tmp_path: Path) -> None:
        """As networks from TensorFlow have it; another reader of the same value has a range of its own."""

        class Padded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.padded = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, stride=2)
                self.plain = nn.Conv2d(4, 8, 1, stride=2)

            def forward(self, x: Tensor) -> Tensor:
                y = self.first(x)
                return self.padded(F.pad(y, (0, 1, 0, 1))) + self.plain(y)

        made = integers(model_of(Padded(), torch.randn(6, 4, 8, 8)))
        name = next(node.inputs[0] for node in trace(made) if node.layer == "padded" and node.op == "conv2d")
        wide = tuple(replace(fmt, high=2 * fmt.high, low=2 * fmt.low) for fmt in made.formats[name])
        made = made.evolve(formats={**made.formats, name: wide})
        artifact = lower(made, tmp_path)
        assert RUNTIME.stored(artifact)["padded.weight"].dtype == "int8"
        assert parity(made, artifact) > 60

    def test_rows_of_a_matrix_go_through_a_convolution(self, tmp_path: Path) -> None:
        made = integers(perceptron(5, 99))
        artifact = lower(made, tmp_path)
        assert (len(lines(artifact, "Convolution")), len(lines(artifact, "InnerProduct"))) == (3, 0)
        assert parity(made, artifact) > 60

    def test_depthwise_kernels_are_faster_in_float(self, lowered: Lowered) -> None:
        artifact = lowered("ncnn", "depthwise", "int8")
        assert all(" 8=" not in line for line in lines(artifact, "ConvolutionDepthWise"))
        stored = RUNTIME.stored(artifact)
        assert stored["block1.depthwise.0.weight"].dtype == "float32"
        assert stored["block1.expand.0.weight"].dtype == "int8"

    def test_an_excluded_layer_stays_float(self, tmp_path: Path) -> None:
        net = perceptron(99)
        examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
        made = Quantize(where={"exclude": ["bare"]}).apply(net, context(net, examples, HERE))
        artifact = lower(made, tmp_path)
        kinds = {name: one.dtype for name, one in RUNTIME.stored(artifact).items()}
        assert [kinds[f"{n}.weight"] for n in ("wide", "bare", "last")] == ["int8", "float32", "int8"]
        assert parity(made, artifact) > 60


class TestWeightsAlone:
    @pytest.mark.parametrize("shape", [(99,), (5, 99)])
    @pytest.mark.parametrize(
        ("width", "shared", "least"),
        [
            (4, PerGroup(1, 32), 80),
            (4, PerGroup(1, 128), 80),
            (4, PerChannel(0), 80),
            (6, PerTensor(), 80),
            (8, PerGroup(1, 64), 35),  # its kernel rounds activations to 8 bits as well, by itself
        ],
    )
    def test_weights_in_blocks(
        self, width: int, shared: PerGroup, least: float, shape: tuple[int, ...], tmp_path: Path
    ) -> None:
        made = weights(perceptron(*shape), width, shared)
        artifact = lower(made, tmp_path)
        stored = RUNTIME.stored(artifact)
        for name, fmt in made.formats.items():
            rows, columns = made.parameters[name].shape
            assert stored[name].dtype == f"int{width}"
            assert stored[name].bytes == rows * -(-columns * width // 8)
            assert RUNTIME.supports("linear", fmt[0], None, HERE)
        assert parity(made, artifact) > least

    def test_bits_are_packed_as_they_are_read(self) -> None:
        from featherweight.runtimes._ncnn_formats import packed

        rng = np.random.default_rng(0)
        for width in (4, 6, 8):
            high = 2 ** (width - 1)
            rows = rng.integers(-high, high, (5, 33))
            np.testing.assert_array_equal(unpacked(packed(rows, width), (5, 33), width), rows)

    @pytest.mark.parametrize("net", ["residual", "lstm", "attention"])
    def test_half_precision(self, net: str, tmp_path: Path) -> None:
        whole = model(net)
        names = {
            p for n in trace(whole) for p in n.parameters.values() if n.op in ("conv2d", "linear", "lstm")
        }
        half = [name for name in names if whole.parameters[name].dim() > 1]
        made = whole.evolve(formats=dict.fromkeys(half, (FloatCast("float16"),)))
        artifact = lower(made, tmp_path)
        stored = RUNTIME.stored(artifact)
        assert all(stored[name].dtype == "float16" for name in half)
        assert all(stored[name].bytes == 2 * made.parameters[name].numel() for name in half)
        assert parity(made, artifact) > (60 if net == "residual" else 100)  # batch norms are folded first


class TestRefusals:
    def test_weights_that_it_has_no_kernels_for(self) -> None:
        one = torch.ones(4)
        with pytest.raises(TargetError, match="asymmetric weights"):
            RUNTIME.realise(IntQuant(-one, one, granularity=PerChannel(0)), HERE, "weight")
        with pytest.raises(TargetError, match="groups of 48"):
            RUNTIME.realise(IntQuant(-one[None], one[None], 4, True, PerGroup(1, 48)), HERE, "weight")
        with pytest.raises(TargetError, match="activations per channel"):
            RUNTIME.realise(IntQuant(-one, one, 8, True, PerChannel(1)), HERE, "activation")
        with pytest.raises(TargetError, match="bfloat16"):
            RUNTIME.realise(FloatCast("bfloat16"), HERE, "weight")

    def test_activations_become_symmetric_and_are_rounded_for_integer_kernels_alone(self) -> None:
        asked = IntQuant(torch.tensor(0.0), torch.tensor(4.0))
        grid = RUNTIME.realise(asked, HERE, "activation")
        assert isinstance(grid, IntQuant)
        assert (grid.signed, grid.symmetric, grid.readers) == (True, True, frozenset({"conv2d", "linear"}))
        assert grid.quantize(torch.tensor([-9.0, 0.0, 4.0])).tolist() == [-127, 0, 127]

    def test_convolutions_have_no_integer_weights_alone(self, tmp_path: Path) -> None:
        net = model_of(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6))
        limit = net.parameters["0.weight"].detach().flatten(1).abs().amax(1)
        fmt = IntQuant(-limit, limit, 8, True, PerChannel(0))
        assert not RUNTIME.supports("conv2d", fmt, None, HERE)
        with pytest.raises(TargetError, match=r"'0\.weight' as integers only if its input is"):
            lower(net.evolve(formats={"0.weight": (fmt,)}), tmp_path)

    def test_an_operator_that_it_lacks_is_named(self, tmp_path: Path) -> None:
        class Best(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.argmax(1)

        with pytest.raises(TargetError, match=r"no ncnn layer for torch\.argmax"):
            lower(model_of(Best(), torch.randn(2, 8)), tmp_path)

    def test_another_shape_than_the_example(self, lowered: Lowered) -> None:
        session = RUNTIME.open(lowered("ncnn", "residual", "float"), HERE)
        with pytest.raises(TargetError, match=r"takes 'x' as \(3, 16, 16\) for one example"):
            session(np.zeros((1, 3, 20, 20), np.float32))

    def test_an_unknown_option(self, lowered: Lowered) -> None:
        artifact = lowered("ncnn", "residual", "float")
        with pytest.raises(TargetError, match="no option 'lightmod'") as told:
            RUNTIME.open(artifact, target("ncnn", options={"lightmod": True}))
        assert told.value.fix == "did you mean 'lightmode'?"
        with pytest.raises(TargetError, match="'lightmode' cannot be 3"):
            RUNTIME.open(artifact, target("ncnn", options={"lightmode": 3}))


class TestSession:
    def test_a_batch_of_none(self, lowered: Lowered) -> None:
        (y,) = RUNTIME.open(lowered("ncnn", "residual", "float"), HERE)(np.zeros((0, 3, 16, 16), np.float32))
        assert (y.shape, y.dtype) == ((0, 10), np.float32)

    def test_several_inputs_and_outputs(self, tmp_path: Path) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.fc = nn.Embedding(20, 8), nn.Linear(6, 8)

            def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
                y = self.table(ids).mean(1)
                return y + self.fc(x), y

        net = model_of(Two(), torch.randint(0, 20, (3, 5)), torch.randn(3, 6), outputs=2)
        assert parity(net, lower(net, tmp_path)) > 100

    @pytest.mark.parametrize("shape", [(7, 5, 99), (99,), (4, 99)])
    def test_where_nothing_shows_which_axis_is_the_batch(
        self, shape: tuple[int, ...], tmp_path: Path
    ) -> None:
        class Mean(Perceptron):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).mean(tuple(range(1, x.dim() - 1))) if x.dim() > 2 else x * 2

        net = model_of(Mean(), torch.randn(3, *shape))
        assert parity(net, lower(net, tmp_path)) > 100

    def test_another_entry_is_another_pair_of_files(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x)

            def twice(self, x: Tensor) -> Tensor:
                return self.body(F.relu(self.body(x)))

        x = torch.randn(8, 6)
        entries = {n: Entry((x,), ("x",), ("y",), {"x": {0: "n"}}, n) for n in ("forward", "twice")}
        net = Model(Net().eval(), entries, key="two")
        artifact = lower(net, tmp_path)
        assert artifact.entries == {"forward": "model.param", "twice": "model.twice.param"}
        assert set(artifact.files) == {"model.param", "model.bin", "model.twice.param", "model.twice.bin"}
        session = RUNTIME.open(artifact, HERE)
        for entry, call in (("forward", net.module), ("twice", net.module.twice)):
            (y,) = session(x.numpy(), entry=entry)
            np.testing.assert_allclose(y, call(x).detach(), rtol=1e-4, atol=1e-5)  # type: ignore[operator]

    def test_the_same_bytes_again(self, lowered: Lowered, tmp_path: Path) -> None:
        again = lower(quantized("shared", "ncnn"), tmp_path)
        assert again.sha256 == lowered("ncnn", "shared", "int8").sha256

    def test_every_tuning_can_be_opened_and_keeps_the_results(self, lowered: Lowered) -> None:
        artifact, x = lowered("ncnn", "residual", "int8"), inputs("residual", 2)
        (plain,) = RUNTIME.open(artifact, HERE)(x)
        sets = RUNTIME.tunings(replace(HERE, threads=2))
        assert {"num_threads": 1} in sets
        for options in sets:
            (seen,) = RUNTIME.open(artifact, replace(HERE, options=options))(x)
            assert decibels(plain, seen) > 60


class TestLook:
    @pytest.mark.parametrize(
        ("net", "kind"), [("residual", "float"), ("residual", "int8"), ("concat", "int8")]
    )
    def test_values_are_those_of_the_simulation(self, net: str, kind: str, lowered: Lowered) -> None:
        artifact, x = lowered("ncnn", net, kind), inputs(net, 2)
        made = model(net) if kind == "float" else quantized(net, "ncnn")
        seen = RUNTIME.values(artifact, HERE, (x,))
        from featherweight.tools.simulate import Replay, project, projected_parameters

        values: dict[str, Tensor] = {}

        def observe(name: str, value: Tensor) -> Tensor:
            values[name] = value
            return value

        with torch.no_grad():
            replay = Replay(made, "forward", projected_parameters(made))
            replay((torch.from_numpy(x),), observe, made.formats)
        assert len(seen) >= 0.6 * len(values)
        steps = artifact.details["steps"]["forward"]
        for name, value in seen.items():
            wanted = values[name]
            if artifact.details["values"]["forward"][name] in steps:
                wanted = project(wanted, made.formats[name])
            assert value.shape == wanted.shape
            assert decibels(wanted, value) > 60, name

    def test_kernels_tell_their_type_and_time(self, lowered: Lowered) -> None:
        x = inputs("residual", 1)
        for kind, wanted in (("float", "float32"), ("int8", "int8")):
            kernels = RUNTIME.kernels(lowered("ncnn", "residual", kind), HERE, (x,))
            convolutions = [kernel for kernel in kernels if kernel.op == "Convolution"]
            assert {kernel.dtype for kernel in convolutions} == {wanted}
            assert len(convolutions) == 6
            assert all(kernel.seconds is not None and 0 < kernel.seconds < 1 for kernel in kernels)

    def test_weights_of_4_bits_are_told_as_slow(self, tmp_path: Path) -> None:
        made = weights(perceptron(99), 4, PerGroup(1, 32))
        x = made.entries["forward"].example_inputs[0].numpy()
        gemm = [k for k in RUNTIME.kernels(lower(made, tmp_path), HERE, (x,)) if k.op == "Gemm"]
        assert [(kernel.fast, bool(kernel.note)) for kernel in gemm] == [(False, True)] * 3

    def test_nothing_of_the_converter_stays(self, lowered: Lowered) -> None:
        artifact = lowered("ncnn", "residual", "int8")
        assert {path.name for path in artifact.folder.iterdir()} == {"model.param", "model.bin"}


class TestLoaders:
    SIGNATURE = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))

    def test_python(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered("ncnn", "residual", "int8")
        for name in artifact.files:
            (tmp_path / name).write_bytes((artifact.folder / name).read_bytes())
        text = RUNTIME.loaders(artifact, HERE, self.SIGNATURE)["load.py"]
        (tmp_path / "load.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "load.py")], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "y (10,)"
        assert "featherweight" not in text

    def test_cpp_names_the_files_and_options(self, lowered: Lowered) -> None:
        artifact = lowered("ncnn", "residual", "int8")
        where = target("ncnn", options={"use_winograd_convolution": False})
        text = RUNTIME.loaders(artifact, where, self.SIGNATURE)["load.cpp"]
        for part in (
            '"model.param"',
            '"model.bin"',
            "use_winograd_convolution = false",
            "in0(16, 16, 3)",
            "JNI",
        ):
            assert part in text

    @pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
    def test_cpp_compiles(self, lowered: Lowered, tmp_path: Path) -> None:
        """Against the few declarations of ncnn's header that it uses: pip does not bring that header."""
        text = RUNTIME.loaders(lowered("ncnn", "residual", "int8"), HERE, self.SIGNATURE)["load.cpp"]
        (tmp_path / "load.cpp").write_text(text)
        (tmp_path / "net.h").write_text(HEADER)
        subprocess.run(
            ["g++", "-fsyntax-only", "-Wall", "-Werror", f"-I{tmp_path}", str(tmp_path / "load.cpp")],
            check=True,
        )


HEADER = """
#include <cstddef>
namespace ncnn {
struct Mat {
    Mat(); Mat(int w); Mat(int w, int h); Mat(int w, int h, int c); Mat(int w, int h, int d, int c);
    void fill(float v); void fill(int v); size_t total() const;
};
struct Option {
    bool use_fp16_packed, use_fp16_storage, use_fp16_arithmetic, use_bf16_packed, use_bf16_storage;
    int num_threads;
};
struct Extractor { int input(const char*, const Mat&); int extract(const char*, Mat&); };
struct Net {
    Option opt; int load_param(const char*); int load_model(const char*); Extractor create_extractor() const;
};
}
"""
