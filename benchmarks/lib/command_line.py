"""Options from the command line; a mistake costs the user one line, not a page."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import tyro

Options = TypeVar("Options")

# tyro frames its messages with these, and may colour them.
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯]")
_RULE = re.compile(r"─{3,}")
# Python's words for a wrong number name no allowed value.
_PLAIN_WORDS = {
    "invalid literal for int() with base 10:": "expected a whole number, got",
    "could not convert string to float:": "expected a number, got",
}


def parse(
    options: type[Options], args: Sequence[str] | None, *, prog: str, description: str
) -> Options:
    """Read a dataclass of options; exit with code 2 and one line if that fails.

    Args:
        options: a dataclass; the text under a field is its help.
        args: the arguments; None for those of the process.
        prog: how the command is called, for `--help` and for messages.
        description: the first lines of `--help`.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(options, prog=prog, description=description, args=args)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # The frame holds a title, the message, then, below a rule, the argument's help.
    text = _DECORATION.sub(" ", messages.getvalue())
    parts = [" ".join(part.split()) for part in _RULE.split(text)]
    parts = [part for part in parts if part]
    message = parts[1] if len(parts) > 1 else parts[0]
    for words, plain in _PLAIN_WORDS.items():
        message = message.replace(words, plain)
    fail(prog, f"{message} (see --help)")


def fail(prog: str, message: str) -> NoReturn:
    """Say what was wrong and what is allowed, in one line, and exit with code 2."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
