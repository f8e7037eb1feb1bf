"""What can be done to a plan that takes too much, and what each move costs: the one table that the planner goes by.

``auto_plan`` searches over it, ``suggest`` names its moves, ``smaller_plans`` gives them up in a running chat. The
order of the moves is that of ``cost``, which weighs, one after the other:

1. What the CPU has to compute, weights of layers and a head, in seconds: it takes a multiple of the card's time.
2. Forecast loss, the KL to the 16-bit model in nats: of the weights' formats and of the KV cache's.
3. Forecast time of everything else, in seconds: weights that are read once more for every piece of a prompt, hidden
   states that cross, weights that are read from disk.

| move | computed by the CPU | loss | time |
|---|---|---|---|
| weights travel no more | | | a long prompt's layers on the CPU |
| embedding to the CPU (untied) | | | a hidden state of each token crosses |
| prompts in pieces | | | the weights are read once a piece |
| KV cache in int8, then int4 | | 0.0007, 0.018 | fewer bytes a token |
| weights in int8, then int4 | | 0.004, 0.4 | fewer bytes a token |
| head to the CPU (with a tied embedding) | its bytes for every token | | |
| a layer to the CPU | its bytes for every token, its products for the prompt | | |

Times are of a stated card and CPU and not of this machine: a choice must not change with what was measured last, and
only their order counts. ``prefer="speed"`` asks for this machine's rates.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.rules import odd_for_int4
from lowvram_lab.model.spec import ModelSpec

KV_LOSS = {"int8": 0.0007, "int4": 0.018}
"""KL in nats of a KV cache in these formats (SmolLM2-135M, WikiText-2: ``benchmarks/results/engine_cpu.json``)."""

FORMAT_LOSS = {
    "int4+4": 0.0026,
    "int8": 0.0043,
    "nf4": 0.41,
    "int6": 0.028,
    "int5": 0.11,
    "int4": 0.45,
    "int3": 2.2,
    "int2": 8.8,
}
"""KL in nats of all weights in a format, rounded to nearest, which ``load`` improves upon (SmolLM2-135M, WikiText-2:
``benchmarks/results/fidelity.json``). int5, int6 and int2 by the rule that a bit less quadruples the squared error,
int4+4 by its ratio to int8, 0.6. A larger model loses less, in the same order, which is all that is taken from here;
groups of other sizes count as 64."""

PREFILL_CHUNKS = (None, 2048, 1024, 512, 256)
"""Pieces that a prompt may be read in, the largest first; the shortest are still enough for products at full speed."""

MOST_PIECES = 64
"""Of one prompt. The weights are read once a piece, and beside keys and values of so long a text a piece is small."""

NEXT_TO_NOTHING = 0.001
"""A KL that ``prefer="fidelity"`` gives up for a layer on the card: that of a KV cache in int8 is below it."""

BYTES_PER_S = {"gpu": 200e9, "cpu": 25e9, "disk": 1e9}
"""Reading weights: a card of 4 to 8 GB (GeForce RTX 3050: 192 to 224 GB/s), two channels of RAM, a plain SSD."""

CPU_PRODUCTS_PER_S = 50e9
"""Multiply-adds of a prompt on a desktop CPU."""

LINK_BYTES_PER_S, CROSSING_S = 12e9, 2e-5
"""PCIe 3.0 x16, and the wait for one small copy."""

ANSWER = 64
"""Tokens decoded behind a prompt of half the context: the exchange that moves are weighed by, as ``forecast_speed``."""


def forecast_loss(plan: Plan) -> float:
    """KL to the 16-bit model in nats, by the tables above; each format counts for its share of the weights."""
    return weights_loss(plan) + KV_LOSS.get(plan.kv_format, 0.0)


def weights_loss(plan: Plan) -> float:
    """The part of ``forecast_loss`` that comes from the weights. A converted model's formats are as given: none."""
    if plan.spec.stored:
        return 0.0
    lost = total = 0.0
    for module in plan.spec.modules:
        if module.kind in ("linear", "embedding"):
            weights = math.prod(module.weight_shape)
            total += weights
            chosen = plan.modules[module.name].format
            kept = chosen == plan.spec.held.get(module.name) and module.name not in plan.spec.rounded
            if not kept:  # of the codes that a file holds nothing is lost
                lost += weights * FORMAT_LOSS.get(chosen.partition("-")[0], 0.0)
    return lost / total if total else 0.0


def off_card_seconds(plan: Plan, asked_layers: int | None = None) -> float:
    """Seconds that the CPU computes for one exchange: weights of layers and head that are not on the GPU.

    Args:
        plan: The plan.
        asked_layers: Layers that the user wants on the GPU: the others are no loss. ``None`` for all.
    """
    prompt, answer = _exchange(plan)
    total, seconds = plan.spec.num_hidden_layers, 0.0
    wanted = range(0 if asked_layers is None else total - asked_layers, total)
    for module in plan.spec.modules:
        is_head = module.name == plan.spec.head
        if module.kind != "linear" or compute_place(plan.modules[module.name].device) == "gpu":
            continue
        if is_head or module.layer in wanted:
            weights = math.prod(module.weight_shape)
            size = get_format(plan.modules[module.name].format).weight_bytes(module.weight_shape)
            seconds += (1 if is_head else prompt) * weights / CPU_PRODUCTS_PER_S + answer * size / BYTES_PER_S["cpu"]
    return seconds


