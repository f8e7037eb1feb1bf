"""Other architectures than the lean decoder's: stock ``generate`` and our own decoder on them, beside transformers."""

import pytest
import torch
import transformers

from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.sampling import Sampling
from tests.helpers.tiny import SIZES, TOLERANCES, DictCheckpoint, decoded, random_ids, random_state, relative_error

ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_bigcode": {},  # one head of keys and values
    "falcon": {},  # the same, said in other words
    "gemma": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 256},
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "olmo2": {},
    "cohere": {},
}
PLACED = [(kind, split) for kind in ARCHITECTURES for split in (False, True) if (kind, split) != ("opt", True)]
"""Beside a split, OPT's learned positions are refused (``tests/model/test_refusals.py``)."""
LEAN = ("llama", "mistral", "qwen2", "qwen3")
PENALTY = 5.0  # random weights say one token over and over
OPTIONS = {
    "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": PENALTY,
}  # fmt: skip


class Heard(transformers.generation.streamers.BaseStreamer):
    """What a streamer is told: the prompt, then every token."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def both(kind, split):
    """A loaded model of an architecture, and transformers' of the same weights."""
    sizes = dict(SIZES)
    if kind in ("falcon", "gpt2", "gpt_neox", "opt", "gpt_bigcode"):  # as many as heads, or one
        del sizes["num_key_value_heads"]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, "tie_word_embeddings": False, **ARCHITECTURES[kind]})
    spec = ModelSpec.from_config(config, kind)
    state = random_state(spec)
    stock = transformers.AutoModelForCausalLM.from_config(spec.pretrained_config(), attn_implementation="sdpa")
    stock.load_state_dict(state, strict=False)
    stock.tie_weights()
    plan = Plan.uniform(spec, "fp32", context=128)
    plan = plan.with_gpu_layers(1) if split else plan
    model = load(plan, open_gpu("1000MiB"), checkpoint=DictCheckpoint(state), progress=False)
    return model, stock.eval()


@pytest.mark.parametrize(("kind", "split"), PLACED)
def test_generate_with_and_without_a_streamer_and_our_decoder_are_stock_transformers(kind, split):
    model, stock = both(kind, split)
    ids = random_ids(20)
    expected = stock.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, **OPTIONS).cpu(), expected)
    heard = Heard()
    assert torch.equal(model.generate(ids, streamer=heard, **OPTIONS).cpu(), expected)
    assert (heard.ids, heard.ended) == (expected[0].tolist(), True)
    decoder = decoder_for(model)
    assert decoder.name.startswith("the lean decoder" if kind in LEAN else f"the model's modules ({kind} is none of ")
    assert (
        list(generate(decoder, ids, max_new_tokens=10, sampling=Sampling(repetition_penalty=PENALTY)))
        == expected[0, 20:].tolist()
    )
    assert len(set(expected[0, 20:].tolist())) == 10


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_kv_cache_of_the_spec_is_the_one_that_transformers_fills(kind):
    model, stock = both(kind, split=False)
    with torch.no_grad():
        cache = stock(random_ids(9), use_cache=True).past_key_values
    spec = model.lowvram.plan.spec
    found = {tuple(each.shape) for layer in cache.layers for each in (layer.keys, layer.values)}
    assert found == {(1, spec.num_key_value_heads, 9, spec.head_dim)}
    assert len(cache.layers) == spec.num_hidden_layers


@pytest.mark.parametrize(("kind", "split"), PLACED)
def test_a_batch_of_two_is_decoded_as_stock_transformers_does_on_its_own_cache(kind, split):
    model, stock = both(kind, split)
    ids, cache = random_ids(30, batch=2), transformers.DynamicCache()
    found = decoded(decoder_for(model, 30, batch_size=2), ids, 20)
    with torch.no_grad():
        for logits, piece in zip(found, ids.split([20] + [1] * 10, dim=1), strict=True):
            expected = stock(piece, past_key_values=cache, use_cache=True).logits[:, -1]
            assert relative_error(logits, expected) < TOLERANCES["fp32"]
