"""How fast a plan will run: the parts of a forward pass, each at this machine's measured rate, added up.

A prompt is read by the model's modules, a token is decoded by the decoder that ``decoder_for`` gives, and each has its
own rates: products, attention over what is cached, everything small that happens in a layer whatever its size, hidden
states that cross between CPU and GPU, weights that travel for a long prompt or come from disk. The same
``SpeedProfile`` as ``run_speed`` measures, so the two subtract.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import math
from collections import Counter, defaultdict
from dataclasses import replace

from lowvram_lab.decoding.kinds import GRAPHS, MODULES
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.planner.measure import where_it_runs
from lowvram_lab.planner.profile import STAND_IN, SpeedProfile, Workload
from lowvram_lab.rates.any_machine import AnyMachine
from lowvram_lab.rates.machine import Machine
from lowvram_lab.rates.profile import ASSUMED

FEW_TOKENS = 64
"""Decoded after the prompt where no workload is given."""

ESCALATED = 0.5
"""Tokens that ``auto`` decodes by both planes, as a share of all: SmolLM2-135M's at one flip in a hundred. The text and
the model decide."""


def forecast_speed(
    plan: Plan, workload: Workload | None = None, machine: AnyMachine | None = None, ram: int | None = None
) -> SpeedProfile:
    """Forecasts first-token latency and decoding speed of a plan on this machine or a target, without loading it.

    Args:
        plan: The plan.
        workload: Prompt and answer; by default a prompt of half the context and ``FEW_TOKENS`` more.
        machine: Its rates; by default this machine's, measured now where they are not known. Or those of another
            machine, ``Target.machine``.
        ram: Bytes of RAM there are for the model. Weights on disk for which there is room beside those of the CPU stay
            in the system's cache; else all of them are read for every token. By default what is free now, or what a
            target's profile has for a model.

    Returns:
        A profile with origin ``"forecast"``, or ``"assumed"`` where the machine is a target's. It is of the decoder
        that ``decoder_for`` would give; ``parts`` has the seconds
        of one decoded token by what takes them, ``rates`` how old and how steady the rates are. Weights in two planes
        are decoded by those that the plan's precision says, one token a pass; what drafts gain is
        ``forecast_speculation``'s.
    """
    machine = machine or Machine()
    assumed = machine.origin == ASSUMED
    if workload is None:
        prompt = max(1, plan.context // 2)
        workload = Workload(prompt, max(1, min(FEW_TOKENS, plan.context - prompt)))
    _, name = machine.engine_of(plan)
    first = _prompt(plan, machine, workload.prompt_tokens, ram)
    cached = workload.prompt_tokens + workload.new_tokens // 2
    parts = token_parts(plan, machine, cached, both=plan.decodes_by in (None, "precise"))
    if plan.decodes_by == "auto":
        parts["unsure tokens by both planes"] = ESCALATED * sum(token_parts(plan, machine, cached, both=True).values())
    parts["weights from disk"] += _disk_seconds(plan, machine, ram)
    return SpeedProfile(
        where=machine.name if assumed else where_it_runs(plan, machine.name if machine.cuda else STAND_IN),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        ttft_s=sum(first.values()),
        decode_tokens_per_s=1 / sum(parts.values()),
        origin=machine.origin,
        parts=dict(+parts),
        engine=name,
        rates=machine.words(),
    )


def stream_threshold(plan: Plan, machine: AnyMachine | None = None) -> int | None:
    """The shortest prompt for which it is faster to send the CPU layers' weights to the GPU than to compute there.

    A layer's weights take as long to send for one token as for a thousand, its arithmetic on the CPU does not.

    Args:
        plan: The plan; its own ``stream_from`` does not matter.
        machine: See ``forecast_speed``.

    Returns:
        Tokens, for ``Plan.stream_from``; ``None`` where nothing within the context is long enough, where no layer is
        off the GPU, or where there is no CUDA card: the stand-in computes no faster than the CPU it is.
    """
    machine = machine or Machine()
    if all(device == "gpu" for device in plan.layer_devices()) or machine.link() is None:
        return None

    def gains(tokens: int) -> bool:
        resident, travelling = replace(plan, stream_from=None), replace(plan, stream_from=2)
        seconds = [sum(_prompt(each, machine, tokens, None).values()) for each in (travelling, resident)]
        return seconds[0] < seconds[1]

    low, high = 1, plan.context  # gains is false at low
    if high < 2 or not gains(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle) else (middle, high)
    return high


def _prompt(plan: Plan, machine: AnyMachine, tokens: int, ram: int | None) -> Counter:
    """Seconds of reading a prompt by the model's modules, by part, at once or in the plan's pieces."""
    chunk = min(plan.piece_tokens or tokens, tokens)
    whole, rest = divmod(tokens, chunk)
    before = whole * chunk
    parts: Counter = Counter()
    for length, count, pairs in (
        (chunk, whole, (before - 1) * before / 2),
        (rest, int(rest > 0), (tokens - 1) * tokens / 2 - (before - 1) * before / 2),
    ):
        if count:
            piece, pair_s = _piece(plan, machine, length)
            parts.update({part: count * seconds for part, seconds in piece.items()})
            parts["attention"] += pairs * pair_s
    parts["weights from disk"] += (whole + int(rest > 0)) * _disk_seconds(plan, machine, ram)
    return +parts


def _piece(plan: Plan, machine: AnyMachine, tokens: int) -> tuple[Counter, float]:
    """Seconds of one piece of a prompt without attention, by part, and those of a pair of tokens that see each other.

    Only a piece's last token goes through the head.
    """
    spec = plan.spec
    parts: Counter = Counter()
    away = _Travel(plan, machine) if plan.stream_from is not None and tokens >= plan.stream_from else None
    places = plan.layer_places() if away is None or not away.layers else ["gpu"] * spec.num_hidden_layers
    for module in spec.modules:
        if module.kind != "linear":
            continue
        fed = 1 if module.name == spec.head else tokens
        for fmt, place in _planes(plan, module, both=True):
            place = "gpu" if away and module.layer in away.layers else place
            rates = machine.kernel(fmt, place, plan.threads, bool(module.tied_to))
            seconds = rates.seconds(math.prod(module.weight_shape), fed)
            parts[_label(module, fmt, place, spec)] += seconds
            if away and module.layer in away.layers:
                away.compute_s += seconds
    pair_s = 0.0
    for place in places:
        rates = machine.prompt(plan.kv_format, plan.dtype, place, plan.threads)
        parts["small operations"] += rates.layer_s + rates.width_s * (tokens - 1) * spec.hidden_size
        pair_s += rates.pair_s * _query_features(spec)
    parts["small operations"] += machine.prompt(plan.kv_format, plan.dtype, places[0], plan.threads).model_s
    parts["crossing"] += _crossing_seconds(plan, machine, places, tokens)
    if away and away.layers:
        parts["weights on their way"] += away.waiting_s()
        parts["keys and values on their way"] += away.cache_s(tokens)
    return parts, pair_s


def token_parts(plan: Plan, machine: AnyMachine, cached: int, *, both: bool = True) -> Counter:
    """Seconds of one decoded token by the engine that decodes, by part.

    Args:
        plan: The plan.
        machine: Its rates.
        cached: Tokens in the cache.
        both: Of weights in two planes, multiply by both; else by the high ones.
    """
    spec = plan.spec
    engine, _ = machine.engine_of(plan)
    apart = plan.apart()
    if both and apart and machine.cuda:
        engine = MODULES  # a graph cannot wait for the CPU
    parts: Counter = Counter()
    places = plan.layer_places()
    engines = {"gpu": engine, "cpu": machine.off_card(plan) if engine == GRAPHS else engine}
    keys, formats = _key_features(spec), defaultdict(list)
    planes = [
        (module, *plane) for module in spec.modules if module.kind == "linear" for plane in _planes(plan, module, both)
    ]
    for module, fmt, place in planes:
        rows, columns = module.weight_shape
        if module.layer is not None:
            formats[module.layer].append(fmt)
        tied, is_head = bool(module.tied_to), module.name == spec.head
        if engine == MODULES or is_head and machine.leaves_to_module(module, get_format(fmt), place):
            rates = machine.kernel(fmt, place, plan.threads, tied)
            seconds = rates.seconds(rows * columns)
        else:
            product = machine.product(engines[place], fmt, (rows, columns), place, plan.threads, tied)
            seconds = product.weight_s * rows * columns
        parts[_label(module, fmt, place, spec)] += seconds
    around = 0.0
    for index, place in enumerate(places):
        for fmt, count in Counter(formats[index]).items():
            rates = machine.token(engines[place], fmt, plan.kv_format, plan.dtype, place, plan.threads)
            parts["small operations"] += rates.layer_s * count / len(formats[index])
        attention = machine.attention(
            engines[place], plan.kv_format, plan.dtype, place, plan.threads, formats[index][0]
        )
        parts["attention"] += cached * (attention.query_s * _query_features(spec) + attention.key_s * keys[index])
        around = around or rates.model_s
    parts["small operations"] += around
    parts["crossing"] += _crossing_seconds(plan, machine, places, 1)
    if both and apart and (link := machine.link()):
        parts["activations to the low planes and back"] += 2 * len(apart) * link.crossing_s
    return +parts


def _planes(plan: Plan, module: ModuleSpec, both: bool) -> list[tuple[str, str]]:
    """Format and place of each plane of a module's weight; of the high one alone, or of both."""
    assignment = plan.modules[module.name]
    fmt = get_format(assignment.format)
    high = [(fmt.plane.name, compute_place(assignment.device))]
    return [*high, (fmt.low_plane.name, compute_place(assignment.low))] if both and assignment.low else high


