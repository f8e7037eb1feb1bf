"""How fast a plan will run: the parts of a forward pass, each at this machine's measured rate, added up.

Reading weights, arithmetic, attention over what is cached, everything small that happens in a layer whatever its size,
and hidden states that cross between CPU and GPU. The same ``SpeedProfile`` as ``run_speed`` measures, so the two
subtract.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import math
from collections import Counter

from lowvram_lab.plan import Plan
from lowvram_lab.planner.rates import Machine
from lowvram_lab.profile import STAND_IN, SpeedProfile, Workload
from lowvram_lab.spec import ModelSpec

FEW_TOKENS = 64
"""Decoded after the prompt where no workload is given."""


def forecast_speed(
    plan: Plan, spec: ModelSpec, workload: Workload | None = None, machine: Machine | None = None
) -> SpeedProfile:
    """Forecasts first-token latency and decoding speed of a plan on this machine, without loading it.

    Args:
        plan: The plan.
        spec: The model.
        workload: Prompt and answer; by default a prompt of half the context and ``FEW_TOKENS`` more.
        machine: Its rates; by default this machine's, measured now where they are not known.

    Returns:
        A profile with origin ``"forecast"``; ``parts`` has the seconds of one decoded token by what takes them.
    """
    plan.validate(spec)
    machine = machine or Machine()
    if workload is None:
        prompt = max(1, plan.context // 2)
        workload = Workload(prompt, max(1, min(FEW_TOKENS, plan.context - prompt)))
    first = _forward(plan, spec, machine, workload.prompt_tokens, 0)
    parts = _forward(plan, spec, machine, 1, workload.prompt_tokens + workload.new_tokens // 2)
    where = machine.name if machine.cuda else STAND_IN
    if all(device == "cpu" for device in plan.layer_devices(spec)):
        where = "this CPU"
    return SpeedProfile(
        where=where,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        ttft_s=sum(first.values()),
        decode_tokens_per_s=1 / sum(parts.values()),
        origin="forecast",
        parts=dict(parts),
    )


def _forward(plan: Plan, spec: ModelSpec, machine: Machine, tokens: int, cached: int) -> Counter:
    """Seconds of a forward pass, by part; only the last token goes through the head."""
    parts: Counter = Counter()
    for module in spec.modules:
        if module.kind == "linear":
            fed = 1 if module.name == spec.head else tokens
            assignment = plan.modules[module.name]
            rates = machine.kernel(assignment.format, assignment.device, plan.threads, bool(module.tied_to))
            label = "head" if module.name == spec.head else f"{assignment.format} weights on the {assignment.device}"
            parts[label] += rates.seconds(math.prod(module.weight_shape), fed)
    heads = spec.config.get("num_attention_heads", spec.num_key_value_heads)
    queries, keys = heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    for place in plan.layer_devices(spec):
        rates = machine.layer(plan.kv_format, plan.dtype, place, plan.threads)
        parts["small operations"] += rates.layer_s + rates.width_s * (tokens - 1) * spec.hidden_size
        parts["attention"] += cached * (rates.cached_query_s * queries + rates.cached_kv_s * keys)
        parts["attention"] += rates.pair_s * queries * (tokens - 1) * tokens / 2
    first = machine.layer(plan.kv_format, plan.dtype, plan.layer_devices(spec)[0], plan.threads)
    parts["small operations"] += first.model_s
    if crossings := _crossings(plan, spec):
        parts["crossing"] += _crossing_seconds(crossings, tokens, spec, machine)
    return +parts


def _crossings(plan: Plan, spec: ModelSpec) -> int:
    """How often hidden states change sides in a forward pass."""
    order = [plan.modules[spec.embedding].device, *plan.layer_devices(spec), plan.modules[spec.head].device]
    return sum(a != b for a, b in zip(order, order[1:], strict=False))


def _crossing_seconds(crossings: int, tokens: int, spec: ModelSpec, machine: Machine) -> float:
    link = machine.link()
    if link is None:
        return 0.0  # the stand-in lies in the same RAM, and a timing does not copy
    return crossings * (link.crossing_s + 2 * tokens * spec.hidden_size / min(link.to_gpu, link.to_cpu))
