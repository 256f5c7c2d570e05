"""The texts stay short, plain and free of measured numbers."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GUIDES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("methods/*.md")),
]
SOURCES = [
    path
    for folder in ("stablegrad_optax", "benchmarks", "tests", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# A sentence may open with some of these words, a docstring of this project does not.
FRAGMENT = re.compile(
    r"(Of|With|For|By|In|Where|Without|Beside|Behind|Before|At|From|To|What|Which|"
    r"Whether|That|Those|Who|Whose|The same|Until)\b"
)
# Words of the laboratory, which a reader from outside misunderstands.
LABORATORY = re.compile(
    r"\b(besides?|belongs? into|errs|told apart|by layer|by leaf|half decades?|"
    r"(before|behind) (Muon|SOAP|Adam|AdamW|Lion)|behind it|is none|"
    r"(exploding|vanishing|healthy) starts?|in our runs|ours|the clip)\b",
    re.IGNORECASE,
)


def without_code(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def prose(page):
    """Returns the text of a page without code, tables and the targets of links."""
    text = re.sub(
        r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", without_code(page), flags=re.DOTALL
    )
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def docstrings():
    """Yields the place of each docstring and its text."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            if text := ast.get_docstring(node):
                yield f"{path.relative_to(ROOT)}:{node.body[0].lineno}", text


def opens_with_a_fragment(docstring):
    return FRAGMENT.match(docstring.strip()) is not None


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Of one batch.", True),
        ("\n  Whether it is finite.\n", True),
        ("The same for a batch.", True),
        ("Returns the norm of one batch.", False),
        ("Forgets the statistics.", False),
    ],
)
def test_a_fragment_is_recognized(docstring, expected):
    assert opens_with_a_fragment(docstring) == expected


def test_docstrings_open_with_a_sentence():
    fragments = [place for place, text in docstrings() if opens_with_a_fragment(text)]
    assert len(fragments) <= 10, fragments


def test_docstrings_use_the_words_of_the_field():
    words = [(place, LABORATORY.search(text)) for place, text in docstrings()]
    assert not [(place, match.group()) for place, match in words if match]


def test_the_readme_is_read_in_two_minutes():
    assert len(README.read_bytes()) <= 5_000


def test_the_manual_is_short():
    assert sum(len(without_code(page).split()) for page in GUIDES) <= 11_500


def test_choose_recommends_without_measured_numbers():
    page = ROOT / "docs" / "choose.md"
    assert len(page.read_bytes()) <= 3_500
    assert not re.findall(r"\d", prose(page))
    # In a table a number is an argument, which stands in code.
    assert not re.findall(r"^\|.*\d.*$", re.sub(r"`[^`]*`", "", page.read_text()), re.M)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_guides_use_the_words_of_the_field(page):
    assert not [match.group() for match in LABORATORY.finditer(prose(page))]
