"""The page with a model that draws videos."""

import numpy as np
import pytest
from lance_cases import CHECKPOINT, loaded
from PIL import Image
from serving import serving

import bagel_opt
from bagel_opt import Profile, save_video
from bagel_opt.videos import read_video

pytest.importorskip("selenium")
pytest.importorskip("av")
from browsing import choose, find, one, run, text, wait, watched, write

FRAMES, STEPS = 5, 2


@pytest.fixture(scope="module")
def server():
    profile = Profile("lance", rows=2, slots=1200, text=64, patches=300, latents=600)
    with serving(bagel_opt.load(CHECKPOINT, device="cpu", profile=profile)) as running:
        yield running


@pytest.fixture
def page(browser, server):
    with watched(browser, server.url):
        wait(browser, lambda: one(browser, "input[value=video]").find_element("xpath", "..").is_displayed())
        choose(browser, "video")
        one(browser, "#more summary").click()
        write(browser, "#num_timesteps", str(STEPS))
        yield browser


def size(page, value):
    """Another size than those that are offered, which the profile has no room for."""
    page.execute_script("document.getElementById('size').replaceChildren(new Option(arguments[0]))", value)


def playing(page):
    """(width, height, seconds) of the video that is shown and plays."""
    video = one(page, "#video")
    assert video.is_displayed()
    page.execute_script("arguments[0].scrollIntoView()", video)  # or browsers save themselves the trouble
    wait(page, lambda: page.execute_script("return arguments[0].currentTime", video) > 0)
    return [
        page.execute_script(f"return arguments[0].{name}", video) for name in ("videoWidth", "videoHeight", "duration")
    ]


def kept(server):
    return [*server.service.videos.held.values()]


def test_a_video_is_made_plays_and_is_changed(page, server):
    write(page, "#num_frames", str(FRAMES))
    write(page, "#seed", "7")
    size(page, "96x64")
    run(page, "a ball rolls to the left")
    width, height, seconds = playing(page)
    assert (width, height) == (96, 64)
    assert seconds == pytest.approx(FRAMES / 12, abs=0.1)
    assert not one(page, "#picture").is_displayed()
    assert "seed 7" in text(page, "#status")
    assert one(page, "#download").get_attribute("download") == "bagel.mp4"
    want = loaded().generate("a ball rolls to the left", output="video", seed=7, num_frames=FRAMES, num_timesteps=STEPS, width=96, height=64)  # fmt: skip
    for made, frame in zip(read_video(kept(server)[-1].data, None).pick(range(FRAMES)), want, strict=True):
        assert np.abs(np.asarray(made.convert("L"), float) - np.asarray(frame.convert("L"))).mean() < 8
    # it goes in again, and is changed
    one(page, "#reuse").click()
    assert one(page, "input[value=video]").is_selected()
    assert len(find(page, "#pictures video")) == 1
    assert not one(page, "#sizeField").is_displayed()
    write(page, "#resolution_vae", "64")
    write(page, "#resolution_vit", "84")
    write(page, "#num_frames", "")
    run(page, "make it red")
    assert playing(page)[:2] == [80, 48]
    # it goes nowhere else
    choose(page, "edit")
    one(page, "#go").click()
    assert text(page, "#error") == "This takes pictures, no videos."
    # what was made before plays again
    find(page, "#history button")[-1].click()
    wait(page, lambda: playing(page)[:2] == [96, 64])


def test_a_video_begins_with_a_picture(page, tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "own.png")
    one(page, "#files").send_keys(str(tmp_path / "own.png"))
    wait(page, lambda: find(page, "#pictures img"))
    for name, value in (("num_frames", FRAMES), ("resolution_vae", 64), ("resolution_vit", 84)):
        write(page, f"#{name}", str(value))
    run(page, "it rolls")
    assert playing(page)[:2] == [64, 64]
    # a video takes its place
    save_video([Image.new("RGB", (64, 48), (30 * i, 90, 50)) for i in range(5)], tmp_path / "own.mp4")
    one(page, "#files").send_keys(str(tmp_path / "own.mp4"))
    wait(page, lambda: find(page, "#pictures video"))
    assert not find(page, "#pictures img")


def test_progress_and_cancelling(page, server):
    write(page, "#num_frames", str(FRAMES))
    write(page, "#num_timesteps", "200")
    size(page, "96x64")
    write(page, "#prompt", "a ball")
    one(page, "#go").click()
    wait(page, lambda: text(page, "#status").startswith("Filming: ") and text(page, "#status") != "Filming: 0%")
    assert float(one(page, "#progress").get_attribute("value")) > 0
    before = len(kept(server))
    one(page, "#cancel").click()
    wait(page, lambda: text(page, "#status") == "Cancelled.")
    wait(page, lambda: not server.engine.tickets)
    assert len(kept(server)) == before - 1


def test_what_fails_is_told(page, server):
    size(page, "96x64")
    write(page, "#num_frames", str(FRAMES))
    write(page, "#prompt", "a ball")
    server.runtime.failing["vae_decode"] = RuntimeError("device lost")
    try:
        one(page, "#go").click()
        wait(page, lambda: text(page, "#error") == "the server failed on this request")
    finally:
        server.runtime.failing.clear()
    write(page, "#num_frames", "121")
    one(page, "#go").click()
    wait(page, lambda: "the request needs latents of at least" in text(page, "#error"))


def test_what_the_model_has_not_is_not_offered(page):
    shown = [mode.get_attribute("value") for mode in find(page, "input[name=mode]") if mode.find_element("xpath", "..").is_displayed()]  # fmt: skip
    assert shown == ["draw", "edit", "video", "ask"]
    assert not one(page, "#thinkField").is_displayed()
    names = {label.get_attribute("for") for label in find(page, "#options label")}
    assert {"num_frames", "fps", "cfg_text_scale"} < names
    assert not {"max_rounds", "negative_prompt", "cfg_img_scale", "vit_max_size"} & names
    choose(page, "draw")
    assert not one(page, "#num_frames").is_displayed()
    assert one(page, "#cfg_text_scale").is_displayed()
