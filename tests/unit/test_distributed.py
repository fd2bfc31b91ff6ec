"""Two processes train as one does, and end together."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from captioning import distributed
from captioning.command_line import run_script
from captioning.evaluation import metrics
from captioning.networks.registry import DECODERS, build_decoder
from captioning.storage.tensors import load_checkpoint
from captioning.training.losses import CaptionLoss
from captioning.training.run import EncoderDecoder
from datasets import BatchOrder
from models import Decoded, Encoder
from utils import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORD_MAP = {"<pad>": 0, "a": 1, "red": 2, "cat": 3, "dog": 4, "sat": 5, "ran": 6, "<unk>": 7, "<start>": 8, "<end>": 9}
TINY = {
    "data_name": "tiny", "encoder": "squeezenet1_1", "encoder_weights": "none", "encoded_image_size": 3,
    "embed_dim": 16, "decoder_dim": 16, "attention_dim": 16, "dropout": 0.0, "batch_size": 8, "val_batch_size": 2,
    "decoder_lr": 2e-3, "device": "cpu", "print_every": 1,
}  # fmt: skip


# Two processes that wait for work: starting them takes longer than most tests


@pytest.fixture(scope="module")
def two_processes():
    """A function that calls `function(*arguments)` in two processes, joined as torchrun does it; gives both results."""
    pools = [multiprocessing.get_context("spawn").Pool(1) for _ in range(2)]

    def call(function, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = [pool.apply_async(as_process, (i, port, function, *arguments)) for i, pool in enumerate(pools)]
        return [result.get(timeout=500) for result in results]

    yield call
    for pool in pools:
        pool.terminate()


def as_process(rank, port, function, *arguments):
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = str(port)
    try:
        return function(*arguments)
    finally:
        if dist.is_initialized():  # after a fault
            dist.destroy_process_group()


def write_files(folder):
    """Files of create_input_files.py: 27 photos with 3 captions for training, 5 for validation."""
    random = np.random.default_rng(3)
    folder.mkdir()
    for split, photos in (("TRAIN", 27), ("VAL", 5)):
        lengths = random.integers(3, 9, photos * 3).tolist()  # with <start> and <end>
        rows = [[8, *random.integers(1, 7, n - 2).tolist(), 9] + [0] * (9 - n) for n in lengths]
        words = {index: word for word, index in WORD_MAP.items()}
        captions = [[words[i] for i in row[1 : n - 1]] for row, n in zip(rows, lengths, strict=True)]
        references = [
            {"image_id": i, "file_name": f"{i}.jpg", "captions": captions[3 * i : 3 * i + 3]} for i in range(photos)
        ]
        for name, content in (("CAPTIONS", rows), ("CAPLENS", lengths), ("REFERENCES", references)):
            (folder / f"{split}_{name}_tiny.json").write_text(json.dumps(content))
        with h5py.File(folder / f"{split}_IMAGES_tiny.hdf5", "w") as file:
            file.attrs["captions_per_image"] = 3
            file["images"] = random.integers(0, 256, (photos, 3, 64, 64), dtype=np.uint8)
    (folder / "WORDMAP_tiny.json").write_text(json.dumps(WORD_MAP))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_files(folder / "data")
    shutil.copytree(folder / "data", folder / "data of two")  # each writes a feature cache of its own
    return folder


def train_and_listen(config):
    """:return: the captions of each validation"""
    heard, score = [], metrics.score

    def listen(references, hypotheses, *rest):
        heard.append((references, hypotheses))
        return score(references, hypotheses, *rest)

    metrics.score = listen
    try:
        train.main(config)
    finally:
        metrics.score = score
    return heard


def curve(folder, name):
    return np.array([event.value for event in EventAccumulator(str(folder)).Reload().Scalars(name)])


def compare(two_processes, folder, name, **settings):
    """Train in one process and in two; :return: config of both, and the first's losses and captions"""
    configs = [
        train.Config(**{**TINY, **settings}, data_folder=str(folder / data), run_folder=str(folder / f"{name}_{i}"))
        for i, data in enumerate(("data", "data of two"))
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train_and_listen(configs[0])
    torch.set_num_threads(threads)
    first, second = two_processes(train_and_listen, configs[1])
    assert second == []  # one scores for both
    losses = [curve(config.run_folder, "train/cross_entropy") for config in configs]
    assert np.abs(losses[0] - losses[1]).max() < 1e-5
    assert len(losses[0]) == len(losses[1])
    accuracies = [curve(config.run_folder, "train/top5_accuracy") for config in configs]
    assert np.abs(accuracies[0] - accuracies[1]).max() < 1e-5
    assert first == alone
    assert len(list(Path(configs[1].run_folder).glob("events*"))) == 1  # one writes
    return configs, losses[0], alone


def test_two_processes_train_as_one_does_for_50_steps_and_caption_the_same(two_processes, folder):
    # 81 captions in batches of 8: in the last step of each epoch the second process has nothing.
    configs, losses, captions = compare(two_processes, folder, "frozen", epochs=5)
    assert len(losses) == 55 and losses[-5:].mean() < losses[:5].mean() - 0.1
    assert len(captions) == 5 and len(captions[-1][1]) == 5
    one, two = (load_checkpoint(f"{config.run_folder}/last.pth") for config in configs)
    assert list(one["decoder"]) == list(two["decoder"])  # not as DistributedDataParallel names them
    one["decoder"].pop("attention.full_att.bias")  # a softmax does not feel it: its gradient is but rounding
    for name, weight in one["decoder"].items():
        torch.testing.assert_close(two["decoder"][name], weight, atol=1e-4, rtol=1e-4)

    # The features that two computed are those that one did.
    caches = [sorted(Path(config.data_folder).glob("*_FEATURES_*")) for config in configs]
    assert [len(paths) for paths in caches] == [2, 2]
    for paths in zip(*caches, strict=True):
        features = [h5py.File(path)["features"][:] for path in paths]
        np.testing.assert_array_equal(*features)

    # What two began, one continues.
    config = train.Config(**TINY, data_folder=str(folder / "data"), resume=f"{configs[1].run_folder}/last.pth")
    config.epochs, config.run_folder = 6, str(folder / "gone on")
    train.main(config)
    assert load_checkpoint(folder / "gone on/last.pth")["progress"]["step"] == 66


def test_the_same_with_accumulation_hard_attention_and_an_encoder_that_joins_in(two_processes, folder):
    compare(
        two_processes, folder, "tuned", epochs=2, decoder="hard", hard_expected_share=1.0, fine_tune_encoder=True,
        fine_tune_from_step=2, encoder_lr=1e-3, accumulate=2, image_major=True, batch_size=4, label_smoothing=0.1,
        clip="norm", clip_at=0.5, cache_features=False,
    )  # fmt: skip


@pytest.mark.parametrize("average", [{"ema_decay": 0.9}, {"average_last": 2}])
def test_two_processes_average_the_weights_of_an_encoder_and_a_decoder_as_one_does(two_processes, folder, average):
    name = next(iter(average))
    configs, *_ = compare(two_processes, folder, name, epochs=3, fine_tune_encoder=True, encoder_lr=1e-5, **average)
    one, two = (load_checkpoint(f"{config.run_folder}/best.pth") for config in configs)
    last = load_checkpoint(f"{configs[1].run_folder}/last.pth")
    assert not torch.equal(two["decoder"]["fc.bias"], last["decoder"]["fc.bias"])
    for part in ("encoder", "decoder"):
        one[part].pop("attention.full_att.bias", None)  # a softmax does not feel it: its gradient is but rounding
        for name, weight in one[part].items():
            torch.testing.assert_close(two[part][name], weight, atol=1e-4, rtol=1e-4)


def each_decoder():
    done = []
    with distributed.join_processes("cpu"):
        for kind in DECODERS:
            torch.manual_seed(5)
            encoder = Encoder("squeezenet1_1", encoded_image_size=3)
            encoder.fine_tune(kind == "soft")
            config = {**vars(train.Config(decoder=kind, tie_weights=kind == "spatial")), "encoded_image_size": 3}
            model = distributed.wrap(EncoderDecoder(encoder, build_decoder(config, 10, encoder.encoder_dim)), True)
            for _ in range(2):  # a parameter without gradient would make the second pass fail
                lengths = torch.tensor([5, 4]) - distributed.get_rank()
                decoded = model(torch.rand(2, 3, 64, 64), torch.randint(1, 7, (2, 6)), lengths)
                CaptionLoss()(decoded, distributed.share_of_batch(lengths))[0].backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            done.append(sum(gradient.double().abs().sum().item() for gradient in gradients))
    return done


def test_every_decoder_gives_every_process_the_same_gradients(two_processes):
    first, second = two_processes(each_decoder)
    assert len(first) == len(DECODERS) and first == second and all(first)


def reinforce():
    """REINFORCE on 5 captions of one word, of which the first process has 3; :return: gradient, baseline, loss"""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 7, generator=generator)
    alphas = torch.rand(5, 1, 4, generator=generator).softmax(dim=2)
    log_probs = torch.randn(5, generator=generator)
    with distributed.join_processes("cpu"):
        rows = distributed.own_share(range(5))
        log_probs.requires_grad_()
        decoded = Decoded(
            scores[rows], torch.tensor(rows), alphas[rows], [len(rows)], torch.arange(len(rows)), log_probs[rows]
        )
        loss_function = CaptionLoss()
        share = distributed.share_of_batch(torch.full((len(rows),), 2))
        for _ in range(2):  # the second time with a baseline
            log_probs.grad = None
            loss, _ = loss_function(decoded, share)
            loss.backward(retain_graph=True)
        gradient = distributed.average(log_probs.grad)
        return gradient.tolist(), loss_function.baseline.item(), distributed.average(loss.detach()).item()


