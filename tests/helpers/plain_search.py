"""Beam search and sampling, plain and slow: each caption is read as soon as it ends, and everything moves with it."""

import torch

from captioning.inference.back_pointers import Hypothesis
from captioning.inference.search import choose
from models import select_rows


def log_probs_of(rules, logits, written):
    """:return: (R, vocab_size), -inf for what the rules exclude, each word by itself"""
    t, n = written.shape[1], rules.no_repeat_ngram
    log_probs = (logits.float() / rules.temperature).log_softmax(dim=1)
    if rules.forbidden:
        log_probs[:, list(rules.forbidden)] = -torch.inf
    if t < rules.min_length:
        log_probs[:, rules.end] = -torch.inf
    if 0 < n <= t:
        ngrams = written.unfold(1, n, 1)  # (R, t - n + 1, n)
        begun = (ngrams[:, :, :-1] == written[:, None, t - n + 1 :]).all(dim=2)
        rows, places = begun.nonzero(as_tuple=True)
        log_probs[rows, ngrams[rows, places, -1]] = -torch.inf
    return log_probs


@torch.no_grad()
def plain_sample(decoder, features, rules, top_k=0, top_p=1.0, generator=None, keep_alphas=False):
    state = decoder.init_state(features)
    photos = torch.arange(len(state[0]))  # (n,), those whose caption still runs
    words = torch.full_like(photos, rules.start)  # (n,)
    written = words.new_zeros(len(photos), 0)  # (n, t)
    totals = torch.zeros(len(photos))  # (n,)
    looked = None  # (n, t, P)
    captions = [None] * len(photos)
    for t in range(rules.max_length + 1):
        output, alpha, state = decoder.step(words, state)
        log_probs = log_probs_of(rules, decoder.scores(output), written)
        stuck = log_probs.amax(dim=1) == -torch.inf
        words = choose(log_probs.masked_fill(stuck.unsqueeze(1), 0.0), top_k, top_p, generator)
        cut = stuck | ((words != rules.end) & (t == rules.max_length))
        totals = totals + log_probs.gather(1, words.unsqueeze(1)).squeeze(1).masked_fill(cut, 0.0)
        written = torch.cat([written, words.unsqueeze(1)], dim=1)
        if keep_alphas:
            looked = alpha.unsqueeze(1) if looked is None else torch.cat([looked, alpha.unsqueeze(1)], dim=1)
        leaves = (words == rules.end) | cut
        for row in leaves.nonzero().flatten().tolist():
            total, ids = totals[row].item(), written[row, :-1] if cut[row] else written[row]
            captions[photos[row]] = hypothesis(ids, total, total, looked, row, rules)
        stays = (~leaves).nonzero().squeeze(1)
        photos, words, written, totals = photos[stays], words[stays], written[stays], totals[stays]
        state = select_rows(state, stays)
        looked = None if looked is None else looked[stays]
        if not len(photos):
            break
    return captions


