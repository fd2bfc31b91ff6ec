"""Every layout of annotations gives the same list of photos, and a faulty one a line that says where it is faulty."""

import json

import pytest

from captioning.preparation.annotations import draw_splits, make_ids_unique, read_annotations
from utils import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(*paths, val_share=0.2, test_share=0.2, seed=0, keep_splits=True):
    photos = read_annotations(paths, keep_splits)
    draw_splits(photos, val_share, test_share, seed)
    return photos


def karpathy(**changes):
    entry = {
        "filename": "a.jpg",
        "split": "train",
        "imgid": 7,
        "sentences": [{"tokens": ["a", "dog"], "raw": "A dog."}, {"tokens": ["it", "runs"], "raw": "It runs."}],
    }
    entry |= changes
    return {"images": [{key: value for key, value in entry.items() if value is not ...}], "dataset": "flickr8k"}


def coco():
    return {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "A cat's nap."},
            {"image_id": 5, "id": 2, "caption": "Two dogs,  running!"},
            {"image_id": 3, "id": 3, "caption": "Zzz"},
        ],
    }


def test_karpathys_json_gives_words_ids_and_splits(tmp_path):
    (photo,) = read(write(tmp_path / "a.json", karpathy()))
    assert (photo.file_name, photo.image_id, photo.split) == ("a.jpg", 7, "TRAIN")
    assert photo.captions == [["a", "dog"], ["it", "runs"]]


def test_karpathys_coco_has_folders_cocoids_and_restval(tmp_path):
    content = karpathy(filepath="val2014", cocoid=391895, split="restval")
    (photo,) = read(write(tmp_path / "a.json", content))
    assert (photo.file_name, photo.other_names, photo.image_id) == ("val2014/a.jpg", ("a.jpg",), 391895)
    assert photo.split == "TRAIN"


def test_raw_text_is_tokenized_where_there_are_no_tokens(tmp_path):
    (photo,) = read(write(tmp_path / "a.json", karpathy(sentences=[{"raw": "A T-shirt, 2 dogs."}])))
    assert photo.captions == [["a", "t", "shirt", "2", "dogs"]]


def test_boxes_are_passed_through(tmp_path):
    boxes = [{"name": "star", "box": [1, 2, 3, 4]}]
    (photo,) = read(write(tmp_path / "a.json", karpathy(boxes=boxes)))
    assert photo.boxes == boxes


def test_words_that_the_word_map_keeps_for_itself_are_no_words(tmp_path):
    (photo,) = read(write(tmp_path / "a.json", karpathy(sentences=[{"tokens": ["<pad>", "a", "", " ", "<end>"]}])))
    assert photo.captions == [["a"]]


def test_cocos_own_json_gathers_the_captions_of_each_photo(tmp_path):
    first, second = read(write(tmp_path / "captions_val2017.json", coco()))
    assert (first.file_name, first.other_names, first.image_id, first.split) == ("a.jpg", ("val2017/a.jpg",), 5, "VAL")
    assert first.captions == [["two", "dogs", "running"]]
    assert second.captions == [["a", "cat", "s", "nap"], ["zzz"]]


def test_several_files_have_the_splits_of_their_names(tmp_path):
    train = write(tmp_path / "captions_train2017.json", coco())
    val = coco()
    val["images"] = [{"id": 50, "file_name": "c.jpg"}]
    val["annotations"] = [{"image_id": 50, "caption": "one"}]
    photos = read(train, write(tmp_path / "captions_val2017.json", val))
    assert [photo.split for photo in photos] == ["TRAIN", "TRAIN", "VAL"]


def test_a_file_name_with_two_splits_or_with_test_inside_a_word_tells_nothing(tmp_path):
    rows = "image,caption\n" + "".join(f"{i}.jpg,a dog\n" for i in range(10))
    for name in ("train_val.csv", "latest.csv"):
        assert {photo.split for photo in read(write(tmp_path / name, rows))} == {"TRAIN", "VAL", "TEST"}


def test_drawn_splits_have_their_shares_and_depend_on_seed_and_names_alone(tmp_path):
    rows = [f"{i}.jpg,a dog\n" for i in range(100)]
    draws = {}
    for name, some, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        photos = read(write(tmp_path / f"{name}.csv", "image,caption\n" + "".join(some)), test_share=0.3, seed=seed)
        draws[name] = {photo.file_name: photo.split for photo in photos}
    assert draws["a"] == draws["b"] != draws["c"]
    counts = [list(draws["a"].values()).count(split) for split in ("TRAIN", "VAL", "TEST")]
    assert counts == [50, 20, 30]


