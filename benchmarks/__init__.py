"""Benchmarks of the gradient transformations, as a package of commands."""

from importlib import import_module


def start(module: str) -> int:
    """Imports a module and runs its `main`; Ctrl-C is quiet from the first import on.

    Returns:
        The exit code.
    """
    try:
        return import_module(module).main()
    except KeyboardInterrupt:
        return 130
