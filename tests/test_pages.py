"""A page of captions says what it was given, shows attention where it belongs, and needs nothing but itself."""

import base64
import io
import json
import re
import shutil
import time

import numpy as np
import pytest
import skimage.data
from PIL import Image

import shapes
from figures import spotlight, upscale_attention
from pages import Caption, Photo, build_page, write_page
from utils import UserError

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


# What goes in


def bump(row, column, side=14, share=1.0):
    """Attention on one place of the grid, `share` of it on the photo."""
    rows, columns = np.mgrid[:side, :side]
    weights = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 4)
    return share * (weights / weights.sum()).ravel()


def make_alphas(rng, words, side=14, shares=None):
    """A bump a word, and one for <end>, as the searches give them."""
    shares = np.ones(len(words) + 1) if shares is None else shares
    return np.stack([bump(*rng.integers(1, side - 1, 2), side, share) for share in shares])


def drawn_photos(number, models=("soft",), seed=0):
    """Photos of the built-in dataset, captioned with one of their references, with made-up attention and scores."""
    rng = np.random.default_rng(seed)
    photos = []
    for i in range(number):
        scene = shapes.make_scene(rng)
        image, _ = shapes.draw_scene(scene, rng)
        references = [caption.split() for caption in shapes.make_captions(scene, rng)]
        captions = []
        for model in models:
            words = references[rng.integers(5)]
            shares = rng.uniform(0.1, 1, len(words) + 1) if model == "adaptive" else None
            alphas = None if model == "show_and_tell" else make_alphas(rng, words, shares=shares)
            scores = {metric: float(rng.uniform(0, 1)) for metric in METRICS}
            captions.append(Caption(model, words, alphas, -float(rng.uniform(2, 12)), scores))
        photos.append(Photo(f"scene_{i:02d}.jpg", np.array(image), captions, references))
    return photos


def scored_photos(rows, names="abcdefgh"):
    """Grey photos with a caption a model, whose BLEU-4 is given: one row a photo, one column a model."""
    image = np.full((16, 16, 3), 128, dtype=np.uint8)
    return [
        Photo(
            name,
            image,
            [
                Caption(f"m{k}", ["word"], scores={} if score is None else {"BLEU-4": score})
                for k, score in enumerate(row)
            ],
        )
        for name, row in zip(names, rows, strict=False)
    ]


def content(page):
    """What the page's script will read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def cells(attention):
    """(T, P) bytes of a caption's attention."""
    return np.frombuffer(base64.b64decode(attention["cells"]), np.uint8).reshape(-1, attention["side"] ** 2)


# Without a browser


def test_the_page_holds_every_word_and_number_that_it_was_given():
    photos = drawn_photos(3, ("soft", "adaptive"))
    data = content(build_page(photos, "title"))
    assert data["models"] == ["soft", "adaptive"]
    assert data["metrics"] == list(METRICS)
    for photo, row in zip(photos, data["photos"], strict=True):
        assert row["name"] == photo.file_name
        assert row["references"] == [" ".join(words) for words in photo.references]
        for caption, told in zip(photo.captions, row["captions"], strict=True):
            assert told["words"] == caption.words
            assert told["logProb"] == pytest.approx(caption.log_prob, abs=1e-4)
            assert told["scores"] == pytest.approx([caption.scores[metric] for metric in METRICS], abs=1e-4)


def test_a_photo_is_in_the_page_once_as_a_small_jpeg():
    image = skimage.data.astronaut()  # 512 x 512
    page = build_page([Photo("a.png", image, [Caption("m", ["a"]), Caption("n", ["b"])])], "title")
    [row] = content(page)["photos"]
    assert page.count(row["jpeg"]) == 1
    jpeg = Image.open(io.BytesIO(base64.b64decode(row["jpeg"])))
    assert (jpeg.format, jpeg.size) == ("JPEG", (256, 256))
    smaller = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(np.asarray(jpeg) - smaller).mean() < 5


