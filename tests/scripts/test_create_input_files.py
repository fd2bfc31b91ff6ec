"""Preprocessing makes the field's files from any annotations, and nothing that looks like them when it fails."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_dataset import color, config, load, load_images, make_dataset

import create_input_files
from captioning.command_line import parse_args
from create_input_files import Config, main
from utils import UserError


def test_the_files_hold_what_the_tutorials_hold(tmp_path):
    annotated = make_dataset(tmp_path)
    main(config(tmp_path))
    word_map = load(tmp_path, "WORDMAP")
    assert word_map["<pad>"] == 0
    assert sorted(word_map.values()) == list(range(len(word_map)))
    assert [word_map[word] for word in ("<unk>", "<start>", "<end>")] == [len(word_map) - n for n in (3, 2, 1)]
    words = {i: word for word, i in word_map.items()}
    for split, name, count in (("TRAIN", "train", 8), ("VAL", "val", 2), ("TEST", "test", 2)):
        expected = [image for image in annotated if image["split"] == name]
        images, captions_per_image = load_images(tmp_path, split)
        captions, lengths = load(tmp_path, f"{split}_CAPTIONS"), load(tmp_path, f"{split}_CAPLENS")
        references = load(tmp_path, f"{split}_REFERENCES")
        assert captions_per_image == 5
        assert images.shape == (count, 3, 16, 16)
        assert images.dtype == np.uint8
        assert len(captions) == len(lengths) == 5 * count
        assert {len(caption) for caption in captions} == {10}
        for i, (image, reference) in enumerate(zip(expected, references, strict=True)):
            assert (images[i] == np.array(color(int(image["filename"][:-4]))).reshape(3, 1, 1)).all()
            tokens = [sentence["tokens"] for sentence in image["sentences"]]
            assert reference == {"image_id": image["imgid"], "file_name": image["filename"], "captions": tokens}
            stored = []
            for caption, length in zip(captions[5 * i : 5 * i + 5], lengths[5 * i : 5 * i + 5], strict=True):
                assert words[caption[0]] == "<start>"
                assert words[caption[length - 1]] == "<end>"
                assert set(caption[length:]) <= {0}
                stored.append([words[id] for id in caption[1 : length - 1]])
            assert sorted(stored) == sorted(tokens)


def test_the_word_map_counts_the_training_captions_only_and_needs_more_than_the_minimum(tmp_path):
    sentence = [{"tokens": ["twice", "thrice"]}, {"tokens": ["twice", "thrice"]}, {"tokens": ["thrice"]}]
    held_out = [{"tokens": ["unseen"] * 5}]
    make_dataset(tmp_path, "TVX", _0={"sentences": sentence}, _1={"sentences": held_out}, _2={"sentences": held_out})
    main(config(tmp_path))
    word_map = load(tmp_path, "WORDMAP")
    assert word_map == {"thrice": 1, "<unk>": 2, "<start>": 3, "<end>": 4, "<pad>": 0}
    assert load(tmp_path, "VAL_CAPTIONS")[0] == [3, 2, 2, 2, 2, 2, 4, 0, 0, 0]


def test_a_photo_with_more_captions_gives_some_of_them_and_one_with_fewer_repeats_its_own(tmp_path):
    few = [{"tokens": ["a", "dog"]}, {"tokens": ["a", "cat"]}]
    many = [{"tokens": ["a"] * n} for n in range(1, 9)]
    make_dataset(tmp_path, "TTTV", _0={"sentences": few}, _1={"sentences": many})
    main(config(tmp_path, min_word_freq=0))
    lengths = load(tmp_path, "TRAIN_CAPLENS", min_word_freq=0)
    captions = load(tmp_path, "TRAIN_CAPTIONS", min_word_freq=0)
    assert len({tuple(caption) for caption in captions[:5]}) == 2
    assert len(set(lengths[5:10])) == 5  # no caption twice
    assert [len(photo["captions"]) for photo in load(tmp_path, "TRAIN_REFERENCES", min_word_freq=0)] == [2, 8, 5]


def test_too_long_captions_stay_references_and_a_photo_with_no_other_is_named(tmp_path, capsys):
    long, short = {"tokens": ["dog"] * 9}, {"tokens": ["dog"] * 8}
    make_dataset(
        tmp_path,
        "TTTTV",
        _0={"sentences": [long, short, {"tokens": []}]},
        _1={"sentences": [long]},
        _2={"sentences": []},
    )
    main(config(tmp_path))
    references = load(tmp_path, "TRAIN_REFERENCES")
    assert [photo["file_name"] for photo in references] == ["0.png", "3.png"]
    assert references[0]["captions"] == [["dog"] * 9, ["dog"] * 8]
    assert load(tmp_path, "TRAIN_CAPLENS")[:5] == [10] * 5
    assert report(tmp_path) == [
        ("1.png", "has no caption of 1 to 8 words"),
        ("2.png", "has no caption of 1 to 8 words"),
    ]
    assert "Photos without a usable caption: 2" in capsys.readouterr().out


def report(folder):
    with (folder / "out" / "UNREADABLE_own_5_cap_per_img_2_min_word_freq.csv").open(newline="") as file:
        return [(row["file_name"], row["reason"]) for row in csv.DictReader(file)]


def test_a_missing_and_a_damaged_photo_are_skipped_reported_and_counted(tmp_path, capsys):
    make_dataset(tmp_path, "TTTTVVX")
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "2.png").write_bytes(b"no photo")
    (tmp_path / "images" / "4.png").write_bytes((tmp_path / "images" / "4.png").read_bytes()[:60])
    main(config(tmp_path, max_unreadable=0.5))
    images, _ = load_images(tmp_path, "TRAIN")
    assert [tuple(image[:, 0, 0]) for image in images] == [color(0), color(3)]
    assert load_images(tmp_path, "VAL")[0].shape == (1, 3, 16, 16)
    assert [photo["file_name"] for photo in load(tmp_path, "TRAIN_REFERENCES")] == ["0.png", "3.png"]
    assert len(load(tmp_path, "TRAIN_CAPTIONS")) == 10
    assert [name for name, _ in report(tmp_path)] == ["1.png", "2.png", "4.png"]
    assert "Missing or damaged photos: 3" in capsys.readouterr().out

    # Mended: the next run leaves no report behind.
    make_dataset(tmp_path, "TTTTVVX")
    main(config(tmp_path))
    assert not list((tmp_path / "out").glob("UNREADABLE*"))


def test_more_unreadable_photos_than_allowed_end_the_run_and_leave_the_report_alone(tmp_path):
    make_dataset(tmp_path, "T" * 19 + "V")
    (tmp_path / "images" / "1.png").write_bytes(b"no photo")
    with pytest.raises(UserError, match="1 of 20 photos .* at most 1.0% .*UNREADABLE"):
        main(config(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["UNREADABLE_own_5_cap_per_img_2_min_word_freq.csv"]
    main(config(tmp_path, max_unreadable=0.05))


def test_a_split_without_photos_is_left_out_and_said_so(tmp_path, capsys):
    make_dataset(tmp_path, "TTTTVV")
    main(config(tmp_path))
    assert "TEST has no photos, so no files are written for it" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("TEST*"))


def test_restval_is_trained_on_and_boxes_reach_the_references(tmp_path):
    boxes = [{"name": "dog", "box": [1, 2, 3, 4]}]
    make_dataset(tmp_path, "TRV", _1={"boxes": boxes, "cocoid": 9})
    main(config(tmp_path))
    _, photo = load(tmp_path, "TRAIN_REFERENCES")
    assert (photo["boxes"], photo["image_id"]) == (boxes, 9)


def test_photos_in_the_folders_of_coco_are_found(tmp_path):
    captions = [{"image_id": i, "caption": "a dog runs"} for i in range(4)]
    for name, ids, place in (("train2017", [0, 1, 2], "train2017"), ("val2017", [3], ".")):
        (tmp_path / "images" / place).mkdir(parents=True, exist_ok=True)
        for i in ids:
            Image.new("RGB", (30, 30), color(i)).save(tmp_path / "images" / place / f"{i}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in ids],
            "annotations": [caption for caption in captions if caption["image_id"] in ids],
        }
        (tmp_path / f"captions_{name}.json").write_text(json.dumps(content))
    files = tuple(str(tmp_path / f"captions_{name}.json") for name in ("train2017", "val2017"))
    main(config(tmp_path, annotations=files))
    assert len(load(tmp_path, "TRAIN_CAPTIONS")) == 15
    assert load(tmp_path, "VAL_REFERENCES")[0]["image_id"] == 3


def test_an_own_table_is_all_that_is_needed(tmp_path):
    make_dataset(tmp_path)
    (tmp_path / "own.csv").write_text("image,caption\n" + "".join(f"{i}.png,A dog runs!\n" for i in range(12)))
    main(config(tmp_path, annotations=(str(tmp_path / "own.csv"),)))
    counts = [len(load(tmp_path, f"{split}_REFERENCES")) for split in ("TRAIN", "VAL", "TEST")]
    assert counts == [10, 1, 1]


def test_without_annotations_the_built_in_dataset_is_made(tmp_path, monkeypatch):
    make_dataset(tmp_path / "data" / "shapes")
    monkeypatch.setattr(create_input_files, "create_shapes", lambda folder, seed: Path(folder) / "dataset.json")
    monkeypatch.chdir(tmp_path)
    main(Config(workers=0, image_size=8))
    assert Path("data/shapes/WORDMAP_shapes_5_cap_per_img_5_min_word_freq.json").exists()


WRONG = {
    "captions_per_image": ({"captions_per_image": 0}, "captions_per_image: 0 found"),
    "captions without end": ({"captions_per_image": 10**6}, "captions_per_image: 1000000 found, .* from 1 to 1,000"),
    "max_len": ({"max_len": 0}, "max_len: 0 found"),
    "image_size": ({"image_size": -1}, "image_size: -1 found"),
    "a photo like a wall": ({"image_size": 3_000_000}, "image_size: 3000000 found, .* from 1 to 4,096"),
    "workers": ({"workers": -2}, "workers: -2 found"),
    "max_unreadable": ({"max_unreadable": 2.0}, "max_unreadable: 2.0 found"),
    "shares": ({"val_share": 0.5, "test_share": 0.5}, "leave no photos to train on"),
    "dataset": ({"dataset": "../own"}, "dataset: is '../own'"),
    "empty dataset": ({"dataset": ""}, "dataset: an empty text found"),
    "no annotations": ({"annotations": None}, "annotations: none given for 'own'"),
    "missing annotations": ({"annotations": ("nowhere.json",)}, "nowhere.json: no such file"),
    "missing images": ({"image_folder": "nowhere"}, "image_folder: nowhere is not a folder"),
    "other images": ({"image_folder": "other"}, "image_folder: 12 of 12 photos are missing"),
    "empty vocabulary": ({"min_word_freq": 1000}, "min_word_freq: is 1000, but no training word"),
    "every caption too long": ({"max_len": 1}, "max_len: is 1, but all 60 captions are longer .* give --max_len 6"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_in_one_line_and_nothing_is_made(tmp_path, monkeypatch, name):
    make_dataset(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        main(config(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.glob("out/*") if not path.name.startswith("UNREADABLE")]


def test_nothing_to_train_on_is_an_error(tmp_path):
    make_dataset(tmp_path, "VVX")
    with pytest.raises(UserError, match="no photos to train on"):
        main(config(tmp_path))


def test_several_annotation_files_can_be_given_on_the_command_line():
    parsed = parse_args(Config, ["--dataset", "coco", "--annotations", "a.json", "b.json", "--max_len", "20"])
    assert parsed.annotations == ("a.json", "b.json")
    assert parsed.max_len == 20


def test_an_empty_validation_split_is_refused_at_once_with_the_way_out(tmp_path):
    make_dataset(tmp_path, "TTTTTXXX")
    message = r"no photos to choose the best epoch by \(5 in TRAIN, 0 in VAL, 3 in TEST\), .* with --splits drawn"
    with pytest.raises(UserError, match=message):
        main(config(tmp_path))
    assert not list((tmp_path / "out").iterdir())
    main(config(tmp_path, splits="drawn"))
    assert [len(load(tmp_path, f"{split}_REFERENCES")) for split in ("TRAIN", "VAL", "TEST")] == [6, 1, 1]


def test_splits_are_drawn_from_the_photos_that_have_a_caption(tmp_path):
    make_dataset(tmp_path)
    names = [f"{i}.png,{'a dog runs' if i >= 9 else ''}\n" for i in range(12)]
    (tmp_path / "own.csv").write_text("image,caption\n" + "".join(names))
    main(config(tmp_path, annotations=(str(tmp_path / "own.csv"),), min_word_freq=0))
    counts = [len(load(tmp_path, f"{split}_REFERENCES", min_word_freq=0)) for split in ("TRAIN", "VAL", "TEST")]
    assert counts == [1, 1, 1]


def test_many_unknown_words_are_one_line_with_the_frequency_that_would_help(tmp_path, capsys):
    rare = {"sentences": [{"tokens": ["dog", "dog", "runs", "far", "away"]}]}
    make_dataset(tmp_path, "TTV", _0=rare, _1=rare)
    main(config(tmp_path, min_word_freq=2))
    assert "60% of the training words became <unk>; with --min_word_freq 1 at most 10% would" in capsys.readouterr().out
    main(config(tmp_path, min_word_freq=1))
    assert "became <unk>" not in capsys.readouterr().out


def test_captions_without_spaces_between_words_are_told_to_be_split_into_characters(tmp_path, capsys):
    make_dataset(tmp_path)
    (tmp_path / "own.csv").write_text("image,caption\n" + "".join(f"{i}.png,หมาวิ่ง\n" for i in range(12)))
    main(config(tmp_path, annotations=(str(tmp_path / "own.csv"),)))
    assert "each character counts as a word" in capsys.readouterr().out
    assert "วิ่" in load(tmp_path, "WORDMAP")


def test_a_photo_that_is_found_elsewhere_has_the_name_that_leads_there(tmp_path):
    make_dataset(tmp_path, _0={"filename": "0.PNG", "filepath": "val2014"})
    main(config(tmp_path))
    assert load(tmp_path, "TRAIN_REFERENCES")[0]["file_name"] == "0.png"


def test_neither_the_script_nor_its_workers_wait_for_torch():
    code = "import sys, create_input_files; print('torch' in sys.modules)"
    folder = Path(create_input_files.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "False"


def test_photos_too_small_for_most_encoders_are_told_in_one_line(tmp_path, capsys):
    make_dataset(tmp_path)
    main(config(tmp_path))
    assert "image_size: 16 pixels leave many encoders nothing to see; give 32 or more\n" in capsys.readouterr().out
    main(config(tmp_path, image_size=32))
    assert "image_size" not in capsys.readouterr().out
