"""A page in a headless Chromium, as a reader has it before them."""

import base64
import io
import shutil
import time

import numpy as np
import pytest
from PIL import Image

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

# Pairs of elements that cover one another, among those of the first three screens.
OVERLAPS = """
const leaves = [...document.querySelectorAll("body *")].filter((e) => !e.closest("template, script, option, svg")
    && !(e.tagName === "CANVAS" && e.closest(".stage"))
    && (["IMG", "CANVAS", "SELECT", "INPUT", "BUTTON"].includes(e.tagName)
        || (e.childElementCount === 0 && e.textContent.trim())));
const boxes = leaves.flatMap((e) => [...e.getClientRects()].map((r) => [e, r]))
  .filter(([, r]) => r.width > 1 && r.height > 1 && r.right > 0 && r.top < 3 * innerHeight);
const found = [];
for (const [i, [a, p]] of boxes.entries()) {
  for (const [b, q] of boxes.slice(i + 1)) {
    if (a.contains(b) || b.contains(a)) continue;
    const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (width > 1.5 && height > 1.5) found.push(`${a.outerHTML.slice(0, 90)} | ${b.outerHTML.slice(0, 90)}`);
  }
}
return [boxes.length, found];
"""

# How much each text stands out from the colour behind it, after WCAG 2.
CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const texts = [...document.querySelectorAll("body *")].filter((e) => !e.closest("template, script")
  && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length);
return texts.map((e) => {
  const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(behind(e))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 90)];
});
"""

# The brightest point of the attention that is drawn: its red, and where it is, from 0 to 1.
BRIGHTEST = """
const c = document.querySelector(".stage canvas"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
let best = [-1, 0, 0];
for (let i = 0; i < d.length; i += 4) {
  if (d[i] > best[0]) best = [d[i], Math.floor(i / 4 / c.width) / c.height, (i / 4 % c.width) / c.width];
}
return best;
"""


def start_chromium(folder):
    """Give a driver of a headless Chromium with its profile in `folder`; skip where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))


class Page:
    """An open page, as a reader has it before them."""

    def __init__(self, driver, path, width, dark=False):
        self.driver, (columns, rows), phone = driver, SIZES[width], width == "phone"
        metrics = {"width": columns, "height": rows, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get("about:blank")
        driver.get_log("performance")
        start = time.perf_counter()
        driver.get(path.as_uri())
        self.seconds = time.perf_counter() - start

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def names(self):
        return self.text(".card h2")

    def click(self, selector, at=0):
        element = self.all(selector)[at]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def choose(self, name, text):
        from selenium.webdriver.support.ui import Select

        Select(self.driver.find_element("id", name)).select_by_visible_text(text)

    def find(self, words):
        field = self.driver.find_element("id", "words")
        field.clear()
        field.send_keys(words)

    def hover(self, element):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def press(self, *keys):
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(getattr(Keys, key)).perform()

    def tap(self, element):
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        box = self.run(
            "const r = arguments[0].getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]", element
        )
        self.driver.execute_cdp_cmd(
            "Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": box[0], "y": box[1]}]}
        )
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def canvas(self, selector=".stage canvas"):
        """The canvas' pixels (H, W, 3) uint8, or None where there is none."""
        url = self.run("return document.querySelector(arguments[0])?.toDataURL() ?? null", selector)
        if url is None:
            return None
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))

    def save(self, path):
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
        path.write_bytes(base64.b64decode(picture))


def wait_for(condition, seconds=5):
    """A touch becomes a click a moment later."""
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.05)
    assert condition()
