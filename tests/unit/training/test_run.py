"""What a run needs, and how it is taken up again."""

from types import SimpleNamespace

import pytest
import torch

from captioning.networks.registry import DECODERS, WITH_ATTENTION
from captioning.training.run import Run
from captioning.training.settings import check_config
from captioning.training.start import build_optimizer
from models import DecoderWithAttention, Encoder
from train import Config
from utils import UserError

WITHOUT_ATTENTION = next(name for name in DECODERS if name not in WITH_ATTENTION)


def a_run(step=0, augmented=False, **config):
    return SimpleNamespace(config=Config(**config), step=step, augmentation=SimpleNamespace(active=augmented))


def test_validation_stops_reading_the_cache_when_the_encoder_joins_in_also_with_augmentation():
    before = a_run(0, augmented=True, fine_tune_encoder=True, fine_tune_from_step=8)
    after = a_run(8, augmented=True, fine_tune_encoder=True, fine_tune_from_step=8)
    assert Run.may_cache(before, 8) == {"TRAIN": False, "VAL": True}
    assert Run.may_cache(after, 8) == {"TRAIN": False, "VAL": False}


def test_features_are_cached_only_in_epochs_in_which_the_encoder_is_not_trained_at_all():
    for step, cached in ((0, True), (5, False), (10, False)):
        run = a_run(step, fine_tune_encoder=True, fine_tune_from_step=8)
        assert Run.may_cache(run, 5) == {"TRAIN": cached, "VAL": cached}
    assert Run.may_cache(a_run(cache_features=False), 5) == {"TRAIN": False, "VAL": False}
    assert Run.may_cache(a_run(), 5) == {"TRAIN": True, "VAL": True}


def test_changed_photos_are_cached_if_their_number_is_fixed():
    assert Run.may_cache(a_run(augmented=True), 5) == {"TRAIN": False, "VAL": True}
    assert Run.may_cache(a_run(augmented=True, cached_views=2), 5) == {"TRAIN": True, "VAL": True}
    later = a_run(8, augmented=True, cached_views=2, fine_tune_encoder=True, fine_tune_from_step=8)
    assert Run.may_cache(later, 5) == {"TRAIN": False, "VAL": False}


def test_cached_views_that_could_never_have_an_effect_are_refused():
    check_config(Config(cached_views=2, flip=0.5))
    with pytest.raises(UserError, match="cached_views: 2 found, but it does nothing without --crop_min_scale, --flip"):
        check_config(Config(cached_views=2))
    with pytest.raises(UserError, match="cached_views: 2 found, but it does nothing without --cache_features"):
        check_config(Config(cached_views=2, flip=0.5, cache_features=False))


def test_each_part_has_its_own_learning_rate_and_the_new_projection_that_of_the_decoder():
    encoder, decoder = Encoder("resnet18", encoder_dim=8), DecoderWithAttention(10, 8, 4, 4, 4)
    config = Config(encoder="resnet18", fine_tune_encoder=True, encoder_lr=0.1, decoder_lr=0.2, embedding_lr=0.3)
    optimizer = build_optimizer(config, encoder, decoder)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(decoder.embedding.weight)] == 0.3
    assert rates[id(decoder.fc.weight)] == rates[id(encoder.project.weight)] == 0.2
    assert rates[id(next(encoder.backbone.parameters()))] == 0.1
    assert len(rates) == len(list(encoder.parameters())) + len(list(decoder.parameters()))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_frozen_encoder_is_not_in_the_optimizer(optimizer):
    encoder, decoder = Encoder("resnet18"), DecoderWithAttention(10, 512, 4, 4, 4)
    made = build_optimizer(Config(encoder="resnet18", optimizer=optimizer), encoder, decoder)
    assert isinstance(made, torch.optim.Optimizer)
    ids = {id(p) for group in made.param_groups for p in group["params"]}
    assert ids == {id(p) for p in decoder.parameters()}


def test_fine_tuning_that_would_train_nothing_is_refused():
    encoder, decoder = Encoder("squeezenet1_1"), DecoderWithAttention(10, 512, 4, 4, 4)
    encoder.pretrained = True  # its blocks go up to 3
    with pytest.raises(UserError, match="squeezenet1_1 has no block 4"):
        build_optimizer(
            Config(fine_tune_encoder=True, fine_tune_from_block=4, encoder="squeezenet1_1"), encoder, decoder
        )


@pytest.mark.parametrize(
    "setting",
    [
        {"optimizer": "lion"}, {"clip": "all"}, {"stop_metric": "SPICE"}, {"schedule": "poly"},
        {"teacher_forcing": "never"}, {"epochs": 0}, {"val_share": 1.5}, {"seed": -1}, {"workers": -1},
        {"label_smoothing": 3.0}, {"encoder_dim": -1}, {"teacher_forcing": "linear", "teacher_forcing_floor": 2.0},
        {"entropy_weight": 0.1}, {"encoder_lr": 0.1}, {"schedule_cycles": 3}, {"schedule_step_size": 10},
        {"schedule": "none", "schedule_patience": 3}, {"fine_tune_embeddings": False}, {"teacher_forcing_floor": 0.2},
        {"embedding_lr": 0.0}, {"weight_decay": -1.0}, {"decoder": WITHOUT_ATTENTION, "doubly_stochastic_weight": 0.5},
        {"clip": "none", "clip_at": 1.0}, {"schedule": "cosine", "schedule_gamma": 0.5},
        {"encoder_weights": "none", "fine_tune_encoder": True, "fine_tune_from_block": 3},
        {"word_vectors": "glove.txt", "fine_tune_embeddings": False, "embedding_lr": 0.1},
        {"word_vectors": "glove.txt", "tie_weights": True, "fine_tune_embeddings": False},
        {"self_critical_from_epoch": 3}, {"image_major": True, "self_critical_from_epoch": 0},
        {"ema_decay": 1.0}, {"ema_decay": 0.9, "average_last": 3}, {"average_last": 0},
        {"validate_every": -1}, {"self_critical_samples": 7},
        {"image_major": True, "decoder": "hard", "self_critical_from_epoch": 3},
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(setting):
    with pytest.raises(UserError, match=f"^{list(setting)[-1]}: "):
        check_config(Config(**setting))


def test_the_defaults_make_sense():
    check_config(Config())
