"""Cold and warm answers are equal in every bit, whatever a prompt's length, its KV format, and where layers lie."""

from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes.store import Remembered
from tests.helpers.tiny import TINY, DictCheckpoint, random_ids, tiny_plan, tiny_state

LENGTHS = (1, 127, 128, 129, 1000)


def loaded_tiny(  # noqa: PLR0913
    kind, placement="gpu", kv_format="bf16", recipe="bf16", ram=1 << 26, disk=1 << 28, state=None, **changes
):
    plan = tiny_plan(kind, recipe, placement, context=1024)
    plan = replace(plan, kv_format=kv_format, remember=disk, remember_ram=ram, **changes)
    return load(plan, open_gpu(), checkpoint=DictCheckpoint(state or tiny_state(kind)), progress=False)


def answer(model, ids, folder, tokens=8, salt=""):
    """Logits behind a prompt, the answer, and how many tokens were put back; then the prompt is remembered."""
    decoder = decoder_for(model, 1024, progress=False)
    store = Remembered(model, decoder.cache, salt, folder)
    start = store.restore(decoder.cache, ids)
    logits = decoder.prefill(torch.tensor([ids[start:]])).clone()
    whole = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
    store.keep(decoder.cache, ids[:whole], 0.1)
    first = int(logits.argmax())
    rest = list(generate(decoder, torch.tensor([[first]]), max_new_tokens=tokens)) if tokens else []
    return logits, [first, *rest], start


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu", "half", "disk"])
def test_logits_and_answers_are_the_same_cold_and_warm(kind, kv_format, placement, tmp_path):
    model = loaded_tiny(kind, placement, kv_format, ram=None)
    for length in LENGTHS:
        # the prefix, and a question behind it
        ids = random_ids(length + 3, seed=length)[0].tolist()
        cold = answer(model, ids, tmp_path)
        warm = answer(model, ids, tmp_path)
        assert cold[2] == 0
        assert warm[2] == (length + 2) // BLOCK_TOKENS * BLOCK_TOKENS
        assert torch.equal(cold[0].view(torch.int16), warm[0].view(torch.int16))
        assert cold[1] == warm[1]


@pytest.mark.usefixtures("compiling")
def test_by_compiled_layers_too_which_read_the_end_of_a_prompt(tmp_path):
    model = loaded_tiny("llama", "gpu", recipe="int8", ram=None)
    for length in (129, 130, 140, 150, 300, 1000):
        ids = random_ids(length, seed=length)[0].tolist()
        cold, warm = answer(model, ids, tmp_path), answer(model, ids, tmp_path)
        assert warm[2] == (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert torch.equal(cold[0].view(torch.int16), warm[0].view(torch.int16))
        assert cold[1] == warm[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu", "half"])
def test_on_a_card(kind, kv_format, placement, tmp_path, values):
    model = loaded_tiny(kind, placement, kv_format, ram=None)
    for length in (129, 1000):
        ids = random_ids(length + 3, seed=length)[0].tolist()
        cold, warm = answer(model, ids, tmp_path), answer(model, ids, tmp_path)
        assert warm[2] == (length + 2) // BLOCK_TOKENS * BLOCK_TOKENS
        assert torch.equal(cold[0].view(torch.int16), warm[0].view(torch.int16))
        assert cold[1] == warm[1]


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("chunk", [4, 120, 127])
def test_blocks_are_read_alike_whatever_decodes(chunk, tmp_path):
    """Pieces of a few tokens within a block, too."""
    model, found = loaded_tiny("llama", "gpu", recipe="int8", ram=None, prefill_chunk=chunk), []
    ids = random_ids(300, seed=3)[0].tolist()
    for compiled in (False, True, False):
        decoder = decoder_for(model, 1024, compiled=compiled, progress=False)
        store = Remembered(model, decoder.cache, "", tmp_path)
        decoder.prefill(torch.tensor([ids[:256]]))
        found.append({name: t.clone() for name, t in decoder.cache.held[2].span(0, 256).items()})
        assert store.keep(decoder.cache, ids[:256], 0.1)[0] == 2
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)
