"""Reading weight files never executes code that they contain."""

import os
import pickle
import struct
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import predict
import train_net
from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.safe_loading import read_weights
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError
from tests.engine.tiny_training import build_trainer, restored_loggers_and_signals, training_config
from tests.modeling.tiny_model import as_options, plain_config, tiny_config, tiny_model
from tests.tiny_data import make_folder


class Calls:
    """Unpickling an object of this class calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_torch_zip(content, file):
    torch.save(content, file)


def as_torch_legacy(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_pickle(content, file):
    file.write_bytes(pickle.dumps(content, protocol=2))


HOSTILE = pytest.mark.parametrize(
    ("name", "write"),
    [
        ("zip.pth", as_torch_zip),
        ("legacy.pth", as_torch_legacy),
        ("pickle.pth", as_pickle),
        ("zoo.pkl", as_pickle),
        ("pycls.pyth", as_torch_zip),
        ("no_ending", as_torch_zip),
    ],
)


@pytest.fixture
def marker(tmp_path):
    """A file that exists if code was executed."""
    return tmp_path / "code_has_run"


@pytest.fixture
def hostile(tmp_path, marker):
    """Write the weights of a plain detector together with a call of a function."""

    def make(name, write):
        weights = build_model(plain_config(tiny_config())).state_dict()
        if name.endswith(".pkl"):
            weights = {key: value.numpy() for key, value in weights.items()}
        command = Calls(os.system, f"touch {marker}")
        file = tmp_path / name
        write({"__author__": command, "model": weights, "model_state": weights}, file)
        return file

    return make


# --- no code is executed --------------------------------------------------------------------------


@HOSTILE
def test_files_that_contain_code_are_rejected(hostile, marker, name, write):
    file = hostile(name, write)
    with pytest.raises(UsageError) as error:
        TeacherCheckpointer(tiny_model()).load(str(file))
    text = str(error.value)
    for part in (str(file), "posix.system", "MODEL.TRUST_WEIGHTS True"):
        assert part in text
    assert "\n" not in text
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "write"), [("zip.pth", as_torch_zip), ("zoo.pkl", as_pickle)], ids=["pth", "pkl"]
)
def test_trusted_files_execute_code(hostile, marker, name, write):
    """This also shows that the files of the other tests do contain code."""
    settings = {"MODEL.WEIGHTS": str(hostile(name, write)), "MODEL.TRUST_WEIGHTS": True}
    assert (
        load_for_evaluation(tiny_config(settings), tiny_model())
        is CheckpointContents.PLAIN_DETECTOR
    )
    assert marker.exists()


def test_load_for_evaluation_executes_no_code(hostile, marker):
    cfg = tiny_config({"MODEL.WEIGHTS": str(hostile("zip.pth", as_torch_zip))})
    with pytest.raises(UsageError, match=r"posix\.system"):
        load_for_evaluation(cfg, tiny_model())
    assert not marker.exists()


@pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["train", "evaluate"])
@pytest.mark.parametrize(("name", "write"), [("a.pth", as_torch_zip), ("a.pkl", as_pickle)])
def test_train_net_executes_no_code(datasets, tmp_path, hostile, marker, flags, name, write):
    settings = {
        "MODEL.WEIGHTS": str(hostile(name, write)),
        "DATASETS.TEST": datasets["DATASETS.TEST"],
    }
    cfg = training_config(datasets, tmp_path / "output", settings)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    args = train_net.argument_parser().parse_args(
        ["--config-file", str(tmp_path / "config.yaml"), *flags]
    )
    with restored_loggers_and_signals(), pytest.raises(UsageError, match=r"posix\.system"):
        train_net.main(args)
    assert not marker.exists()


def test_predict_executes_no_code(datasets, tmp_path, hostile, marker, monkeypatch):
    cfg = training_config(datasets, tmp_path / "output")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    files = {
        "--config-file": tmp_path / "config.yaml",
        "--weights": hostile("zoo.pkl", as_pickle),
        "--input": make_folder(tmp_path / "photos", images=1, seed=1),
        "--output": tmp_path / "pictures",
    }
    monkeypatch.setattr(sys, "argv", ["predict.py", *as_options(files)])
    with pytest.raises(SystemExit, match=r"error: .*posix\.system"):
        predict.main()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "write"),
    [("model_0000001.pth", as_torch_zip), ("model_best.pth", as_torch_legacy)],
    ids=["zip", "legacy"],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_resume_executes_no_code(datasets, tmp_path, hostile, marker, name, write, trusted):
    """TRUST_WEIGHTS applies to MODEL.WEIGHTS; a run's own checkpoints contain no code."""
    hostile(name, write)
    (tmp_path / "last_checkpoint").write_text(name)
    cfg = training_config(datasets, tmp_path, {"MODEL.TRUST_WEIGHTS": trusted})
    with pytest.raises(UsageError, match="cannot resume in ") as error:
        build_trainer(cfg, resume=True)
    assert name in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Calls(eval, "1"),
        Calls(getattr, "text", "upper"),
        Calls(__import__, "os"),
        Calls(np.load, "weights.npy"),
        Calls(np.dtype, "O"),
        Calls(np.dtype, "U3"),
        Calls(np.dtype, [("a", "O")]),
        Calls(np.frombuffer, b"1234", "f4"),
        Calls(torch.nn.Linear, 1, 1),
        np.array([print], dtype=object),
        np.array(["text"]),
        slice(1),
    ],
    ids=[
        "eval",
        "getattr",
        "__import__",
        "np.load",
        "dtype O",
        "dtype U3",
        "dtype of fields",
        "frombuffer",
        "torch.nn.Linear",
        "array of objects",
        "array of text",
        "slice",
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_can_only_create_numeric_arrays(tmp_path, call, protocol):
    file = tmp_path / "other.pkl"
    file.write_bytes(pickle.dumps({"model": {"a": call}, "__author__": "?"}, protocol=protocol))
    with pytest.raises(UsageError, match=r"other\.pkl was not read, because it asks for "):
        read_weights(str(file))


class ArrayOfState:
    """An array with an invalid state in its pickle."""

    def __init__(self, code, flags, shape, content):
        self.code, self.flags, self.shape, self.content = code, flags, shape, content

    def __reduce__(self):
        dtype = TypeOfFlags(self.code, self.flags)
        make = np.zeros(1).__reduce__()[0]
        return make, (np.ndarray, (0,), b"b"), (1, self.shape, dtype, False, self.content)


class TypeOfFlags:
    def __init__(self, code, flags):
        self.code, self.flags = code, flags

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, "<", None, None, None, -1, -1, self.flags)