def test_a_photo_keeps_its_shape_and_is_never_enlarged():
    wide = np.zeros((100, 400, 3), np.uint8)
    small = np.zeros((20, 30, 3), np.uint8)
    rows = content(build_page([Photo("w", wide, []), Photo("s", small, [])], "title", photo_size=200))["photos"]
    assert [Image.open(io.BytesIO(base64.b64decode(row["jpeg"]))).size for row in rows] == [(200, 50), (30, 20)]


def test_attention_is_a_byte_a_cell_and_can_be_read_back():
    alphas = np.random.default_rng(0).dirichlet(np.ones(49), size=4)  # (T, P)
    [row] = content(build_page([Photo("a", np.zeros((8, 8, 3), np.uint8), [Caption("m", list("wxyz"), alphas)])], "t"))[
        "photos"
    ]
    attention = row["captions"][0]["attention"]
    assert attention["side"] == 7
    assert attention["betas"] is None  # all attention is on the photo
    back = cells(attention) / 255 * np.array(attention["peaks"])[:, None]
    assert np.abs(back - alphas).max() < alphas.max() / 400  # half a step of 255, and the peak's rounding


def test_what_attention_lacks_to_one_is_beta():
    alphas = np.stack([bump(3, 3, share=0.25), bump(9, 9, share=1.0), np.zeros(196)])
    photo = Photo("a", np.zeros((8, 8, 3), np.uint8), [Caption("adaptive", list("abc"), alphas)])
    attention = content(build_page([photo], "t"))["photos"][0]["captions"][0]["attention"]
    assert attention["betas"] == pytest.approx([0.75, 0, 1], abs=1e-3)
    assert cells(attention).max(axis=1).tolist() == [255, 255, 0]  # a word that did not look at all stays dark


def test_half_precision_attention_has_no_beta():
    alphas = np.random.default_rng(0).dirichlet(np.ones(196), size=3).astype(np.float16)
    photo = Photo("a", np.zeros((8, 8, 3), np.uint8), [Caption("m", list("abc"), alphas)])
    assert content(build_page([photo], "t"))["photos"][0]["captions"][0]["attention"]["betas"] is None


def test_the_row_of_end_is_left_out_and_any_other_mismatch_is_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    alphas = np.random.default_rng(0).dirichlet(np.ones(9), size=4)
    photo = Photo("a", image, [Caption("m", ["a", "b", "c"], alphas)])
    assert cells(content(build_page([photo], "t"))["photos"][0]["captions"][0]["attention"]).shape == (3, 9)
    empty = Photo("a", image, [Caption("m", [], alphas[:1])])  # <end> came first
    assert cells(content(build_page([empty], "t"))["photos"][0]["captions"][0]["attention"]).shape == (0, 9)
    with pytest.raises(ValueError, match="2 words do not fit attention for 4"):
        build_page([Photo("a", image, [Caption("m", ["a", "b"], alphas)])], "t")
    with pytest.raises(ValueError, match="square"):
        build_page([Photo("a", image, [Caption("m", ["a", "b"], alphas[:2, :8])])], "t")


def test_numbers_that_json_cannot_hold_are_left_out():
    caption = Caption("m", ["a"], log_prob=float("-inf"), scores={"BLEU-4": float("nan"), "CIDEr": 1.5})
    page = build_page([Photo("a", np.zeros((8, 8, 3), np.uint8), [caption])], "t")
    [told] = content(page)["photos"][0]["captions"]
    assert (told["logProb"], told["scores"]) == (None, [None, 1.5])


def test_a_generator_of_photos_will_do_and_nothing_given_is_changed():
    photos = drawn_photos(3)
    assert build_page((photo for photo in photos), "title") == build_page(photos, "title")
    assert all(photo.image.shape == (256, 256, 3) for photo in photos)


def test_a_photo_may_lack_a_model_but_not_have_it_twice():
    image = np.zeros((8, 8, 3), np.uint8)
    photos = [Photo("a", image, [Caption("m", ["x"])]), Photo("b", image, [Caption("n", ["y"])])]
    rows = content(build_page(photos, "t"))["photos"]
    assert [[bool(caption) for caption in row["captions"]] for row in rows] == [[True, False], [False, True]]
    with pytest.raises(ValueError, match="two captions"):
        build_page([Photo("a", image, [Caption("m", ["x"]), Caption("m", ["y"])])], "t")


