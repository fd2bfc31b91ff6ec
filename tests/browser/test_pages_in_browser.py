"""A page in a real browser: attention at its word, sorting, filtering, keyboard, phone, a thousand photos."""

import json
import time

import numpy as np
import pytest
import skimage.data
from browser import BRIGHTEST, CONTRASTS, OVERLAPS, SIZES, Page, start_chromium, wait_for
from page_samples import METRICS, bump, drawn_photos, natural_photos, scored_photos, white_photo

from captioning.display.attention_figures import FULL_LIGHT, spotlight, upscale_attention
from captioning.display.html_page import PageCaption, PagePhoto, write_page

pytestmark = pytest.mark.browser

CORNERS = np.stack([bump(1, 1), bump(1, 12), bump(12, 12)])  # of the words one, two, three
PLACES = [(1.5 / 14, 1.5 / 14), (1.5 / 14, 12.5 / 14), (12.5 / 14, 12.5 / 14)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    running = start_chromium(tmp_path_factory.mktemp("chromium"))
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


def test_the_overlay_is_the_spotlight_that_the_figures_draw(show):
    image = skimage.data.astronaut()[::2, ::2]
    alphas = np.random.default_rng(0).dirichlet(np.ones(49), size=1)
    page = show([PagePhoto("a.png", image, [PageCaption("soft", ["woman"], alphas)])])
    page.run(
        "const c = document.body.appendChild(document.createElement('canvas')); c.id = 'seen';"
        "c.width = c.height = 256; c.getContext('2d').drawImage(document.querySelector('img'), 0, 0)"
    )
    seen = page.canvas("#seen")  # the JPEG as this browser decodes it
    page.click(".word")
    page.choose("look", "grid locations")
    light = upscale_attention(alphas.reshape(7, 7), (256, 256), smooth=False)
    expected = spotlight(seen, light, FULL_LIGHT / 49).astype(int)
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
        PagePhoto("dogless.jpg", image, [PageCaption("m", ["a", "red", "cat"], scores={"CIDEr": 0.5})], [["a", "dog"]]),
        PagePhoto("b.jpg", image, [PageCaption("m", ["two", "Dogs", "run"], scores={"CIDEr": 1.5})], [["a", "hotdog"]]),
        PagePhoto("c.jpg", image, [PageCaption("m", ["a", "hotdog"], scores={"CIDEr": 4.0})], [["food"]]),
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
            PagePhoto("a.jpg", image, [PageCaption("m", ["a", "cat"])]),
            PagePhoto("b.jpg", image, [PageCaption("m", [], np.ones((1, 4)))]),
        ]
    )
    assert [text.strip() for text in page.text(".words")] == ["a cat", "(no words)"]
    assert page.all("#metric") == page.all("canvas") == page.all("button.word") == []


def test_nothing_that_a_file_name_or_a_caption_holds_is_run(show):
    evil = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    alphas = np.full((1, 4), 0.25)
    page = show(
        [PagePhoto(evil, np.zeros((8, 8, 3), np.uint8), [PageCaption(evil, [evil], alphas)], [[evil]])],
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


def test_a_long_file_name_keeps_its_end(show):
    name = "holiday/" * 30 + "IMG_0042.jpg"
    page = show([PagePhoto(name, np.zeros((8, 8, 3), np.uint8), [PageCaption("m", ["a"])])])
    start, end = page.all(".card h2 span")
    assert end.text == name[-20:] and end.is_displayed()
    assert end.rect["x"] + end.rect["width"] <= page.all(".card")[0].rect["x"] + page.all(".card")[0].rect["width"]
    assert start.rect["width"] > 0
