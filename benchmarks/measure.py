"""What the benchmarks share: timing, the machine's own speed, and how results are printed."""

import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from anywhere

from utils import UserError

CPU = torch.device("cpu")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device, repeats=5, warm_up=1):
    """:return: seconds of `work()`, the median of `repeats` times after `warm_up` times that do not count"""
    times = []
    for i in range(warm_up + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_own_process(function, *arguments):
    """:return: what the function returns; how it finds and leaves the memory is not another's concern"""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(device=CPU):
    """
    :return: the most bytes of a GPU's memory that were held since the last call; of a CPU's, by this process, without
        those of files such as libraries
    :raises UserError: if this system does not tell
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("this benchmark needs Linux, whose /proc tells a process's peak since the last look")
    lines = (line.split() for line in Path("/proc/self/status").read_text().split("\n") if line.endswith(" kB"))
    kilobytes = {name: int(number) for name, number, _ in lines}
    Path("/proc/self/clear_refs").write_text("5")  # from here on a new peak
    return 1024 * (kilobytes["VmHWM:"] - kilobytes["RssFile:"])


def matmul_rate(device, dtype, size=2048):
    """:return: floating-point operations a second that this machine reaches in a large matrix product, now"""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, repeats=10)


def matmul_rates(device):
    """:return: dict of type -> `matmul_rate`, which is printed too, for a CPU also what oneDNN reaches in float32"""
    kinds = torch.float32, torch.bfloat16
    rounds = [{kind: matmul_rate(device, kind) for kind in kinds} for _ in range(3)]
    rates = {kind: max(one[kind] for one in rounds) for kind in kinds}  # another program may have disturbed one
    print(f"{device}, {torch.get_num_threads()} threads; matrix products: " + ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items()))  # fmt: skip
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        a, b = (torch.randn(2048, 2048) for _ in range(2))
        onednn = 2 * 2048**3 / seconds(lambda: F.linear(a.to_mkldnn(), b).to_dense(), device, repeats=20)
        print(f"through oneDNN, which training and convolutions use: {onednn / 1e9:.0f} GFLOP/s in float32")
    return rates


def report(benchmark, rows):
    """
    Print a table, then one JSON line a case.

    :param rows: list of (case, unit, plain, ours, limit): rates per second; `limit` is what the arithmetic alone
        would allow on this machine, or None
    """
    print(f"\n{'case':<46}{'plain':>10}{'ours':>10}{'ratio':>8}{'of limit':>10}   unit")
    for case, unit, plain, ours, limit in rows:
        share = f"{ours / limit:.0%}" if limit else "-"
        print(f"{case:<46}{plain:>10.2f}{ours:>10.2f}{ours / plain:>8.1f}{share:>10}   {unit}")
    for case, unit, plain, ours, limit in rows:
        row = {"benchmark": benchmark, "case": case, "unit": unit, "plain": round(plain, 4), "ours": round(ours, 4)}
        row |= {"ratio": round(ours / plain, 2), "limit_fraction": round(ours / limit, 3) if limit else None}
        print(json.dumps(row))
