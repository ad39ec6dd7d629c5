"""Headers of safetensors files that are damaged, or lie: one line that names the file, or the same tensors as before."""

import json
import shutil

import pytest
from checkpoints import read
from hypothesis import given
from hypothesis import strategies as st
from support import CHECKPOINT, examples

import bagel_opt
from bagel_opt import BundleError, CheckpointError
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.manifest import WEIGHTS
from bagel_opt.files.weights import locate_weights


def header_bits(path):
    return 8 * (8 + int.from_bytes(path.read_bytes()[:8], "little"))


def flip(path, whole, bit):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def refusal(call, error):
    """The line of such an error, or nothing where there is none."""
    try:
        call()
    except error as raised:
        return str(raised) if str(raised).isprintable() else f"{raised!r} is not printable"
    return ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("flips") / "checkpoint")


@pytest.fixture(scope="module")
def copy(bundle, tmp_path_factory):
    return shutil.copytree(bundle, tmp_path_factory.mktemp("flips") / "bundle")


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
def test_a_bit_of_a_checkpoints_header(checkpoint, file):
    path, want = checkpoint / file, Checkpoint(checkpoint).tensors
    whole = path.read_bytes()

    @examples(300)
    @given(st.integers(0, header_bits(path) - 1))
    def loads_alike_or_is_named(bit):
        flip(path, whole, bit)
        said = refusal(lambda: read(checkpoint), CheckpointError)
        assert str(checkpoint) in said if said else Checkpoint(checkpoint).tensors == want

    loads_alike_or_is_named()
    path.write_bytes(whole)


def test_a_bit_of_a_bundles_header_that_is_not_checked(copy):
    path, want = copy / WEIGHTS, locate_weights(copy / WEIGHTS)
    whole = path.read_bytes()

    @examples(100)
    @given(st.integers(0, header_bits(path) - 1))
    def loads_alike_or_is_named(bit):
        flip(path, whole, bit)
        said = refusal(lambda: bagel_opt.load(copy, check=False), BundleError)
        assert str(path) in said if said else locate_weights(path) == want

    loads_alike_or_is_named()
    path.write_bytes(whole)


# ---- lies, in a file of two tensors of 8 and 4 bytes

A, B = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]}
LIES = {
    "a list": [],
    "a number": 1,
    "an entry that is none": {"a": 3},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "more than there is": {"a": {**A, "strides": [1]}},
    "a dtype of another size": {"a": {**A, "dtype": "F64"}},
    "a dtype that nobody knows": {"a": {**A, "dtype": "F\x1b[31m"}},
    "a dtype that is no text": {"a": {**A, "dtype": 32}},
    "a shape of another size": {"a": {**A, "shape": [3]}},
    "a shape below zero": {"a": {**A, "shape": [-2]}},
    "two sides below zero": {"a": {**A, "shape": [-1, -2]}},
    "a shape of fractions": {"a": {**A, "shape": [2.0]}},
    "a shape of truth values": {"a": {**A, "shape": [2, True]}},
    "a shape that is no list": {"a": {**A, "shape": 2}},
    "a hundred dimensions": {"a": {**A, "shape": [2, *[1] * 99]}},
    "sides that overflow": {"a": {**A, "shape": [2**32, 2**32]}},
    "a side of a thousand digits": {"a": {**A, "shape": [10**1000]}},
    "the end before the start": {"a": {**A, "data_offsets": [8, 0]}},
    "one offset": {"a": {**A, "data_offsets": [8]}},
    "offsets below zero": {"a": {**A, "data_offsets": [-8, 0]}},
    "offsets beyond the file": {"b": {**B, "data_offsets": [12, 16]}},
    "an overlap": {"b": {**B, "data_offsets": [4, 8]}},
    "two tensors in one place": {"c": A},
    "a gap": {"b": {**B, "data_offsets": [9, 13]}},
    "bytes that are no tensor's": {"b": {**B, "shape": [1], "data_offsets": [8, 10]}},
    "notes that are no texts": {"__metadata__": {"a": 1}},
    "notes that are none": {"__metadata__": []},
}


def written(path, header, data=b"x" * 12):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies(tmp_path, lie):
    path = tmp_path / "a.safetensors"
    honest = {"__metadata__": {"format": "pt"}, "a": A, "b": B}
    assert set(locate_weights(written(path, honest))) == {"a", "b"}
    written(path, {**honest, **lie} if isinstance(lie, dict) else lie)
    refused(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
        b'{"a":{"dtype":"F32","shape":[3],"shape":[3],"data_offsets":[0,12]}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"\xff": 1}',
        "{}".encode("utf-16"),
        b"",
    ],
)
def test_a_header_that_is_no_json(tmp_path, header):
    refused(written(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_another_length(tmp_path, length):
    path = written(tmp_path / "a.safetensors", {"a": A, "b": B})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path)


def refused(path):
    for error in (BundleError, CheckpointError):
        with pytest.raises(error) as caught:
            locate_weights(path, error)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
