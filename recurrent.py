"""
One weight gradient for a whole recurrence.

A linear layer that is used at every timestep gets, from plain autograd, a gradient at every timestep: each is as large
as its weights, comes from a handful of rows, and has to be added to the others. The rows of all timesteps stacked give
the same sum by one matrix product, three to four times as fast. Within

    with gather_weight_gradients():
        for t in ...:

that is what happens to every `nn.Linear`; the code inside needs no change.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.overrides import TorchFunctionMode


class gather_weight_gradients(TorchFunctionMode):  # noqa: N801  used like a function
    """Context in which linear layers on (N, input) rows gather what their weight gradient needs."""

    def __init__(self):
        super().__init__()
        self.layers = {}  # of a weight: what all its uses share

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and torch.is_grad_enabled():
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            if x.ndim == 2 and weight.requires_grad and bias is not None:
                if id(weight) not in self.layers:
                    uses = []
                    low = weight.detach().to(matmul_dtype(x)), bias.detach().to(matmul_dtype(x))
                    self.layers[id(weight)] = uses, low, _Sum.apply(weight, bias, uses)
                uses, low, token = self.layers[id(weight)]
                return _Use.apply(x, *low, token, uses)
        return function(*args, **(kwargs or {}))


def matmul_dtype(x):
    """:return: the type in which autocast would multiply x"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Use(Function):
    """The layer at one timestep. Backward passes the gradient on to its input and notes the rest in `uses`."""

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
        if ctx.needs_input_grad[3]:  # the weights' gradient is wanted too
            ctx.uses.append((gradient, x))
        return (gradient @ weight).to(ctx.dtype), None, None, gradient.new_zeros((), dtype=torch.float32), None


class _Sum(Function):
    """The layer's weights. Every use depends on the token, so backward comes here after all of them."""

    @staticmethod
    def forward(ctx, weight, bias, uses):
        ctx.uses = uses
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        gradients, inputs = (torch.cat(rows) for rows in zip(*ctx.uses, strict=True))  # (M, output), (M, input)
        ctx.uses.clear()
        return (gradients.T @ inputs).float(), gradients.float().sum(dim=0), None