def test_flickr8ks_captions_txt(tmp_path):
    text = 'image,caption\nb.jpg,A child in a pink dress .\na.jpg,"A dog, running ""fast"" ."\nb.jpg,One , two .\n\n'
    first, second = read(write(tmp_path / "captions.txt", text))
    assert (first.file_name, first.image_id) == ("b.jpg", "b.jpg")
    assert first.captions == [["a", "child", "in", "a", "pink", "dress"], ["one", "two"]]
    assert second.captions == [["a", "dog", "running", "fast"]]


def test_flickr30ks_results_csv_with_its_malformed_row(tmp_path):
    text = (
        "image_name| comment_number| comment\n"
        '1.jpg| 0| Two men , "one" tall .\n'
        '1.jpg| 1| "Quoted from the start .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    first, second = read(write(tmp_path / "results.csv", text))
    assert first.captions == [["two", "men", "one", "tall"], ["quoted", "from", "the", "start"]]
    assert second.captions == [["a", "dog", "runs", "across", "the", "grass"]]


def test_an_own_table_with_splits_tabs_and_another_order(tmp_path):
    text = "\ufeffCaption\tSplit\tFile\r\nÉin Hund, läuft\ttrain\tx/a.jpg\r\nun chien\tvalidation\tb.jpg\r\n"
    first, second = read(write(tmp_path / "own.tsv", text))
    assert (first.file_name, first.split, first.captions) == ("x/a.jpg", "TRAIN", [["éin", "hund", "läuft"]])
    assert (second.file_name, second.split) == ("b.jpg", "VAL")


def test_flickr8ks_token_txt_has_no_header_and_numbers_its_captions(tmp_path):
    text = "b.jpg#0\tA child , in pink .\nb.jpg#1\tOne\na.jpg#0\tA dog\n"
    first, second = read(write(tmp_path / "Flickr8k.token.txt", text))
    assert (first.file_name, first.image_id) == ("b.jpg", "b.jpg")
    assert first.captions == [["a", "child", "in", "pink"], ["one"]]
    assert (second.file_name, second.captions) == ("a.jpg", [["a", "dog"]])


def test_a_caption_number_behind_a_name_is_no_part_of_it(tmp_path):
    (photo,) = read(write(tmp_path / "a.csv", "image,caption\na.jpg#0,one\na.jpg#1,two\n"))
    assert (photo.file_name, photo.captions) == ("a.jpg", [["one"], ["two"]])


def test_hugging_faces_metadata_as_csv_and_as_jsonl(tmp_path):
    rows = [{"file_name": "a.jpg", "text": "A dog, running"}, {"file_name": "b.jpg", "text": "A cat"}]
    table = "file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for path in (write(tmp_path / "metadata.csv", table), write(tmp_path / "metadata.jsonl", lines)):
        first, second = read(path)
        assert (first.file_name, first.captions) == ("a.jpg", [["a", "dog", "running"]])
        assert (second.file_name, second.captions) == ("b.jpg", [["a", "cat"]])


def test_a_table_with_a_row_for_each_photo_and_its_captions_in_columns(tmp_path):
    text = 'filename,caption_0,caption_1,caption_2,split\na.jpg,A dog,"One, two",,train\n'
    (photo,) = read(write(tmp_path / "a.csv", text))
    assert (photo.file_name, photo.split) == ("a.jpg", "TRAIN")
    assert photo.captions == [["a", "dog"], ["one", "two"], []]


def test_blips_lists_give_a_photo_one_caption_an_entry_or_all_in_one(tmp_path):
    train = [
        {"image": "val2014/a.jpg", "caption": "A dog.", "image_id": "coco_1"},
        {"image": "val2014/a.jpg", "caption": "It runs.", "image_id": "coco_1"},
        {"image": "val2014/b.jpg", "caption": "A cat.", "image_id": "coco_2"},
    ]
    first, second = read(write(tmp_path / "coco_karpathy_train.json", train))
    assert (first.file_name, first.image_id, first.split) == ("val2014/a.jpg", "coco_1", "TRAIN")
    assert first.captions == [["a", "dog"], ["it", "runs"]]
    assert second.image_id == "coco_2"
    val = [{"image": "a.jpg", "caption": ["A dog.", "It runs."]}]
    (photo,) = read(write(tmp_path / "coco_karpathy_val.json", val))
    assert (photo.split, photo.captions) == ("VAL", [["a", "dog"], ["it", "runs"]])


def test_a_split_that_the_files_name_decided_is_told_and_can_be_undone(tmp_path, capsys):
    rows = "image,caption\n" + "".join(f"{i}.jpg,a dog\n" for i in range(10))
    path = write(tmp_path / "my_train.csv", rows)
    assert {photo.split for photo in read(path)} == {"TRAIN"}
    told = "my_train.csv: its name says TRAIN, so all of its 10 photos are; undo with --splits drawn\n"
    assert capsys.readouterr().out == told
    assert {photo.split for photo in read(path, keep_splits=False)} == {"TRAIN", "VAL", "TEST"}
    given = write(tmp_path / "a.json", karpathy())
    assert read(given, keep_splits=False)[0].split == "TRAIN"  # one photo alone is drawn for training
    assert capsys.readouterr().out == ""


def test_ids_that_begin_at_0_in_each_split_are_kept(tmp_path, capsys):
    paths = []
    for name, files in (("train", "ab"), ("val", "cd")):
        images = [{"id": i, "file_name": f"{letter}.jpg"} for i, letter in enumerate(files)]
        captions = [{"image_id": i, "caption": "a dog"} for i in range(2)]
        paths.append(write(tmp_path / f"captions_{name}.json", {"images": images, "annotations": captions}))
    photos = read(*paths)
    assert [(photo.image_id, photo.split) for photo in photos] == [(0, "TRAIN"), (1, "TRAIN"), (0, "VAL"), (1, "VAL")]
    make_ids_unique(photos[:2])
    assert [photo.image_id for photo in photos[:2]] == [0, 1]
    capsys.readouterr()
    for photo in photos:
        photo.split = "TRAIN"
    make_ids_unique(photos)
    assert [photo.image_id for photo in photos] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert "TRAIN: several photos have one id" in capsys.readouterr().out


HOSTILE_JSON = {
    "not JSON": ("{", "not valid JSON"),
    "empty file": ("", "not valid JSON"),
    "an empty list": ([], "holds no photos"),
    "a text": ('"a dog"', "no list 'images'"),
    "no images": ({"a": 1}, "no list 'images'"),
    "images is a number": ({"images": 3}, "no list 'images'"),
    "images is empty": ({"images": []}, "holds no photos"),
    "an image is a text": ({"images": ["a.jpg"]}, r"images\[0\]: is str"),
    "no file name": (karpathy(filename=...), r"images\[0\]: has no 'filename'"),
    "file name is a number": (karpathy(filename=3), "'filename' is '3'"),
    "file name is empty": (karpathy(filename=""), "file name is ''"),
    "file name is a folder": (karpathy(filename="."), "file name is '.'"),
    "file name with a null": (karpathy(filename="a\0.jpg"), "file name is"),
    "absolute file name": (karpathy(filename="/etc/passwd"), "leads out of the image folder"),
    "climbing file name": (karpathy(filename="x/../../a.jpg"), "leads out of the image folder"),
    "climbing folder": (karpathy(filepath=".."), "leads out of the image folder"),
    "climbing the Windows way": (karpathy(filename="..\\a.jpg"), "leads out of the image folder"),
    "drive": (karpathy(filename="C:/a.jpg"), "leads out of the image folder"),
    "share": (karpathy(filename="\\\\host\\a.jpg"), "leads out of the image folder"),
    "folder is a list": (karpathy(filepath=["a"]), "'filepath' is"),
    "unknown split": (karpathy(split="trian"), "split is 'trian'"),
    "split is null": (karpathy(split=None), "'split' is 'None'"),
    "no sentences": (karpathy(sentences=...), "has no 'sentences'"),
    "sentences is a text": (karpathy(sentences="a dog"), "'sentences' is"),
    "a sentence is a text": (karpathy(sentences=["a dog"]), r"sentences\[0\]: is str"),
    "a sentence has no words": (karpathy(sentences=[{}]), "has no 'tokens'"),
    "tokens is a text": (karpathy(sentences=[{"tokens": "a dog"}]), "'tokens' is"),
    "a token is a number": (karpathy(sentences=[{"tokens": ["a", 3]}]), "expected a list of strings"),
    "raw is a number": (karpathy(sentences=[{"raw": 3}]), "'raw' is"),
    "id is a list": (karpathy(imgid=[1]), "id is"),
    "photo twice": ({"images": karpathy()["images"] + karpathy(imgid=8)["images"]}, "is there twice"),
    "id twice": ({"images": karpathy()["images"] + karpathy(filename="b.jpg")["images"]}, "two photos have the id 7"),
    "split on one of two": (
        {"images": karpathy()["images"] + karpathy(filename="b.jpg", imgid=8, split=...)["images"]},
        "1 photos have no split, 'b.jpg' first",
    ),
    "coco: annotations is a number": (coco() | {"annotations": 3}, "'annotations' is"),
    "coco: no image id": (coco() | {"images": [{"file_name": "a.jpg"}]}, "has no 'id'"),
    "coco: image id twice": (coco() | {"images": coco()["images"][:1] * 2}, "second photo with the id 5"),
    "coco: climbing file name": (coco() | {"images": [{"id": 1, "file_name": "../a.jpg"}]}, "leads out"),
    "coco: caption of no photo": (coco() | {"annotations": [{"image_id": 9, "caption": "a"}]}, "no photo has the id 9"),
    "coco: caption is a number": (coco() | {"annotations": [{"image_id": 3, "caption": 1}]}, "'caption' is '1'"),
    "coco: image id is a list": (coco() | {"annotations": [{"image_id": [], "caption": "a"}]}, "'image_id' is"),
    "list: no photo": ([{"caption": "a"}], "entry 0: has none of image, file_name"),
    "list: no caption": ([{"image": "a.jpg"}], "entry 0: has none of caption"),
    "list: caption is a number": ([{"image": "a.jpg", "caption": 3}], "entry 0: 'caption' is '3'"),
    "list: a number": ([3], "entry 0: has none of image"),
    "list: two splits": (
        [{"image": "a.jpg", "caption": "a", "split": split} for split in ("train", "val")],
        "entry 1: photo 'a.jpg' is in two splits",
    ),
    "deep": ("[" * 100_000, "not valid JSON"),
}
HOSTILE_TABLES = {
    "empty file": ("", "first line is ''"),
    "only a header": ("image,caption\n", "holds no photos"),
    "no header": ("a.jpg,a dog\n", "first line is 'a.jpg,a dog'"),
    "no caption column": ("image,words\na.jpg,a dog\n", "first line is"),
    "too few columns": ("image,caption\na.jpg\n", "line 2: 1 columns, expected 2"),
    "too many columns": ("caption,image\na,b,a.jpg\n", "line 2: 3 columns, expected 2"),
    "no file name": ("image,caption\n,a dog\n", "line 2: the photo's file name is ''"),
    "climbing file name": ("image,caption\n../a.jpg,a dog\n", "line 2.*leads out of the image folder"),
    "absolute file name": ("image,caption\n/a.jpg,a dog\n", "leads out of the image folder"),
    "unknown split": ("image,caption,split\na.jpg,a dog,other\n", "split is 'other'"),
    "two splits": ("image,caption,split\na.jpg,a,train\na.jpg,b,val\n", "line 3: photo 'a.jpg' is in two splits"),
    "split on one of two": ("image,caption,split\na.jpg,a,train\nb.jpg,b,\n", "1 photos have no split"),
    "open quotation mark": ('image,caption\na.jpg,"a dog\n', "line 2: unexpected end of data; correct the quotation"),
    "a quotation mark that swallows rows": (
        'image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\nd.jpg,"four"\n',
        "line 3: .*quotation mark",
    ),
    "a quotation mark that is closed three rows later": (
        'image,caption\na.jpg,"one\nb.jpg,two\nc.jpg,three"\nd.jpg,four\n',
        "line 2: its quotation mark is not closed there, so that the row takes in others, as 'b.jpg,two'",
    ),
    "a field without end": ("image,caption\na.jpg," + "x" * 200_000, "field larger than field limit"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_faulty_json_is_refused_in_one_line(tmp_path, name):
    content, message = HOSTILE_JSON[name]
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / "a.json", content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_a_faulty_table_is_refused_in_one_line(tmp_path, name):
    content, message = HOSTILE_TABLES[name]
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / "a.csv", content))
    assert "\n" not in str(error.value)


def test_a_caption_of_several_lines_in_quotation_marks_is_one_caption(tmp_path):
    (photo,) = read(write(tmp_path / "a.csv", 'image,caption\na.jpg,"A dog,\nrunning. Fast, too"\n'))
    assert photo.captions == [["a", "dog", "running", "fast", "too"]]


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_files_that_are_no_text_missing_or_folders_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
    with pytest.raises(UserError, match=name):
        read(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / name)
