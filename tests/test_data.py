"""Data in every form it is given in: streamed, scored, and refused with a reason when it does not fit."""

import itertools
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featherweight.data import (
    Data,
    check_inputs,
    check_labels,
    load_data,
    random_data,
    resolve_metric,
)
from featherweight.errors import DataError, PluginError
from featherweight.examples import RandomArrays
from featherweight.streams import Stream

F32 = np.dtype(np.float32)


def arrays(examples=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, 3, 4)).astype(np.float32), rng.integers(0, 5, examples)


def save(folder: Path, **given) -> str:
    path = folder / "data.npz"
    np.savez(path, **given)
    return str(path)


def model(x):
    """Class scores that are a plain function of the input."""
    return (x.reshape(len(x), -1)[:, :5],)


def refused(*args, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        load_data(*args, **options)
    error = caught.value
    assert error.fix
    assert "\n" not in error.what
    return error


# -- files ----------------------------------------------------------------------------------------


def test_npz_gives_scored_train_and_calibration(tmp_path):
    x, y = arrays()
    x2, y2 = arrays(6, 1)
    x3, _ = arrays(4, 2)
    data = load_data(save(tmp_path, x=x, y=y, x_train=x2, y_train=y2, x_calibration=x3))
    assert len(data.scored) == 10
    np.testing.assert_array_equal(data.train.targets, y2)
    (batch,) = data.calibration()
    np.testing.assert_array_equal(batch[0], x3)
    assert data.metric.name == "accuracy"
    assert data.calibration_source == "calibration"
    assert data.origin == {"kind": "npz", "file": "data.npz"}
    assert data.notes == ()


def test_npz_of_several_inputs(tmp_path):
    x, y = arrays()
    ids = np.arange(10)
    data = load_data(save(tmp_path, x0=x, x1=ids, y=y, x_train0=x + 1, x_train1=ids))
    assert [source.shape for source in data.scored.inputs] == [(3, 4), ()]
    assert [array.shape for array in next(data.calibration())] == [(10, 3, 4), (10,)]
    assert data.notes == ()


def test_npz_class_names_and_unused_arrays(tmp_path):
    x, y = arrays()
    data = load_data(save(tmp_path, x=x, y=y, class_names=np.array(list("abcde")), labels=y, x_train=x + 1))
    assert data.class_names == tuple("abcde")
    assert ["labels" in note for note in data.notes] == [True]


def test_missing_file(tmp_path):
    assert "no file or folder" in refused(str(tmp_path / "none.npz")).what


@pytest.mark.parametrize("name", ["data.npz", "data.csv"])
@pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"PK\x03\x04 and nothing"])
def test_a_file_that_is_no_npz(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refused(str(path)).what


def test_a_pickle_is_refused_and_not_run(tmp_path):
    import pickle

    path = tmp_path / "data.npz"
    path.write_bytes(pickle.dumps({"x": [1]}))
    assert "pickle" in refused(str(path)).what


def test_a_truncated_or_flipped_npz(tmp_path):
    path = Path(save(tmp_path, x=arrays(200)[0]))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(str(path)).what
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(broken))
    assert "damaged" in refused(str(path)).what


