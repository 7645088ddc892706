"""Bad input through the command line: one sentence with what, where and the fix, and nothing is left behind.

``python tests/test_bad_input.py`` prints the table of inputs and messages as Markdown.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from featherweight.cli import main

NETS = '''"""Networks, good and bad."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def wide():
    return Net(8)


def nan():
    module = Net()
    module.head.weight.data[0, 0] = float("nan")
    return module


def seven():
    module = Net()
    module.head = nn.Linear(4, 7)
    return module


def gray():
    module = Net()
    module.conv = nn.Conv2d(1, 4, 3, padding=1)
    return module


class Both(Net):
    def forward(self, x):
        y = super().forward(x)
        return y, y


def half():
    return Net().bfloat16()


def double():
    return Net().double()


def needs(width):
    return Net(width)


def raises():
    return Net(width=-1)


def returns_dict():
    return {"state_dict": Net().state_dict()}


class Branches(Net):
    def forward(self, x):
        y = super().forward(x)
        if y.sum() > 0:
            return y
        return -y


class Breaks(Net):
    def forward(self, x):
        return super().forward(x) + torch.zeros(7)


class Two(Net):
    def forward(self, x):
        return super().forward(x.reshape(2, 3, 8, 8))


class Explodes(Net):
    def forward(self, x):
        return super().forward(x * 1e30) * 1e30


class Strings(Net):
    def forward(self, x):
        return {"label": "cat"}


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, a, b):
        return self.head(a + b)


def fails_late():
    raise SystemExit("no GPU")


not_callable = 3
'''


def at(code: str) -> str:
    """Where in nets.py a piece of code stands."""
    return f"nets.py:{1 + next(i for i, line in enumerate(NETS.splitlines()) if code in line)}"


DATA = '''"""Data and metrics, good and bad."""
import numpy as np
from featherweight import Data

x = np.zeros((4, 3, 8, 8), "float32")


def raises():
    return Data.of(x, np.load("labels.npy"))


def returns_arrays():
    return x, [0, 1, 2, 3]


def bad_lengths():
    return Data.of(x, [0, 1, 2])


def metric_raises(outputs, targets):
    return outputs[:, 9]


def metric_shape(outputs, targets):
    return outputs


class Beam(Data):
    def score(self, run, indices=None, original=None):
        return {"bleu": [run(self.scored.take(np.arange(2))[0])[0].missing]}


def scores_raise():
    return Beam.of(x, [0, 1, 2, 3], metric="accuracy")
