"""The start of a run: everything that train.py's config names is built, from nothing or from a trained captioner."""

import dataclasses

import torch

from captioning.distributed import wrap
from captioning.features import build_loader
from captioning.inference.trained_model import load_captioner, longest_caption
from captioning.networks.backbones import load_backbone
from captioning.networks.registry import SETTINGS, build_decoder, build_encoder, decoder_arguments
from captioning.preparation.word_vectors import load_word_vectors
from captioning.storage.tensors import load_tensors
from captioning.training.augmentation import Augmentation
from captioning.training.losses import CaptionLoss
from captioning.training.run import EncoderDecoder, Run, build_schedule
from captioning.training.weight_averaging import WeightAverage
from utils import UserError, choose_autocast, is_out_of_memory

MODEL_SETTINGS = ("encoder", "encoder_dim", "decoder", *SETTINGS)  # what says how the model is built
WORD_ROWS = ("embedding.weight", "fc.weight", "fc.bias")  # the decoder's weights that have a row for each word


def start_run(config, captions, data, device, steps_per_epoch, resumed=None):
    """
    Build everything that the config names, at step 0.

    :param config: train.py's
    :param captions: `CaptionDataset` of the training split
    :param data: dict of split -> what `data_identity.describe_data` says of it
    :param device: torch.device
    :param steps_per_epoch: of the optimizer
    :param resumed: checkpoint whose weights will be loaded into what is built here, see `resume.restore`; or None
    :return: `Run`
    :raises UserError: if a setting, or a file that it names, is of no use
    """
    trained = None
    longest = int(captions.lengths.max()) - 2  # they count <start> and <end>
    if config.start_from is not None:
        if resumed:
            checkpoint = resumed
        else:
            trained, checkpoint, _ = load_captioner(config.start_from)
        config = adopt_model_settings(config, checkpoint["config"])
        # At first it writes sentences of its own length, which would end in the middle at that of a few short captions.
        longest = max(longest, longest_caption(checkpoint, config.resume if resumed else config.start_from))
    config, encoder, decoder = build_model(config, captions.word_map, trained)
    encoder, decoder = encoder.to(device), decoder.to(device)
    check_photos_are_large_enough(encoder, captions.image_size)
    if config.compile:
        encoder.backbone.compile()  # in place: the names in checkpoints stay

    optimizer = build_optimizer(config, encoder, decoder)
    average = WeightAverage(encoder, decoder, config.ema_decay, config.average_last)  # of all that is trained later
    total_steps = epochs_of_true_captions(config) * steps_per_epoch  # rewards have a schedule of their own
    encoder.fine_tune(config.fine_tune_encoder and config.fine_tune_from_step == 0, config.fine_tune_from_block)
    return Run(
        config=config,
        word_map=captions.word_map,
        image_size=captions.image_size,
        max_length=longest,
        data=data,
        device=device,
        autocast=choose_autocast(config.precision, device),
        encoder=encoder,
        decoder=decoder,
        model=wrap(EncoderDecoder(encoder, decoder), share_buffers=not encoder.frozen),
        augmentation=build_augmentation(config).train(),
        loss_function=CaptionLoss(
            config.doubly_stochastic_weight, config.label_smoothing, config.reinforce_weight, config.entropy_weight
        ).to(device),
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer, total_steps, config.warmup_steps, config.schedule_cycles),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        average=average,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def build_loaders(run, order, cached):
    """
    :param run: `Run`
    :param order: `BatchOrder` of the training captions
    :param cached: dict of split -> whether its batches hold cached features
    :return: dict of split -> (DataLoader, features on the GPU or None)
    """
    config = run.config
    if config.cache_features and not cached["TRAIN"]:
        print("Fine-tuning or augmentation: the encoder runs in every step, without the feature cache")
    common = {"encoder": run.encoder, "device": run.device, "autocast": run.autocast, "workers": config.workers}
    data = config.data_folder, config.data_name
    val = build_loader(
        *data, "VAL", batch_size=config.val_batch_size, share=config.val_share, cached=cached["VAL"], **common
    )
    train = build_loader(
        *data, "TRAIN", order=order, image_major=config.image_major, cached=cached["TRAIN"], views=run.views, **common
    )
    return {"TRAIN": train, "VAL": val}


