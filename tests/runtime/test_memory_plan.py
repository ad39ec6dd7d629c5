"""What lies where on a card of so much memory, from sizes alone."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lance_cases import loaded
from support import examples

from bagel_opt import Profile, ProfileError
from bagel_opt.config import PUBLISHED
from bagel_opt.lance.config import WanConfig
from bagel_opt.model.bagel import Bagel
from bagel_opt.profile import load_profile
from bagel_opt.runtime.memory_plan import EXPERTS, RESERVE, _workspaces, bytes_of_parts, make_plan, parse_memory

FP8, INT4 = ({"und": kind, "gen": kind} for kind in ("fp8", "int4"))
DRAW, EDIT = map(load_profile, ("bagel-1024", "bagel-edit-1024"))


def planned(memory, kinds=None, profile=DRAW):
    return make_plan(PUBLISHED, memory, profile, "bfloat16", kinds or {})


@pytest.mark.parametrize("kinds", [{}, FP8, INT4 | {"head": "int8", "vit": "fp8"}, {"embeddings": "int8"}], ids=len)
def test_parts_are_the_models(kinds):
    with torch.device("meta"):
        model = Bagel(PUBLISHED).to(torch.bfloat16)
    model.quantize(kinds)
    told, held = sum(bytes_of_parts(PUBLISHED, "bfloat16", kinds).values()), sum(p.nbytes for p in model.parameters())
    assert held <= told <= held + 256 * len([*model.parameters()])


@pytest.mark.parametrize(
    ("memory", "kinds", "profile", "gen", "und", "away"),
    [
        ("40GB", {}, DRAW, 0, 0, set()),
        ("32GB", {}, DRAW, 0, 0, {"embed", "vit", "vae_encode", "vae_decode"}),
        ("24GB", {}, DRAW, 18, 0, {"embed", "vit", "vae_encode", "vae_decode"}),
        ("12GB", FP8, DRAW, 26, 0, {"embed", "head", "vit", "vae_encode", "vae_decode"}),
        ("8GB", FP8, DRAW, 28, 16, {"embed", "head", "vit", "vae_encode", "vae_decode"}),
        ("12GB", INT4, EDIT, 22, 0, {"embed", "vit", "vae_encode", "vae_decode"}),
    ],
)
def test_what_goes_first(memory, kinds, profile, gen, und, away):
    """What is read for a picture alone, then the generation expert, then what makes logits, then the understanding expert."""
    plan = planned(memory, kinds, profile)
    assert (len(plan.streamed["gen"]), len(plan.streamed["und"]), plan.away) == (gen, und, away)
    for expert in EXPERTS:
        for layer in range(28):
            assert plan.on_host(f"llm.layers.{layer}.{expert}.") == (layer in plan.streamed[expert])
    assert plan.on_host("vae.decoder.conv_in.weight") == ("vae_decode" in away)
    assert not plan.on_host("llm.norm_und.weight")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_table_takes_no_room_beside_it(kind):
    """Nothing is unpacked but some rows, and nothing is rounded."""
    table, plain, products = (
        _workspaces(PUBLISHED, DRAW, 2, kinds) for kinds in ({"embeddings": kind}, {}, {"gen": kind})
    )
    assert table == plain != products


@examples(40)
@given(
    st.integers(5 * 10**9, 45 * 10**9), st.sampled_from([{}, FP8, INT4, {"gen": "fp8"}]), st.sampled_from([DRAW, EDIT])
)
def test_a_plan_keeps_within_its_memory(memory, kinds, profile):
    try:
        plan = planned(memory, kinds, profile)
    except ValueError:
        assert memory < 10**10
        return
    assert plan.resident + plan.room + RESERVE == memory
    plan.check(profile)
    for layers in plan.streamed.values():
        assert len(set(layers)) == len(layers)  # by turns in two buffers
        assert len(layers) % 2 == 0
        if 1 < len(layers) < 28:  # spread over all of them
            gaps = [b - a for a, b in itertools.pairwise(layers)]
            assert max(gaps) - min(gaps) <= 1
    assert plan.resident + plan.host >= sum(plan.parts.values())
    more = planned(memory + 10**9, kinds, profile)
    assert more.step_bytes <= plan.step_bytes + plan.parts["head"]  # which may stay before another layer does
    assert more.token_bytes <= plan.token_bytes


def test_the_least_that_would_do_is_told_and_does():
    with pytest.raises(
        ValueError, match=r"memory='2GB': .* takes at least '[\d.]+GB'.*use quantization, or a smaller"
    ) as told:
        planned("2GB", FP8)
    least = str(told.value).split("at least '")[1].split("'")[0]
    planned(least, FP8)
    with pytest.raises(ValueError, match="takes at least"):
        planned(parse_memory(least) - 2 * 10**7, FP8)


def test_a_profile_without_room():
    plan = planned("12GB", FP8)
    with pytest.raises(ProfileError, match=r"use a smaller height and width.*or load with memory='") as told:
        plan.check(EDIT)
    planned(str(told.value).rsplit("memory='")[-1].rstrip("'"), FP8).check(Profile("a", 2, 6144, 256, 64, 4096))


def test_what_a_video_keeps_from_part_to_part_counts_beside_all_programs():
    model = loaded()
    latent = torch.zeros(1, model.config.latent_dim, 1, 2, 3)
    with torch.no_grad():
        _, _, *kept = model.runtime.run("vae_decode", [latent])
    pixels = 6 * model.config.token_pixels**2
    assert sum(one.numel() for one in kept) == model.config.vae.held(pixels)
    profile = Profile("six", rows=200, slots=16, text=4, patches=4, latents=6)  # so the layers' values are the most
    found = _workspaces(model.config, profile, 2, {})
    apart = dataclasses.replace(model.config, vae=WithoutVideos(**vars(model.config.vae)))
    assert found["layers"] == _workspaces(apart, profile, 2, {})["layers"] + 2 * model.config.vae.held(pixels)
    assert found["vit"] == _workspaces(apart, profile, 2, {})["vit"] + 2 * model.config.vae.held(pixels)


class WithoutVideos(WanConfig):
    def held(self, pixels):
        return 0


def test_programs_that_stream():
    plan = planned("12GB", FP8)
    streaming = {
        name for name in ("generate", "generate_row", "text", "decode_row", "step", "vit") if plan.streams_in(name)
    }
    assert streaming == {"generate", "generate_row"}
    plan = planned("8GB", FP8)
    assert plan.streams_in("decode_row")
    assert plan.streams_in("vit_context")
    assert not plan.streams_in("choose")
    assert plan.step_bytes == plan.streams("und") + plan.streams("gen")
    assert plan.token_bytes == plan.streams("und") + plan.parts["head"]


def test_the_longer_of_computing_and_copying():
    plan = planned("12GB", FP8)
    assert plan.step_seconds(1e15, 2, 4096) == pytest.approx(0.120)
    assert plan.step_seconds(1e15, 1, 4096) == pytest.approx(0.060)
    assert plan.step_seconds(1e10, 2, 4096) == plan.step_bytes / 1e10


@pytest.mark.parametrize(
    ("given", "count"), [("12GB", 12 * 10**9), ("11.5 GiB", 23 * 2**29), ("800mb", 8 * 10**8), (123, 123), ("5", 5)]
)
def test_sizes(given, count):
    assert parse_memory(given) == count


@pytest.mark.parametrize("given", ["", "12G", "GB", "-1GB", "0", 0, True, 1.5, "1e9", None])
def test_what_is_no_size(given):
    with pytest.raises(ValueError, match="allowed are a size such as '12GB'"):
        parse_memory(given)
