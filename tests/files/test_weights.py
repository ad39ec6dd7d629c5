"""Safetensors files with tensors of several dtypes, written by bagel_opt and read in every way."""

import json
import os
import resource

import ml_dtypes  # noqa: F401  NumPy then knows of bfloat16 and of 8-bit floats
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import forked
from torch import nn

from bagel_opt.dtypes import DTYPES
from bagel_opt.errors import BundleError
from bagel_opt.files import weights
from bagel_opt.files.torch_weights import ALIGNED, Reader, read_weights, write_parameters, write_weights
from bagel_opt.files.weights import locate_weights, mapped_weights

CPU = torch.device("cpu")


def tensors():
    """One of each dtype, of odd sizes, so that most lie where no number of theirs would be aligned; a scalar, an empty one."""
    torch.manual_seed(0)
    found = {name: (torch.randn(3, 5) * 50).to(getattr(torch, name)) for name in ("uint8", *DTYPES)}
    return {
        **found,
        "scalar": torch.tensor(0.25, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "last": torch.ones(7),
    }


def layout(given):
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()]


def same(got, want):
    """Equal to the bit, NaN included."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


@pytest.fixture
def path(tmp_path):
    given = tensors()
    write_weights(tmp_path / "a.safetensors", layout(given), given.items())
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("read", [lambda path: read_weights(path, CPU), load_file], ids=["ours", "safetensors"])
def test_what_was_written_is_read(path, read):
    found, want = read(path), tensors()
    assert set(found) == set(want)
    for name, tensor in want.items():
        same(found[name], tensor)


def test_mapped_weights_are_the_bytes_as_they_lie(path, monkeypatch):
    for at_once in (weights.MAPPED_AT_ONCE, 1):  # mapped once, and anew for each tensor
        monkeypatch.setattr(weights, "MAPPED_AT_ONCE", at_once)
        found, want = {name: (dtype, array) for name, dtype, array in mapped_weights(path)}, tensors()
        assert list(found) == list(want)
        for name, tensor in want.items():
            dtype, array = found[name]
            assert dtype == DTYPES[str(tensor.dtype).removeprefix("torch.")]
            assert array.dtype == np.dtype(dtype.name)
            assert array.shape == tuple(tensor.shape)
            assert array.tobytes() == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_a_file_of_safetensors_own_is_read_too(tmp_path):
    save_file(tensors(), tmp_path / "b.safetensors")
    found, mapped = (
        read_weights(tmp_path / "b.safetensors", CPU),
        {name: array for name, _, array in mapped_weights(tmp_path / "b.safetensors")},
    )
    for name, tensor in tensors().items():
        same(found[name], tensor)
        assert mapped[name].tobytes() == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_places_follow_each_other_from_an_aligned_start(path):
    places, want = locate_weights(path), tensors()
    end = min(at.offset for at in places.values())
    assert end % ALIGNED == 0
    for name, tensor in want.items():
        assert (places[name].offset, places[name].length) == (end, tensor.nbytes)
        end += tensor.nbytes
    assert path.stat().st_size == end


def test_each_tensor_is_written_in_the_dtype_of_its_place(tmp_path):
    given = torch.randn(4, 3)
    wanted = [("a", (4, 3), torch.bfloat16), ("b", (4, 3), torch.float64), ("c", (3, 4), torch.float16)]
    write_weights(tmp_path / "c", wanted, [("a", given), ("b", given), ("c", given.t())])  # which is not contiguous
    found = load_file(tmp_path / "c")
    for name, want in (("a", given.bfloat16()), ("b", given.double()), ("c", given.t().half())):
        same(found[name], want.contiguous())


@pytest.mark.parametrize(
    "given",
    [
        [("b", torch.ones(2)), ("a", torch.ones(2))],
        [("a", torch.ones(3)), ("b", torch.ones(2))],
        [("a", torch.ones(2))],
    ],
)
def test_tensors_that_are_not_those_of_the_layout_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match=r"came where a \[2\] is to be written|is shorter than argument 1"):
        write_weights(tmp_path / "d", [(name, (2,), torch.float32) for name in "ab"], given)


def test_a_models_parameters_keep_their_dtypes(tmp_path):
    model = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(2, 2, bias=False).bfloat16()})
    write_parameters(tmp_path / "e", model)
    found = load_file(tmp_path / "e")
    assert list(locate_weights(tmp_path / "e")) == ["one.weight", "one.bias", "two.weight"]
    for name, parameter in model.named_parameters():
        same(found[name], parameter.detach())


def test_what_is_read_has_memory_of_its_own(path):
    found = read_weights(path, CPU)
    for tensor in found.values():
        tensor.zero_()
    same(read_weights(path, CPU)["last"], torch.ones(7))


WIDE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        *((dtype, [np.nan]) for dtype in (*WIDE, torch.float8_e4m3fn)),  # which has no infinities
        *((dtype, values) for dtype in WIDE for values in ([np.inf], [-np.inf], [np.inf, -np.inf])),
    ],
    ids=str,
)
def test_what_is_not_finite_is_refused(tmp_path, dtype, values):
    given = {"a": torch.ones(70), "b": torch.ones(7, 10).to(dtype)}
    write_weights(tmp_path / "f", layout(given), given.items())
    assert read_weights(tmp_path / "f", CPU).keys() == given.keys()
    for place, value in enumerate(values):
        given["b"].view(-1)[33 + place] = value
    write_weights(tmp_path / "f", layout(given), given.items())
    with pytest.raises(BundleError, match=r"/f: b holds NaN or infinities, .* take another file$"):
        read_weights(tmp_path / "f", CPU)
    same(Reader(BundleError).read(tmp_path / "f", "a"), given["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_overflows_is_no_number_that_does(tmp_path, dtype):
    given = {"a": torch.full((70,), torch.finfo(dtype).max / 2, dtype=dtype)}
    assert not given["a"].sum().isfinite()
    write_weights(tmp_path / "g", layout(given), given.items())
    same(read_weights(tmp_path / "g", CPU)["a"], given["a"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_of_a_file_larger_than_the_memory_one_tensor_is_mapped(tmp_path):
    """Linux refuses to map as much as it has not, where it may be written to."""
    given, at = torch.arange(5, dtype=torch.int32), 2**36
    header = {
        "large": {"dtype": "U8", "shape": [at], "data_offsets": [0, at]},
        "small": {"dtype": "I32", "shape": [5], "data_offsets": [at, at + 20]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(at, os.SEEK_CUR)  # a hole, which takes no place on the disk
        file.write(given.numpy().tobytes())

    def reads():
        resource.setrlimit(resource.RLIMIT_AS, (at, at))
        same(Reader(BundleError).read(tmp_path / "a.safetensors", "small"), given)
        return 0

    done = forked(reads)
    assert done.returncode == 0, done.stderr
