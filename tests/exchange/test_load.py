"""Every way to bring a model in, and one clear sentence for everything that is no model."""

from __future__ import annotations

import io
import json
import logging
import pickle
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from featherweight.errors import LoadError
from featherweight.exchange.load import InputSpec, load_model
from nets import NETS

CODE = """
import torch
from torch import nn

SCALE = 2.0


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, image):
        return self.fc(torch.relu(self.bn(self.conv(image))).mean((2, 3)) * SCALE)


class Several(nn.Module):
    def forward(self, ids, mask):
        total = ids.float() * mask
        return {"scores": total, "parts": (total + 1, total - 1)}

    def encode(self, ids):
        return ids * 2


def build():
    return Net()


def needs(classes):
    return Net(classes)


def wrong():
    return {"a": 1}


def broken():
    return Net(classes="three")


def numbers():
    class Bad(nn.Module):
        def forward(self, x):
            return 3
    return Bad()


def diverged():
    net = Net()
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
        net.conv.bias[1] = float("inf")
    return net


def tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
        def forward(self, x):
            return self.b(self.a(x))
    return Tied()
"""

IMAGE = [InputSpec((1, 8, 8))]


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "nets_of_mine.py"
    path.write_text(textwrap.dedent(CODE))
    return str(path)


def _refusal(spec: str, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load_model(spec, **{"inputs": IMAGE, **options})
    assert caught.value.fix
    assert "\n" not in caught.value.what
    return caught.value


# --- user code ----------------------------------------------------------------------------------------


def test_a_function_and_a_class(code: str) -> None:
    for name in ("build", "Net"):
        model = load_model(f"{code}:{name}", inputs=IMAGE)
        entry = model.entries["forward"]
        assert (entry.input_names, entry.output_names) == (("image",), ("output",))
        assert entry.example_inputs[0].shape == (2, 1, 8, 8)
        assert entry.dynamic_axes == {"image": {0: "batch"}}
        assert not model.module.training
        assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model("nets_of_mine:build", inputs=IMAGE).key


def test_several_inputs_and_nested_outputs(code: str) -> None:
    inputs = [InputSpec.parse("int64:5"), InputSpec.parse("attention=5")]
    entry = load_model(f"{code}:Several", inputs=inputs).entries["forward"]
    assert entry.input_names == ("ids", "attention")
    assert entry.output_names == ("scores", "parts", "parts_2")
    assert [str(item.dtype) for item in entry.example_inputs] == ["torch.int64", "torch.float32"]
    other = load_model(f"{code}:Several", inputs=inputs[:1], method="encode").entries["forward"]
    assert other.method == "encode"


def test_examples_come_from_data(code: str) -> None:
    one = np.zeros((1, 1, 8, 8), np.float32)
    entry = load_model(f"{code}:build", example_inputs=(one,)).entries["forward"]
    assert entry.example_inputs[0].shape == (2, 1, 8, 8)  # two, so that the batch stays open


def test_without_weights_the_module_is_the_same_each_time(code: str) -> None:
    first, again = (load_model(f"{code}:build", inputs=IMAGE) for _ in range(2))
    assert first.key == again.key


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["no 'nothing'"]),
        ("needs", ["without arguments", "classes"]),
        ("wrong", ["a dict, not an nn.Module"]),
        ("broken", ["broken", "TypeError"]),
        ("numbers", ["returns a int where a tensor should be"]),
        ("diverged", ["2 tensors", "fc.weight (1 NaN)", "conv.bias (1 infinite)"]),
    ],
)
def test_user_code_that_is_no_model(name: str, words: list[str], code: str) -> None:
    error = _refusal(f"{code}:{name}")
    assert all(word in error.what for word in words)


def test_the_users_own_line_is_shown(code: str, tmp_path: Path) -> None:
    assert "nets_of_mine.py" in (_refusal(f"{code}:broken").where or "")
    (tmp_path / "syntax.py").write_text("def build(:\n    pass\n")
    error = _refusal(f"{tmp_path / 'syntax.py'}:build")
    assert "syntax.py:1" in (error.where or "")


def test_inputs_that_the_model_does_not_take(code: str) -> None:
    error = _refusal(f"{code}:build", inputs=[InputSpec((3, 8, 8))])
    assert "image float32 (2, 3, 8, 8)" in error.what
    assert "nets_of_mine.py" in (error.where or "")
    assert "--input" in (_refusal(f"{code}:build", inputs=None).fix or "")
    assert "dtype" in _refusal(f"{code}:build", inputs=None, example_inputs=(np.array(["a", "b"]),)).what
    assert "no method 'encode'" in _refusal(f"{code}:build", method="encode").what


