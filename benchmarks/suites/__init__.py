"""Which cells, arms and seeds are run, and the page that shows them.

A suite is a module with `SUITE`. What its page shows beyond the default one is in a
module `<suite>_page` with `PAGE`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks.lib.suite import Suite

if TYPE_CHECKING:  # which imports matplotlib
    from benchmarks.lib.pages import Page

NAMES = ("pinn", "vision", "spikes", "rl")


def load(name: str) -> Suite:
    """A suite by its name; the others are not imported."""
    return import_module(f"{__name__}.{name}").SUITE


def load_page(name: str) -> "Page":
    module = f"{__name__}.{name}_page"
    if find_spec(module) is not None:
        return import_module(module).PAGE
    from benchmarks.lib.pages import Page

    return Page.default(load(name))
