"""Checkpoints say which format they have, and files of tensors hold nothing but what was promised."""

import time
import zipfile
from collections import OrderedDict

import pytest
import torch

from captioning.storage.tensors import check_weights, load_checkpoint, load_tensors, save_checkpoint
from utils import UserError


@pytest.fixture
def content():
    """What every checkpoint has."""
    weights = {"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.zeros(3)}}
    return {"config": {}, "word_map": {"a": 0}, "image_size": 8, "progress": {"epoch": 3}} | weights


def test_a_checkpoint_says_which_format_it_has(content, tmp_path):
    save_checkpoint(content, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["format"] == 1
    assert load_checkpoint(tmp_path / "a.pth")["progress"] == {"epoch": 3}


def test_a_checkpoint_from_before_there_were_formats_is_read(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["progress"] == {"epoch": 3}


@pytest.mark.parametrize("version", [2, 0, "1", 1.0, None, True])
def test_a_checkpoint_of_an_unknown_format_is_refused(content, tmp_path, version):
    torch.save(content | {"format": version}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth: format .* found, 1 to 1 expected"):
        load_checkpoint(tmp_path / "a.pth")


def test_what_a_file_holds_comes_back_as_plain_dicts_lists_and_tensors(tmp_path):
    state = OrderedDict(w=torch.arange(6.0).view(2, 3).T, half=torch.ones(2).half())
    state.keys, state.get = "hidden", 5
    content = {"state": state, "rest": [1, 2.5, "a", None, True, (3, 4)], 7: {"deep": torch.Size([2])}}
    torch.save(content, tmp_path / "a.pth")
    found = load_tensors(tmp_path / "a.pth")
    assert found["rest"] == content["rest"] and found[7] == {"deep": (2,)}
    assert type(found["state"]) is dict and not hasattr(found["state"], "__dict__")
    assert torch.equal(found["state"]["w"], state["w"]) and found["state"]["half"].dtype == torch.float16


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_old_and_new_pytorch_are_read(tmp_path, new_format):
    torch.save({"w": torch.nn.Parameter(torch.ones(3))}, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    assert torch.equal(load_tensors(tmp_path / "a.pth")["w"], torch.ones(3))


def doubled(levels, kind=list):
    """A list that holds another twice, that one the next one twice, and so on: small, but without an end."""
    value = kind()
    for _ in range(levels):
        value = kind((value, value))
    return value


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def shared(names):
    tensor = torch.ones(10_000)
    return {f"w{i}": tensor for i in range(names)}


HOSTILE = {
    "lists doubled": (lambda: doubled(40), "more values than the file"),
    "lists doubled within 30 levels": (lambda: doubled(30), "more values than the file"),
    "tuples doubled": (lambda: doubled(30, tuple), "more values than the file"),
    "nested 300 deep": (lambda: nested(300), "more than 32 levels"),
    "a number of hundreds of digits": (lambda: 10**300, "a number of 997 bits"),
    "numbers that are repeated": (lambda: torch.zeros(1).expand(10**10), "repeats the numbers of its storage"),
    "numbers that overlap": (lambda: torch.zeros(9).as_strided((2, 3), (1, 1)), "repeats the numbers of its storage"),
    "one tensor under many names": (lambda: shared(1000), "more numbers than the file"),
    "a nested tensor": (lambda: torch.nested.nested_tensor([torch.ones(2)]), "asks for torch.*nested"),
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), "asks for torch.*sparse"),
    "a tensor without numbers": (lambda: torch.ones(2, device="meta"), "asks for torch.*meta"),
    "a tuple as a key": (lambda: {(1, 2): 3}, "a tuple found where a name or a number is expected"),
    "a set of tuples": (lambda: {(1, 2)}, "a tuple found where a name or a number is expected"),
    "a set": (lambda: {1}, "a set found in it"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("new_format", [True, False])
def test_a_small_file_that_would_take_for_ever_or_fill_the_memory_is_refused(tmp_path, what, new_format):
    make, says = HOSTILE[what]
    torch.save({"x": make()}, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    begin = time.process_time()
    with pytest.raises(UserError, match=f"a.pth: .*{says}") as raised:
        load_tensors(tmp_path / "a.pth")
    assert len(str(raised.value)) < 500 and time.process_time() - begin < 20


def test_a_file_with_two_records_of_one_name_is_refused(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"another pickle")
    with pytest.raises(UserError, match="a.pth: .*records of the same name"):
        load_tensors(tmp_path / "a.pth")


def test_variances_below_0_are_refused():
    module = torch.nn.BatchNorm2d(2)
    state = {**module.state_dict(), "running_var": torch.tensor([1.0, -0.1])}
    with pytest.raises(UserError, match="^encoder: 'running_var' has variances below 0"):
        check_weights(module, state, "encoder")
