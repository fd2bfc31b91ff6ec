"""
Caption a photo: `python caption.py --img photo.jpg` prints the sentence and draws where the model looked for each word.

The figure opens in a window; without a display it is written to a file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from figures import attention_figure, save_figure, show_or_save
from inference import load_captioner
from photos import read_photo
from utils import UserError, choose_device, run_script


@dataclass
class Config:
    img: str  # photo to caption
    model: str | None = None  # checkpoint of train.py; default the newest runs/*/best.pth
    beam_size: int = 5  # captions that the search keeps; 1 is greedy choice
    max_length: int = 50  # longest caption, in words
    dont_smooth: bool = False  # show the attention grid's cells as they are
    figure: str | None = None  # write the attention figure here; default a window, or outputs/ without a display
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


def main(config):
    if config.beam_size < 1:
        raise UserError(f"beam_size: {config.beam_size} found, 1 or more expected")
    captioner, checkpoint, _ = load_captioner(config.model, choose_device(config.device))
    image = load_photo(config.img, checkpoint["image_size"])  # (3, S, S)

    [[best]] = captioner.search(
        torch.from_numpy(image).unsqueeze(0), config.beam_size, max_length=config.max_length, keep_alphas=True
    )
    words = captioner.sentence(best)
    print(" ".join(words))

    alphas = None if best.alphas is None else best.alphas[: len(words)].numpy()  # (T, P), without <end>
    figure = attention_figure(image.transpose(1, 2, 0), words, alphas, smooth=not config.dont_smooth)
    path = config.figure or Path("outputs") / f"{Path(config.img).stem}_attention.png"
    written = save_figure(figure, path) or path if config.figure else show_or_save(figure, path)
    if written:
        print(f"Attention figure: {written}")


def load_photo(path, size):
    """:return: (3, size, size) uint8"""
    try:
        return read_photo(path, size)
    except Exception as error:  # Pillow's many kinds
        raise UserError(
            f"{path}: cannot be read as a photo ({error}); give a JPEG, PNG or another common format"
        ) from error


if __name__ == "__main__":
    run_script(main, Config)