@torch.no_grad()
def check_photos_are_large_enough(encoder, image_size):
    """
    :param image_size: side of the photos, in pixels
    :raises UserError: if nothing is left of them in the encoder's grid
    """
    encoder.eval()  # running means stay as they are
    weight = next(encoder.parameters())
    try:
        encoder.grid(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=weight.device))
    except (AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        raise UserError(
            f"encoder: {encoder.name} cannot see photos of {image_size} px ({reason}); make the files with a larger "
            "--image_size, or choose another --encoder"
        ) from error


def build_augmentation(config):
    """:return: the `Augmentation` that the config asks for; by default one that changes nothing"""
    return Augmentation(config.crop_min_scale, config.flip, config.colour, config.warp, config.noise)


def epochs_of_true_captions(config):
    """:return: how many epochs go by before the model is taught by its own captions, or until the end"""
    first = config.self_critical_from_epoch
    return config.epochs if first in (None, 1) else min(config.epochs, first - 1)


def build_model(config, word_map, trained=None):
    """
    :param trained: `Captioner` whose weights are taken, or None
    :return: the config, whose embed_dim may be that of a file of word vectors; encoder; decoder
    """
    decoder_arguments(dataclasses.asdict(config))  # a mistake there is told before weights are downloaded
    local = config.encoder_weights not in ("imagenet", "none")
    weights = "none" if local or trained else config.encoder_weights
    encoder = build_encoder(dataclasses.asdict(config), weights)
    if trained:
        encoder.load_state_dict(trained.encoder.state_dict())
        encoder.pretrained = True
    elif local:
        load_backbone(encoder, load_tensors(config.encoder_weights), config.encoder_weights)
    elif weights == "none" and not config.fine_tune_encoder:
        print("The encoder is random and not trained: you may want --encoder_weights imagenet or --fine_tune_encoder")

    vectors = None
    if config.word_vectors:
        wanted = config.embed_dim if trained or config.embed_dim != SETTINGS["embed_dim"].default else None
        vectors, _ = load_word_vectors(config.word_vectors, word_map, wanted, config.seed)
        config = dataclasses.replace(config, embed_dim=vectors.shape[1])
    decoder = build_decoder(dataclasses.asdict(config), len(word_map), encoder.encoder_dim)
    if vectors is not None:
        decoder.load_pretrained_embeddings(vectors)
    if trained:
        take_decoder(decoder, word_map, trained)
    decoder.fine_tune_embeddings(config.fine_tune_embeddings)
    return config, encoder, decoder


def adopt_model_settings(config, trained):
    """
    :param trained: config of the captioner to start from, a dict
    :return: the config with that captioner's encoder and decoder
    :raises UserError: if another encoder or decoder was asked for
    """
    defaults, adopted = type(config)(), {}
    for name in MODEL_SETTINGS:
        default = getattr(defaults, name)
        found, expected = getattr(config, name), trained.get(name, default)
        if found not in (default, expected) and not name.endswith("dropout"):
            raise UserError(
                f"{name}: {found!r} found, but {config.start_from} has {expected!r}; leave it out, or start without it"
            )
        if found == default:
            adopted[name] = expected
    return dataclasses.replace(config, **adopted)


def take_decoder(decoder, word_map, trained):
    """Take a trained decoder's weights: of the words that both know, their rows; new words keep those they have."""
    old, new = trained.decoder.state_dict(), decoder.state_dict()
    common = [word for word in word_map if word in trained.word_map]
    old_rows = torch.tensor([trained.word_map[word] for word in common])
    new_rows = torch.tensor([word_map[word] for word in common])
    for name, tensor in old.items():
        if name in WORD_ROWS:
            new[name][new_rows] = tensor[old_rows]
        else:
            new[name] = tensor
    decoder.load_state_dict(new)
    print(f"{len(common):,} of the {len(word_map):,} words are known from before; the others start from scratch")


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
            f"fine_tune_from_block: {config.encoder} has no block {config.fine_tune_from_block}; give a lower one"
        )
    if trained:
        groups.append({"params": trained, "lr": config.encoder_lr})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, weight_decay=config.weight_decay, fused=True)
