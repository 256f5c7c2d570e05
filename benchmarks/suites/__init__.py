"""Which cells, arms and seeds are run, and the page that shows them.

A suite is a module with `SUITE`, and a module `<suite>_page` with `PAGE`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from benchmarks.lib.suite import Suite

if TYPE_CHECKING:  # which imports matplotlib
    from benchmarks.lib.pages import Page

NAMES = ("pinn", "vision", "spikes")


def load(name: str) -> Suite:
    """A suite by its name; the others are not imported."""
    return import_module(f"{__name__}.{name}").SUITE


def load_page(name: str) -> "Page":
    return import_module(f"{__name__}.{name}_page").PAGE
