"""Pickled modules give their tensors, and nothing that a pickle asks for is run."""

import builtins
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import WORD_MAP
from tutorial_models import make_models, save

from captioning.storage.pickled_modules import load_pickled_modules, read_tensors
from captioning.storage.unpickling import Inert, StoredTensor
from utils import UserError


class Evil:
    """Its pickle is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evils(marker):
    """:return: dict of a function's name in pickles -> an object whose pickle calls it, to write the file `marker`"""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Evil(os.system, f"touch {marker}"),
        "builtins.exec": Evil(builtins.exec, code),
        "builtins.eval": Evil(builtins.eval, code),
        "commands.Popen": Evil(subprocess.Popen, [sys.executable, "-c", code]),
    }


@pytest.fixture(scope="module")
def models():
    return make_models(WORD_MAP)


@pytest.mark.parametrize("name", ["posix.system", "builtins.exec", "builtins.eval", "commands.Popen"])
@pytest.mark.parametrize("format", ["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "within a module", "in the optimizer's state"])
def test_a_pickle_that_carries_code_is_refused_and_nothing_of_it_runs(models, tmp_path, name, format, place):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth.tar"
    evil = evils(marker)[name]
    encoder, decoder = torch.nn.Identity(), models[1]
    extra = {"epoch": evil} if place == "beside" else {}
    if place == "within a module":
        encoder.note = {"deep": [evil]}
    elif place == "in the optimizer's state":
        extra["encoder_optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        extra["encoder_optimizer"].param_groups[0]["note"] = evil
    save(path, encoder, decoder, format, **extra)
    with pytest.raises(UserError, match=f"evil.pth.tar: asks for '{name}', which no pickled captioning model needs"):
        load_pickled_modules(path, ("encoder", "decoder"))
    assert not marker.exists()


def test_the_attack_is_real(tmp_path):
    """What the test above refuses does harm where it is not refused."""
    save(
        tmp_path / "evil.pth.tar", None, torch.nn.Linear(1, 1), "zip", epoch=evils(tmp_path / "marker")["posix.system"]
    )
    torch.load(tmp_path / "evil.pth.tar", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", range(5))
def test_code_in_any_of_the_legacy_formats_pickles_is_refused(tmp_path, place):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth.tar"
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts[place] = evils(marker)["builtins.exec"]
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(UserError, match="asks for 'builtins.exec'"):
        load_pickled_modules(path, ("encoder",))
    assert not marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"(S'touch MARKER'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MARKER'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",  # STACK_GLOBAL
        b"\x80\x02ctorch.serialization\nload\n(S'MARKER'\ntR.",
        b"\x80\x02ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"\x80\x02cmodels\nEncoder.__init__.__globals__\n.",
        b"\x80\x02c__builtin__\ngetattr\n(cmodels\nEncoder\nS'__subclasses__'\ntR.",
        b"\x80\x02cmodels\nEncoder\n}S'__class__'\ncos\nsystem\nsb.",
    ],
)
def test_every_way_of_naming_a_function_is_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(program.replace(b"MARKER", b"marker"))
    with pytest.raises(UserError, match="evil.pth: asks for"):
        load_pickled_modules("evil.pth", ("encoder",))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_a_file_that_was_cut_off_or_changed_is_refused(models, tmp_path, format):
    path = tmp_path / "broken.pth.tar"
    save(path, torch.nn.Identity(), models[1], format)
    whole = path.read_bytes()
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="broken.pth.tar: cannot be read"):
            load_pickled_modules(path, ("decoder",))
    for place in range(0, 2000, 7):  # in the legacy format nothing tells a changed number, in the zip a CRC-32 does
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            _, tensors = load_pickled_modules(path, ("decoder",))
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors["decoder"].values())


class SixNumbers:
    """A storage that says how long it is."""

    dtype, key, count = torch.float32, "0", 6


@pytest.mark.parametrize(
    "offset, size, stride",
    [(1, (2, 3), (3, 1)), (0, (7,), (1,)), (0, (2, 3), (3, 2)), (-1, (2,), (1,)), (0, (3,), (-1,)), (0, (10**9,), (0,)),
     (0, (2,), (1, 1)), (0, (2.0,), (1,)), (0, (-1,), (1,)), (0, (True,), (1,)), (6, (), ())],
)  # fmt: skip
def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(offset, size, stride):
    with pytest.raises(ValueError):
        StoredTensor(SixNumbers, offset, size, stride)


@pytest.mark.parametrize("size, stride", [((2,), (0,)), ((2, 2), (1, 1)), ((2, 3), (1, 1)), ((3, 2), (1, 2))])
def test_a_tensor_that_has_a_number_of_its_storage_twice_is_refused(size, stride):
    with pytest.raises(ValueError, match="repeats"):
        StoredTensor(SixNumbers, 0, size, stride)


@pytest.mark.parametrize("size, stride", [((2, 2), (1, 2)), ((3,), (2,)), ((0, 9), (9, 1)), ((1, 3), (0, 1)), ((), ())])
def test_tensors_are_cut_out_of_their_storage_as_they_were_stored(size, stride):
    numbers = torch.arange(6.0)
    module = Inert()
    module.state = {"_parameters": {"w": StoredTensor(SixNumbers, 1, size, stride)}, "_buffers": {}, "_modules": {}}
    found = read_tensors(module, lambda storage: numbers.numpy().tobytes(), most_bytes=24)["w"]
    assert torch.equal(found, numbers.as_strided(size, stride, 1))


def modules_within_modules(levels):
    outer = torch.nn.Linear(1, 1)
    for _ in range(levels):
        outer = torch.nn.Sequential(outer)
    return outer


def one_tensor_often():
    """A module of 20,000 parameters that are one."""
    module = torch.nn.Identity()
    module.weight = torch.nn.Parameter(torch.ones(1000))
    module._parameters.update({f"w{i}": module.weight for i in range(20_000)})
    return module


@pytest.mark.parametrize(
    "module, says",
    [(modules_within_modules(100), "nested more than 32 deep"), (one_tensor_often(), "more numbers than the file")],
    ids=["nested", "one tensor often"],
)
@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_a_small_file_does_not_become_a_large_model(tmp_path, module, says, format):
    save(tmp_path / "a.pth.tar", torch.nn.Identity(), module, format)
    with pytest.raises(UserError, match=f"a.pth.tar: cannot be read .*{says}"):
        load_pickled_modules(tmp_path / "a.pth.tar", ("decoder",))


@pytest.mark.parametrize("levels", [40, 1000])
def test_a_key_that_would_take_for_ever_to_hash_is_refused(tmp_path, levels):
    opcodes = b"}" + b")" + b"2\x86" * levels + b"Ns."  # an empty dict and tuple; each pair holds the last one twice
    (tmp_path / "a.pth").write_bytes(b"\x80\x02" + opcodes)
    with pytest.raises(UserError, match="a.pth: cannot be read .*a tuple found where a name or a number is expected"):
        load_pickled_modules(tmp_path / "a.pth", ("decoder",))
