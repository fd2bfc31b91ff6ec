"""train.py on a few photos: 2 epochs of 6 steps."""

import train
from captioning.command_line import run_script
from captioning.training.resume import settings_of_resumed_run

TINY = [
    "--device", "cpu", "--epochs", "2", "--batch_size", "2", "--encoder", "squeezenet1_1", "--encoder_weights", "none",
    "--encoded_image_size", "2", "--embed_dim", "4", "--decoder_dim", "4", "--attention_dim", "4",
    "--val_beam_size", "1", "--print_every", "4",
]  # fmt: skip


def command(*options):
    """Do what `python train.py` does with these options."""
    run_script(train.main, train.Config, list(map(str, options)), find_base=settings_of_resumed_run)
