"""The table of what a remembered prompt is worth: its figures are measured, and the model is left as it was."""

import numpy as np
import pandas
import pytest

from lowvram_lab.chat.first_token import break_even, first_token_table
from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.plot_prefixes import plot_first_token
from tests.prefixes.test_bits import loaded_tiny


def test_cold_and_warm_are_timed_and_compared():
    model = loaded_tiny("llama", "half", ram=None, disk=None)
    plan = model.lowvram.plan
    table = first_token_table(model, (128, 512), rounds=2, progress=False)
    assert list(table["tokens"]) == [128, 512]
    assert list(table["bytes"]) == [plan.block_bytes, 4 * plan.block_bytes]
    assert table["same"].all()
    assert (table[["cold", "disk", "RAM"]] > 0).all(axis=None)
    assert model.lowvram.plan == plan


@pytest.mark.parametrize("prefix", [0, 100, 1024, -128])
def test_a_prefix_that_is_none_is_refused(prefix):
    model = loaded_tiny("llama", ram=None, disk=None)
    with pytest.raises(LowvramError, match=r"expected prefixes of 128, 256, 384 … tokens and up to 1016"):
        first_token_table(model, (prefix,), progress=False)


def test_break_even_is_where_two_lines_cross():
    tokens = np.array([128, 256, 512])
    table = pandas.DataFrame({"tokens": tokens, "cold": 2e-3 * tokens, "disk": 0.05 + 1e-3 * tokens})
    assert break_even(table) == pytest.approx(50)
    assert break_even(table.assign(disk=0.0 * tokens)) == pytest.approx(0, abs=1e-9)
    assert break_even(table.assign(disk=3e-3 * tokens)) == float("inf")


def test_the_picture_has_a_line_a_way_and_the_break_even():
    tokens = np.array([128, 256, 512])
    table = pandas.DataFrame({"tokens": tokens, "cold": 2e-3 * tokens, "disk": 0.05 + 1e-3 * tokens})
    table = table.assign(RAM=table["disk"])
    ax = plot_first_token(table)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["read", "put back from disk", "put back from RAM", "equally long from\n50 tokens on (by lines)"]
    assert plot_first_token(table, ax) is ax