def _query_features(spec: ModelSpec) -> int:
    return spec.num_attention_heads * spec.head_dim


def _key_features(spec: ModelSpec) -> list[int]:
    """Of each layer, the features of a cached token's key, or as many of its value: what it reads, whoever keeps it."""
    found: list[int] = []
    for held in spec.kv_layers:
        found.append(held.features // 2 if held else found[-1])
    return found


def _label(module: ModuleSpec, fmt: str, place: str, spec: ModelSpec) -> str:
    return "head" if module.name == spec.head else f"{fmt} weights on the {place}"


class _Travel:
    """Weights on their way to the GPU, one layer ahead of the computation.

    Attributes:
        layers: Which decoder layers'.
        compute_s: What computing them takes on the GPU; counted by who adds it up.
    """

    def __init__(self, plan: Plan, machine: AnyMachine):
        spec = plan.spec
        self.plan, self.spec, self.link, self.compute_s = plan, spec, machine.link(), 0.0
        devices = plan.layer_devices()
        away = {index for index, device in enumerate(devices) if device != "gpu"}
        self.layers = away if self.link else set()  # the stand-in lies in the same RAM, and a timing does not copy
        self.size_bytes = Counter()
        for module in spec.modules:
            if module.layer in self.layers:
                self.size_bytes[devices[module.layer]] += plan.module_bytes(module)

    def waiting_s(self) -> float:
        """The first layer's weights are waited for, then whatever computing the layer before does not hide."""
        count, copy_s = len(self.layers), self.size_bytes["cpu"] / self.link.to_gpu_pinned
        beside = copy_s / count + (count - 1) / count * max(0.0, copy_s - self.compute_s)
        return beside + self.size_bytes["disk"] / self.link.to_gpu  # mapped, not page-locked: waited for

    def cache_s(self, tokens: int) -> float:
        """The new tokens' keys and values come home to the CPU."""
        return self.plan.kv_bytes(tokens, "cpu") / self.link.to_cpu


def _crossing_seconds(plan: Plan, machine: AnyMachine, places: list[str], tokens: int) -> float:
    """Hidden states on their way between places; the stand-in lies in the same RAM, and a timing does not copy."""
    spec = plan.spec
    order = [compute_place(plan.modules[spec.embedding].device), *places, compute_place(plan.modules[spec.head].device)]
    crossings = sum(here != there for here, there in zip(order, order[1:], strict=False))
    link = machine.link() if crossings else None
    if link is None:
        return 0.0
    return crossings * (link.crossing_s + 2 * tokens * spec.hidden_size / min(link.to_gpu, link.to_cpu))


def _disk_seconds(plan: Plan, machine: AnyMachine, ram: int | None) -> float:
    """Weights on disk, read anew in every forward pass where RAM cannot hold them; of a lookup, next to nothing."""
    spec = plan.spec
    on_disk = plan.weight_bytes("disk")
    if not spec.tied and plan.modules[spec.embedding].device == "disk":
        on_disk -= plan.module_bytes(spec.module(spec.embedding))
    ram = machine.free_ram() if ram is None else ram
    held = plan.weight_bytes("cpu") + plan.kv_bytes(plan.context, "cpu")
    return on_disk / machine.disk().read if on_disk > max(0, ram - held) else 0.0