def test_reinforce_and_its_baseline_are_those_of_the_whole_batch(two_processes):
    first, second = two_processes(reinforce)
    alone = reinforce()
    assert first == second
    for found, expected in zip(first, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def accumulate():
    """:return: this process's gradient after a pass that keeps it, and after one that exchanges it; a buffer"""
    with distributed.join_processes("cpu"):
        model = distributed.wrap(torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1, bias=False)), True)
        gradients = []
        for now in (False, True):
            with distributed.exchange(model, now):
                model(torch.tensor([[1.0], [-1.0]])).mul(
                    torch.tensor([[distributed.get_rank() + 1.0], [0.0]])
                ).sum().backward()
            gradients.append(model.module[1].weight.grad.item())
        model.module[0].running_mean.fill_(distributed.get_rank() + 5)
        distributed.copy_buffers(model)
        return gradients, model.module[0].running_mean.item()


def test_gradients_are_exchanged_once_for_a_step_and_statistics_before_validation(two_processes):
    (first, buffer), (second, other_buffer) = two_processes(accumulate)
    assert first == pytest.approx([1, 3], rel=1e-4)  # own; own and own, other and other: (1 + 1 + 2 + 2) / 2
    assert second == pytest.approx([2, 3], rel=1e-4)
    assert buffer == other_buffer == 5


