"""What ``plan`` and ``forecast`` do for another machine (``--target``), and ``lowvram targets``."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowvram_lab.cli.common import plan_of_file, print_json, prose, spec_of, stated_dtype, with_settings
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.on_target import TargetChoice, forecast_on, plan_on, threads_of, to_cpu
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.planner.suited import computes_in
from lowvram_lab.rates.target import Target, find_target, targets
from lowvram_lab.units import GiB

NOT_THERE = ("gpu", "card", "cuda_context", "ram", "gpu_layers", "on_cpu", "stream_from", "low_plane")
"""Options of a machine with a GPU, or of RAM that the profile says."""

NO_RUN = ("max_context", "plot", "compare")
"""Options of ``forecast`` that are about a card or a run."""


def add_target_option(parser: argparse.ArgumentParser) -> None:
    """For what is forecast alone."""
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="another machine without a GPU instead of a card, as pi5-8gb (see lowvram targets), or its profile, a "
        ".json file: all it says is assumed",
    )


def check_target_options(args: argparse.Namespace) -> None:
    """Refuses what goes with no ``--target``.

    Raises:
        LowvramError: Names the options.
    """
    given = [f"--{name.replace('_', '-')}" for name in (*NOT_THERE, *NO_RUN) if getattr(args, name, None)]
    given += ["--gpu-layers"] if getattr(args, "gpu_layers", None) == 0 else []
    if given:
        raise LowvramError(
            f"--target is a machine without a GPU, whose profile says its RAM: leave {' and '.join(given)} out"
        )
    if args.context == "longest":
        raise LowvramError("--context longest is for a card: give --target a number of tokens")


def plan_for_target(args: argparse.Namespace) -> int:
    """``lowvram plan --target``."""
    check_target_options(args)
    target = find_target(args.target)
    _, spec = spec_of(args.model)
    if args.plan or args.format:
        if args.prefer or args.disk:
            raise LowvramError("--prefer and --disk are for the planner: give it --target, neither --format nor --plan")
        plan = _stated(args, spec, target)
        memory, speed = forecast_on(plan, target), forecast_speed(plan, machine=target.machine)
        choice = TargetChoice(target, plan, memory, speed, ("as asked for: " + memory.summary(),))
    else:
        settings = {name: getattr(args, name) for name in ("threads", "prefill_chunk", "remember", "remember_ram")}
        chosen = {"disk": args.disk, "prefer": args.prefer or "balance", "kv_format": args.kv}
        if args.disk_layers is not None or args.precision or args.dtype:
            raise LowvramError("--disk-layers, --precision and --dtype go with --format: the planner chooses that")
        choice = plan_on(spec, target, args.context or 2048, **chosen, **settings)
        choice = replace(choice, plan=replace(choice.plan, solver=args.solver or choice.plan.solver))
    if args.output:
        choice.plan.to_json(Path(args.output))
    if args.json:
        print_json(choice.to_dict())
        return 0
    for line in choice.why:
        print("-", line)
    _say(choice, print)
    print(choice.plan.table().to_string(index=False))
    if args.explain:
        for part, seconds in sorted(choice.speed.parts.items(), key=lambda item: -item[1]):
            print(f"  {seconds * 1000:8.2f} ms a token: {part} (assumed)")
    return 0


def forecast_for_target(args: argparse.Namespace) -> int:
    """``lowvram forecast --target``."""
    check_target_options(args)
    target = find_target(args.target)
    _, spec = spec_of(args.model)
    plan = _stated(args, spec, target)
    memory = forecast_on(plan, target, Workload.full_context(plan.context, batch_size=args.batch))
    memory = replace(memory, kv_bytes=memory.kv_bytes * args.batch)
    speed = forecast_speed(plan, machine=target.machine)
    choice = TargetChoice(target, plan, memory, speed, (memory.summary(),))
    if args.json:
        print_json(choice.to_dict())
        return 0
    say = prose(args)
    _say(choice, say)
    say(memory.summary())
    return 0


def _stated(args: argparse.Namespace, spec: ModelSpec, target: Target) -> Plan:
    """The plan that the options state, with everything on the CPU."""
    if args.plan:
        plan = plan_of_file(args, spec)
        plan = plan if args.disk_layers is None else to_cpu(plan, args.disk_layers)
    else:
        recipe = args.format or ("stored" if spec.as_it_is else "bf16")
        dtype = stated_dtype(args, recipe) or computes_in(recipe, spec, DryRunGpu(None, "cpu"), args.context)
        plan = Plan.uniform(spec, recipe, context=args.context or 2048, dtype=dtype)
        plan = to_cpu(plan, args.disk_layers or 0)
    plan = with_settings(args, plan)
    return replace(plan, threads=threads_of(target, plan.threads), precision=args.precision or plan.precision)


def _say(choice: TargetChoice, say: Callable[..., None]) -> None:
    """Plan, RAM, speed and what is taken for granted."""
    say(choice.target.summary())
    say(choice.plan.summary())
    say(choice.memory.table().to_string(index=False))
    say(choice.speed.summary())
    for line in choice.target.machine.assumptions(choice.plan):
        say(f"assumed: {line}")


def run_targets(args: argparse.Namespace) -> int:
    """Lists the machines that can be planned for by name."""
    table = targets()
    if args.json:
        print_json({"targets": [find_target(name).to_dict() for name in table["target"]]})
        return 0
    shown = table[["target", "title", "cores"]].assign(
        ram_gib=(table["ram_bytes"] / GiB).round(2),
        for_a_model_gib=(table["usable_bytes"] / GiB).round(2),
        memory_gb_per_s=(table["memory_bytes_per_s"] / 1e9).round(1),
        disk_mb_per_s=(table["disk_bytes_per_s"] / 1e6).round(0).astype(int),
        origin=table["origin"],
    )
    print(shown.to_string(index=False))
    print("\nAlso: a profile of your own, a .json file of the same fields (data/targets; lowvram targets --json).")
    return 0
