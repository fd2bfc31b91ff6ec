"""Which of train.py's settings go together: one that could never have an effect is refused, not passed over."""

import itertools
from pathlib import Path

from captioning.config_fields import check_fields, fields_read_in
from captioning.distributed import get_world_size
from captioning.networks.registry import SETTINGS, WITH_ATTENTION
from captioning.training.start import build_augmentation
from utils import UserError


def check_config(config):
    """:raises UserError: if a value of train.py's config makes no sense, alone or beside the others"""
    folder = Path(__file__).parent
    readers = (folder / name for name in ("run.py", "start.py"))
    check_fields(config, needed=(*SETTINGS, *itertools.chain.from_iterable(map(fields_read_in, readers))))
    if config.batch_size < get_world_size():
        raise UserError(f"batch_size: {config.batch_size} found, {get_world_size()} or more expected, one per process")
    defaults = type(config)()
    for name, works, expected in (
        ("reinforce_weight", config.decoder == "hard", "--decoder hard"),
        ("entropy_weight", config.decoder == "hard", "--decoder hard"),
        ("doubly_stochastic_weight", config.decoder in WITH_ATTENTION, "a --decoder with attention"),
        ("fine_tune_from_step", config.fine_tune_encoder, "--fine_tune_encoder"),
        ("fine_tune_from_block", config.fine_tune_encoder, "--fine_tune_encoder"),
        ("fine_tune_from_block", config.encoder_weights != "none", "pretrained --encoder_weights"),
        ("encoder_lr", config.fine_tune_encoder, "--fine_tune_encoder"),
        ("fine_tune_embeddings", config.word_vectors is not None, "--word_vectors"),
        ("embedding_lr", config.fine_tune_embeddings, "--fine_tune_embeddings"),
        ("cached_views", config.cache_features, "--cache_features"),
        ("cached_views", build_augmentation(config).active, "--crop_min_scale, --flip, --colour, --warp or --noise"),
        ("clip_at", config.clip != "none", "--clip value or norm"),
        ("schedule_patience", config.schedule == "plateau", "--schedule plateau"),
        ("schedule_gamma", config.schedule in ("plateau", "steps", "exponential"), "such a --schedule"),
        ("schedule_cycles", config.schedule == "cosine", "--schedule cosine"),
        ("schedule_step_size", config.schedule in ("steps", "exponential"), "--schedule steps or exponential"),
        ("teacher_forcing_floor", config.teacher_forcing != "always", "a --teacher_forcing that decays"),
        ("self_critical_from_epoch", config.image_major, "--image_major"),
        ("self_critical_lr", config.self_critical_from_epoch is not None, "--self_critical_from_epoch"),
        ("self_critical_temperature", config.self_critical_from_epoch is not None, "--self_critical_from_epoch"),
        ("self_critical_samples", config.self_critical_from_epoch is not None, "--self_critical_from_epoch"),
    ):
        if getattr(config, name) != getattr(defaults, name) and not works:
            raise UserError(f"{name}: {getattr(config, name)} found, but it does nothing without {expected}")
    if config.self_critical_from_epoch is not None and config.decoder == "hard":
        raise UserError(
            f"self_critical_from_epoch: {config.self_critical_from_epoch} found, None expected: hard "
            "attention learns where to look from true captions"
        )
    if config.self_critical_from_epoch is not None and config.self_critical_from_epoch > config.epochs:
        raise UserError(
            f"self_critical_from_epoch: {config.self_critical_from_epoch} found, but the run ends after epoch "
            f"{config.epochs}; give an earlier one, or more --epochs"
        )
    if config.ema_decay and config.average_last > 1:
        raise UserError(
            f"average_last: {config.average_last} found with --ema_decay {config.ema_decay}, but best.pth can hold one "
            "mean only; leave one of them out"
        )
    if config.tie_weights and not config.fine_tune_embeddings:
        raise UserError("fine_tune_embeddings: False found, but with --tie_weights they are the output's weights too")
    if config.start_from is not None and config.resume not in (None, "auto"):
        raise UserError(
            f"start_from: {config.start_from} found, but --resume {config.resume} continues with that run's own "
            "weights; leave one of them out"
        )


def check_total_steps(config, total_steps):
    """:raises UserError: if what is to happen at a step comes after the last one"""
    if config.fine_tune_encoder and config.fine_tune_from_step >= total_steps:
        raise UserError(
            f"fine_tune_from_step: {config.fine_tune_from_step} found, but the run ends after step {total_steps}; give "
            "an earlier one, or more --epochs"
        )
    if config.validate_every >= total_steps:
        raise UserError(
            f"validate_every: {config.validate_every} found, but the run ends after step {total_steps}; give less"
        )
