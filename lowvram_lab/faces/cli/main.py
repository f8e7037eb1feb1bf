"""The ``lowvram`` command. Results on stdout, progress on stderr; a user's mistake is one line and exit status 2."""

import argparse
import logging
import os
import re
import sys

from lowvram_lab import __version__
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.cli.bench import add_bench, run_bench
from lowvram_lab.faces.cli.common import positive, print_json, prose, spec_of
from lowvram_lab.faces.cli.convert import add_convert, add_evaluate, run_convert, run_evaluate
from lowvram_lab.faces.cli.export import add_export, run_export
from lowvram_lab.faces.cli.plan import add_plan_options, chosen_plan, run_plan, run_tune, stated_plan
from lowvram_lab.faces.cli.report import add_report, run_report

EXIT_USAGE = 2
EXIT_FAILED_VALIDATION = 1
EXIT_INTERRUPTED = 130


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

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON on stdout, everything else on stderr")
        return sub

    command("doctor", _doctor, "say what this machine can do")
    command("models", _models, "list the models known by name")
    forecast = command("forecast", _forecast, "say what a model will take of a GPU, without one and without weights")
    add_plan_options(forecast, budget_required=False, chooses=False)
    forecast.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once (1)")
    forecast.add_argument("--max-context", action="store_true", help="also find the longest context that fits --gpu")
    forecast.add_argument("--plot", metavar="FILE", help="draw the memory timeline into a .png, .svg or .pdf file")
    forecast.add_argument(
        "--compare", action="store_true", help="then load the weights, run it, and show the difference"
    )
    plan = command("plan", run_plan, "choose the most precise plan that fits a GPU")
    add_plan_options(plan, budget_required=True)
    plan.add_argument("--explain", action="store_true", help="also say where bytes and seconds go")
    plan.add_argument("--output", metavar="FILE", help="write the plan as JSON, for --plan")
    chat = command("chat", _chat, "chat with a model inside a GPU budget")
    add_plan_options(chat, budget_required=False)
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and exit; without it, a conversation")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    chat.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1)")
    chat.add_argument("--top-k", type=int, default=0, metavar="K", help="of the K most likely tokens only (0: all)")
    chat.add_argument("--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's probability (0)")
    chat.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="against repeating (1: none)")
    chat.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer here; may be repeated")
    chat.add_argument("--seed", type=int, default=0, metavar="N", help="makes a sampled answer repeatable (0)")
    tune = command("tune", run_tune, "measure a few splits and thread counts")
    add_plan_options(tune, budget_required=False)
    add_convert(command("convert", run_convert, "quantise a model once, into a directory"))
    add_evaluate(command("evaluate", run_evaluate, "compare a compressed model with its original"))
    add_export(command("export", run_export, "write a model as a file that another engine opens"))
    add_bench(command("bench", run_bench, "measure a model beside other engines"))
    add_report(command("report", run_report, "an article's effect table, measured again"))
    demo = command("demo", _demo, "the whole story on a small model: out of memory, plan, load, chat, validation")
    demo.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL", help="default smollm2-135m")
    demo.add_argument("--gpu", default="192MiB", metavar="SIZE", help="the card to be (192MiB)")
    demo.add_argument("--context", type=positive, default=1024, metavar="N", help="tokens to plan for (1024)")
    return parser


def _doctor(args) -> int:
    from lowvram_lab.faces.cli.doctor import examine

    found = examine()
    if args.json:
        print_json(found)
    else:
        for key, value in found.items():
            print(f"{key:22} {value}")
    return 0


def _models(args) -> int:
    from lowvram_lab.model.builtin import builtin_names

    names = builtin_names()
    if args.json:
        print_json({"models": names})
    else:
        for name, line in names.items():
            print(f"{name:14} {line}")
        print("\nAlso: a hub id such as Qwen/Qwen1.5-4B-Chat, a directory with safetensors, or a .gguf file.")
    return 0


def _forecast(args) -> int:
    from dataclasses import replace

    from lowvram_lab.memory.budget import GpuBudget
    from lowvram_lab.memory.gpu import open_gpu
    from lowvram_lab.planner.forecast import forecast
    from lowvram_lab.planner.limits import max_context
    from lowvram_lab.planner.profile import Workload
    from lowvram_lab.planner.suggest import suggest

    if args.max_context and not args.gpu:
        raise LowvramError("--max-context needs --gpu: without a card every context fits")
    budget = GpuBudget.parse(args.gpu, args.cuda_context) if args.gpu else None
    _check_picture(args.plot)
    _, spec = spec_of(args.model)
    plan = stated_plan(args, spec, "fp16")
    workload = Workload.full_context(plan.context, batch_size=args.batch)
    gpu = open_gpu(budget) if args.compare else budget
    profile = forecast(plan, spec, gpu, workload=workload, timeline=bool(args.plot))
    found = suggest(plan, spec, gpu) if budget and not profile.fits else []
    profile = replace(profile, suggestions=tuple(map(str, found)))
    result = {**profile.to_dict(), "plan": plan.digest, "suggestions": [s.to_dict() for s in found]}
    say = prose(args)
    say(plan.summary(spec))
    say(profile.table().to_string(index=False))
    say("(MiB; reserved is the simulated CUDA allocator's)")
    say(profile.summary())
    for line in profile.suggestions:
        say(f"would fit: {line}")
    if args.max_context:
        longest = max_context(plan, spec, gpu)
        result["max_context"] = longest.value
        say(f"longest context that fits: {longest.value} tokens")
    if args.compare:
        result |= _compare(args, plan, spec, gpu, profile, say)
    if args.plot:
        _draw(profile, args.plot)
        say(f"drawn: {args.plot}")
    if args.json:
        print_json(result)
    return 0


