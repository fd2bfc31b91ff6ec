"""
Train a captioner: edit the hyperparameters below and run `python train.py`, or override them for one run with
`--name value`. Everything goes into the run's folder: checkpoints (last.pth, best.pth) and TensorBoard's curves.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import metrics
from captioners import build_decoder
from datasets import BatchOrder, CaptionDataset
from encoders import Encoder
from feature_cache import cache_features
from inference import Captioner
from losses import CaptionLoss, top_k_accuracy
from utils import (
    choose_autocast,
    choose_device,
    load_checkpoint,
    load_tensors,
    run_script,
    save_checkpoint,
    seed_everything,
)


@dataclass
class Config:
    # Data
    data_folder: str = "data/shapes"  # folder of the files that create_input_files.py made
    data_name: str = "shapes_5_cap_per_img_5_min_word_freq"  # what their names share
    run_folder: str | None = None  # where checkpoints and curves go; default runs/<data_name>
    resume: str | None = None  # checkpoint to go on from, such as runs/shapes/last.pth

    # Encoder
    encoder: str = "resnet101"  # torchvision's name of the network
    encoder_weights: str = "imagenet"  # 'imagenet' (downloaded), 'none' (random), or a file with a state dict
    encoded_image_size: int = 14  # side of the grid of features that attention sees, in cells
    encoder_dim: int | None = None  # numbers in each cell, through a 1 x 1 convolution; default the network's own
    fine_tune_encoder: bool = False  # train the encoder too; without pretrained weights you want this
    fine_tune_from_block: int = 2  # first convolutional block of a pretrained encoder that is trained, 1 to 4

    # Decoder
    decoder: str = "soft"  # 'soft' or 'hard' attention
    embed_dim: int = 512  # numbers in a word's embedding
    decoder_dim: int = 512  # numbers in the LSTM's state
    attention_dim: int = 512  # numbers in the space where attention compares cells with the LSTM's state
    dropout: float = 0.5  # share of the decoder's outputs that is dropped in training

    # Training
    epochs: int = 120  # if nothing stops the run before
    batch_size: int = 32  # captions a step (with image_major: photos, each with all its captions)
    encoder_lr: float = 1e-4  # learning rate of the encoder, if it is trained
    decoder_lr: float = 4e-4  # learning rate of the decoder
    clip: str = "value"  # how gradients are clipped: 'value' each number, 'norm' the length of all, 'none'
    clip_at: float = 5.0  # largest absolute value, or norm, of the gradients
    doubly_stochastic_weight: float = 1.0  # how much each cell should be looked at once a caption (paper, eq. 14)
    seed: int = 0  # of the weights, the order of the captions, dropout

    # Validation, after each epoch, on captions that the model writes by itself
    val_beam_size: int = 3  # 1 for greedy choice
    val_batch_size: int = 32  # photos
    lr_patience: int = 8  # epochs without a better BLEU-4 before the learning rates drop
    lr_factor: float = 0.8  # what they are multiplied by then
    stop_patience: int = 20  # epochs without a better BLEU-4 before the run ends

    # Speed
    device: str = "auto"  # 'cpu', 'cuda', 'cuda:1' ...; auto takes a GPU if there is one
    workers: int = 0  # processes that read batches ahead; 0 reads in the training process
    precision: str = "float32"  # of the matrix products: 'float32', 'bf16' or 'fp16' (autocast)
    cache_features: bool = True  # keep a frozen encoder's features in a file beside the data
    image_major: bool = False  # a photo with all its captions in one step: one encoder pass for all of them
    bucket: bool = False  # captions of about the same length in a batch

    # Reporting
    print_every: int = 100  # steps between two readings of the loss


def main(config):
    device = choose_device(config.device)
    seed_everything(config.seed)
    run_folder = Path(config.run_folder or f"runs/{config.data_name}")
    checkpoint = load_checkpoint(config.resume) if config.resume else None

    encoder, decoder, word_map = build_models(config, device)
    loss_function = CaptionLoss(config.doubly_stochastic_weight).to(device)
    optimizer = build_optimizer(config, encoder, decoder)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    captioner = Captioner(encoder, decoder, word_map)

    autocast = choose_autocast(config.precision, device)
    train_loader, val_loader = build_loaders(config, encoder, device, autocast)
    progress = {"epoch": 0, "best_score": 0.0, "epochs_since_best": 0}
    if checkpoint:
        for name, part in (("encoder", encoder), ("decoder", decoder), ("loss", loss_function),
                           ("optimizer", optimizer), ("scaler", scaler)):  # fmt: skip
            part.load_state_dict(checkpoint[name])
        progress = checkpoint["progress"]
        torch.set_rng_state(checkpoint["random_state"])

    writer = SummaryWriter(run_folder)
    for epoch in range(progress["epoch"], config.epochs):
        train_loader.batch_sampler.set_epoch(epoch)
        start = time.time()
        train_one_epoch(
            encoder, decoder, loss_function, train_loader, optimizer, scaler, device, epoch, config, autocast, writer
        )
        seconds = time.time() - start

        with autocast:
            hypotheses, references = captioner.caption_split(val_loader, config.val_beam_size)
        bleu4 = metrics.bleu4(references, hypotheses)
        writer.add_scalar("val/BLEU-4", bleu4, epoch)
        best = bleu4 > progress["best_score"]
        progress["epoch"] = epoch + 1
        progress["epochs_since_best"] = 0 if best else progress["epochs_since_best"] + 1
        progress["best_score"] = max(bleu4, progress["best_score"])
        print(f"epoch {epoch + 1}: {seconds:.0f} s, val BLEU-4 {bleu4:.4f} (beam {config.val_beam_size})"
              f"{', the best so far' if best else ''}")  # fmt: skip

        content = {
            "config": dataclasses.asdict(config), "word_map": word_map, "progress": progress,
            "encoder": encoder.state_dict(), "decoder": decoder.state_dict(), "loss": loss_function.state_dict(),
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "scores": {"BLEU-4": bleu4},
            "random_state": torch.get_rng_state(), "image_size": train_loader.dataset.image_size,
        }  # fmt: skip
        save_checkpoint(content, run_folder / "last.pth")
        if best:
            save_checkpoint(content, run_folder / "best.pth")

        if progress["epochs_since_best"] >= config.stop_patience:
            print(f"No better BLEU-4 for {config.stop_patience} epochs: the run ends")
            break
        if progress["epochs_since_best"] and progress["epochs_since_best"] % config.lr_patience == 0:
            for group in optimizer.param_groups:
                group["lr"] *= config.lr_factor
            print(f"No better BLEU-4 for {config.lr_patience} epochs: learning rates times {config.lr_factor}")
    writer.close()
    print(f"Best val BLEU-4 {progress['best_score']:.4f}: {run_folder / 'best.pth'}")


def train_one_epoch(
    encoder, decoder, loss_function, loader, optimizer, scaler, device, epoch, config, autocast, writer
):  # fmt: skip
    """One pass over the captions: forward, backward, clip, step."""
    encoder.train(), decoder.train(), loss_function.train()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses, accuracies = [], []
    bar = tqdm(loader, desc=f"epoch {epoch + 1}", unit="step", leave=False)
    for i, batch in enumerate(bar):
        batch = batch.to(device)
        with autocast:
            features = encoder.features(batch.images)
            decoded = decoder(features, batch.captions, batch.lengths, batch.image_rows)
            loss, cross_entropy = loss_function(decoded)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if config.clip == "value":
            torch.nn.utils.clip_grad_value_(trained, config.clip_at)
        elif config.clip == "norm":
            torch.nn.utils.clip_grad_norm_(trained, config.clip_at)
        scaler.step(optimizer)
        scaler.update()

        losses.append(cross_entropy)
        accuracies.append(top_k_accuracy(decoded.scores.detach(), decoded.targets, 5))
        if (i + 1) % config.print_every == 0 or i + 1 == len(loader):
            mean_loss, accuracy = torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()
            losses, accuracies = [], []
            step = epoch * len(loader) + i + 1
            writer.add_scalar("train/cross_entropy", mean_loss, step)
            writer.add_scalar("train/top5_accuracy", accuracy, step)
            bar.set_postfix(loss=f"{mean_loss:.3f}", top5=f"{accuracy:.1%}")


def build_models(config, device):
    """:return: encoder, decoder, word map"""
    word_map = CaptionDataset(config.data_folder, config.data_name, "TRAIN").word_map
    local = config.encoder_weights not in ("imagenet", "none")
    encoder = Encoder(
        config.encoder, "none" if local else config.encoder_weights, config.encoded_image_size, config.encoder_dim
    )
    if local:
        encoder.load_backbone(load_tensors(config.encoder_weights), config.encoder_weights)
    encoder.fine_tune(config.fine_tune_encoder, config.fine_tune_from_block)
    decoder = build_decoder(dataclasses.asdict(config), len(word_map), encoder.encoder_dim)
    return encoder.to(device), decoder.to(device), word_map


def build_optimizer(config, encoder, decoder):
    groups = [{"name": "decoder", "params": list(decoder.parameters()), "lr": config.decoder_lr}]
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if trained:
        groups.append({"name": "encoder", "params": trained, "lr": config.encoder_lr})
    return torch.optim.Adam(groups, fused=True)


def build_loaders(config, encoder, device, autocast):
    """:return: DataLoaders of the training captions and the validation photos"""
    loaders = []
    for split in ("TRAIN", "VAL"):
        image_major = config.image_major or split == "VAL"
        dataset = CaptionDataset(config.data_folder, config.data_name, split, image_major)
        if encoder.frozen and config.cache_features:
            feature_file = cache_features(encoder, dataset.image_file, device, autocast=autocast)
            dataset = CaptionDataset(config.data_folder, config.data_name, split, image_major, feature_file)
        if split == "TRAIN":
            lengths = dataset.lengths.reshape(len(dataset), -1).max(axis=1)
            order = {"batch_sampler": BatchOrder(lengths, config.batch_size, config.bucket, config.seed)}
        else:
            order = {"batch_size": config.val_batch_size}
        loaders.append(
            DataLoader(
                dataset,
                **order,
                collate_fn=dataset.collate,
                num_workers=config.workers,
                pin_memory=device.type == "cuda",
                persistent_workers=config.workers > 0,
            )  # fmt: skip
        )
    return loaders


if __name__ == "__main__":
    run_script(main, Config)
