"""README and the pages of docs/: snippets run, links lead somewhere."""

import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import stablegrad_optax
from benchmarks import gradients

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BUILT = ROOT / "docs" / "notebooks", ROOT / "docs" / "results"  # by docs/conf.py
DOCS = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if page.parent not in BUILT or page.name == "demo.md"
]
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )
]
# Their recipes run where they are installed: `pip install ".[recipes]"`.
OPTIONAL = ("deepxde", "jinns")


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    optional = [name for name in OPTIONAL if f"import {name}\n" in snippet]
    if any(importlib.util.find_spec(name) is None for name in optional):
        pytest.skip(f"{optional} is not installed")
    if "jax.lax.pcast" in snippet and not hasattr(jax.lax, "pcast"):
        pytest.skip("jax.lax.pcast came after jax 0.8")
    if optional:  # their imports set options of JAX, and warn
        run_alone(snippet)
    elif "jax.distributed.initialize()" in snippet:  # must precede any computation
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        alone = f"jax.distributed.initialize({address!r}, 1, 0)"
        run_alone(snippet.replace("jax.distributed.initialize()", alone))
    else:
        exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


def run_alone(snippet):
    subprocess.run([sys.executable, "-c", snippet], timeout=300, check=True)


@pytest.mark.slow
def test_reports_are_what_the_command_prints(capsys):
    gradients.main()
    page = (ROOT / "docs" / "reading_the_report.md").read_text()
    # Digits differ between machines; titles, verdicts and remedies do not.
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith(("Gradients:", "Remedy:"))]
    assert said == re.findall(r"^(?:Gradients|Remedy):.*$", page, re.MULTILINE)
    assert all(f"<summary>{title}</summary>" in page for title in gradients.NETWORKS)


def test_the_readme_shows_what_the_report_prints(capsys):
    code, shown = re.search(
        r"^```python\n([^`]*gradient_report.*?)^```\n\n```text\n(.*?)^```",
        README.read_text(),
        re.MULTILINE | re.DOTALL,
    ).groups()
    exec(compile(code, "snippet", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert set(shown.splitlines()) - {"  ..."} <= set(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        target = (page.parent / link).resolve()
        assert target.exists(), link
        # What docs/conf.py copies is there only where the site was built.
        copied = any(target.is_relative_to(folder) for folder in BUILT)
        assert target.name == "demo.md" or not copied, link


def test_every_public_name_has_its_place_in_the_documents():
    documents = "".join(page.read_text() for page in PAGES)
    for name in stablegrad_optax.__all__:
        assert re.search(rf"auto\w+:: stablegrad_optax\.{name}\n", documents), name
