"""app.py's page in a browser: a photo is dropped, captioned and lit; a broken file is explained; it fits a phone."""

import socket
import time

import numpy as np
import pytest
from browser import SIZES, start_chromium
from PIL import Image
from saved_model import save_model

pytest.importorskip("gradio", reason="gradio is not installed (requirements-app.txt)")

from app import Config, build_app, load_models, serve  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WAIT = 60  # seconds


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page of a small random model is served."""
    path = tmp_path_factory.mktemp("model") / "soft.pth"
    save_model(path, seed=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = build_app(load_models([path], "cpu"))
    serve(app, Config(port=port), wait=False)
    yield f"http://127.0.0.1:{port}"
    app.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = start_chromium(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(params=["desktop", "phone"])
def page(request, driver, address):
    """The driver with the page open, at the size of a desktop's or a phone's screen."""
    width, height = SIZES[request.param]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(address)
    return driver


def find(driver, selector):
    """Wait for an element."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        found = driver.find_elements("css selector", selector)
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"{selector} did not come")


def upload(driver, path):
    find(driver, "input[type=file]").send_keys(str(path))


def fits(driver):
    return driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_a_photo_is_captioned_and_lit_by_the_word_under_the_pointer(page, tmp_path):
    from selenium.webdriver import ActionChains

    Image.fromarray(np.full((80, 120, 3), 200, np.uint8)).save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    frame = find(page, "#captions iframe")
    assert fits(page)
    page.switch_to.frame(frame)
    word = find(page, "button.word")
    assert not page.find_elements("css selector", ".stage canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", word)
    ActionChains(page, duration=0).move_to_element(word).perform()
    find(page, ".stage canvas")
    assert fits(page)
    page.switch_to.default_content()


def test_a_broken_file_is_explained_in_one_sentence(page, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    upload(page, tmp_path / "broken.jpg")
    assert "broken.jpg: cannot be read as a photo" in find(page, "#captions [role=alert]").text
    assert fits(page)
