"""
One weight gradient for a whole recurrence.

A layer that is used at every timestep gets, from plain autograd, a gradient at every timestep: each is as large as its
weights, comes from a handful of rows, and has to be added to the others. The rows of all timesteps stacked give the
same sum at once, three to four times as fast. Within

    with gather_weight_gradients():
        for t in ...:

that is what happens to every `nn.Linear` and `nn.Embedding`; the code inside needs no change.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.overrides import TorchFunctionMode


class gather_weight_gradients(TorchFunctionMode):  # noqa: N801  used like a function
    """Context in which layers on (N, input) rows, or on N ids, gather what their weight gradient needs."""

    def __init__(self):
        super().__init__()
        self.layers = {}  # of a weight: what all its uses share

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if function is F.linear and len(args) == 3 and args[0].ndim == 2 and args[1].requires_grad:
                x, weight, bias = args
                low, token, uses = self.shared(weight, matmul_dtype(x), bias)
                return _Linear.apply(x, *low, token, uses)
            if function is F.embedding and kwargs.get("max_norm", (*args, None, None)[3]) is None:
                words, weight = args[:2]
                if words.ndim == 1 and weight.requires_grad:
                    low, token, uses = self.shared(weight, weight.dtype)
                    return _Embedding.apply(words, *low, token, uses)
        return function(*args, **kwargs)

    def shared(self, weight, dtype, bias=None):
        """:return: the layer's tensors in `dtype` without their history, its token, and the list of its uses"""
        if id(weight) not in self.layers:
            tensors = (weight,) if bias is None else (weight, bias)
            uses = []
            self.layers[id(weight)] = [t.detach().to(dtype) for t in tensors], _Sum.apply(uses, *tensors), uses
        return self.layers[id(weight)]


def matmul_dtype(x):
    """:return: the type in which autocast would multiply x"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linear(Function):
    """A linear layer at one timestep. Backward passes the gradient on to its input and notes its rows in `uses`."""

    @staticmethod
    def forward(ctx, x, weight, bias, token, uses):
        ctx.dtype, ctx.uses = x.dtype, uses
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        return (gradient @ weight).to(ctx.dtype), None, None, note(ctx.uses, gradient, x), None


class _Embedding(Function):
    """The rows of an embedding at one timestep."""

    @staticmethod
    def forward(ctx, words, weight, token, uses):
        ctx.uses = uses
        ctx.save_for_backward(words)
        return F.embedding(words, weight)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, note(ctx.uses, gradient, *ctx.saved_tensors), None


def note(uses, gradient, inputs):
    """Keep the rows for the sum of this backward pass; :return: a gradient for the token, which is there to wait for"""
    uses.append((torch._C._current_graph_task_id(), gradient, inputs))
    return torch.zeros((), device=gradient.device)


class _Sum(Function):
    """The layer's weights. Every use depends on the token, so backward comes here after all of them."""

    @staticmethod
    def forward(ctx, uses, weight, bias=None):
        ctx.uses, ctx.shape, ctx.dtype, ctx.has_bias = uses, weight.shape, weight.dtype, bias is not None
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx, _):
        this_pass = torch._C._current_graph_task_id()  # an earlier one may have asked for other gradients only
        rows = [(gradient, inputs) for task, gradient, inputs in ctx.uses if task == this_pass]
        ctx.uses.clear()
        gradients, inputs = (torch.cat(parts) for parts in zip(*rows, strict=True))
        if not ctx.has_bias:  # inputs (M,) are ids, gradients (M, embed_dim)
            return None, gradients.new_zeros(ctx.shape).index_add_(0, inputs, gradients)
        of_weight = (gradients.T @ inputs).to(ctx.dtype)  # gradients (M, output), inputs (M, input)
        return None, of_weight, gradients.to(ctx.dtype).sum(dim=0)
