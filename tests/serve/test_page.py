"""The page in a headless Chromium, against a server with the model that ships."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from serving import serving

import bagel_opt

pytest.importorskip("selenium")
from browsing import choose, few_steps, find, one, run, text, wait, watched, write
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

RED, BLUE, YELLOW = (215, 38, 38), (38, 90, 225), (250, 220, 40)


@pytest.fixture(scope="module")
def server():
    with serving(bagel_opt.load(profile="demo", device="cpu")) as running:
        yield running


@pytest.fixture
def page(browser, server):
    with watched(browser, server.url):
        yield browser


def picture(browser):
    """The picture that is shown, as an array."""
    # the page's policy lets scripts connect to the server alone, so the bytes go through a canvas instead
    script = """
      const image = document.getElementById("picture"), canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      canvas.getContext("2d").drawImage(image, 0, 0);
      return canvas.toDataURL();"""
    data = browser.execute_script(script).split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def share(pixels, colour):
    return float((np.abs(pixels - colour).max(axis=-1) < 60).mean())


def test_draw_edit_and_ask(page):
    few_steps(page)
    write(page, "#seed", "1")
    run(page, "a large red circle in the center on a white background")
    drawn = picture(page)
    assert drawn.shape == (128, 128, 3)
    assert share(drawn, RED) > 0.05
    assert "seed 1" in text(page, "#status")
    one(page, "#reuse").click()
    assert one(page, "input[value=edit]").is_selected()
    assert len(find(page, "#pictures img")) == 1
    run(page, "make the circle blue")
    edited = picture(page)
    assert share(edited, BLUE) > 0.05 > 0.01 > share(edited, RED)
    one(page, "#reuse").click()
    choose(page, "ask")
    run(page, "what color is the circle?")
    assert "blue" in text(page, "#answer")
    # what was made before is still there, and comes again with its seed
    find(page, "#history button")[-1].click()
    assert np.array_equal(picture(page), drawn)
    one(page, "#repeat").click()
    wait(page, lambda: len(find(page, "#history button")) == 4)
    assert np.array_equal(picture(page), drawn)


def test_an_edit_as_large_as_its_input_was(page, tmp_path):
    Image.new("RGB", (100, 70), "white").save(tmp_path / "own.png")
    choose(page, "edit")
    few_steps(page)
    one(page, "#files").send_keys(str(tmp_path / "own.png"))
    wait(page, lambda: find(page, "#pictures img"))
    run(page, "add a red circle")
    read = picture(page).shape
    assert read != (70, 100, 3)
    Select(one(page, "#editSize")).select_by_value("input")
    run(page, "add a red circle")
    assert picture(page).shape == (70, 100, 3)
    find(page, "#history button")[-1].click()
    one(page, "#repeat").click()
    wait(page, lambda: len(find(page, "#history button")) == 3)
    assert picture(page).shape == read
    choose(page, "draw")
    assert not one(page, "#editSize").is_displayed()
    assert one(page, "#size").is_displayed()


def test_thinking_shows_the_thought_and_options_are_sent(page, server):
    seen = []
    original = server.engine.submit
    server.engine.submit = lambda planned, *rest: seen.extend(planned) or original(planned, *rest)
    few_steps(page)
    one(page, "#think").click()
    write(page, "#cfg_interval", "0.3")
    Select(one(page, "#cfg_renorm_type")).select_by_value("channel")
    Select(one(page, "#size")).select_by_index(1)
    run(page, "a small green star at the top")
    server.engine.submit = original
    one(page, "#thought summary").click()
    assert "star" in text(page, "#thoughtText")
    [(plan, _)] = seen
    assert (plan.options.cfg_interval, plan.options.cfg_renorm_type) == ((0.3, 1.0), "channel")
    assert (plan.options.width, plan.options.height) == (128, 96)
    assert picture(page).shape == (96, 128, 3)


def test_examples_to_click(page, tmp_path):
    few_steps(page)
    prompts = [button.text for button in find(page, "#examples button")]
    assert len(prompts) == 3
    find(page, "#examples button")[1].click()
    assert one(page, "#prompt").get_property("value") == prompts[1]
    choose(page, "edit")
    one(page, "#examples button img")
    one(page, "#examples button").send_keys(Keys.ENTER)
    wait(page, lambda: find(page, "#pictures img"))
    assert one(page, "#prompt").get_property("value") == one(page, "#examples button").text == "make the star yellow"
    assert not find(page, "#examples img")  # it is in
    one(page, "#go").click()
    wait(page, lambda: find(page, "#history button"))
    assert share(picture(page), YELLOW) > 0.02 > share(picture(page), BLUE)
    choose(page, "ask")
    one(page, "#examples button").click()
    one(page, "#go").click()
    wait(page, lambda: len(find(page, "#history button")) == 2)
    assert "large red circle on the left" in text(page, "#answer")
    # what is said of the example picture is not offered for another one
    Image.new("RGB", (64, 64)).save(tmp_path / "own.png")
    one(page, "#files").send_keys(str(tmp_path / "own.png"))
    wait(page, lambda: not one(page, "#examples").is_displayed())
    while find(page, "#pictures button"):
        one(page, "#pictures button").click()
    one(page, "#examples button img")


def test_texts_and_pictures_in_turn(page, server):
    seen = []
    original = server.engine.submit
    server.engine.submit = lambda planned, *rest: seen.extend(planned) or original(planned, *rest)
    choose(page, "interleave")
    few_steps(page)
    write(page, "#seed", "1")
    write(page, "#max_think_tokens", "30")
    write(page, "#max_rounds", "2")
    Select(one(page, "#size")).select_by_index(1)
    run(page, "a large red circle in the center on a white background")
    server.engine.submit = original
    [(plan, _)] = seen
    assert (plan.rounds, plan.max_tokens, plan.options.width, plan.options.height) == (2, 30, 128, 96)
    shown = [element.tag_name for element in find(page, "#answer > *")]
    assert shown == ["p", "img"] * 2
    assert all(element.is_displayed() for element in find(page, "#answer img"))
    sizes = [int(element.get_property("naturalHeight")) for element in find(page, "#answer img")]
    assert sizes[0] == 96
    texts = [element.text for element in find(page, "#answer p")]
    assert texts[0]
    assert one(page, "#download").is_displayed()
    # what was made before is still there, and comes again
    choose(page, "draw")
    run(page, "a ring")
    assert not one(page, "#answer").is_displayed()
    find(page, "#history button")[-1].click()
    assert [element.text for element in find(page, "#answer p")] == texts
    one(page, "#repeat").click()
    wait(page, lambda: len(find(page, "#history button")) == 3)
    assert [element.text for element in find(page, "#answer p")] == texts


def test_by_keyboard_alone(page):
    body = one(page, "body")
    body.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("name") == "mode"
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(page, "#promptLabel") == "Your question"
    page.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)
    wait(page, lambda: page.switch_to.active_element.get_attribute("id") in ("files", "prompt"))
    one(page, "#prompt").send_keys("hello", Keys.CONTROL, Keys.ENTER)
    wait(page, lambda: find(page, "#history button"))
    assert text(page, "#answer")


def test_cancelling(page, server):
    server.runtime.open.clear()
    try:
        write(page, "#prompt", "a ring")
        one(page, "#go").click()
        wait(page, lambda: one(page, "#cancel").is_displayed())
        one(page, "#cancel").click()
        wait(page, lambda: text(page, "#status") == "Cancelled.")
        assert one(page, "#go").is_enabled()
    finally:
        server.runtime.open.set()
    wait(page, lambda: not server.engine.tickets)
    assert server.rows_in_use() == 0


def test_errors_are_one_line(page, server):
    choose(page, "edit")
    write(page, "#prompt", "make it green")
    one(page, "#go").click()
    assert text(page, "#error") == "Add a picture to edit."
    choose(page, "draw")
    server.runtime.failing["step"] = RuntimeError("device lost")
    try:
        one(page, "#go").click()
        wait(page, lambda: "the server failed on this request" in text(page, "#error"))
    finally:
        server.runtime.failing.clear()
    assert one(page, "#go").is_enabled()


def test_seeds_that_a_browser_would_round(page):
    write(page, "#prompt", "a ring")
    for seed, good in (("9007199254740993", False), ("9007199254740991", True), ("", True)):
        write(page, "#seed", seed)
        assert page.execute_script("return document.getElementById('form').checkValidity()") is good, seed