def test_a_lone_array_file(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    assert "one array" in refused(str(tmp_path / "x.npy")).what


X, Y = arrays()
NAN = X.copy()
NAN[2, 1, 3] = np.nan
NAN[5, 0, 0] = np.inf
BAD = [
    ({"images": X, "y": Y}, {}, "no array 'x'", "images"),
    ({"x": X[:0]}, {}, "no examples", "(0, 3, 4)"),
    ({"x": np.float32(1)}, {}, "no examples", "()"),
    ({"x": NAN, "y": Y}, {}, "1 NaN and 1 infinite values", "x[2, 1, 3] first"),
    ({"x": X, "y": Y, "x_train": NAN}, {}, "x_train has", "x_train[2, 1, 3]"),
    ({"x": X, "y": np.where(Y[0] == Y, np.nan, 1.0)}, {}, "y has", "y[0] first"),
    ({"x": np.array([{}, 1], dtype=object)}, {}, "Python objects", "'x'"),
    ({"x": np.array(["a", "b"])}, {}, "strings", "float32"),
    ({"x": X.astype(complex)}, {}, "complex", "float32"),
    ({"x": X, "y": Y[:7]}, {}, "x has 10 examples and y has 7", "data.npz"),
    ({"x0": X, "x1": Y[:7]}, {}, "x0 has 10 examples and x1 has 7", "data.npz"),
    ({"x0": X, "x2": Y}, {}, "numbered", "x0, x1"),
    ({"x": X, "x0": X}, {}, "numbered", "x0, x1"),
    ({"x": X, "y": np.eye(5)[Y]}, {"metric": "accuracy"}, "integer labels", "argmax(1)"),
    ({"x": X, "y": Y.astype(float)}, {"metric": "f1"}, "integer labels", "astype('int64')"),
    ({"x": X, "y": Y}, {"metric": "wer"}, "needs strings", "int64"),
    ({"x": X, "y": np.array(["a"] * 10)}, {"metric": "mse"}, "needs numbers", "<U1"),
    ({"x": X}, {"metric": "accuracy"}, "needs labels", "agreement"),
    ({"x": X, "y": Y, "y_train": Y}, {}, "no inputs x_train", "data.npz"),
    ({"x": X, "y": Y}, {"image_size": "28"}, "--image-size", "folder of images"),
]


@pytest.mark.parametrize(("given", "options", "what", "more"), BAD)
def test_bad_npz_is_refused(tmp_path, given, options, what, more):
    error = refused(save(tmp_path, **given), **options)
    assert what in error.what
    assert more in str(error)


def test_unknown_metric_is_named(tmp_path):
    with pytest.raises(PluginError, match="'acc'"):
        load_data(save(tmp_path, x=X, y=Y), metric="acc")


def test_integers_have_no_nan_and_pass(tmp_path):
    data = load_data(save(tmp_path, x=np.arange(20, dtype=np.uint8).reshape(10, 2)))
    assert data.scored.inputs[0].dtype == np.uint8


# -- images ---------------------------------------------------------------------------------------


def paint(path: Path, colour, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def pictures(tmp_path):
    """20 pictures in two classes; the red value tells them apart."""
    for i, name in itertools.product(range(10), ("cat", "dog")):
        paint(tmp_path / "pets" / name / f"{i}.png", (10 * i + (name == "dog"), 0, 255))
    (tmp_path / "pets" / "README.txt").write_text("not an image")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "pets"


def test_a_flat_folder_is_split_and_nothing_scored_calibrates(pictures):
    data = load_data(str(pictures), image_size=8)
    assert (len(data.scored), data.class_names, data.calibration_source) == (
        16,
        ("cat", "dog"),
        "calibration",
    )
    (batch,) = data.calibration()
    assert batch[0].shape == (4, 3, 8, 8)
    scored, _ = data.scored.inputs[0].take(np.arange(16)), data.scored.targets
    reds = [set(np.round(images[:, 0, 0, 0] * 255).astype(int)) for images in (scored, batch[0])]
    assert not reds[0] & reds[1]
    assert len(reds[0] | reds[1]) == 20
    np.testing.assert_array_equal(np.round(scored[:, 0, 0, 0] * 255).astype(int) % 10, data.scored.targets)
    again = load_data(str(pictures), image_size=8)
    assert again.fingerprint == data.fingerprint != load_data(str(pictures), image_size=8, seed=1).fingerprint
    assert "not scored" in data.notes[0]


def test_image_settings_are_applied_and_recorded(pictures):
    data = load_data(str(pictures), image_size="6x9", mean="0.5,0.25,0.5", std="0.5")
    image = data.scored.inputs[0].take(np.array([0]))
    assert (image.shape, image.dtype) == ((1, 3, 6, 9), F32)
    np.testing.assert_allclose(image[0, 1:, 0, 0], [-0.5, 1.0])
    assert data.origin["image_size"] == [6, 9]
    assert (data.origin["mean"], data.origin["std"]) == ([0.5, 0.25, 0.5], [0.5, 0.5, 0.5])


def test_one_mean_makes_grey_images(pictures):
    data = load_data(str(pictures), image_size=5, mean=0.0, std=1.0)
    assert data.scored.inputs[0].shape == (1, 5, 5)


def test_the_shorter_side_is_scaled_and_the_centre_kept(tmp_path):
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # the middle third is white
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "1.png")
    data = load_data(str(tmp_path), image_size=10, mean=0, std=1)
    assert data.scored.inputs[0].take(np.array([0]))[0, 0, :, 1:9].min() > 0.9


@pytest.mark.parametrize("scored", ["val", "test"])
def test_split_folders(tmp_path, scored):
    for split, names in ((scored, ("b",)), ("train", ("a", "b")), ("calibration", ("x",))):
        for name in names:
            paint(tmp_path / split / name / "1.png", (len(split), len(name), ord(name)))
    data = load_data(str(tmp_path), image_size=4)
    assert (len(data.scored), len(data.train), data.class_names) == (1, 2, ("a", "b"))
    assert data.scored.targets.tolist() == [1]  # as in training, where a is 0
    assert data.calibration_source == "calibration"
    assert data.notes == ()


def test_a_training_image_that_is_scored_is_a_leak(tmp_path):
    paint(tmp_path / "val" / "a" / "1.png", (1, 2, 3))
    paint(tmp_path / "train" / "a" / "2.png", (1, 2, 3))
    paint(tmp_path / "train" / "a" / "3.png", (1, 2, 4))
    data = load_data(str(tmp_path), image_size=4)
    assert data.notes == ("1 of the 2 training examples are also scored: a leak",)


def test_bad_images_are_named(pictures):
    bad = pictures / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = load_data(str(pictures), image_size=8)
    with pytest.raises(DataError, match=r"3\.png") as caught:
        list(data.calibration())
        data.score(lambda x: (x[:, :2, 0, 0],))
    assert caught.value.fix
    bad.write_bytes(b"")
    assert "3.png' is empty" in refused(str(pictures), image_size=8).what
    bad.write_text("hello")
    with pytest.raises(DataError, match="no image that pillow knows"):
        images = load_data(str(pictures), image_size=8)
        list(images.calibration())
        images.scored.take(np.arange(16))


def test_bad_folders(tmp_path, pictures):
    assert "--image-size" in str(refused(str(pictures)).fix)
    for options, what in [
        ({"image_size": "wide"}, "--image-size 'wide'"),
        ({"image_size": 0}, "--image-size '0'"),
        ({"image_size": "1x2x3"}, "no size"),
        ({"image_size": 8, "mean": "0.1,0.2"}, "--mean has 2"),
        ({"image_size": 8, "mean": "a"}, "--mean 'a'"),
        ({"image_size": 8, "std": "0"}, "not above 0"),
        ({"image_size": 8, "mean": "0.5", "std": "1,1,1"}, "--std 3"),
    ]:
        assert what in refused(str(pictures), **options).what
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no class folders" in refused(str(empty), image_size=8).what
    (empty / "class").mkdir()
    assert "no images" in refused(str(empty), image_size=8).what
    paint(tmp_path / "only" / "train" / "a" / "1.png", (1, 2, 3))
    assert "neither val nor test" in refused(str(tmp_path / "only"), image_size=8).what


# -- the user's code ------------------------------------------------------------------------------


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


GOOD = """
import numpy as np
from featherweight.data import Data

def data():
    rng = np.random.default_rng(0)
    return Data.of(x=rng.normal(size=(6, 4)).astype('float32'), y=np.arange(6) % 4)
"""


def test_a_callable_gives_data(tmp_path):
    data = load_data(f"{write(tmp_path, GOOD)}:data", metric="f1")
    assert (len(data.scored), data.metric.name) == (6, "f1")
    assert data.origin == {"kind": "callable", "callable": "mine.py:data"}


def test_a_module_gives_data(tmp_path, monkeypatch):
    package = tmp_path / "user_package_of_test_data"
    package.mkdir()
    write(package, GOOD, "loader.py")
    monkeypatch.chdir(tmp_path)
    assert len(load_data("user_package_of_test_data.loader:data").scored) == 6
    assert "no module" in refused("user_package_of_test_data.nothing:data").what


def test_an_edited_file_counts_at_once(tmp_path):
    path = write(tmp_path, GOOD)
    first = load_data(f"{path}:data")
    write(tmp_path, GOOD.replace("rng(0)", "rng(1)"))
    assert load_data(f"{path}:data").fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("def data(:\n    pass\n", "does not parse", "mine.py:1: def data(:"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError", "mine.py:1: import nothing_of_this_name"),
        ("def data():\n    return 1 / 0\n", "'data' raised ZeroDivisionError", "mine.py:2: return 1 / 0"),
        ("def data():\n    import sys\n    sys.exit(3)\n", "SystemExit: 3", "mine.py:3: sys.exit(3)"),
        ("def data():\n    return [1]\n", "returned list, not Data", "mine.py:1: def data():"),
        ("def data(path):\n    return path\n", "missing 1 required", "mine.py:1: def data(path):"),
        ("def date():\n    pass\n", "no 'data'", "None"),
        ("data = 3\n", "cannot be called", "None"),
        (
            "import numpy as np\ndef data():\n    return np.zeros(3).reshape(\n        2)\n",
            "cannot reshape",
            "mine.py:3: return np.zeros(3).reshape(",
        ),
        (
            "from featherweight.data import Data\ndef data():\n    return Data.of(x=[[float('nan')]])\n",
            "x has 1 NaN value",
            "x[0, 0]",
        ),
        (
            "from featherweight.data import Data\ndef data():\n    return Data.of(x=[[1.0]], y=[1, 2])\n",
            "x has 1 examples and y has 2",
            "mine.py:3: return Data.of(",
        ),
    ],
)
def test_user_code_that_fails_shows_the_line(tmp_path, text, what, where):
    error = refused(f"{write(tmp_path, text)}:data")
    assert what in error.what
    assert where == "None" or where in str(error.where)


