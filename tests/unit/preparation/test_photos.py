"""Photos of any kind come out as upright RGB, and damaged ones as a line that says what is wrong with them."""

import multiprocessing
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image, ImageOps

from captioning.preparation.photos import count_scans, photo_formats, photo_reader, read_photo


def scene(width, height):
    """A picture whose four corners differ, with detail."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 30 * np.sin(x / 3) * np.cos(y / 4)
    channels = (200 * x / width, 200 * y / height, 100 + 60 * (x > width / 2))
    return Image.fromarray(np.stack([channel + waves + 25 for channel in channels], 2).clip(0, 255).astype(np.uint8))


def slow_read(path, size):
    """Decode the whole photo, then resize with Pillow."""
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(40, 30), (300, 501), (256, 256)])
def test_pixels_are_those_of_a_plain_resize(tmp_path, size):
    scene(*size).save(tmp_path / "a.png")
    pixels = read_photo(tmp_path / "a.png", 64)
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - slow_read(tmp_path / "a.png", 64)).max() <= 1


@pytest.mark.parametrize("size", [(1024, 768), (1031, 517)])
def test_a_large_jpeg_decoded_in_part_looks_like_one_decoded_whole(tmp_path, size):
    scene(*size).save(tmp_path / "a.jpg", quality=92)
    difference = read_photo(tmp_path / "a.jpg", 64).astype(int) - slow_read(tmp_path / "a.jpg", 64)
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize(
    ("mode", "name", "color"),
    [
        ("RGB", "a.jpg", (200, 80, 40)),
        ("RGB", "a.webp", (200, 80, 40)),
        ("RGB", "a.bmp", (200, 80, 40)),
        ("RGB", "a.ppm", (200, 80, 40)),
        ("RGB", "no_suffix", (200, 80, 40)),
        ("RGBA", "a.png", (200, 80, 40)),
        ("P", "a.png", (200, 80, 40)),
        ("P", "a.gif", (200, 80, 40)),
        ("CMYK", "a.jpg", (200, 80, 40)),
        ("CMYK", "a.tif", (200, 80, 40)),
        ("L", "a.png", (128, 128, 128)),
        ("L", "a.jpg", (128, 128, 128)),
        ("LA", "a.png", (128, 128, 128)),
        ("1", "a.png", (255, 255, 255)),
    ],
)
def test_every_kind_of_photo_comes_out_as_rgb(tmp_path, mode, name, color):
    format = "PNG" if name == "no_suffix" else None
    Image.new("RGB", (50, 20), color).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name, format)
    pixels = read_photo(tmp_path / name, 32)
    assert np.abs(pixels - np.array(color).reshape(3, 1, 1)).max() <= 6  # what JPEG loses


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / name)
        expected = np.tile(ramp // 257, (3, 64, 1))
        assert np.abs(read_photo(tmp_path / name, 64) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_a_rotated_photo_comes_out_upright(tmp_path, name, orientation):
    scene(60, 40).save(tmp_path / "plain.png")
    # A camera stores the pixels turned, with a note how to turn them back.
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned_back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    note = Image.Exif()
    note[0x0112] = turned_back
    turning = scene(60, 40)
    turning.info["exif"] = note.tobytes()
    ImageOps.exif_transpose(turning).save(tmp_path / name, exif=exif.tobytes(), quality=95)
    difference = read_photo(tmp_path / name, 32).astype(int) - slow_read(tmp_path / "plain.png", 32)
    assert np.abs(difference).mean() < 4


def test_a_damaged_exif_note_does_not_cost_the_photo(tmp_path):
    scene(60, 40).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40, quality=95)
    assert read_photo(tmp_path / "a.jpg", 32).shape == (3, 32, 32)


def test_avif_is_read_where_pillow_can(tmp_path):
    if "AVIF" not in photo_formats():
        pytest.skip("this Pillow cannot read AVIF")
    scene(60, 40).save(tmp_path / "a.avif", quality=90)
    assert np.abs(read_photo(tmp_path / "a.avif", 32).astype(int) - slow_read(tmp_path / "a.avif", 32)).max() <= 1


def test_a_photo_of_over_200_megapixels_is_decoded_small_if_it_is_a_jpeg_of_one_scan(tmp_path):
    photo = Image.new("L", (20_000, 10_000), 90)
    photo.save(tmp_path / "a.jpg", quality=50)
    assert (read_photo(tmp_path / "a.jpg", 32) == 90).all()
    photo.save(tmp_path / "b.jpg", quality=50, progressive=True)
    with pytest.raises(ValueError, match="has 200 megapixels, at most 89 expected"):
        read_photo(tmp_path / "b.jpg", 32)


def progressive_jpeg(path, repeats):
    """A JPEG whose last scan comes again and again."""
    scene(400, 300).save(path, "JPEG", progressive=True)
    content = path.read_bytes()
    last = content.rindex(b"\xff\xda")
    path.write_bytes(content[:-2] + content[last:-2] * repeats + content[-2:])


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path):
    progressive_jpeg(tmp_path / "a.jpg", 0)
    assert 1 < count_scans(tmp_path / "a.jpg") < 20
    read_photo(tmp_path / "a.jpg", 32)
    progressive_jpeg(tmp_path / "b.jpg", 20_000)
    assert count_scans(tmp_path / "b.jpg") > 20_000
    start = time.monotonic()
    with pytest.raises(ValueError, match="is a JPEG of 200.. scans, at most 100 expected"):
        read_photo(tmp_path / "b.jpg", 32)
    assert time.monotonic() - start < 10


def test_a_preview_and_what_stands_behind_a_jpeg_are_no_scans(tmp_path):
    scene(60, 40).save(tmp_path / "preview.jpg", progressive=True)
    preview = (tmp_path / "preview.jpg").read_bytes()
    scene(300, 200).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + preview)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + preview * 100)  # a film, in a phone's photo
    assert count_scans(tmp_path / "a.jpg") == 1


def test_a_heic_photo_is_told_to_be_one_whatever_its_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    with photo_reader(0) as read_photos:
        [reason] = read_photos([tmp_path / "a.jpg"], 16)
    assert reason == "is a HEIC photo, which cannot be read here; convert it to JPEG"


def make_bad(kind, path):
    scene(300, 200).save(path, "JPEG")
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "cut header":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "truncated png":
        scene(300, 200).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "link to itself":
        path.unlink()
        path.symlink_to(path)
    elif kind == "bomb":
        Image.new("1", (20000, 5000)).save(path, "PNG")
    elif kind == "postscript":
        scene(30, 20).save(path, "EPS")
    elif kind == "float":
        Image.new("F", (30, 20)).save(path, "TIFF")


BAD = ["missing", "empty", "text", "truncated", "cut header", "truncated png", "folder", "bomb", "postscript", "float"]


@pytest.mark.parametrize("kind", [*BAD, *(["pipe", "link to itself"] if hasattr(os, "mkfifo") else [])])
def test_a_damaged_photo_is_a_line_among_sound_ones(tmp_path, kind):
    scene(30, 20).save(tmp_path / "sound.png")
    make_bad(kind, tmp_path / "bad.jpg")
    with photo_reader(0) as read_photos:
        first, bad, last = read_photos([tmp_path / name for name in ("sound.png", "bad.jpg", "sound.png")], 16)
    assert isinstance(bad, str)
    assert bad
    assert "\n" not in bad
    np.testing.assert_array_equal(first, last)


def test_flipped_bytes_never_raise(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i, format in enumerate(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"] * 5):
        scene(60, 40).save(tmp_path / f"{i}", format)
        content = bytearray((tmp_path / f"{i}").read_bytes())
        for place in rng.integers(min(200, len(content)), size=5):
            content[place] = rng.integers(256)
        (tmp_path / f"{i}").write_bytes(content)
        paths.append(tmp_path / f"{i}")
    with photo_reader(0) as read_photos:
        for item in read_photos(paths, 16):
            assert isinstance(item, str) or item.shape == (3, 16, 16)


def test_workers_give_what_one_process_gives_in_the_same_order(tmp_path):
    for i in range(25):
        scene(30 + i, 20).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"")
    paths = [tmp_path / f"{i}.png" for i in range(25)]
    before = set(multiprocessing.active_children())  # other tests' workers may still wait to be collected
    with photo_reader(0) as read_photos:
        alone = list(read_photos(paths, 16))
    with photo_reader(2, chunk=2) as read_photos:
        together = list(read_photos(paths, 16))
        assert [isinstance(item, str) for item in together] == [i == 7 for i in range(25)]
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)

        # The same workers again: one that the system kills is an error, not an endless wait.
        items = read_photos(paths * 20, 16)
        next(items)
        os.kill((set(multiprocessing.active_children()) - before).pop().pid, signal.SIGTERM)
        with pytest.raises(BrokenProcessPool):
            list(items)
    assert not set(multiprocessing.active_children()) - before
