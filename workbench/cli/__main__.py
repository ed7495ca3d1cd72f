"""Entry point of `workbench` and of `python -m workbench`. It imports no library before the streams are open."""

import atexit
import gc
import os
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line."""
    # Imports create many objects that live until the end. Scanning them repeatedly costs 0.1 s at every start, and once more at its end.
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.freeze)
    closed = _open_streams()
    try:
        from workbench.console.failures import short_of_memory

        if 1 in closed:
            _end("standard output is closed, so nothing can be printed", "Write >/dev/null to discard what is printed.")
        from workbench.cli.app import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        if not (found := short_of_memory(error)):
            raise
        _end(found.message, found.hint or "")


def _open_streams() -> list[int]:
    """Open standard streams that are closed, as streams of /dev/null, and return their numbers.

    Otherwise the first file that a command opens would get the number of such a stream, and whatever a library prints would go into it.
    """
    closed = []
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            setattr(sys, name, os.fdopen(number, mode))
    return closed


def _end(message: str, hint: str) -> NoReturn:
    """Print an error without any library, and exit."""
    sys.stderr.write(f"error: {message}\n  hint: {hint}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