def other_seconds(plan: Plan) -> float:
    """Seconds of one exchange that a plan's other choices take: what is read anew, what crosses, what is on disk."""
    spec = plan.spec
    prompt, answer = _exchange(plan)
    passes = answer + math.ceil(prompt / (plan.piece_tokens or prompt))
    places = [compute_place(plan.modules[spec.embedding].device), *plan.layer_places()]
    places.append(compute_place(plan.modules[spec.head].device))
    crossings = sum(here != there for here, there in zip(places, places[1:], strict=False))
    read = {place: answer * plan.kv_bytes(prompt, place) for place in ("gpu", "cpu")} | {"disk": 0}
    for module in spec.modules:
        assignment = plan.modules[module.name]
        lookup = module.name == spec.embedding  # reads a row for each token
        planes = get_format(assignment.format).bytes_by_plane(module.weight_shape)  # of a shared weight as well
        for place, size in zip(assignment.places, planes, strict=True):
            read[place] += (prompt + answer) * size // module.weight_shape[0] if lookup else passes * size
    crossing = crossings * (passes * CROSSING_S + 2 * prompt * spec.hidden_size / LINK_BYTES_PER_S)
    return crossing + sum(size / BYTES_PER_S[place] for place, size in read.items())


def cost(plan: Plan, prefer: str = "balance", asked_layers: int | None = None) -> tuple[float, ...]:
    """What a plan costs, to be compared: the smaller the better.

    Args:
        plan: The plan.
        prefer: ``"fidelity"`` puts the loss of the weights first, then a loss of the KV cache that is more than
            ``NEXT_TO_NOTHING``; else as this module's docstring has it.
        asked_layers: See ``off_card_seconds``.
    """
    usual = (off_card_seconds(plan, asked_layers), forecast_loss(plan), other_seconds(plan))
    if prefer != "fidelity":
        return usual
    return (weights_loss(plan), 0.0 if keeps_cache(plan) else KV_LOSS[plan.kv_format], *usual)


def keeps_cache(plan: Plan) -> bool:
    """Whether the KV cache's format loses next to nothing."""
    return KV_LOSS.get(plan.kv_format, 0.0) <= NEXT_TO_NOTHING


def kv_formats(spec: ModelSpec, dtype: str) -> tuple[str, ...]:
    """The KV formats that a model's heads allow, the most precise first."""
    return (dtype, "int8") if odd_for_int4(spec) else (dtype, "int8", "int4")


def head_modules(spec: ModelSpec) -> tuple[str, ...]:
    """The modules that the head shares parameters with, and itself: they move together."""
    owners = {parameter.rpartition(".")[0] for parameter in spec.module(spec.head).shared.values()}
    return (*([spec.embedding] if spec.tied else []), *sorted(owners), spec.head)


@dataclass(frozen=True)
class Move:
    """One thing that can be done to a plan.

    Attributes:
        words: What is done.
        change: The plan, changed.
    """

    words: str
    change: Callable[[Plan], Plan]


def moves(plan: Plan) -> list[Move]:
    """What can be done to a plan that leaves layers, head and weights' formats as they are, the cheapest first."""
    spec, found = plan.spec, []
    if plan.stream_from is not None:
        words = "long prompts computed where the layers are"
        found.append(Move(words, lambda p: replace(p, stream_from=None)))
    if "gpu" in plan.low_planes():
        found.append(Move("low planes to the CPU", low_planes_to_cpu))
    if not spec.tied and plan.modules[spec.embedding].device == "gpu":
        found.append(Move("embedding to the CPU", lambda p: p.with_modules(spec.embedding, device="cpu")))
    shortest = chunk_sizes(plan.context)[-1]
    if shortest is not None and (plan.piece_tokens or plan.context) > shortest:
        found.append(in_pieces(shortest))
    order = kv_formats(spec, plan.dtype)
    return found + [_in_kv_format(kv_format) for kv_format in order[order.index(plan.kv_format) + 1 :]]


def low_planes_to_cpu(plan: Plan) -> Plan:
    """Low planes computed by the CPU, beside the card: of each product only activations cross."""
    on_card = [name for name, assignment in plan.modules.items() if assignment.low == "gpu"]
    return plan.with_modules(*on_card, low="cpu")


def chunk_sizes(tokens: int) -> list[int | None]:
    """Sizes of pieces that differ for a prompt of so many tokens, the largest first; ``None`` is all of it at once."""
    sizes = [chunk for chunk in PREFILL_CHUNKS if chunk and chunk < tokens]
    return [None, *(chunk for chunk in sizes if chunk == sizes[0] or tokens <= MOST_PIECES * chunk)]


def in_pieces(tokens: int) -> Move:
    """Prompts read so many tokens at a time; weights that travel would do so once a piece, and so stay."""
    words = f"prompts read {tokens} tokens at a time"
    return Move(words, lambda p: replace(p, prefill_chunk=tokens, stream_from=None))


def head_to_cpu(plan: Plan) -> Move | None:
    """The head, and an embedding that shares its weight, to the CPU; ``None`` where they are off the GPU already."""
    spec = plan.spec
    if plan.modules[spec.head].device != "gpu":
        return None
    words = ("embedding and head" if spec.tied else "head") + " to the CPU"
    return Move(words, lambda p: p.with_modules(*head_modules(spec), device="cpu"))


def _in_kv_format(kv_format: str) -> Move:
    stays = {"stream_from": None} if kv_format == "int4" else {}  # beside such keys and values no weights travel
    return Move(f"KV cache in {kv_format}", lambda p: replace(p, kv_format=kv_format, **stays))


def _exchange(plan: Plan) -> tuple[int, int]:
    prompt = max(1, plan.context // 2)
    return prompt, max(1, min(ANSWER, plan.context - prompt))
