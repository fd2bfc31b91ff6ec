"""
BLIP (Li et al. 2022), the modern yardstick: fine-tune a transformer on our files, and let it caption and be scored as
our own models are. It needs `pip install -r requirements-blip.txt`; nothing else in this collection needs blip.py.

    python blip.py finetune --model Salesforce/blip-image-captioning-base --data_folder data/coco ...
    python blip.py eval --model blip_finetuned_model --data_folder data/coco ...
    python blip.py caption --model blip_finetuned_model --img photo.jpg
    python blip.py new --data_folder data/shapes ...      # a small one of random weights, to try this offline
"""

import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from captioning.command_line import check_command_line, run_script
from captioning.config_fields import check_fields
from utils import (
    SPECIAL_WORDS,
    BeamSize,
    BeamSizes,
    CaptionLength,
    Count,
    Dimension,
    ImageSize,
    Layers,
    Metric,
    NotNegative,
    Positive,
    PositiveShare,
    Precision,
    Seed,
    Share,
    Split,
    Stopped,
    UserError,
    Workers,
    choose_device,
    seed_everything,
)

SHAPES = "shapes_5_cap_per_img_5_min_word_freq"


@dataclass
class Finetune:
    """Fine-tune a BLIP model on the files of create_input_files.py."""

    model: str = "Salesforce/blip-image-captioning-base"  # folder, or name on the Hugging Face hub
    data_folder: str = "data/shapes"  # folder of the files that create_input_files.py made
    data_name: str = SHAPES  # what their names share
    output_folder: str = "blip_finetuned_model"  # where the best model goes; also training.pth and TensorBoard's curves
    resume: bool = False  # continue the run whose training.pth is in output_folder
    overwrite: bool = False  # replace the fine-tuned model that is in output_folder; not together with --resume
    save_minutes: NotNegative = 10.0  # time between two savings within an epoch; 0 saves after each epoch only

    # What is learned
    freeze_vision: bool = False  # train the text transformer alone
    captions_per_photo: Count = 5  # captions learned when a photo is seen; if it has more, drawn each time
    max_pieces: CaptionLength = 50  # longer captions are cut, in word pieces
    label_smoothing: Share = 0.1  # share of the target that is spread over all pieces (0.1 in BLIP's own code)

    # Optimizer: AdamW; the learning rate rises, then falls to 0 along half a cosine
    epochs: Count = 5  # at most; the run may stop earlier (5 in the paper)
    batch_size: Count = 8  # photos per step, each with its captions
    accumulate: Count = 4  # steps whose gradients are added up before the weights change
    lr: Positive = 1e-5  # highest learning rate (1e-5 in the paper)
    warmup_share: Share = 0.05  # share of the run in which the learning rate rises
    weight_decay: NotNegative = 0.05  # pull of all weights towards 0 (0.05 in the paper)
    clip_at: Positive = 1.0  # largest norm of the gradients
    seed: Seed = 0  # of the order of the photos, the captions that are drawn, dropout

    # Validation, after each epoch, on captions that the model writes by itself
    val_beam_size: BeamSize = 3  # 1 for greedy choice
    val_batch_size: Count = 16  # photos
    val_share: PositiveShare = 1.0  # share of the split's photos that are captioned
    stop_metric: Metric = "BLEU-4"  # what 'better' means
    stop_patience: Count = 2  # epochs without a better score before the run ends

    # Speed and memory
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one
    precision: Precision = "float32"  # of the matrix products (autocast)
    gradient_checkpointing: bool = False  # compute each layer twice rather than remember it: less memory, more time
    workers: Workers = 0  # processes that read batches ahead; 0 reads in the training process
    print_every: Count = 100  # batches between two readings of the loss


@dataclass
class Caption:
    """Caption photos with a BLIP model."""

    img: tuple[str, ...]  # photos to caption: files, folders, or patterns such as 'holiday/*.jpg'
    model: str = "blip_finetuned_model"  # folder, or name on the Hugging Face hub
    output: str | None = None  # also write the captions here: .csv, .json or .html
    overwrite: bool = False  # replace the file of --output if it is there already
    beam_size: BeamSize = 5  # captions that the search keeps; 1 is greedy choice
    normalisation: Literal["none", "length"] = "none"  # rank captions by log-probability, or its mean
    max_length: CaptionLength = 50  # longest caption, in word pieces
    batch_size: Count = 16  # photos that are captioned at once
    workers: Workers | None = None  # processes that read photos; 0: this one alone; default one per core
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


