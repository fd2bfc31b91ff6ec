"""
Train a captioner: edit the hyperparameters below and run `python train.py`, or override them for one run with
`--name value`. Everything goes into the run's folder: checkpoints (last.pth, previous.pth, best.pth), TensorBoard's
curves, and what is needed to do the same again.
"""

import contextlib
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioning.command_line import check_command_line, run_script
from utils import (
    BeamSize,
    Block,
    Count,
    CountOrZero,
    Dimension,
    GridSide,
    Layers,
    Metric,
    NotNegative,
    Positive,
    PositiveShare,
    Precision,
    Probability,
    Seed,
    Several,
    Share,
    Stopped,
    Workers,
    seed_everything,
)


@dataclass
class Config:
    # Data
    data_folder: str = "data/shapes"  # folder of the files that create_input_files.py made
    data_name: str = "shapes_5_cap_per_img_5_min_word_freq"  # what their names share
    run_folder: str | None = None  # where checkpoints and curves go; default runs/<data_name>
    resume: str | None = None  # checkpoint to go on from, such as runs/shapes/last.pth; 'auto': the folder's, if any
    save_minutes: NotNegative = 10.0  # time between two checkpoints within an epoch; 0 saves after each epoch only

    # Encoder
    encoder: str = "resnet101"  # torchvision's name of the network
    encoder_weights: str = "imagenet"  # 'imagenet' (downloaded), 'none' (random), or a file with a state dict
    encoded_image_size: GridSide = 14  # side of the grid of features that attention sees, in cells
    encoder_dim: Dimension | None = None  # numbers in each cell, through a 1 x 1 convolution; default the network's own
    fine_tune_encoder: bool = False  # train the encoder too; without pretrained weights you want this
    fine_tune_from_step: CountOrZero = 0  # training steps before the encoder joins in
    fine_tune_from_block: Block = 2  # first convolutional block of a pretrained encoder that is trained

    # Decoder
    decoder: str = "soft"  # 'soft', 'hard' (Xu 2015), 'show_tell' (Vinyals 2015), 'spatial', 'adaptive' (Lu 2017)
    embed_dim: Dimension = 512  # numbers in a word's embedding
    decoder_dim: Dimension = 512  # numbers in the LSTM's state
    attention_dim: Dimension = 512  # numbers in the space where attention compares cells with the LSTM's state
    decoder_layers: Layers = 1  # LSTM cells on top of one another; the papers have one
    gate: bool = True  # soft, hard: scale each number of the context by a gate beta (tutorial; paper, section 4.2.1)
    deep_output: bool = False  # soft, hard: the word before and the context speak in the output too (paper, eq. 7)
    attention_nonlinearity: Literal["relu", "tanh"] = "relu"  # of attention's score; the paper has tanh
    hard_expected_share: Share = 0.5  # hard: share of training steps that take the expected value (paper, 4.1)
    hard_inference: Literal["argmax", "sample", "expectation"] = "argmax"  # hard: where to look
    tie_weights: bool = False  # one matrix for the embeddings and the vocabulary's scores (Press and Wolf 2017)
    embedding_max_norm: Positive | None = None  # longer embeddings are scaled down to this length; default no limit
    word_vectors: str | None = None  # file of pretrained embeddings, GloVe's or word2vec's text; sets embed_dim
    fine_tune_embeddings: bool = True  # train the embeddings; False only makes sense with word_vectors
    dropout: Probability = 0.5  # share of the decoder's output that is dropped in training (Srivastava et al. 2014)
    embedding_dropout: Probability = 0.0  # the same of the word embeddings
    state_dropout: Probability = 0.0  # soft, hard, show_tell: the same of the LSTM's first state

    # Loss
    doubly_stochastic_weight: NotNegative = 1.0  # pull towards looking at each location once (paper, eq. 14)
    label_smoothing: Share = 0.0  # share of the target that is spread over all words (Szegedy et al. 2016)
    reinforce_weight: NotNegative = 0.1  # hard: weight of the reward for drawn locations (paper, 4.1; its code: 0.1)
    entropy_weight: NotNegative = 0.002  # hard: weight of attention's entropy (paper, 4.1; its code: 0.002)
    teacher_forcing: Literal["always", "linear", "exponential", "inverse_sigmoid"] = "always"  # or scheduled sampling
    teacher_forcing_floor: Share = 0.5  # least share of true words that scheduled sampling shows (Bengio et al. 2015)
    self_critical_from_epoch: Count | None = None  # from then own captions are rewarded (Rennie et al. 2017)
    self_critical_samples: Several = 5  # own captions a photo, each compared with the mean of the others (Luo 2020)

    # Optimizer
    epochs: Count = 120  # if nothing stops the run before
    batch_size: Count = 32  # captions a step, on all GPUs together; with image_major: photos with all their captions
    accumulate: Count = 1  # steps whose gradients are added up before the weights change
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"  # sgd has Nesterov momentum 0.9
    encoder_lr: Positive = 1e-4  # learning rate of the encoder, if it is trained
    decoder_lr: Positive = 4e-4  # learning rate of the decoder
    embedding_lr: Positive | None = None  # learning rate of the word embeddings; default that of the decoder
    weight_decay: NotNegative = 0.0  # pull of all weights towards 0
    clip: Literal["value", "norm", "none"] = "value"  # gradients, each or by their norm (Pascanu 2013)
    clip_at: Positive = 5.0  # largest absolute value, or norm, of the gradients
    schedule: Literal["none", "steps", "plateau", "exponential", "cosine", "one_cycle"] = "plateau"  # of learning rates
    warmup_steps: CountOrZero = 0  # steps in which the learning rates rise to their first value (Goyal et al. 2017)
    schedule_patience: Count = 8  # plateau: epochs without a better score before the rates drop
    schedule_gamma: PositiveShare = 0.8  # plateau, steps, exponential: what the rates are multiplied by
    schedule_step_size: Count = 1000  # steps, exponential: in so many steps
    schedule_cycles: Count = 1  # cosine: number of warm restarts, and one (Loshchilov and Hutter 2017)
    seed: Seed = 0  # of the weights, the order of the captions, dropout
    deterministic: bool = False  # on GPUs too, equal runs give equal bits; slower

    # Augmentation; any of these turns the feature cache off
    crop_min_scale: PositiveShare = 1.0  # smallest share of a photo's area that a random crop keeps
    flip: Probability = 0.0  # probability that a photo is mirrored, unless a caption says left or right
    colour: Share = 0.0  # strength of changes of brightness, contrast and saturation
    warp: Share = 0.0  # strength of rotation, shear and perspective; 1 is up to 30 degrees
    noise: Share = 0.0  # standard deviation of Gaussian noise, where a pixel goes from 0 to 1

    # Validation, after each epoch, on captions that the model writes by itself
    val_beam_size: BeamSize = 3  # 1 for greedy choice
    val_batch_size: Count = 32  # photos at a time, on each GPU
    val_share: PositiveShare = 1.0  # share of the split's photos that are captioned
    stop_metric: Metric = "BLEU-4"  # what 'better' means
    stop_patience: Count = 20  # epochs without a better score before the run ends

    # Speed
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one
    workers: Workers = 0  # processes that read batches ahead (for each GPU); 0 reads in the training process
    precision: Precision = "float32"  # of the matrix products (autocast)
    tf32: bool = True  # on GPUs, let float32 products use TensorFloat-32
    compile: bool = False  # torch.compile the encoder's network; takes a minute at first, and gains nothing on CPUs
    fast_cpu: bool = True  # on CPUs, compute the decoder's same numbers in quicker ways (captioning/speed)
    cache_features: bool = True  # keep a frozen encoder's features in a file beside the data
    image_major: bool = False  # a photo with all its captions in one step: one encoder pass for all of them
    bucket: bool = False  # captions of about the same length in a batch
    print_every: Count = 100  # steps between two readings of the loss


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