'''
RECIPES = {
    "ok": "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n",
    "unknown-method": "version: 1\nsteps:\n  - fold: {}\n  - quantise: {}\n",
    "unknown-parameter": "version: 1\nsteps:\n  - quantize: {rnge: mse}\n",
    "bad-value": "version: 1\nsteps:\n  - quantize:\n      range: mode\n",
    "order": "version: 1\nsteps:\n  - quantize: {}\n  - fold: {}\n",
    "version": "version: 2\nsteps: []\n",
    "no-version": "steps:\n  - fold: {}\n",
    "no-yaml": "version: 1\nsteps:\n  - quantize: {range: [}\n",
    "not-a-recipe": "- fold\n",
    "hole": "version: 1\nsteps:\n  - quantize: {range: {choice: [mse, minmax]}}\n",
    "bad-hole": "version: 1\nsteps:\n  - quantize: {range: {choice: [mse, mode]}}\n",
    "teacher": "version: 1\nsteps:\n  - finetune: {teacher: teacher}\n",
    "teachers": "version: 1\nsteps:\n  - finetune: {teacher: teachers}\n",
    "alpha": "version: 1\nsteps:\n  - finetune: {teacher: original, alpha: 1.5}\n",
    "features": "version: 1\nsteps:\n  - finetune: {teacher: original, features: {conv: convv}}\n",
    "bad-where": "version: 1\nsteps:\n  - quantize: {where: {exlude: [head]}}\n",
    "excludes-all": "version: 1\nsteps:\n  - quantize: {where: {exclude: ['*']}}\n",
    "kernels": "version: 1\nsteps:\n  - quantize: {symmetric_weights: false}\n",
}


def make(folder: Path) -> None:
    """Every file that the table names."""
    (folder / "nets.py").write_text(NETS)
    (folder / "data.py").write_text(DATA)
    (folder / "broken.py").write_text("import torch\n\ndef net(:\n    return 1\n")
    (folder / "raises.py").write_text("import torch\nWIDTH = 1 / 0\n")
    (folder / "notes.txt").write_text("not a model\n")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "garbage.onnx").write_bytes(b"\x00garbage" * 99)
    (folder / "net.keras").write_bytes(b"PK")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    _weights(folder)
    _arrays(folder)
    _images(folder)
    _onnx(folder)
    _bundles(folder)
    for name in ("held", "mine", "no-result", "bad-result"):
        (folder / name).mkdir()
    (folder / "held" / "result.json").write_text('{"run": "0123"}')
    (folder / "mine" / "thesis.tex").write_text("years of work")
    (folder / "bad-result" / "result.json").write_text('{"schema": 9}')


def _weights(folder: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    save_file(module.state_dict(), folder / "other.safetensors")
    torch.save(module, folder / "module.pt")
    torch.save(module.state_dict(), folder / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and people still have it
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, 2)), folder / "script.pt")
    (folder / "damaged.safetensors").write_bytes(b"damaged")
    (folder / "net.pkl").write_bytes(pickle.dumps(Path("x")))
    program = torch.export.export(module, (torch.zeros(2, 2),))
    torch.export.save(program, folder / "program.pt2")
    (folder / "damaged.pt2").write_bytes((folder / "program.pt2").read_bytes()[:700])


def _arrays(folder: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 3, 8, 8)).astype(np.float32)
    y = np.arange(12) % 4
    hole = x.copy()
    hole[3, 0, 0, 0] = np.nan
    many = {
        "ok": (x, y),
        "uint8": (np.zeros((12, 3, 8, 8), np.uint8), y),
        "last": (np.moveaxis(x, 1, -1), y),
        "gray": (x[:, :1], y),
        "flat": (x.reshape(12, -1), y),
        "nan": (hole, y),
        "empty": (x[:0], y[:0]),
        "lengths": (x, y[:5]),
        "range": (x, y + 96),
        "ones": (x, y + 1),
        "negative": (x, y - 1),
        "values": (x, y * 0.5),
        "text": (np.array(["cat"] * 12), y),
        "objects": (np.array([None] * 12), y),
        "scalar": (np.float32(1), y),
        "ids": (random.integers(0, 10, (12, 5)).astype(np.float32), y),
    }
    for name, (inputs, labels) in many.items():
        np.savez(folder / f"{name}.npz", x=inputs, y=labels)
    far = np.zeros((40, 5), np.int64)
    far[36, 2] = 10
    np.savez(folder / "far.npz", x=far, y=np.arange(40) % 4)
    np.savez(folder / "gap.npz", x0=x, x2=x, y=y)
    np.savez(folder / "unlabelled.npz", x=x)
    np.savez(folder / "labels.npz", y=y)
    np.savez(folder / "train.npz", x=x, y=y, x_train=x[:, :1], y_train=y)
    np.savez(folder / "teach.npz", x=x, y=y, x_train=-x)
    np.save(folder / "one.npy", x)
    (folder / "damaged.npz").write_bytes((folder / "ok.npz").read_bytes()[:900])


def _images(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "photos" / label / "1.png")
    (folder / "torn" / "cat").mkdir(parents=True)
    content = (folder / "photos" / "cat" / "1.png").read_bytes()
    (folder / "torn" / "cat" / "1.png").write_bytes(content[: len(content) // 2])
    (folder / "nothing").mkdir()


def _bundles(folder: Path) -> None:
    """A folder as lower writes it, bundles of it that are right, torn and changed, and keys."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from featherweight.api import pack
    from featherweight.bundles.write import Member, write_bundle

    for name in ("key", "other"):
        key = Ed25519PrivateKey.from_private_bytes(name[:1].encode() * 32)
        form, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(form, serialization.PrivateFormat.PKCS8, plain)
        )
        public = key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    told = {
        "runtime": "onnxruntime",
        "files": ["model.onnx"],
        "entries": {"forward": "model.onnx"},
        "details": {},
        "target": {"runtime": "onnxruntime", "isa": "", "threads": 1, "device": "local", "options": {}},
    }
    for name in ("lowered", "twice", "lost"):
        (folder / name).mkdir()
        (folder / name / "artifact.json").write_text(json.dumps(told))
        if name != "lost":
            (folder / name / "model.onnx").write_bytes(np.random.default_rng(0).bytes(20_000))
    pack(folder / "lowered", folder / "right.fw")
    pack(folder / "lowered", folder / "signed.fw", sign=folder / "key.pem")
    pack(folder / "lowered", folder / "update.fw", base=folder / "right.fw")
    data = bytearray((folder / "signed.fw").read_bytes())
    (folder / "torn.fw").write_bytes(data[:-9000])
    data[len(data) // 2] ^= 1
    (folder / "changed.fw").write_bytes(data)
    (folder / "newer.fw").write_bytes(bytes(data[:8]) + b"\x09" + bytes(data[9:]))
    write_bundle(folder / "strange.fw", [Member("notes.txt", b"no artifact", "document")])


def _onnx(folder: Path) -> None:
    def model(name: str, op: str, weight: float = 1.0, domain: str = "") -> None:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        tensor = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [weight] * 16)
        node = helper.make_node(op, ["x", "w"], ["y"], name="node7", domain=domain)
        graph = helper.make_graph([node], "g", inputs, outputs, [tensor])
        opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / name)

    model("operator.onnx", "Einsum2", domain="com.example")
    model("nan.onnx", "MatMul", weight=float("nan"))
    model("matmul.onnx", "MatMul")
    random = np.random.default_rng(0).standard_normal((8, 4))
    np.savez(folder / "four.npz", x=random.astype(np.float32), y=np.arange(8) % 4)
    np.savez(folder / "four64.npz", x=random, y=np.arange(8) % 4)
    ids = np.arange(32).reshape(8, 4) % 10
    late = ids.copy()
    late[6, 1] = 10
    np.savez(folder / "ids_train.npz", x=ids, y=np.arange(8) % 4, x_train=late)
    np.savez(folder / "fives.npz", x=np.zeros((8, 5), np.float32), y=np.arange(8) % 4)


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: In a word or two.
        command: After ``featherweight``, as one would type it.
        says: What the message must contain.
        code: Exit code.
    """

    name: str
    command: str
    says: tuple[str, ...]
    code: int = 2


def fit(rest: str) -> str:
    """A fit with good data, unless ``rest`` names other."""
    data = "" if "--data" in rest or "--input" in rest else " --data ok.npz"
    return f"fit {rest}{data} --out out"


CASES = [
    # ---- students and teachers
    *(
        Case(f"{role} {what}", fit(f"nets.py:net --{role} {named} --recipe ok.yaml --data teach.npz"), says)
        for role in ("student", "teacher")
        for what, named, says in (
            ("is missing", "nothing.py:net", ("no file 'nothing.py'",)),
            ("gives other classes", "nets.py:seven", (f"the {role} 'nets.py:seven' gives float32 (3, 7)",)),
            ("gives more", "nets.py:Both", ("float32 (3, 4) and float32 (3, 4)", "the original gives")),
            ("takes other inputs", "nets.py:gray", (f"the {role} takes other inputs than the original",)),
            ("takes more inputs", "nets.py:Pairs", (f"the {role} takes other inputs than the original",)),
            ("is not float32", "nets.py:half", ("methods and runtimes start from float32",)),
            ("is NaN", "nets.py:nan", ("not finite",)),
        )
    ),
    Case(
        "student's weights alone",
        fit("nets.py:net --student-weights state.pt --recipe ok.yaml"),
        ("--student-weights are there and no student",),
    ),
    Case(
        "teacher's weights that do not fit",
        fit("nets.py:net --teacher nets.py:net --teacher-weights other.safetensors --recipe ok.yaml"),
        ("other.safetensors",),
    ),
    Case(
        "student without examples",
        fit("nets.py:net --student nets.py:wide --recipe ok.yaml"),
        ("a student learns from examples", "x_train"),
    ),
    Case(
        "student of no family",
        fit("nets.py:net --student mobilnetv2:width=0.5 --recipe ok.yaml --data teach.npz"),
        ("no family of featherweight.nets", "did you mean 'mobilenetv2'?"),
    ),
    Case(
        "student of a family for signals",
        fit("nets.py:net --student ds-cnn-1d --recipe ok.yaml --data teach.npz"),
        ("ds-cnn-1d is for a signal", "the original takes a picture"),
    ),
    Case(
        "student of an odd width",
        fit("nets.py:net --student ds-cnn:width=wide --recipe ok.yaml --data teach.npz"),
        ("width is 'wide'",),
    ),
    Case(
        "auto with weights",
        fit("nets.py:net --student auto --student-weights state.pt --recipe ok.yaml --data teach.npz"),
        ("--student auto has yet to choose it",),
    ),
    Case(
        "auto of apply",
        "apply nets.py:net --student auto --recipe ok.yaml --data teach.npz --out out",
        ("which only fit has", "--student mobilenetv2:width=0.35"),
    ),
    Case(
        "auto without examples",
        fit("nets.py:net --student auto --recipe ok.yaml"),
        ("a student learns from examples", "x_train"),
    ),
    Case(
        "student of apply",
        "apply nets.py:net --student nets.py:seven --recipe ok.yaml --data teach.npz --out out",
        ("gives float32 (3, 7)",),
    ),
    Case(
        "no teacher",
        fit("nets.py:net --recipe teacher.yaml --data teach.npz"),
        ("asks for teacher: teacher, and there is none", "step 1 (finetune)", "--teacher"),
    ),
    Case(
        "unknown teacher",
        fit("nets.py:net --recipe teachers.yaml --data teach.npz"),
        ("'teacher' of finetune", "did you mean 'teacher'?"),
    ),
    Case("alpha above 1", fit("nets.py:net --recipe alpha.yaml --data teach.npz"), ("'alpha' of finetune",)),
    Case(
        "features of no layer",
        fit("nets.py:net --recipe features.yaml --data teach.npz"),
        ("features names 'convv', which is no layer of the teacher", "did you mean 'conv'?"),
    ),
    # ---- the model
    Case("missing file", fit("nothing.onnx"), ("no model 'nothing.onnx'", "path.py:callable")),
    Case("missing code", fit("nothing.py:net"), ("no file 'nothing.py'", "check the path")),
    Case("misspelt callable", fit("nets.py:nett"), ("'nets.py' has no 'nett'", "did you mean 'net'?")),
    Case("no callable named", fit("nets.py"), ("'nets.py' names no callable", "nets.py:NAME", "it defines")),
    Case("not callable", fit("nets.py:not_callable"), ("is of type int",)),
    Case("missing module", fit("nosuch.package:net"), ("no module 'nosuch.package'", "install")),
    Case("not a model", fit("notes.txt"), ("'notes.txt' is not a model",)),
    Case("returns no module", fit("nets.py:returns_dict"), ("returns a dict, not an nn.Module",)),
    Case("needs arguments", fit("nets.py:needs"), ("cannot be called without arguments", "width")),
    Case("empty file", fit("empty.onnx"), ("'empty.onnx' is an empty file",)),
    Case("no ONNX", fit("garbage.onnx"), ("'garbage.onnx'",)),
    Case("a folder", fit("photos"), ("'photos' is a folder, not a model",)),
    Case("Keras file", fit("net.keras"), ("is no Keras file, or a damaged one", "save it again")),
    Case("pickled module", fit("module.pt"), ("is a pickle", "--weights", "--allow-pickle")),
    Case("pickled object", fit("net.pkl"), ("is a pickle", "safe ways")),
    Case("state dict as model", fit("state.pt"), ("without the code", "--weights state.pt")),
    Case("TorchScript", fit("script.pt"), ("TorchScript", "torch.export")),
    Case("damaged .pt2", fit("damaged.pt2"), ("'damaged.pt2'",)),
    Case("weights missing", fit("nets.py:net --weights w.safetensors"), ("'w.safetensors' does not exist",)),
    Case("weights damaged", fit("nets.py:net --weights damaged.safetensors"), ("no safetensors file",)),
    Case(
        "weights do not match",
        fit("nets.py:net --weights other.safetensors"),
        ("do not match", "missing (conv.weight", "unexpected (0.bias"),
    ),
    Case("pickle as weights", fit("nets.py:net --weights module.pt"), ("a pickle that holds more", "save")),
    Case("weights of an ONNX file", fit("matmul.onnx --weights state.pt"), ("holds its own weights",)),
    Case("NaN weights", fit("nets.py:nan"), ("head.weight (1 NaN)", "checkpoint")),
    Case("NaN weights in ONNX", fit("nan.onnx --data four.npz"), ("NaN",)),
    Case("float64", fit("nets.py:double"), ("'conv.weight'", "float64", "module.float()")),
    Case("bfloat16", fit("nets.py:half"), ("'conv.weight'", "bfloat16", "module.float()")),
    Case("NaN outputs", fit("nets.py:Explodes"), ("NaN or infinite", "scaled")),
    Case("unsupported operator", fit("operator.onnx --data four.npz"), ("Einsum2", "node7")),
    Case(
        "data-dependent branch",
        fit("nets.py:Branches"),
        ("torch.export", at("y.sum() > 0"), "if y.sum() > 0"),
    ),
    Case("fixed batch", fit("nets.py:Two"), ("works on 2 examples and not on 3", "x.flatten(1)")),
    Case("returns no tensor", fit("nets.py:Strings"), ("returns a str where a tensor should be",)),
    Case("code does not parse", fit("broken.py:net"), ("does not parse", "broken.py:3", "def net(:")),
    Case("code raises", fit("raises.py:net"), ("ZeroDivisionError", "raises.py:2", "WIDTH = 1 / 0")),
    Case("builder raises", fit("nets.py:raises"), ("RuntimeError", "nets.py:9")),
    Case("builder exits", fit("nets.py:fails_late"), ("SystemExit", at("no GPU"))),
    Case("forward raises", fit("nets.py:Breaks"), ("(2, 3, 8, 8)", at("torch.zeros(7)"), "torch.zeros(7)")),
    Case("nothing says the input", "fit nets.py:net --out out", ("what 'nets.py:net' takes", "--input 3x")),
    Case("no such input", fit("nets.py:net --input 3xbig"), ("'3xbig' is no input", "3x224x224")),
    Case("input does not fit", fit("nets.py:net --input 1x8x8"), ("(2, 1, 8, 8)", "[4, 3, 3, 3]")),
    # ---- the data
    Case("data missing", fit("nets.py:net --data d.npz"), ("no file or folder 'd.npz'",)),
    Case("data no .npz", fit("nets.py:net --data notes.txt"), ("not an .npz file", "np.savez")),
    Case("data damaged", fit("nets.py:net --data damaged.npz"), ("damaged",)),
    Case("one array", fit("nets.py:net --data one.npy"), ("is one array", "np.savez")),
    Case("no inputs", fit("nets.py:net --data labels.npz"), ("has no array 'x'", "y")),
    Case("pickled arrays", fit("nets.py:net --data objects.npz"), ("Python objects", "refused")),
    Case("no examples", fit("nets.py:net --data empty.npz"), ("no examples",)),
    Case("NaN in data", fit("nets.py:net --data nan.npz"), ("NaN", "x[3")),
    Case("lengths differ", fit("nets.py:net --data lengths.npz"), ("12", "5")),
    Case("bytes as inputs", fit("nets.py:net --data uint8.npz"), ("uint8", "float32", "/ 255")),
    Case("channels last", fit("nets.py:net --data last.npz"), ("(2, 8, 8, 3)", "(2, 3, 8, 8)", "moveaxis")),
    Case("wrong channels", fit("nets.py:net --data gray.npz"), ("(2, 1, 8, 8)", "[4, 3, 3, 3]")),
    Case("flat", fit("nets.py:net --data flat.npz"), ("(2, 192)",)),
    Case(
        "a calibrating id too large",
        fit("nets.py:Embeds --data ids_train.npz --trials 1"),
        ("holds an index", "from 0 to"),
    ),
    Case("text as inputs", fit("nets.py:net --data text.npz"), ("text.npz",)),
    Case("a number", fit("nets.py:net --data scalar.npz"), ("scalar.npz",)),
    Case("float ids", fit("nets.py:Embeds --data ids.npz"), ("float32", "astype('int64')")),
    Case(
        "ids out of range",
        fit("nets.py:Embeds --data far.npz"),
        ("does not take the scored", "idx=10", "of the data"),
    ),
    Case("inputs with a gap", fit("nets.py:Pairs --data gap.npz"), ("x0, x2", "x0, x1")),
    Case("one input of two", fit("nets.py:Pairs --data four.npz"), ("Pairs",)),
    Case("ONNX input shape", fit("matmul.onnx --data fives.npz"), ("4)", "(2, 5)")),
    Case("training shape", fit("nets.py:net --data train.npz"), ("(3, 8, 8)", "(1, 8, 8)")),
    Case("labels out of range", fit("nets.py:net --data range.npz"), ("label 96", "0..3", "y[0]")),
    Case("labels from 1", fit("nets.py:net --data ones.npz"), ("label 4", "y = y - 1")),
    Case("negative labels", fit("nets.py:net --data negative.npz"), ("label -1", "0..3")),
    Case("no labels", fit("nets.py:net --data unlabelled.npz --metric accuracy"), ("accuracy", "agreement")),
    Case("values as labels", fit("nets.py:net --data values.npz --metric accuracy"), ("accuracy",)),
    Case("image without size", fit("nets.py:net --data photos"), ("--image-size",)),
    Case("torn image", fit("nets.py:net --data torn --image-size 8"), ("1.png",)),
    Case("empty folder", fit("nets.py:net --data nothing --image-size 8"), ("nothing",)),
    Case("settings for arrays", fit("nets.py:net --data ok.npz --mean 0.5"), ("--mean", "leave --mean out")),
    Case("settings for nothing", fit("nets.py:net --input 3x8x8 --mean 0.5"), ("folder of images",)),
    Case("no number", fit("nets.py:net --data photos --image-size big"), ("big", "224")),
    Case("data code raises", fit("nets.py:net --data data.py:raises"), ("labels.npy", "data.py:9")),
    Case("data of another type", fit("nets.py:net --data data.py:returns_arrays"), ("tuple", "Data.of")),
    Case("data code, lengths", fit("nets.py:net --data data.py:bad_lengths"), ("4", "3", "data.py:17")),
    Case("score raises", fit("nets.py:net --data data.py:scores_raise"), ("missing", "data.py:30")),
    # ---- metric, budget, options
    Case("unknown metric", fit("nets.py:net --metric acuracy"), ("'acuracy'", "did you mean 'accuracy'?")),
    Case("metric raises", fit("nets.py:net --metric data.py:metric_raises"), ("IndexError", "data.py:21")),
    Case("metric's shape", fit("nets.py:net --metric data.py:metric_shape"), ("(12, 4)", "shape (N,)")),
    Case("metric needs text", fit("nets.py:net --metric wer"), ("wer",)),
    Case("unknown unit", fit("nets.py:net --max-size 300parsecs"), ("'parsecs'", "kb, mb")),
    Case("no unit", fit("nets.py:net --max-latency 5"), ("has no unit", "5ms")),
    Case("no quantity", fit("nets.py:net --max-drop small"), ("--max-drop 'small'", "0.5%")),
    Case("negative size", fit("nets.py:net --max-size -3KB"), ("--max-size '-3KB' is negative",)),
    Case("negative drop", fit("nets.py:net --max-drop=-1%"), ("--max-drop '-1%' is negative",)),
    Case("negative memory", fit("nets.py:net --max-memory=-1MB"), ("--max-memory '-1MB' is negative",)),
    Case("no time", fit("nets.py:net --time soon"), ("--time 'soon'", "5m")),
    Case("no trials", fit("nets.py:net --trials 0"), ("--trials",)),
    Case("no threads", fit("nets.py:net --threads 0"), ("--threads",)),
    Case("too many threads", fit("nets.py:net --threads 4096"), ("4096 threads", "--threads ")),
    Case("seed", fit("nets.py:net --seed one"), ("--seed",)),
    Case("unknown preference", fit("nets.py:net --prefer speed"), ("--prefer", "latency")),
    Case("misspelt option", fit("nets.py:net --max-dorp 1%"), ("--max-dorp", "--max-drop")),
    Case("misspelt command", "fti nets.py:net", ("'fti'", "did you mean 'fit'?")),
    Case("no folder named", "fit nets.py:net --data ok.npz", ("--out", "fit --help")),
    # ---- runtime
    Case("unknown runtime", fit("nets.py:net --runtime onnxrutime"), ("did you mean 'onnxruntime'?",)),
    Case(
        "runtime not installed",
        fit("nets.py:net --runtime onnxruntime"),
        ("not installed", 'pip install "featherweight[onnxruntime]"'),
    ),
    # ---- the recipe
    Case("recipe missing", fit("nets.py:net --recipe r.yaml"), ("'r.yaml' cannot be read", "--recipe")),
    Case(
        "unknown method",
        fit("nets.py:net --recipe unknown-method.yaml"),
        ("'quantise'", "unknown-method.yaml, line 4", "did you mean 'quantize'?"),
    ),
    Case(
        "unknown parameter",
        fit("nets.py:net --recipe unknown-parameter.yaml"),
        ("no parameter 'rnge'", "unknown-parameter.yaml, line 3", "did you mean 'range'?"),
    ),
    Case(
        "bad value",
        fit("nets.py:net --recipe bad-value.yaml"),
        ("'range' of quantize", "bad-value.yaml, line 4"),
    ),
    Case(
        "bad order",
        fit("nets.py:net --recipe order.yaml"),
        ("order.yaml, line 4", "move fold before quantize"),
    ),
    Case("bad version", fit("nets.py:net --recipe version.yaml"), ("version 2", "version.yaml, line 1")),
    Case("no version", fit("nets.py:net --recipe no-version.yaml"), ("no version", "version: 1")),
    Case("no YAML", fit("nets.py:net --recipe no-yaml.yaml"), ("no-yaml.yaml, line 3",)),
    Case("no recipe", fit("nets.py:net --recipe not-a-recipe.yaml"), ("a recipe is a mapping",)),
    Case("bad choice", fit("nets.py:net --recipe bad-hole.yaml"), ("mode", "bad-hole.yaml, line 3")),
    Case("bad where", fit("nets.py:net --recipe bad-where.yaml"), ("exlude", "bad-where.yaml, line 3")),
    Case("nothing selected", fit("nets.py:net --recipe excludes-all.yaml"), ("no layer", "where", "step 1")),
    Case("no kernels", fit("nets.py:net --recipe kernels.yaml"), ("asymmetric weights", "symmetric weights")),
    Case(
        "open recipe to apply",
        "apply nets.py:net --recipe hole.yaml --data ok.npz --out out",
        ("'range' of quantize is left open", "hole.yaml, line 3", "use featherweight fit"),
    ),
    Case(
        "open recipe to lower",
        "lower nets.py:net --recipe hole.yaml --data ok.npz --out out",
        ("'range' of quantize is left open", "hole.yaml, line 3"),
    ),
    # ---- the output folder
    Case("out is a file", "fit nets.py:net --data ok.npz --out notes.txt", ("'notes.txt' is a file",)),
    Case("no parent", "fit nets.py:net --data ok.npz --out a/b", ("no folder 'a'", "mkdir -p a")),
    Case("another run", "fit nets.py:net --data ok.npz --out held", ("holds another run", "--force")),
    Case("user's own files", "fit nets.py:net --data ok.npz --out mine", ("did not write", "another folder")),
    Case("own files, --force", "fit nets.py:net --data ok.npz --out mine --force", ("did not write",)),
    Case("the current folder", "fit nets.py:net --data ok.npz --out .", ("the current folder", "fitted")),
    Case("the root", "fit nets.py:net --data ok.npz --out / --force", ("'/' is",)),
    Case("apply over a run", "apply nets.py:net --recipe ok.yaml --data ok.npz --out held", ("--force",)),
    # ---- measure, inspect, report
    Case("no artifact", "measure nothing.onnx --input 4", ("'nothing.onnx' does not exist",)),
    Case("artifact is no ONNX", "measure garbage.onnx --input 4", ("'garbage.onnx' is no ONNX file",)),
    Case("artifact of another kind", "measure notes.txt --input 4", ("onnxruntime cannot open 'notes.txt'",)),
    Case("no input", "measure matmul.onnx", ("what the artifact takes", "--input")),
    Case("other input", "measure matmul.onnx --data fives.npz", ("float32 (1, 5)", "matmul.onnx")),
    Case("other dtype", "measure matmul.onnx --data four64.npz", ("float64 (1, 4)", "dtype")),
    Case("no twin", "measure matmul.onnx --twin nothing.onnx --input 4", ("'nothing.onnx' does not exist",)),
    Case("metric, no data", "measure matmul.onnx --input 4 --metric accuracy", ("accuracy", "--data")),
    Case("agreement, no twin", "measure matmul.onnx --data four.npz --metric agreement", ("--twin",)),
    Case("inspect nothing", "inspect nothing.onnx --input 4", ("no model 'nothing.onnx'",)),
    # ---- bundles
    Case("pack nothing", "pack out.fw", ("no folder was named", "pack DIR")),
    Case("pack what is missing", "pack gone out.fw", ("'gone' does not exist", "fit or lower")),
    Case("pack a folder of pictures", "pack photos out.fw", ("'photos' holds no artifact.json",)),
    Case("pack a file", "pack right.fw out.fw", ("'right.fw' is no folder",)),
    Case("pack half a folder", "pack lost out.fw", ("'lost' lacks 'model.onnx'", "copy the folder whole")),
    Case("pack without a bundle's name", "pack lowered", ("'lowered' is a folder", "pack DIR model.fw")),
    Case("pack one runtime twice", "pack lowered twice out.fw", ("two folders", "onnxruntime")),
    Case("pack over a bundle", "pack lowered right.fw", ("'right.fw' is there already", "--force")),
    Case("pack over a file", "pack lowered notes.txt --force", ("'notes.txt' is no bundle",)),
    Case("pack to nowhere", "pack lowered a/out.fw", ("no folder 'a'", "mkdir -p a")),
    Case("pack with no key", "pack lowered out.fw --sign k.pem", ("'k.pem' does not exist", "openssl")),
    Case("pack with a public key", "pack lowered out.fw --sign key.pub", ("is a public key",)),
    Case("pack with a strange key", "pack lowered out.fw --sign notes.txt", ("is no key in PEM",)),
    Case("pack with no licence", "pack lowered out.fw --license L", ("no licence 'L'", "--license FILE")),
    Case("pack for no base", "pack lowered out.fw --base old.fw", ("the base 'old.fw' does not exist",)),
    Case("pack for a damaged base", "pack lowered out.fw --base torn.fw", ("are missing", "torn.fw")),
    Case("unpack nothing", "unpack nothing.fw un", ("the bundle 'nothing.fw' does not exist",)),
    Case("unpack a text", "unpack notes.txt un", ("notes.txt",)),
    Case("unpack a torn bundle", "unpack torn.fw un", ("are missing", "torn.fw")),
    Case("unpack a changed bundle", "unpack changed.fw un", ("another digest",)),
    Case("unpack an update", "unpack update.fw un", ("is an update", "base")),
    Case("unpack over own files", "unpack right.fw mine", ("did not write",)),
    Case("unpack over own files, --force", "unpack right.fw mine --force", ("did not write",)),
    Case("unpack here", "unpack right.fw . --force", ("the current folder",)),
    Case("unpack over a run", "unpack right.fw held", ("'held' holds files", "--force")),
    Case("unpack to nowhere", "unpack right.fw a/un", ("no folder 'a'",)),
    Case("verify nothing", "verify nothing.fw", ("the bundle 'nothing.fw' does not exist",)),
    Case("verify a folder", "verify lowered", ("the bundle 'lowered' is a folder",)),
    Case("verify an empty file", "verify empty.onnx", ("empty.onnx",)),
    Case("verify a newer bundle", "verify newer.fw", ("version",)),
    Case("verify a changed bundle", "verify changed.fw --key key.pub", ("another digest",)),
    Case("verify with another key", "verify signed.fw --key other.pub", ("with another key", "--key")),
    Case("verify with a private key", "verify signed.fw --key key.pem", ("is a private key", "-pubout")),
    Case("verify what is not signed", "verify right.fw --key key.pub", ("is not signed", "--key")),
    Case("verify an update", "verify update.fw", ("is an update", "base")),
    Case("verify with another base", "verify update.fw --base signed.fw.", ("the base 'signed.fw.' does",)),
    Case("verify what is no model", "verify strange.fw", ("no artifact.json",)),
    Case("report of nothing", "report no-result", ("holds no result.json", "fit")),
    Case("report of another", "report bad-result", ("no result of this version", "--force")),
]


@contextlib.contextmanager
def hidden(case: Case) -> Iterator[None]:
    """A machine without onnxruntime, for the case that needs one."""
    if case.name != "runtime not installed":
        yield
        return
    before = {name: sys.modules.get(name) for name in ("onnxruntime",)}
    sys.modules["onnxruntime"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def listing(folder: Path) -> set[str]:
    """Everything below a folder but caches of bytecode and the store."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {path for path in found if "__pycache__" not in path and not path.startswith("cache/")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bad")
    make(place)
    return place


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = listing(folder)
    with hidden(case):
        code = main(shlex.split(case.command))
    said = capsys.readouterr()
    assert code == case.code, said.err
    assert said.out == ""
    for fragment in case.says:
        assert fragment in said.err
    assert "Traceback" not in said.err
    message = [line for line in said.err.splitlines() if "Error: " in line or "MissingRuntime: " in line]
    assert len(message) >= 1
    assert "\n  fix: " in said.err
    assert listing(folder) == before


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_json_tells_errors_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for command, kind in (
        ("fit nothing.onnx --data ok.npz --out out --json", "LoadError"),
        ("fit nets.py:net --max-dorp 1% --out out --json", "UsageError"),
        ("fit nets.py:net --max-size 1x --out out --json", "BudgetError"),
    ):
        assert main(shlex.split(command)) == 2
        said = capsys.readouterr()
        error = json.loads(said.out)["error"]
        assert set(error) == {"kind", "what", "where", "fix"}
        assert error["kind"] == kind
        assert error["what"] in said.err


def _table(folder: Path, show: Callable[[str], object]) -> None:
    """Input, command and message of every case, as Markdown."""
    os.chdir(folder)
    os.environ["FEATHERWEIGHT_CACHE"] = str(folder / "cache")
    show("| input | command | exit | message |\n|---|---|---|---|\n")
    for case in CASES:
        said = io.StringIO()
        with hidden(case), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(shlex.split(case.command))
        text = said.getvalue().strip().replace(f"{folder}/", "").replace("|", "\\|")
        remarks = ("note: ", "trial ", "scoring ")
        lines = "<br>".join(line.strip() for line in text.splitlines() if not line.startswith(remarks))
        show(f"| {case.name} | `{case.command}` | {code} | {lines} |\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        _table(Path(place), sys.stdout.write)
