"""Texts and pictures in turn, against the same texts and pictures asked for one by one.

What each guidance branch reads is written out here for both rules; that contexts which are read give the official answers
is shown in test_golden.py.
"""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from bundles import BACKENDS, PROFILES
from PIL import Image
from support import CHECKPOINT, cases
from test_golden import tier

import bagel_opt
from bagel_opt import Options, Profile, ProfileError, Request
from bagel_opt.images import Canvas
from bagel_opt.sampling.contexts import Block
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.flow import schedule, seeded_noise
from bagel_opt.sampling.interleaved import MARKER, PARAGRAPH
from bagel_opt.sampling.pictures import read_image
from bagel_opt.sampling.plan import Plan, fits
from bagel_opt.sampling.planning import THINK_TEXT, make_plan

EDIT = next(case for case in cases() if case.name == "image_editing")
INPUT = EDIT.inputs[0].resize((64, 64))  # 4x4 latent tokens, 5x5 patches
FEW = {"num_timesteps": 4, "seed": 5, "max_think_tokens": 9, "do_sample": True, "text_temperature": 1.0}
BOTH = {
    "rebuilt": {**FEW, "interleaved_context": "rebuilt"},
    "main": {**FEW, "interleaved_context": "main", "draw_marker": ""},
}
RULES = pytest.mark.parametrize("rule", BOTH)
# aoti runs the programs of export, whose bundles take a tenth of its time to make
EACH = pytest.mark.parametrize("backend", [pytest.param(b, marks=tier(b)) for b in BACKENDS if b != "aoti"])
# What is read before each text, and by main, cfg_text and cfg_img before each picture: s the system prompt, q the
# question, tN the text of round N, and of image 0, which goes in, and of N + 1, drawn in round N, the latents and the ViT.
READ = {
    "rebuilt": [
        "s vit0 q",
        ("s vae0 vit0 q t0", "s vae0 vit0 q", "s q t0"),
        "s vit0 q t0 vit1",
        ("s vae0 vit0 q t0 vae1 vit1 t1", "s vae0 vit0 q t0 vae1 vit1", "s q t0 t1"),
        "s vit0 q t0 vit1 t1 vit2",
        (
            "s vae0 vit0 q t0 vae1 vit1 t1 vae2 vit2 t2",
            "s vae0 vit0 q t0 vae1 vit1 t1 vae2 vit2",
            "s q t0 t1 t2",
        ),
    ],
    "main": [
        "s vae0 vit0 q",
        ("s vae0 vit0 q t0", "s vae0 vit0", "s q"),
        "s vae0 vit0 q t0 vae1 vit1",
        ("s vae0 vit0 q t0 vae1 vit1 t1", "s vae0 vit0", "s q"),
        "s vae0 vit0 q t0 vae1 vit1 t1 vae2 vit2",
        ("s vae0 vit0 q t0 vae1 vit1 t1 vae2 vit2 t2", "s vae0 vit0", "s q"),
    ],
}
# Of which seed each image's noise is, by the picture that is drawn, and as which of that seed's draws: (round, place).
NOISE = {
    "rebuilt": [[(0, 1)], [(1, 1), (1, 2)], [(2, 1), (2, 2), (2, 3)]],  # all anew in each round
    "main": [[(0, 1)], [(0, 1), (1, 1)], [(0, 1), (1, 1), (2, 1)]],  # each once
}


