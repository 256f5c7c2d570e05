"""Properties of every notebook; `make notebooks` runs them."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook, code


def test_there_are_three():
    assert [path.stem for path in PATHS] == [
        "batchnorm_free",
        "deep_pinn",
        "quickstart",
    ]


@each_notebook
def test_it_was_executed_in_full_from_top_to_bottom(path):
    _, code = read(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)


@each_notebook
def test_nothing_is_kept_that_differs_every_time(path):
    notebook, _ = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert str(ROOT) not in path.read_text()


@each_notebook
def test_one_cell_of_parameters_with_a_fast_switch(path):
    _, code = read(path)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [code[1]]  # after the installation
    assert 'FAST = os.environ.get("NOTEBOOKS_FAST") == "1"' in tagged[0].source


@each_notebook
def test_it_asserts_and_cites(path):
    notebook, code = read(path)
    # One cell of assertions, which the site leaves out.
    (tests,) = [c for c in code if "remove-cell" in c.metadata.get("tags", [])]
    assert len(re.findall(r"^\s*assert ", tests.source, re.MULTILINE)) >= 2
    assert "arxiv.org/abs/" in notebook.cells[-1].source


def test_they_install_alike():
    assert len({read(path)[1][0].source for path in PATHS}) == 1


@each_notebook
def test_badge_and_clone_know_the_address_once_there_is_one(path):
    notebook, code = read(path)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    address = citation.get("repository-code", "")
    assert f'REPOSITORY = "{address}"' in code[0].source
    place = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/"
    badge = f"colab-badge.svg)]({colab}{path.name})"
    assert (badge in notebook.cells[0].source) == bool(address)
    assert ("colab-badge" in notebook.cells[0].source) == bool(address)