def test_no_photos_are_an_error():
    with pytest.raises(ValueError, match="none to show"):
        build_page([], "title")


def test_nothing_can_break_out_of_its_place(tmp_path):
    evil = "</script><script>window.hacked = 1</script><img src=x onerror=hacked=1>{{ 7 * 7 }}"
    page = build_page([Photo(evil, np.zeros((8, 8, 3), np.uint8), [Caption(evil, [evil])], [[evil]])], evil, [evil])
    assert "<script>window" not in page
    assert "<img src=x" not in page
    assert "49" not in re.sub(r'id="data">.*?</script>|sha256-[^\']*', "", page, flags=re.DOTALL)
    data = content(page)
    assert data["models"] == [data["photos"][0]["name"]] == data["photos"][0]["references"] == [evil]


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_page(path, drawn_photos(1), "one")
    before = path.read_bytes()
    good, bad = drawn_photos(2)
    bad.image = bad.image.astype(float)
    with pytest.raises(ValueError, match="uint8"):
        write_page(path, [good, bad], "two")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_only_an_html_file_is_written(tmp_path):
    with pytest.raises(UserError, match=r"page\.txt: '\.txt' found"):
        write_page(tmp_path / "page.txt", drawn_photos(1), "title")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_page(tmp_path / "folder.html", drawn_photos(1), "title")