def one_by_one(model, profile, rule, inputs, options):
    """The outputs, each of a plan made by hand and run alone."""
    texts = {"s": options["system_prompt"], "q": inputs[1]}
    pictures, outputs = [read_image(inputs[0], model.config, "")], []

    def blocks(line):
        found = []
        for name in line.split():
            if name[:3] in ("vae", "vit"):
                grid = getattr(pictures[int(name[3:])], f"{name[:3]}_grid")
                found.append(Block(name[:3], grid[0] * grid[1] + 2, image=int(name[3:])))
            else:
                ids = model.tokenizer.block(texts[name])
                found.append(Block("text", len(ids), ids))
        return found

    def run(plan):
        engine = Engine(model.runtime.for_profile(profile), model.config, model.tokenizer, profile)
        [outputs] = engine.run([plan])
        assert isinstance(outputs, list), outputs
        return outputs[0]

    plain = {key: options[key] for key in FEW}
    steps = schedule(plain["num_timesteps"], 3.0, (0.4, 1.0))
    for number in range(3):
        seed = options["seed"] + number
        single = {**plain, "seed": seed}
        plan = Plan(Options(**single, output="text"), blocks(READ[rule][2 * number]), None, None, pictures)
        noises = [noise(rule, number, options["seed"], image) for image in range(len(pictures))]
        texts[f"t{number}"] = run(dataclasses.replace(plan, max_tokens=plain["max_think_tokens"], vae_noise=noises))
        contexts = map(blocks, READ[rule][2 * number + 1])
        [drawn] = seeded_noise(seed, [(16, 64)])
        plan = Plan(Options(**single), *contexts, pictures, steps, Canvas(model.config, (4, 4)), 0, drawn, noises)
        picture = run(plan)
        outputs += [texts[f"t{number}"], picture]
        pictures.append(read_image(picture, model.config, ""))
    return outputs


def noise(rule, number, seed, image):
    """Of the posterior of one image, in one round."""
    round, place = NOISE[rule][number][image]
    return seeded_noise(seed + round, [(16, 64), *[(1, 16, 8, 8)] * place])[place]


def alike(got, want, bits=False):
    assert [type(x) for x in got] == [type(x) for x in want]
    for a, b in zip(got, want, strict=True):
        if isinstance(b, str):
            assert a == b
        else:
            difference = np.abs(np.asarray(a, int) - np.asarray(b, int))
            assert difference.max() <= (0 if bits else 1)
            assert (difference > 0).mean() < 2e-2


@EACH
@RULES
def test_each_rule_reads_what_is_written_out(load, backend, rule):
    model, profile = load(CHECKPOINT, backend), PROFILES[CHECKPOINT]
    options = {**BOTH[rule], "system_prompt": "Think well."}
    got = model.run([INPUT, "what comes next?"], output="interleaved", **options)
    assert len(set(map(str, got[::2]))) == 3  # all three texts differ, so that none can stand for another
    alike(got, one_by_one(model, profile, rule, [INPUT, "what comes next?"], options))


@pytest.mark.parametrize(
    ("inputs", "more"),
    [
        pytest.param(inputs, more, marks=[pytest.mark.second] if more and len(inputs) < 4 else [])
        for inputs in (["q"], [INPUT], ["q", INPUT], [INPUT, "q", INPUT.rotate(90), "r"])
        for more in ({}, {"negative_prompt": "no"}, {"cfg_img_scale": 1.0}, {"step_cache": "taylorseer"})
    ],
)
def test_rebuilt_is_a_loop_of_single_requests(eager, inputs, more):
    """As Bagel-Zebra-CoT's script runs them, round r with seed + r."""
    said, want, options = list(inputs), [], {**FEW, "num_timesteps": 9, **more, "height": 64, "width": 64}
    for number in range(3):
        single = {**options, "seed": 5 + number}
        [text] = eager.run(said, **single, output="text")
        [picture] = eager.run([*said, text], **single)
        said += [text, picture]
        want += [text, picture]
    alike(eager.run(inputs, output="interleaved", **options), want)


def test_the_size_of_what_is_drawn(eager):
    """What was asked for; else, rebuilt, that of the last image as it is read, and with main alone that of the last input."""
    asked, small = {"height": 32, "width": 32}, INPUT.resize((48, 48))
    for inputs, rule, given, sizes in (
        (["a"], "rebuilt", asked, [32, 32, 32]),
        (["a"], "main", asked, [32, 32, 32]),
        ([INPUT.resize((96, 96)), "a"], "main", {}, [96, 96, 96]),
        (["a", small], "rebuilt", {}, [64, 64, 64]),
        (["a", small], "rebuilt", asked, [32, 32, 32]),
        ([small, "a"], "main", asked, [32, 32, 32]),
    ):
        options = {**BOTH[rule], **given, "max_think_tokens": 3, "vae_min_size": 64}
        outputs = eager.run(inputs, output="interleaved", **options)
        assert [picture.size for picture in outputs[1::2]] == [(size, size) for size in sizes]