@pytest.mark.parametrize("text", ["", "3xhello", "3x0x5", "blob:3", "=3x4"])
def test_input_specs_that_say_nothing(text: str) -> None:
    if not text:
        assert InputSpec.parse("int64:") == InputSpec((), "int64")
        return
    with pytest.raises(LoadError, match="is no input"):
        InputSpec.parse(text)


# --- weights ---------------------------------------------------------------------------------------------


def _state(code: str) -> dict[str, torch.Tensor]:
    module = load_model(f"{code}:build", inputs=IMAGE).module
    return {name: tensor + 1 for name, tensor in module.state_dict().items()}


def test_weights_in_every_form(code: str, tmp_path: Path) -> None:
    state = _state(code)
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "parallel.bin")
    keys = set()
    for name in ("w.safetensors", "w.pt", "wrapped.pth", "parallel.bin"):
        model = load_model(f"{code}:build", weights=str(tmp_path / name), inputs=IMAGE)
        torch.testing.assert_close(model.module.state_dict(), state)
        keys.add(model.key)
    assert len(keys) == 1
    assert keys != {load_model(f"{code}:build", inputs=IMAGE).key}


def test_weights_that_do_not_match_are_listed(code: str, tmp_path: Path) -> None:
    state = _state(code)
    state["fc.weight"] = torch.zeros(7, 4)
    state["head.bias"] = state.pop("fc.bias")
    save_file(state, tmp_path / "w.safetensors")
    what = _refusal(f"{code}:build", weights=str(tmp_path / "w.safetensors")).what
    for part in ("1 missing (fc.bias)", "1 unexpected (head.bias)", "fc.weight: file (7, 4), model (3, 4)"):
        assert part in what