def talk():
    with distributed.join_processes("cpu"):
        print("words")
        distributed.seed_own(1)
        has_shares = [distributed.share_of_batch(torch.tensor([3, 3]), distributed.is_first() or n > 0) for n in (0, 1)]
        return distributed.gather(torch.rand(1).item()), has_shares, distributed.hide_bar()


def test_processes_draw_different_numbers_and_what_stands_in_has_no_share(two_processes):
    (first, shares, bar), (second, other_shares, other_bar) = two_processes(talk)
    assert first == second and first[0] != first[1]
    assert shares == [(2, 2), (1, 1)] and other_shares == [(0, 0), (1, 1)]
    assert bar is None and other_bar is True


def test_only_the_last_batch_can_leave_a_process_without_a_share():
    for bucket in (False, True):
        orders = [BatchOrder(np.arange(33), 8, bucket, rank=rank, world_size=2) for rank in range(2)]
        for order, expected in zip(orders, ([True] * 5, [True] * 4 + [False]), strict=True):
            assert [order.has_share(i) for i in range(len(order))] == expected
        counted = [row for order in orders for i, batch in enumerate(order) if order.has_share(i) for row in batch]
        assert sorted(counted) == list(range(33))


def test_one_process_alone_is_left_as_it_is():
    model = torch.nn.Linear(1, 1)
    assert distributed.wrap(model, True) is model
    assert distributed.share_of_batch(torch.tensor([3])) == (1, 1)
    assert distributed.own_share([1, 2, 3]) == distributed.join_shares([1, 2, 3]) == [1, 2, 3]
    assert distributed.gather(5) == distributed.gather_at_first(5) == [5] and distributed.from_first(5) == 5