def test_the_innermost_line_of_the_users_files_is_shown(tmp_path):
    write(tmp_path, "def load():\n    raise KeyError('x')\n", "beside_of_test_data.py")
    path = write(tmp_path, "import beside_of_test_data\ndef data():\n    return beside_of_test_data.load()\n")
    assert refused(f"{path}:data").where == f"{tmp_path / 'beside_of_test_data.py'}:2: raise KeyError('x')"


def test_a_file_without_a_name_lists_what_it_has(tmp_path):
    assert "it defines data" in str(refused(str(write(tmp_path, GOOD))).fix)
    assert "no file" in refused(f"{tmp_path}/absent.py:data").what
    assert "did you mean 'data'?" in str(refused(f"{write(tmp_path, GOOD)}:dat").fix)


# -- Data.of --------------------------------------------------------------------------------------


def test_tensors_lists_and_sources_are_examples():
    assert Data.of(x=torch.ones(3, 2, requires_grad=True)).scored.inputs[0].dtype == np.float32
    assert Data.of(x=[[1.0, 2.0]], y=[0]).metric.name == "accuracy"
    source = RandomArrays((2,), F32, 5, seed=0)
    assert Data.of(x=source, y=np.zeros((5, 2))).metric.name == "mse"
    with pytest.raises(DataError, match="cannot become an array"):
        Data.of(x=[[1.0], [1.0, 2.0]])
    with pytest.raises(DataError, match="batch of 0"):
        Data.of(x=X, batch_size=0)
    with pytest.raises(DataError, match="no inputs x"):
        Data.of(y=Y)