@pytest.mark.parametrize(
    ("rule", "images", "texts"),
    [
        ("main", 3, 1 + 3 + 1),  # q and each text once in main, q once in cfg_img
        # all in main, where q and the first text follow each other and are read together; in cfg_img what is new
        ("rebuilt", 2 * (1 + 2 + 3), (1 + 1 + 2) + (1 + 2 + 3) + (1 + 1 + 1)),
    ],
)
def test_nothing_is_read_again_that_a_row_holds(eager, rule, images, texts, monkeypatch):
    """Each image is encoded once. What main reads before a text and before a picture differs from the first image on where
    it is rebuilt."""
    profile, counts = PROFILES[CHECKPOINT], Counter()
    plan = make_plan(Request([INPUT, "a"], output="interleaved", **BOTH[rule]), eager.config, eager.tokenizer)
    runtime = eager.runtime.for_profile(profile)
    run = runtime.run
    monkeypatch.setattr(runtime, "run", lambda name, *rest: (counts.update([name]), run(name, *rest))[1])
    Engine(runtime, eager.config, eager.tokenizer, profile).run([plan.fitted(profile)])
    assert (counts["vit"], counts["vae_encode"], counts["vae_decode"]) == (3, 3, 3)
    assert (counts["vit_context"], counts["text"]) == (images, texts)


@RULES
def test_alone_and_beside_others(load, rule):
    """Requests of all kinds in common rows, some of which come and go between its rounds."""
    model = load(CHECKPOINT, "onnx")
    requests = [
        Request([INPUT, "a"], output="interleaved", **BOTH[rule]),
        Request("b", output="interleaved", **BOTH[rule], cfg_text_scale=1.0, height=64, width=64),
        Request("a ring", num_timesteps=5, seed=1, height=64, width=64),
        Request([INPUT, "c"], output="text", max_think_tokens=30),
        Request("c", output="interleaved", **{**BOTH[rule], "max_think_tokens": 4}, max_rounds=1, height=48, width=32),
    ]
    alone = [model.run_many([request])[0] for request in requests]
    for got, want in zip(model.run_many(requests), alone, strict=True):
        alike(got, want, bits=True)


@RULES
@pytest.mark.parametrize("profile", [(3, 999, 16, 64, 64), (1, 512, 64, 25, 16), (8, 640, 7, 30, 20)])
def test_static_sizes_never_show(eager, rule, profile):
    fixed = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("other", *profile))
    options = {**BOTH[rule], "system_prompt": "Think well, and do it in more than seven tokens."}
    want = eager.run([INPUT, "a"], output="interleaved", **options)
    alike(fixed.run([INPUT, "a"], output="interleaved", **options), want)


@RULES
def test_garbage_in_the_padding_never_shows(eager, rule, monkeypatch):
    """Neither in what rows held before, nor in what the rounds before left behind their ends."""
    profile = PROFILES[CHECKPOINT]
    request = Request([INPUT, "a"], output="interleaved", **BOTH[rule])
    plan = make_plan(request, eager.config, eager.tokenizer).fitted(profile)
    runtime = eager.runtime.for_profile(profile)
    [want] = Engine(runtime, eager.config, eager.tokenizer, profile).run([plan])
    engine = Engine(runtime, eager.config, eager.tokenizer, profile)
    job = engine.submit(plan)
    while engine.waiting or engine.active:
        engine.step()
        for context in job.contexts if job in engine.active else []:
            for cache in engine.batches[context.batch].caches:
                cache[context.row, context.kv_len + (18 if job.want else 0) :] = 1e4
    alike(job.result, want)


