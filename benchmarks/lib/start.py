"""Starts a command so that Ctrl-C is quiet from its first import on."""

from importlib import import_module


def start(module: str) -> int:
    """Import a module and run its `main`; returns the exit code."""
    try:
        return import_module(module).main()
    except KeyboardInterrupt:
        return 130