def test_calibration_never_takes_scored_examples():
    x, y = arrays(50)
    train, _ = arrays(30, 1)
    with_train = Data.of(x, y, x_train=train)
    assert with_train.calibration_source == "training"
    seen = np.concatenate([batch[0] for batch in with_train.calibration(12)])
    assert len(seen) == 12
    known = {row.tobytes() for row in train}
    assert all(row.tobytes() in known for row in seen)
    alone = Data.of(x, y)
    assert alone.calibration_source == "random"
    assert "random" in alone.notes[0]
    (batch,) = alone.calibration(20)
    assert (batch[0].shape, batch[0].dtype) == ((20, 3, 4), F32)
    assert abs(batch[0].mean()) < 0.2
    assert Data.of(None).calibration_source == "none"
    assert list(Data.of(None).calibration()) == []


def test_random_integers_are_small():
    data = Data.of(x=(np.full((4, 9), 77, np.uint8), np.full((4, 9), 7)))
    (batch,) = data.calibration(32)
    assert batch[0].max() > 100
    assert set(np.unique(batch[1])) == {0, 1}


def test_calibration_of_sorted_examples_is_a_fixed_random_choice():
    data = Data.of(x=np.arange(100.0)[:, None], x_train=np.arange(100.0, 200.0)[:, None])
    first = np.concatenate([b[0] for b in data.calibration(10)]).ravel()
    assert first.max() > 150 > first.min() + 10
    np.testing.assert_array_equal(first, np.concatenate([b[0] for b in data.calibration(10)]).ravel())