def test_seeds(eager):
    request = {"output": "interleaved", **BOTH["rebuilt"], "height": 64, "width": 64}
    one, again, other = (eager.run("a", **{**request, "seed": seed}) for seed in (1, 1, 2))
    alike(one, again, bits=True)
    assert one[0] != other[0]
    last = eager.run("a", **{**request, "seed": 2**63 - 1})  # of which no seed + 1 is left
    assert len(last) == 6
    unseeded = [eager.run("a", **{**request, "seed": None})[0] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_rounds(eager):
    options = {"output": "interleaved", **BOTH["rebuilt"], "height": 32, "width": 32}
    for rounds in (1, 2):
        outputs = eager.run("a", **options, max_rounds=rounds)
        assert [type(x) for x in outputs] == [str, Image.Image] * rounds
    assert len(eager.run("a", **options)) == 6


@RULES
def test_a_stop_text_ends_after_the_text_that_holds_it(eager, rule):
    options = {"output": "interleaved", **BOTH[rule], "height": 32, "width": 32}
    whole = eager.run("a", **options)
    first, second, _ = whole[::2]
    stop = next(second[i : i + 2] for i in range(len(second)) if second[i : i + 2] not in first)
    for given in (stop, ["never", stop]):
        alike(eager.run("a", **options, stop=given), whole[:3], bits=True)
    assert eager.run("a", **options, stop=[first[1:3], stop]) == whole[:1]


def test_main_draws_where_the_text_asks_for_it(eager):
    options = {"output": "interleaved", **FEW, "interleaved_context": "main", "height": 32, "width": 32}
    whole = eager.run("a", **options, draw_marker="")
    first, second, _ = whole[::2]
    assert MARKER not in first
    assert eager.run("a", **options) == whole[:1]
    marker = next(first[i : i + 2] for i in range(len(first)) if first[i : i + 2] not in second)
    alike(eager.run("a", **options, draw_marker=marker), whole[:3], bits=True)
    rebuilt = {**options, "interleaved_context": "rebuilt"}
    assert len(eager.run("a", **rebuilt)) == 6
    assert len(eager.run("a", **rebuilt, draw_marker=MARKER)) == 1


def test_thinking_reads_its_prompt_first(eager):
    options = {"output": "interleaved", **BOTH["rebuilt"], "height": 32, "width": 32, "max_rounds": 1}
    alike(eager.run("a", **options, think=True), eager.run("a", **options, system_prompt=THINK_TEXT), bits=True)


def test_what_is_told_on_the_way(eager):
    told, steps = [], []
    outputs = eager.run(
        [INPUT, "a"],
        output="interleaved",
        **BOTH["main"],
        max_rounds=2,
        on_token=lambda token: told.append("token"),
        on_step=lambda event: (steps.append(event), told.append("step")),
        on_output=lambda output: told.append(output),
    )
    assert [x for x in told if not isinstance(x, str) or x not in ("token", "step")] == outputs
    order = [name for name in ("token", "step") for _ in range(told.count(name))]
    assert len(order) == told.count("token") + 2 * 3
    assert [(event.round, event.index, event.total) for event in steps] == [(r, i, 3) for r in (0, 1) for i in range(3)]
    places = [told.index(output) for output in outputs]
    assert places == sorted(places)
    assert "step" not in told[: places[0]]
    assert set(told[places[0] + 1 : places[1]]) == {"step"}
    assert set(told[places[1] + 1 : places[2]]) == {"token"}


@pytest.mark.parametrize("name", ["noise", "vae_noise"])
def test_noise_comes_of_the_seed(name):
    with pytest.raises(ValueError, match=f"{name} is given; of an interleaved request the seed alone says"):
        Request("a", output="interleaved", **{name: np.zeros((4, 64))})


# ---- profiles


@pytest.fixture(scope="module")
def plan(eager):
    def make(inputs=("a",), **options):
        request = Request(list(inputs), output="interleaved", **options)
        return make_plan(request, eager.config, eager.tokenizer)

    return make


ROOM = Profile("room", rows=3, slots=768, text=16, patches=64, latents=64)


@RULES
@pytest.mark.parametrize("inputs", [["a"], [INPUT, "a " * 30]])
def test_a_profile_just_large_enough(plan, eager, rule, inputs, monkeypatch):
    p = plan(
        inputs, interleaved_context=rule, draw_marker="", max_think_tokens=9, max_rounds=2, num_timesteps=3, seed=1
    )
    fitting = dataclasses.replace(ROOM, patches=p.tokens("vit"), latents=p.latents(), slots=9999)
    fitting = dataclasses.replace(fitting, slots=p.peak(fitting.text, fitting.patches, fitting.latents)[1])
    assert p.fitted(fitting).rounds == 2
    for name in ("patches", "latents", "slots"):
        need = getattr(fitting, name)
        with pytest.raises(ProfileError) as caught:
            p.fitted(dataclasses.replace(fitting, **{name: need - 1}))
        assert f"needs {name} of at least {need}, but profile 'room' has {name} = {need - 1};" in str(caught.value)
        assert name != "slots" or str(caught.value).endswith("or fewer max_rounds")
    monkeypatch.setattr(eager.tokenizer, "decode", lambda ids: "x" * (len(ids) - 1))  # as long when it is read again
    engine = Engine(eager.runtime.for_profile(fitting), eager.config, eager.tokenizer, fitting)
    [outputs] = engine.run([p.fitted(fitting)])  # eager caches would refuse what is written beyond their slots
    assert isinstance(outputs, list), outputs


def test_fewer_rounds_and_shorter_texts_where_none_were_asked_for(plan):
    """Rounds go before texts are shorter than a paragraph, and the last round's texts go down to the least."""
    p, found = plan([INPUT, "a"]), {}
    for slots in range(150, 5000, 50):
        profile = dataclasses.replace(ROOM, slots=slots)
        if fits(p, profile):
            fitted = p.fitted(profile)
            assert fitted.peak(profile.text, profile.patches, profile.latents)[1] <= slots
            found.setdefault(fitted.rounds, []).append(fitted.max_tokens)
    assert list(found) == [1, 2, 3]
    assert min(found[1]) < PARAGRAPH <= min(found[2])
    assert min(found[3]) >= PARAGRAPH
    assert max(found[3]) == 1000
    assert all(lengths == sorted(lengths) for lengths in found.values())


def test_what_was_asked_for_is_not_shortened(plan):
    for options, slots in (({"max_rounds": 3}, 330), ({"max_think_tokens": 400}, 450)):
        with pytest.raises(ProfileError, match="slots of at least"):
            plan(**options).fitted(dataclasses.replace(ROOM, slots=slots))
    assert plan(max_rounds=3).fitted(ROOM).rounds == 3
    assert plan(max_think_tokens=100).fitted(ROOM).max_tokens == 100


def test_pictures_that_are_not_read_again_need_no_patches(plan):
    few = dataclasses.replace(ROOM, patches=1)
    assert plan().fitted(few).rounds == 1
    with pytest.raises(ProfileError, match="patches of at least 64"):
        plan(max_rounds=2).fitted(few)


def test_a_text_that_grows_when_it_is_read_again_is_refused_where_there_is_no_room(eager, plan, monkeypatch):
    """As ids of broken characters may."""
    p = plan(**{**BOTH["main"], "max_rounds": 2, "height": 32, "width": 32})
    profile = dataclasses.replace(ROOM, patches=p.tokens("vit"), latents=p.latents(), slots=9999)
    profile = dataclasses.replace(profile, slots=p.peak(profile.text, profile.patches, profile.latents)[1] + 8)
    monkeypatch.setattr(eager.tokenizer, "decode", lambda ids: "x" * 200)
    engine = Engine(eager.runtime.for_profile(profile), eager.config, eager.tokenizer, profile)
    [failure] = engine.run([p])
    assert isinstance(failure, ProfileError)
    assert "round 0 needs slots of at least" in str(failure)


def test_pictures_that_cannot_be_read_again_are_refused_at_once(plan):
    with pytest.raises(ValueError, match=r"the picture that is drawn, 128x128,: 256x256 pixels .* position table"):
        plan(vae_min_size=256, vae_max_size=256)
    assert plan(vae_min_size=256, vae_max_size=256, max_rounds=1).rounds == 1
    with pytest.raises(ValueError, match="height=65"):
        plan(height=65)


def test_the_smallest_profile_that_holds_all_branches_of_all_rounds_is_taken(two):
    model, options = bagel_opt.load(two), {**BOTH["rebuilt"], "height": 32, "width": 32}
    for rounds, name in ((1, "small"), (2, "large")):  # while nothing was drawn, cfg_img reads what main reads
        request = Request("a", output="interleaved", **options, max_rounds=rounds)
        profile, plan = model.choose(make_plan(request, model.config, model.tokenizer))
        assert (profile.name, plan.rounds, plan.contexts()) == (name, rounds, rounds + 1)