def test_names_that_are_no_unicode_text_do_not_stop_the_page(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    photo = Photo(name, np.zeros((8, 8, 3), np.uint8), [Caption("m", ["a"])])
    write_page(tmp_path / "page.html", [photo], name)
    assert content((tmp_path / "page.html").read_text(encoding="utf-8"))["photos"][0]["name"] == name


# In a browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

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

BRIGHTEST = """
const c = document.querySelector(".stage canvas"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
let best = [-1, 0, 0];
for (let i = 0; i < d.length; i += 4) {
  if (d[i] > best[0]) best = [d[i], Math.floor(i / 4 / c.width) / c.height, (i / 4 % c.width) / c.width];
}
return best;
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield running
    running.quit()


@pytest.fixture
def show(driver, tmp_path):
    """A function that writes a page, opens it from its file at the width of a desktop or a phone, and gives a Page."""

    def write_and_open(photos, width="desktop", dark=False, **options):
        path = tmp_path / "page.html"
        write_page(path, photos, **{"title": "A page"} | options)
        return Page(driver, path, width, dark)

    yield write_and_open
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    errors = [entry["message"] for entry in driver.get_log("browser")]
    assert not errors, f"the page complained: {errors}"


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


def white_photo(alphas, model="soft", words=("one", "two", "three")):
    """A white photo: what is lit on it is where the attention is."""
    return Photo("white.jpg", np.full((64, 64, 3), 255, np.uint8), [Caption(model, list(words), alphas)])


CORNERS = np.stack([bump(1, 1), bump(1, 12), bump(12, 12)])  # of the words one, two, three
PLACES = [(1.5 / 14, 1.5 / 14), (1.5 / 14, 12.5 / 14), (12.5 / 14, 12.5 / 14)]


def assert_lit(page, word):
    _, *place = page.run(BRIGHTEST)
    assert place == pytest.approx(PLACES[word], abs=0.06)


def test_hovering_a_word_lights_where_the_model_looked_and_leaving_it_brings_the_photo_back(show):
    page = show([white_photo(CORNERS)])
    assert page.canvas() is None
    for i, word in enumerate(page.all(".word")):
        page.hover(word)
        assert_lit(page, i)
        assert page.text(".reading")[0].startswith(word.text)
    page.hover(page.all("h1")[0])
    assert page.canvas() is None
    assert page.text(".reading") == [""]


def test_a_clicked_word_stays_until_it_is_clicked_again_or_escape_is_pressed(show):
    page = show([white_photo(CORNERS)])
    page.click(".word", 2)
    page.hover(page.all(".word")[0])
    assert_lit(page, 0)
    page.hover(page.all("h1")[0])
    assert_lit(page, 2)
    page.click(".word", 2)
    page.hover(page.all("h1")[0])
    assert page.canvas() is None
    page.click(".word", 1)
    page.press("ESCAPE")
    page.hover(page.all("h1")[0])
    assert page.canvas() is None


def test_the_keyboard_reaches_every_word_with_one_tab_stop_a_caption(show):
    page = show([white_photo(CORNERS), white_photo(CORNERS[::-1])])
    focused = "return document.activeElement.firstChild?.textContent ?? ''"
    page.run("document.getElementById('look').focus()")
    page.press("TAB")
    assert page.run(focused) == "one"
    assert_lit(page, 0)
    page.press("ARROW_RIGHT")
    assert page.run(focused) == "two"
    assert_lit(page, 1)
    page.press("END")
    assert_lit(page, 2)
    page.press("ARROW_RIGHT")  # there is no next word
    assert_lit(page, 2)
    page.press("ENTER", "HOME", "ARROW_DOWN")
    assert_lit(page, 2)  # the first photo keeps what Enter chose
    assert page.run("return document.activeElement.closest('.card') === document.querySelectorAll('.card')[1]")
    page.press("TAB")
    assert "All words" in page.run(focused)
    assert page.run("return document.querySelectorAll('.words [tabindex=\"0\"]').length") == 2


def test_tapping_a_word_shows_and_hides_attention(show):
    page = show([white_photo(CORNERS)], "phone")
    for i in (0, 2):
        page.tap(page.all(".word")[i])
        wait_for(lambda: page.canvas() is not None)
        assert_lit(page, i)
    page.tap(page.all(".word")[2])
    wait_for(lambda: page.canvas() is None)


def wait_for(condition, seconds=5):
    """A touch becomes a click a moment later."""
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.05)
    assert condition()


def test_the_overlay_is_the_spotlight_that_the_figures_draw(show):
    image = skimage.data.astronaut()[::2, ::2]
    alphas = np.random.default_rng(0).dirichlet(np.ones(49), size=1)
    page = show([Photo("a.png", image, [Caption("soft", ["woman"], alphas)])])
    page.run(
        "const c = document.body.appendChild(document.createElement('canvas')); c.id = 'seen';"
        "c.width = c.height = 256; c.getContext('2d').drawImage(document.querySelector('img'), 0, 0)"
    )
    seen = page.canvas("#seen")  # the JPEG as this browser decodes it
    page.click(".word")
    page.choose("look", "grid cells")
    light = upscale_attention(alphas.reshape(7, 7), (256, 256), smooth=False)
    expected = spotlight(seen, light).astype(int)
    off = np.abs(page.canvas().astype(int) - expected)
    assert off.max() <= 2  # weights are bytes here
    page.choose("look", "spotlight")
    smooth = spotlight(seen, upscale_attention(alphas.reshape(7, 7), (256, 256))).astype(int)
    assert np.abs(page.canvas().astype(int) - smooth).mean() < 4  # another spline
    page.choose("look", "heat map")
    heat = page.canvas().astype(int)
    assert (heat[light == light.max()][:, 0] - heat[light == light.max()][:, 2]).mean() > 100  # red to yellow


def test_adaptive_attention_shows_beta_below_each_word(show):
    alphas = np.stack([bump(3, 3, share=0.25), bump(9, 9, share=0.9)])
    page = show([white_photo(alphas, "adaptive", ["the", "dog"])])
    assert page.text(".word small") == ["β 0.75", "β 0.10"]
    page.hover(page.all(".word")[0])
    assert page.text(".reading") == ["the 25 % from the photo, β 75 %"]
    assert "β is the share" in page.text(".hint")[0]


def test_soft_attention_shows_no_beta(show):
    page = show([white_photo(CORNERS)])
    assert page.text(".word small") == []
    assert "β" not in page.text(".hint")[0]


def test_all_words_can_be_seen_at_once(show):
    page = show([white_photo(CORNERS)])
    page.click(".unroll")
    assert page.text(".strip figcaption") == ["one", "two", "three"]
    lit = page.run("return [...document.querySelectorAll('.strip canvas')].map((c) => c.toDataURL())")
    assert len(set(lit)) == 3
    page.click(".unroll")
    assert page.all(".strip") == []


def test_photos_sort_by_score_and_those_without_one_come_last(show):
    page = show(scored_photos([[0.5], [0.1], [None], [0.9]]))
    assert page.names() == ["a", "b", "c", "d"]
    page.click('[data-order="best"]')
    assert page.names() == ["d", "a", "b", "c"]
    page.click('[data-order="worst"]')
    assert page.names() == ["b", "a", "d", "c"]
    page.click('[data-order="given"]')
    assert page.names() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("metric", [*METRICS, "log-probability"])
def test_photos_sort_by_each_metric(show, metric):
    photos = drawn_photos(6)
    values = [photo.captions[0].scores.get(metric, photo.captions[0].log_prob) for photo in photos]
    page = show(photos)
    page.choose("metric", metric)  # asks for the best first
    expected = [photos[i].file_name for i in np.argsort(values)]
    if metric != METRICS[0]:  # the first one is chosen already: nothing changes by choosing it
        assert page.names() == expected[::-1]
    page.click('[data-order="worst"]')
    assert page.names() == expected


def test_several_models_sort_by_one_by_their_mean_and_by_their_difference(show):
    page = show(scored_photos([[0.1, 0.9], [0.8, 0.7], [0.3, 0.2]]))
    page.click('[data-order="best"]')
    assert page.names() == ["b", "a", "c"]  # means 0.75, 0.5, 0.25
    page.choose("model", "widest gap")
    assert page.names()[0] == "a"
    page.choose("model", "m0")
    assert page.names() == ["b", "c", "a"]
    page.choose("model", "m1")
    assert page.names() == ["a", "b", "c"]


def test_random_order_is_another_each_time_and_loses_no_photo(show):
    page = show(scored_photos([[0.5]] * 20, names="abcdefghijklmnopqrst"))
    seen = []
    for _ in range(3):
        page.click('[data-order="random"]')
        seen.append("".join(page.names()))
        assert sorted(seen[-1]) == list("abcdefghijklmnopqrst")
    assert len(set(seen)) == 3
    page.find("wor")  # a filter keeps the order
    assert "".join(page.names()) == seen[-1]


def test_a_word_filters_captions_references_or_file_names(show):
    image = np.zeros((16, 16, 3), np.uint8)
    photos = [
        Photo("dogless.jpg", image, [Caption("m", ["a", "red", "cat"], scores={"CIDEr": 0.5})], [["a", "dog"]]),
        Photo("b.jpg", image, [Caption("m", ["two", "Dogs", "run"], scores={"CIDEr": 1.5})], [["a", "hotdog"]]),
        Photo("c.jpg", image, [Caption("m", ["a", "hotdog"], scores={"CIDEr": 4.0})], [["food"]]),
    ]
    page = show(photos)
    assert page.text("#count") == ["3 photos"]
    assert page.text(".summary td:last-child")[-1] == "2.000"
    page.find("dog")
    assert page.names() == ["b.jpg"]  # the start of a word, in any case
    assert page.text(".hit") == ["Dogs"]
    assert page.text("#count") == ["1 of 3 photos"]
    assert page.text(".summary td:last-child")[-1] == "1.500"
    page.choose("scope", "references")
    assert page.names() == ["dogless.jpg"]
    assert page.text("mark") == ["dog"]
    page.choose("scope", "file names")
    assert page.names() == ["dogless.jpg"]
    page.choose("scope", "captions")
    page.find("a cat")  # every word must be there
    assert page.names() == ["dogless.jpg"]
    page.find("zebra")
    assert page.names() == []
    assert "No photo has that" in page.text("#end")[0]
    page.find(" ")
    assert page.names() == ["dogless.jpg", "b.jpg", "c.jpg"]


def test_models_stand_side_by_side_and_the_best_is_marked(show):
    photos = drawn_photos(2, ("soft", "adaptive", "show_and_tell"))
    page = show(photos)
    tops = page.run(
        "const captions = document.querySelector('.card').querySelectorAll('.caption');"
        "return [...captions].map((caption) => caption.getBoundingClientRect().top)"
    )
    assert len(tops) == 3
    assert len(set(tops)) == 1
    scores = [caption.scores["BLEU-4"] for caption in photos[0].captions]
    wins = page.run(
        "return [...document.querySelector('.card').querySelectorAll('.scores')]"
        ".map((s) => s.firstChild.classList.contains('wins'))"
    )
    assert wins == [score == max(scores) for score in scores]
    assert page.all(".caption:nth-child(3) button.word") == []  # no attention, nothing to point at
    means = page.text(".summary tbody tr:first-child td")
    expected = [np.mean([photo.captions[0].scores[metric] for photo in photos]) for metric in METRICS]
    assert [float(mean) for mean in means] == pytest.approx(expected, abs=6e-4)


def test_a_folder_of_photos_without_references_and_scores_makes_a_page_too(show):
    photos = drawn_photos(2)
    for photo in photos:
        photo.references = []
        photo.captions[0].scores = {}
    page = show(photos)
    assert page.text("#metric option")[-1].strip() == "log-probability"
    assert page.all(".summary table") == []
    assert not any(details.is_displayed() for details in page.all(".references"))
    page.click('[data-order="best"]')
    best = max(photos, key=lambda photo: photo.captions[0].log_prob)
    assert page.names()[0] == best.file_name


def test_a_page_of_bare_captions_works(show):
    image = np.zeros((16, 16, 3), np.uint8)
    page = show(
        [
            Photo("a.jpg", image, [Caption("m", ["a", "cat"])]),
            Photo("b.jpg", image, [Caption("m", [], np.ones((1, 4)))]),
        ]
    )
    assert [text.strip() for text in page.text(".words")] == ["a cat", "(no words)"]
    assert page.all("#metric") == page.all("canvas") == page.all("button.word") == []


def test_nothing_that_a_file_name_or_a_caption_holds_is_run(show):
    evil = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    alphas = np.full((1, 4), 0.25)
    page = show(
        [Photo(evil, np.zeros((8, 8, 3), np.uint8), [Caption(evil, [evil], alphas)], [[evil]])],
        title=evil,
        notes=[evil],
    )
    page.click(".word")
    page.click(".unroll")
    assert page.text("h1") == page.names() == page.text(".word") == page.text(".strip figcaption") == [evil]
    assert page.run("return window.hacked ?? null") is None
    # The page's own policy refuses scripts that are not its own, wherever they might come from.
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.hacked = 1\">')")
    time.sleep(0.2)
    assert page.run("return window.hacked ?? null") is None
    assert any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser"))


def test_the_page_asks_the_network_for_nothing(show, tmp_path):
    page = show(drawn_photos(3))
    page.click(".word")
    page.click(".unroll")
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert (tmp_path / "page.html").as_uri() in asked
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file:")] == [(tmp_path / "page.html").as_uri()]


@pytest.mark.parametrize(
    "models", [("soft",), ("a_long_name_of_a_run", "adaptive", "show_and_tell")], ids=["one", "three"]
)
@pytest.mark.parametrize("width", SIZES)
def test_nothing_overlaps_or_sticks_out(show, tmp_path, width, models):
    photos = drawn_photos(6, models)
    photos[1].file_name = "a_file_name_without_any_place_to_break_" * 4 + ".jpg"
    photos[1].captions[0].words[0] = "honorificabilitudinitatibus" * 3
    page = show(photos, width, title="6 of 500 photos of VAL, beam 5", notes=["soft: a line about the model " * 4])
    for card in page.all(".card"):
        page.run("arguments[0].querySelectorAll('button.word')[3].click()", card)
    page.click(".unroll")
    page.run("document.querySelectorAll('details').forEach((d) => (d.open = true)); window.scrollTo(0, 0)")
    page.save(tmp_path / f"{width}_{len(models)}_top.png")
    assert page.run("return document.documentElement.scrollWidth") <= SIZES[width][0]
    number, overlaps = page.run(OVERLAPS)
    assert number > 40
    assert overlaps == []
    page.run("document.querySelector('.card').scrollIntoView()")
    page.save(tmp_path / f"{width}_{len(models)}_card.png")


@pytest.mark.parametrize("width", SIZES)
def test_what_the_keyboard_reaches_is_never_hidden_below_what_stays_in_sight(show, width):
    page = show(drawn_photos(4, ("soft", "adaptive")), width)
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    hidden = page.run(
        """
        const found = [];
        for (const e of [...document.querySelectorAll(".card button, .card summary")].reverse()) {
          e.focus();
          const r = e.getBoundingClientRect();
          const top = document.elementFromPoint(r.x + Math.min(10, r.width / 2), r.y + r.height / 2);
          if (!e.contains(top)) found.push(`${e.outerHTML.slice(0, 80)} is below ${top?.outerHTML.slice(0, 80)}`);
        }
        return found;
        """
    )
    assert hidden == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(show, tmp_path, dark):
    page = show(drawn_photos(3, ("soft", "adaptive", "show_and_tell")), dark=dark, notes=["a line"])
    page.find("a")
    page.click(".word", 1)
    page.hover(page.all(".word")[2])
    page.click(".unroll")
    contrasts = page.run(CONTRASTS)
    page.save(tmp_path / "page.png")
    assert len(contrasts) > 60
    assert [text for contrast, text in contrasts if contrast < 4.5] == []


def test_words_are_large_enough_for_a_thumb(show):
    page = show(drawn_photos(1, ("soft", "adaptive")), "phone")
    heights = page.run("return [...document.querySelectorAll('button')].map((b) => b.getBoundingClientRect().height)")
    assert min(heights) >= 32  # WCAG 2.2 asks for 24


def natural_photos(number, models):
    """Crops of real photos, all different: drawn scenes would make smaller JPEGs than a user's photos."""
    rng = np.random.default_rng(0)
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    for i in range(number):
        source = sources[i % 3]
        top, left = (rng.integers(0, length - 255) for length in source.shape[:2])
        words = [f"word{j}" for j in rng.integers(0, 500, 11)]
        captions = [
            Caption(model, words, make_alphas(rng, words), -5.0, {m: float(rng.uniform()) for m in METRICS})
            for model in models
        ]
        yield Photo(f"{i:04d}.jpg", source[top : top + 256, left : left + 256], captions, [words] * 5)


def test_a_thousand_photos_open_and_scroll(show, tmp_path, capsys):
    start = time.perf_counter()
    page = show(natural_photos(1000, ["soft", "hard"]))
    written = time.perf_counter() - start - page.seconds
    size = (tmp_path / "page.html").stat().st_size
    assert size < 50e6
    assert 0 < len(page.names()) < 100  # the others wait until the reader comes near
    assert page.text("#count") == ["1,000 photos"]

    start = time.perf_counter()
    page.click('[data-order="worst"]')
    sorting = time.perf_counter() - start
    start = time.perf_counter()
    shown = "window.scrollTo(0, document.body.scrollHeight); return document.querySelectorAll('.card').length"
    while page.run(shown) < 1000 and time.perf_counter() - start < 120:
        time.sleep(0.02)
    scrolling = time.perf_counter() - start
    assert len(set(page.names())) == 1000
    page.hover(page.all(".word")[-1])
    assert page.canvas() is not None
    with capsys.disabled():
        print(
            f"\n1,000 photos, 2 models: {size / 1e6:.1f} MB, written in {written:.1f} s, "
            f"opened in {page.seconds:.2f} s, sorted in {sorting:.2f} s, scrolled to the end in {scrolling:.1f} s"
        )