def test_duplicates_between_roles_are_counted():
    x, y = arrays(10)
    data = Data.of(x, y, x_train=np.concatenate([x[:3], x + 1]), calibration=x[4:6])
    assert data.notes == (
        "3 of the 13 training examples are also scored: a leak",
        "2 of the 2 calibration examples are also scored: a leak",
    )


def test_training_shuffles_by_seed_and_keeps_targets_beside_inputs():
    data = Data.of(X, Y, x_train=np.arange(20.0)[:, None], y_train=np.arange(20))
    epochs = [list(data.training(seed, 8)) for seed in (0, 0, 1)]
    assert [len(targets) for _, targets in epochs[0]] == [8, 8, 4]
    orders = [np.concatenate([targets for _, targets in epoch]) for epoch in epochs]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert sorted(orders[0]) == list(range(20))
    assert all((inputs[0][:, 0] == targets).all() for inputs, targets in epochs[0])
    assert next(Data.of(X, x_train=X + 1).training(0, 4))[1] is None
    with pytest.raises(DataError, match="no training examples"):
        next(Data.of(X).training(0, 4))


# -- streams --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 10), st.none() | st.integers(1, 60)
)
def test_a_stream_is_cut_into_even_batches(sizes, batch_size, limit):
    total = sum(sizes)
    values = np.arange(total, dtype=np.float32)[:, None]

    def batches():
        yield from np.split(values, np.cumsum(sizes)[:-1])

    got = [batch[0] for batch in Data.of(calibration=batches, batch_size=batch_size).calibration(limit)]
    np.testing.assert_array_equal(np.concatenate(got), values[:limit])
    assert all(len(batch) == batch_size for batch in got[:-1])
    assert 1 <= len(got[-1]) <= batch_size


def test_a_stream_is_read_anew_for_each_pass_and_no_further_than_asked():
    read = []

    def batches():
        for i in itertools.count():
            read.append(i)
            yield np.full((4, 2), i, np.float32)

    data = Data.of(X, Y, calibration=batches)
    for _ in range(2):
        assert sum(len(batch[0]) for batch in data.calibration(10)) == 10
    assert read == [0, 1, 2, 0, 1, 2]


def test_memory_of_a_stream_does_not_grow_with_its_length():
    def peak(examples):
        def batches():
            for _ in range(examples):
                yield np.ones((1, 20_000), np.float32)

        data = Data.of(calibration=batches)
        tracemalloc.start()
        for _ in data.calibration():
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(100)
    assert peak(2000) < 1.05 * peak(100)


def test_a_loader_that_can_be_read_again_is_a_stream():
    loader = torch.utils.data.DataLoader(torch.arange(6.0)[:, None], batch_size=4)
    data = Data.of(calibration=loader)
    assert [[len(batch[0]) for batch in data.calibration()] for _ in range(2)] == [[6], [6]]
    with pytest.raises(DataError, match="only once"):
        Data.of(calibration=iter([X]))


