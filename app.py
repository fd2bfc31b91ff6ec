"""
A page to drop a photo on: `python app.py`, then open http://127.0.0.1:7860 in a browser.

A photo comes from the disk, the clipboard or the camera. The page shows what the model says of it, how probable that
is, and where the model looked for the word under the pointer. Several models stand side by side:
`python app.py runs/soft runs/hard`. Only this computer can open the page unless `--host 0.0.0.0` lets others in.
Photos are deleted after ten minutes. It needs `pip install -r requirements-app.txt`.
"""

import contextlib
import html
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields, check_value, limits_of
from utils import BeamSizeOfPage, CaptionsOfPage, Count, Port, Positive, choose_device


@dataclass
class Config:
    model: tuple[str, ...] = ()  # checkpoints or run folders, side by side; default the newest of runs/
    host: str = "127.0.0.1"  # address that the page is served at; 0.0.0.0 lets other computers in
    port: Port = 7860
    max_megabytes: Count = 20  # of a photo's file
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is reported to anybody

import torch

from captioning.display.caption_tables import CaptionedPhoto, in_shape
from captioning.display.html_page import PageCaption, PagePhoto, build_page
from captioning.inference.model_files import describe_model
from captioning.inference.trained_model import load_captioner
from captioning.preparation.photos import photo_reader
from captioning.screen import printable
from utils import UserError

try:
    import gradio
except ImportError:
    print("error: app.py needs the package gradio: pip install -r requirements-app.txt", file=sys.stderr)
    sys.exit(2)

KEPT = 600  # seconds that an uploaded photo is kept
# Of the page, as `caption_photo` takes them, with the values that they may have.
SETTINGS = {"beam_size": BeamSizeOfPage, "n_best": CaptionsOfPage, "sample": bool, "temperature": Positive}
# The page of captions is a document of its own within ours, as tall as what it shows.
FRAME = """<iframe title="Captions" srcdoc="{}" style="width: 100%; border: 0; height: 40rem" onload="
  const page = this.contentDocument.body;
  new this.contentWindow.ResizeObserver(() => this.style.height = page.offsetHeight + 'px').observe(page)"></iframe>"""


class NamedModel(NamedTuple):
    """A model as the page shows it."""

    name: str
    captioner: object  # `Captioner`
    image_size: int  # in pixels


def main(config):
    check_fields(config)
    models = load_models(config.model, choose_device(config.device))
    serve(build_app(models), config)


def load_models(names, device):
    """:return: list of `NamedModel`s, no two with the same name; without names, of the newest model"""
    models = []
    for name in names or [None]:
        captioner, checkpoint, path = load_captioner(name, device)
        shown = path.parent.name if path.stem in ("best", "last", "previous") else path.stem
        if shown in [model.name for model in models]:
            shown = f"{path} ({len(models) + 1})"
        print(f"Model: {path} ({describe_model(checkpoint)})", file=sys.stderr)
        models.append(NamedModel(shown, captioner, checkpoint["image_size"]))
    return models


def caption_photo(models, path, beam_size=5, n_best=1, sample=False, temperature=1.0):
    """
    Caption a photo with each of the models.

    :param n_best: captions of each model, best first; at most beam_size
    :param sample: draw n_best captions by chance instead of searching for the likeliest
    :return: `PagePhoto`
    :raises UserError: if the file cannot be read as a photo, or an option has a value that `SETTINGS` does not allow
    """
    for (name, kind), value in zip(SETTINGS.items(), (beam_size, n_best, sample, temperature), strict=True):
        check_value(name, kind, value)  # the page's sliders have limits, but not what a program sends in their place
    shown, captions = None, []
    for name, captioner, image_size in models:
        image = read_upload(path, image_size)
        images = torch.from_numpy(image)[None]  # (1, 3, S, S)
        options = {"temperature": temperature, "keep_alphas": True}
        if sample:
            drawn = captioner.sample(images.repeat(n_best, 1, 1, 1), **options)  # of (n_best, 3, S, S)
            found = sorted(drawn, key=lambda hypothesis: -hypothesis.log_prob)
        else:
            [found] = captioner.search(images, beam_size, n_best=min(n_best, beam_size), **options)
        for i, hypothesis in enumerate(found, 1):
            words = captioner.sentence(hypothesis)
            title = f"{name}, caption {i}" if len(found) > 1 else name
            captions.append(PageCaption(title, words, hypothesis.alphas_of_words(), hypothesis.log_prob))
        shown = in_shape(CaptionedPhoto(Path(path), image, [], None)) if shown is None else shown
    return PagePhoto(printable(Path(path).name), shown, captions)