@torch.no_grad()
def plain_beam_search(decoder, features, rules, beam_size, normalisation, reward, n_best, keep_alphas=False):
    state = decoder.init_state(features)
    state = state._make(part.repeat_interleave(beam_size, dim=0) for part in state)
    photos = torch.arange(len(state[0]) // beam_size)  # (n,), those that are still searched
    words = torch.full((len(photos), beam_size), rules.start)  # (n, k)
    written = words.new_zeros(len(photos), beam_size, 0)  # (n, k, t)
    totals = torch.full((len(photos), beam_size), -torch.inf)  # (n, k)
    totals[:, 0] = 0.0
    room = torch.full((len(photos),), beam_size)  # (n,)
    best_ended = torch.full((len(photos),), -torch.inf)  # (n,)
    looked = None  # (n, k, t, P)
    found = [[] for _ in photos]

    def keep(i, j, steps):
        total = totals[i, j].item()
        score = {"none": total, "length": total / max(steps, 1), "reward": total + reward * steps}[normalisation]
        found[photos[i]].append(
            hypothesis(written[i, j], total, score, None if looked is None else looked[i], j, rules)
        )

    for t in range(rules.max_length + 1):
        output, alpha, state = decoder.step(words.flatten(), state)
        log_probs = log_probs_of(rules, decoder.scores(output), written.flatten(0, 1))
        vocab_size = log_probs.shape[1]
        candidates = (totals.unsqueeze(2) + log_probs.unflatten(0, totals.shape)).flatten(1)
        best, index = candidates.topk(beam_size, dim=1)
        parents, words = index // vocab_size, index % vocab_size
        new_totals = best.masked_fill(torch.arange(beam_size) >= room.unsqueeze(1), -torch.inf)
        alive = new_totals > -torch.inf
        ended = (words == rules.end) & alive
        for i in range(len(photos)):
            if t == rules.max_length:
                completed = {parents[i, j].item() for j in range(beam_size) if ended[i, j]}
                cut = [j for j in range(beam_size) if totals[i, j] > -torch.inf and j not in completed]
            else:
                cut = [totals[i].argmax().item()] if best[i, 0] == -torch.inf else []
            for j in cut:
                keep(i, j, t)
        totals = new_totals
        rows = (torch.arange(len(photos)).unsqueeze(1) * beam_size + parents).flatten()
        written = torch.cat([written.flatten(0, 1)[rows].unflatten(0, words.shape), words.unsqueeze(2)], dim=2)
        if keep_alphas:
            alpha = alpha.unsqueeze(1)
            past = alpha if looked is None else torch.cat([looked.flatten(0, 1), alpha], dim=1)
            looked = past[rows].unflatten(0, words.shape)
        for i, j in ended.nonzero().tolist():
            keep(i, j, t + 1)
        best_ended = torch.maximum(best_ended, totals.masked_fill(~ended, -torch.inf).amax(dim=1))
        room = room - ended.sum(dim=1)
        totals = totals.masked_fill(ended, -torch.inf)
        stays = totals.amax(dim=1) > -torch.inf
        if normalisation == "none" and n_best == 1:
            stays &= totals.amax(dim=1) > best_ended
        state = select_rows(select_rows(state, rows), stays.repeat_interleave(beam_size).nonzero().squeeze(1))
        photos, room, best_ended, totals = photos[stays], room[stays], best_ended[stays], totals[stays]
        words, written = words[stays], written[stays]
        looked = None if looked is None else looked[stays]
        if not len(photos):
            break
    return [sorted(some, key=lambda h: (not h.ended, -h.score))[:n_best] for some in found]


@torch.no_grad()
def plain_diverse_search(decoder, photo, rules, beam_size, groups, diversity):
    """
    Diverse beam search of one photo, in lists, as its paper's Algorithm 1 is written.

    :return: list of (words, log-probability, whether it ended), those that ended first, then the likeliest
    """
    size, done = beam_size // groups, [[] for _ in range(groups)]
    beams = [[([], 0.0, decoder.init_state(photo))] for _ in range(groups)]
    for _ in range(rules.max_length + 1):
        said = []  # by groups before, at this timestep
        before, beams = beams, []
        for group, beam in enumerate(before):
            candidates = []
            for written, total, state in beam:
                output, _, new_state = decoder.step(torch.tensor([written[-1] if written else rules.start]), state)
                log_probs = log_probs_of(rules, decoder.scores(output), torch.tensor([written], dtype=torch.long))
                for word, log_prob in enumerate(log_probs[0].tolist()):
                    preferred = total + log_prob - diversity * said.count(word)
                    candidates.append((preferred, [*written, word], total + log_prob, new_state))
            candidates = [one for one in candidates if one[0] > -torch.inf]
            candidates.sort(key=lambda one: -one[0])
            chosen = candidates[: size - len(done[group])]
            said += [written[-1] for _, written, _, _ in chosen]
            done[group] += [(written[:-1], total, True) for _, written, total, _ in chosen if written[-1] == rules.end]
            beams.append([one[1:] for one in chosen if one[1][-1] != rules.end])
    completed = [words for group in done for words, _, _ in group]
    cut = [(words, total, False) for beam in before for words, total, _ in beam if words not in completed]
    found = []
    for one in sorted([caption for group in done for caption in group] + cut, key=lambda one: (not one[2], -one[1])):
        if one[0] not in [words for words, _, _ in found]:
            found.append(one)
    return found


def hypothesis(written, log_prob, score, looked, row, rules):
    ids = written.tolist()
    ended = ids[-1:] == [rules.end]
    alphas = None if looked is None else looked[row, : len(ids)]
    return Hypothesis(ids[:-1] if ended else ids, log_prob, score, alphas, ended)
