"""
Bring a model from the field's tutorial: `python convert_checkpoint.py --checkpoint BEST_checkpoint_....pth.tar
--word_map WORDMAP_....json --output runs/tutorial/best.pth` makes a checkpoint that eval.py, caption.py and
view_captions.py read. Nothing that the tutorial's file asks for is run.

Without a word map, `python convert_checkpoint.py --checkpoint runs/mine/best.pth --output mine.pth` makes a checkpoint
of train.py small enough to send: half precision, and without a frozen encoder's weights, which everyone can have.
"""

from dataclasses import dataclass
from pathlib import Path

from captioning.command_line import check_command_line, check_fields, run_script
from utils import UserError


@dataclass
class Config:
    checkpoint: str  # the tutorial's, such as BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar, or train.py's
    output: str  # checkpoint to write, such as runs/tutorial/best.pth
    word_map: str | None = None  # of the tutorial's training, WORDMAP_....json; without one: make train.py's small


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

from captioning.inference.small_checkpoint import shrink
from captioning.inference.tutorial_checkpoint import load_tutorial_checkpoint
from captioning.storage.tensors import load_checkpoint, save_checkpoint


def main(config):
    check_fields(config)
    output = Path(config.output)
    if output.exists() or output.is_symlink():  # the tutorial's own file, perhaps, or a model that took days to train
        raise UserError(f"output: {output} is there already; give the new checkpoint another name")
    if config.word_map is None:
        checkpoint = shrink(load_checkpoint(config.checkpoint), config.checkpoint)
    else:
        checkpoint = load_tutorial_checkpoint(config.checkpoint, config.word_map)
    save_checkpoint(checkpoint, config.output)
    network, words = checkpoint["config"]["encoder"], len(checkpoint["word_map"])
    print(f"{network}, {words} words, {checkpoint['progress']['epoch']} epochs: {config.output}")


if __name__ == "__main__":
    run_script(main, Config)
