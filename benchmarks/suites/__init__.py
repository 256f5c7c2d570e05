"""Suites say which problems, optimizers and seeds are run, and what a page shows.

A suite is a module with `SUITE`. A module `<suite>_page` with `PAGE`, if there is one,
declares what its page shows.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks.lib.suite import Suite

if TYPE_CHECKING:  # which imports matplotlib
    from benchmarks.report.pages import Page

NAMES = (
    "pinn",
    "initializers",
    "vision",
    "spikes",
    "rl",
    "calibration",
    "optimizers",
    "rates",
)


def load(name: str) -> Suite:
    """Imports a suite by its name, and no other suite."""
    return import_module(f"{__name__}.{name}").SUITE


def load_page(name: str) -> "Page":
    """Imports the page of a suite, or makes the default page."""
    module = f"{__name__}.{name}_page"
    if find_spec(module) is not None:
        return import_module(module).PAGE
    from benchmarks.report.pages import Page

    return Page.default(load(name))
