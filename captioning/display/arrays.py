"""The arrays that are drawn: are they photos, are they attention on a square grid?"""

import math

import numpy as np


def check_image(image):
    """Give the photo as an array, or a ValueError where it is not (H, W, 3) uint8."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: found {image.dtype} of shape {image.shape}, expected uint8 of shape (H, W, 3)")
    return image


def square_grids(alphas):
    """Give (T, P) or (T, s, s) attention as (T, s, s)."""
    alphas = np.asarray(alphas)
    side = math.isqrt(math.prod(alphas.shape[1:]))
    if alphas.ndim not in (2, 3) or alphas.size != len(alphas) * side * side:
        raise ValueError(f"alphas: found shape {alphas.shape}, expected (T, P) of square grids or (T, s, s)")
    return alphas.reshape(-1, side, side)
