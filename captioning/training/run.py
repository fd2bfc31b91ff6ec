"""
Everything that training changes, in one place: built from train.py's config, saved into checkpoints, taken up again.
"""

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch.utils.tensorboard import SummaryWriter

from captioning.command_line import check_fields
from captioning.distributed import average, gather, get_rank, get_world_size, wrap
from captioning.networks.backbones import load_backbone
from captioning.networks.registry import SETTINGS, build_decoder, build_encoder
from captioning.preparation.word_vectors import load_word_vectors
from captioning.storage.tensors import check_weights, load_tensors
from captioning.training.augmentation import Augmentation
from captioning.training.losses import CaptionLoss
from captioning.training.schedules import Schedule
from utils import UserError, choose_autocast, short


class EncoderDecoder(torch.nn.Module):
    """Photos and captions in, scores out: the forward pass that training differentiates."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images, *captions):
        """:param captions: what `models.CaptionDecoder.forward` takes after the features; :return: a `Decoded`"""
        return self.decoder(self.encoder.features(images), *captions)


@dataclass
class Run:
    """All that training changes, and where it stands."""

    config: object  # train.py's
    word_map: dict
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
    total_steps: int  # of the optimizer, if nothing stops the run before
    image_size: int  # of the photos, in pixels
    writer: SummaryWriter | None = None  # TensorBoard's, once the training begins
    step: int = 0  # of the optimizer, done so far
    epoch: int = 0  # done so far
    batch: int = 0  # of the epoch under way, done so far
    readings: dict = field(default_factory=dict)  # name -> 0-d tensors of the batches since they were last printed
    best_score: float = -1.0
    epochs_since_best: int = 0

    PARTS = ("encoder", "decoder", "loss_function", "optimizer", "schedule", "scaler")
    PROGRESS = ("step", "epoch", "batch", "best_score", "epochs_since_best")
    ORDER = ("batch_size", "accumulate", "image_major", "bucket", "seed")  # settings that say what the next batch is

    def may_cache(self, steps):
        """:return: dict of split -> whether cached features will do for the next `steps` of the optimizer"""
        trained = self.config.fine_tune_encoder and self.step + steps > self.config.fine_tune_from_step
        wanted = self.config.cache_features and not trained
        return {"TRAIN": wanted and not self.augmentation.active, "VAL": wanted}

    def is_self_critical(self):
        """:return: whether in the epoch under way the model is taught by its own captions"""
        first = self.config.self_critical_from_epoch
        return first is not None and self.epoch + 1 >= first

    def unfreeze_encoder_in_time(self):
        """Let the encoder join in, once its step has come."""
        config = self.config
        if config.fine_tune_encoder and self.step >= config.fine_tune_from_step and self.encoder.frozen:
            self.encoder.fine_tune(True, config.fine_tune_from_block)
            self.model = None  # the old wrapper goes before the new one comes: both would listen to the decoder
            self.model = wrap(EncoderDecoder(self.encoder, self.decoder), share_buffers=True)

    def log(self, name, value, step):
        """Note a number for TensorBoard, in the one process that writes."""
        if self.writer:
            self.writer.add_scalar(name, value, step)

    def finish_epoch(self, score):
        """Count the epoch and tell the schedule how it went; :return: whether it is the best so far"""
        best = score > self.best_score
        self.best_score = max(score, self.best_score)
        self.epochs_since_best = 0 if best else self.epochs_since_best + 1
        self.epoch, self.batch = self.epoch + 1, 0
        if self.schedule.after_validation(score):
            print("No better for a while: the learning rates drop")
        return best

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
            "progress": {name: getattr(self, name) for name in self.PROGRESS},
            "readings": {name: average(torch.tensor(values)).tolist() for name, values in self.readings.items()},
            "random_states": gather(self.random_state()),
        }

    def random_state(self):
        """:return: dict of this process's states of torch's generators: of the CPU, and of its GPU, or None"""
        on_gpu = self.device.type == "cuda"
        return {"cpu": torch.get_rng_state(), "gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None}

    def load_state_dict(self, checkpoint):
        """Go on where a checkpoint stopped."""
        if checkpoint["word_map"] != self.word_map:
            raise UserError("resume: the checkpoint has other words than the data; give the data of its run")
        within_epoch = checkpoint["progress"].get("batch", 0) > 0
        same = ("encoder", "encoder_dim", "fine_tune_encoder", "decoder", "optimizer", *SETTINGS)
        for name in (*same, *self.ORDER * within_epoch):
            found, expected = getattr(self.config, name), checkpoint["config"].get(name)
            if found != expected:
                raise UserError(f"{name}: {found!r} found, but the resumed run has {expected!r}; repeat its options")
        try:
            check_parts(self, checkpoint)
            rates = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
            for name in self.PARTS:
                getattr(self, name).load_state_dict(checkpoint[name])
            for group, (lr, weight_decay) in zip(self.optimizer.param_groups, rates, strict=True):
                group |= {"initial_lr": lr, "weight_decay": weight_decay}  # a run that diverged may go on with others
            self.schedule.apply()
            for name in self.PROGRESS:
                setattr(self, name, checkpoint["progress"].get(name, getattr(self, name)))
            for name, values in checkpoint.get("readings", {}).items():
                self.readings[name] = list(torch.tensor(values, device=self.device))
            for state in checkpoint["random_states"][get_rank() :][:1]:  # none, if there are more processes now
                torch.set_rng_state(state["cpu"])
                if state["gpu"] is not None and self.device.type == "cuda":
                    torch.cuda.set_rng_state(state["gpu"], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, UserError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"resume: the checkpoint is of another run ({reason}); repeat its options") from error


def check_parts(run, checkpoint):
    """
    See that a checkpoint's parts fit the run's before any is taken: the optimizer's fused steps trust all sizes, and
    would write beyond the end of a tensor that is too small.

    :raises UserError: if one does not fit; other errors if something is missing or is of another kind
    """
    for name in ("encoder", "decoder", "loss_function"):
        check_weights(getattr(run, name), checkpoint[name], name)
    for name in ("schedule", "scaler", "progress"):
        for key, value in checkpoint[name].items():
            check_number(value, f"{name}: '{key}'")
            if name == "progress" and key != "best_score" and (type(value) is not int or value < 0):
                raise UserError(f"progress: '{key}' is {value}, a whole number from 0 expected")
    own, found = run.optimizer.state_dict(), checkpoint["optimizer"]
    for own_group, group in zip(own["param_groups"], found["param_groups"], strict=True):
        for key, value in group.items():
            if isinstance(own_group.get(key), float):
                check_number(value, f"optimizer: '{key}'")
            elif key in own_group and type(value) is not type(own_group[key]):
                raise UserError(f"optimizer: '{key}' is {short(value)}, {short(own_group[key])} expected")
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    for index, moments in found["state"].items():
        for key, value in moments.items():
            if key == "momentum_buffer" and value is None:  # of a parameter that no step has changed yet
                continue
            shape = parameters[index].shape if key != "step" else torch.Size()
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.isfinite().all():
                raise UserError(f"optimizer: '{key}' of parameter {index} does not fit it, or is not finite")


def check_number(value, where):
    """:raises UserError: if it is no number below infinity; what is below all, a best score may be at first"""
    if not isinstance(value, int | float) or not value < math.inf:
        raise UserError(f"{where} is {short(value)}, a number expected")


def check_config(config):
    """:raises UserError: if a value of train.py's config makes no sense, alone or beside the others"""
    check_fields(config)
    if config.batch_size < get_world_size():
        raise UserError(f"batch_size: {config.batch_size} found, {get_world_size()} or more expected, one each process")
    defaults = type(config)()
    for name, works, expected in (
        ("reinforce_weight", config.decoder == "hard", "--decoder hard"),
        ("entropy_weight", config.decoder == "hard", "--decoder hard"),
        ("doubly_stochastic_weight", config.decoder != "show_tell", "a --decoder with attention"),
        ("fine_tune_from_step", config.fine_tune_encoder, "--fine_tune_encoder"),
        ("fine_tune_from_block", config.fine_tune_encoder, "--fine_tune_encoder"),
        ("fine_tune_from_block", config.encoder_weights != "none", "pretrained --encoder_weights"),
        ("encoder_lr", config.fine_tune_encoder, "--fine_tune_encoder"),
        ("fine_tune_embeddings", config.word_vectors is not None, "--word_vectors"),
        ("embedding_lr", config.fine_tune_embeddings, "--fine_tune_embeddings"),
        ("clip_at", config.clip != "none", "--clip value or norm"),
        ("schedule_patience", config.schedule == "plateau", "--schedule plateau"),
        ("schedule_gamma", config.schedule in ("plateau", "steps", "exponential"), "such a --schedule"),
        ("schedule_cycles", config.schedule == "cosine", "--schedule cosine"),
        ("schedule_step_size", config.schedule in ("steps", "exponential"), "--schedule steps or exponential"),
        ("teacher_forcing_floor", config.teacher_forcing != "always", "a --teacher_forcing that decays"),
        ("self_critical_from_epoch", config.image_major, "--image_major"),
        ("self_critical_samples", config.self_critical_from_epoch, "--self_critical_from_epoch"),
    ):
        if getattr(config, name) != getattr(defaults, name) and not works:
            raise UserError(f"{name}: {getattr(config, name)} found, but it does nothing without {expected}")
    if config.self_critical_from_epoch and config.decoder == "hard":
        raise UserError(
            f"self_critical_from_epoch: {config.self_critical_from_epoch} found, None expected: 'hard' is taught where "
            "to look by how likely true captions become"
        )
    if config.tie_weights and not config.fine_tune_embeddings:
        raise UserError("fine_tune_embeddings: False found, but with --tie_weights they are the output's weights too")


