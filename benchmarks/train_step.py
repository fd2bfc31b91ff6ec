"""
A training step against the tutorial's: batch 32, 512 / 512 / 512, 14 x 14, ResNet-101, captions as long as COCO's.

Plain, as the tutorial describes it: every caption brings its photo through the encoder, attention projects the features
at every timestep, the vocabulary's scores are made timestep by timestep. Ours: cached features with a frozen encoder;
image-major batches (6 photos with 5 captions each) with a fine-tuned one. Every step has other captions, of other
lengths, as in training. With cached features each of these batches is seen once before the clock starts: oneDNN
prepares itself for every size that it meets, and an epoch of thousands of steps soon has met them all. Both have the
same weights and give the same loss, which is checked. The limit is the arithmetic that cannot be avoided at the rate of
a large matrix product. Further lines say what is left without `fast_cpu`, and without each of its ways to save time.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import in_own_process, matmul_rates, report
from timed_step import CAPTIONS, VOCAB_SIZE, make_captions, precisions, time_step
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode
from tutorial import settle, tutorial_decoder, tutorial_encode

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from captioning.command_line import run_script
from captioning.speed.accelerate import FASTER, accelerate
from captioning.training.losses import CaptionLoss, top_k_accuracy
from models import DecoderWithAttention, Encoder
from utils import choose_device

WAYS = {"fast_cpu off": ()} | {f"without {way}": tuple(w for w in FASTER if w != way) for way in FASTER}


@dataclass
class Config:
    device: str = "cpu"  # 'cpu' or 'cuda'
    encoder: str = "resnet101"  # torchvision's name of the network
    batch_size: int = 32  # captions per step
    repeats: int = 8  # timed steps a case, each with a batch of its own; the median counts
    plain_repeats: int = 2  # the same of the plain version, which takes long: the first of these batches
    ways: bool = True  # time the frozen rows without fast_cpu, and without each of its ways
    fine_tune: bool = True  # time fine-tuning too (the plain step takes long)


def main(config):
    device = choose_device(config.device)
    rates = matmul_rates(device)
    encoder, ours, images, batches = build(config, device)
    check_same_loss(encoder, ours, images[:8], *(part[:8] for part in batches[0]))
    size, photos = config.batch_size, config.batch_size // CAPTIONS
    words = sum(int((lengths - 1).sum()) for _, lengths in batches) / len(batches)  # to predict in a batch

    plain_frozen, plain_fine_tuned = in_own_process(time_plain, config)
    flops = decoder_flops(encoder, ours, size, words)
    rows = [
        (f"frozen encoder, cached features, {kind}", size / plain_frozen, size / step, size * rates[kind] / flops)
        for kind, step in in_own_process(time_cached, config).items()
    ]
    for name, ways in WAYS.items() if config.ways else ():
        rows += [
            (f"frozen, cached, {name}, {kind}", size / plain_frozen, size / step, size * rates[kind] / flops)
            for kind, step in in_own_process(time_cached, config, ways).items()
        ]
    if config.fine_tune:
        captions = photos * CAPTIONS
        flops = decoder_flops(encoder, ours, photos, words * captions / size) + encoder_flops(encoder, photos)
        rows += [
            (f"fine-tuned encoder, image-major, {kind}", size / plain_fine_tuned, captions / step,
             captions * rates[kind] / flops)
            for kind, step in in_own_process(time_fine_tuned, config).items()
        ]  # fmt: skip
    report("train_step", [(case, "captions/s", *numbers) for case, *numbers in rows])


def build(config, device, ways=tuple(FASTER)):
    """
    :param ways: as for `accelerate`
    :return: encoder, our decoder, images (N, 3, 256, 256) uint8, batches of captions; the same in each process
    """
    torch.manual_seed(0)
    encoder = Encoder(config.encoder).to(device)
    ours = DecoderWithAttention(VOCAB_SIZE, encoder.encoder_dim).to(device)
    accelerate(ours, ways)
    images = torch.randint(0, 256, (config.batch_size, 3, 256, 256), dtype=torch.uint8, device=device)
    batches = [make_captions(config.batch_size, device) for _ in range(config.repeats)]
    settle(encoder, images[:4])
    return encoder, ours, images, batches


def fine_tune(encoder):
    encoder.pretrained = True  # so that blocks 2 to 4 are trained, as of a network with ImageNet's weights
    encoder.fine_tune(True)


def time_plain(config):
    """:return: seconds of the tutorial's step, with a frozen encoder and with one that is trained (or None)"""
    encoder, ours, images, batches = build(config, choose_device(config.device))
    decoder = tutorial_decoder(ours)
    frozen = time_step([decoder], lambda *batch: plain_loss(encoder, decoder, images, *batch),
                       batches[: config.plain_repeats])  # fmt: skip
    if not config.fine_tune:
        return frozen, None
    fine_tune(encoder)  # what a step takes is the encoder's, and hardly depends on the captions: one will do
    return frozen, time_step([encoder, decoder], lambda *batch: plain_loss(encoder, decoder, images, *batch),
                             batches[:1], warm_up=0)  # fmt: skip


