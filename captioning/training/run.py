"""
A run: everything that training changes, and where it stands. It is built in start.py, and taken up again in resume.py.
"""

import dataclasses
import math
from dataclasses import dataclass, field

import torch

from captioning.distributed import average, gather, wrap
from captioning.evaluation.metrics import BLEU
from captioning.training.augmentation import Augmentation, View, says_left_or_right
from captioning.training.losses import READINGS, CaptionLoss
from captioning.training.run_log import RunLog
from captioning.training.schedules import Schedule, teacher_forcing
from captioning.training.weight_averaging import WeightAverage
from utils import UserError


class EncoderDecoder(torch.nn.Module):
    """Photos and captions in, logits out: the forward pass that training differentiates."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images, *captions):
        """:param captions: what `models.CaptionDecoder.forward` takes after the features; :return: a `Decoded`"""
        return self.decoder(self.encoder.features(images), *captions)


@dataclass(kw_only=True)
class Run:
    """All that training changes, and where it stands."""

    config: object  # train.py's
    word_map: dict
    image_size: int  # of the photos, in pixels
    max_length: int  # of a caption, in words: the longest training caption's, or more if a trained captioner wrote more
    data: dict  # what the training data is recognised by, see `data_identity.describe_data`
    device: torch.device
    autocast: object  # context of the matrix products' precision
    encoder: torch.nn.Module
    decoder: torch.nn.Module
    model: torch.nn.Module  # both; of several processes, in DistributedDataParallel
    augmentation: Augmentation
    loss_function: CaptionLoss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    average: WeightAverage  # of the weights over time, if it is asked for
    steps_per_epoch: int  # of the optimizer
    total_steps: int  # of the optimizer, with true captions, if nothing stops the run before
    log: RunLog = field(default_factory=RunLog)  # where its numbers go; nowhere, before the training begins

    # Where it stands
    step: int = 0  # of the optimizer, done so far
    epoch: int = 0  # done so far
    batch: int = 0  # of the epoch under way, done so far
    readings: dict = field(default_factory=dict)  # name -> 0-d tensors of the batches since they were last logged
    sums: dict = field(default_factory=dict)  # name -> sum and number of the readings of the epoch under way
    history: list = field(default_factory=list)  # a dict for each epoch that is done: losses, scores, seconds
    best: dict = field(default_factory=dict)  # the entry of `history` of the best epoch so far; empty before it
    epochs_since_best: int = 0
    self_critical_since: int = 0  # the step at which rewards began; 0 before

    PARTS = ("encoder", "decoder", "loss_function", "optimizer", "schedule", "scaler", "average")
    PROGRESS = ("step", "epoch", "batch", "epochs_since_best", "self_critical_since")

    def train_mode(self, with_dropout):
        """
        Let the loss keep its moving baseline, and the model behave as it learns.

        :param with_dropout: False under rewards: what is taught must be what drew the captions
        """
        self.encoder.train(with_dropout)
        self.decoder.train(with_dropout)
        self.loss_function.train()

    def trained_parameters(self):
        """:return: list of what the optimizer changes"""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def learning_rate(self):
        """:return: that of the decoder, in the step to come"""
        return self.optimizer.param_groups[0]["lr"]

    def true_word_probability(self):
        """:return: how often the decoder is shown the true word before, see `schedules.teacher_forcing`"""
        name, floor = self.config.teacher_forcing, self.config.teacher_forcing_floor
        return teacher_forcing(name, self.step, self.total_steps, floor)

    def augment(self, batch):
        """:return: the batch with its photos changed at random; not mirrored where a caption says left or right"""
        if not self.augmentation.active or batch.images.dtype == torch.float16:  # cached features, of a changed copy
            return batch
        may_flip = ~says_left_or_right(batch.captions, self.word_map, batch.image_rows)  # (B,)
        return batch._replace(images=self.augmentation(batch.images, may_flip))

    def views(self, dataset):
        """:return: list of `View`, the changed copies of the dataset's photos that the config wants cached"""
        return [View(number, self.augmentation, dataset) for number in range(1, self.config.cached_views + 1)]

    def may_cache(self, steps):
        """:return: dict of split -> whether cached features will do for the next `steps` of the optimizer"""
        trained = self.config.fine_tune_encoder and self.step + steps > self.config.fine_tune_from_step
        wanted = self.config.cache_features and not trained
        changes_photos = self.augmentation.active and self.config.cached_views == 0
        return {"TRAIN": wanted and not changes_photos, "VAL": wanted}

    def is_self_critical(self):
        """:return: whether in the epoch under way the model is taught by its own captions"""
        first = self.config.self_critical_from_epoch
        return first is not None and self.epoch + 1 >= first

    def begin_self_critical(self):
        """
        Go over to rewards, once: with a learning rate of their own, which runs through the schedule from its beginning,
        and without Adam's moments, which are those of another loss.
        """
        if self.self_critical_since == 0:
            self.self_critical_since = max(1, self.step)
            self.optimizer.state.clear()
            self.schedule = self.schedule_of_rewards()

    def schedule_of_rewards(self):
        """:return: `Schedule` of the epochs with rewards, at whose first rates the optimizer stands now"""
        config = self.config
        for group in self.optimizer.param_groups:
            group["initial_lr"] *= config.self_critical_lr / config.decoder_lr
        steps = (config.epochs - config.self_critical_from_epoch + 1) * self.steps_per_epoch
        return build_schedule(config, self.optimizer, max(5, steps))  # 5: the least that all schedules take

    def unfreeze_encoder_in_time(self):
        """Let the encoder join in, once its step has come."""
        config = self.config
        if config.fine_tune_encoder and self.step >= config.fine_tune_from_step and self.encoder.frozen:
            self.encoder.fine_tune(True, config.fine_tune_from_block)
            self.model = None  # the old wrapper goes before the new one comes: both would listen to the decoder
            self.model = wrap(EncoderDecoder(self.encoder, self.decoder), share_buffers=True)

    def entry(self, measured):
        """
        :param measured: dict of validation's losses and scores, learning rate and seconds
        :return: dict of how far the run is and how it goes, for `history`, the curves and the epoch's line
        """
        return {"epoch": self.epoch + 1, "step": self.step, **self.mean_readings(), **measured}

    def mean_readings(self):
        """:return: dict of the means over the epoch under way: "train_loss" and so on"""
        return {READINGS.get(name, f"train_{name}"): total / number for name, (total, number) in self.sums.items()}

    def is_over(self):
        """:return: whether all epochs are done, or scores have stopped rising"""
        return self.epoch >= self.config.epochs or self.epochs_since_best >= self.config.stop_patience

    def finish_epoch(self, entry):
        """
        Count the epoch and tell the schedule how it went.

        :param entry: dict of its scores and losses, for `history`
        :return: whether it is the best so far, by `rank`; whether the learning rates were lowered
        """
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        self.history.append(entry)
        metric = self.config.stop_metric
        is_best = rank(entry, metric) > rank(self.best, metric)
        if is_best:
            self.best, self.epochs_since_best = entry, 0
        elif entry[metric] == 0:  # no caption shares four words in a row with a true one: that tells nothing yet
            return False, False
        else:
            self.epochs_since_best += 1
        return is_best, self.schedule.after_validation(is_best)

    def check_weights(self):
        """:raises UserError: if weights or running means are not finite: such a checkpoint would be of no use"""
        for part in (self.encoder, self.decoder):
            for name, tensor in part.state_dict().items():
                if not tensor.isfinite().all():
                    raise UserError(
                        f"{type(part).__name__}: {name} is not finite at step {self.step}; nothing is saved, --resume "
                        "the last checkpoint with lower learning rates"
                    )

    def state_dict(self):
        """:return: a checkpoint's content, of plain types only; to be called by all processes together"""
        return {
            **{name: getattr(self, name).state_dict() for name in self.PARTS},
            "config": dataclasses.asdict(self.config),
            "word_map": self.word_map,
            "image_size": self.image_size,
            "max_length": self.max_length,
            "data": self.data,
            "progress": {name: getattr(self, name) for name in self.PROGRESS},
            "best": self.best,
            "history": self.history,
            "readings": {name: average(torch.tensor(values)).tolist() for name, values in self.readings.items()},
            "sums": self.sums,
            "random_states": gather(self.random_state()),
        }

    def random_state(self):
        """:return: dict of this process's states of torch's generators: of the CPU, and of its GPU, or None"""
        on_gpu = self.device.type == "cuda"
        return {"cpu": torch.get_rng_state(), "gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None}


def build_schedule(config, optimizer, total_steps, warmup_steps=0, cycles=1):
    """:return: `Schedule` of the config's kind, over so many steps"""
    return Schedule(
        config.schedule,
        optimizer,
        total_steps,
        warmup_steps=warmup_steps,
        step_size=config.schedule_step_size,
        gamma=config.schedule_gamma,
        patience=config.schedule_patience,
        cycles=cycles,
    )


def rank(entry, metric):
    """
    What makes one epoch better than another: the metric; where that is equal, as when no caption shares four words in a
    row with a true one and BLEU-4 is 0, the longest n-grams that tell a difference; in the end the validation loss.

    :param entry: of a run's history; empty for none, which any other is better than
    :return: tuple, the greater the better
    """
    names = (metric, *reversed(BLEU))
    return (*(entry.get(name, -math.inf) for name in names), -entry.get("val_loss", math.inf))
