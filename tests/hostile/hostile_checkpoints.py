"""Broken and hostile checkpoints: ours, a network's weights, and the tutorial's pickled modules."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import torch
from hostile_case import ANY, Case, any_of, cut, flip, refused, with_json, write


def with_checkpoint(edit):
    """Change what is in a checkpoint: `edit` changes it in place, or returns what takes its place."""

    def change(path):
        content = torch.load(path, weights_only=True)
        changed = edit(content)
        torch.save(content if changed is None else changed, path)

    return change


def config(**values):
    return with_checkpoint(lambda content: content["config"].update(values))


def decoder(key, tensor):
    return with_checkpoint(lambda content: content["decoder"].update({key: tensor(content["decoder"][key])}))


def with_zip(edit):
    """Write a zip file again, entry by entry: `edit` gives for a name and its bytes those to write, or None."""

    def change(path, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", compression) as new:
            for name, content in entries.items():
                content = edit(name, content)
                if content is not None:
                    new.writestr(name, content)

    return change


class Call:
    """Its pickle is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(function, argument, legacy=False, nested=False):
    """A checkpoint whose reading would make a file called `marker` beside it."""

    def change(path):
        call = Call(function, argument.format(path.with_name("marker")))
        content = torch.load(path, weights_only=True)
        content["config" if nested else "evil"] = {"encoder": [call]} if nested else call
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)

    return change