@pytest.mark.parametrize(
    ("batches", "what", "where"),
    [
        (lambda: iter([]), "yields nothing", "test_data.py"),
        (lambda: 3, "returned int", "test_data.py"),
        (lambda: [NAN], "1 NaN and 1 infinite", "batch 0"),
        (lambda: [X, X[:, :2]], "shape of an example changes", "batch 1"),
        (lambda: [(X, X[:3])], "number of examples", "batch 0"),
        (lambda: ["text"], "holds strings", "batch 0"),
        (lambda: [X, 1 / 0], "ZeroDivisionError", "test_data.py"),
        (lambda: (1 / n for n in (1, 0)), "no examples", "batch 0"),
        (lambda: (X / n for n in map(int, "1x")), "ValueError", "test_data.py"),
    ],
)
def test_streams_that_fail_say_where(batches, what, where):
    with pytest.raises(DataError) as caught:
        list(Data.of(calibration=batches).calibration())
    assert what in caught.value.what
    assert where in str(caught.value.where)


def test_errors_of_the_reader_of_a_stream_are_its_own():
    with pytest.raises(KeyError):
        for _ in Data.of(calibration=lambda: [X]).calibration():
            raise KeyError("the method's")


# -- scoring --------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_batches():
    x, y = arrays(11)
    whole = Data.of(x, y, batch_size=11).score(model)["accuracy"]
    sizes = []

    def run(inputs):
        sizes.append(len(inputs))
        return model(inputs)

    np.testing.assert_array_equal(Data.of(x, y, batch_size=4).score(run)["accuracy"], whole)
    assert sizes == [4, 4, 3]
    some = np.array([7, 2, 2])
    np.testing.assert_array_equal(Data.of(x, y).score(model, some)["accuracy"], whole[some])
    assert Data.of(x, y).score(model, np.array([], int))["accuracy"].shape == (0, 1)


def test_without_labels_the_original_is_the_target():
    data = Data.of(X)
    with pytest.raises(DataError, match="no metric"):
        data.score(model)
    assert resolve_metric(data, model(X)).name == "agreement"
    assert resolve_metric(data, (X,)).name == "sqnr"
    assert resolve_metric(data, (X[:, 0, :1],)).name == "sqnr"
    data = data.evolve(metric=resolve_metric(data, model(X)))
    rows = data.score(lambda x: model(-x), original=model)["agreement"]
    np.testing.assert_array_equal(rows[:, 0], model(X)[0].argmax(1) == (-model(X)[0]).argmax(1))
    with pytest.raises(DataError, match="original"):
        data.score(model)


def test_texts_are_decoded():
    data = Data.of(
        x=np.array([[0, 1], [1, 1]]),
        y=np.array(["a b", "b b"]),
        metric="wer",
        decode=lambda outputs: [" ".join("ab"[i] for i in row) for row in outputs],
    )
    assert data.score(lambda x: (x,))["wer"].tolist() == [[0, 2], [0, 2]]
    assert data.score(lambda x: (x * 0,))["wer"].tolist() == [[1, 2], [2, 2]]
    with pytest.raises(DataError, match="nothing turns outputs"):
        Data.of(x=X, y=np.array(["a"] * 10)).score(model)


def test_a_task_of_ones_own_overrides_score():
    class Detection(Data):
        def score(self, run, indices=None, original=None):
            return {"map": np.ones((len(self.scored), 1))}

    data = Detection.of(x=X).evolve(batch_size=2)
    assert data.score(model)["map"].shape == (10, 1)
    assert data.fingerprint != Data.of(x=X).fingerprint


def test_outputs_without_a_batch_axis_are_refused():
    with pytest.raises(DataError, match="for 10 examples"):
        Data.of(X, Y).score(lambda x: (np.zeros((1, 5)),))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 50), st.integers(0, 100))
def test_halves_are_apart_and_complete(examples, seed):
    data = Data.of(x=np.zeros((examples, 1)))
    selects, reports = data.halves(seed)
    assert sorted([*selects, *reports]) == list(range(examples))
    assert abs(len(selects) - len(reports)) <= 1
    np.testing.assert_array_equal(data.halves(seed)[0], selects)


def test_one_example_is_both_halves():
    assert [half.tolist() for half in Data.of(x=X[:1]).halves(0)] == [[0], [0]]


