"""Random photos, and random networks whose batch normalisation has something to normalise with."""

import torch


def photos(n=1, side=64, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def scrambled(network, seed=0):
    """Give batch normalisation statistics and weights of its own, so that a mix-up would show."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(0.2 * torch.rand(tensor.shape, generator=generator) - 0.1)
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network
