"""Progress of a long computation in one line of a terminal or a notebook."""

import sys
import time


class Progress:
    """Prints how many of the runs are done and how long the rest will take.

    Args:
      is_shown: Whether to print. None means in a terminal or a notebook.
      total: How many runs are planned.
    """

    def __init__(self, is_shown: bool | None, total: int):
        # Python's own streams know whether they are terminals, and those of notebooks
        # come from ipykernel.
        stream = sys.stderr
        is_notebook = type(stream).__module__.startswith("ipykernel")
        self._is_shown = (
            stream.isatty() or is_notebook if is_shown is None else is_shown
        )
        self.done, self.total = 0, total
        self._clock: float | None = None
        self._width = 0

    def start(self, text: str) -> None:
        """Prints the first line, at once."""
        if self._is_shown:
            print(text, file=sys.stderr, flush=True)
        self._clock = time.perf_counter()

    def update(self, count: int, name: str) -> None:
        """Counts finished runs and prints the line again."""
        self.done += count
        if not self._is_shown or self._clock is None:
            return
        seconds = (time.perf_counter() - self._clock) / self.done
        left = _duration(seconds * (self.total - self.done))
        self._write(f"{self.done} of {self.total} runs, about {left} left ({name})")

    def close(self) -> None:
        """Ends the line."""
        if self._is_shown and self._width:
            print(file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        padding = " " * (self._width - len(text))  # covers the rest of the last line
        self._width = len(text)
        print(f"\r{text}{padding}", end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
