"""Small decoders of every kind, and what compares them with their papers' equations, written out slowly."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from captioning.inference.search import Rules
from captioning.networks.registry import SETTINGS, build_decoder

VOCAB, PAD, START, END = 11, 0, 9, 10
RULES = Rules(start=START, end=END, max_length=9, forbidden=(PAD, START))
GRIDS = [(2, 2), (3, 3), (5, 5), (4, 7), (1, 1)]  # a decoder sees 3 x 3
SMALL = {
    "embed_dim": 7, "decoder_dim": 6, "attention_dim": 6, "attention_heads": 2, "encoded_image_size": 3, "dropout": 0.0,
    "residual_dropout": 0.0,
}  # fmt: skip


def suiting(name, settings):
    """:return: those of the settings that a decoder has"""
    return {field: value for field, value in settings.items() if name in SETTINGS[field].decoders}


def build(name, spread=0.5, encoder_dim=4, **changed):
    """A small decoder, its random numbers far enough from zero to matter."""
    torch.manual_seed(0)
    decoder = build_decoder({"decoder": name} | suiting(name, SMALL) | changed, VOCAB, encoder_dim)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, spread)
    return decoder


def grid(n, size=(3, 3), seed=0, encoder_dim=4):
    return torch.randn(n, *size, encoder_dim, generator=torch.Generator().manual_seed(seed))


def captions(n, seed=0, longest=8):
    """:return: n captions (n, longest + 2) of up to `longest` words between <start> and <end>, and their lengths"""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 3, (n,), generator=generator)
    rows = torch.randint(1, START, (n, longest + 2), generator=generator)
    for row, length in zip(rows, lengths, strict=True):
        row[0], row[length - 1], row[length:] = START, END, PAD
    return rows, lengths


def assert_same(found, expected):
    """To 1e-5 of the tensor's largest number, in float32; what is nothing but rounding noise may differ."""
    size = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=max(1e-5 * size, 2e-7))


def objective(scores, alphas, targets):
    """Any number that depends on all scores and alphas."""
    loss = F.cross_entropy(scores, targets)
    return loss if alphas is None else loss + ((1 - alphas.sum(dim=1)) ** 2).mean()


def gradients(loss, decoder, features):
    decoder.zero_grad()
    features.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters()} | {"features": features.grad.clone()}


def plain(equations, decoder, features, rows, lengths):
    """
    :param equations: function of the parameters by name, a photo's 9 locations, and a caption's words; it gives scores
        (T, vocab_size), alphas (T, P) or None, and perhaps more
    :return: list of what it gives for each caption
    """
    p = dict(decoder.named_parameters())
    p.setdefault("fc.weight", p["embedding.weight"])  # tied
    locations = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), 3).flatten(2).transpose(1, 2)  # (N, P, encoder_dim)
    return [
        equations(p, list(a), row[: length - 1])
        for a, row, length in zip(locations, rows, lengths.tolist(), strict=True)
    ]


def assert_equations_hold(equations, decoder, size=(2, 2)):
    """
    Scores, alphas and gradients are those of a paper's equations.

    :param equations: as for `plain`
    :param size: of the encoder's grid
    """
    features, (rows, lengths) = grid(4, size).requires_grad_(), captions(4)
    decoded = decoder(features, rows, lengths)
    found = gradients(objective(decoded.logits, decoded.alphas, decoded.targets), decoder, features)

    slow = plain(equations, decoder, features, rows, lengths)
    slow = [slow[i] for i in decoded.order]
    scores = pad_sequence([scores for scores, *_ in slow], batch_first=True)
    packed = pack_padded_sequence(scores, lengths[decoded.order] - 1, batch_first=True).data
    alphas = None
    if slow[0][1] is not None:
        alphas = pad_sequence([alphas for _, alphas, *_ in slow], batch_first=True)
        assert_same(decoded.alphas, alphas)
    assert_same(decoded.logits, packed)
    expected = gradients(objective(packed, alphas, decoded.targets), decoder, features)
    for parameter in expected:
        assert_same(found[parameter], expected[parameter])


# What the papers' equations are made of, for one photo and one caption at a time. Vectors have one axis.


def affine(p, name, *vectors):
    return p[f"{name}.weight"] @ torch.cat(vectors) + p[f"{name}.bias"]


def lstm(p, name, x, h, m):
    """The gates one by one. (Lu et al. write m for the memory; so does this.)"""
    weight = torch.cat([p[f"{name}.weight_ih"], p[f"{name}.weight_hh"]], dim=1)
    bias = p[f"{name}.bias_ih"] + p[f"{name}.bias_hh"]
    write, keep, candidate, show = (weight @ torch.cat([x, h]) + bias).chunk(4)
    m = keep.sigmoid() * m + write.sigmoid() * candidate.tanh()
    return show.sigmoid() * m.tanh(), m


def stack(p, name, x, state):
    """LSTMs on top of one another: the new (h, m) of each."""
    new = []
    for i, (h, m) in enumerate(state):
        new.append(lstm(p, f"{name}.{i}", x, h, m))
        x = new[-1][0]
    return new


def nothing(dim, layers):
    """:return: the (h, m) of so many LSTMs before the first word"""
    return [(torch.zeros(dim), torch.zeros(dim)) for _ in range(layers)]


def additive_scores(p, keys, query, squash):
    """:return: list of the scores (1,) of the locations by `models.Attention`"""
    asked = affine(p, "attention.decoder_att", query)
    return [affine(p, "attention.full_att", squash(key + asked)) for key in keys]


def weighted_sum(weights, vectors):
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
