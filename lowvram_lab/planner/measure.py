"""Run a loaded model, or its dry run: memory by phase, and speed. What runs is the model's decoder, as in a chat."""

import time

import torch

from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.planner.profile import STAND_IN, MemoryProfile, SpeedProfile, Workload
from lowvram_lab.prefixes.ram import OWNER, Rehearsal
from lowvram_lab.sampling import Sampling, choose


def run_workload(model: torch.nn.Module, workload: Workload, last_pieces: int | None = None) -> MemoryProfile:
    """Prefills prompts of arbitrary tokens and decodes greedily, recording each phase.

    Args:
        model: From ``load``, real or on meta.
        workload: How many tokens.
        last_pieces: Of a dry run: where the plan reads prompts in pieces, read the last so many only, as if the cache
            held what is before them. They see the most, and so take the most.

    Returns:
        The profile; its ``load`` phase is the one that loading the model recorded. Whatever else lives on the GPU, a
        chat's cache say, is in the peaks too.
    """
    state = loaded(model)
    gpu, plan = state.gpu, state.plan
    recording = gpu.recording
    transferred, earlier_phases = recording.transfers.total(), len(recording.phases)
    earlier_kv = gpu.meter.category_bytes("kv")
    with gpu.phase("prefill"):
        decoder = decoder_for(model, workload.tokens, workload.batch_size, progress=False)
        remembered = Rehearsal(model, decoder.cache) if plan.remembers and workload.batch_size == 1 else None
        passed_over = 0 if last_pieces is None else _pass_over(decoder, workload.prompt_tokens, last_pieces)
        token = _read(decoder, workload.prompt_tokens - passed_over, workload.batch_size)
    if remembered:
        with gpu.phase("remember"):
            remembered.run()
    with gpu.phase("decode"):
        for _ in range(workload.new_tokens):
            token = decoder.choose(decoder.decode(token), Sampling())
    if workload.follow_up_tokens:
        with gpu.phase("second turn"):
            decoder.cache.keep(max(0, workload.tokens - workload.follow_up_tokens - 1))
            token = _read(decoder, workload.follow_up_tokens, workload.batch_size)
            decoder.choose(decoder.decode(token), Sampling())
    timeline = gpu.meter.timeline
    if timeline is state.recording.timeline:  # begun by load: what is freed from here on is not the run's
        gpu.meter.timeline = None
    return MemoryProfile(
        model=plan.model,
        origin="forecast" if gpu.meta else "measured",
        gpu=gpu.name,
        engine=decoder.name,
        budget=gpu.budget,
        weights_bytes=plan.weight_bytes("gpu"),
        cpu_weights_bytes=plan.weight_bytes("cpu"),
        disk_weights_bytes=plan.weight_bytes("disk"),
        remembered_bytes=dict(gpu.meter.holders("cpu")).get(OWNER, 0),
        kv_bytes=gpu.meter.category_bytes("kv") - earlier_kv,
        phases=(state.recording.phases[0], *recording.phases[earlier_phases:]),
        workload=workload,
        first_oom=recording.first_oom,
        timeline=timeline,
        transferred_bytes=recording.transfers.total() - transferred,
    )


def _pass_over(decoder: Decoder, tokens: int, last_pieces: int) -> int:
    """Makes a dry run's cache hold all of a prompt but its last pieces; how many tokens that is."""
    plan = loaded(decoder.model).plan
    chunk = BLOCK_TOKENS if plan.remembers else plan.prefill_chunk  # a block begins new pieces
    if chunk is None:
        return 0
    held = max(0, -(-tokens // chunk) - last_pieces) * chunk
    decoder.cache.holds(held)
    return held


def _read(decoder: Decoder, tokens: int, batch_size: int) -> torch.Tensor:
    """Reads so many arbitrary tokens; returns the next of each sequence, ``(batch, 1)``."""
    device = "meta" if loaded(decoder.model).gpu.meta else "cpu"
    ids = torch.ones(batch_size, tokens, dtype=torch.long, device=device)
    return choose(decoder.prefill(ids), Sampling())


def where_it_runs(plan: Plan, gpu: str) -> str:
    """What runs a plan, in words: the GPU so called, or the CPU alone where no layer is on it."""
    return gpu if "gpu" in plan.layer_places() else "this CPU"


def run_speed(model: torch.nn.Module, workload: Workload, decoder: Decoder | None = None) -> SpeedProfile:
    """Times one prompt and greedy decoding, once, without metering. Timings on a shared machine vary: repeat them.

    Args:
        model: From ``load``, not a dry run.
        workload: How many tokens.
        decoder: One of this model's with room for them, whose cache is emptied; by default a new one.
    """
    state = loaded(model)
    decoder = decoder or decoder_for(model, workload.tokens, progress=False)  # with the meter: it knows places
    with state.gpu.unmetered():
        decoder.cache.keep(0)
        started = time.perf_counter()
        token = _read(decoder, workload.prompt_tokens, 1)
        int(token)  # waits for the device
        first = time.perf_counter()
        for _ in range(workload.new_tokens):
            token = decoder.choose(decoder.decode(token), Sampling())
            int(token)
        ended = time.perf_counter()
    return SpeedProfile(
        where=where_it_runs(state.plan, STAND_IN if state.gpu.simulated else state.gpu.name),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        ttft_s=first - started,
        decode_tokens_per_s=workload.new_tokens / (ended - first),
        engine=decoder.name,
    )
