"""The site: its own pages, docstrings, notebooks and results, where each is kept."""

import shutil
from pathlib import Path

from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx

import stablegrad_optax

HERE = Path(__file__).parent
ROOT = HERE.parent


def copy(source: Path, target: Path, *suffixes: str) -> None:
    """Bring files that Sphinx must find below its own folder."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.glob("*")):
        # A page needs a title: notes without one stay where they are.
        is_note = path.suffix == ".md" and not path.read_text().startswith("# ")
        if path.suffix in suffixes and not is_note:
            shutil.copy2(path, target)


copy(ROOT / "notebooks", HERE / "notebooks", ".ipynb")
copy(ROOT / "benchmarks" / "results", HERE / "results", ".md", ".png", ".svg")


def link_to_copies(_app: Sphinx, _page: str, source: list[str]) -> None:
    """A page leads to where a file is kept, so that it can be read without the site."""
    source[0] = source[0].replace("../benchmarks/results/", "results/")


project = "stablegrad_optax"
author = copyright = "The stablegrad_optax authors"
version = release = stablegrad_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs that the notebooks hold are shown
exclude_patterns = ["_build", "methods/tables"]  # pages include the tables

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 70
napoleon_numpy_docstring = False

# Every name of the package must resolve; those of other libraries have no inventory
# here, for the site is built without a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!stablegrad_optax).*\..*"),
    ("py:class", r"[^.]*"),
]

html_theme = "furo"
html_title = f"stablegrad_optax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
LATEX = LatexToMathML()


def inline_math(writer: nodes.NodeVisitor, node: nodes.math) -> None:
    """A formula in the line, as MathML: a browser needs no script and no network."""
    formula = LATEX.convert_with_local_state(node.astext(), displaystyle=False)
    writer.body.append(formula)
    raise nodes.SkipNode


def block_math(writer: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """A displayed formula; several lines are aligned at their ampersands."""
    text = node.astext()
    if r"\\" in text and r"\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    formula = LATEX.convert_with_local_state(text, displaystyle=True)
    writer.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer and what pages link to; Sphinx calls this."""
    app.connect("source-read", link_to_copies)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
