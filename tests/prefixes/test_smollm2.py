"""The built-in model itself: cold and warm are equal in every bit, and so are 200 greedy tokens behind them."""

from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.model.source import find_source
from lowvram_lab.packaged import sample_text
from lowvram_lab.prefixes.store import Remembered

PLACES = {
    "whole": lambda plan: plan,
    "split": lambda plan: plan.with_gpu_layers(12),
    "disk": lambda plan: plan.with_gpu_layers(12, disk=9),
}


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("place", PLACES)
def test_cold_and_warm(place, kv_format, tmp_path):
    source = find_source("smollm2-135m")
    plan = replace(Plan.uniform(source.spec(), "int8", context=1280), kv_format=kv_format, remember=1 << 28)
    model = load(PLACES[place](plan), open_gpu(), progress=False)
    decoder = decoder_for(model, progress=False)
    text = source.tokenizer()(sample_text()).input_ids
    for length in (1, 127, 128, 129, 1000):
        ids, found = text[length : 2 * length + 8], []
        for _ in range(2):
            store = Remembered(model, decoder.cache, folder=tmp_path)
            decoder.cache.keep(0)
            start = store.restore(decoder.cache, ids)
            logits = decoder.prefill(torch.tensor([ids[start:]])).clone()
            store.keep(decoder.cache, ids[: len(ids) // BLOCK_TOKENS * BLOCK_TOKENS], 0.1)
            rest = generate(decoder, logits.argmax(-1, keepdim=True), max_new_tokens=200)
            found.append((start, logits.view(torch.int16), list(rest)))
        (cold, cold_logits, said), (warm, warm_logits, said_again) = found
        assert (cold, warm) == (0, (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
        assert torch.equal(cold_logits, warm_logits)
        assert said == said_again
        assert len(said) == 200
