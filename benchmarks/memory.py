"""
Does training need more and more memory? Some thousand steps of train.py on a few drawn scenes, and each part's peak.

Plain is the peak of the second epoch (in the first, memory is still being taken for the first time), ours that of the
last: a ratio of 1 means that nothing is kept that should not be. Each epoch includes validation and a checkpoint.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import peak_bytes, report

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

import create_input_files
import train
from captioning.command_line import run_script
from captioning.preparation.shapes import create_shapes

TINY = {"encoder": "shufflenet_v2_x0_5", "encoder_weights": "none", "encoded_image_size": 2, "embed_dim": 32,
        "decoder_dim": 32, "attention_dim": 32, "val_beam_size": 1, "stop_patience": 10**6}  # fmt: skip
CASES = {"frozen encoder": {}, "fine-tuned encoder": {"fine_tune_encoder": True, "cache_features": False}}


@dataclass
class Config:
    device: str = "cpu"  # 'cpu' or 'cuda'; the memory is that of the CPU's side
    steps: int = 2000  # of training, of each case
    epochs: int = 20  # into which they are divided
    batch_size: int = 2  # captions


def main(config):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        photos = max(1, config.steps // config.epochs * config.batch_size // 5)  # each with five captions
        annotations = create_shapes("drawn", photos, 2, 2)
        create_input_files.main(
            create_input_files.Config(
                "d", (str(annotations),), output_folder="data", min_word_freq=0, image_size=64, workers=0
            )
        )
        for case, options in CASES.items():
            peaks = train_and_measure(config, case, options)
            print(f"{case}: peak of each epoch in MB: {', '.join(f'{peak / 1e6:.0f}' for peak in peaks)}", flush=True)
            rows.append((f"{case}, {config.steps} steps", "MB", peaks[1] / 1e6, peaks[-1] / 1e6, None))
    report("memory", rows)


def train_and_measure(config, case, options):
    """:return: list of the most bytes that the process held in each epoch"""
    peaks, validate = [], train.validate

    def measure_and_validate(*args):
        result = validate(*args)
        peaks.append(peak_bytes())
        return result

    train.validate = measure_and_validate
    train.main(
        train.Config("data", "d_5_cap_per_img_0_min_word_freq", f"runs/{case}", device=config.device, **TINY, **options,
                     batch_size=config.batch_size, epochs=config.epochs)
    )  # fmt: skip
    train.validate = validate
    return peaks


if __name__ == "__main__":
    run_script(main, Config)