import torch
from tqdm import tqdm

from captioning import distributed
from captioning.display.attention_figures import attention_figure
from captioning.evaluation import metrics
from captioning.features import build_loader
from captioning.inference.captioner import Captioner
from captioning.storage.hdf5 import open_hdf5
from captioning.training.augmentation import says_left_or_right
from captioning.training.interruptions import FiniteCheck, Postponed
from captioning.training.losses import top_k_accuracy
from captioning.training.run import check_config, start_run
from captioning.training.run_folder import RunFolder
from captioning.training.schedules import teacher_forcing
from captioning.training.self_critical import SelfCritic
from datasets import BatchOrder, CaptionDataset


def main(config):
    with distributed.join_processes(config.device, config.tf32) as device:
        train_on(device, config)


def train_on(device, config):
    """
    Set up a run and train.

    :param device: torch.device of this process
    :param config: `Config`
    """
    check_config(config)
    seed_everything(config.seed, config.deterministic)
    resumed_folder = Path(config.resume).parent if config.resume not in (None, "auto") else None
    folder = RunFolder(config.run_folder or resumed_folder or f"runs/{config.data_name}", config.save_minutes)
    checkpoint = folder.load(config.resume)

    captions = CaptionDataset(config.data_folder, config.data_name, "TRAIN", config.image_major)
    order = BatchOrder(
        captions.item_lengths(), config.batch_size, config.bucket, config.seed,
        rank=distributed.get_rank(), world_size=distributed.get_world_size(),
    )  # fmt: skip
    steps_per_epoch = math.ceil(len(order) / config.accumulate)  # of the optimizer
    run = start_run(config, captions, device, config.epochs * steps_per_epoch)
    distributed.seed_own(config.seed)
    if checkpoint:
        run.load_state_dict(checkpoint)
        del checkpoint  # as large as the run itself
    try:
        train(run, order, steps_per_epoch, folder)
    except KeyboardInterrupt as reason:  # no step is half done
        if run.step > folder.saved_step:
            folder.save(run)
        where = f" at step {run.step}; go on with --resume {folder.last}" if folder.last.exists() else ""
        number = getattr(reason, "number", signal.SIGINT)
        raise Stopped(number, f"stopped by {signal.Signals(number).name}{where}") from None
    finally:
        if run.writer:
            with contextlib.suppress(OSError):  # a full disk, of which an error already tells
                run.writer.close()
    print(f"Best val {config.stop_metric} {run.best_score:.4f}" + (f": {folder.best}" if folder.best.exists() else ""))