def start_run(config, captions, device, total_steps):
    """
    Build everything that the config names, at step 0.

    :param captions: `CaptionDataset` of the training split
    :param total_steps: of the optimizer, if nothing stops the run before
    :return: `Run`
    """
    word_map = captions.word_map
    local = config.encoder_weights not in ("imagenet", "none")
    weights = "none" if local else config.encoder_weights
    encoder = build_encoder(dataclasses.asdict(config), weights)
    if local:
        load_backbone(encoder, load_tensors(config.encoder_weights), config.encoder_weights)
    elif weights == "none" and not config.fine_tune_encoder:
        print("The encoder is random and not trained: you may want --encoder_weights imagenet or --fine_tune_encoder")

    vectors = None
    if config.word_vectors:
        wanted = config.embed_dim if config.embed_dim != SETTINGS["embed_dim"].default else None
        vectors, _ = load_word_vectors(config.word_vectors, word_map, wanted, config.seed)
        config = dataclasses.replace(config, embed_dim=vectors.shape[1])
    decoder = build_decoder(dataclasses.asdict(config), len(word_map), encoder.encoder_dim)
    if vectors is not None:
        decoder.load_pretrained_embeddings(vectors)
    decoder.fine_tune_embeddings(config.fine_tune_embeddings)
    encoder, decoder = encoder.to(device), decoder.to(device)
    if config.compile:
        encoder.backbone.compile()  # in place: the names in checkpoints stay

    optimizer = build_optimizer(config, encoder, decoder)
    encoder.fine_tune(config.fine_tune_encoder and config.fine_tune_from_step == 0, config.fine_tune_from_block)
    return Run(
        config, word_map, device, choose_autocast(config.precision, device), encoder, decoder,
        wrap(EncoderDecoder(encoder, decoder), share_buffers=not encoder.frozen),
        Augmentation(config.crop_min_scale, config.flip, config.colour, config.warp, config.noise).train(),
        CaptionLoss(config.doubly_stochastic_weight, config.label_smoothing, config.reinforce_weight,
                    config.entropy_weight).to(device),
        optimizer,
        Schedule(config.schedule, optimizer, total_steps, warmup_steps=config.warmup_steps,
                 step_size=config.schedule_step_size, gamma=config.schedule_gamma,
                 patience=config.schedule_patience, cycles=config.schedule_cycles),
        torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"), total_steps, captions.image_size,
    )  # fmt: skip


def build_optimizer(config, encoder, decoder):
    """:return: optimizer with a group, and so a learning rate, each for decoder, embeddings and encoder"""
    embeddings = list(decoder.embedding.parameters())
    rest = [parameter for parameter in decoder.parameters() if parameter is not decoder.embedding.weight]
    rest += encoder.project.parameters()  # the 1 x 1 convolution is new, as the decoder is
    groups = [
        {"params": rest, "lr": config.decoder_lr},
        {"params": embeddings, "lr": config.decoder_lr if config.embedding_lr is None else config.embedding_lr},
    ]
    encoder.fine_tune(config.fine_tune_encoder, config.fine_tune_from_block)  # now or later
    trained = [parameter for parameter in encoder.backbone.parameters() if parameter.requires_grad]
    if config.fine_tune_encoder and not trained:
        raise UserError(
            f"fine_tune_from_block: {config.encoder} has no block {config.fine_tune_from_block}, give a lower one"
        )
    if trained:
        groups.append({"params": trained, "lr": config.encoder_lr})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, weight_decay=config.weight_decay, fused=True)
