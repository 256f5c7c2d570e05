"""Every snippet of the README and of docs/ runs; printed reports are the command's."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    if "jax.distributed.initialize()" in snippet:  # must precede any computation
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        alone = f"jax.distributed.initialize({address!r}, 1, 0)"
        snippet = snippet.replace("jax.distributed.initialize()", alone)
        subprocess.run([sys.executable, "-c", snippet], timeout=120, check=True)
    else:
        exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


def test_reports_are_what_the_command_prints(capsys):
    gradients.main()
    # Digits differ between machines; titles, verdicts and remedies do not.
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith(("Gradients:", "Remedy:"))]
    assert said == re.findall(r"^(?:Gradients|Remedy):.*$", README, re.MULTILINE)
    assert all(f"<summary>{title}</summary>" in README for title in gradients.NETWORKS)
