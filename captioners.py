"""The decoders by name."""

from models import DecoderWithAttention, DecoderWithHardAttention


def build_decoder(config, vocab_size, encoder_dim):
    """
    :param config: dict of train.py's hyperparameters, as the checkpoint keeps them
    :return: the decoder that the config names, with random weights
    """
    cls = {"soft": DecoderWithAttention, "hard": DecoderWithHardAttention}[config["decoder"]]
    names = ("embed_dim", "decoder_dim", "attention_dim", "encoded_image_size", "dropout")
    return cls(vocab_size, encoder_dim, **{name: config[name] for name in names})