def read_upload(path, size):
    """
    :return: (3, size, size) uint8
    :raises UserError: if the file cannot be read as a photo
    """
    with photo_reader(workers=0) as read_photos:
        image = next(read_photos([path], size))
    if isinstance(image, str):
        raise UserError(f"{printable(Path(path).name)}: cannot be read as a photo ({image}); give a JPEG or PNG")
    return image


def show_captions(models, path, *settings):
    """:return: HTML of the photo with its captions, or one sentence that says what was wrong with file or settings"""
    if path is None:
        return ""
    try:
        photo = caption_photo(models, path, *settings)
    except UserError as error:
        return f'<p role="alert">{html.escape(str(error))}</p>'
    return FRAME.format(html.escape(build_page([photo], "Captions", photo_size=512, bare=True)))


def uploaded_file(upload, folder):
    """
    :param upload: gradio's `ImageData` of what the page sent, or None
    :param folder: that gradio keeps uploads in
    :return: the photo's path, or None without a photo
    :raises gradio.Error: if it lies elsewhere: whoever can open the page could look at any photo of this computer
    """
    path = upload and upload.path
    with contextlib.suppress(OSError, ValueError):  # of a name that no file can have
        if not path or Path(path).resolve().is_relative_to(Path(folder).resolve()):
            return path
    raise gradio.Error("this photo was not uploaded; drop it on the page", print_exception=False)


def build_app(models):
    """:return: gradio.Blocks, the page with everything on it"""
    with gradio.Blocks(title="Captions", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as app:
        gradio.Markdown("# What does the model see?\nDrop a photo, then point at a word to see where the model looked.")
        with gradio.Row():
            with gradio.Column(scale=1):
                photo = gradio.Image(label="Photo", sources=["upload", "clipboard", "webcam"], height=320)
                settings = [
                    gradio.Slider(*limits_of(BeamSizeOfPage), 5, step=1, label="Beam size"),
                    gradio.Slider(*limits_of(CaptionsOfPage), 1, step=1, label="Captions of each model"),
                    gradio.Checkbox(label="Draw words by chance (sampling)"),
                    gradio.Slider(0.1, 2, 1, step=0.1, label="Temperature"),
                ]
                again = gradio.Button("Caption again")
            captions = gradio.HTML(elem_id="captions")
        # What the page sends goes on as it is: `show_captions` says what is wrong with it.
        photo.preprocess = lambda upload: uploaded_file(upload, photo.GRADIO_CACHE)
        for setting in settings:
            setting.preprocess = lambda value: value
        gradio.on(
            [photo.change, again.click],
            lambda path, *values: show_captions(models, path, *values),
            [photo, *settings],
            captions,
            api_visibility="private",
        )
    return app


def serve(app, config, wait=True):
    """
    Serve the page until Ctrl-C, or until `app.close()` if not `wait`.

    :raises UserError: if the port is taken
    """
    try:
        app.launch(
            server_name=config.host, server_port=config.port, share=False, run_history=False, footer_links=[],
            max_file_size=f"{config.max_megabytes}mb", prevent_thread_lock=True, quiet=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"host, port: {config.host}:{config.port} cannot be used ({error}); give another --port"
        ) from None
    print(f"Open {app.local_url} in a browser; Ctrl-C here ends it", flush=True)
    if wait:
        app.block_thread()


if __name__ == "__main__":
    run_script(main, Config)
