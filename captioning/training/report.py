"""What a run tells of itself: a header, a line and a figure for each epoch, and why it ended."""

import torch

from captioning.display.attention_figures import attention_figure
from captioning.evaluation import metrics
from captioning.evaluation.split_scores import FEW_PHOTOS
from captioning.storage.hdf5 import open_hdf5

# What the line of an epoch says besides its scores
PRINTED = {"epoch", "val_loss", "val_cut", "learning_rate", "train_seconds", "val_seconds"}


def print_header(run, captions, val_captions):
    """
    :param run: `Run`
    :param captions, val_captions: `CaptionDataset` of the training and of the validation split
    """
    config = run.config
    val_photos = max(1, round(config.val_share * val_captions.num_photos))
    each = f"{config.batch_size} {'photos' if config.image_major else 'captions'}"
    if config.accumulate > 1:
        each = f"{config.accumulate} batches of {each}, whose gradients are averaged"
    print(
        f"Device {run.device}; {captions.num_photos:,} photos with {len(captions.captions):,} captions to learn from, "
        f"{val_photos:,} photos to validate on; {len(run.word_map):,} words in the vocabulary"
    )
    print(
        f"Encoder {config.encoder}: {count(run.encoder)}; decoder {config.decoder}: {count(run.decoder)}; "
        f"{run.steps_per_epoch:,} steps per epoch, each of {each}"
    )
    defaults = type(config)()
    changed = {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}
    print("Settings: " + ", ".join(f"{name} {value}" for name, value in changed.items()))
    if val_photos < FEW_PHOTOS:
        print(
            f"Only {val_photos} photos to validate on: scores are coarse, and BLEU-4 may stay 0. Of epochs with equal "
            f"{config.stop_metric}, the other BLEU scores and then the validation loss tell which is better"
        )


def count(module):
    """:return: how many parameters a module has and trains, in words"""
    total = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return f"{total:,} parameters" + ("" if trained == total else f", {trained:,} of them trained")


def print_resumed(run, path, batches):
    """
    :param path: of the checkpoint
    :param batches: of an epoch
    """
    within = f", after {run.batch:,} of {batches:,} batches" if run.batch else ""
    if run.epoch < run.config.epochs:
        place = f"epoch {run.epoch + 1} of {run.config.epochs}{within}"
    else:
        place = f"after epoch {run.epoch} of {run.config.epochs}"
    print(f"Continuing from {path}: step {run.step:,}, {place}")
    if run.history:
        print(epoch_line(run.history[-1], run.config, run.history[-1] == run.best))


def log_epoch(run, figure):
    """
    Draw the curves of the epoch that is done.

    :param figure: where the model looked in one photo, or None
    """
    entry = run.history[-1]
    curves = {"cross_entropy": entry["val_loss"], **scores_in(entry)}
    run.log.numbers({f"val/{name}": value for name, value in curves.items()}, run.epoch)
    if figure:
        run.log.figure("val/attention", figure, run.epoch)


def print_epoch(run, is_best, lowered):
    """
    Print the line of the epoch that is done, and what follows from it.

    :param is_best: whether the epoch is the best so far
    :param lowered: whether the learning rates were lowered after it
    """
    print(epoch_line(run.history[-1], run.config, is_best))
    if lowered:
        print(f"No better for {run.config.schedule_patience} epochs: the learning rates are lowered")
    if warning := reward_warning(run.history, run.config):
        print(warning)


def figure_of_first_photo(run, captioner, dataset):
    """:return: figure of where the model looked for each word of its caption of the split's first photo"""
    with open_hdf5(dataset.image_file, "images") as file:
        photo = file["images"][0]  # (3, S, S)
    with run.autocast:
        [[best]] = captioner.search(
            torch.from_numpy(photo).unsqueeze(0), run.config.val_beam_size, run.max_length, keep_alphas=True
        )
    return attention_figure(photo.transpose(1, 2, 0), captioner.sentence(best), best.alphas_of_words())


def scores_in(entry):
    """:return: dict of metric -> value, of what a run notes of an epoch"""
    return {name: entry[name] for name in metrics.ALL if name in entry}


def epoch_line(entry, config, is_best):
    """
    :param entry: of a run's history
    :return: its numbers in a line
    """
    learned = {name: entry[f"train_{name}"] for name in ("loss", "reward") if f"train_{name}" in entry}
    learned = "".join(f"train {name} {value:.4f}, " for name, value in learned.items())
    scores = ", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name[0].isupper())
    seconds = f"{entry['train_seconds']:.0f} s and {entry['val_seconds']:.0f} s for validation"
    best = ", the best so far" if is_best else ""
    cut = f", {entry['val_cut']} captions cut" if entry["val_cut"] else ""
    return (
        f"epoch {entry['epoch']}: {learned}val loss {entry['val_loss']:.4f}, {scores} "
        f"(beam {config.val_beam_size}){cut}, learning rate {entry['learning_rate']:.2g}, {seconds}{best}"
    )


def print_within_epoch(run, measured):
    """
    Print, and draw, what validation within an epoch found; with a warning if rewards have made the model worse.

    :param measured: dict of validation's losses and scores, learning rate and seconds
    """
    entry = run.entry(measured)
    print(f"step {run.step:,}, within " + epoch_line(entry, run.config, is_best=False))
    run.log.numbers({f"val_within_epochs/{name}": value for name, value in scores_in(entry).items()}, run.step)
    if warning := reward_warning([*run.history, entry], run.config):
        print(warning)


def reward_warning(history, config):
    """:return: a line if rewards have made the model worse than it was without them, else None"""
    metric = config.stop_metric
    scores = [entry[metric] for entry in history if "train_reward" not in entry and metric in entry]
    if "train_reward" not in history[-1] or not scores or history[-1][metric] >= scores[-1]:
        return None
    return (
        f"Warning: {metric} is {history[-1][metric]:.4f} and was {scores[-1]:.4f} before the "
        "rewards; if it keeps falling, start them again from the checkpoint before, with a lower --self_critical_lr "
        f"than {config.self_critical_lr:g}"
    )


def print_end(run, folder):
    """Say why the run ended, and which checkpoint is which."""
    config = run.config
    if run.epochs_since_best >= config.stop_patience:
        why = f"no epoch since {run.best['epoch']} was better (--stop_patience {config.stop_patience})"
    else:
        why = "all epochs are done (--epochs)"
    print(f"The run ended after epoch {run.epoch}: {why}")
    if run.best:
        score = f"{config.stop_metric} {run.best[config.stop_metric]:.4f}"
        if folder.best.exists():
            print(f"{folder.best}: epoch {run.best['epoch']}, the best, {score}")
    if folder.last.exists():
        print(f"{folder.last}: epoch {run.epoch}, the last; --resume continues it, with more --epochs")