def test_each_process_takes_the_gpu_of_its_number_and_no_more_processes_than_gpus_are_let_in(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.choose_own_device("auto") == torch.device("cuda", 1) and chosen == [1]
    assert distributed.choose_own_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="^nproc_per_node: more processes than the 2 GPUs"):
        distributed.choose_own_device("cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train(two_processes, folder):
    config = train.Config(**TINY, data_folder=str(folder / "data"), run_folder=str(folder / "gpus"), epochs=2)
    config.device = "auto"
    two_processes(train_and_listen, config)
    assert np.isfinite(curve(folder / "gpus", "train/cross_entropy")).all()
    assert load_checkpoint(folder / "gpus/last.pth")["progress"]["step"] == 22


# Faults

SETTINGS = {**TINY, "dropout": 0.5, "epochs": 2, "stop_patience": 100}


def train_until(config, stop_at):
    """Train; the second process gets a signal within a step; :return: exit code and errors"""
    clip_gradients, steps = train.clip_gradients, []

    def with_signal(*args):
        if len(steps) == stop_at and not distributed.is_first():
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(args)
        return clip_gradients(*args)

    train.clip_gradients = with_signal
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            run_script(lambda _: train.main(config), train.Config, [])
    except SystemExit as end:
        return end.code, errors.getvalue()
    finally:
        train.clip_gradients = clip_gradients
    return 0, errors.getvalue()


def test_a_signal_to_one_process_saves_and_ends_all_and_they_go_on_as_if_it_had_not_been(two_processes, folder):
    config = train.Config(**SETTINGS, data_folder=str(folder / "data"), run_folder=str(folder / "left alone"))
    assert two_processes(train_until, config, None) == [(0, ""), (0, "")]
    config.run_folder = str(folder / "stopped")
    results = two_processes(train_until, config, 15)
    lines = "".join(errors for _, errors in results).splitlines()
    assert len(lines) == 1 and lines[0].startswith("stopped by SIGTERM at step 16; continue with --resume ")
    assert [code for code, _ in results] == [143, 143]
    config.resume = "auto"
    assert two_processes(train_until, config, None) == [(0, ""), (0, "")]
    expected, found = (load_checkpoint(folder / name / "last.pth") for name in ("left alone", "stopped"))
    assert found["progress"] == expected["progress"] and found["progress"]["step"] == 22
    one, other = (state["cpu"] for state in found["random_states"])
    assert not torch.equal(one, other)  # each draws its own dropout
    for name, weight in expected["decoder"].items():
        assert torch.equal(found["decoder"][name], weight)


def listen_to_script(*arguments):
    """:return: exit code and errors of train.py"""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run_script(train.main, train.Config, list(arguments))
        except SystemExit as end:
            return end.code, errors.getvalue()
    return 0, errors.getvalue()


def second_fails(config):
    with distributed.join_processes("cpu"):
        if not distributed.is_first():
            raise UserError("disk: full")
        distributed.gather("waiting for the other")


def listen_to_failure():
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run_script(second_fails, train.Config, [])
        except SystemExit as end:
            return end.code, errors.getvalue()


@pytest.mark.parametrize("arguments", [["--epohcs", "3"], ["--epochs", "-1"], ["--data_folder", "nowhere"]])
def test_what_all_processes_complain_of_is_said_once(two_processes, arguments):
    results = two_processes(listen_to_script, *arguments)
    assert [code for code, _ in results] == [2, 2]
    lines = "".join(errors for _, errors in results).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_what_one_process_complains_of_ends_the_others_quietly(two_processes):
    assert two_processes(listen_to_failure) == [(2, ""), (2, "error: disk: full\n")]


def test_a_killed_process_ends_the_others_within_a_minute_with_a_line_and_the_run_resumes(folder):
    settings = {**TINY, "data_folder": folder / "data", "epochs": 10000, "stop_patience": 10000}
    options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    run_folder = folder / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *options, "--run_folder", run_folder],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        deadline = time.time() + 300
        while not (run_folder / "last.pth").exists() and time.time() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
        os.kill(
            next(child for child, environment in environments.items() if b"\0RANK=1\0" in environment), signal.SIGKILL
        )
        killed_at = time.time()
        _, errors = torchrun.communicate(timeout=60)
    finally:
        torchrun.kill()
    assert torchrun.returncode != 0 and time.time() - killed_at < 60
    # The survivor says one thing. torchrun stops it with SIGTERM, which may come before it has noticed by itself.
    told = [line for line in errors.splitlines() if line.startswith(("error: ", "stopped by SIGTERM"))]
    assert len(told) == 1
    assert told[0].startswith("stopped") or "another process of this run has ended" in told[0]

    epoch = load_checkpoint(run_folder / "last.pth")["progress"]["epoch"]
    config = train.Config(**{**settings, "data_folder": str(folder / "data"), "epochs": epoch + 1})
    config.resume = str(run_folder / "last.pth")
    train.main(config)
    assert load_checkpoint(run_folder / "last.pth")["progress"]["epoch"] == epoch + 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "set by another launcher, without RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR; start"),
        (
            {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "set by another launcher, without LOCAL_RANK; start",
        ),
        (
            {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "'two' found, a whole number expected; start",
        ),
    ],
)
def test_the_world_size_of_another_launcher_is_one_line(monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^WORLD_SIZE: {message}"):
        distributed.join_processes("cpu").__enter__()