def train(run, order, steps_per_epoch, folder):
    """
    Epochs of training, each followed by validation, until their number is reached or scores no longer rise.

    :param run: `Run`
    :param order: `BatchOrder` of the training captions
    :param steps_per_epoch: of the optimizer
    :param folder: `RunFolder`
    """
    config = run.config
    loaders, cached, critic = None, None, None
    while run.epoch < config.epochs and run.epochs_since_best < config.stop_patience:
        steps_left = steps_per_epoch - math.ceil(run.batch / config.accumulate)  # in this epoch
        if cached != run.may_cache(steps_left):
            cached = run.may_cache(steps_left)
            loaders = build_loaders(config, run, order, cached)
        if distributed.is_first():
            run.writer = run.writer or folder.begin(config, run.step)
        if run.is_self_critical():
            critic = critic or SelfCritic(loaders["TRAIN"][0].dataset, config.self_critical_samples)
        order.set_epoch(run.epoch, start=run.batch)
        start = time.time()
        with Postponed() as stop:
            train_one_epoch(run, *loaders["TRAIN"], folder, stop, critic)
            if distributed.is_joined():  # later, several processes could not agree to save before they leave
                folder.save(run)
        seconds = time.time() - start

        with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):  # training's numbers stay
            scores, figure = validate(run, *loaders["VAL"])
        with Postponed():
            for metric, value in scores.items():
                run.log(f"val/{metric}", value, run.epoch + 1)
            if figure:
                run.writer.add_figure("val/attention", figure, run.epoch + 1)
            score = scores[config.stop_metric]
            best = run.finish_epoch(score)
            print(f"epoch {run.epoch}: {seconds:.0f} s, val {config.stop_metric} {score:.4f} "
                  f"(beam {config.val_beam_size}){', the best so far' if best else ''}")  # fmt: skip
            folder.save(run, best)


def train_one_epoch(run, loader, resident, folder, stop, critic):
    """
    One pass over the captions, or what is left of it: forward, backward, clip, step.

    :param run: `Run`
    :param loader: DataLoader of training batches
    :param resident: features of all photos that are on the GPU already, or None
    :param folder: `RunFolder`, where checkpoints go when they are due
    :param stop: `Postponed`; once its signal has come, no further step is made
    :param critic: as for `forward_backward`
    :raises UserError: if the loss or gradients are not finite
    """
    config = run.config
    run.encoder.train(), run.decoder.train(), run.loss_function.train()
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    finite = FiniteCheck(loader.dataset, run.scaler)
    bar = tqdm(
        loader, f"epoch {run.epoch + 1}", total=len(loader), initial=run.batch, unit="step", leave=False,
        disable=distributed.hide_bar(),
    )  # fmt: skip
    for i, batch in enumerate(bar, start=run.batch):
        run.unfreeze_encoder_in_time()
        rate = run.optimizer.param_groups[0]["lr"]
        share = distributed.share_of_batch(batch.lengths, loader.batch_sampler.has_share(i))
        first = i // config.accumulate * config.accumulate  # batch of this step of the optimizer; the last may be short
        window = min(config.accumulate, len(loader) - first)
        stepped = i + 1 == first + window
        with distributed.exchange(run.model, now=stepped):
            loss, readings = forward_backward(run, batch.to(run.device, resident), share, window, i == first, critic)
        finite.add_batch(batch.photos, loss)
        for name, value in readings.items():
            run.readings.setdefault(name, []).append(value)

        if stepped:
            run.scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if config.clip == "value":
                torch.nn.utils.clip_grad_value_(trained, config.clip_at)
            elif config.clip == "norm":
                torch.nn.utils.clip_grads_with_norm_(trained, config.clip_at, norm)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.schedule.step()
            run.step += 1
            run.batch = i + 1
            finite.add_step(run.step, rate, norm)

        reading = (i + 1) % config.print_every == 0 or i + 1 == len(loader)
        leaving, saving = False, False
        if stepped:
            signal_number, saving = distributed.highest(stop.number or 0, folder.is_due())
            leaving = signal_number > 0
            if leaving:
                stop.number = signal_number  # perhaps another process's
        if reading or saving or leaving or run.device.type == "cpu":  # reading numbers makes a GPU wait
            finite.check()
        if reading:
            means = {name: mean_of_finite(values) for name, values in run.readings.items()}
            run.readings = {}
            for name, mean in means.items():
                run.log(f"train/{name}", mean, run.step)
            run.log("train/learning_rate", rate, run.step)
            bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
        if leaving:
            return
        if saving:
            folder.save(run)


