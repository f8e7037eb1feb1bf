"""``lowvram evaluate``: what a compressed model lost, beside its original, and whether it still generates."""

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path

from lowvram_lab.cli.chat import add_template_option, template_arguments
from lowvram_lab.cli.common import add_solver_option, positive, print_json, prose, spec_of, tokens
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.battery import battery, battery_context, battery_way, check_battery_context
from lowvram_lab.evaluation.battery_report import check_same_way
from lowvram_lab.evaluation.fidelity import check_room, fidelity, load_reference, reference_plan
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import read_text, sample_text

WINDOW = 512
"""Tokens that see each other, by default."""


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``evaluate``."""
    parser.add_argument("model", metavar="MODEL", help="a converted directory, or any model with --format or --plan")
    parser.add_argument("--reference", metavar="MODEL", help="the original, as stock transformers opens it (MODEL)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--format", metavar="NAME", help="quantise while loading: int8, int4, nf4 …")
    how.add_argument("--plan", metavar="FILE", help="a plan written by lowvram plan --output")
    parser.add_argument("--text", metavar="FILE", help="what to read (the library's own small text)")
    parser.add_argument("--tokens", type=tokens, metavar="N", help="score the first N tokens only")
    parser.add_argument("--window", type=tokens, metavar="N", help="tokens together, with BOS (512)")
    parser.add_argument("--stride", type=tokens, metavar="N", help="tokens of text from window to window (all of it)")
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="activations: bf16 or fp32 (bf16)")
    parser.add_argument(
        "--battery", action="store_true", help="short questions instead, judged by rules; with --reference in pairs"
    )
    add_template_option(parser)
    add_solver_option(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def run_evaluate(args: argparse.Namespace) -> int:
    """Loads the model and its reference, and compares their predictions; or asks them the battery."""
    if args.battery:
        return _run_battery(args)
    if args.template_argument:
        raise LowvramError("--template-argument goes with --battery, found it alone; add --battery or leave it out")
    shown = sys.stderr.isatty()
    text = read_text(args.text) if args.text else sample_text()
    source, spec = spec_of(args.model)
    source.require_tokenizer()
    if spec.stored and not args.reference:
        raise LowvramError(f"{args.model} holds quantised weights alone: name its original with --reference")
    _, original = spec_of(args.reference) if args.reference else (source, spec)
    if original.vocab_size != spec.vocab_size:
        raise LowvramError(
            f"expected a reference with the same vocabulary of {spec.vocab_size}, found {original.name} with "
            f"{original.vocab_size}"
        )
    window = WINDOW if args.window is None else args.window
    window = min(window, spec.max_position_embeddings or window)
    plan = _evaluated_plan(args, spec, window)
    check_room(plan, reference_plan(plan, original))
    model = load(plan, StandInGpu(None), progress=shown)
    reference = load_reference(plan, original, progress=shown)
    found = fidelity(
        model,
        reference,
        source.tokenizer(),
        text,
        window=window,
        stride=args.stride,
        tokens=args.tokens,
        progress=shown,
    )
    prose(args)(found.summary())
    if args.json:
        print_json(found.to_dict())
    return 0


def _run_battery(args: argparse.Namespace) -> int:
    """One model after the other, so that RAM need not hold both."""
    if unfit := [name for name in ("text", "tokens", "window", "stride") if getattr(args, name) is not None]:
        raise LowvramError(f"--battery asks questions of its own, found --{unfit[0]}; leave one of them out")
    shown, arguments = sys.stderr.isatty(), template_arguments(args)
    source, spec = spec_of(args.model)
    tokenizer = _battery_tokenizer(source)
    needed = battery_context(tokenizer, template_arguments=arguments)
    check_battery_context(args.model, spec.longest_context, needed)
    plan = _evaluated_plan(args, spec, needed)
    check_battery_context(args.plan or args.model, plan.context, needed)
    options = {"template_arguments": arguments, "progress": shown}
    if args.reference:
        other, original = spec_of(args.reference)
        its_tokenizer = _battery_tokenizer(other)
        check_battery_context(
            args.reference, original.longest_context, battery_context(its_tokenizer, template_arguments=arguments)
        )
        check_room(reference_plan(plan, original))
        check_same_way(battery_way(tokenizer), battery_way(its_tokenizer))
    found = battery(load(plan, StandInGpu(None), progress=shown), tokenizer, **options)
    if args.reference:
        gc.collect()
        found = found.beside(battery(load_reference(plan, original, progress=shown), its_tokenizer, **options))
    prose(args)(repr(found))
    if args.json:
        print_json(found.to_dict())
    return 0


def _battery_tokenizer(source: Source):
    source.require_tokenizer()
    return source.tokenizer()


def _evaluated_plan(args: argparse.Namespace, spec: ModelSpec, window: int):
    """The stated plan, or the model as it is, on the CPU in the dtype asked for."""
    plan = stated_format(args, spec) or Plan.uniform(spec, "stored" if spec.as_it_is else "bf16", context=window)
    modules = {
        name: a.stored_as(args.dtype if get_format(a.format).kind == "float" else a.format).moved("cpu")
        for name, a in plan.modules.items()
    }
    settings = {"dtype": args.dtype, "kv_format": args.dtype, "threads": args.threads}
    return replace(plan, modules=modules, solver=args.solver or plan.solver, **settings)


def stated_format(args: argparse.Namespace, spec: ModelSpec):
    """The plan that --plan or --format states, or ``None``."""
    if args.plan:
        return Plan.from_json(Path(args.plan), spec)
    if args.format:
        return Plan.uniform(spec, args.format, context=min(2048, spec.max_position_embeddings or 2048))
    return None
