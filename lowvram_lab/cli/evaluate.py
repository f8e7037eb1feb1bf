"""``lowvram evaluate``: what a compressed model lost, beside its original."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from lowvram_lab.cli.common import positive, print_json, prose, spec_of, tokens
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import check_room, fidelity, load_reference, reference_plan
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import read_text, sample_text


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``evaluate``."""
    parser.add_argument("model", metavar="MODEL", help="a converted directory, or any model with --format or --plan")
    parser.add_argument("--reference", metavar="MODEL", help="the original, as stock transformers opens it (MODEL)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--format", metavar="NAME", help="quantise while loading: int8, int4, nf4 …")
    how.add_argument("--plan", metavar="FILE", help="a plan written by lowvram plan --output")
    parser.add_argument("--text", metavar="FILE", help="what to read (the library's own small text)")
    parser.add_argument("--tokens", type=tokens, metavar="N", help="score the first N tokens only")
    parser.add_argument("--window", type=tokens, default=512, metavar="N", help="tokens together, with BOS (512)")
    parser.add_argument("--stride", type=tokens, metavar="N", help="tokens of text from window to window (all of it)")
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="activations: bf16 or fp32 (bf16)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def run_evaluate(args: argparse.Namespace) -> int:
    """Loads the model and its reference, and compares their predictions."""
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
    window = min(args.window, spec.max_position_embeddings or args.window)
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


def _evaluated_plan(args: argparse.Namespace, spec: ModelSpec, window: int):
    """The stated plan, or the model as it is, on the CPU in the dtype asked for."""
    plan = stated_format(args, spec) or Plan.uniform(spec, "stored" if spec.stored else "bf16", context=window)
    modules = {
        name: a.stored_as(args.dtype if get_format(a.format).kind == "float" else a.format).moved("cpu")
        for name, a in plan.modules.items()
    }
    return replace(plan, modules=modules, dtype=args.dtype, kv_format=args.dtype, threads=args.threads)


def stated_format(args: argparse.Namespace, spec: ModelSpec):
    """The plan that --plan or --format states, or ``None``."""
    if args.plan:
        return Plan.from_json(Path(args.plan), spec)
    if args.format:
        return Plan.uniform(spec, args.format, context=min(2048, spec.max_position_embeddings or 2048))
    return None
