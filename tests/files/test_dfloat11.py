"""DFloat11 decodes to the numbers that were encoded, bit for bit; what is not whole is refused in one line."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import assert_same, weights
from dfloat11_encoder import compress
from forms import dfloat11
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import CHECKPOINT, examples

import bagel_opt.files.dfloat11 as ours
from bagel_opt.dtypes import DTYPES
from bagel_opt.errors import CheckpointError
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.weights import locate_weights

CONFIG = {"threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": {r"layers\.\d+": ["a", "b.c"]}}
NAME = "layers.3"


def stored(path, pieces):
    save_file({f"{NAME}.{name}": piece for name, piece in pieces.items()}, path)
    return {name: (path, at) for name, at in locate_weights(path).items()}


def parts(path, pieces, config=CONFIG):
    return ours.find_parts(stored(path, pieces), config, path)


def bfloat16(exponents, seed=0):
    """Numbers with these exponents, and any sign and mantissa."""
    rest = np.random.default_rng(seed).integers(0, 256, len(exponents), dtype=np.uint16)
    bits = (np.asarray(exponents, np.uint16) << 7) | (rest & 127) | (rest & 128) << 8
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def same(one, two):
    return torch.equal(one.view(torch.int16), two.view(torch.int16))


def normal(count, seed=0):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def fibonacci(count):
    """Exponents whose codes get longer by a bit each, up to about `count` bits."""
    numbers = [1, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    every = np.repeat(np.arange(100, 100 + count), numbers)
    return np.random.default_rng(1).permutation(every)


@pytest.mark.parametrize(
    "numbers",
    [
        normal(150_001),
        bfloat16(fibonacci(25)),
        bfloat16(np.full(70_000, 120)),
        bfloat16(np.arange(240)),
        bfloat16([7]),
        torch.tensor([0.0, -0.0, 1.0, -1.5]).bfloat16(),
    ],
    ids=["normal", "codes of 25 bits", "one exponent", "every exponent", "one number", "signed zeros"],
)
def test_bit_for_bit(tmp_path, numbers):
    half = len(numbers) // 3
    found = parts(tmp_path / "a.safetensors", compress([numbers[:half], numbers[half:]]))
    assert list(found) == [f"{NAME}.a.weight", f"{NAME}.b.c.weight"]
    assert same(torch.cat([part.read() for part in found.values()]), numbers)
    assert sum(part.location.shape[0] for part in found.values()) == len(numbers)


def test_blocks_in_turns(tmp_path, monkeypatch):
    """Any stretch of a group, with few lanes at a time."""
    monkeypatch.setattr(ours, "LANES", 2)
    numbers = normal(100_000)
    group = parts(tmp_path / "a.safetensors", compress([numbers]), CONFIG | {"pattern_dict": {}})[
        f"{NAME}.weight"
    ].group
    assert len(group.positions) - 1 > 4
    edges = [0, group.positions[1], group.positions[3] + 1, 100_000]
    for start, stop in itertools.combinations_with_replacement(edges, 2):
        got = torch.from_numpy(group.decode(start, stop).view(np.int16))
        assert torch.equal(got, numbers[start:stop].view(torch.int16))


@examples(60)
@given(st.lists(st.integers(0, 239), min_size=1, max_size=300), st.integers(1, 60), st.data())
def test_any_numbers(tmp_path_factory, exponents, times, data):
    numbers = bfloat16(exponents * times)
    start = data.draw(st.integers(0, len(numbers)))
    found = parts(tmp_path_factory.mktemp("a") / "a.safetensors", compress([numbers[:start], numbers[start:]]))
    assert same(torch.cat([part.read() for part in found.values()]), numbers)


def test_a_checkpoint(tmp_path):
    """The same weights as the numbers in bfloat16, read plainly."""
    plain = shutil.copytree(CHECKPOINT, tmp_path / "plain")
    save_file({n: t.bfloat16() for n, t in load_file(plain / "ema.safetensors").items()}, plain / "ema.safetensors")
    folder = dfloat11(shutil.copytree(CHECKPOINT, tmp_path / "folder"))
    assert_same(weights(folder), weights(plain))
    over, name = Checkpoint(CHECKPOINT, folder), "language_model.lm_head.weight"
    assert isinstance(over.places[name], ours.Part)
    assert over.tensors == Checkpoint(folder).tensors
    assert Checkpoint(folder, plain / "ema.safetensors").places[name] == (plain / "ema.safetensors", name)
    factors = {"A": torch.randn(2, 64), "B": torch.randn(276, 2)}
    adapter = {f"{name.removesuffix('.weight')}.lora_{half}.weight": factor for half, factor in factors.items()}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    one, two = (Checkpoint(place, lora=tmp_path).load(torch.device("cpu"), torch.float32) for place in (folder, plain))
    assert torch.equal(one.llm.lm_head.weight, two.llm.lm_head.weight)


# ---- what is refused


def fails(path, pieces, *words, config=CONFIG):
    with pytest.raises(CheckpointError) as refused:
        [part.read() for part in parts(path, pieces, config).values()]
    message = str(refused.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message, message


@pytest.fixture(scope="module")
def pieces():
    return compress([normal(60_000), normal(40_000, 1)])


@pytest.mark.parametrize("piece", ours.PIECES)
def test_a_piece_that_is_missing(tmp_path, pieces, piece):
    fails(tmp_path / "a.safetensors", {n: t for n, t in pieces.items() if n != piece}, NAME, f"lacks {piece}")


def cut(name, count=1):
    return lambda p: {name: p[name].flatten()[:-count].clone()}


def positions(change):
    def changed(p):
        found = p["output_positions"].view(torch.int32).clone()
        change(found)
        return {"output_positions": found.view(torch.uint8)}

    return changed


def grow(found):
    found[1] += 1


def fall(found):
    found[1], found[2] = found[2].item(), found[1].item()


def zero_bits(p):
    stream = p["encoded_exponent"].clone()
    stream[4096:8192] = 0
    return {"encoded_exponent": stream}


def pointing_beyond(p):
    luts = p["luts"].clone()
    luts[0, 0] = 256 - len(luts) + 1
    return {"luts": luts}


def circling(p):
    luts = p["luts"].clone()
    luts[1] = 255
    return {"luts": luts}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (cut("encoded_exponent", 5000), "its output_positions have"),
        (cut("sign_mantissa"), "its output_positions do not lead from 0 to its 99999 numbers"),
        (cut("luts"), "its luts have"),
        (cut("gaps"), "its gaps have"),
        (cut("output_positions", 4), "its output_positions have"),
        (positions(grow), "ends within the next one's"),
        (positions(fall), "do not lead from 0"),
        (zero_bits, "ends within the next one's"),
        (pointing_beyond, "its luts point beyond themselves"),
        (circling, "a code that its luts do not have"),
        (lambda p: {"split_positions": torch.tensor([100_001])}, "its split_positions do not rise"),
        (lambda p: {"split_positions": torch.tensor([1, 2])}, "it has 3 parts, and its pattern 2"),
        (lambda p: {"split_positions": torch.tensor([1.0])}, "its split_positions are no int64"),
        (lambda p: {"luts": torch.zeros(40, 256, dtype=torch.uint8)}, "it has 39 tables"),
    ],
)
def test_groups_that_are_not_whole(tmp_path, pieces, change, word):
    fails(tmp_path / "a.safetensors", pieces | change(pieces), NAME, "is not whole", word)


def test_exponents_that_its_tables_cannot_hold(tmp_path):
    """As its own encoder writes them: such a number decodes to another."""
    fails(tmp_path / "a.safetensors", compress([bfloat16([240, 120, 120]), normal(9)]), "exponents from 240 on")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern_dict": {"(": []}}, ["pattern_dict has '('"]),
        ({"pattern_dict": {"(l+)+s": []}}, ["no simple pattern"]),
        ({"pattern_dict": {r"layers\.3": "a"}}, ["pattern_dict has 'a'"]),
        ({"pattern_dict": None}, ["lacks dfloat11_config"]),
        ({"bytes_per_thread": 4}, ["lacks dfloat11_config"]),
        ({"threads_per_block": [512, 1]}, ["lacks dfloat11_config"]),
        ({"threads_per_block": [256]}, ["is not whole: its output_positions"]),
    ],
)
def test_configs(tmp_path, pieces, change, words):
    fails(tmp_path / "a.safetensors", pieces, *words, config=CONFIG | change)
    fails(tmp_path / "a.safetensors", pieces, "lacks dfloat11_config", config=None)


def test_a_folder_that_is_not_whole(tmp_path):
    folder = dfloat11(shutil.copytree(CHECKPOINT, tmp_path / "folder"))
    path = folder / "language_model_lm_head.safetensors"
    every = load_file(path)
    shutil.copy(path, folder / "copy.safetensors")
    with pytest.raises(
        CheckpointError, match=r"language_model_lm_head.safetensors and copy.safetensors both have tensor"
    ):
        Checkpoint(folder)
    (folder / "copy.safetensors").unlink()
    save_file({"language_model.lm_head.weight": torch.zeros(276, 64)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"both have tensor language_model.lm_head.weight"):
        Checkpoint(folder)
    (folder / "more.safetensors").unlink()
    numbers = torch.zeros(276 * 64 - 1, dtype=torch.bfloat16)
    save_file({f"language_model.lm_head.{n}": t for n, t in compress([numbers]).items()}, path)
    with pytest.raises(CheckpointError, match=r"language_model.lm_head.weight is \[17663\], not \[276, 64\]"):
        Checkpoint(folder)
    save_file(every, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"language_model_lm_head.safetensors is no complete safetensors file"):
        Checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"1 tensor missing: language_model.lm_head.weight"):
        Checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": {}}))
    with pytest.raises(CheckpointError, match=r"config.json lacks dfloat11_config"):
        Checkpoint(folder)


def test_a_part_says_its_share(tmp_path, pieces):
    found = parts(tmp_path / "a.safetensors", pieces)
    whole = sum(piece.numel() for name, piece in pieces.items() if name != "split_positions")
    assert [part.location.dtype for part in found.values()] == [DTYPES["bfloat16"]] * 2
    assert 0 <= whole - sum(part.location.length for part in found.values()) < 2