def time_cached(config, ways=tuple(FASTER)):
    """:return: dict of type -> seconds of our step with a frozen encoder and cached features"""
    encoder, decoder, images, batches = build(config, choose_device(config.device), ways)
    features = encoder.grid(images[:1]).expand(len(images), -1, -1, -1).contiguous()  # as the cache keeps them
    return {
        kind: time_step([decoder], lambda *batch: our_loss(encoder, decoder, features, *batch), batches, autocast,
                        warm_up=len(batches))
        for kind, autocast in precisions(images.device)
    }  # fmt: skip


def time_fine_tuned(config):
    """:return: dict of type -> seconds of our step with an encoder that is trained, on image-major batches"""
    encoder, decoder, images, batches = build(config, choose_device(config.device))
    fine_tune(encoder)
    images = images[: config.batch_size // CAPTIONS]
    image_rows = torch.arange(len(images)).repeat_interleave(CAPTIONS)
    batches = [(captions[: len(image_rows)], lengths[: len(image_rows)], image_rows) for captions, lengths in batches]
    batches = batches[: 1 + config.repeats // 4]
    return {
        kind: time_step(
            [encoder, decoder], lambda *batch: our_loss(encoder, decoder, images, *batch), batches, autocast
        )
        for kind, autocast in precisions(images.device)
    }


def plain_loss(encoder, decoder, images, captions, lengths):
    """:return: the tutorial's loss, cross entropy of the packed scores and the doubly stochastic term; its accuracy"""
    encoder.backbone.to(memory_format=torch.contiguous_format)
    features = tutorial_encode(encoder, images)
    scores, alphas, captions, decode_lengths = decoder(features, captions, lengths)
    scores = pack_padded_sequence(scores, decode_lengths, batch_first=True).data
    targets = pack_padded_sequence(captions[:, 1:], decode_lengths, batch_first=True).data
    loss = F.cross_entropy(scores, targets) + ((1 - alphas.sum(dim=1)) ** 2).mean()
    return loss, top_k_accuracy(scores, targets, 5)


def our_loss(encoder, decoder, images, captions, lengths, image_rows=None):
    decoded = decoder(encoder.features(images), captions, lengths, image_rows)
    return CaptionLoss()(decoded)[0], top_k_accuracy(decoded.logits.detach(), decoded.targets, 5)


def check_same_loss(encoder, ours, images, captions, lengths):
    """Both must compute the same thing, or the comparison is worth nothing."""
    plain = tutorial_decoder(ours)
    ours.eval(), plain.eval()
    with torch.no_grad():
        a = our_loss(encoder, ours, encoder.grid(images), captions, lengths)[0].item()
        b = plain_loss(encoder, plain, images, captions, lengths)[0].item()
    assert abs(a - b) < 1e-3 * abs(b), f"the losses differ: ours {a}, plain {b}"
    print(f"loss of ours {a:.6f}, of the plain version {b:.6f}")


def encoder_flops(encoder, photos):
    """:return: floating-point operations of a trained encoder's forward and backward pass"""
    fine_tune(encoder)
    with FlopCounterMode(display=False) as counter:
        encoder.features(torch.zeros(1, 3, 256, 256, device=encoder.mean.device)).sum().backward()
    return photos * counter.get_total_flops()


def decoder_flops(encoder, decoder, photos, words):
    """
    Floating-point operations of a training step that no arrangement avoids: each matrix product forward, and backward
    once for its weights and once for its input where that needs a gradient.

    :param words: to predict, in all captions together
    """
    grid = encoder.grid(torch.zeros(1, 3, 256, 256, device=encoder.mean.device))
    encoder_dim, locations = encoder.encoder_dim, grid.shape[1:3].numel()
    hidden, attention = decoder.init_h.out_features, decoder.attention.decoder_att.out_features
    embed, vocab = decoder.embedding.embedding_dim, decoder.fc.out_features
    per_photo = (
        2 * locations * encoder_dim * attention * 2 + 2 * encoder_dim * 2 * hidden * 2
    )  # features need no gradient
    lstm = 2 * 4 * hidden * (embed + encoder_dim + hidden)
    gate, query, scores = 2 * hidden * encoder_dim, 2 * hidden * attention, 2 * hidden * vocab
    look = 2 * decoder.encoded_image_size**2 * attention
    per_word = 3 * (lstm + gate + query + scores + look) + 2 * 2 * locations * encoder_dim
    return photos * per_photo + words * per_word


if __name__ == "__main__":
    run_script(main, Config)
