"""All encoders and decoders by name: which settings each decoder has, and how one is made from train.py's config."""

from typing import Literal, NamedTuple

from captioning.config_fields import check_value
from captioning.networks.adaptive import AdaptiveAttention, SpatialAttention
from captioning.networks.att2in import Att2in
from captioning.networks.show_and_tell import ShowAndTell
from captioning.networks.top_down import TopDownAttention
from captioning.networks.transformer import Transformer
from captioning.speed.accelerate import accelerate
from models import DecoderWithAttention, DecoderWithHardAttention, Encoder
from utils import Count, Dimension, GridSide, Layers, Positive, Probability, Share, UserError, short

DECODERS = {
    "soft": DecoderWithAttention,
    "hard": DecoderWithHardAttention,
    "show_tell": ShowAndTell,
    "spatial": SpatialAttention,
    "adaptive": AdaptiveAttention,
    "att2in": Att2in,
    "top_down": TopDownAttention,
    "transformer": Transformer,
}


class Setting(NamedTuple):
    """A field of train.py's config that a decoder is built from."""

    default: object  # what a config that does not have the field yet is taken to mean; None: the decoder's own default
    argument: str  # the decoder's name for it
    decoders: tuple  # those that have it
    type: object  # which values make sense, as in train.py's Config


ALL = tuple(DECODERS)  # a new decoder has these settings too
LAYERED = ("soft", "hard", "show_tell", "spatial", "adaptive", "top_down", "transformer")
ADDITIVE = ("soft", "hard", "spatial", "adaptive", "att2in", "top_down")  # those with `models.Attention`
WITH_ATTENTION = (*ADDITIVE, "transformer")
SETTINGS = {
    "embed_dim": Setting(512, "embed_dim", ALL, Dimension),
    "decoder_dim": Setting(512, "decoder_dim", ALL, Dimension),
    "attention_dim": Setting(512, "attention_dim", ADDITIVE, Dimension),
    "encoded_image_size": Setting(14, "encoded_image_size", ALL, GridSide),
    "dropout": Setting(0.5, "dropout", ALL, Probability),
    "embedding_dropout": Setting(0.0, "embedding_dropout", ALL, Probability),
    "state_dropout": Setting(0.0, "state_dropout", ("soft", "hard", "show_tell"), Probability),
    "residual_dropout": Setting(0.1, "residual_dropout", ("transformer",), Probability),
    "decoder_layers": Setting(None, "layers", LAYERED, Layers | None),
    "attention_heads": Setting(8, "heads", ("transformer",), Count),
    "shown_head": Setting(None, "shown_head", ("transformer",), Count | None),
    "gate": Setting(True, "gate", ("soft", "hard"), bool),
    "deep_output": Setting(False, "deep_output", ("soft", "hard"), bool),
    "attention_nonlinearity": Setting("relu", "nonlinearity", ADDITIVE, Literal["relu", "tanh"]),
    "embedding_max_norm": Setting(None, "embedding_max_norm", ALL, Positive | None),
    "tie_weights": Setting(False, "tie_weights", ALL, bool),
    "hard_expected_share": Setting(0.5, "expected_share", ("hard",), Share),
    "hard_inference": Setting("argmax", "inference", ("hard",), Literal["argmax", "sample", "expectation"]),
}


def build_encoder(config, weights="none"):
    """
    Build the encoder that a config names.

    :param config: dict of train.py's hyperparameters, as the checkpoint keeps them
    :param weights: 'imagenet' or 'none'
    :return: `Encoder`
    :raises UserError: if a field is missing or makes no sense
    """
    for field in ("encoder", "encoded_image_size"):
        if field not in config:
            raise UserError(f"its config has no {field}; get or make the file again")
    encoder_dim = config.get("encoder_dim")
    check_value("encoder_dim", Dimension | None, encoder_dim)
    return Encoder(config["encoder"], weights, config["encoded_image_size"], encoder_dim)


def build_decoder(config, vocab_size, encoder_dim):
    """
    Build the decoder that a config names.

    :param config: as for `decoder_arguments`
    :param vocab_size: number of words
    :param encoder_dim: dimension of a location's features
    :return: the decoder, with random weights
    :raises UserError: as `decoder_arguments`, or if the decoder finds that its settings do not suit one another
    """
    arguments = decoder_arguments(config)
    decoder = DECODERS[config.get("decoder", "soft")](vocab_size, encoder_dim, **arguments)
    return accelerate(decoder) if config.get("fast_cpu", True) else decoder


def decoder_arguments(config):
    """
    Give what a config says of its decoder, checked.

    :param config: dict of train.py's hyperparameters, as the checkpoint keeps them; a field that it lacks, because it
        is older than the field, has the default of `SETTINGS`
    :return: dict of the decoder's arguments
    :raises UserError: if the decoder is unknown, a setting's value makes no sense, or a setting was changed that this
        decoder does not have
    """
    name = config.get("decoder", "soft")
    if not isinstance(name, str) or name not in DECODERS:
        raise UserError(f"decoder: {short(name)} found, one of {', '.join(DECODERS)} expected")
    arguments = {}
    for field, setting in SETTINGS.items():
        value = config.get(field, setting.default)
        if name in setting.decoders:
            check_value(field, setting.type, value)
            if value is not None:
                arguments[setting.argument] = value
        elif value != setting.default:
            raise UserError(
                f"{field}: {short(value)} found, {setting.default!r} (the default) expected: the decoder '{name}' has "
                f"no such setting; leave it out, or choose --decoder {' or '.join(setting.decoders)}"
            )
    return arguments
