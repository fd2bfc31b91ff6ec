"""
Everything that fine-tuning BLIP changes, in one place: built from blip.py's config, saved, taken up again.
"""

import dataclasses
import shutil
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from captioning.blip.transformer import SAVING, Blip
from captioning.storage.files import remove_leftovers
from captioning.storage.tensors import OTHER_KIND, check_weights, save_checkpoint
from captioning.training.resume import (
    LARGEST,
    changed_judgement,
    check_best,
    check_number,
    copy_moments,
    forget_best_if_changed,
)
from captioning.training.run import rank
from captioning.training.schedules import Schedule
from utils import UserError, choose_autocast, short


@dataclass
class FineTuning:
    """All that fine-tuning changes, and where it stands."""

    config: object  # blip.py's Finetune
    blip: Blip
    trained: list  # of the parameters that learn
    autocast: object  # context of the matrix products' precision
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    writer: SummaryWriter | None = None  # TensorBoard's, once the training begins
    epoch: int = 0  # done so far
    batch: int = 0  # of the epoch that is under way, done so far
    step: int = 0  # of the optimizer, done so far
    best: dict = field(default_factory=dict)  # the best epoch's number, scores and loss; empty before it
    epochs_since_best: int = 0
    saved_time: float = field(default_factory=time.monotonic)  # in seconds, of some clock

    PARTS = ("optimizer", "schedule", "scaler")
    PROGRESS = ("epoch", "batch", "step", "epochs_since_best")
    # What a resumed run must share with the one that it continues.
    FIXED = ("model", "data_name", "epochs", "batch_size", "captions_per_photo", "max_pieces", "accumulate",
             "freeze_vision", "label_smoothing", "lr", "weight_decay", "warmup_share", "clip_at", "seed")  # fmt: skip

    def train_mode(self):
        """Let the model learn; a frozen vision transformer stays in eval mode."""
        self.blip.model.train()
        if self.config.freeze_vision:
            self.blip.model.vision_model.eval()

    def draw_captions(self, references, photos, batch):
        """
        Choose the captions of this batch: of each photo up to `captions_per_photo`, others in another epoch. The choice
        depends on seed, epoch and batch alone, so that a resumed run makes the same one.

        :param references: of the split, a dict a photo
        :param photos: (B,), the photos' places in the split
        :param batch: its place in the epoch
        :return: N captions, each a list of words; (N,), the row of each caption's photo in the batch
        """
        random = np.random.default_rng((self.config.seed, self.epoch, batch))
        captions, rows = [], []
        for row, photo in enumerate(photos.tolist()):
            known = references[photo]["captions"]
            for i in random.permutation(len(known))[: self.config.captions_per_photo]:
                captions.append(known[i])
                rows.append(row)
        return captions, torch.tensor(rows)

    def finish_epoch(self, found):
        """
        Count the epoch.

        :param found: dict of its scores and its validation loss
        :return: whether it is the best so far, by `run.rank`
        """
        self.epoch, self.batch = self.epoch + 1, 0
        entry, metric = {"epoch": self.epoch, **found}, self.config.stop_metric
        is_best = rank(entry, metric) > rank(self.best, metric)
        if is_best:
            self.best, self.epochs_since_best = entry, 0
        elif entry[metric] > 0:  # while no caption shares four words in a row with a true one, BLEU-4 tells nothing
            self.epochs_since_best += 1
        return is_best

    def is_due(self):
        """:return: whether it is time to save within the epoch"""
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_time >= 60 * minutes

    def save(self, folder):
        """Write training.pth, from which the run can continue."""
        save_checkpoint(self.state_dict(), folder / "training.pth")
        self.saved_time = time.monotonic()

    def state_dict(self):
        """:return: all that a resumed run needs, of plain types only"""
        return {
            "model": self.blip.model.state_dict(),
            **{name: getattr(self, name).state_dict() for name in self.PARTS},
            "config": dataclasses.asdict(self.config),
            "progress": {name: getattr(self, name) for name in self.PROGRESS},
            "best": self.best,
            "random_state": torch.get_rng_state(),
            "gpu_random_states": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state):
        """
        Go on where a run stopped, in the middle of an epoch if need be.

        :raises UserError: if the state is that of another run
        """
        try:
            self.check_settings(state["config"])
            moments = self.check_parts(state)
            self.blip.model.load_state_dict(state["model"])
            # The optimizer's settings are the config's; only its moments come from the file.
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            self.schedule.apply()
            for name in self.PROGRESS:
                setattr(self, name, state["progress"][name])
            self.best = state.get("best") or self.best_of_old_file(state)
            torch.set_rng_state(state["random_state"])
            if len(state["gpu_random_states"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["gpu_random_states"])
        except OTHER_KIND as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"resume: the run was another one ({reason}); repeat its options") from error
        forget_best_if_changed(self, changed_judgement(self.config, state["config"]))

    def best_of_old_file(self, state):
        """:return: the best epoch, from a file of an older version that has but its score"""
        score = state["progress"].get("best_score", -1.0)
        return {"epoch": self.epoch, state["config"]["stop_metric"]: score} if score >= 0 else {}

    def check_settings(self, settings):
        """:raises UserError: if the run in the file had other settings than this one"""
        for name in self.FIXED:
            found, expected = getattr(self.config, name), settings.get(name)
            if found != expected:
                raise UserError(
                    f"{name}: {found!r} found, but the resumed run has {short(expected)}; repeat its options"
                )

    def check_parts(self, state):
        """
        See that all parts in the file fit before any is taken: the optimizer's fused steps trust all sizes.

        :return: the optimizer's moments, as `copy_moments` gives them
        :raises UserError: if one does not fit; other errors if something is missing or is of another kind
        """
        check_weights(self.blip.model, state["model"], "model")
        for part in ("schedule", "scaler", "progress"):
            for name, value in state[part].items():
                check_number(value, f"{part}: '{name}'")
        for name in self.PROGRESS:
            value = state["progress"][name]
            if type(value) is not int or not 0 <= value <= LARGEST:
                raise UserError(
                    f"progress: '{name}' is {short(value)}, a whole number from 0 to {LARGEST:,} expected; "
                    "give the training.pth of this run"
                )
        check_best(state)
        return copy_moments(self.optimizer, state["optimizer"])


def build_fine_tuning(config, blip, total_steps):
    """
    Build everything that the config names, at step 0.

    :param config: blip.py's Finetune
    :param blip: the `Blip` to start from, on its device
    :param total_steps: of the optimizer, if nothing stops the run before
    :return: `FineTuning`
    """
    model = blip.model
    model.vision_model.requires_grad_(not config.freeze_vision)
    if config.gradient_checkpointing:
        kind = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # what newer versions of transformers call it
            model.activation_checkpointing_enable(kind)
        else:
            model.gradient_checkpointing_enable(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    warmup_steps = min(round(config.warmup_share * total_steps), max(0, total_steps - 2))
    return FineTuning(
        config, blip, trained, choose_autocast(config.precision, blip.device), optimizer,
        Schedule("cosine" if total_steps - warmup_steps > 1 else "none", optimizer, total_steps,
                 warmup_steps=warmup_steps),
        torch.amp.GradScaler(blip.device.type, enabled=config.precision == "fp16"),
    )  # fmt: skip


def remove_leftovers_of(folder):
    """
    Remove what killed fine-tunings left under temporary names.

    :param folder: Path, which no other process may be writing to
    """
    remove_leftovers(folder, r"[\w.]+\.(pth|json|jinja|txt|safetensors)")
    for path in folder.glob(f"{SAVING}*"):
        shutil.rmtree(path, ignore_errors=True)
