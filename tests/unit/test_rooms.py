"""The rooms of docs/architecture.md: which way imports run, what never happens where, how long files are."""

from pathlib import Path

import pytest
from house_rules import ROOT_MODULES, broken_rules

ROOT = Path(__file__).parents[2]
MADE = {  # a small house that keeps every rule
    "utils.py": "from pydantic import Field",
    "models.py": "import torch\nfrom utils import UserError",
    "datasets.py": "import h5py\nfrom captioning.storage.files import load_json",
    "train.py": "from captioning.training.run import Run\nfrom models import Attention",
    "caption.py": "from captioning.display.charts import histogram",
    "blip.py": "import transformers\nfrom captioning.blip.transformer import load_blip",
    "captioning/distributed.py": "import os\nimport torch",
    "captioning/blip/transformer.py": "import transformers",
    "captioning/display/charts.py": "import matplotlib",
    "captioning/inference/search.py": "import torch",
    "captioning/networks/registry.py": "from models import Attention",
    "captioning/speed/fast.py": "import torch\ntorch.ops.mkldnn._linear_pointwise",
    "captioning/storage/files.py": "from utils import UserError",
    "captioning/training/run.py": "from captioning import distributed\nfrom captioning.speed.fast import accelerate",
}  # fmt: skip


@pytest.fixture
def house(tmp_path):
    """A folder with the files of `MADE`."""
    for name, text in MADE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_this_project_keeps_the_rules_of_its_rooms():
    assert broken_rules(ROOT) == []


def test_a_house_that_keeps_every_rule_passes(house):
    assert broken_rules(house) == []


@pytest.mark.parametrize(
    "file, line, complaint",
    [
        ("models.py", "import json", "may import torch, torchvision and utils only"),
        ("models.py", "def late():\n    from captioning.networks.registry import build", "which is above models"),
        ("models.py", "from captioning.networks.backbones import build_backbone", "which is above models"),
        ("models.py", "from captioning.speed.fast import accelerate", "which models must not"),
        ("datasets.py", "from models import Attention", "which datasets must not"),
        ("train.py", "from caption import main", "imports the script caption"),
        ("train.py", "import captioning.blip.transformer", "which is for blip, captioning.blip only"),
        ("train.py", "import transformers", "which is for blip, captioning.blip only"),
        ("train.py", "from captioning.speed.fast import Linear", "may call accelerate only"),
        ("train.py", "import torch\ntorch._C._current_graph_task_id()", "uses torch._C"),
        ("captioning/display/charts.py", "from models import Attention", "which captioning.display must not"),
        ("captioning/inference/search.py", "from captioning.display import charts", "captioning.inference must not"),
        ("captioning/networks/registry.py", "import h5py", "which captioning.networks must not"),
        ("captioning/networks/registry.py", "from captioning.training.run import Run", "which is above"),
        ("captioning/storage/files.py", "import datasets", "which is above captioning.storage"),
        ("captioning/training/run.py", "from train import Config", "imports the script train"),
        ("captioning/training/run.py", "\n" * 400, "lines, at most 400 expected"),
        ("captioning/training/model.py", "", "model.py and models.py: their names differ by an ending"),
        ("captioning/training/training.py", "", "train.py and training.py: their names differ by an ending"),
        ("helpers.py", "", "is not one of the root's files"),
    ],
)
def test_a_broken_rule_is_found_and_named(house, file, line, complaint):
    path = house / file
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n{line}\n")
    assert any(complaint in wrong for wrong in broken_rules(house)), broken_rules(house)


def test_only_the_model_may_look_up_an_encoder_and_only_when_it_is_asked_for(house):
    late = "\ndef build():\n    from captioning.networks.backbones import build_backbone\n"
    (house / "models.py").write_text(MADE["models.py"] + late)
    assert broken_rules(house) == []
    (house / "datasets.py").write_text(MADE["datasets.py"] + late)
    assert any("datasets.py: imports captioning.networks" in wrong for wrong in broken_rules(house))


def test_neighbours_may_import_one_another_but_not_in_a_circle(house):
    (house / "captioning/networks/registry.py").write_text("from captioning.speed.fast import accelerate")
    assert broken_rules(house) == []
    (house / "captioning/speed/fast.py").write_text("from captioning.networks import registry")
    assert broken_rules(house) == ["captioning.networks and captioning.speed: import each other"]


def test_the_root_holds_what_you_run_and_the_three_modules_you_read():
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names == ROOT_MODULES


def test_every_room_stands_in_the_table_of_the_architecture():
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = [*ROOT.glob("*.py"), *ROOT.glob("captioning/*.py"), *ROOT.glob("captioning/*/")]
    names = [f"{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}" for path in rooms]
    assert [name for name in names if "__" not in name and f"`{name}`" not in table] == []