def claims(count, legacy=False):
    """A checkpoint with a tensor that says it has `count` numbers, where there are four."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            values = ("storage", torch.FloatStorage, "0", "cpu", count)
            return values + (None,) * legacy if thing == "its numbers" else None

    def change(path):
        tensor = Call(torch._utils._rebuild_tensor_v2, "its numbers", 0, (count,), (1,), False, {})
        file = io.BytesIO()
        Pickler(file, 2).dump({"encoder": {"weight": tensor}, "decoder": {}, "config": {}})
        if legacy:
            heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
            parts = [*(pickle.dumps(part, 2) for part in heads), file.getvalue(), pickle.dumps(["0"], 2)]
            path.write_bytes(b"".join(parts) + struct.pack("<q", count) + bytes(16))
            return
        with zipfile.ZipFile(path, "w") as new:
            new.writestr("x/data.pkl", file.getvalue())
            new.writestr("x/version", b"3\n")
            new.writestr("x/data/0", bytes(16))

    return change


def endless_key(levels, opcode):
    """Put a dict there with one key: tuples within tuples, which whoever hashes it walks through."""
    program = b"\x80\x02})" + opcode * levels + b"Ns."

    def change(path):
        if zipfile.is_zipfile(path):
            with_zip(lambda name, content: program if name.endswith("data.pkl") else content)(path)
        else:
            heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
            path.write_bytes(b"".join(pickle.dumps(part, 2) for part in heads) + program + pickle.dumps([], 2))

    return change


def doubled_list(levels):
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


def hiding_methods(state):
    """:return: the same as an OrderedDict, whose attributes are in the way of its methods"""
    state = OrderedDict(state)
    vars(state).update(get=5, keys=5)
    return state


SMALL_BUT_ENDLESS = {
    "has a key of tuples that are doubled 40 times": endless_key(40, b"2\x86"),
    "has a key of tuples nested 200,000 deep": endless_key(200_000, b"\x85"),
}
EVIL = {
    "calls os.system": evil(os.system, "touch {}"),
    "calls exec": evil(exec, "open('{}', 'w')"),
    "calls eval within its config": evil(eval, "open('{}', 'w')", nested=True),
    "calls os.system, in the old format": evil(os.system, "touch {}", legacy=True),
    "calls exec within its config, in the old format": evil(exec, "open('{}', 'w')", legacy=True, nested=True),
    "is a pickle that calls os.system": lambda path: path.write_bytes(
        pickle.dumps(Call(os.system, f"touch {path.with_name('marker')}"))),
}  # fmt: skip
CHECKPOINTS = [
    *any_of("caption", "model.pth"),
    *refused("caption", "model.pth", {
        "is a text": write("weights"),
        "is JSON": write('{"config": {}}'),
        "lacks its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "is a zip of something else": with_zip(lambda name, content: b"x" if name.endswith("version") else None),
        "lacks a record of numbers": with_zip(lambda name, content: None if name.endswith("data/7") else content),
        "lacks its pickle": with_zip(lambda name, content: None if name.endswith("data.pkl") else content),
        "has half a record of numbers": with_zip(
            lambda name, content: content[: len(content) // 2] if name.endswith("data/7") else content),
        "is compressed": lambda path: with_zip(lambda name, content: content)(path, zipfile.ZIP_DEFLATED),
        "says that it has terabytes": claims(10**12),
        "says that it has exabytes": claims(10**18),
        "says that it has terabytes, in the old format": claims(10**12, legacy=True),
        "says that it has numbers less than none": claims(-1),
        "is a tensor": with_checkpoint(lambda content: content["decoder"]["fc.bias"]),
        "is a list": with_checkpoint(lambda content: [content]),
        "is another network's state dict": with_checkpoint(lambda content: content["encoder"]),
        "has no word map": with_checkpoint(lambda content: content.pop("word_map") and None),
        "has a config that is a list": with_checkpoint(lambda content: content.update(config=["resnet101"])),
        "has a config without an encoder": with_checkpoint(lambda content: content["config"].pop("encoder") and None),
        "has a config with an unknown encoder": config(encoder="resnet1000"),
        "has a config with an encoder that is a list": config(encoder=["resnet18"]),
        "has a config with a decoder that is a number": config(decoder=5),
        "has a config with a decoder that is unknown": config(decoder="oracle"),
        "has a config with another encoder": config(encoder="resnet18"),
        "has a config with another decoder": config(decoder="adaptive"),
        "has a config with a grid of a million": config(encoded_image_size=10**6),
        "has a config with a grid of 2.5": config(encoded_image_size=2.5),
        "has a config with a million million of numbers": config(decoder_dim=10**12),
        "has a config with embeddings of 90,000": config(embed_dim=90_000),
        "has a config with embeddings of 'many'": config(embed_dim="many"),
        "has a config with embeddings of true": config(embed_dim=True),
        "has a config with a thousand million layers": config(decoder_layers=10**9),
        "has a config with an encoder_dim of -1": config(encoder_dim=-1),
        "has a config with a dropout that is a text": config(dropout="half"),
        "has a config with a dropout that is no number": config(dropout=float("nan")),
        "has a word map that is a list": with_checkpoint(lambda content: content.update(word_map=["a"])),
        "has a word map without <end>": with_checkpoint(
            lambda content: content["word_map"].update(x=content["word_map"].pop("<end>"))),
        "has a word map with a word too much": with_checkpoint(
            lambda content: content["word_map"].update(bird=len(content["word_map"]))),
        "has a word map of numbers": with_checkpoint(
            lambda content: content.update(word_map={i: i for i in content["word_map"].values()})),
        "has photos of a million pixels": with_checkpoint(lambda content: content.update(image_size=10**6)),
        "has photos of no pixels": with_checkpoint(lambda content: content.update(image_size=0)),
        "has photos of 'large'": with_checkpoint(lambda content: content.update(image_size="large")),
        "has weights of another shape": decoder("fc.weight", lambda tensor: tensor[:, 1:]),
        "has weights that are whole numbers": decoder("fc.weight", lambda tensor: tensor.long()),
        "has weights of double precision": decoder("fc.weight", lambda tensor: tensor.double()),
        "has weights that are no numbers": decoder("fc.weight", lambda tensor: tensor * float("nan")),
        "has weights that are infinite": decoder("attention.full_att.weight", lambda tensor: tensor / 0),
        "has weights that are texts": decoder("fc.weight", lambda tensor: "0.5"),
        "has weights that are sparse": decoder("fc.weight", lambda tensor: tensor.to_sparse()),
        "has weights without numbers": decoder("fc.weight", lambda tensor: tensor.to("meta")),
        "has a weight too few": with_checkpoint(lambda content: content["decoder"].popitem() and None),
        "has a weight too much": with_checkpoint(lambda content: content["encoder"].update(more=torch.ones(1))),
        "has a weight whose name is a number": with_checkpoint(
            lambda content: content["encoder"].update({7: torch.ones(1)})),
        "has a decoder that is a tensor": with_checkpoint(lambda content: content.update(decoder=torch.ones(3))),
        "has a progress that is a text": with_checkpoint(lambda content: content.update(progress="far")),
        "has an epoch of hundreds of digits": with_checkpoint(
            lambda content: content["progress"].update(epoch=10**300)),
        "is of a later format": with_checkpoint(lambda content: content.update(format=2)),
        "has a list that is doubled 40 times": config(encoder=doubled_list(40)),
        "has weights that are one number, repeated": decoder(
            "fc.weight", lambda tensor: torch.zeros(1).expand(tensor.shape)),
        "has weights of 40 GB that are one number": with_checkpoint(
            lambda content: content["encoder"].update(more=torch.zeros(1).expand(10**10))),
        "has a thousand names for one tensor": with_checkpoint(
            lambda content: content["encoder"].update(dict.fromkeys(map(str, range(1000)), torch.zeros(10**5)))),
        "has weights that are nested": decoder("fc.weight", lambda tensor: torch.nested.nested_tensor([tensor])),
        **SMALL_BUT_ENDLESS,
    }),
    Case("caption", "model.pth", "has weights whose attributes hide the methods of their dict", with_checkpoint(
        lambda content: content.update(decoder=hiding_methods(content["decoder"]))), "same"),
    *[Case("caption", "model.pth", f"has a changed bit at {place:.3f} of its length", flip(place), "same")
      for place in np.random.default_rng(1).random(8).round(3).tolist()],
    *[Case("caption", "model.pth", f"has a changed bit in byte {place}", flip(place), "same")
      for place in (0, 3, 8, 27, 64, 100, 333, 1000)],
    *[case for run in ("caption", "resume") for case in refused(run, "model.pth", EVIL)],
    *[case for run in ("eval", "view") for case in refused(run, "model.pth", dict([*EVIL.items()][1:4]))],
    Case("resume", "model.pth", "is cut off in the middle", cut(0.5)),
    *refused("resume", "model.pth", {
        "is of other words": with_checkpoint(lambda content: content["word_map"].update(x=99)),
        "is of another decoder": config(decoder="hard"),
        "has no optimizer": with_checkpoint(lambda content: content.pop("optimizer") and None),
        "has an optimizer that is a list": with_checkpoint(lambda content: content.update(optimizer=[1])),
        "has an optimizer without groups": with_checkpoint(lambda content: content["optimizer"].clear()),
        "has an optimizer with moments of another shape": with_checkpoint(
            lambda content: content["optimizer"]["state"][0].update(exp_avg=torch.ones(2, 2))),
        "has an optimizer with moments that are texts": with_checkpoint(
            lambda content: content["optimizer"]["state"][0].update(exp_avg="none")),
        "has a learning rate that is a text": with_checkpoint(
            lambda content: content["optimizer"]["param_groups"][0].update(lr="fast")),
        "has a schedule that is a number": with_checkpoint(lambda content: content.update(schedule=3)),
        "has a progress of half a step": with_checkpoint(lambda content: content["progress"].update(step=0.5)),
        "has readings that are texts": with_checkpoint(lambda content: content.update(readings={"losses": ["low"]})),
        "has a random state that is a text": with_checkpoint(lambda content: content.update(random_states="4")),
        "has a random state of another length": with_checkpoint(
            lambda content: content.update(random_states=[{"cpu": torch.ones(3, dtype=torch.uint8), "gpu": None}])),
        "has weights that are no numbers": decoder("fc.weight", lambda tensor: tensor * float("nan")),
        "has weights of another shape": decoder("fc.weight", lambda tensor: tensor[:, 1:]),
    }, says="resume"),
    *refused("resume", "model.pth", {
        "has a list that is doubled 40 times": config(encoder=doubled_list(40)),
        "has moments that are one number, repeated": with_checkpoint(lambda content: [
            moments.update(exp_avg=torch.zeros(1).expand(moments["exp_avg"].shape))
            for moments in content["optimizer"]["state"].values()] and None),
    }),
    *any_of("again", "run/last.pth", but=("is missing", "is a link to itself")),
    *refused("again", "run/last.pth", {
        "has curves that are a text": with_checkpoint(lambda content: content.update(curves="red")),
        "has curves of a negative size": with_checkpoint(lambda content: content.update(curves={"x": -1})),
    }),
    *refused("again", "run/starts.json", {
        "is empty": write(""),
        "is an object": write("{}"),
        "is a number": write("3"),
        "is a link to itself": ANY["is a link to itself"],
    }),
    *any_of("train", "weights.pth", but=("is a device without an end", "is all zeros")),
    *refused("train", "weights.pth", {
        **EVIL,
        **SMALL_BUT_ENDLESS,
        "is of another network": with_checkpoint(lambda content: {"conv1.weight": torch.ones(64, 3, 7, 7)}),
        "has a weight that is a text": with_checkpoint(lambda content: content.update({"conv1.0.weight": "x"})),
        "has a weight of another shape": with_checkpoint(
            lambda content: content.update({"conv1.0.weight": torch.ones(3)})),
        "has a weight that is no number": with_checkpoint(
            lambda content: content.update({"conv1.0.weight": content["conv1.0.weight"] * float("nan")})),
    }),
]  # fmt: skip


# The tutorial's checkpoints


def small_tutorial(**content):
    """A pickled dict that is small; what is missing is said before anything is computed."""
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


def evil_tutorial(function, argument, zip_format=False):
    def change(path):
        call = Call(function, argument.format(path.with_name("marker")))
        content = {"epoch": 1, "decoder_optimizer": {"state": [call]}}
        torch.save(content, path, _use_new_zipfile_serialization=zip_format)

    return change


def endless(path):
    """A pickle whose memo would take hundreds of gigabytes, if a reader made room for it."""
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")


TUTORIAL = [
    *any_of("convert", "tutorial.pth.tar"),
    *refused("convert", "tutorial.pth.tar", {
        "calls os.system": evil_tutorial(os.system, "touch {}"),
        "calls exec": evil_tutorial(exec, "open('{}', 'w')"),
        "calls eval, in the new format": evil_tutorial(eval, "open('{}', 'w')", zip_format=True),
        "calls os.system, in the new format": evil_tutorial(os.system, "touch {}", zip_format=True),
        "is a pickle that calls os.system": EVIL["is a pickle that calls os.system"],
        **SMALL_BUT_ENDLESS,
        "is a text": write("weights"),
        "lacks its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "is one of ours": lambda path: shutil.copy(path.with_name("model.pth"), path),
        "has no modules": small_tutorial(epoch=1),
        "has state dicts": small_tutorial(encoder={"a": torch.ones(1)}, decoder={}),
        "has another kind of module": small_tutorial(encoder=torch.nn.Conv3d(1, 1, 1)),
        "has modules in place of each other": small_tutorial(encoder=torch.nn.Linear(2, 2),
                                                             decoder=torch.nn.Linear(2, 2)),
        "is a list": lambda path: torch.save([1], path, _use_new_zipfile_serialization=False),
        "asks for gigabytes": endless,
        "says that it has terabytes": claims(10**12, legacy=True),
        "says that it has terabytes, in the new format": claims(10**12),
        "has an endless opcode": write(b"\x80\x02" + b"(" * 10**5 + b"."),
        "says that a text has gigabytes": write(b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00x."),
    }),
    *refused("convert", "data/WORDMAP_{}.json", {
        "is missing": ANY["is missing"],
        "is empty": ANY["is empty"],
        "has a word too much": with_json(lambda words: words.update(bird=len(words))),
        "has no <end>": with_json(lambda words: words.update(end=words.pop("<end>"))),
    }),
]  # fmt: skip
