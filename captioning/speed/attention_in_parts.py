"""
Additive attention's scores on CPUs, with less to carry to and from memory.

The network that scores a location (paper, equation 4) makes attention_dim numbers of it, at every timestep: with 32
captions, 196 locations and 512 numbers that is 13 MB. Plain autograd writes them, keeps them for backward, and there
makes a gradient of the keys that is as large, at every timestep, to add it to the others. Much of that time a CPU waits
for its memory. Here

- the captions are scored a few at a time, in a search too, so that these numbers stay in the processor's cache;
- none of them is kept for backward, which asks only where keys + query was positive: keys and query still say that;
- the gradient of the keys is added up in one place, over all timesteps, as shared_products.py does for the weights.
"""

import torch
from torch.autograd import Function

from captioning.speed.shared_products import sharing
from models import Attention

ENOUGH = 5_000  # numbers that attention makes of a caption's locations, from which on sharing gains
PART = 3_300_000  # bytes to work on at a time: about what the cores' caches hold


class AttentionInParts(Attention):
    """`Attention` whose scores are computed for a few captions at a time."""

    def scores(self, keys, query):
        """:return: (N, P), of keys (N, P, attention_dim) and a query (N, attention_dim)"""
        context = sharing()
        if context is not None and gains_from_sharing(keys, self):
            return shared_keys(context, keys, self.full_att).scores(query, self.full_att)
        if keys.device.type == "cpu" and not torch.is_grad_enabled():
            step = captions_at_a_time(keys)
            parts = zip(keys.split(step), query.split(step), strict=True)
            return torch.cat([super(AttentionInParts, self).scores(*part) for part in parts])
        return super().scores(keys, query)


def scores_by_the_formula():
    """:return: whether `Attention.scores` is the formula of this file; not if somebody tries another in models.py"""
    try:
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):  # training's random numbers stay
            attention = Attention(3, 3, 4)
            for part in attention.parameters():  # not drawn: where a checkpoint is loaded, nothing is
                part.copy_(torch.arange(1.0, 1 + part.numel()).sin().view_as(part))
            keys, query = torch.arange(24.0).sin().view(2, 3, 4), torch.arange(8.0).cos().view(2, 4)
            found = attention.scores(keys, query)  # (N, P)
            expected = torch.relu(keys + query.unsqueeze(1)) @ attention.full_att.weight[0] + attention.full_att.bias
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):  # it has other layers, or wants other shapes
        return False


def captions_at_a_time(keys):
    """:return: how many captions' keys (N, P, attention_dim) fit into a part, at least 1"""
    return max(1, PART // (keys.shape[1:].numel() * keys.element_size()))


def gains_from_sharing(keys, attention):
    """:return: whether `SharedKeys` can score these keys, and is faster. (A tanh's slope takes more than a sign.)"""
    fits = keys.device.type == "cpu" and keys.requires_grad and attention.nonlinearity is torch.relu
    return fits and keys.shape[1:].numel() >= ENOUGH


def shared_keys(context, keys, layer):
    """:return: the context's `SharedKeys` of a tensor that begins where these do: they are its first rows"""
    use = keys.data_ptr(), keys.shape[1:], id(layer.weight)
    if use not in context.layers or len(keys) > len(context.layers[use].keys):
        context.layers[use] = SharedKeys(keys, layer)
    return context.layers[use]


class SharedKeys:
    """The keys of a batch for all timesteps; of these each uses the first rows, those of the captions still running."""

    def __init__(self, keys, layer):
        self.named_by = keys, layer.weight  # kept alive, so that no other tensor gets their place in memory
        self.keys = keys.detach()  # (N, P, attention_dim)
        self.weight = layer.weight.detach().flatten().to(keys.dtype)  # (attention_dim,)
        self.size = captions_at_a_time(keys)
        self.room = torch.empty_like(self.keys[: self.size])  # to work in
        self.backward_pass, self.of_keys, self.of_weight = None, None, None  # the gradients under way
        self.token = _Sum.apply(self, keys, layer.weight)

    def scores(self, query, layer):
        """:return: (n, P) of the first n captions, query (n, attention_dim)"""
        return _Scores.apply(query.to(self.keys.dtype), self, self.token) + layer.bias

    def parts(self, n):
        """:return: list of slices of the first n captions, each with room (captions, P, attention_dim) to work in"""
        slices = [slice(i, min(i + self.size, n)) for i in range(0, n, self.size)]
        return [(part, self.room[: part.stop - part.start]) for part in slices]

    def begin(self, backward_pass):
        """Make room for the gradients of this backward pass, if it is a new one."""
        if self.backward_pass != backward_pass:
            self.backward_pass = backward_pass
            keys, weight = self.named_by
            self.of_keys = torch.zeros_like(keys)  # (N, P, attention_dim)
            self.of_weight = torch.zeros_like(weight)  # (1, attention_dim), in its own precision

    def end(self):
        """:return: the gradients of this backward pass, of which nothing is kept"""
        of_keys, of_weight = self.of_keys, self.of_weight
        self.backward_pass, self.of_keys, self.of_weight = None, None, None
        return of_keys, of_weight


class _Scores(Function):
    """
    weight * relu(keys + query), summed over attention_dim, of one timestep.

    With g the gradient of a score and slope the ReLU's, 0 or 1, the gradients are sums of g * slope: times the weight,
    over timesteps for a key and over locations for a query. The weight's is the sum of g * slope * (keys + query): of
    the other two, before they are multiplied by the weight, times key and query. So it needs no sum of its own.
    """

    @staticmethod
    def forward(ctx, query, shared, token):
        ctx.shared = shared
        ctx.save_for_backward(query)
        scores = query.new_empty(len(query), shared.keys.shape[1])  # (n, P)
        for part, room in shared.parts(len(query)):
            hidden = torch.add(shared.keys[part], query[part].unsqueeze(1), out=room).relu_()
            scores[part] = hidden @ shared.weight
        return scores

    @staticmethod
    def backward(ctx, gradient):
        shared, (query,) = ctx.shared, ctx.saved_tensors
        shared.begin(torch._C._current_graph_task_id())
        of_query = torch.empty_like(query)  # (n, attention_dim), but for the weight
        for part, room in shared.parts(len(query)):
            slope = torch.gt(shared.keys[part], -query[part].unsqueeze(1), out=room)  # is keys + query positive: 0 or 1
            g = gradient[part].unsqueeze(1)  # (captions, 1, P)
            of_query[part] = (g @ slope).squeeze(1)
            shared.of_keys[part].addcmul_(slope, g.transpose(1, 2))
        shared.of_weight += (query * of_query).sum(dim=0)
        return of_query * shared.weight, None, None


class _Sum(Function):
    """The gradients of keys and weight. Every timestep depends on its token: backward comes here after all of them."""

    @staticmethod
    def forward(ctx, shared, keys, weight):
        ctx.shared = shared
        return torch.zeros((), device=keys.device)

    @staticmethod
    def backward(ctx, _):
        shared = ctx.shared
        of_keys, of_weight = shared.end()  # of_keys is to be multiplied by the weight
        for part, room in shared.parts(len(of_keys)):
            of_weight += torch.mul(shared.keys[part], of_keys[part], out=room).sum(dim=(0, 1))
            of_keys[part].mul_(shared.weight)
        return None, of_keys, of_weight
