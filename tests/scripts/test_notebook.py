"""The notebook runs from top to bottom, and what it computes by hand equals what the modules compute."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from captioning.preparation.shapes import object_name

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


def test_the_step_by_hand_is_compared_with_the_project_attention_and_logits(executed):
    checks = [cell.source for cell in code(executed) if "assert_close" in cell.source]
    assert len(checks) == 2
    assert "assert_close(alpha, decoder.attention(state.keys, h)" in checks[0]
    assert "assert_close(logits, decoder.scores(own_output)" in checks[1]
    assert "own_output, _, _ = decoder.step(word_before, state)" in checks[1]


def test_what_is_committed_is_small_and_its_outputs_hold_no_errors_and_no_traces_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert NOTEBOOK.stat().st_size < 420_000
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|Users|work)/", "".join(printed(cell) for cell in code(notebook)))


def test_what_is_committed_was_executed_once_from_top_to_bottom():
    cells = code(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_what_is_committed_names_both_objects_rightly_in_most_captions():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [scores] = [printed(cell) for cell in code(notebook) if "metrics.BLEU).items()" in cell.source]
    assert int(re.search(r"(\d+) of 100 captions name both objects rightly", scores)[1]) > 50


def test_what_is_committed_names_the_first_shape_rightly_and_surely():
    """The likeliest word of the step by hand is a shape of the picture, with a probability of at least 60%."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [grid] = [printed(cell) for cell in code(notebook) if "a true caption:" in cell.source]
    [step] = [printed(cell) for cell in code(notebook) if "assert_close(logits" in cell.source]
    percent, word = likeliest(step)
    assert object_name(word)
    assert word in re.search(r"a true caption: (.*)", grid)[1].split()
    assert percent >= 60


def test_what_is_committed_looks_at_the_shapes_that_it_names():
    """At least 40% of attention lies in the named shape's box, over the test pictures."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [text] = [printed(cell) for cell in code(notebook) if "shapes named" in cell.source]
    named, share = re.search(r"(\d+) shapes named: (\d+)% of the attention", text).groups()
    assert int(named) >= 100
    assert int(share) >= 40


def test_what_is_committed_fails_at_a_shape_that_it_has_no_word_for():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [failure] = [printed(cell) for cell in code(notebook) if "write(encoder(strange)" in cell.source]
    _, word = likeliest(failure)
    strange = re.search(r"the box of the (\w+)", failure)[1]
    assert object_name(word) and object_name(strange)
    assert word != strange


def test_what_is_committed_captions_a_real_photo_with_the_trained_model():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [sentence] = [printed(cell) for cell in code(notebook) if "load_captioner(PRETRAINED)" in cell.source]
    assert "motorcycle" in sentence


def likeliest(text):
    """:return: the first of the printed words, and its probability in percent before it"""
    percent, word = re.search(r"^ *([\d.]+)%  (\S+)$", text, flags=re.MULTILINE).groups()
    return float(percent), word


def printed(cell):
    """:return: the text that a cell printed"""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")
