"""What every command shares: one-line errors, whole files, "did you mean".   (after: data/__init__.py  next: config.py)

`InputError` is the error that users see: the file, what was expected, what was found; exit status 2, no traceback. `write_bytes`
and `write_text` leave a whole file or the one before.
Only the standard library is imported here, so `--help` answers at once.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the file, what was expected, what was found."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a command: an `InputError` becomes one line on stderr and exit status 2, an interrupt status 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... --help | head`
        sys.stderr.close()


@contextmanager
def one_line() -> Iterator[None]:
    """Around a loop over a DataLoader: an `InputError` of a worker process comes with that process's traceback; it becomes what
    it was there."""
    try:
        yield
    except InputError as error:  # one of this process has no such name in it and stays as it is
        raise InputError(str(error).rpartition("cli.InputError: ")[2].strip()) from None


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file or nothing: under a name of this process's own in the same folder, then moved into place. Raises
    OSError; what was there before stays then, and no temporary file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:  # an interrupt, too
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text as UTF-8."""
    write_bytes(path, text.encode())


def did_you_mean(name: str, known: Iterable[str], most: int | None = None) -> str:
    """' (did you mean ...?)' for the nearest of `known`, or the list when nothing is near: all of it, or the first `most`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    more = ", ..." if most is not None and len(known) > most else ""
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known[:most])}{more})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse that keeps the docstring's line breaks, shows defaults, and says "did you mean" for unknown flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        # argparse takes "-5,1" for an unknown option, as its own pattern of a negative number has no commas
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.,eE+-]*$")

    def parse_args(self, args=None, namespace=None):  # noqa: D102 (argparse's own)
        parsed, unknown = self.parse_known_args(args, namespace)
        for flag in unknown:
            if flag.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                raise InputError(f"unknown option {flag}{did_you_mean(flag.split('=')[0], known)}")
            raise InputError(f"unexpected argument {flag!r}; `--help` lists what this command takes")
        return parsed

    def error(self, message: str) -> None:
        """argparse reports its own errors as usage + message; ours is the one line."""
        raise InputError(message)
