"""The command line: one file per command, imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a teacher or a baseline from a recipe without a teacher",
    "distill": "train a student from a teacher, as a recipe says",
    "compare": "train with several methods and seeds, and report the differences",
    "evaluate": "figures of a finished run's student, on its own data or on others",
    "serve": "answer over HTTP as a black box, with a finished run's student",
    "diagnose": "what a teacher knows beyond the labels, and where KD with it may fail",
    "landscape": "draw losses over a plane of student logits",
    "export": "a finished student as ONNX, or packed with one bit per binary weight",
    "spike": "convert a finished student to a spiking network, and simulate it",
    "report": "write the report of a run or of a comparison again",
    "bench": "speed and memory of losses and ops against their baselines",
    "check": "put a loss, anybody's, to the laws of distillation losses",
    "info": "versions, devices, and which optional parts are installed",
}


def usage() -> str:
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
            "luce COMMAND --help tells more; --debug shows the traceback of an error.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    The exit status is 2 for what the user can mend, and 1 for a defect: of Luce, or of what ``luce check`` is
    asked about.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    from ..errors import UserError, unknown_name

    if "" not in sys.path:  # what `python:` and `luce check` name may lie here, as for `python -m luce`
        sys.path.insert(0, "")
    name, *rest = words
    try:
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        return importlib.import_module(f"luce.cli.{name}").main(rest) or 0
    except KeyboardInterrupt:
        print("luce: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has enough of it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError):
            print(f"luce {name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(f"luce {name}: unexpected {reason}; --debug shows where, please report it", file=sys.stderr)
        return 1