@dataclass
class Eval:
    """Score a BLIP model: the same table and files as eval.py's."""

    model: str = "blip_finetuned_model"  # folder, or name on the Hugging Face hub
    data_folder: str = "data/shapes"  # folder of the files that create_input_files.py made
    data_name: str = SHAPES  # what their names share
    split: tuple[Split, ...] = ()  # of TRAIN, VAL and TEST; default TEST, or VAL where the data has no TEST
    beam_sizes: BeamSizes = (1, 3, 5)  # a row of the table each; 1 is greedy choice
    normalisation: Literal["none", "length"] = "none"  # rank captions by log-probability, or its mean
    max_length: CaptionLength = 50  # longest caption, in word pieces
    output_folder: str | None = None  # for all that is written; default the model's folder, or outputs/<its name>
    batch_size: Count = 16  # photos that are searched at once
    workers: Workers = 0  # processes that read batches ahead; 0 reads in this process
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one


@dataclass
class New:
    """Make a small BLIP of random weights with the words of your data, to try everything without a download."""

    data_folder: str = "data/shapes"  # folder of the files that create_input_files.py made
    data_name: str = SHAPES  # what their names share
    output_folder: str = "blip_small"  # where the model goes
    image_size: ImageSize = 128  # side of the photos that it sees, in pixels
    patch_size: ImageSize = 16  # side of a patch, in pixels
    dim: Dimension = 128  # dimension of a patch or a word piece
    layers: Layers = 4  # of each of its two transformers
    heads: Layers = 4  # of each attention
    seed: Seed = 0  # of the weights
    overwrite: bool = False  # replace the model that is in output_folder


COMMANDS = Finetune | Caption | Eval | New


if __name__ == "__main__":
    check_command_line(COMMANDS)  # before the imports below, which take seconds: --help comes at once

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from captioning.display.caption_tables import CaptionedPhoto, caption_row, check_output, print_captions, write_captions
from captioning.evaluation import metrics
from captioning.evaluation.split_scores import default_split, print_split, score_split, training_captions
from captioning.features import build_loader
from captioning.preparation.photo_batches import find_photos, is_single_photo, read_batches
from captioning.storage.files import check_not_there, save_json
from captioning.storage.folder_lock import sole_writer
from captioning.storage.tensors import load_tensors
from captioning.training.interruptions import FiniteCheck, Postponed
from datasets import BatchOrder, CaptionDataset

try:
    import transformers
except ImportError:
    print("error: blip.py needs the package transformers: pip install -r requirements-blip.txt", file=sys.stderr)
    sys.exit(2)

from captioning.blip.fine_tuning import build_fine_tuning, remove_leftovers_of
from captioning.blip.transformer import IGNORED, load_blip, new_blip


def main(config):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_config(config)
    {Finetune: finetune, Caption: caption, Eval: evaluate, New: new}[type(config)](config)


def finetune(config):
    """Train, validate after each epoch, and keep the best model."""
    folder = Path(config.output_folder)
    check_output_folder(config, folder)
    state = load_tensors(folder / "training.pth") if config.resume else None
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, "output_folder"):
        remove_leftovers_of(folder)
        finetune_in(folder, config, state)


def check_output_folder(config, folder):
    """:raises UserError: if fine-tuning would replace what is in its folder, unless that alone is asked for"""
    if config.resume and config.overwrite:
        raise UserError("resume, overwrite: both found, but one continues the run that the other replaces; give one")
    if config.resume or config.overwrite:
        return
    if (folder / "training.pth").exists():
        raise UserError(
            f"output_folder: {folder} holds a fine-tuning already; continue it (--resume), choose another "
            "--output_folder, or let it be replaced (--overwrite)"
        )
    if (folder / "model.safetensors").exists():
        raise UserError(
            f"output_folder: {folder} holds a model already; choose another, or let it be replaced (--overwrite)"
        )


