"""Figures are whole files, and no screen is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from captioning.display import figure_files
from captioning.display.charts import length_histogram
from captioning.display.figure_files import save_figure, show_or_save
from utils import UserError


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_saving_writes_the_format_of_the_suffix(tmp_path, suffix, start):
    path = tmp_path / "folder" / f"picture{suffix}"
    save_figure(length_histogram({"TRAIN": [1, 2]}, 5), path)
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["picture.xyz", "picture"])
def test_saving_refuses_a_suffix_that_is_no_picture(tmp_path, name):
    with pytest.raises(UserError, match=r"not a picture format; use \.png"):
        save_figure(length_histogram({"TRAIN": [1, 2]}, 5), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def half(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(UserError, match="No space left"):
        save_figure(length_histogram({"TRAIN": [1, 2]}, 5), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a window would open")
@pytest.mark.parametrize("environment", [{}, {"MPLBACKEND": "agg"}, {"MPLBACKEND": "tkagg"}, {"DISPLAY": ":987"}])
def test_without_a_screen_the_figure_is_saved_and_pyplot_untouched_before(tmp_path, environment):
    code = """
import sys
from captioning.display.charts import length_histogram
from captioning.display.figure_files import show_or_save
figure = length_histogram({"TRAIN": [1, 2]}, 5)
assert "matplotlib.pyplot" not in sys.modules
assert show_or_save(figure, "picture.png") == "picture.png"
assert sys.modules["matplotlib.pyplot"].get_fignums() == []
"""
    home = Path(figure_files.__file__).parents[2]
    environment = {"PYTHONPATH": str(home), "HOME": str(tmp_path), "PATH": "", **environment}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment, cwd=tmp_path)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1050, 525)


def test_with_a_screen_the_figure_is_shown_and_not_saved(tmp_path, monkeypatch):
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pyplot.switch_backend("agg")
    shown = []
    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "a window system")
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_current_fig_manager().canvas.figure))
    figure = length_histogram({"TRAIN": [1, 2]}, 5)
    assert show_or_save(figure, tmp_path / "picture.png") is None
    pyplot.close("all")
    assert shown == [figure]
    assert list(tmp_path.iterdir()) == []