def test_tied_weights_may_come_once(code: str, tmp_path: Path) -> None:
    module = load_model(f"{code}:tied", inputs=[InputSpec((4,))]).module
    state = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "b.weight"}
    save_file(state, tmp_path / "w.safetensors")
    loaded: Any = load_model(
        f"{code}:tied", weights=str(tmp_path / "w.safetensors"), inputs=[InputSpec((4,))]
    ).module
    assert loaded.a.weight is loaded.b.weight
    torch.testing.assert_close(loaded.b.weight.detach(), state["a.weight"])


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_weights_that_are_no_weights(code: str, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    torch.save({"w": Bomb(fired)}, tmp_path / "bomb.pt")
    (tmp_path / "noise.pt").write_bytes(b"\x00\x01\x02 noise" * 40)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    for name, words in {
        "bomb.pt": "more than tensors",
        "noise.pt": "noise.pt",
        "noise.safetensors": "no safetensors file",
        "empty.pt": "empty",
        "list.pt": "a list, not a state dict",
        "mixed.pt": "no tensors: epoch",
        "absent.pt": "does not exist",
        "": "is a folder",
    }.items():
        assert words in _refusal(f"{code}:build", weights=str(tmp_path / name)).what
    assert not fired.exists()


# --- the root key -------------------------------------------------------------------------------------


def test_key_is_the_same_in_another_process(code: str) -> None:
    program = (
        "from featherweight.exchange.load import InputSpec, load_model\n"
        f"print(load_model({f'{code}:build'!r}, inputs=[InputSpec((1, 8, 8))]).key)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == load_model(f"{code}:build", inputs=IMAGE).key


def test_key_changes_with_what_the_model_computes(code: str, tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return load_model(f"{code}:build", **{"inputs": IMAGE, **options}).key

    first = key()
    assert key(inputs=[InputSpec((1, 9, 9))]) != first
    text = Path(code).read_text()
    Path(code).write_text(text.replace("SCALE = 2.0", "SCALE = 3.0"))  # no tensor and no attribute differs
    assert key() != first
    Path(code).write_text(text)
    assert key() == first


def test_key_counts_settings_and_modules_that_are_used(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("FACTOR = 1.0\n")
    main = tmp_path / "main.py"
    body = (
        "from torch import nn\nimport helper_of_mine\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.rate = RATE\n"
        "    def forward(self, x):\n        return x * self.rate * helper_of_mine.FACTOR\n"
    )
    keys = []
    for rate, factor in (("1", "1.0"), ("2", "1.0"), ("1", "2.0")):
        (tmp_path / "helper_of_mine.py").write_text(f"FACTOR = {factor}\n")
        main.write_text(body.replace("RATE", rate))
        sys.modules.pop("helper_of_mine", None)
        keys.append(load_model(f"{main}:Net", inputs=[InputSpec((3,))]).key)
    assert len(set(keys)) == 3


def test_key_does_not_depend_on_training_mode(code: str) -> None:
    from featherweight.exchange.key import root_key

    model = load_model(f"{code}:build", inputs=IMAGE)
    model.module.train()
    assert root_key(model.module, model.entries) == model.key


# --- files ----------------------------------------------------------------------------------------------


def test_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    module, x = NETS["linear3d"]()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=False, opset_version=17, input_names=["x"])
    model = load_model(str(path))
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), module(x), rtol=1e-4, atol=1e-5)
    assert "its own weights" in _refusal(str(path), weights="w.safetensors").what


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden net as a .pt2 file."""
    module, x = NETS["linear3d"]()
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(exported, path)
    return path


def test_an_exported_program(program: Path) -> None:
    pytest.importorskip("onnxruntime")
    module, x = NETS["linear3d"]()
    model = load_model(str(program))
    assert model.entries["forward"].dynamic_axes == {"x": {0: "batch"}}
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), module(x), rtol=1e-4, atol=1e-5)
    assert logging.getLogger("torch.onnx").level != logging.ERROR
    assert model.key == load_model(str(program)).key


def _changed(program: Path, path: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> str:
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
        for name, content in more.items():
            new.writestr(f"{root}/{name.replace('__', '/')}", content)
    return str(path)


def test_an_exported_program_runs_no_code(program: Path, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    buffer = io.BytesIO()
    torch.save((Bomb(fired),), buffer)

    def with_inputs(name: str, content: bytes) -> bytes:
        return buffer.getvalue() if "sample_inputs" in name else content

    def with_operator(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.tanh.default", b"torch.os.system")

    def with_size(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        found = json.loads(content)
        found["evil"] = {"expr_str": f"__import__('pathlib').Path({str(fired)!r}).touch()"}
        return json.dumps(found).encode()

    def with_pickled_weight(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)

    def as_it_is(name: str, content: bytes) -> bytes:
        return content

    cases: dict[str, tuple[Callable[[str, bytes], bytes], dict[str, bytes]]] = {
        "more than tensors": (with_inputs, {}),
        "'torch.os.system', which is no operator": (with_operator, {}),
        "no arithmetic": (with_size, {}),
        "a pickled tensor": (with_pickled_weight, {}),
        "compiled code": (as_it_is, {"data__aotinductor__model__model.so": b"\x7fELF"}),
    }
    for index, (words, (change, more)) in enumerate(cases.items()):
        spec = _changed(program, tmp_path / f"case{index}.pt2", change, **more)
        assert words in _refusal(spec).what
    assert not fired.exists()


def test_a_pickled_module_needs_permission(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    torch.save(module, path)
    error = _refusal(str(path))
    assert "can run any code" in error.what
    for way in ("path.py:callable", "safetensors", ".onnx", ".pt2", "--allow-pickle"):
        assert way in (error.fix or "")
    model = load_model(str(path), inputs=IMAGE, allow_pickle=True)
    assert isinstance(model.module, nn.Sequential)
    path.write_bytes(pickle.dumps({"not": "a module", "object": Path("x")}))
    assert "can run any code" in _refusal(str(path)).what
    assert _refusal(str(path), allow_pickle=True)


def test_a_pickle_is_not_run_to_say_no(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    torch.save(Bomb(fired), tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(fired)))
    for name in ("bomb.pt", "bomb.pkl"):
        assert "can run any code" in _refusal(str(tmp_path / name)).what
    assert not fired.exists()


def test_files_that_are_no_models(tmp_path: Path, code: str) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "noise.bin").write_bytes(bytes(range(1, 200)))
    (tmp_path / "noise.onnx").write_bytes(bytes(range(1, 200)))
    (tmp_path / "noise.pt2").write_bytes(bytes(range(1, 200)))
    (tmp_path / "other.pt2").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "model.keras").write_bytes(b"PK keras")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    for name, words, fix in (
        ("absent.onnx", "there is no model", "path.py:callable"),
        ("empty.onnx", "empty file", ".onnx"),
        ("text.txt", "not a model", "path.py:callable"),
        ("noise.bin", "not a model", "path.py:callable"),
        ("noise.onnx", "no ONNX model", "onnx.checker"),
        ("noise.pt2", "no .pt2 archive", "torch.onnx.export"),
        ("other.pt2", "no program of torch.export.save", "torch.export.save"),
        ("w.safetensors", "cannot be read directly", "--weights"),
        ("state.pt", "weights without the code", "--weights"),
        ("model.keras", "no Keras file", "model.save("),
        ("saved", "is a folder", "tf2onnx"),
        ("nets_of_mine.py", "names no callable", "build"),
        ("absent.py:build", "there is no file", "path"),
    ):
        error = _refusal(str(tmp_path / name))
        assert words in error.what, name
        assert fix in (error.fix or ""), name
    assert "there is no module" in _refusal("nowhere.nothing:build").what


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    assert "TorchScript" in _refusal(str(path)).what
