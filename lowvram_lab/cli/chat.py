"""``lowvram chat`` and ``lowvram complete``: an answer, a conversation or the rest of a text, inside a GPU budget."""

import argparse
import json
import os
import sys
from collections.abc import Callable

import torch

from lowvram_lab.chat.answer import Session, TurnStats, check_least
from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.chat.prompt import StopStrings, checked_text
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.chat.template import chat_template
from lowvram_lab.cli.common import print_json, prose, share, spec_of, tokens
from lowvram_lab.cli.plan import add_plan_options, chosen_plan
from lowvram_lab.decoding.replay import KIND
from lowvram_lab.engine.load import load
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.packaged import read_text
from lowvram_lab.prefixes.store import Remember
from lowvram_lab.sampling import Sampling
from lowvram_lab.units import format_bytes

SALT = "LOWVRAM_SALT"
"""The environment variable of the salt where no file says it."""


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``chat``."""
    add_plan_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit; without it, a conversation")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_session_options(parser)
    _add_answer_options(parser)


def add_complete(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``complete``."""
    add_plan_options(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on with")
    _add_salt_option(parser)
    _add_answer_options(parser)


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """What decides which prompt a chat begins with, and whether it is found among what is remembered."""
    add_template_option(parser)
    _add_salt_option(parser)


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """What a chat template takes beside messages."""
    parser.add_argument(
        "--template-argument",
        type=_template_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the chat template takes beside messages, e.g. enable_thinking=false (repeatable)",
    )


def _add_salt_option(parser: argparse.ArgumentParser) -> None:
    """The salt itself is no option: everybody on the machine could read it in the list of processes."""
    parser.add_argument(
        "--salt-file",
        metavar="FILE",
        help=f"a secret for --remember: what one salt wrote, another does not find (${SALT}, or none)",
    )


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=tokens, default=256, metavar="N", help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="of the K most likely tokens only (0: all)")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's probability (0)"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="not to repeat (1: none)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer here (repeatable)")
    parser.add_argument(
        "--flip-rate",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="of --precision auto: tokens that may differ (1%%)",
    )
    parser.add_argument(
        "--least-tokens-per-s",
        type=float,
        metavar="N",
        help="of weights in two planes: where both are slower, by the high ones for the rest of an answer",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="makes a sampled answer repeatable (0)")


def _template_argument(text: str) -> tuple[str, object]:
    """``NAME=VALUE``; the value is read as JSON where it is JSON, else as the text that it is."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, e.g. enable_thinking=false, found {text!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def template_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What ``--template-argument`` says, by name."""
    arguments = dict(args.template_argument)
    if len(arguments) < len(args.template_argument):
        twice = next(name for name in arguments if [given for given, _ in args.template_argument].count(name) > 1)
        raise LowvramError(f"expected one value for the template argument {twice}, found several")
    return arguments


def run_chat(args: argparse.Namespace) -> int:
    """Answers one prompt, or converses."""
    if args.prompt is not None and not args.prompt.strip():
        raise LowvramError("expected a prompt, found an empty one; write something, or leave --prompt out to converse")
    if args.json and args.prompt is None:
        raise LowvramError("chat --json needs --prompt: a conversation is not one JSON document")
    if args.prompt is not None:
        checked_text(args.prompt, "a prompt")
    if args.system:
        checked_text(args.system, "a system message")
    session = _open(args, ChatSession, system=args.system, template_arguments=template_arguments(args))
    return _converse(session) if args.prompt is None else _answer(session, args)


def run_complete(args: argparse.Namespace) -> int:
    """Goes on with a text."""
    checked_text(args.prompt, "a text to go on with")
    return _answer(_open(args, CompletionSession), args)


def _open(args: argparse.Namespace, kind: type[Session], **options):
    """A session that answers as it was asked to."""
    sampling = Sampling(args.temperature, args.top_p, args.seed, args.top_k, args.min_p, args.repetition_penalty)
    StopStrings(args.stop)
    session = open_session(
        args,
        kind,
        lambda plan: check_least(args.least_tokens_per_s, bool(plan.low_planes())),
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=args.stop,
        **options,
    )
    session.flip_rate, session.least_tokens_per_s = args.flip_rate, args.least_tokens_per_s
    return session


