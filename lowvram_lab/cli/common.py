"""What the commands of ``lowvram`` share: argument types, JSON on stdout, prose where it belongs."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lowvram_lab.errors import LowvramError, UnitError
from lowvram_lab.files import cache_dir, writable
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.model.formats import LOADING_SOLVERS, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.profile import MemoryProfile
from lowvram_lab.planner.suited import names_its_dtype
from lowvram_lab.units import format_bytes, parse_bytes, parse_tokens


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, found {text!r}")
    return int(text)


def tokens(text: str) -> int:
    """An argument that is a number of tokens, as ``4096`` or ``4k``."""
    try:
        return parse_tokens(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> int:
    """An argument that is a number of bytes, as ``2GiB``."""
    try:
        return parse_bytes(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def several(kind: Callable[[str], int]) -> Callable[[str], int | tuple[int, ...]]:
    """An argument that is one value of a kind, or some with commas between them."""

    def read(text: str) -> int | tuple[int, ...]:
        values = tuple(kind(part.strip()) for part in text.split(","))
        return values[0] if len(values) == 1 else values

    return read


def share(text: str) -> float:
    """An argument between 0 and 1, as ``70%`` or ``0.7``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 70% or 0.7, found {text!r}")
    return value


def add_solver_option(parser: argparse.ArgumentParser) -> None:
    """Of weights in floats that are quantised while they are loaded."""
    parser.add_argument(
        "--solver",
        choices=LOADING_SOLVERS,
        help="of weights that are quantised while loading: search (by error), or rtn, round to nearest, which is "
        "quicker and loses more (search)",
    )


def plan_of_file(args: argparse.Namespace, spec: ModelSpec) -> Plan:
    """The plan of ``--plan``, perhaps for another context."""
    if args.dtype:
        raise LowvramError("--dtype goes with --format: a plan file says its own")
    plan = Plan.from_json(Path(args.plan), spec)
    return replace(plan, context=args.context or plan.context)


def stated_dtype(args: argparse.Namespace, recipe: str) -> str | None:
    """What ``--dtype`` says, or ``None``; refuses another than a recipe's own."""
    if args.dtype and names_its_dtype(recipe) and get_format(recipe).name != args.dtype:
        raise LowvramError(f"weights in {recipe} compute in {recipe}: leave --dtype out, or take --format {args.dtype}")
    return args.dtype


def dry_gpu(budget: GpuBudget | None) -> DryRunGpu:
    """A GPU to imitate what this machine would run a plan on: its card, or RAM in the place of one."""
    return DryRunGpu(budget, "cuda" if torch.cuda.is_available() else "cpu")


def with_settings(args: argparse.Namespace, plan: Plan) -> Plan:
    """A stated plan with what the options say beside its modules."""
    return replace(
        plan,
        threads=args.threads or plan.threads,
        kv_format=args.kv or plan.kv_format,
        stream_from=args.stream_from or plan.stream_from,
        prefill_chunk=args.prefill_chunk or plan.prefill_chunk,
        remember=args.remember or plan.remember,
        remember_ram=args.remember_ram or plan.remember_ram,
        solver=args.solver or plan.solver,
    )


def print_json(values: dict) -> None:
    """The one document that ``--json`` prints on stdout."""
    print(json.dumps(values, indent=1, ensure_ascii=False))


def prose(args: argparse.Namespace):
    """A function that prints where prose goes: on stdout, or on stderr if stdout is for JSON."""
    return lambda text="", end="\n": print(text, end=end, flush=True, file=sys.stderr if args.json else sys.stdout)


def table_note(profile: MemoryProfile) -> str:
    """What the figures of a forecast's table are: a plan's summary above it counts the weights by their tensors."""
    exact = format_bytes(profile.weights_bytes)
    return (
        f"(MiB in the allocator's blocks, which hold somewhat more than the tensors in them, {exact} of weights; "
        "reserved is the simulated CUDA allocator's)"
    )


def require_cache(source: Source) -> None:
    """Refuses to begin where a model has yet to be fetched into the cache folder and nothing can be written there.

    Raises:
        LowvramError: Says which folder, and what to set.
    """
    if source.needs_cache():
        writable(cache_dir())


def spec_of(name: str, runs: bool = False):
    """Source and spec of the model that a user named; one that is to run is refused where it cannot be fetched."""
    source = find_source(name)
    if runs:
        require_cache(source)
    return source, source.spec()
