"""
Models as the field's tutorial has them, in their plainest form, and files as old and new PyTorch pickled them.

convert_checkpoint.py and the benchmarks are compared with them: nothing is computed ahead, a grid of 14 x 14, one photo
at a time in a search.
"""

import sys
import types

import torch
import torchvision
from torch import nn


class Encoder(nn.Module):
    """A ResNet without its last two layers; its grid is pooled to 14 x 14 (or another size)."""

    def __init__(self, encoded_image_size=14, network="resnet101"):
        super().__init__()
        self.enc_image_size = encoded_image_size
        self.resnet = nn.Sequential(*list(torchvision.models.get_model(network, weights=None).children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((encoded_image_size, encoded_image_size))

    def forward(self, images):
        return self.adaptive_pool(self.resnet(images)).permute(0, 2, 3, 1)  # (N, size, size, encoder_dim)


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu = nn.ReLU()
        self.softmax = nn.Softmax(dim=1)

    def forward(self, pixels, hidden):
        joined = self.relu(self.encoder_att(pixels) + self.decoder_att(hidden).unsqueeze(1))  # (N, P, attention_dim)
        alpha = self.softmax(self.full_att(joined).squeeze(2))  # (N, P)
        return (pixels * alpha.unsqueeze(2)).sum(dim=1), alpha


class DecoderWithAttention(nn.Module):
    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim=2048, dropout=0.5):
        super().__init__()
        self.encoder_dim, self.attention_dim, self.embed_dim = encoder_dim, attention_dim, embed_dim
        self.decoder_dim, self.vocab_size = decoder_dim, vocab_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim, bias=True)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def step(self, embedded, pixels, h, c):
        """:return: alpha (N, P), h and c (N, decoder_dim)"""
        context, alpha = self.attention(pixels, h)  # (N, encoder_dim), (N, P)
        context = self.sigmoid(self.f_beta(h)) * context
        h, c = self.decode_step(torch.cat([embedded, context], dim=1), (h, c))
        return alpha, h, c

    def forward(self, features, captions, lengths):
        """
        :param features: (N, 14, 14, encoder_dim)
        :return: scores (N, T, vocab_size), alphas (N, T, P), both zero after a caption's end; the captions, sorted;
            their numbers of words to predict
        """
        lengths, order = lengths.sort(descending=True, stable=True)
        pixels, captions = features[order].flatten(1, 2), captions[order]  # (N, P, encoder_dim)
        h, c = self.init_h(pixels.mean(dim=1)), self.init_c(pixels.mean(dim=1))  # (N, decoder_dim) each
        embedded = self.embedding(captions)  # (N, max_length, embed_dim)
        decode_lengths = (lengths - 1).tolist()
        scores = pixels.new_zeros(len(captions), max(decode_lengths), self.vocab_size)
        alphas = pixels.new_zeros(len(captions), max(decode_lengths), pixels.shape[1])
        for t in range(max(decode_lengths)):
            n = sum(length > t for length in decode_lengths)
            alpha, h, c = self.step(embedded[:n, t], pixels[:n], h[:n], c[:n])
            scores[:n, t] = self.fc(self.dropout(h))
            alphas[:n, t] = alpha
        return scores, alphas, captions, decode_lengths


@torch.no_grad()
def greedy_caption(encoder, decoder, photo, word_map, max_length):
    """
    :param photo: (3, S, S) uint8
    :return: the likeliest word after each word, until <end>; and the log-probability of them all
    """
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = encoder(((photo / 255 - mean) / std).unsqueeze(0)).flatten(1, 2)  # (1, P, encoder_dim)
    h, c = decoder.init_h(pixels.mean(dim=1)), decoder.init_c(pixels.mean(dim=1))  # (1, decoder_dim)
    names = {index: word for word, index in word_map.items()}
    words, total, word = [], 0.0, word_map["<start>"]
    while len(words) < max_length:
        _, h, c = decoder.step(decoder.embedding(torch.tensor([word])), pixels, h, c)
        log_probs = decoder.fc(h).log_softmax(dim=1)[0]  # (vocab_size,), dropout does nothing in eval mode
        word = log_probs.argmax().item()
        total += log_probs[word].item()
        if word == word_map["<end>"]:
            break
        words.append(names[word])
    return words, total


