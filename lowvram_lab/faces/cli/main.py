"""The ``lowvram`` command. Results on stdout, progress on stderr; a user's mistake is one line and exit status 2."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable

from lowvram_lab import __version__
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.cli.bench import add_bench, run_bench
from lowvram_lab.faces.cli.chat import add_chat, add_complete, run_chat, run_complete
from lowvram_lab.faces.cli.common import EXIT_INTERRUPTED, EXIT_USAGE
from lowvram_lab.faces.cli.convert import add_convert, run_convert
from lowvram_lab.faces.cli.demo import add_demo, run_demo_command
from lowvram_lab.faces.cli.doctor import run_doctor, run_models
from lowvram_lab.faces.cli.evaluate import add_evaluate, run_evaluate
from lowvram_lab.faces.cli.export import add_export, run_export
from lowvram_lab.faces.cli.forecast import add_forecast, run_forecast
from lowvram_lab.faces.cli.plan import add_plan, add_plan_options, run_plan, run_tune
from lowvram_lab.faces.cli.report import add_report, run_report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of argparse's usage block."""
        if re.search(r"unrecognized arguments: [KMGT]i?B\b", message):
            message += "; write a size in one word, e.g. 4GiB"
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after ``lowvram``; by default ``sys.argv``'s.

    Returns:
        Exit status: 0 done, 1 a validation that failed, 2 a mistake explained in one line, 130 interrupted.
    """
    args = _parser().parse_args(arguments)
    _quiet_other_libraries()
    try:
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
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        return _complain(str(error))


def _complain(message: str, status: int = EXIT_USAGE) -> int:
    print(f"lowvram: {' '.join(message.split())}", file=sys.stderr)
    return status


def _quiet_other_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels it could not download


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lowvram", description="Run a language model that does not fit your GPU, and see why it does."
    )
    parser.add_argument("--version", action="version", version=f"lowvram {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON on stdout, everything else on stderr")
        return sub

    command("doctor", run_doctor, "say what this machine can do")
    command("models", run_models, "list the models known by name")
    add_forecast(
        command("forecast", run_forecast, "say what a model will take of a GPU, without one and without weights")
    )
    add_plan(command("plan", run_plan, "choose the most precise plan that fits a GPU"))
    add_chat(command("chat", run_chat, "chat with a model inside a GPU budget"))
    add_complete(command("complete", run_complete, "go on with a text, as a base model does, inside a GPU budget"))
    tune = command("tune", run_tune, "measure a few splits and thread counts")
    add_plan_options(tune, budget_required=False)
    add_convert(command("convert", run_convert, "quantise a model once, into a directory"))
    add_evaluate(command("evaluate", run_evaluate, "compare a compressed model with its original"))
    add_export(command("export", run_export, "write a model as a file that another engine opens"))
    add_bench(command("bench", run_bench, "measure a model beside other engines"))
    add_report(command("report", run_report, "an article's effect table, measured again"))
    story = "the whole story on a small model: out of memory, plan, load, chat, validation"
    add_demo(command("demo", run_demo_command, story))
    return parser


if __name__ == "__main__":
    sys.exit(main())
