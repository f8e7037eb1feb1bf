"""The part of the command line that chooses plans: their options, ``lowvram plan`` and ``lowvram tune``."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from lowvram_lab.cli.common import (
    add_solver_option,
    plan_of_file,
    positive,
    print_json,
    size,
    spec_of,
    stated_dtype,
    table_note,
    tokens,
    with_settings,
)
from lowvram_lab.cli.target import add_target_option, plan_for_target
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.formats import DTYPES, canonical_name, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import DEVICES, PRECISIONS, check_precision, has_low_plane
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.auto import auto_plan, remembering
from lowvram_lab.planner.constraints import ram_bytes
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.moves import head_modules
from lowvram_lab.planner.profile import SpeedProfile
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.planner.suited import RECIPES, computes_in, sixteen_bits
from lowvram_lab.planner.tune import tune
from lowvram_lab.rates.machine import Machine
from lowvram_lab.units import format_bytes, parse_bytes

LONGEST = "longest"
SIXTEEN_BITS = "16 bits"
"""A default format: which 16 bits, the card decides."""
CHOSEN = ("disk_layers", "stream_from", "prefill_chunk", "on_cpu", "low_plane")
"""Options of a stated plan that the planner chooses by itself."""


def add_plan_options(parser: argparse.ArgumentParser, *, chooses: bool = True) -> None:
    """The options that say which plan."""
    parser.add_argument("model", metavar="MODEL", help="name (see lowvram models), hub id, directory or .gguf file")
    parser.add_argument("--gpu", metavar="SIZE", help="the card's memory, e.g. 4GiB")
    parser.add_argument(
        "--cuda-context", metavar="SIZE", help="what of it the CUDA context takes (384MiB; 0 under 1GiB)"
    )
    if chooses:
        parser.add_argument("--ram", metavar="SIZE", help="what the CPU's part may take (no limit)")
        parser.add_argument("--disk", metavar="SIZE", help="what may stay on disk where RAM is too small (nothing)")
        parser.add_argument(
            "--prefer", metavar="NAME", help="what the planner is to prefer: balance, fidelity or speed (balance)"
        )
    longest = ", or longest: all that then fit" if chooses else ""
    parser.add_argument(
        "--context",
        type=_context if chooses else _stated_context,
        metavar="N",
        help=f"tokens, prompt and answer, as 4096 or 4k (2048){longest}",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--format",
        metavar="NAME",
        help="one recipe: fp16, bf16, fp32, int8, int6 to int2, int4-g128, int4+4, nf4, stored",
    )
    how.add_argument("--plan", metavar="FILE", help="a plan written by lowvram plan --output")
    parser.add_argument("--gpu-layers", type=int, metavar="N", help="decoder layers on the GPU, the rest on the CPU")
    parser.add_argument(
        "--on-cpu",
        choices=("embedding", "head", "both"),
        help="an end of the model on the CPU: where both are one weight, both",
    )
    parser.add_argument("--disk-layers", type=int, metavar="N", help="of the rest, the first N stay on disk")
    parser.add_argument(
        "--stream-from",
        type=tokens,
        metavar="N",
        help="from N tokens on, a prompt brings CPU layers' weights to the GPU",
    )
    parser.add_argument("--prefill-chunk", type=tokens, metavar="N", help="read prompts N tokens at a time (at once)")
    parser.add_argument("--kv", metavar="NAME", help="KV cache: int8, int4, or the activations' dtype")
    _add_arithmetic_options(parser)
    _add_plane_options(parser)
    _add_remember_options(parser)


def _add_arithmetic_options(parser: argparse.ArgumentParser) -> None:
    """In which numbers and on how many cores, and how weights get into theirs."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="activations (16 bits that suit the card; fp32 for a file's codes that run in RAM, without --gpu)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    add_solver_option(parser)


def _add_plane_options(parser: argparse.ArgumentParser) -> None:
    """Of weights in two planes."""
    parser.add_argument(
        "--low-plane", choices=DEVICES, help="where the low planes of int4+4 weights are (beside the high)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of int4+4 weights: fast (the high planes alone), precise (both), auto (both where the high are unsure)",
    )


def _add_remember_options(parser: argparse.ArgumentParser) -> None:
    """Of prompts' keys and values that are kept."""
    parser.add_argument(
        "--remember",
        type=size,
        metavar="SIZE",
        help="keep prompts' keys and values on disk for later chats, so many bytes at most, e.g. 2GiB (nothing); "
        "prompts are then read 128 tokens at a time",
    )
    parser.add_argument(
        "--remember-ram", type=size, metavar="SIZE", help="the same in RAM, for as long as the chat lives (nothing)"
    )


def add_card_option(parser: argparse.ArgumentParser) -> None:
    """For what is forecast alone: a run is on the card that is there."""
    parser.add_argument(
        "--card",
        metavar="NAME",
        help="which card, as t4, rtx3050 or sm_86: it decides which kernels run, and what they take (this machine's, "
        "or rtx3050)",
    )


def _context(text: str) -> int | str:
    return LONGEST if text.lower() == LONGEST else tokens(text)


def _stated_context(text: str) -> int:
    if text.lower() == LONGEST:
        raise argparse.ArgumentTypeError(
            "longest is for the planner (lowvram plan); --max-context says the longest that fits"
        )
    return tokens(text)


def stated_plan(args: argparse.Namespace, spec: ModelSpec, card: GpuBudget | Gpu, default_format: str | None):
    """The plan the options state, or ``None`` where they leave the choice to the planner.

    The card decides in which 16 bits a recipe computes that names none, and what ``SIXTEEN_BITS`` are.
    """
    if args.context == LONGEST and (args.plan or args.format or default_format):
        raise LowvramError("--context longest is for the planner: give it --gpu, and neither --format nor --plan")
    if args.plan:
        plan = plan_of_file(args, spec)
    elif args.format or default_format:
        recipe = args.format or ("stored" if spec.as_it_is else default_format)
        if recipe == SIXTEEN_BITS:
            recipe = sixteen_bits(spec, card, args.context)
        dtype = stated_dtype(args, recipe) or computes_in(recipe, spec, card, args.context)
        plan = Plan.uniform(spec, recipe, context=args.context or 2048, dtype=dtype)
    elif given := [f"--{name.replace('_', '-')}" for name in CHOSEN if getattr(args, name) is not None]:
        verb = "goes" if len(given) == 1 else "go"
        raise LowvramError(
            f"{' and '.join(given)} {verb} with --format or --plan: without them the planner chooses that by itself"
        )
    else:
        return None
    if args.gpu_layers is not None or args.disk_layers is not None:
        on_gpu = plan.layer_devices().count("gpu") if args.gpu_layers is None else args.gpu_layers
        plan = plan.with_gpu_layers(on_gpu, args.disk_layers)
    if args.on_cpu:
        plan = plan.with_modules(*_ends(spec, args.on_cpu), device="cpu")
    if args.low_plane:
        plan = _with_low_planes(plan, args.low_plane)
    return with_settings(args, plan)


def _with_low_planes(plan: Plan, place: str) -> Plan:
    """The low planes at a place, or where their high planes are if that is farther from the card."""
    nested = {name: assignment for name, assignment in plan.modules.items() if assignment.low}
    if not nested:
        raise LowvramError(f"--low-plane is for weights in int4+4, found {plan.summary()}")
    lows = {name: max(place, assignment.device, key=DEVICES.index) for name, assignment in nested.items()}
    return replace(
        plan, modules={**plan.modules, **{name: replace(nested[name], low=low) for name, low in lows.items()}}
    )


ENDS = ("both", "embedding", "head")


def _ends(spec: ModelSpec, name: str) -> set[str]:
    """The modules of ``--on-cpu``, and those that share a weight with them."""
    embedding = {*head_modules(spec)} if spec.tied else {spec.embedding}
    return {"embedding": embedding, "head": {*head_modules(spec)}, "both": embedding | {*head_modules(spec)}}[name]


def options_between(before: Plan, after: Plan, from_file: bool = False) -> str:
    """The options that make one stated plan another, to be given beside or instead of its own.

    Args:
        before: The stated plan.
        after: Another of the same model.
        from_file: Whether ``before`` was stated by ``--plan``, which goes with no ``--format``.

    Returns:
        Such as ``"--prefill-chunk 512 --kv int8"``; ``""`` where no options do, as for a head alone in int8. bf16 and
        fp16 count as one: a recipe's name brings its own, or the card's.
    """
    made, words = before, []
    if after.stream_from != before.stream_from or (from_file and _formats(after) != _formats(before)):
        return ""
    if _formats(after) != _formats(before):
        recipes = {name: Plan.uniform(before.spec, name, context=after.context) for name in (*RECIPES, "nf4")}
        recipe = next((name for name, plan in recipes.items() if _formats(plan) == _formats(after)), None)
        if recipe is None:
            return ""
        made, words = recipes[recipe], [f"--format {recipe}"]
        in_floats = any(get_format(assignment.format).kind != "float" for assignment in before.modules.values())
        if before.dtype == "fp32" != after.dtype and in_floats:
            words.append(f"--dtype {after.dtype}")
    made = replace(made, context=after.context, prefill_chunk=after.prefill_chunk, stream_from=before.stream_from)
    words += [f"--context {after.context}"] if after.context != before.context else []
    if (layers := after.layer_devices().count("gpu")) != made.layer_devices().count("gpu"):
        words.append(f"--gpu-layers {layers}")
        made = made.with_gpu_layers(layers)
    if _devices(made) != _devices(after):
        moved = {name: made.with_modules(*_ends(before.spec, name), device="cpu") for name in ENDS}
        found = [name for name, plan in moved.items() if _devices(plan) == _devices(after)]
        words += [f"--on-cpu {name}" for name in found[:1]]  # one option says it all, whatever it said before
        made = moved[found[0]] if found else made
    if _low_planes(made) != _low_planes(after) and after.low_planes():
        moved = {place: _with_low_planes(made, place) for place in DEVICES}
        found = [place for place, plan in moved.items() if _low_planes(plan) == _low_planes(after)]
        words += [f"--low-plane {place}" for place in found[:1]]
        made = moved[found[0]] if found else made
    words += [f"--prefill-chunk {after.prefill_chunk}"] if after.prefill_chunk != before.prefill_chunk else []
    if after.kv_format in ("int8", "int4") and after.kv_format != made.kv_format:
        words.append(f"--kv {after.kv_format}")
        made = replace(made, kv_format=after.kv_format)
    return " ".join(words) if _says(made) == _says(replace(after, threads=made.threads)) else ""


def _formats(plan: Plan) -> list[str]:
    return [assignment.format.replace("fp16", "bf16") for assignment in plan.modules.values()]


def _devices(plan: Plan) -> list[str]:
    return [assignment.device for assignment in plan.modules.values()]


def _low_planes(plan: Plan) -> list[str | None]:
    return [assignment.low for assignment in plan.modules.values()]


def _says(plan: Plan) -> tuple:
    settings = plan.context, plan.prefill_chunk, plan.stream_from, plan.threads
    return _formats(plan), _devices(plan), _low_planes(plan), plan.kv_format.replace("fp16", "bf16"), *settings


def chosen_plan(args: argparse.Namespace, spec: ModelSpec, gpu: Gpu):
    """The stated plan with its forecast, or the planner's choice; and why."""
    as_stored = args.format in (None, "stored")
    if args.precision == "fast" and as_stored and not args.plan:
        spec = spec.without_low_planes()  # nothing of them is read, then
    elif args.precision and not args.plan:
        formats = set(spec.stored.values()) if as_stored else {canonical_name(args.format)}
        check_precision(spec, args.precision, set(filter(has_low_plane, formats)))
    plan, profile, why = _chosen_plan(args, spec, gpu)
    return replace(plan, precision=args.precision or plan.precision, solver=args.solver or plan.solver), profile, why


def _chosen_plan(args: argparse.Namespace, spec: ModelSpec, gpu: Gpu):
    plan = stated_plan(args, spec, gpu, None if gpu.budget else SIXTEEN_BITS)
    if plan is not None:
        if args.prefer or args.disk:
            raise LowvramError(
                "--prefer and --disk are for the planner: give it --gpu, and neither --format nor --plan"
            )
        profile = forecast(plan, gpu)
        _check_ram(args.ram, plan)
        return plan, profile, ["as asked for: " + ("it fits" if profile.fits else "it does not fit")]
    if args.disk and not args.ram:
        raise LowvramError("--disk says what may lie on disk where --ram is too small: give --ram as well")
    ram = _model_ram(args)
    choice = auto_plan(
        spec,
        gpu,
        None if args.context == LONGEST else args.context or 2048,
        ram=ram,
        disk=args.disk,
        prefer=args.prefer or "balance",
        gpu_layers=args.gpu_layers,
        kv_format=args.kv,
        dtype=args.dtype,
        threads=args.threads,
    )
    if args.remember or args.remember_ram:
        choice = remembering(choice, gpu, disk=args.remember, ram=args.remember_ram, model_ram=ram)
    return choice.plan, choice.forecast, list(choice.why)


def _model_ram(args: argparse.Namespace) -> int | None:
    """What --ram leaves to the model beside the prompts that are remembered there; ``None`` for no limit."""
    if args.ram is None:
        return None
    left = parse_bytes(args.ram) - (args.remember_ram or 0)
    if left < 1:
        raise BudgetError(
            f"--remember-ram {format_bytes(args.remember_ram)} leaves nothing of --ram {args.ram} to the model; give "
            "more RAM, or remember less there"
        )
    return left


def _check_ram(ram: str | None, plan: Plan) -> None:
    if ram and ram_bytes(plan) > parse_bytes(ram):
        raise BudgetError(
            f"the CPU's part of this plan takes {format_bytes(ram_bytes(plan))} of RAM, found --ram {ram}; "
            "put more layers on the GPU or take a smaller format"
        )


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``plan``."""
    add_plan_options(parser)
    add_card_option(parser)
    add_target_option(parser)
    parser.add_argument("--explain", action="store_true", help="also say where bytes and seconds go")
    parser.add_argument("--output", metavar="FILE", help="write the plan as JSON, for --plan")


def run_plan(args: argparse.Namespace) -> int:
    """``lowvram plan``."""
    if args.target:
        return plan_for_target(args)
    if not args.gpu:
        raise LowvramError("expected --gpu, the card's memory, e.g. 4GiB, or --target, a machine without one")
    budget = GpuBudget.parse(args.gpu, args.cuda_context, args.card)
    _, spec = spec_of(args.model)
    plan, profile, why = chosen_plan(args, spec, DryRunGpu(budget, "cuda"))
    if args.output:
        plan.to_json(Path(args.output))
    if args.json:
        speed = _speed(plan, args.ram)
        print_json({"plan": plan.to_dict(), "forecast": profile.to_dict(), "speed": speed.to_dict(), "why": why})
        return 0
    for line in why:
        print("-", line)
    print(plan.summary())
    print(plan.table().to_string(index=False))
    if args.explain:
        print(profile.table().to_string(index=False))
        print(table_note(profile))
    print(profile.summary(), flush=True)
    speed = _speed(plan, args.ram)
    print(speed.summary())
    if args.explain:
        for part, seconds in sorted(speed.parts.items(), key=lambda item: -item[1]):
            print(f"  {seconds * 1000:8.2f} ms a token: {part}")
    return 0


def _speed(plan: Plan, ram: str | None) -> SpeedProfile:
    """The plan's forecast speed; says which rates are measured for it, where they are not known yet."""
    bar = None

    def tell(name: str) -> None:
        nonlocal bar
        if bar is None:
            print(
                "measuring how fast this machine is, for the speed: minutes the first time, and where other work "
                "disturbed it ...",
                file=sys.stderr,
            )
            bar = tqdm(unit="rate", leave=False, disable=not sys.stderr.isatty())
        bar.set_description(name, refresh=False)
        bar.update()

    for_model = max(1, parse_bytes(ram) - plan.remembered_ram_bytes) if ram else None
    found = forecast_speed(plan, machine=Machine(on_measure=tell), ram=for_model)
    if bar is not None:
        bar.close()
    return found


def add_tune(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``tune``."""
    add_plan_options(parser)


def run_tune(args: argparse.Namespace) -> int:
    """``lowvram tune``."""
    gpu = open_gpu(args.gpu, args.cuda_context)
    _, spec = spec_of(args.model, runs=True)
    plan, *_ = chosen_plan(args, spec, gpu)
    threads = [args.threads] if args.threads else None
    table = tune(plan, gpu, threads=threads, progress=sys.stderr.isatty())
    if args.json:
        print_json({"gpu": gpu.name, "plan": plan.to_dict(), "rows": table.to_dict("records")})
        return 0
    print(f"{plan.summary()}; on {gpu.name}", file=sys.stderr)
    shown = table.assign(peak_gpu_mib=(table["peak_gpu_bytes"] / 2**20).round(1)).drop(columns="peak_gpu_bytes")
    print(shown.round({"ttft_s": 3, "tokens_per_s": 1, "forecast_tokens_per_s": 1}).to_string(index=False))
    best = table.loc[table["tokens_per_s"].idxmax()]
    words = f"--gpu-layers {best['gpu_layers']:.0f} --threads {best['threads']:.0f}"
    print(f"fastest: {words} (frontier: no row is faster with as little GPU memory)", file=sys.stderr)
    return 0
