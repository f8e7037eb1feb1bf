"""``lowvram cache``: what is remembered of prompts on disk, listed, explained, filled and cleared."""

import argparse
import sys

from lowvram_lab.chat.dialogues import read_dialogues, warm
from lowvram_lab.chat.prompt import checked_text
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.cli.chat import add_session_options, open_session, template_arguments
from lowvram_lab.cli.common import print_json, prose, tokens
from lowvram_lab.cli.plan import add_plan_options
from lowvram_lab.errors import LowvramError
from lowvram_lab.prefixes.folder import default_folder
from lowvram_lab.prefixes.listing import UNREADABLE, bytes_remembered, forget, let_go, remembered_models
from lowvram_lab.units import GiB, format_bytes

LOOKED_AT = 2 * GiB
"""Of ``explain`` where no size is said: it writes nothing, so any size does that a block fits in."""


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``cache``."""
    commands = parser.add_subparsers(dest="cache_command", required=True, metavar="ACTION")
    for name, (help, add, act) in _ACTIONS.items():
        action = commands.add_parser(name, help=help, description=help)
        # without a default: one would undo a --json that stands before the action
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON on stdout")
        action.set_defaults(act=act)
        add(action)


def run_cache(args: argparse.Namespace) -> int:
    """``lowvram cache ACTION``."""
    return args.act(args)


def _add_list(parser: argparse.ArgumentParser) -> None:
    """It has no arguments of its own."""


def _list(args: argparse.Namespace) -> int:
    """A row for each model and each root, and all bytes."""
    table, total, folder = remembered_models(), bytes_remembered(), str(default_folder())
    if args.json:
        print_json({"entries": table.to_dict("records"), "bytes": total, "folder": folder})
        return 0
    if len(table):
        shown = table.assign(
            root=table["root"].str[:8],
            bytes=table["bytes"].map(format_bytes),
            salted=table["salted"].map({True: "yes", False: "no"}),
            unusable=table["unusable"].fillna("-"),
        )
        print(shown.to_string(index=False))
    print(f"{format_bytes(total)} in {folder}")
    return 0


def _add_clear(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="what is remembered of this model alone (of all)")


def _clear(args: argparse.Namespace) -> int:
    """Removes, and says how much that was."""
    freed, folder = forget(args.model), str(default_folder())
    total = sum(freed.values())
    if args.json:
        print_json({"bytes": total, "models": freed, "folder": folder})
        return 0
    for model, size in sorted(freed.items()):
        print(f"{model or UNREADABLE}: {format_bytes(size)}")
    print(f"{format_bytes(total)} freed in {folder}")
    return 0


def _unpin(args: argparse.Namespace) -> int:
    """Unpins, and says how many blocks that were."""
    count, folder = let_go(args.model), str(default_folder())
    if args.json:
        print_json({"blocks": count, "model": args.model, "folder": folder})
    else:
        print(f"{count} blocks in {folder} are pinned no longer")
    return 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the message that would be sent")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_session_options(parser)


def _explain(args: argparse.Namespace) -> int:
    """How much of a prompt is remembered, and why no more."""
    if not args.prompt.strip():
        raise LowvramError("expected a prompt, found an empty one; write something")
    checked_text(args.prompt, "a prompt")
    if args.system:
        checked_text(args.system, "a system message")
    args.remember = args.remember or LOOKED_AT
    session = open_session(args, ChatSession, system=args.system, template_arguments=template_arguments(args))
    found = session.explain(args.prompt)
    if args.json:
        print_json(found.to_dict())
    else:
        print(found.text)
    return 0


def _add_warm(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        help='in each line {"system": ..., "document": ..., "question": ..., "answer": ...}, one of them or more',
    )
    parser.add_argument("--pin", action="store_true", help="let these prompts stay, whatever else needs room")
    parser.add_argument(
        "--max-new-tokens",
        type=tokens,
        default=256,
        metavar="N",
        help="longest answer to a question that has none (256)",
    )
    add_session_options(parser)


def _warm(args: argparse.Namespace) -> int:
    """Reads prompts from a file and remembers them."""
    dialogues = read_dialogues(args.file)
    if not args.plan:  # a plan may say it, too
        _check_remembers_on_disk(args.remember)
    session = open_session(
        args,
        ChatSession,
        lambda plan: _check_remembers_on_disk(plan.remember),
        max_new_tokens=args.max_new_tokens,
        template_arguments=template_arguments(args),
    )
    table, say = warm(session, dialogues, args.pin, progress=sys.stderr.isatty()), prose(args)
    sums = {name: table[name].sum().item() for name in ("tokens", "blocks_added", "blocks_without_room", "bytes")}
    answers = int((table["answer_tokens"] > 0).sum())
    seconds = table["seconds"].sum().item()
    say(table.assign(bytes=table["bytes"].map(format_bytes)).round({"seconds": 2}).to_string(index=False))
    lacking = sums["blocks_without_room"]
    say(
        f"{len(table)} prompts, {sums['tokens']} tokens: {sums['blocks_added']} blocks added "
        f"({format_bytes(sums['bytes'])}), {answers} answers remembered, in {seconds:.1f} s"
        + (f"; no room for {lacking} blocks: give a larger --remember, or clear something" if lacking else "")
    )
    if args.json:
        found = {"prompts": len(table), **sums, "answers": answers, "seconds": seconds, "folder": str(default_folder())}
        print_json({"rows": table.to_dict("records"), **found})
    return 0


def _check_remembers_on_disk(size: int | None) -> None:
    if size is None:
        raise LowvramError("cache warm needs --remember SIZE, e.g. 2GiB: how much of prompts may be kept on disk")


_ACTIONS = {
    "list": ("list what is remembered of prompts, model by model", _add_list, _list),
    "explain": ("say how much of a prompt is remembered, and why no more", _add_explain, _explain),
    "clear": ("remove what is remembered, and say how much that was", _add_clear, _clear),
    "unpin": ("let prompts that were pinned go where there is need of room", _add_clear, _unpin),
    "warm": ("read prompts from a file and remember them, before anybody asks", _add_warm, _warm),
}
"""Name → what it does, what adds its arguments, what runs it."""
