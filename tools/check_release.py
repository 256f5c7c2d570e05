"""Check that the version, the documents and what was built agree, before a release.

`make release-check` builds the site and the distributions first.
"""

import re
import tomllib
from datetime import date
from pathlib import Path

import yaml

import stablegrad_optax

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Raise or exit with the first thing that does not agree."""
    version = stablegrad_optax.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    expect("CITATION.cff has version", citation["version"], version)
    check_changelog(version, str(citation["date-released"]))
    check_distributions(version)
    check_requirements()
    check_site(version)
    print(f"{version} is ready")


def check_changelog(version: str, released: str) -> None:
    """The newest entry is this version's, of the day that CITATION.cff names."""
    headings = re.findall(r"^## \[(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    headings = [heading for heading in headings if heading != "Unreleased]"]
    expect("the changelog's newest entry is", headings[0], f"{version}] - {released}")
    date.fromisoformat(released)


def check_distributions(version: str) -> None:
    """dist/ holds the wheel and the sdist of this version and nothing else."""
    names = sorted(path.name for path in (ROOT / "dist").iterdir())
    stem = f"stablegrad_optax-{version}"
    expect("dist/ holds", names, [f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"])


def check_requirements() -> None:
    """The package needs jax and optax alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"\W", each)[0] for each in project["dependencies"]]
    expect("the package needs", names, ["jax", "optax"])


def check_site(version: str) -> None:
    """The site is this version's; its pages lead nowhere that is not there."""
    site = ROOT / "out" / "docs"
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    if f"stablegrad_optax {version}" not in pages.get(site / "index.html", ""):
        raise SystemExit(f"out/docs is not the site of {version}")
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"#?:]+)(?:[#?][^"]*)?"', text):
            if not (page.parent / link).exists():
                raise SystemExit(f"{page.relative_to(site)} leads to {link}")


def expect(what: str, actual: object, expected: object) -> None:
    """Exit with both where they differ."""
    if actual != expected:
        raise SystemExit(f"{what} {actual!r}; expected {expected!r}")


if __name__ == "__main__":
    main()
