"""The built-in dataset: its layout, and that captions and boxes say what the pictures show."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu
from PIL import Image

from captioning.preparation import shapes
from utils import UserError

SIZE_OF_WORD = {"small": "small", "little": "small", "": "medium", "large": "large", "big": "large"}
NUMBER_OF_WORD = {"a": 1, "an": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.create_shapes(folder, num_train=400, num_val=60, num_test=40, seed=3)
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return json.loads((folder / "dataset_shapes.json").read_text())["images"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_annotations_are_in_karpathys_layout(folder, images):
    assert json.loads((folder / "dataset_shapes.json").read_text())["dataset"] == "shapes"
    assert Counter(image["split"] for image in images) == {"train": 400, "val": 60, "test": 40}
    assert [image["imgid"] for image in images] == list(range(500))
    assert [sentid for image in images for sentid in image["sentids"]] == list(range(2500))
    for image in images:
        assert [sentence["sentid"] for sentence in image["sentences"]] == image["sentids"]
        for sentence in image["sentences"]:
            assert sentence["imgid"] == image["imgid"]
            assert sentence["tokens"] == sentence["raw"].lower().rstrip(".").split()
    with Image.open(folder / "images" / images[0]["filename"]) as photo:
        assert photo.size == (256, 256) and photo.mode == "RGB"


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        shapes.create_shapes(tmp_path / name, 4, 3, 2, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one.keys() == other.keys() and all(one[path] != other[path] for path in one)


def test_a_split_stays_the_same_when_another_grows(tmp_path):
    shapes.create_shapes(tmp_path / "few", 2, 3, 0)
    shapes.create_shapes(tmp_path / "many", 5, 3, 0)
    for i in range(3):
        photo = f"images/val_{i:05d}.jpg"
        assert (tmp_path / "few" / photo).read_bytes() == (tmp_path / "many" / photo).read_bytes()


def test_no_scene_is_drawn_twice(folder, images):
    assert len({(folder / "images" / image["filename"]).read_bytes() for image in images}) == len(images)


def test_boxes_are_tight_around_what_is_drawn(folder, images):
    for image in images:
        with Image.open(folder / "images" / image["filename"]) as photo:
            pixels = np.asarray(photo).astype(float)
        for color in {box["color"] for box in image["boxes"]}:
            near = np.linalg.norm(pixels - shapes.COLORS[color], axis=-1) < 45  # (256, 256)
            for x0, y0, x1, y1 in (box["box"] for box in image["boxes"] if box["color"] == color):
                ys, xs = np.nonzero(near[y0:y1, x0:x1])
                drawn = [x0 + xs.min(), y0 + ys.min(), x0 + xs.max() + 1, y0 + ys.max() + 1]
                assert np.abs(np.array(drawn) - [x0, y0, x1, y1]).max() <= 3, image["filename"]  # a tip is fainter
                near[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = False
            assert near.sum() == 0, f"{color} outside its boxes in {image['filename']}"


def test_objects_are_inside_the_picture_apart_and_as_large_as_said(images):
    for image in images:
        boxes = [box["box"] for box in image["boxes"]]
        assert 2 <= len(boxes) <= 4
        for i, (ax0, ay0, ax1, ay1) in enumerate(boxes):
            assert 0 <= ax0 < ax1 <= 256 and 0 <= ay0 < ay1 <= 256
            for bx0, by0, bx1, by1 in boxes[i + 1 :]:
                assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
        for box in image["boxes"]:
            x0, y0, x1, y1 = box["box"]
            low, high = shapes.SIZES[box["size"]]
            assert low - 2 <= max(x1 - x0, y1 - y0) <= high


def noun_phrases(words, boxes):
    """Find the objects that a stretch of a caption tells; each phrase must fit the boxes it names."""
    found = []
    pattern = rf"\b({'|'.join(NUMBER_OF_WORD)}) (?:(small|little|large|big) )?({'|'.join(shapes.COLORS)}) (\w+)"
    for number, size, color, noun in re.findall(pattern, words):
        named = [box for box in boxes if box["name"] == shapes.object_name(noun) and box["color"] == color]
        assert len(named) == NUMBER_OF_WORD[number], words
        assert {box["size"] for box in named} == {SIZE_OF_WORD[size]}, words
        found.append([box["box"] for box in named])
    return found


def holds(relation, these, those):
    """Tell whether all boxes of `these` stand in a relation to all of `those`."""
    checks = {
        "left of": lambda a, b: a[2] <= b[0],
        "right of": lambda a, b: a[0] >= b[2],
        "above": lambda a, b: a[3] <= b[1],
        "below": lambda a, b: a[1] >= b[3],
    }
    return all(checks[relation](a, b) for a in these for b in those)


def test_every_caption_is_true_and_names_every_object(images):
    synonyms = {"over": "above", "under": "below", "to the left of": "left of", "to the right of": "right of"}
    told = Counter()
    for image in images:
        for sentence in image["sentences"]:
            words = " ".join(sentence["tokens"])
            phrases = noun_phrases(words, image["boxes"])
            assert sum(map(len, phrases)) == len(image["boxes"])
            if "between" in words or "both sides" in words:
                a, b, c = phrases  # a between b and c; or a and b on both sides of c
                middle, first, last = (a, b, c) if "between" in words else (c, a, b)
                assert any(
                    holds(r, first, middle) and holds(r, middle, last) and holds(r, first, last)
                    for r in ("left of", "above")
                ), words
                told["between"] += 1
            else:
                (relation,) = re.findall(r"(?:to the )?(?:left|right) of|above|over|below|under", words)
                before, after = words.split(f" {relation} ")
                these, those = (sum(noun_phrases(half, image["boxes"]), []) for half in (before, after))
                relation = synonyms.get(relation, relation)
                assert these and those and holds(relation, these, those), words
                told[relation] += 1
    assert set(told) == {"left of", "right of", "above", "below", "between"}


def test_the_five_captions_differ_and_have_common_words(images):
    counts, lengths = Counter(), []
    for image in images:
        captions = [sentence["tokens"] for sentence in image["sentences"]]
        assert len({tuple(caption) for caption in captions}) == 5
        lengths += [len(caption) for caption in captions]
        if image["split"] == "train":
            counts.update(word for caption in captions for word in caption)
    assert min(counts.values()) > 5
    assert min(lengths) >= 8 and np.mean(lengths) < 15 and max(lengths) <= 20
    assert set(counts) >= {word for image in images for s in image["sentences"] for word in s["tokens"]}


def test_wording_is_predictable_but_only_from_the_right_facts(images):
    told = [[sentence["tokens"] for sentence in image["sentences"]] for image in images]
    hypotheses = [captions[0] for captions in told]
    references = [captions[1:] for captions in told]
    assert corpus_bleu(references, hypotheses) > 0.7  # one of a scene's captions against the others

    confused = []  # the right words, but each colour with the next object
    for caption, image in zip(hypotheses, images, strict=True):
        colors = list(dict.fromkeys(box["color"] for box in image["boxes"]))
        swap = dict(zip(colors, colors[1:] + colors[:1], strict=True))
        confused.append([swap.get(word, word) for word in caption])
    assert corpus_bleu(references, confused) < 0.45
    assert corpus_bleu(references, hypotheses[1:] + hypotheses[:1]) < 0.15  # another scene's caption


def test_the_words_for_objects_lead_to_their_boxes(images):
    for image in images:
        names = {box["name"] for box in image["boxes"]}
        for sentence in image["sentences"]:
            assert {shapes.object_name(word) for word in sentence["tokens"]} - {None} == names


def test_a_complete_dataset_is_kept_and_any_other_redrawn(tmp_path):
    path = shapes.create_shapes(tmp_path, 3, 1, 1)
    before, written = contents(tmp_path), path.stat().st_mtime_ns
    shapes.create_shapes(tmp_path, 3, 1, 1)
    assert path.stat().st_mtime_ns == written

    (tmp_path / "images" / "val_00000.jpg").unlink()
    shapes.create_shapes(tmp_path, 3, 1, 1)
    assert contents(tmp_path) == before

    path.write_text("{")
    shapes.create_shapes(tmp_path, 3, 1, 1)
    assert contents(tmp_path) == before

    shapes.create_shapes(tmp_path, 3, 1, 1, seed=1)
    assert contents(tmp_path) != before


def test_an_interrupted_run_leaves_no_annotations(tmp_path, monkeypatch):
    path = shapes.create_shapes(tmp_path, 2, 0, 0)
    draw_scene, drawn = shapes.draw_scene, []

    def stop_at_the_third(scene, rng):
        drawn.append(scene)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_scene(scene, rng)

    monkeypatch.setattr(shapes, "draw_scene", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        shapes.create_shapes(tmp_path, 4, 0, 0)
    assert not path.exists()


def test_settings_that_make_no_sense_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="num_val: -1"):
        shapes.create_shapes(tmp_path, 2, -1, 2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file") as error:
        shapes.create_shapes(tmp_path / "file", 2, 1, 1)
    assert "\n" not in str(error.value)


def test_the_script_says_what_it_made(tmp_path, capsys):
    shapes.main(shapes.Config(folder=str(tmp_path), num_train=2, num_val=1, num_test=0))
    assert "2 train, 1 val, 0 test" in capsys.readouterr().out
