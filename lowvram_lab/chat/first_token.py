"""What a remembered prompt is worth: seconds to the first token cold and warm, and from which length on it pays.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import replan
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes.store import Remembered

BEHIND = 8
"""Tokens behind a prefix: a short question."""


def first_token_table(
    model: torch.nn.Module, prefixes: Sequence[int] = (128, 256, 512, 1024), rounds: int = 3, progress: bool = True
) -> pandas.DataFrame:
    """Times a prompt of arbitrary tokens to its logits: read whole, and put back from disk and from RAM, in turns.

    Args:
        model: From ``load``; its plan remembers while this is measured, in a folder of its own.
        prefixes: Tokens of the beginning that is remembered, whole blocks of 128; 8 more come behind it.
        rounds: Of which the medians are; one before them is not counted.
        progress: Show a bar.

    Returns:
        ``tokens``, ``cold``, ``disk``, ``RAM`` (seconds), ``cold / disk`` (the median of the rounds' own ratios),
        ``bytes`` and ``same`` (whether all three logits are equal in every bit). A DataFrame.

    Raises:
        LowvramError: A prefix that is no whole number of blocks, or that the plan's context has no room for.
    """
    plan = loaded(model).plan
    for tokens in prefixes:
        if tokens <= 0 or tokens % BLOCK_TOKENS or tokens + BEHIND > plan.context:
            raise LowvramError(
                f"expected prefixes of 128, 256, 384 … tokens and up to {plan.context - BEHIND} (the plan's context "
                f"less {BEHIND}), found {tokens}"
            )
    room = plan.block_bytes * (sum(prefixes) // BLOCK_TOKENS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            on_disk = replace(plan, stream_from=None, remember=2 * room + (1 << 20), remember_ram=None)
            replan(model, on_disk, progress=False)
            decoder = decoder_for(model, progress=False)
            stores = {"cold": None, "disk": Remembered(model, decoder.cache, folder=Path(folder))}
            in_ram = replace(on_disk, remember=None, remember_ram=room)
            stores["RAM"] = Remembered(model, decoder.cache, plan=in_ram)
            rows = [
                _row(decoder, tokens, stores, rounds)
                for tokens in tqdm(prefixes, desc="first token", disable=not progress, leave=False)
            ]
    finally:
        replan(model, plan, progress=False)
    return pandas.DataFrame(rows)


def _row(decoder: Decoder, tokens: int, stores: dict[str, Remembered | None], rounds: int) -> dict:
    generator = torch.Generator().manual_seed(tokens)
    vocabulary = loaded(decoder.model).plan.spec.vocab_size
    ids = torch.randint(vocabulary, (tokens + BEHIND,), generator=generator).tolist()
    times, same = {name: [] for name in stores}, True
    for _ in range(rounds + 1):
        for name, store in stores.items():
            seconds, logits = _read(decoder, ids, store)
            times[name].append(seconds)
            if store is None:
                exact = logits
                for each in filter(None, stores.values()):
                    each.keep(decoder.cache, ids[:tokens], seconds * BLOCK_TOKENS / len(ids))
            same = same and torch.equal(exact, logits)
    times = {name: each[1:] for name, each in times.items()}
    gain = statistics.median(cold / warm for cold, warm in zip(times["cold"], times["disk"], strict=True))
    medians = {name: statistics.median(each) for name, each in times.items()}
    size = loaded(decoder.model).plan.block_bytes * (tokens // BLOCK_TOKENS)
    return {"tokens": tokens, **medians, "cold / disk": gain, "bytes": size, "same": same}


def _read(decoder: Decoder, ids: list[int], store: Remembered | None) -> tuple[float, torch.Tensor]:
    """Seconds to a prompt's logits, and these."""
    decoder.cache.keep(0)
    with loaded(decoder.model).gpu.unmetered():
        began = time.perf_counter()
        held = store.restore(decoder.cache, ids) if store else 0
        logits = decoder.prefill(torch.tensor([ids[held:]])).clone()
        float(logits[0, 0])  # waits for the device
        return time.perf_counter() - began, logits


def break_even(table: pandas.DataFrame, place: str = "disk") -> float:
    """From how many tokens on putting back takes less time than reading, by a straight line through each.

    Where that is below the shortest length of the table it is drawn out, not measured; 0 says that the lines cross at
    no length at all.

    Args:
        table: From ``first_token_table``.
        place: ``"disk"`` or ``"RAM"``.
    """
    (cold, begin_cold), (warm, begin_warm) = (np.polyfit(table["tokens"], table[name], 1) for name in ("cold", place))
    return float("inf") if cold <= warm else max(0.0, (begin_warm - begin_cold) / (cold - warm))
