"""
Figures as files and in windows. Nothing but `show_or_save` touches pyplot, which picks a window system for the whole
process.
"""

from pathlib import Path

from captioning.storage.files import atomic_path
from utils import UserError


def save_figure(figure, path):
    """
    Write a figure, completely or not at all.

    :param figure: matplotlib Figure
    :param path: file to write; its suffix is the format (.png, .pdf, .svg ...)
    :raises UserError: if the suffix is not a picture format, or the file cannot be written
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: '{path.suffix}' is not a picture format; use .png, .pdf or .svg")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def show_or_save(figure, path):
    """
    Open a window with the figure and wait until it is closed; where there is no screen, write the file instead.

    :param figure: matplotlib Figure
    :param path: file to write when no window can be opened
    :return: the path if it was written, None if the figure was shown
    :raises UserError: as in `save_figure`
    """
    from matplotlib import pyplot  # here only: it settles on a window system for the whole process

    try:
        window = pyplot.figure(figsize=figure.get_size_inches())
    except Exception:  # each window system has its own way to say that there is no screen
        window = None
    if window is None or window.canvas.required_interactive_framework is None:
        if window:
            pyplot.close(window)
        save_figure(figure, path)
        return path
    canvas = window.canvas
    canvas.figure = figure  # the picture takes the place of pyplot's empty one
    figure.set_canvas(canvas)
    pyplot.show()
    return None
