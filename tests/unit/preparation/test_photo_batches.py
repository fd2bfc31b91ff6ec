"""Names, folders and patterns become photos, each once, and what is no photo is told."""

import pytest
from PIL import Image

from captioning.preparation.photo_batches import find_photos, photo_size
from captioning.preparation.photos import read_photo


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_of_a_folder_that_are_no_photos_are_counted_and_told(tmp_path, capsys):
    touch(tmp_path, "a.jpg", "b.HEIC", "c.heic", "notes.txt", "README", ".hidden.jpg", "below/d.jpg")
    assert find_photos([str(tmp_path)]) == [tmp_path / "a.jpg"]
    told = f"{tmp_path}: 4 files are not photos that can be read here (2 .heic, 1 .txt, 1 without ending)\n"
    assert capsys.readouterr().err == told
    touch(tmp_path / "sound", "a.jpg", "b.png")
    assert len(find_photos([str(tmp_path / "sound")])) == 2
    assert capsys.readouterr().err == ""


def test_a_pattern_over_folders_that_link_to_themselves_gives_each_photo_once(tmp_path):
    touch(tmp_path, "a.jpg", "below/b.jpg")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "below/up").symlink_to(tmp_path)
    assert find_photos([f"{tmp_path}/**/*.jpg"]) == [tmp_path / "a.jpg", tmp_path / "below/b.jpg"]


def test_patterns_take_what_a_shell_takes(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", ".b.jpg", "below/c.jpg", ".hidden/d.jpg", "below/e.png")
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_photos(["*.jpg"])] == ["a.jpg"]
    assert [str(path) for path in find_photos(["**/*.jpg"])] == ["a.jpg", "below/c.jpg"]
    assert [str(path) for path in find_photos(["*/[ce].*"])] == ["below/c.jpg", "below/e.png"]
    assert [str(path) for path in find_photos(["**.jpg"])] == ["a.jpg"]
    assert [str(path) for path in find_photos([".*.jpg"])] == [".b.jpg"]


@pytest.mark.filterwarnings("error")
def test_a_photo_that_can_be_read_has_a_size(tmp_path):
    Image.new("L", (16000, 12000)).save(tmp_path / "large.jpg")  # more pixels than Pillow opens unasked
    notes = {
        "damaged.png": (b"Exif\0\0no TIFF file", (16, 12)),
        "cut.webp": (b"Exif\0\0II", (16, 12)),
        "twice.jpg": (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x02\0\0\0\x06\0\x06\0\0\0\0\0", (12, 16)),
    }
    for name, (exif, _) in notes.items():
        Image.new("RGB", (16, 12)).save(tmp_path / name, exif=exif)
    for name, size in {"large.jpg": (16000, 12000), **{name: size for name, (_, size) in notes.items()}}.items():
        assert read_photo(tmp_path / name, 8).shape == (3, 8, 8)
        assert photo_size(tmp_path / name) == size
