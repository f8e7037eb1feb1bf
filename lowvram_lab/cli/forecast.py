"""``lowvram forecast``: what a model will take, and with ``--compare`` what it did."""

import argparse
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowvram_lab.cli.common import dry_gpu, positive, print_json, prose, spec_of, table_note
from lowvram_lab.cli.plan import add_card_option, add_plan_options, options_between, stated_plan
from lowvram_lab.cli.target import add_target_option, forecast_for_target
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import write_atomically
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.planner.explain import explain_oom
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.planner.search import max_context
from lowvram_lab.planner.suggest import Suggestion, suggest
from lowvram_lab.units import format_bytes


def add_forecast(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``forecast``."""
    add_plan_options(parser, chooses=False)
    add_card_option(parser)
    add_target_option(parser)
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once (1)")
    parser.add_argument("--max-context", action="store_true", help="also find the longest context that fits --gpu")
    parser.add_argument("--plot", metavar="FILE", help="draw the memory timeline into a .png, .svg or .pdf file")
    parser.add_argument("--compare", action="store_true", help="then load the weights, run it, and show the difference")


def run_forecast(args: argparse.Namespace) -> int:
    """Says what a model will take of a GPU."""
    if args.target:
        return forecast_for_target(args)
    if args.max_context and not args.gpu:
        raise LowvramError("--max-context needs --gpu: without a card every context fits")
    if args.card and (args.compare or not args.gpu):
        raise LowvramError("--card goes with --gpu and without --compare: a run is on the card that is here")
    budget = GpuBudget.parse(args.gpu, args.cuda_context, args.card) if args.gpu else None
    _check_picture(args.plot)
    _, spec = spec_of(args.model)
    gpu = open_gpu(budget) if args.compare else budget
    plan = stated_plan(args, spec, gpu or dry_gpu(None), "fp16")
    workload = Workload.full_context(plan.context, batch_size=args.batch)
    profile = forecast(plan, gpu, workload=workload, timeline=bool(args.plot))
    found = suggest(plan, gpu) if budget and not profile.fits else []
    profile = replace(profile, suggestions=tuple(map(str, found)))
    suggestions = [_as_dict(plan, suggestion, bool(args.plan)) for suggestion in found]
    result = {**profile.to_dict(), "plan": plan.digest, "suggestions": suggestions}
    result |= {"remembered_ram_bytes": plan.remembered_ram_bytes, "remembered_disk_bytes": plan.remember or 0}
    say = prose(args)
    say(plan.summary())
    say(profile.table().to_string(index=False))
    say(table_note(profile))
    say(profile.summary())
    if plan.remembers:
        say(_remembered(plan))
    for suggestion, said in zip(found, suggestions, strict=True):
        options = said["options"]
        say(f"would fit: {suggestion}{options and f' ({options})'}")
    if args.max_context:
        longest = max_context(plan, gpu)
        result["max_context"] = longest.value
        say(f"longest context that fits: {longest.value} tokens")
    if args.compare:
        result |= _compare(plan, gpu, profile, say)
    if args.plot:
        _draw(profile, args.plot)
        say(f"drawn: {args.plot}")
    if args.json:
        print_json(result)
    return 0


def _remembered(plan: Plan) -> str:
    """What remembering prompts takes beside the GPU, in words."""
    blocks = plan.remembered_ram_bytes // plan.block_bytes
    return (
        f"remembered prompts take {format_bytes(plan.remembered_ram_bytes)} of RAM ({blocks} blocks of {BLOCK_TOKENS} "
        f"tokens) and at most {format_bytes(plan.remember or 0)} of disk"
    )


def _as_dict(plan: Plan, suggestion: Suggestion, from_file: bool) -> dict:
    return {**suggestion.to_dict(), "options": options_between(plan, suggestion.plan, from_file)}


def _compare(plan: Plan, gpu: Gpu, profile: MemoryProfile, say: Callable[..., None]) -> dict:
    """Loads and runs what was forecast; says where the two differ, or that both run out of memory."""
    say(f"\nmeasured on the {gpu.name}:")
    with explain_oom(suggestions=False) as oom:
        model = load(plan, gpu, progress=sys.stderr.isatty())
        measured = run_workload(model, profile.workload)
    if oom.happened:
        say(oom.summary())
        return {"measured": None, "oom": oom.to_dict()}
    table = profile.compare(measured)
    say(table.to_string(index=False))
    return {"measured": measured.to_dict(), "comparison": table.to_dict("records")}


def _check_picture(path: str | None) -> None:
    if path and Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LowvramError(f"expected a picture's name ending in .png, .svg or .pdf, found {path!r}")
    if path and not Path(path).absolute().parent.is_dir():
        raise LowvramError(f"cannot write {path}: its folder does not exist")


def _draw(profile: MemoryProfile, path: str) -> None:
    from lowvram_lab.faces.plot_memory import plot_timeline

    picture = io.BytesIO()
    plot_timeline(profile).figure.savefig(picture, format=Path(path).suffix[1:].lower(), dpi=150)
    write_atomically(Path(path), picture.getvalue())
