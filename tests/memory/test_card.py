"""Which card a forecast is for: by name, by capability, this machine's."""

import pytest
import torch

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import CARDS, DEFAULT, USUAL, Card, find_card, this_card


@pytest.mark.parametrize("name", ["t4", "T4", "Tesla T4", "NVIDIA T4", "sm_75", "sm75", "7.5", "SM 7.5"])
def test_the_names_of_a_card(name):
    assert find_card(name) == Card((7, 5), 40)


def test_a_capability_stands_for_a_usual_card():
    for digits, name in USUAL.items():
        assert CARDS[name].capability == (digits // 10, digits % 10)
        assert find_card(f"sm_{digits}") == CARDS[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [("rtx3060ti-ish", "rtx3060"), ("5.2", "sm_75"), ("", "t4 or"), ("card", "found 'card'"), ("4GiB", "found '4GiB'")],
)
def test_a_card_that_is_not_known(name, words):
    with pytest.raises(BudgetError, match="expected a card such as") as error:
        find_card(name)
    assert words in str(error.value)


def test_a_budget_knows_its_card():
    assert GpuBudget.parse("4GiB").card == this_card()
    assert GpuBudget.parse("4GiB", card="t4").card == CARDS["t4"]
    if not torch.cuda.is_available():
        assert this_card() == DEFAULT


def test_bf16_is_fused_from_ampere_on():
    assert [CARDS[name].fuses_bf16 for name in ("t4", "a100", "rtx3050", "h100")] == [False, True, True, True]
