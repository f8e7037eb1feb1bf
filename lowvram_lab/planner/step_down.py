"""What to give up when a run overflows its card after all: a sequence of plans, each smaller than the one before.

The order is the planner's own, ``moves.cost``: first what loses nothing but a little speed (weights that travel,
the embedding's place, prompts read in pieces), then a little precision (KV cache in int8, then int4), then what the CPU
computes (head and layers, whichever costs less, twice as many layers each time); and where all of that is given up,
memory of the conversation (a shorter context).
"""

from collections.abc import Iterator
from dataclasses import replace

from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.moves import head_to_cpu, moves, off_card_seconds
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT


def smaller_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans that take less of the GPU, gentlest first.

    Args:
        plan: The plan that overflowed.

    Yields:
        What was given up, in words, and the plan.
    """
    for move in moves(plan):
        plan = move.change(plan)
        yield move.words, plan
    for text, plan in _computed_by_the_cpu(plan):  # noqa: B020  (each goes on from the one before)
        yield text, plan
    while plan.context > SHORTEST_CONTEXT:
        plan = replace(plan, context=max(SHORTEST_CONTEXT, plan.context * 3 // 4))
        yield f"a context of {plan.context} tokens", plan


def _computed_by_the_cpu(plan: Plan) -> Iterator[tuple[str, Plan]]:
    left, moved = plan.layer_devices().count("gpu"), 1
    head = head_to_cpu(plan)
    while left or head:
        moved = min(moved, left)
        fewer = plan.with_gpu_layers(left - moved)
        if head and (not left or off_card_seconds(head.change(plan)) < off_card_seconds(fewer)):
            plan, text, head = head.change(plan), head.words, None
        else:
            plan, left = fewer, left - moved
            text = f"{moved} more layer{'s' if moved > 1 else ''} on the CPU, {left} left on the GPU"
            moved *= 2
        yield text, plan