def finetune_in(folder, config, state):
    """
    :param folder: Path, which this process alone writes to
    :param state: content of the training.pth to go on from, or None
    """
    device = choose_device(config.device)
    seed_everything(config.seed)
    data = config.data_folder, config.data_name
    order = BatchOrder(CaptionDataset(*data, "TRAIN", True).item_lengths(), config.batch_size, seed=config.seed)
    common = {"encoder": None, "device": device, "cached": False, "workers": config.workers}
    train_loader, _ = build_loader(*data, "TRAIN", order=order, **common)
    val_loader, _ = build_loader(*data, "VAL", batch_size=config.val_batch_size, share=config.val_share, **common)

    blip = load_blip(config.model, device)
    blip.check_pieces(config.max_pieces)
    run = build_fine_tuning(config, blip, config.epochs * math.ceil(len(order) / config.accumulate))
    if state:
        run.load_state_dict(state)
    while run.epoch < config.epochs and run.epochs_since_best < config.stop_patience:
        run.writer = run.writer or SummaryWriter(folder / "curves", purge_step=run.step + 1)
        order.set_epoch(run.epoch, start=run.batch)
        start = time.time()
        with Postponed() as stop:
            train_one_epoch(run, train_loader, folder, stop)
        seconds = time.time() - start
        with told_how_to_continue(run):
            found = validate(run, val_loader)
        with Postponed():
            best = run.finish_epoch(found)
            print(f"epoch {run.epoch}: {seconds:.0f} s, val loss {found['val_loss']:.4f}, "
                  f"{config.stop_metric} {found[config.stop_metric]:.4f} "
                  f"(beam {config.val_beam_size}){', the best so far' if best else ''}", flush=True)  # fmt: skip
            if best:
                blip.save(folder)
            run.save(folder)
    if run.writer:
        run.writer.close()
    if run.best:
        print(f"Best epoch: {run.best['epoch']}, {config.stop_metric} {run.best[config.stop_metric]:.4f}: {folder}")


@contextlib.contextmanager
def told_how_to_continue(run):
    """Within this block, which changes nothing of the run, a signal ends the script at once: all steps are saved."""
    try:
        yield
    except KeyboardInterrupt as reason:
        number = getattr(reason, "number", signal.SIGINT)
        message = f"stopped by {signal.Signals(number).name}; all {run.step} steps are saved, continue with --resume"
        raise Stopped(number, message) from None


def train_one_epoch(run, loader, folder, stop):
    """
    The rest of one pass over the photos: forward, backward, clip, step.

    :param run: `FineTuning`
    :param loader: DataLoader of training batches, from where the run stands
    :param folder: where the run is saved
    :param stop: `Postponed`; a signal lets the step end, and the run be saved
    :raises UserError: if the loss is not finite
    """
    config, blip = run.config, run.blip
    run.train_mode()
    losses, finite = [], FiniteCheck(loader.dataset, run.scaler)
    bar = tqdm(
        loader, f"epoch {run.epoch + 1}", total=len(loader), initial=run.batch, unit="step", leave=False, disable=None
    )
    for i, batch in enumerate(bar, start=run.batch):
        captions, rows = run.draw_captions(loader.dataset.references, batch.photos, i)
        ids, mask = blip.spell(captions, config.max_pieces)  # (N, T) each
        with run.autocast:
            seen = blip.see(batch.images)  # (B, P + 1, dim): each photo is looked at once for all its captions
            logits, targets = blip.predict(seen[rows.to(blip.device)], ids, mask)  # (N, T - 1, pieces), (N, T - 1)
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=config.label_smoothing
        )
        first = i // config.accumulate * config.accumulate  # batch of this step of the optimizer; the last may be short
        run.scaler.scale(loss / min(config.accumulate, len(loader) - first)).backward()
        losses.append(loss.detach())
        finite.add_batch(batch.photos, loss)

        stepped = (i + 1) % config.accumulate == 0 or i + 1 == len(loader)
        if stepped:
            rate = run.optimizer.param_groups[0]["lr"]
            run.scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(run.trained, config.clip_at)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            run.schedule.step()
            run.step, run.batch = run.step + 1, i + 1
            finite.add_step(run.step, rate, norm)

        reading = (i + 1) % config.print_every == 0 or i + 1 == len(loader)
        last = i + 1 == len(loader)  # validation comes next, and what stops that must not cost the epoch
        saving = stepped and (last or run.is_due() or stop.number is not None)
        if reading or saving:  # reading numbers makes a GPU wait
            finite.check()
        if reading:
            mean_loss, losses = torch.stack(losses).mean().item(), []
            run.writer.add_scalar("train/loss", mean_loss, run.step)
            run.writer.add_scalar("train/learning_rate", run.optimizer.param_groups[0]["lr"], run.step)
            bar.set_postfix(loss=f"{mean_loss:.3f}")
        if saving:
            run.save(folder)
        if stepped and stop.number is not None:
            print(f"Saved at step {run.step}; continue with --resume")
            return


