"""The notebook runs from top to bottom, and what it computes by hand equals what the modules compute."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "image_captioning.ipynb"
QUICK = {"SCENES": 40, "EPOCHS": 2, "SIZE": 64, "GRID": 2}  # a model that says little, but runs through every cell


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run in a folder of its own with a small budget; an error in a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = code(notebook)[0]
    for name, value in QUICK.items():
        settings.source, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", settings.source, flags=re.MULTILINE)
        assert count == 1, f"the first cell sets no {name}"
    for cell in code(notebook):
        cell.outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        folder = tmp_path_factory.mktemp("notebook")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def test_every_cell_runs_without_a_word_on_the_error_stream(executed):
    for cell in code(executed):
        assert cell.execution_count
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]


def test_the_step_by_hand_is_compared_with_attention_and_with_the_decoders_step(executed):
    checks = [cell.source for cell in code(executed) if "assert_close" in cell.source]
    assert len(checks) == 2
    assert "assert_close(alpha, decoder.attention(keys, h)" in checks[0]
    assert "assert_close(h_new, output" in checks[1] and "decoder.step(" in checks[1]


def test_what_is_committed_is_small_and_its_outputs_hold_no_errors_and_no_traces_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"/(home|root|tmp|Users|work)/", printed)
