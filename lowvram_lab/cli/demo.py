"""The whole story in one call: forecast, out of memory, plan, load, chat, validation, the running case."""

import argparse
import gc
import sys
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.cli.common import print_json, prose, require_cache, tokens
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.evaluation.effects import QUESTIONS
from lowvram_lab.evaluation.fidelity import load_reference
from lowvram_lab.evaluation.validation import ValidationReport, validate
from lowvram_lab.files import read_marker
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import describe_holders
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed, run_workload
from lowvram_lab.planner.profile import SpeedProfile, Workload
from lowvram_lab.repository.builtin import DEFAULT_FILE
from lowvram_lab.units import format_bytes

RUNNING_CASE = ("qwen1.5-4b", "4GiB", 4096)
EXIT_FAILED_VALIDATION = 1


def tell_story(model_name: str, gpu_size: str, context: int, say: Callable[..., None], *, progress: bool) -> dict:
    """Tells the story on one model and returns every figure in it.

    ``say`` prints a line, and takes ``end=`` like ``print``.

    Returns:
        Plain data with the keys ``oom``, ``plan``, ``forecast``, ``measured``, ``validation``, ``answer``, ``engine``
        and, beside them, ``turns``, ``speed``, ``weights_from`` and ``running_case``.
    """
    gpu = open_gpu(gpu_size)
    source = find_source(model_name)
    source.require_chat_template()
    spec = source.spec()

    say(f"1. Forecast: {spec.name} in fp16 on a {format_bytes(gpu.budget.total_bytes)} GPU, without a weight in RAM")
    say(f"   {forecast(Plan.uniform(spec, 'fp16', context=context), gpu).summary()}\n")

    say("2. Try it anyway")
    checkpoint, weights_from = _fetched(source, say, progress)
    spec = source.spec()  # the files decide, now that they are here
    oom = _provoke_oom(Plan.uniform(spec, "fp16", context=context), gpu_size, checkpoint, progress)
    say(f"   {oom['type']}: {oom['message']}\n" if oom else "   it fits: no need to compress\n")

    say("3. Plan")
    choice = auto_plan(spec, gpu, context)
    say("".join(f"   {line}\n" for line in (*choice.why, choice.plan.summary())))

    say(f"4. Load inside the cap, on the {gpu.name}, and chat")
    model = load(choice.plan, gpu, checkpoint=checkpoint, progress=progress)
    workload = Workload(prompt_tokens=context // 2, new_tokens=8)
    predicted = forecast(choice.plan, gpu, workload=workload)
    measured = run_workload(model, workload)
    speed = _speed(model, progress)
    session = ChatSession(model, source.tokenizer(), max_new_tokens=80, progress=progress)
    say(f"   decoded by {session.engine}")
    answers = [_converse(session, question, say) for question in QUESTIONS]
    foretold = {"forecast": predicted, "measured": measured, "speed": speed}
    report = _validated(session, foretold, checkpoint, say, progress)

    return {
        "oom": oom,
        "plan": choice.plan.to_dict(),
        "forecast": predicted.to_dict(),
        "measured": measured.to_dict(),
        "validation": report.to_dict(),
        "answer": answers[0],
        "answers": answers,
        "engine": session.engine,
        "turns": [turn.to_dict() for turn in session.turns],
        "speed": speed.to_dict(),
        "weights_from": weights_from,
        "running_case": _running_case(say),
    }


def _validated(
    session: ChatSession, foretold: dict, checkpoint: Checkpoint, say: Callable[..., None], progress: bool
) -> ValidationReport:
    """Holds the chat against its weights in 16 bits and its forecasts."""
    say("\n5. Validate against the same weights in 16 bits, as stock transformers computes with them")
    state = session.model.lowvram
    reference = load_reference(state.plan, checkpoint=checkpoint, progress=progress)
    report = validate(session, reference=reference, **foretold, progress=progress)
    say(report.table().to_string(index=False))
    say(f"   {report.summary()}\n")
    return report


def _fetched(source: Source, say: Callable[..., None], progress: bool) -> tuple[Checkpoint, str]:
    """A model's weights, and where they come from, in words."""
    checkpoint = source.checkpoint(progress)
    # a .gguf file that is not read as it is has a directory made of it, whose marker names a path
    place = (source.path(progress) if source.kind == "gguf" else checkpoint.files[0]).parent
    weights_from = (read_marker(place) or {}).get("source", source.public_name)
    say(f"   weights from {weights_from}")
    return checkpoint, weights_from


def _provoke_oom(plan: Plan, gpu_size: str, checkpoint: Checkpoint, progress: bool) -> dict | None:
    """Really loads the plan under the cap; returns what the error said, or ``None`` if there was none."""
    gpu = open_gpu(gpu_size)
    try:
        load(plan, gpu, checkpoint=checkpoint, progress=progress)
    except torch.OutOfMemoryError as error:
        event = error.lowvram.event
        return {
            "type": "torch.OutOfMemoryError" + (" (simulated)" if gpu.simulated else ""),
            "message": str(error) if gpu.simulated else f"{error} Held by: {describe_holders(event.holders)}.",
            "phase": event.phase,
            "module": event.module,
            "requested_bytes": event.requested_bytes,
            "allocated_bytes": event.allocated_bytes,
            "held_by": [{"module": module, "bytes": size} for module, size in event.holders[:10]],
        }
    finally:
        gc.collect()
        if not gpu.simulated:
            torch.cuda.empty_cache()
    return None


def _speed(model: PreTrainedModel, progress: bool) -> SpeedProfile:
    """That of the decoder which will chat, warm."""
    decoder = decoder_for(model, progress=progress)
    run_speed(model, Workload(prompt_tokens=8, new_tokens=2), decoder)
    decoder.cache.reset()
    return run_speed(model, Workload(prompt_tokens=64, new_tokens=64), decoder)


def _converse(session: ChatSession, question: str, say: Callable[..., None]) -> str:
    say(f"   > {question}\n   ", end="")
    answer = ""
    for piece in session.send(question):
        say(piece, end="")
        answer += piece
    turn = session.turns[-1]
    say(f"\n   [first token after {turn.ttft_s:.2f} s, peak {format_bytes(turn.peak_bytes)}]")
    return answer


def _running_case(say: Callable[..., None]) -> dict:
    name, size, context = RUNNING_CASE
    source = find_source(name)
    spec = source.spec(name)
    say(f"6. The same for {name} on a {size} card, from its config alone, context {context}")
    naive = forecast(Plan.uniform(spec, "fp16", context=context), size)
    say(f"   fp16: {naive.summary()}")
    choice = auto_plan(spec, size, context)
    say(f"   plan: {choice.plan.summary()}")
    say(f"   {choice.forecast.summary()}")
    return {"fp16": naive.to_dict(), "planned": choice.forecast.to_dict(), "why": list(choice.why)}


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``demo``."""
    parser.add_argument("model", nargs="?", default=DEFAULT_FILE, metavar="MODEL", help=f"default {DEFAULT_FILE}")
    parser.add_argument("--gpu", default="112MiB", metavar="SIZE", help="the card to be (112MiB)")
    parser.add_argument("--context", type=tokens, default=1024, metavar="N", help="tokens to plan for (1024)")


def run_demo(args: argparse.Namespace) -> int:
    """Tells the story; exit status 1 where the validation failed."""
    require_cache(find_source(args.model))
    result = tell_story(args.model, args.gpu, args.context, prose(args), progress=sys.stderr.isatty())
    if args.json:
        print_json(result)
    return 0 if result["validation"]["passed"] else EXIT_FAILED_VALIDATION
