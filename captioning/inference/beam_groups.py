"""
Diverse beam search (Vijayakumar et al. 2016): captions that differ, where a plain beam holds one caption in many
wordings.

The beam is divided into groups, each a beam of its own. At each timestep the groups choose one after another, and a
word that groups before have just chosen for the same photo costs `diversity` each time (the paper's Hamming diversity,
section 4). The cost counts in this choice alone: a caption's log-probability stays what the model says.
With one group this is plain beam search.
"""

import torch


def extend_groups(totals, log_probs, room, diversity):
    """
    Choose the beginnings that each group continues with, one word longer than before (equation 5).

    :param totals: (n, groups, k), log-probability of each beginning; -inf for an empty place
    :param log_probs: (n * groups * k, vocab_size), of the next word
    :param room: (n, groups), places that are left in each group
    :param diversity: cost of a word that a group before has chosen, in nats: the paper's lambda
    :return: (n, groups * k) each: the place before whose caption is continued; the word that is added; the new
        log-probability, -inf for an empty place. In each group the best comes first.
    """
    n, groups, size = totals.shape
    vocab_size = log_probs.shape[1]
    candidates = totals.unsqueeze(3) + log_probs.unflatten(0, totals.shape)  # (n, groups, k, vocab_size)
    places = torch.arange(size, device=totals.device)  # (k,)
    said = totals.new_zeros(n, vocab_size)  # how often groups before have just chosen each word
    parents, words, extended = [], [], []
    for group in range(groups):
        own = candidates[:, group]  # (n, k, vocab_size)
        preferred = own if group == 0 else own - diversity * said.unsqueeze(1)  # (n, k, vocab_size)
        index = preferred.flatten(1).topk(size, dim=1).indices  # (n, k), best first
        chosen = own.flatten(1).gather(1, index)  # (n, k)
        chosen = chosen.masked_fill(places >= room[:, group].unsqueeze(1), -torch.inf)  # (n, k)
        parents.append(group * size + index // vocab_size)
        words.append(index % vocab_size)
        extended.append(chosen)
        said = said.scatter_add(1, words[-1], (chosen > -torch.inf).to(said.dtype))  # (n, vocab_size)
    return torch.cat(parents, dim=1), torch.cat(words, dim=1), torch.cat(extended, dim=1)


def without_repeats(captions):
    """:return: of a list of `Hypothesis` the first with each sequence of words: two groups may find one caption"""
    different = {}
    for caption in captions:
        different.setdefault(tuple(caption.words), caption)
    return list(different.values())
