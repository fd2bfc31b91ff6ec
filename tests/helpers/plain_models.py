"""Soft attention written out, slow and obvious, and small captions and grids to compare it with ours on."""

import torch
import torch.nn.functional as F

START, END = 9, 10  # of a vocabulary of 11 words


def captions(n, seed=0, longest=8):
    """:return: n captions (n, longest + 2) of up to `longest` words between <start> and <end>, and their lengths"""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 3, (n,), generator=generator)
    lengths[: n // 3] = lengths[0]  # some of one length
    rows = torch.randint(1, START, (n, longest + 2), generator=generator)
    for row, length in zip(rows, lengths, strict=True):
        row[0], row[length - 1], row[length:] = START, END, 0
    return rows, lengths


def grid(n, size=(3, 3), seed=0, encoder_dim=6):
    return torch.randn(n, *size, encoder_dim, generator=torch.Generator().manual_seed(seed))


def plain_attention(p, cells, hidden, nonlinearity):
    """Every product anew at each call, `W_enc . features` too."""
    encoded = F.linear(cells, p["attention.encoder_att.weight"], p["attention.encoder_att.bias"])
    asked = F.linear(hidden, p["attention.decoder_att.weight"], p["attention.decoder_att.bias"])
    squashed = {"relu": torch.relu, "tanh": torch.tanh}[nonlinearity](encoded + asked.unsqueeze(1))
    return F.linear(squashed, p["attention.full_att.weight"], p["attention.full_att.bias"]).squeeze(2).softmax(dim=1)


def plain_lstm(p, i, x, hidden, cell):
    gates = F.linear(x, p[f"decode_step.{i}.weight_ih"], p[f"decode_step.{i}.bias_ih"])
    gates = gates + F.linear(hidden, p[f"decode_step.{i}.weight_hh"], p[f"decode_step.{i}.bias_hh"])
    into, forget, new, out = gates.chunk(4, dim=1)
    cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def plain_decoder(decoder, features, rows, lengths, size=3, gate=True, nonlinearity="relu", layers=1,
                  deep_output=False, look=lambda t, alpha: alpha, **_):  # fmt: skip
    """
    Teacher forcing as the field's tutorial describes it: a pooled grid, a loop over timesteps with a batch that
    shrinks, everything computed at every timestep into zero-filled tensors.

    :param look: what the context weighs the cells with, of the timestep and alpha
    :return: scores (N, T, vocab_size), alphas (N, T, P), both of the sorted captions, targets and their lengths
    """
    p = dict(decoder.named_parameters())
    p.setdefault("fc.weight", p["embedding.weight"])  # tied
    cells = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).flatten(1, 2)  # (N, P, D)
    lengths, order = lengths.sort(descending=True, stable=True)
    cells, rows = cells[order], rows[order]
    decode_lengths = (lengths - 1).tolist()

    mean = cells.mean(dim=1)
    hidden = F.linear(mean, p["init_h.weight"], p["init_h.bias"]).chunk(layers, dim=1)
    cell = F.linear(mean, p["init_c.weight"], p["init_c.bias"]).chunk(layers, dim=1)
    scores = torch.zeros(len(rows), max(decode_lengths), decoder.vocab_size)
    alphas = torch.zeros(len(rows), max(decode_lengths), size * size)
    for t in range(max(decode_lengths)):
        n = sum(length > t for length in decode_lengths)
        hidden, cell = [h[:n] for h in hidden], [c[:n] for c in cell]
        alpha = plain_attention(p, cells[:n], hidden[-1], nonlinearity)
        context = (cells[:n] * look(t, alpha).unsqueeze(2)).sum(dim=1)
        if gate:
            context = F.linear(hidden[-1], p["f_beta.weight"], p["f_beta.bias"]).sigmoid() * context
        embedded = p["embedding.weight"][rows[:n, t]]
        x = torch.cat([embedded, context], dim=1)
        for i in range(layers):
            hidden[i], cell[i] = plain_lstm(p, i, x, hidden[i], cell[i])
            x = hidden[i]
        if deep_output:
            x = embedded + F.linear(x, p["output_h.weight"], p["output_h.bias"])
            x = x + F.linear(context, p["output_z.weight"], p["output_z.bias"])
        scores[:n, t] = F.linear(x, p["fc.weight"], p["fc.bias"])
        alphas[:n, t] = alpha
    return scores, alphas, rows[:, 1:], decode_lengths