def test_numbers_are_not_read_as_object_addresses(tmp_path):
    """numpy's own dtype uses the flags of the pickle, which can mark numbers as addresses."""
    file = tmp_path / "addresses.pkl"
    file.write_bytes(pickle.dumps(ArrayOfState("O", 0, (1,), b"\x10" * 8)))
    with pytest.raises(UsageError, match="not read"):
        read_weights(str(file))
    file.write_bytes(pickle.dumps(ArrayOfState("f8", 63, (1,), b"\x10" * 8)))
    array = read_weights(str(file))
    assert array.dtype.flags == np.dtype("f8").flags == 0
    assert array.tobytes() == b"\x10" * 8


@pytest.mark.parametrize("shape", [(3,), (-1,), (-1, -2), (2**40, 2**40)])
def test_arrays_with_a_wrong_shape_are_rejected(tmp_path, shape):
    file = tmp_path / "shape.pkl"
    file.write_bytes(pickle.dumps(ArrayOfState("f8", 0, shape, b"\x10" * 16)))
    with pytest.raises(UsageError, match=r"shape\.pkl is not a checkpoint"):
        read_weights(str(file))


# --- files that are not checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"these are not weights", b"\x80\x02.", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.pyth"])
def test_files_that_are_not_checkpoints_raise_an_error_of_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} is not a checkpoint: ") as error:
        TeacherCheckpointer(tiny_model()).load(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        5,
        [],
        "model",
        {"model": 3},
        {"model": {1: torch.zeros(1)}},
        {"model": {"a": "text"}},
        {"model": [torch.zeros(1)], "__author__": "?"},
        {"blobs": 3},
        {3: np.zeros(1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_files_without_weights_raise_an_error_of_one_line(tmp_path, name, content):
    (as_pickle if name.endswith("pkl") else torch.save)(content, tmp_path / name)
    with pytest.raises(UsageError, match=f"{name} (holds no|is not a|was not read)") as error:
        TeacherCheckpointer(tiny_model()).load(str(tmp_path / name))
    assert "\n" not in str(error.value)


# --- files of Detectron2's model zoo --------------------------------------------------------------

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "column_major": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "half": np.arange(3, dtype=np.float16),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "no_dimension": np.array(7, dtype=np.int64),
    "scalar": np.float32(0.5),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])
def test_arrays_are_read_exactly(tmp_path, protocol, numpy):
    """The files can be written by any version of Python and numpy."""
    content = {"model": OrderedDict(ARRAYS), "__author__": "somebody", "set": {1, 2}, "b": b"\xff"}
    text = pickle.dumps(content, protocol=protocol)
    if protocol < 4:  # later protocols also store the lengths of names
        text = text.replace(b"numpy._core", numpy.encode())
    (tmp_path / "zoo.pkl").write_bytes(text)
    actual = read_weights(str(tmp_path / "zoo.pkl"))
    assert {"set": actual["set"], "b": actual["b"]} == {"set": {1, 2}, "b": b"\xff"}
    assert list(actual["model"]) == list(ARRAYS)
    unrestricted = pickle.loads(text)["model"]
    for name, expected in unrestricted.items():
        array = actual["model"][name]
        assert np.array_equal(array, ARRAYS[name])
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape), name
        assert array.tobytes() == expected.tobytes(), name