def mean_of_finite(readings):
    """:return: mean of a list of 0-d tensors, without those of steps that the scaler skipped"""
    values = distributed.average(torch.stack(readings))
    return values[values.isfinite()].mean().item()


def forward_backward(run, batch, share, window, begins, critic):
    """
    Add a batch's gradients to those of the batches before it in its window.

    :param batch: `datasets.Batch` on the run's device
    :param share: how much of the batch this process has
    :param window: number of batches whose gradients make one step of the optimizer
    :param begins: whether the batch is the first of these
    :param critic: `SelfCritic`, if the model is taught by its own captions, else None
    :return: loss, 0-d; dict of what to tell of the batch, each 0-d; of several processes, the mean is the batch's
    """
    config, images = run.config, batch.images
    if run.augmentation.active:
        images = run.augmentation(images, ~says_left_or_right(batch.captions, run.word_map, batch.image_rows))
    if critic:  # the model's own captions take the place of the true ones
        batch, advantages, reward = critic.draw(run, batch, images)
        true_words = 1.0
    else:
        advantages = None
        true_words = teacher_forcing(config.teacher_forcing, run.step, run.total_steps, config.teacher_forcing_floor)
    with run.autocast:
        decoded = run.model(images, batch.captions, batch.lengths, batch.image_rows, true_words)
        loss, cross_entropy = run.loss_function(decoded, share, advantages)
    if begins:
        run.optimizer.zero_grad()  # not before: the forward pass would take the memory that the new ones want
    run.scaler.scale(loss / window).backward()
    if critic:
        return loss.detach(), {"reward": share.captions * reward}
    accuracy = share.words * top_k_accuracy(decoded.logits.detach(), decoded.targets, 5)
    return loss.detach(), {"cross_entropy": cross_entropy, "top5_accuracy": accuracy}


def validate(run, loader, resident):
    """
    Let the model caption the validation photos by itself, without true words to lean on.

    :return: dict of metric -> score, the config's `stop_metric` among them; an attention figure of one photo, in the
        first process only
    """
    distributed.copy_buffers(run.encoder)
    captioner = Captioner(run.encoder, run.decoder, run.word_map)
    with run.autocast:
        hypotheses, references = captioner.caption_split(loader, run.config.val_beam_size, resident=resident)
    hypotheses, references = distributed.join_shares(hypotheses), distributed.join_shares(references)
    if not distributed.is_first():
        return distributed.from_first(None), None
    wanted = dict.fromkeys((*metrics.BLEU, run.config.stop_metric))
    scores = distributed.from_first(metrics.score(references, hypotheses, tuple(wanted)))

    with open_hdf5(loader.dataset.image_file, "images") as file:
        photo = file["images"][0]  # (3, S, S)
    with run.autocast:
        [[best]] = captioner.search(torch.from_numpy(photo).unsqueeze(0), run.config.val_beam_size, keep_alphas=True)
    words = captioner.sentence(best)
    alphas = None if best.alphas is None else best.alphas[: len(words)].float()
    return scores, attention_figure(photo.transpose(1, 2, 0), words, alphas)


def build_loaders(config, run, order, cached):
    """
    :param cached: dict of split -> whether its batches hold cached features
    :return: dict of split -> (DataLoader, features on the GPU or None)
    """
    if config.cache_features and not cached["TRAIN"]:
        print("Fine-tuning or augmentation: the encoder runs in every step, without the feature cache")
    common = {"encoder": run.encoder, "device": run.device, "autocast": run.autocast, "workers": config.workers}
    data = config.data_folder, config.data_name
    val = build_loader(
        *data, "VAL", batch_size=config.val_batch_size, share=config.val_share, cached=cached["VAL"], **common
    )
    train = build_loader(*data, "TRAIN", order=order, image_major=config.image_major, cached=cached["TRAIN"], **common)
    return {"TRAIN": train, "VAL": val}


if __name__ == "__main__":
    run_script(main, Config)
