"""The ``lowvram`` command. Results on stdout, progress on stderr; a user's mistake is one line and exit status 2."""

import argparse
import difflib
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

from lowvram_lab import __version__
from lowvram_lab.errors import LowvramError, UnitError, first_line

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
COMMANDS = {
    "doctor": ("doctor", "say what this machine can do"),
    "models": ("doctor", "list the models known by name"),
    "targets": ("target", "list the machines without a GPU that plans are forecast for"),
    "forecast": ("forecast", "say what a model will take of a GPU, without one and without weights"),
    "plan": ("plan", "choose the most precise plan that fits a GPU"),
    "chat": ("chat", "chat with a model inside a GPU budget"),
    "complete": ("chat", "go on with a text, as a base model does, inside a GPU budget"),
    "cache": ("cache", "list, explain, fill or clear what is remembered of prompts"),
    "tune": ("plan", "measure a few splits and thread counts"),
    "convert": ("convert", "quantise a model once, into a directory"),
    "slim": ("slim", "remove what is not needed, say what it costs"),
    "evaluate": ("evaluate", "compare a compressed model with its original"),
    "export": ("export", "write a model as a file that another engine opens"),
    "bench": ("bench", "measure a model beside other engines"),
    "report": ("report", "an article's effect table, measured again"),
    "demo": ("demo", "the whole story on a small model: out of memory, plan, load, chat, validation"),
}
"""Name → the file beside this one with its ``add_NAME`` (arguments) and ``run_NAME``, and what it does."""


SIZE_OPTIONS = ("--gpu", "--ram", "--disk", "--cuda-context", "--weight-bytes", "--remember", "--remember-ram")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of argparse's usage block."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the words after ``lowvram``, by default ``sys.argv``'s.

    Returns:
        Exit status: 0 done, 1 a validation that failed, 2 a mistake or a fault explained in one line, 130 interrupted.
    """
    with warnings.catch_warnings():
        _quiet_other_libraries()
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(words: list[str]) -> int:
    try:
        _refuse_sizes_in_two_words(words)
        args, unknown = _parser(words).parse_known_args(words)
        if unknown:
            raise LowvramError(_unknown(args.command, args.help_text(), unknown))
        return args.run(args)
    except LowvramError as error:
        return _complain(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of a pipe (head, say) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _complain(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if _is_out_of_memory(error):
            return _complain(str(error))
        if os.environ.get("LOWVRAM_TRACEBACK"):
            raise
        return _complain(_unexpected(error))


def _unknown(command: str, help_text: str, words: list[str]) -> str:
    """What to say of words that a command does not take."""
    option = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
    near = difflib.get_close_matches(option, set(re.findall("--[a-z][a-z0-9-]+", help_text)), n=1) if option else []
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{command}: unrecognized arguments: {' '.join(words)}{hint} (see lowvram {command} --help)"


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _unexpected(error: Exception) -> str:
    """What to say of a fault that nobody foresaw, ours or a library's: what, where, and how to see more."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = "/".join(Path(place.filename).parts[-2:])
    return (
        f"unexpected {type(error).__name__} in {file}, line {place.lineno}: {first_line(error)[:300]}; "
        "LOWVRAM_TRACEBACK=1 shows the way there"
    )


def _complain(message: str, status: int = EXIT_USAGE) -> int:
    print(f"lowvram: {' '.join(message.split())}", file=sys.stderr)
    return status


def _refuse_sizes_in_two_words(words: list[str]) -> None:
    """Before the second word is taken for a model's name."""
    for option, number, unit in zip(words, words[1:], words[2:], strict=False):
        is_size = re.fullmatch(r"[0-9]+([.,][0-9]+)?", number) and re.fullmatch(r"[KMGT](i?B)?", unit, re.IGNORECASE)
        if option in SIZE_OPTIONS and is_size:
            raise UnitError(f"{option} {number} {unit}: expected a size in one word; write {option} {number}{unit}")


def _quiet_other_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels it could not download
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        # other packages' are theirs to mend: no line, and no error where Python was told to make errors of warnings
        warnings.filterwarnings("ignore", category=category, module=r"(?!lowvram_lab)")


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands; of the one asked for, with its arguments: the others' libraries are not imported."""
    parser = _Parser(
        prog="lowvram", description="Run a language model that does not fit your GPU, and see why it does."
    )
    parser.add_argument("--version", action="version", version=f"lowvram {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, (file, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name == asked:
            module = importlib.import_module(f"lowvram_lab.cli.{file}")
            command.set_defaults(run=getattr(module, f"run_{name}"), help_text=command.format_help)
            command.add_argument("--json", action="store_true", help="print JSON on stdout, everything else on stderr")
            if add_arguments := getattr(module, f"add_{name}", None):  # doctor and models have none
                add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
