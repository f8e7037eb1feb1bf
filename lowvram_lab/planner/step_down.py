"""What to give up when a run overflows its card after all: a sequence of plans, each smaller than the one before.

The order is that of what is lost: speed of long prompts (weights that travel need two buffers; prompts read in pieces),
next to nothing (KV cache in int8), then speed (layers to the CPU, twice as many each time), then memory of the
conversation (a shorter context).
"""

from collections.abc import Iterator
from dataclasses import replace

from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT

SHORT_CHUNK = 256
"""Tokens: still enough for matrix products to run at full speed."""


def smaller_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans that take less of the GPU, gentlest first.

    Args:
        plan: The plan that overflowed.

    Yields:
        What was given up, in words, and the plan.
    """
    if plan.stream_from is not None:
        plan = replace(plan, stream_from=None)
        yield "long prompts computed where the layers are", plan
    if (plan.prefill_chunk or plan.context) > SHORT_CHUNK:
        plan = replace(plan, prefill_chunk=SHORT_CHUNK)
        yield f"prompts read {SHORT_CHUNK} tokens at a time", plan
    if plan.kv_format not in ("int8", "int4"):
        plan = replace(plan, kv_format="int8")
        yield "KV cache in int8", plan
    left, moved = plan.layer_devices().count("gpu"), 1
    while left:
        moved = min(moved, left)
        left -= moved
        plan = plan.with_gpu_layers(left)
        yield f"{moved} more layer{'s' if moved > 1 else ''} on the CPU, {left} left on the GPU", plan
        moved *= 2
    while plan.context > SHORTEST_CONTEXT:
        plan = replace(plan, context=max(SHORTEST_CONTEXT, plan.context * 3 // 4))
        yield f"a context of {plan.context} tokens", plan
