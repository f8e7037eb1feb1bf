"""Run a loaded model, or its dry run: memory by phase, and speed. What is run is the model's decoder, as in a chat."""

import functools
import time

import torch

from lowvram_lab.engine.caches import MeteredStaticCache, new_cache
from lowvram_lab.engine.decode import decode_one_token, prefill
from lowvram_lab.engine.sampling import Sampling, choose, choose_beams
from lowvram_lab.errors import PlanError
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.planner.profile import STAND_IN, MemoryProfile, SpeedProfile, Workload


@torch.no_grad()
def run_workload(model, workload: Workload) -> MemoryProfile:
    """Prefills prompts of arbitrary tokens and decodes, greedily or by beams, recording each phase.

    Args:
        model: From ``load``, real or on meta.
        workload: How many tokens.

    Returns:
        The profile; its ``load`` phase is the one that loading the model recorded. Whatever else lives on the GPU, a
        chat's cache say, is in the peaks too.
    """
    gpu: Gpu = model.gpu
    before, earlier_phases = sum(gpu.transfers.values()), len(gpu.phases)
    earlier_kv = gpu.meter.category_bytes("kv")
    device = "meta" if gpu.meta else "cpu"
    ids = torch.ones(workload.rows, workload.prompt_tokens, dtype=torch.long, device=device)
    cache = _make_cache(model, workload)
    with gpu.phase("prefill"):
        step = _first_step(model, ids, cache, workload)
    with gpu.phase("decode"):
        for _ in range(workload.new_tokens):
            step = step()
    if workload.follow_up_tokens:
        with gpu.phase("second turn"):
            cache.keep(max(0, workload.tokens - workload.follow_up_tokens - 1))
            message = torch.ones(workload.rows, workload.follow_up_tokens, dtype=torch.long, device=device)
            _first_step(model, message, cache, workload)()
    timeline = gpu.meter.timeline
    if timeline is model.timeline:  # begun by load: what is freed from here on is not the run's
        gpu.meter.timeline = None
    return MemoryProfile(
        model=model.plan.model,
        origin="forecast" if gpu.meta else "measured",
        gpu=gpu.name,
        budget=gpu.budget,
        weights_bytes=model.plan.weight_bytes(model.spec, "gpu"),
        cpu_weights_bytes=model.plan.weight_bytes(model.spec, "cpu"),
        disk_weights_bytes=model.plan.weight_bytes(model.spec, "disk"),
        kv_bytes=gpu.meter.category_bytes("kv") - earlier_kv,
        phases=(model.load_phase, *gpu.phases[earlier_phases:]),
        workload=workload,
        first_oom=gpu.meter.first_oom,
        timeline=timeline,
        transferred_bytes=sum(gpu.transfers.values()) - before,
    )


def _make_cache(model, workload: Workload):
    if workload.cache == "static":
        if model.plan.kv_format in ("int8", "int4"):
            found = model.plan.kv_format
            raise PlanError(f"a static cache holds the plan's dtype, found kv_format {found}; use a growing cache")
        return MeteredStaticCache(model.gpu, model.config, workload.tokens)
    return new_cache(model, workload.tokens, workload.rows)


def _first_step(model, ids, cache, workload: Workload):
    """Prefills; returns a function that decodes one token and returns the function for the next."""
    logits = prefill(model, ids, cache)
    if workload.num_beams == 1:
        return functools.partial(_greedy_step, model, cache, choose(logits, Sampling()))
    scores = logits.new_zeros(workload.rows, 1, dtype=torch.float32)
    return functools.partial(_beam_step, model, cache, workload, *_beams(model, logits, scores, workload))


def _greedy_step(model, cache, token):
    return functools.partial(_greedy_step, model, cache, choose(decode_one_token(model, token, cache), Sampling()))


def _beam_step(model, cache, workload, token, scores, rows):
    cache.reorder_cache(rows)
    chosen = _beams(model, decode_one_token(model, token, cache), scores, workload)
    return functools.partial(_beam_step, model, cache, workload, *chosen)


def _beams(model, logits, scores, workload: Workload):
    meter = model.gpu.meter
    with meter.scope(place=meter.place_of(logits)):
        return choose_beams(logits, scores, workload.num_beams)


def where_it_runs(plan, spec, gpu: str) -> str:
    """What runs a plan, in words: the GPU so called, or the CPU alone where no layer is on it."""
    return gpu if "gpu" in plan.layer_places(spec) else "this CPU"


@torch.no_grad()
def run_speed(model, workload: Workload, decoder=None) -> SpeedProfile:
    """Times one prompt and greedy decoding, once, without metering. Timings on a shared machine vary: repeat them.

    Args:
        model: From ``load``, not a dry run.
        workload: How many tokens.
        decoder: From ``decoder_for``, its cache empty; by default the model's modules decode.
    """
    gpu: Gpu = model.gpu
    ids = torch.ones(1, workload.prompt_tokens, dtype=torch.long)
    with gpu.unmetered():
        cache = decoder.cache if decoder else new_cache(model, workload.tokens + 1)
        decode = decoder.decode if decoder else functools.partial(decode_one_token, model, cache=cache)
        started = time.perf_counter()
        token = choose(prefill(model, ids, cache), Sampling())
        int(token)  # waits for the device
        first = time.perf_counter()
        for _ in range(workload.new_tokens):
            token = choose(decode(token), Sampling())
            int(token)
        ended = time.perf_counter()
    where = where_it_runs(model.plan, model.spec, STAND_IN if gpu.simulated else gpu.name)
    return SpeedProfile(
        where, workload.prompt_tokens, workload.new_tokens, first - started, workload.new_tokens / (ended - first)
    )