def open_session(args: argparse.Namespace, kind: type[Session], check: Callable[[Plan], None] | None = None, **options):
    """A session of that kind with the model that was asked for; what can be refused is refused before it is loaded.

    Args:
        args: With plan options, and ``--salt-file``.
        kind: Of which kind.
        check: Refuses a plan that what was asked for does not go with.
        **options: The session's; a chat's ``template_arguments`` among them.
    """
    salt = _salt(args)
    gpu = open_gpu(args.gpu, args.cuda_context)
    source, spec = spec_of(args.model, runs=True)
    source.require_tokenizer()
    if kind is ChatSession:
        source.require_chat_template(options["template_arguments"])
    plan, profile, _ = chosen_plan(args, spec, gpu)
    if args.salt_file and not plan.remembers:
        raise LowvramError("--salt-file is for prompts that are remembered; give --remember SIZE as well")
    if check:
        check(plan)
    source.small_files(sys.stderr.isatty())
    if (of_files := source.spec()).fingerprint != spec.fingerprint:  # a head of its own, where the config ties it
        plan, profile, _ = chosen_plan(args, of_files, gpu)
    print(f"{plan.summary()}; on {gpu.name}\n{profile.summary()}", file=sys.stderr)
    tokenizer = source.tokenizer()
    if kind is ChatSession:
        chat_template(tokenizer, options["template_arguments"])
    model = load(plan, gpu, progress=sys.stderr.isatty())
    session = kind(model, tokenizer, progress=sys.stderr.isatty(), remember=Remember(salt=salt), **options)
    print(f"decoded by {session.engine}", file=sys.stderr)
    return session


def _salt(args: argparse.Namespace) -> str:
    """The secret that what is remembered is kept by; ``""`` for none."""
    if not args.salt_file:
        return os.environ.get(SALT, "")
    salt = read_text(args.salt_file).strip()
    if not salt:
        raise LowvramError(f"{args.salt_file}: expected a salt, found an empty file; write a long random text into it")
    return salt


def _answer(session: Session, args: argparse.Namespace) -> int:
    """One answer, streamed or as JSON."""
    say = prose(args)
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
        gpu = session.model.lowvram.gpu
        budget_bytes = gpu.budget.total_bytes if gpu.budget else None
        figures = {**turn.to_dict(), "budget_bytes": budget_bytes, "gpu": gpu.name, "engine": session.engine}
        print_json({"text": answer, **figures})
    else:
        say()
        print(_turn_line(session), file=sys.stderr)
    return 0


def _converse(session: Session) -> int:
    typed = sys.stdin.isatty()
    if typed:
        print("Type a message; Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            if typed:
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
            print(_turn_line(session), file=sys.stderr)


def _turn_line(session: Session) -> str:
    """What the latest answer took."""
    turn, planes = session.turns[-1], ""
    if turn.drafted:
        guesses = "tokens of the answer remembered" if set(session.drafting.drafted) == {KIND} else "guessed tokens"
        planes = f", {turn.accepted} of {turn.drafted} {guesses} right"
    elif turn.precise_tokens is not None:
        planes = f", {turn.precise_tokens} of {turn.new_tokens} tokens by both planes"
    speed = f", {turn.tokens_per_s:.1f} tokens/s" if turn.tokens_per_s else ""
    less = f"; went on with less: {'; '.join(turn.given_up)}" if turn.given_up else ""
    prompt = _prompt_words(turn) if loaded(session.model).plan.remembers else ""
    return f"[first token {turn.ttft_s:.2f} s{prompt}{speed}{planes}, peak {format_bytes(turn.peak_bytes)}{less}]"


def _prompt_words(turn: TurnStats) -> str:
    """Where a prompt's tokens came from, where some may be remembered."""
    held = turn.cached_tokens - turn.remembered_tokens
    at_hand = f", {held} from the turn before" if held else ""
    why = f" ({turn.missed})" if turn.missed else ""
    return f", {turn.remembered_tokens} of {turn.prompt_tokens} prompt tokens remembered{why}{at_hand}"
