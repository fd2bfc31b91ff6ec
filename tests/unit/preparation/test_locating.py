"""Photos are found under names that differ without leaving a doubt, and what is not found is told with the reason."""

import unicodedata

import pytest

from captioning.preparation.annotated_photo import AnnotatedPhoto
from captioning.preparation.json_layouts import coco_names
from captioning.preparation.left_out import LeftOut
from captioning.preparation.locating import locate_photos
from utils import UserError


def locate(folder, *names, other_names=()):
    """:return: names below the folder of the photos that were found, and (name, reason) of the others"""
    photos = [AnnotatedPhoto(name, name, other_names=other_names) for name in names]
    left_out = LeftOut(folder / "left_out.csv", len(photos), 1.0)
    found = locate_photos(photos, folder, left_out)
    for photo in found:
        assert photo.path == folder / photo.file_name and photo.path.is_file()
    return [photo.file_name for photo in found], left_out.unreadable


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
COCO = "COCO_train2014_000000000009.jpg"


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        ("below/a.jpg", "below\\a.jpg"),
        ("a.JPG", "a.jpg"),
        ("a.jpg", "A.JPG"),
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        ("deeper/a.jpg", "a.jpg"),
        ("a.jpg", "images/a.jpg"),
        ("one/two/a.jpg", "two/a.jpg"),
    ],
)
def test_a_photo_is_found_under_a_name_that_differs_a_little(tmp_path, capsys, on_disk, named):
    touch(tmp_path, on_disk)
    assert locate(tmp_path, named) == ([on_disk], [])
    assert capsys.readouterr().out == (
        f"1 photos have other names on disk than in the annotations: {on_disk!r} was taken for {named!r}\n"
    )


def test_names_as_they_should_be_need_no_word(tmp_path, capsys):
    touch(tmp_path, "a.jpg", "train2017/b.jpg")
    assert locate(tmp_path, "a.jpg") == (["a.jpg"], [])
    assert locate(tmp_path, "b.jpg", other_names=("train2017/b.jpg",)) == (["train2017/b.jpg"], [])
    assert capsys.readouterr().out == ""


def test_cocos_photos_are_looked_for_in_the_folder_that_their_own_names_tell():
    assert coco_names(COCO, "captions") == (f"train2014/{COCO}",)
    assert coco_names(COCO, "captions_val2017") == (f"val2017/{COCO}", f"train2014/{COCO}")
    assert coco_names("9.jpg", "captions") == ()


def test_nothing_is_guessed_where_two_files_would_do(tmp_path):
    touch(tmp_path, "one/a.jpg", "two/a.jpg")
    found, missing = locate(tmp_path, "a.jpg")
    assert found == [] and missing[0][0] == "a.jpg"


def test_of_two_files_the_one_whose_folders_agree_is_taken(tmp_path):
    touch(tmp_path, "train/x/a.jpg", "train/y/a.jpg")
    assert locate(tmp_path, "y/a.jpg") == (["train/y/a.jpg"], [])


def test_what_is_missing_is_told_with_the_path_that_was_tried_and_the_nearest_file(tmp_path):
    touch(tmp_path, "000000000009.jpg", "unlike.png")
    found, missing = locate(tmp_path, "COCO_train2014_000000000009.jpg", "b.jpg")
    assert found == []
    (first, reason), (second, plain) = missing
    assert reason == f"missing (looked for as {tmp_path / first}; the nearest file is '000000000009.jpg')"
    assert (second, plain) == ("b.jpg", "missing")
    assert "no files in that folder" in locate(make_folder(tmp_path / "empty"), "a.jpg")[1][0][1]


def make_folder(folder):
    folder.mkdir()
    return folder


def two_entries(folder, **second):
    """:return: the photos found where a.jpg is there, and named A.jpg by an entry that differs in these fields"""
    touch(folder, "a.jpg")
    photos = [AnnotatedPhoto("a.jpg", "a.jpg", captions=[["a", "dog"]])]
    photos.append(AnnotatedPhoto(**{"image_id": "A.jpg", "file_name": "A.jpg", "captions": [["a", "cat"]]} | second))
    return locate_photos(photos, folder, LeftOut(folder / "left_out.csv", 2, 1.0))


def test_two_spellings_of_one_name_give_one_photo_with_the_captions_of_both(tmp_path, capsys):
    [photo] = two_entries(tmp_path)
    assert photo.captions == [["a", "dog"], ["a", "cat"]]
    assert "Photos named in two ways: 1, each with the captions of both; 'a.jpg' first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("second", "told"),
    [({"split": "VAL"}, "one for None, the other for VAL"), ({"image_id": 7}, "with the ids 'a.jpg' and 7")],
)
def test_two_entries_of_one_file_that_differ_in_more_are_refused(tmp_path, second, told):
    with pytest.raises(UserError, match=f"two entries name the photo 'a.jpg', {told}; keep one of them"):
        two_entries(tmp_path, **second)


def test_links_that_lead_out_of_the_image_folder_are_told(tmp_path, capsys):
    touch(tmp_path, "elsewhere/a.jpg", "images/b.jpg")
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/inside").symlink_to(tmp_path / "images")
    found, _ = locate(tmp_path / "images", "link/a.jpg", "b.jpg")
    assert found == ["link/a.jpg", "b.jpg"]
    out = capsys.readouterr().out
    assert (
        out == f"1 photos are outside of {tmp_path / 'images'}, where links lead: link/a.jpg to "
        f"{tmp_path / 'elsewhere'}\n"
    )
    locate(tmp_path / "images", "inside/b.jpg")
    assert capsys.readouterr().out == ""


def test_a_folder_that_links_to_itself_is_no_endless_search(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "again").symlink_to(tmp_path)
    assert locate(tmp_path, "A.jpg") == (["a.jpg"], [])
