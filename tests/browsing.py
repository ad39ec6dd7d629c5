"""The server's page in a headless Chromium."""

import contextlib
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no chromium and chromedriver here (Debian: chromium, chromium-driver)", allow_module_level=True)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


@contextlib.contextmanager
def chromium(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@contextlib.contextmanager
def watched(browser, url):
    """The page, freshly loaded; nothing of it may be refused by its own policy or fail in a script."""
    browser.get(url)
    wait(browser, lambda: find(browser, "#size option"))
    yield
    wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in wrong if "/v1/" not in message] == []  # a failed request is logged too


def find(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def wait(browser, good):
    return WebDriverWait(browser, 60, 0.05).until(lambda _: good())


def text(browser, selector):
    return one(browser, selector).text


def write(browser, selector, value):
    field = one(browser, selector)
    field.clear()
    field.send_keys(value)


def few_steps(browser):
    one(browser, "#more summary").click()
    write(browser, "#num_timesteps", "9")


def run(browser, prompt):
    before = len(find(browser, "#history button"))
    write(browser, "#prompt", prompt)
    one(browser, "#go").click()
    wait(browser, lambda: len(find(browser, "#history button")) > before)


def choose(browser, mode):
    one(browser, f"input[value={mode}]").find_element(By.XPATH, "..").click()