def validate(run, loader):
    """
    :return: dict of "val_loss" (mean cross entropy of a word, in nats) and the scores of captions that the model wrote
        by itself, the config's `stop_metric` among them; they go to TensorBoard too
    """
    with run.autocast:
        hypotheses, references, *_ = run.blip.caption_split(loader, run.config.val_beam_size)
        loss = math.log(run.blip.perplexity(loader))
    wanted = dict.fromkeys((*metrics.BLEU, run.config.stop_metric))
    scores = metrics.score(references, hypotheses, tuple(wanted))
    for metric, value in scores.items():
        run.writer.add_scalar(f"val/{metric}", value, run.epoch + 1)
    run.writer.add_scalar("val/cross_entropy", loss, run.epoch + 1)
    return {"val_loss": loss, **scores}


def caption(config):
    """Caption photos; the same lines and files as caption.py's."""
    paths = find_photos(config.img)
    blip = load_blip(config.model, choose_device(config.device))
    photos = print_captions(caption_photos(blip, paths, config), is_single_photo(config.img, paths))
    write_captions(photos, config.output, Path(config.model).name, [config.model], asdict(config))


def caption_photos(blip, paths, config):
    """Yield a `CaptionedPhoto` for each photo that can be read, in order. The others are named on the error stream."""
    for batch in read_batches(paths, blip.image_size, config.batch_size, config.workers):
        images = torch.from_numpy(np.stack([image for _, image in batch]))  # (N, 3, S, S)
        found = blip.search(images, config.beam_size, config.max_length, config.normalisation)
        for (path, image), sentence in zip(batch, found, strict=True):
            yield CaptionedPhoto(path, image, [caption_row(*sentence)], None)


def evaluate(config):
    """Print a table for each split, and write the files that eval.py writes."""
    data_folder = Path(config.data_folder)
    model_folder = Path(config.model) if Path(config.model).is_dir() else Path("outputs", Path(config.model).name)
    output_folder = Path(config.output_folder or model_folder)
    blip = load_blip(config.model, choose_device(config.device))
    known = training_captions(data_folder / f"TRAIN_REFERENCES_{config.data_name}.json")
    for split in [name.upper() for name in config.split] or default_split(data_folder, config.data_name):
        loader, _ = build_loader(
            data_folder, config.data_name, split, None, blip.device, batch_size=config.batch_size, cached=False,
            workers=config.workers,
        )  # fmt: skip
        scores, statistics = score_split(
            blip, split, loader, None, known, config.beam_sizes, config.max_length, output_folder,
            normalisation=config.normalisation,
        )  # fmt: skip
        print_split(split, len(loader.dataset), scores, statistics)
        save_json({**statistics, "settings": asdict(config)}, output_folder / f"statistics_{split}.json")
    print(f"Written to {output_folder}: scores_*.json, statistics_*.json, captions_*_results.json, scores_*.csv")


def new(config):
    """Build the small model and save it."""
    check_not_there("output_folder", Path(config.output_folder, "model.safetensors"), config.overwrite)
    words = CaptionDataset(config.data_folder, config.data_name, "TRAIN", True).word_map
    seed_everything(config.seed)
    words = [word for word in words if word not in SPECIAL_WORDS]
    blip = new_blip(words, config.image_size, config.patch_size, config.dim, config.layers, config.heads)
    blip.save(config.output_folder)
    weights = sum(parameter.numel() for parameter in blip.model.parameters())
    print(f"A BLIP of {weights / 1e6:.1f} million random weights that knows {len(words)} words: {config.output_folder}")


def check_config(config):
    """:raises UserError: if a setting makes no sense"""
    check_fields(config)
    if isinstance(config, Caption):
        check_output(config.output)
        check_not_there("output", config.output, config.overwrite)
    if isinstance(config, New):
        for name, value, by in (("image_size", config.image_size, "patch_size"), ("dim", config.dim, "heads")):
            if value % getattr(config, by):
                raise UserError(f"{name}: {value} found, a multiple of {by} ({getattr(config, by)}) expected")


if __name__ == "__main__":
    run_script(main, COMMANDS)