def _compare(args, plan, spec, gpu, profile, say) -> dict:
    """Loads and runs what was forecast; says where the two differ, or that both run out of memory."""
    from lowvram_lab.engine.load import load
    from lowvram_lab.planner.explain import explain_oom
    from lowvram_lab.planner.profile import run_workload

    say(f"\nmeasured on the {gpu.name}:")
    with explain_oom(suggestions=False) as oom:
        model = load(plan, gpu, spec=spec, progress=sys.stderr.isatty())
        measured = run_workload(model, profile.workload)
    if oom.happened:
        say(oom.summary())
        return {"measured": None, "oom": oom.to_dict()}
    table = profile.compare(measured)
    say(table.to_string(index=False))
    return {"measured": measured.to_dict(), "comparison": table.to_dict("records")}


def _check_picture(path: str | None) -> None:
    from pathlib import Path

    if path and Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LowvramError(f"expected a picture's name ending in .png, .svg or .pdf, found {path!r}")
    if path and not Path(path).absolute().parent.is_dir():
        raise LowvramError(f"cannot write {path}: its folder does not exist")


def _draw(profile, path: str) -> None:
    import io
    from pathlib import Path

    from lowvram_lab.faces.plot_memory import plot_timeline
    from lowvram_lab.files import write_atomically

    picture = io.BytesIO()
    plot_timeline(profile).figure.savefig(picture, format=Path(path).suffix[1:].lower(), dpi=150)
    write_atomically(Path(path), picture.getvalue())


def _chat(args) -> int:
    from lowvram_lab.chat.prompt import StopStrings
    from lowvram_lab.chat.session import ChatSession
    from lowvram_lab.engine.decode import Sampling
    from lowvram_lab.engine.load import load
    from lowvram_lab.memory.gpu import open_gpu

    say = prose(args)
    if args.prompt is not None and not args.prompt.strip():
        raise LowvramError("expected a prompt, found an empty one; write something, or leave --prompt out to converse")
    if args.json and args.prompt is None:
        raise LowvramError("chat --json needs --prompt: a conversation is not one JSON document")
    sampling = Sampling(args.temperature, args.top_p, args.seed, args.top_k, args.min_p, args.repetition_penalty)
    StopStrings(args.stop)  # refused before anything is loaded
    gpu = open_gpu(args.gpu, args.cuda_context)
    source, spec = spec_of(args.model)
    plan, profile, _ = chosen_plan(args, spec, gpu)
    print(f"{plan.summary(spec)}; on {gpu.name}\n{profile.summary()}", file=sys.stderr)
    model = load(plan, gpu, spec=spec, progress=sys.stderr.isatty())
    session = ChatSession(
        model,
        source.tokenizer(),
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=args.stop,
        progress=sys.stderr.isatty(),
    )
    print(f"decoded by {session.engine}", file=sys.stderr)
    if args.prompt is None:
        return _converse(session)
    answer = ""
    try:
        for piece in session.send(args.prompt):
            answer += piece
            if not args.json:
                say(piece, end="")
    except KeyboardInterrupt:
        say()
        raise
    turn = session.turns[-1]
    if args.json:
        budget_bytes = gpu.budget.total_bytes if gpu.budget else None
        figures = {**turn.to_dict(), "budget_bytes": budget_bytes, "gpu": gpu.name, "engine": session.engine}
        print_json({"text": answer, **figures})
    else:
        say()
        print(_turn_line(turn), file=sys.stderr)
    return 0


def _converse(session) -> int:
    import torch

    print("Type a message; Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not text:
            continue
        try:
            for piece in session.send(text):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except (LowvramError, torch.OutOfMemoryError) as error:
            print(f"lowvram: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        print()
        if session.turns:
            print(_turn_line(session.turns[-1]), file=sys.stderr)


def _turn_line(turn) -> str:
    from lowvram_lab.units import format_bytes

    speed = f", {turn.tokens_per_s:.1f} tokens/s" if turn.tokens_per_s else ""
    less = f"; the GPU was full, so now: {'; '.join(turn.given_up)}" if turn.given_up else ""
    return f"[first token {turn.ttft_s:.2f} s{speed}, peak {format_bytes(turn.peak_bytes)}{less}]"


def _demo(args) -> int:
    from lowvram_lab.faces.cli.demo import run_demo

    result = run_demo(args.model, args.gpu, args.context, prose(args), progress=sys.stderr.isatty())
    if args.json:
        print_json(result)
    return 0 if result["validation"]["passed"] else EXIT_FAILED_VALIDATION


if __name__ == "__main__":
    sys.exit(main())