@torch.no_grad()
def beam_caption(decoder, features, start, end, beam_size, steps):
    """
    :param features: (1, 14, 14, encoder_dim), of one photo
    :return: list of word ids, without <start> and <end>
    """
    k = beam_size
    features = features.flatten(1, 2).expand(k, -1, -1)  # (k, P, encoder_dim)
    mean = features.mean(dim=1)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    written = torch.full((k, 1), start, device=features.device)
    totals = torch.zeros(k, 1, device=features.device)
    complete = []
    for step in range(1, steps + 1):
        alpha, h, c = decoder.step(decoder.embedding(written[:, -1]), features[: len(written)], h, c)
        candidates = totals + decoder.fc(h).log_softmax(dim=1)  # (k, vocab_size)
        best, index = (candidates[0] if step == 1 else candidates.flatten()).topk(k)
        rows, words = index // candidates.shape[1], index % candidates.shape[1]
        written = torch.cat([written[rows], words.unsqueeze(1)], dim=1)
        going = [i for i, word in enumerate(words.tolist()) if word != end]
        complete += [(best[i].item(), written[i].tolist()[1:-1]) for i in range(k) if i not in going]
        k = len(going)
        if k == 0:
            break
        written, totals, h, c = written[going], best[going].unsqueeze(1), h[rows][going], c[rows][going]
    if not complete:
        return written[totals.argmax()].tolist()[1:]
    return max(complete, key=lambda found: found[0])[1]


def make_models(word_map, seed=0, grid=14):
    """:return: an encoder and a decoder in eval mode whose captions differ from photo to photo"""
    torch.manual_seed(seed)
    encoder = Encoder(grid, "resnet18")
    decoder = DecoderWithAttention(6, 7, 8, len(word_map), encoder_dim=512)
    for module in encoder.modules():  # the statistics of random photos: else all photos give the same features
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder(nn.functional.interpolate(torch.randn(8, 3, 2, 2), 64))
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.05 if parameter.shape[-1] > 100 else 0.7)  # less for those that read features
        decoder.fc.bias[[word_map["<pad>"], word_map["<start>"]]] = -50  # no caption has them after its first word
    return encoder.eval(), decoder.eval()


def save(path, encoder, decoder, format, **replaced):
    """
    Pickle them as the tutorial's training does.

    :param format: 'zip' (PyTorch 1.6 and newer), 'legacy' (older) or 'oldest' (without what modules did not have then)
    :param replaced: what else the file should hold
    """
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.0)  # the step is there for its moments
    sum(parameter.sum() for parameter in decoder.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = {
        "epoch": 11, "epochs_since_improvement": 2, "bleu-4": 0.23, "encoder": encoder, "decoder": decoder,
        "encoder_optimizer": None, "decoder_optimizer": optimizer,
    } | replaced  # fmt: skip
    tutorial, old_backend = types.ModuleType("models"), types.ModuleType("torch.nn.backends.thnn")
    tutorial.__file__ = __file__  # whose text goes into the legacy format
    for cls in (Encoder, Attention, DecoderWithAttention):
        setattr(tutorial, cls.__name__, cls)
    old_backend._get_thnn_function_backend = old_backend_of_modules
    aside = {name: sys.modules.get(name) for name in ("models", old_backend.__name__)}
    places = [*[(cls, "models") for cls in (Encoder, Attention, DecoderWithAttention)],
              (old_backend_of_modules, old_backend.__name__)]  # fmt: skip
    try:
        sys.modules.update({"models": tutorial, old_backend.__name__: old_backend})
        for thing, module in places:
            thing.__module__ = module
        if format == "oldest":
            make_old(encoder), make_old(decoder)
        torch.save(state, path, _use_new_zipfile_serialization=format == "zip")
    finally:
        for thing, _ in places:
            thing.__module__ = __name__
        for name, module in aside.items():
            sys.modules.pop(name)
            if module:
                sys.modules[name] = module


def old_backend_of_modules():
    raise AssertionError("what a pickle names is not to be called")


old_backend_of_modules.__name__ = old_backend_of_modules.__qualname__ = "_get_thnn_function_backend"


class OldBackend:
    """What modules held before PyTorch 1.4: its pickle is a call of a function that is no more."""

    def __reduce__(self):
        return old_backend_of_modules, ()


def make_old(module):
    """Take out what modules did not have in PyTorch 0.4."""
    kept = {"_parameters", "_buffers", "_modules", "training", "_backward_hooks", "_forward_hooks"}
    for each in module.modules():
        for name in list(vars(each)):
            if name.startswith("_") and name not in kept or name in ("padding_mode", "track_running_stats"):
                del each.__dict__[name]
        each._buffers.pop("num_batches_tracked", None)
        each.__dict__["_backend"] = OldBackend()
