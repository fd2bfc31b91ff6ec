"""
Make other checkpoints of checkpoints, that eval.py, caption.py and view_captions.py read.

The field's tutorial's: `python convert_checkpoint.py BEST_checkpoint_....pth.tar --word_map WORDMAP_....json --output
runs/tutorial/best.pth`. Nothing that the tutorial's file asks for is run.

One that is small enough to send: `python convert_checkpoint.py runs/mine/best.pth --output mine.pth`, in half precision
and without a frozen encoder's weights, which everyone can have.

The mean of several, if their runs went on from one trained model: `python convert_checkpoint.py runs/one/best.pth
runs/two/best.pth --output runs/mean/best.pth`. As quick as one of them, and often better than each.
"""

from dataclasses import dataclass
from pathlib import Path

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields
from utils import UserError


@dataclass
class Config:
    checkpoint: tuple[str, ...]  # the tutorial's, such as BEST_checkpoint_....pth.tar, or one or more of train.py
    output: str  # checkpoint to write, such as runs/tutorial/best.pth
    word_map: str | None = None  # of the tutorial's training, WORDMAP_....json; only its checkpoints need it


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

from captioning.inference.mean_checkpoint import ONE_START, mean_of_checkpoints
from captioning.inference.model_files import check_not_twice, find_checkpoint
from captioning.inference.small_checkpoint import shrink
from captioning.inference.tutorial_checkpoint import load_tutorial_checkpoint
from captioning.storage.tensors import load_checkpoint, save_checkpoint


def main(config):
    check_fields(config)
    output = Path(config.output)
    if output.exists() or output.is_symlink():  # the tutorial's own file, perhaps, or a model that took days to train
        raise UserError(f"output: {output} is there already; give the new checkpoint another name")
    paths = [find_checkpoint(name) for name in config.checkpoint]
    check_not_twice("checkpoint", paths)
    if len(paths) > 1 and config.word_map is not None:
        raise UserError(f"checkpoint: {len(paths)} found with --word_map, one of the tutorial's expected at a time")
    if config.word_map is not None:
        checkpoint = load_tutorial_checkpoint(paths[0], config.word_map)
    elif len(paths) == 1:
        checkpoint = shrink(load_checkpoint(paths[0]), paths[0])
    else:
        checkpoint, likeness = mean_of_checkpoints(paths)
        if likeness < ONE_START:
            print(
                f"Warning: these models do not stem from one start (their weights' cosine is {likeness:.2f}), so their "
                "mean will hardly caption; `python eval.py` with all of them scores them as an ensemble"
            )
    save_checkpoint(checkpoint, config.output)
    network, words = checkpoint["config"]["encoder"], len(checkpoint["word_map"])
    print(f"{network}, {words} words, {checkpoint['progress']['epoch']} epochs: {config.output}")


if __name__ == "__main__":
    run_script(main, Config)
