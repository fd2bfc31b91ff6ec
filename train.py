"""
Train a captioner: edit the hyperparameters below and run `python train.py`, or override them for one run with
`--name value`. Everything goes into the run's folder: checkpoints (last.pth, previous.pth, best.pth), TensorBoard's
curves, a table of the epochs (log.csv), and what is needed to do the same again.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioning.command_line import check_command_line, run_script
from utils import (
    BeamSize,
    Block,
    Count,
    CountOrZero,
    Decay,
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
    Views,
    Workers,
    seed_everything,
)


@dataclass
class Config:
    # Data
    data_folder: str = "data/shapes"  # folder of the files that create_input_files.py made
    data_name: str = "shapes_5_cap_per_img_5_min_word_freq"  # what their names share
    run_folder: str | None = None  # where checkpoints and curves go; default runs/<data_name>
    resume: str | None = None  # checkpoint to continue from, such as runs/shapes/last.pth; 'auto': the folder's
    overwrite: bool = False  # replace the run that is in run_folder; not together with resuming that run
    start_from: str | None = None  # checkpoint of a trained captioner, for a new run on new data with other words
    save_minutes: NotNegative = 10.0  # time between two checkpoints within an epoch; 0 saves after each epoch only

    # Encoder
    encoder: str = "resnet101"  # torchvision's name of the network, or another of docs/recipes.md
    encoder_weights: str = "imagenet"  # 'imagenet' (downloaded), 'none' (random), or a file with a state dict
    encoded_image_size: GridSide = 14  # side of the grid that attention sees, in locations
    encoder_dim: Dimension | None = None  # of each location, by a 1 x 1 convolution; default the network's own
    fine_tune_encoder: bool = False  # train the encoder too; without pretrained weights you want this
    fine_tune_from_step: CountOrZero = 0  # training steps before the encoder joins in
    fine_tune_from_block: Block = 2  # first convolutional block of a pretrained encoder that is trained

    # Decoder
    decoder: str = "soft"  # soft, hard, show_tell, spatial, adaptive, att2in, top_down, transformer: see the README
    embed_dim: Dimension = 512  # of a word's embedding
    decoder_dim: Dimension = 512  # of the LSTM's state, or of a word's vector in a transformer
    attention_dim: Dimension = 512  # of the space where attention compares locations with the LSTM's state
    decoder_layers: Layers | None = None  # on top of one another; default 1 LSTM cell, or 3 layers of a transformer
    attention_heads: Count = 8  # transformer: attentions side by side in each layer (Vaswani 2017, 3.2.2)
    shown_head: Count | None = None  # transformer: the last layer's head that tells where it looked; default their mean
    gate: bool = True  # soft, hard: scale each dimension of the context by a gate beta (tutorial; paper, section 4.2.1)
    deep_output: bool = False  # soft, hard: the previous word and the context enter the output too (paper, eq. 7)
    attention_nonlinearity: Literal["relu", "tanh"] = "relu"  # of attention's score; the papers have tanh
    hard_expected_share: Share = 0.5  # hard: how often, word by word, training takes the expected value (paper, 4.1)
    hard_inference: Literal["argmax", "sample", "expectation"] = "argmax"  # hard: where to look after training
    tie_weights: bool = False  # one matrix for the embeddings and the logits (Press and Wolf 2017)
    embedding_max_norm: Positive | None = None  # longer embeddings are scaled down to this length; default no limit
    word_vectors: str | None = None  # file of pretrained embeddings, GloVe's or word2vec's text; sets embed_dim
    fine_tune_embeddings: bool = True  # train the embeddings; False only makes sense with word_vectors
    dropout: Probability = 0.5  # share of the decoder's output that is dropped in training (Srivastava et al. 2014)
    embedding_dropout: Probability = 0.0  # the same for the word embeddings
    residual_dropout: Probability = 0.1  # transformer: the same for what each sub-layer adds (Vaswani 2017, 5.4)
    state_dropout: Probability = 0.0  # soft, hard, show_tell: the same for the LSTM's first state

    # Loss
    doubly_stochastic_weight: NotNegative = 1.0  # weight of looking at each location about once (paper, eq. 14)
    label_smoothing: Share = 0.0  # share of the target that is spread over all words (Szegedy et al. 2016)
    reinforce_weight: NotNegative = 0.1  # hard: weight of the reward for drawn locations (paper, 4.1; its code: 0.1)
    entropy_weight: NotNegative = 0.002  # hard: weight of attention's entropy (paper, 4.1; its code: 0.002)
    teacher_forcing: Literal["always", "linear", "exponential", "inverse_sigmoid"] = "always"  # or scheduled sampling
    teacher_forcing_floor: Share = 0.5  # least share of true words that scheduled sampling shows (Bengio et al. 2015)
    self_critical_from_epoch: Count | None = None  # from this epoch on, own captions are rewarded (Rennie 2017)
    self_critical_lr: Positive = 1e-4  # learning rate of the decoder under rewards; those of other parts change alike
    self_critical_temperature: Positive | None = None  # of what they are drawn by; default 1, with smoothed labels 0.6
    self_critical_samples: Several = 5  # own captions per photo, each compared with the mean of the others (Luo 2020)

    # Optimizer
    epochs: Count = 120  # at most; the run may stop earlier
    batch_size: Count = 32  # captions per step, on all GPUs together; with image_major: photos with all their captions
    accumulate: Count = 1  # batches in each step of the optimizer; their gradients are averaged
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"  # sgd has Nesterov momentum 0.9
    encoder_lr: Positive = 1e-4  # learning rate of the encoder, if it is trained
    decoder_lr: Positive = 4e-4  # learning rate of the decoder
    embedding_lr: Positive | None = None  # learning rate of the word embeddings; default that of the decoder
    weight_decay: NotNegative = 0.0  # pull of all weights towards 0
    ema_decay: Decay = 0.0  # validate, and keep as best.pth, a moving average of the weights; 0.999 is usual, 0 is none
    average_last: Count = 1  # the same with a plain mean: of the weights after each of the last epochs, this many
    clip: Literal["value", "norm", "none"] = "value"  # limit each gradient, or their norm (Pascanu 2013)
    clip_at: Positive = 5.0  # largest absolute value, or norm, of the gradients
    schedule: Literal["none", "steps", "plateau", "exponential", "cosine", "one_cycle"] = "plateau"  # of learning rates
    warmup_steps: CountOrZero = 0  # steps in which the learning rates rise to their first value (Goyal et al. 2017)
    schedule_patience: Count = 8  # plateau: epochs without a better score before the rates drop
    schedule_gamma: PositiveShare = 0.8  # plateau, steps, exponential: what the rates are multiplied by
    schedule_step_size: Count = 1000  # steps, exponential: training steps after which the rates are multiplied
    schedule_cycles: Count = 1  # cosine: cycles, each but the first a warm restart (Loshchilov and Hutter 2017)
    seed: Seed = 0  # of the weights, the order of the captions, dropout
    deterministic: bool = False  # on GPUs too, equal runs give equal bits; slower

    # Augmentation; without cached_views, any of these turns the feature cache off
    crop_min_scale: PositiveShare = 1.0  # smallest share of a photo's area that a random crop keeps
    flip: Probability = 0.0  # probability that a photo is mirrored, unless a caption says left or right
    colour: Share = 0.0  # strength of changes of brightness, contrast and saturation
    warp: Share = 0.0  # strength of rotation, shear and perspective; 1 is up to 30 degrees
    noise: Share = 0.0  # standard deviation of Gaussian noise, where a pixel goes from 0 to 1
    cached_views: Views = 0  # changed copies of each photo to cache the features of; 0 changes it at each step

    # Validation, after each epoch, on captions that the model writes by itself
    val_beam_size: BeamSize = 3  # 1 for greedy choice
    val_batch_size: Count = 32  # photos at a time, on each GPU
    val_share: PositiveShare = 1.0  # share of the split's photos that are captioned
    validate_every: CountOrZero = 0  # steps after which it is also done within an epoch, to watch; 0 for none
    stop_metric: Metric = "BLEU-4"  # what 'better' means
    stop_patience: Count = 20  # epochs without a better score before the run ends

    # Speed
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one
    workers: Workers = 0  # processes that read batches ahead (for each GPU); 0 reads in the training process
    precision: Precision = "float32"  # of the matrix products (autocast)
    tf32: bool = True  # on GPUs, let float32 products use TensorFloat-32
    compile: bool = False  # torch.compile the encoder's network; takes a minute at first, and gains nothing on CPUs
    fast_cpu: bool = True  # on CPUs, compute the decoder's same numbers in faster ways (captioning/speed)
    cache_features: bool = True  # keep a frozen encoder's features in a file beside the data
    image_major: bool = False  # a photo with all its captions in one step: one encoder pass for all of them
    bucket: bool = False  # captions of about the same length in a batch
    print_every: Count = 100  # batches between two readings of the loss
    wandb: str | None = None  # project at Weights & Biases that gets the curves too; needs `pip install wandb`


if __name__ == "__main__":
    check_command_line(Config)  # before the imports below, which take seconds: --help comes at once

import torch
import torch.nn.functional as F
from tqdm import tqdm

from captioning import distributed
from captioning.evaluation import metrics
from captioning.inference.model_files import find_checkpoint
from captioning.inference.trained_model import Captioner
from captioning.training.data_identity import UnchangedFiles, describe_data, open_validation_data
from captioning.training.gradient_steps import clip_gradients, window_of
from captioning.training.interruptions import Postponed
from captioning.training.losses import readings_of_batch
from captioning.training.report import (
    figure_of_first_photo,
    log_epoch,
    print_end,
    print_epoch,
    print_header,
    print_resumed,
    print_within_epoch,
)
from captioning.training.resume import restore, settings_of_resumed_run
from captioning.training.run_folder import RunFolder
from captioning.training.self_critical import SelfCritic, temperature_of
from captioning.training.settings import check_config, check_total_steps
from captioning.training.start import build_loaders, start_run
from captioning.training.watch import Watch
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
    start = find_checkpoint(config.start_from) if config.start_from else None
    checkpoint = folder.load(config.resume, config.overwrite, inputs=(start, config.encoder_weights))

    captions = CaptionDataset(config.data_folder, config.data_name, "TRAIN", config.image_major)
    val_captions = open_validation_data(config.data_folder, config.data_name)
    order = BatchOrder(
        captions.item_lengths(), config.batch_size, config.bucket, config.seed,
        rank=distributed.get_rank(), world_size=distributed.get_world_size(), views=1 + config.cached_views,
    )  # fmt: skip
    steps_per_epoch = math.ceil(len(order) / config.accumulate)  # of the optimizer
    check_total_steps(config, config.epochs * steps_per_epoch)
    data = {"TRAIN": describe_data(captions), "VAL": describe_data(val_captions)}
    run = start_run(config, captions, data, device, steps_per_epoch, checkpoint)
    distributed.seed_own(config.seed)
    print_header(run, captions, val_captions)
    if checkpoint:
        restore(run, checkpoint)
        del checkpoint  # as large as the run itself
        print_resumed(run, folder.resumed, len(order))
    with folder.kept(run), metrics.MeteorProcess() as meteor:
        train(run, order, folder, UnchangedFiles(val_captions), meteor)
    print_end(run, folder)


def train(run, order, folder, unchanged, meteor):
    """
    Epochs of training, each followed by validation, until their number is reached or scores no longer rise. Validation
    within an epoch only tells how it goes.

    :param run: `Run` of captioning/training/run.py: model, optimizer, schedule, and how far they are
    :param order: `BatchOrder` of the training captions
    :param folder: `RunFolder`
    :param unchanged: `UnchangedFiles` of the validation data
    :param meteor: `MeteorProcess`, started once for all epochs
    """
    config = run.config
    loaders, cached, critic, seconds = None, None, None, Counter()
    while not run.is_over():
        steps_left = run.steps_per_epoch - math.ceil(run.batch / config.accumulate)  # in this epoch
        if cached != run.may_cache(steps_left):
            cached = run.may_cache(steps_left)
            loaders = build_loaders(run, order, cached)
        if distributed.is_first() and folder.log is None:
            run.log = folder.begin(run)
        if run.is_self_critical() and critic is None:
            run.begin_self_critical()
            critic = SelfCritic(loaders["TRAIN"][0].dataset, config.self_critical_samples, temperature_of(config))
        order.set_epoch(run.epoch, start=run.batch)
        begun = time.monotonic()
        with Postponed() as stop:
            watch = Watch(run, loaders["TRAIN"][0], folder, stop)
            train_one_epoch(run, *loaders["TRAIN"], critic, watch)
            if distributed.is_joined():  # if one fails later, they cannot agree to save any more
                folder.save(run)
        run.average.end_epoch(run.epoch)

        trained = time.monotonic()
        with folder.saved_if_it_fails(run):
            unchanged.check()
            gpus = [run.device] if run.device.type == "cuda" else []
            with torch.random.fork_rng(gpus), run.average.in_place():  # training's random numbers stay
                scores, figure = validate(run, *loaders["VAL"], meteor)
        seconds.update(train_seconds=trained - begun, val_seconds=time.monotonic() - trained)
        measured = {**scores, "learning_rate": run.learning_rate(), **seconds}
        if run.batch < len(order):
            print_within_epoch(run, measured)
            continue
        with Postponed():
            finish_epoch(run, folder, measured, figure)
        seconds.clear()


def train_one_epoch(run, loader, resident, critic, watch):
    """
    One pass over the captions, or what is left of it: forward, backward, clip, step.

    :param run: `Run`; its loss is `CaptionLoss` of captioning/training/losses.py
    :param loader: DataLoader of training batches
    :param resident: features of all photos that are on the GPU already, or None
    :param critic: `SelfCritic`, if the model is taught by its own captions, else None
    :param watch: `Watch`, which says when to stop
    :raises UserError: if the loss or gradients are not finite
    """
    config, parameters = run.config, run.trained_parameters()
    run.train_mode(with_dropout=critic is None)
    for i, batch in watch.batches():
        run.unfreeze_encoder_in_time()
        window = window_of(i, len(loader), config.accumulate)
        batch = run.augment(batch.to(run.device, resident))
        advantages, reward = None, None
        if critic is not None:  # the model's own captions take the place of the true ones
            batch, advantages, reward = critic.draw(run, batch)
        share = distributed.share_of_batch(batch.lengths, loader.batch_sampler.has_share(i))

        with distributed.exchange(run.model, now=window.ends):
            with run.autocast:
                true_words = 1.0 if critic is not None else run.true_word_probability()
                decoded = run.model(batch.images, batch.captions, batch.lengths, batch.image_rows, true_words)
                decoded = decoded if critic is None else critic.as_drawn(decoded)
                loss, cross_entropy = run.loss_function(decoded, share, advantages)  # 0-d each
            if window.begins:
                run.optimizer.zero_grad()  # not before: the forward pass would take the memory that the new ones want
            run.scaler.scale(loss / window.size).backward()
        watch.after_batch(batch.photos, loss, readings_of_batch(decoded, share, cross_entropy, reward))
        if not window.ends:
            continue

        run.scaler.unscale_(run.optimizer)
        norm = clip_gradients(parameters, config.clip, config.clip_at)  # 0-d
        rate = run.learning_rate()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
        run.average.after_step()
        run.step += 1
        run.batch = i + 1
        if watch.after_step(rate, norm):
            return


@torch.no_grad()
def validate(run, loader, resident, meteor):
    """
    Measure the loss on the validation captions, and let the model caption their photos by itself, without true words.

    :return: dict of "val_loss" (mean cross entropy per word, in nats), scores by metric, the config's `stop_metric`
        among them, and "val_cut" (number of captions cut off at the longest length); an attention
        figure of one photo, in the first process only
    """
    config = run.config
    distributed.copy_buffers(run.encoder)
    captioner = Captioner(run.encoder.eval(), run.decoder.eval(), run.word_map)
    hypotheses, references, loss, words, cut = [], [], 0.0, 0, 0
    for batch in tqdm(loader, "validation", leave=False, disable=distributed.hide_bar()):
        batch = batch.to(run.device, resident)
        with run.autocast:
            features = run.encoder.features(batch.images)
            decoded = run.decoder(features, batch.captions, batch.lengths, batch.image_rows)
            found = captioner.search(batch.images, config.val_beam_size, run.max_length)
        loss += F.cross_entropy(decoded.logits.float(), decoded.targets, reduction="sum").item()
        words += len(decoded.targets)
        cut += sum(not best.ended for best, *_ in found)
        hypotheses += [captioner.sentence(best) for best, *_ in found]
        references += batch.references
    loss, words, cut = (sum(distributed.gather(part)) for part in (loss, words, cut))
    hypotheses, references = distributed.join_shares(hypotheses), distributed.join_shares(references)
    wanted = dict.fromkeys((*metrics.BLEU, config.stop_metric))
    scores = metrics.score(references, hypotheses, tuple(wanted), meteor) if distributed.is_first() else None
    measured = {"val_loss": loss / words, **distributed.from_first(scores), "val_cut": cut}
    return measured, figure_of_first_photo(run, captioner, loader.dataset) if distributed.is_first() else None


def finish_epoch(run, folder, measured, figure):
    """
    Note how an epoch went, save the run, and print it all in a line.

    :param measured: dict of validation's losses and scores, learning rate and seconds
    :param figure: for TensorBoard, or None
    """
    is_best, lowered = run.finish_epoch(run.entry(measured))
    log_epoch(run, figure)
    folder.save(run, is_best)
    run.log.table(run.history)
    print_epoch(run, is_best, lowered)


if __name__ == "__main__":
    run_script(main, Config, find_base=settings_of_resumed_run)
