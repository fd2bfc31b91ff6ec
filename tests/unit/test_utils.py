"""Seeds and devices."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import UserError, choose_autocast, choose_device, seed_everything


@pytest.mark.parametrize("name", ["meta", "cuda:99", "gpu", "", "cpu:-1"])
def test_a_device_that_cannot_compute_is_one_line(name):
    with pytest.raises(UserError, match=f"^device: '{name}' cannot be used") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


def test_auto_is_a_device_that_computes():
    assert (torch.ones(2, device=choose_device("auto")) + 1).tolist() == [2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tf32", [True, False])
def test_a_gpu_uses_tensorfloat_32_unless_it_is_turned_off(tf32):
    choose_device("cuda", tf32)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32


def test_a_seed_repeats_all_random_numbers():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


def test_products_are_done_in_the_precision_that_is_named():
    a = torch.ones(2, 2)
    with choose_autocast("bf16", torch.device("cpu")):
        assert (a @ a).dtype == torch.bfloat16
    with choose_autocast("float32", torch.device("cpu")):
        assert (a @ a).dtype == torch.float32


def test_torch_is_imported_only_where_it_is_used():
    code = "import sys, utils; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
