"""What docs/architecture.md says of the rooms, as a check over the import statements. Nothing is imported or run."""

import ast
import itertools
from pathlib import Path

# From the bottom up. A room may import what is below it, and its neighbours on the same floor.
FLOORS = [
    {"utils", "captioning.config_fields", "captioning.command_line", "captioning.screen", "captioning.storage"},
    {"captioning.split_files"},
    {"datasets", "models"},
    {"captioning.speed", "captioning.networks", "captioning.preparation", "captioning.distributed"},
    {"captioning.features", "captioning.inference", "captioning.evaluation", "captioning.display"},
    {"captioning.training", "captioning.blip"},
]
SCRIPTS = {
    "create_input_files", "train", "eval", "caption", "view_captions", "run_pipeline", "blip", "convert_checkpoint",
    "app",
}  # fmt: skip
ROOT_MODULES = SCRIPTS | {"datasets", "models", "utils"}

MODEL = {"models", "captioning.networks", "captioning.inference", "captioning.speed"}
PICTURES = {"captioning.display", "matplotlib", "PIL", "skimage"}
FILES = {"captioning.storage.hdf5", "h5py", "pathlib", "os", "io", "json", "csv", "pickle", "PIL"}

# What each room must not import, beside what is above it.
NEVER = {
    "utils": {"captioning"} | FILES - {"os"},
    "models": {"captioning", "datasets"} | FILES,
    "datasets": MODEL | PICTURES | {"torchvision"},
    "create_input_files": MODEL | {"captioning.features", "captioning.training", "torchvision"},
    "captioning.storage": {"nltk"},
    "captioning.split_files": MODEL | PICTURES | {"torch", "torchvision"},
    "captioning.networks": FILES | {"datasets"},
    "captioning.preparation": MODEL,
    "captioning.distributed": MODEL | (FILES - {"os"}) | {"datasets", "captioning.storage"},
    "captioning.inference": PICTURES | {"captioning.evaluation", "nltk", "pycocoevalcap"},
    "captioning.evaluation": PICTURES | MODEL,
    "captioning.display": MODEL | {"captioning.evaluation", "captioning.features"},
}
# What only these rooms may import.
ONLY = {
    "captioning.blip": {"blip", "captioning.blip"},
    "transformers": {"blip", "captioning.blip"},
    "gradio": {"app"},
    "pydantic": {"utils", "captioning.config_fields", "captioning.command_line"},
    "pycocoevalcap": {"captioning.evaluation"},
}

# Imports within a function that are allowed although they lead upwards.
LATE = {("models", "captioning.networks.backbones")}  # the table of other encoders, for who asks for one

ENDINGS = ("s", "d", "r", "ed", "er", "ers", "ing", "ion", "ions")
MAX_LINES = {"tests": 500}  # of a file below these folders; elsewhere 400


def broken_rules(root):
    """
    Compare a project's folder with the rules above.

    :param root: folder that holds the scripts and captioning/
    :return: list of lines "file: what is wrong", empty if all rules are kept
    """
    root = Path(root)
    sources = sorted([*root.glob("*.py"), *root.glob("captioning/**/*.py")])
    others = sorted([*root.glob("tests/**/*.py"), *root.glob("benchmarks/**/*.py"), *root.glob("docs/**/*.py")])
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources}
    imported = {path: imports(trees[path], root, room_of(path, root)) for path in sources}
    found = []
    for path in sources:
        found += [f"{path.relative_to(root)}: {wrong}" for wrong in wrong_imports(room_of(path, root), imported[path])]
        if path.relative_to(root).parts[:2] != ("captioning", "speed"):
            found += [f"{path.relative_to(root)}: uses {name}" for name in private_operations(trees[path])]
    found += [f"{a} and {b}: import each other" for a, b in circles(imported, root)]
    for path in sources + others:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        most = MAX_LINES.get(path.relative_to(root).parts[0], 400)
        if lines > most:
            found.append(f"{path.relative_to(root)}: {lines} lines, at most {most} expected")
    found += similar_names(sources)
    found += [
        f"{path.name}: is not one of the root's files" for path in root.glob("*.py") if path.stem not in ROOT_MODULES
    ]
    return found


def imports(tree, root, room):
    """:return: dict of each module that a file of `room` imports, anywhere in it -> the names it takes from there"""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, set())
        if isinstance(node, ast.ImportFrom) and (node in tree.body or (room, node.module) not in LATE):
            for alias in node.names:
                inner = Path(root, *node.module.split("."), alias.name)  # `from captioning import distributed`
                if node.module.split(".")[0] == "captioning" and (inner.is_dir() or inner.with_suffix(".py").exists()):
                    found.setdefault(f"{node.module}.{alias.name}", set())
                else:
                    found.setdefault(node.module, set()).add(alias.name)
    return found


def room_of(path, root):
    """:return: 'models', or 'captioning.display' for captioning/display/charts.py"""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "captioning" else parts[0]


def floor_of(room):
    """:return: its place in FLOORS, or one above all of them for a script"""
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def inside(module, name):
    """:return: whether `module` is `name` or below it"""
    return module == name or module.startswith(name + ".")


def wrong_imports(room, imported):
    """Yield what is wrong with the imports of one file in `room`."""
    for module, names in imported.items():
        target = ".".join(module.split(".")[:2]) if module.startswith("captioning") else module.split(".")[0]
        ours = target.startswith("captioning") or target in ROOT_MODULES
        if ours and target != room:
            if target in SCRIPTS:
                yield f"imports the script {target}"
            elif floor_of(target) > floor_of(room):
                yield f"imports {module}, which is above {room}"
        if room == "models" and not ours and target not in {"torch", "torchvision", "functools", "math", "typing"}:
            yield f"imports {module}, but may import torch, torchvision and utils only"
        if target == "captioning.speed" and room != target and names != {"accelerate"}:
            yield f"takes {', '.join(sorted(names)) or module} from captioning.speed, but may call accelerate only"
        for name in NEVER.get(room, ()):
            if inside(module, name) and target != room:
                yield f"imports {module}, which {room} must not"
        for name, rooms in ONLY.items():
            if inside(module, name) and room not in rooms:
                yield f"imports {module}, which is for {', '.join(sorted(rooms))} only"


def circles(imported, root):
    """:return: list of pairs of rooms that import each other"""
    needs = {}
    for path, modules in imported.items():
        rooms = {".".join(module.split(".")[:2]) for module in modules if inside(module, "captioning")}
        needs.setdefault(room_of(path, root), set()).update(rooms | (set(modules) & ROOT_MODULES))
    return [(a, b) for a, b in itertools.combinations(sorted(needs), 2) if b in needs[a] and a in needs[b]]


def private_operations(tree):
    """:return: sorted list of the private parts of torch that a file uses, such as torch._C"""
    found = set()
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        private = any(part.startswith("_") and not part.startswith("__") for part in parts)
        if private and isinstance(node, ast.Name) and node.id == "torch":
            found.add(".".join(["torch", *parts]))
    return sorted(found)


def similar_names(paths):
    """:return: a line for each two files whose names differ by an ending only, as model and models do"""
    first = {}
    for path in paths:
        first.setdefault(path.stem, path)
    lines = []
    for a, b in itertools.permutations(sorted(first), 2):
        if any(b == a + ending or (a.endswith("e") and b == a[:-1] + ending) for ending in ENDINGS):
            lines.append(f"{first[a].name} and {first[b].name}: their names differ by an ending")
    return lines