def test_two_examples_to_trace_with():
    assert Data.of(X, x_train=X + 1).example_inputs()[0][0, 0, 0] == X[0, 0, 0] + 1
    assert Data.of(X[:1]).example_inputs()[0].shape == (2, 3, 4)
    assert Data.of(calibration=lambda: [X[:1]]).example_inputs()[0].shape == (2, 3, 4)
    with pytest.raises(DataError, match="no examples"):
        Data.of().example_inputs()


def test_random_data_is_repeatable_and_apart_from_its_calibration():
    data = random_data([((3, 4), F32), ((2,), np.dtype(np.int64))], seed=3, examples=6)
    first, again = data.scored.take(np.arange(6)), data.scored.take(np.arange(6))
    np.testing.assert_array_equal(first[0], again[0])
    (batch,) = data.calibration(6)
    assert not (batch[0] == first[0]).any()
    assert [array.shape for array in batch] == [(6, 3, 4), (6, 2)]
    assert any("no data" in note for note in data.notes)
    assert not data.has_metric


# -- fingerprints ---------------------------------------------------------------------------------


def test_the_fingerprint_is_of_content(tmp_path):
    x, y = arrays()
    path = save(tmp_path, x=x, y=y)
    first = load_data(path).fingerprint
    np.savez_compressed(tmp_path / "other.npz", x=x, y=y)
    assert load_data(str(tmp_path / "other.npz")).fingerprint == first == Data.of(x, y).fingerprint
    assert Data.of(x, y, metric="f1", batch_size=2).fingerprint == first
    changed = x.copy()
    changed[9, 2, 3] += 1e-6
    others = [
        Data.of(changed, y),
        Data.of(x, y + 1),
        Data.of(x),
        Data.of(x, y, x_train=x),
        Data.of(x, y, calibration=x),
        Data.of(x.astype(np.float64), y),
        Data.of(x.reshape(10, 12), y),
    ]
    prints = [one.fingerprint for one in others]
    assert len({first, *prints}) == len(prints) + 1
    data = Data.of(x, y)
    assert data.fingerprint != data.evolve(scored=Data.of(changed, y).scored).fingerprint


def test_the_fingerprint_of_a_stream_is_of_its_beginning():
    def made(value, length=100):
        def batches():
            for i in range(length):
                yield np.full((1, 2), i * value, np.float32)

        return Data.of(X, calibration=batches).fingerprint

    assert made(1.0) == made(1.0) != made(2.0)


def test_a_changed_image_changes_the_fingerprint(pictures):
    first = load_data(str(pictures), image_size=4).fingerprint
    assert load_data(str(pictures), image_size=5).fingerprint != first
    paint(pictures / "cat" / "1.png", (9, 9, 9))
    assert load_data(str(pictures), image_size=4).fingerprint != first


# -- the model's inputs and classes ---------------------------------------------------------------


def test_labels_within_the_models_classes():
    check_labels(Data.of(X, Y), 5)
    check_labels(Data.of(X, Y, metric="mse"), 2)
    check_labels(Data.of(X), 2)
    with pytest.raises(DataError, match=r"label 7 is outside 0\.\.4: the model has 5") as caught:
        check_labels(Data.of(X, np.array([0, 1, 7, 2, 9, 0, 0, 0, 0, 0])), 5)
    assert caught.value.where == "y[2], and 1 more"
    with pytest.raises(DataError, match="label -1"):
        check_labels(Data.of(X, np.array([-1] * 10)), 5)
    with pytest.raises(DataError) as caught:
        check_labels(Data.of(X, np.arange(10) % 5 + 1), 5)
    assert "y = y - 1" in str(caught.value.fix)
    with pytest.raises(DataError) as caught:
        check_labels(Data.of(X, Y, x_train=X + 1, y_train=Y + 9), 5)
    assert "y_train" in str(caught.value.where)


def test_dense_labels_are_checked():
    masks = np.zeros((10, 4, 4), int)
    masks[1, 2, 3] = 255
    with pytest.raises(DataError) as caught:
        check_labels(Data.of(X, masks), 5)
    assert "y[1, 2, 3]" in str(caught.value.where)