def python_2_pickle(arrays):
    """Pickle float32 arrays as Python 2 did: names and contents are byte strings."""
    parts = [b"\x80\x02}"]
    for name, array in arrays.items():
        shape = b"(" + b"".join(b"J" + struct.pack("<i", side) for side in array.shape) + b"t"
        parts += [
            b"U" + bytes([len(name)]) + name.encode(),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01",
            shape,
            b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN",
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<i", array.nbytes) + array.astype("<f4").tobytes() + b"tbs",
        ]
    return b"".join([*parts, b"."])


def test_pickles_written_by_python_2_are_read(tmp_path):
    arrays = {"conv1_w": np.random.default_rng(0).normal(size=(64, 3, 7, 7)).astype("f4")}
    (tmp_path / "old.pkl").write_bytes(python_2_pickle(arrays))
    actual = read_weights(str(tmp_path / "old.pkl"))
    assert np.array_equal(actual["conv1_w"], arrays["conv1_w"])
    assert np.array_equal(
        pickle.loads(python_2_pickle(arrays), encoding="latin1")["conv1_w"], arrays["conv1_w"]
    )


@pytest.mark.parametrize("wrapped", [False, True], ids=["ImageNet", "Detectron1"])
def test_backbone_loads_weights_with_caffe2_names(tmp_path, wrapped):
    """MSRA's R-50.pkl, the initial weights of the base config, has such names."""
    model = tiny_model()
    stem = model.backbone.bottom_up.stem.conv1
    weight = np.random.default_rng(0).normal(size=tuple(stem.weight.shape)).astype("f4")
    blobs = {"conv1_w": weight, "conv1_w_momentum": weight + 1}
    content = {"blobs": blobs, "cfg": "text"} if wrapped else blobs
    (tmp_path / "R-50.pkl").write_bytes(
        pickle.dumps(content, protocol=2) if wrapped else python_2_pickle(blobs)
    )
    TeacherCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert torch.equal(stem.weight, torch.from_numpy(weight))


def test_backbone_loads_a_plain_state_dict_with_matching_heuristics(tmp_path):
    """The suffix `?matching_heuristics=True` is Detectron2's."""
    model = tiny_model()
    stem = model.backbone.bottom_up.stem.conv1
    weights = OrderedDict({"stem.conv1.weight": torch.randn_like(stem.weight)})
    torch.save(weights, tmp_path / "resnet.pth")
    TeacherCheckpointer(model).load(f"{tmp_path}/resnet.pth?matching_heuristics=True")
    assert torch.equal(stem.weight, weights["stem.conv1.weight"])
