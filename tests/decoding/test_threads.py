"""The choice of threads, told how long tokens take: no clock is read."""

from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding import threads
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.decoding.threads import FastestThreads, thread_counts
from lowvram_lab.machine import cpu_threads
from tests.helpers.tiny import load_tiny, random_ids, tiny_plan


def decode(choice, tokens, seconds):
    """What so many tokens took in all, by a function of threads and the token's number."""
    spent = 0.0
    for number in range(tokens):
        taken = seconds(choice.count, number)
        spent += taken
        choice.took(taken)
    return spent


@pytest.mark.parametrize("fastest", [1, 4, 8])
def test_the_fastest_of_all_is_found_at_once(fastest):
    choice = FastestThreads([1, 4, 8])
    decode(choice, 12, lambda count, _: 1.0 if count == fastest else 1.7)
    assert choice.best == fastest


@pytest.mark.parametrize("worse", [1.06, 1.5, 3.0, 250.0])
def test_trying_the_others_costs_little(worse):
    """250: with a busy core, a token of 150 waits of 8 ms."""
    choice = FastestThreads([1, 2])
    decode(choice, 8, lambda count, _: 1.0 if count == 1 else worse)
    spent = decode(choice, 5000, lambda count, _: 1.0 if count == 1 else worse)
    assert spent / 5000 < 1 + 1.1 * threads.SHARE
    assert choice.best == 1


def test_a_core_that_other_work_takes_is_seen_within_three_tokens():
    choice = FastestThreads([1, 2])

    def seconds(count, number):
        return 1.0 if count == 1 else 0.6 if number < 200 else 40.0

    decode(choice, 200, seconds)
    assert choice.best == 2
    decode(choice, 3 + threads.TRIAL, lambda count, number: seconds(count, 200 + number))
    assert choice.best == 1


def test_a_core_that_is_free_again_is_used_again():
    choice = FastestThreads([1, 2])
    decode(choice, 100, lambda count, _: {1: 1.0, 2: 5.0}[count])
    assert choice.best == 1
    decode(choice, 300, lambda count, _: {1: 1.0, 2: 0.6}[count])
    assert choice.best == 2


def test_noise_does_not_make_it_waver():
    noise = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.9
    choice, used = FastestThreads([1, 2]), []

    def seconds(count, number):
        used.append(count)
        return float(noise[number]) * {1: 1.0, 2: 0.8}[count]

    decode(choice, 4000, seconds)
    assert used[20:].count(1) < 0.1 * 4000


def test_a_single_pause_changes_nothing():
    choice = FastestThreads([1, 2])
    decode(choice, 50, lambda count, number: 9.0 if number == 40 else {1: 1.0, 2: 0.6}[count])
    assert choice.best == 2


def test_the_numbers_are_one_half_and_all(monkeypatch):
    for most, expected in ((1, [1]), (2, [1, 2]), (3, [1, 3]), (16, [1, 8, 16])):
        monkeypatch.setattr(torch, "get_num_threads", lambda most=most: most)
        assert thread_counts() == expected


def counted(threads, tokens, monkeypatch):
    """Torch's number of threads in each token, where torch has two and a plan says so many."""
    with cpu_threads(2):
        plan = replace(tiny_plan("qwen2", "bf16"), threads=threads)
        decoder, used = LeanDecoder(load_tiny("qwen2", plan), compiled=False), []
        run = decoder._run

        def noting(*given):
            used.append(torch.get_num_threads())
            return run(*given)

        monkeypatch.setattr(decoder, "_run", noting)
        decoder.prefill(random_ids(4))
        for _ in range(tokens):
            decoder.decode(torch.ones(1, 1, dtype=torch.long))
        assert torch.get_num_threads() == 2
    return used


def test_a_decoder_tries_them_and_leaves_torchs_number_as_it_was(monkeypatch):
    assert set(counted(None, 8, monkeypatch)) == {1, 2}


def test_a_plan_that_says_a_number_is_obeyed(monkeypatch):
    assert set(counted(1, 8, monkeypatch)) == {1}
