"""The command line: one file per command, imported when the command is called.

Each file has a dataclass ``Options`` (see `luce.cli._parser`) and a function ``main(options, command_line)``
that returns the exit status, or None for 0.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import stops

COMMANDS = {
    "train": "train a teacher or a baseline from a recipe without a teacher",
    "distill": "train a student from a teacher, from a recipe",
    "compare": "train with several methods and seeds, and report the differences",
    "evaluate": "print the test metrics of a finished run's student",
    "serve": "serve a finished run's student over HTTP as a black box",
    "diagnose": "analyse the knowledge of a teacher beyond the labels, and the limits of KD with it",
    "landscape": "draw losses over a plane of student logits",
    "export": "write a finished student as ONNX, or packed with one bit per binary weight",
    "spike": "convert a finished student to a spiking network, and simulate it",
    "report": "write the report of a run or a comparison again",
    "check": "test a loss against the laws of distillation losses",
    "info": "show versions, devices, and the optional packages that are installed",
}
PACKAGE = Path(__file__).parents[1]
"""Of Luce; a warning with a place outside is of another package."""
RESUMES = ("train", "distill", "compare")
"""Commands that write checkpoints."""


def usage() -> str:
    """The text of ``luce --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: luce COMMAND [...]",
            "",
            "Choice-theoretic knowledge distillation for PyTorch.",
            "",
            *lines,
            "",
            "luce COMMAND --help describes a command, luce --version prints the version,",
            "and --debug shows the traceback of an error.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after ``luce``; those of the process if None.
    Returns:
        The exit status: 0; 2 for an error that the user can mend; 1 for a defect, of Luce or of the loss that
        ``luce check`` tests; 130 after Ctrl-C; 143 after SIGTERM.
    """
    if argv is None:  # a process of its own
        sys.unraisablehook = _unraisable
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(f"luce {__version__}")
        return 0
    # A console script lacks the working directory, where `python:` data and losses to check may be.
    if "" not in sys.path:
        sys.path.insert(0, "")
    if status := _status(*argv, debug=debug):
        gc.collect()  # frees the frames of the error, which may hold processes that read data
    return status


def _status(name: str, *rest: str, debug: bool) -> int:
    """Run a command and return its exit status; print an error."""
    try:
        with _messages_on_stderr(name), stops.raised():
            return _run(name, rest)
    except (KeyboardInterrupt, stops.Terminated) as stop:
        by_ctrl_c = isinstance(stop, KeyboardInterrupt)
        again = "; run the same command again to resume from the last checkpoint" if name in RESUMES else ""
        print(f"luce: stopped{'' if by_ctrl_c else ' by SIGTERM'}{again}", file=sys.stderr)
        return 130 if by_ctrl_c else 143
    except BrokenPipeError:  # `luce ... | head` closes the pipe when it has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except Exception as error:
        if debug:
            raise
        from ..errors import UserError

        if isinstance(error, UserError):
            print(f"luce {name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        if _of_memory(error):
            print(
                f"luce {name}: the memory of the device or the machine is full; choose a smaller batch, "
                "network or `--data.workers`, and --debug shows where it ended",
                file=sys.stderr,
            )
            return 2
        if isinstance(error, OSError) and isinstance(error.filename, str):  # a full disk, a name too long
            print(f"luce {name}: cannot use {error.filename} ({error.strerror})", file=sys.stderr)
            return 2
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(f"luce {name}: unexpected {reason}; --debug shows where, please report it", file=sys.stderr)
        return 1


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    # A signal to all processes ends those that read data. PyTorch raises for it wherever Python is, even
    # where an error can only be printed.
    if not stops.READER_ENDED.search(str(ignored.exc_value)):
        sys.__unraisablehook__(ignored)


def _of_memory(error: Exception) -> bool:
    # PyTorch raises OutOfMemoryError for a GPU, and for a CPU a plain RuntimeError of its allocator.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


@contextmanager
def _messages_on_stderr(command: str) -> Iterator[None]:
    """Print messages of `luce.log` and Python's warnings of Luce alike, each in one line."""
    from .. import log

    with_place = warnings.formatwarning

    def in_one_line(message: Any, category: type[Warning], file: str, *place: Any) -> str:
        if not Path(file).is_relative_to(PACKAGE):
            return with_place(message, category, file, *place)
        return f"luce {command}: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = in_one_line  # type: ignore[assignment]
    try:
        with log.on_stderr(f"luce {command}"):
            yield
    finally:
        warnings.formatwarning = with_place


def _run(name: str, argv: Sequence[str]) -> int:
    from ..errors import UserError, unknown_name

    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    command: Any = importlib.import_module(f"luce.cli.{name}")
    if "-h" in argv or "--help" in argv:
        from ._help import help_text

        print(help_text(command.Options, name))
        if hasattr(command, "help_end"):
            print(command.help_end())
        return 0
    from ._parser import as_typed, parse_arguments

    try:
        options = parse_arguments(command.Options, argv, name)
        return command.main(options, shlex.join(["luce", name, *argv])) or 0
    except UserError as error:
        raise UserError(as_typed(str(error), command.Options)) from error
