"""The decode loop: what is chosen, when it stops, what the cache holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import load_tiny, random_ids, tiny_plan

from lowvram_lab.engine.decode import Sampling, choose, decode_one_token, prefill, stream
from lowvram_lab.engine.kv_cache import MeteredCache
from lowvram_lab.errors import LowvramError


@pytest.fixture(scope="module")
def model():
    return load_tiny("qwen2", tiny_plan("qwen2", "fp32"))


def run(model, tokens=10, prompt=6, **options):
    cache = MeteredCache(model.gpu)
    return list(stream(model, random_ids(prompt), cache, max_new_tokens=tokens, **options)), cache


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(logits, sampling, count=400):
    source = generator(1)
    return torch.cat([choose(logits, sampling, source) for _ in range(count)]).flatten().tolist()


def test_greedy_takes_the_largest_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose(logits, Sampling()).tolist() == [[1], [0]]
    assert choose(logits, Sampling(temperature=0, top_p=0.1, seed=5)).tolist() == [[1], [0]]


@given(st.integers(2, 30), st.floats(0.05, 1.0), st.floats(0.2, 3.0), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_sampling_stays_within_top_p(vocabulary, top_p, temperature, seed):
    logits = torch.randn(1, vocabulary, generator=generator(seed)) * 3
    probabilities = torch.softmax(logits / temperature, dim=-1)[0]
    drawn = set(draws(logits, Sampling(temperature, top_p), count=30))
    for token in drawn:  # those more likely than it do not reach top_p by themselves
        assert probabilities[probabilities > probabilities[token]].sum() < top_p + 1e-5


def test_top_p_keeps_the_token_that_crosses_it():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert set(draws(logits, Sampling(1.0, 0.4))) == {0}
    assert set(draws(logits, Sampling(1.0, 0.6))) == {0, 1}
    assert set(draws(logits, Sampling(1.0, 0.9))) == set(draws(logits, Sampling(1.0, 1.0))) == {0, 1, 2}


def test_frequencies_follow_probabilities_and_temperature():
    logits = torch.tensor([[0.7, 0.3]]).log()
    assert draws(logits, Sampling(1.0), 2000).count(0) / 2000 == pytest.approx(0.7, abs=0.05)
    assert draws(logits, Sampling(0.25), 2000).count(0) / 2000 == pytest.approx(0.7**4 / (0.7**4 + 0.3**4), abs=0.02)
    assert draws(logits, Sampling(1e-4)) == [0] * 400


@pytest.mark.parametrize(
    "setting", [{"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_sampling_out_of_range_is_refused(setting):
    with pytest.raises(LowvramError, match=f"found {next(iter(setting.values()))}"):
        Sampling(**setting)


def test_sampling_is_repeatable_by_seed(model):
    runs = [run(model, sampling=Sampling(2.0, 0.95, seed))[0] for seed in (3, 3, 4, 5)]
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs}) == 3
    torch.manual_seed(99)  # nothing outside plays a part
    assert run(model, sampling=Sampling(2.0, 0.95, 3))[0] == runs[0]


def test_greedy_is_the_default_and_repeatable(model):
    assert run(model)[0] == run(model)[0] == run(model, sampling=Sampling(seed=8))[0]


@pytest.mark.parametrize("position", [0, 3, 9])
def test_a_stop_token_ends_the_answer_and_is_not_yielded(model, position):
    tokens, _ = run(model)
    stop = tokens[position]
    found, cache = run(model, stop_ids=frozenset({stop, 100_000}))
    assert found == tokens[: tokens.index(stop)]
    assert cache.get_seq_length() == 6 + len(found)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_no_more_tokens_than_asked_and_the_last_is_not_fed_back(model, count):
    tokens, cache = run(model, tokens=count)
    assert len(tokens) == count
    assert cache.get_seq_length() == 6 + max(count - 1, 0)


def test_a_second_stream_goes_on_where_the_first_stopped(model):
    whole, _ = run(model, tokens=8)
    first, cache = run(model, tokens=4)
    rest = list(stream(model, torch.tensor([first[-1:]]), cache, max_new_tokens=4))
    assert first + rest == whole


def test_prefill_returns_the_last_logits_only(model):
    cache = MeteredCache(model.gpu)
    with torch.no_grad():
        logits = prefill(model, random_ids(5, batch=2), cache)
        step = decode_one_token(model, choose(logits, Sampling()), cache)
    assert logits.shape == step.shape == (2, 320)
    assert cache.get_seq_length() == 6
    assert not logits.requires_grad


def test_the_cache_is_charged_to_kv(model):
    before = model.gpu.meter.category_bytes("kv")
    tokens, cache = run(model, prompt=32, tokens=1)
    if model.gpu.simulated:
        assert model.gpu.meter.category_bytes("kv") - before == 3 * 2 * 32 * 2 * 32 * 4
    cache.keep(0)
    assert cache.get_seq_length() == 0
    del cache
    assert tokens