def test_floats_and_integers_are_cast_with_a_note():
    x, y = X.astype(np.float64), Y.astype(np.int32)
    data = Data.of((x, y), x_train=(x + 1, y), calibration=lambda: [(x, y)])
    fitted = check_inputs(data, [((3, 4), F32), ((), np.dtype(np.int64))])
    wanted = [F32, np.dtype(np.int64)]
    assert [a.dtype for a in fitted.scored.take(np.arange(3))] == wanted
    assert [a.dtype for a in next(fitted.calibration())] == wanted
    assert [a.dtype for a in next(fitted.training(0, 4))[0]] == wanted
    assert "x0 is float64 and is cast to the model's float32" in fitted.notes
    assert data.scored.inputs[0].dtype == np.float64


def test_what_fits_is_left_alone():
    data = Data.of(X, Y, x_train=X + 1)
    fitted = check_inputs(data, [((3, None), F32)])
    assert fitted.notes == ()
    assert fitted.fingerprint == data.fingerprint
    check_inputs(data, [(("height", -1), F32)])


def test_an_integer_that_does_not_fit_is_refused():
    fitted = check_inputs(Data.of(x=np.array([[2**40]])), [((1,), np.dtype(np.int32))])
    with pytest.raises(DataError, match=str(2**40)):
        fitted.scored.take(np.array([0]))


IMAGES = np.zeros((2, 28, 28, 3), np.float32)


@pytest.mark.parametrize(
    ("x", "wanted", "what", "fix"),
    [
        (X, [((3, 5), F32)], "(3, 4), and the model takes (3, 5)", "(N, 3, 5)"),
        (X, [((12,), F32)], "(3, 4), and the model takes (12,)", "x.reshape(-1, 12)"),
        (X, [((1, 3, 4), F32)], "takes (1, 3, 4)", "x = x[:, None]"),
        (X[:, None], [((3, 4), F32)], "takes (3, 4)", "x = x[:, 0]"),
        (IMAGES, [((3, 28, 28), F32)], "(28, 28, 3)", "np.moveaxis(x, -1, 1)"),
        (IMAGES.astype(np.uint8), [((28, 28, 3), F32)], "x is uint8", "x.astype('float32') / 255"),
        (IMAGES.astype(np.int64), [((28, 28, 3), F32)], "x is int64", "astype('float32')"),
        (IMAGES, [((28, 28, 3), np.dtype(np.int64))], "x is float32", "astype('int64')"),
        (X, [((3, 4), F32)] * 2, "takes 2 inputs, and x gives 1", "x0, x1"),
        ((X, X), [((3, 4), F32)], "takes 1 input, and x gives 2", "one array x"),
    ],
)
def test_inputs_that_do_not_fit_show_both_and_the_line_that_helps(x, wanted, what, fix):
    with pytest.raises(DataError) as caught:
        check_inputs(Data.of(x=x), wanted)
    assert what in caught.value.what
    assert fix in str(caught.value.fix)


def test_the_inputs_of_every_role_are_checked():
    wanted = [((3, 4), F32)]
    for data, name in [
        (Data.of(X, x_train=X[:, :2]), "x_train"),
        (Data.of(X, calibration=X[:, :2]), "x_calibration"),
        (Data.of(X, calibration=lambda: [X[:, :2]]), "calibration"),
    ]:
        with pytest.raises(DataError, match=f"{name} has shape"):
            check_inputs(data, wanted)


def test_streams_are_told_from_examples():
    assert not any(map(Stream.suits, (None, X, [1], (X,), torch.ones(1), RandomArrays((1,), F32, 1, 0))))
    assert Stream.suits(lambda: [])


def test_the_shipped_example_loads():
    path = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "data.npz"
    assert zipfile.is_zipfile(path)
    data = check_inputs(load_data(str(path)), [((1, 28, 28), F32)])
    check_labels(data, 10)
    assert (data.notes, data.calibration_source) == ((), "training")


def blocks():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    return [part.partition("```")[0] for part in text.split("```python\n")[1:]]


@pytest.mark.parametrize("number", range(len(blocks())))
def test_the_documentation_runs_as_written(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[number], f"docs/data.md block {number}", "exec"), {"__name__": "docs"})
