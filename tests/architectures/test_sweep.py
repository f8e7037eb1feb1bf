"""The types that stock transformers runs, we run rightly or refuse by name; ``make architectures`` tries them all."""

import json
import subprocess
import sys

import pytest
import transformers

from tests.architectures.sweep import KINDS, PAGE, RESULTS, examine, page

REPRESENTATIVES = {
    "gpt2": "weights stored transposed, learned positions",
    "falcon": "linear layers of a subclass, one head of keys",
    "gemma2": "eager attention, windows, a scaled embedding",
    "gemma3n_text": "layers that read another's keys and values",
    "gemma4_text": "layers with heads of different sizes",
    "minicpm3": "keys and values of different sizes",
    "bloom": "biases instead of positions",
    "gptj": "tables kept as plain attributes",
    "gpt_neo": "masks kept as buffers of a layer",
    "doge": "parameters of a decoder layer itself",
    "opt": "positions looked up beside the embedding",
    "bart": "a mask that the model makes for itself",
    "camembert": "a head that comes before the embedding, and shares its bias too",
}
LEAST_RIGHT = 90


def recorded() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_it_is_as_in_stock_transformers(kind):
    row = examine(kind)
    assert row["verdict"] == "right", row


@pytest.mark.parametrize(
    ("kind", "why"), [("mixtral", "a mixture of experts"), ("recurrent_gemma", "linear attention")]
)
def test_what_is_not_run_is_refused_by_name(kind, why):
    row = examine(kind)
    assert row["verdict"] == "refused", row
    assert kind in row["why"] and why in row["why"]


def test_no_type_is_wrong_or_crashes_and_enough_are_right():
    verdicts = [row["verdict"] for row in recorded()["types"]]
    assert {"wrong", "crash"} & set(verdicts) == set()
    assert verdicts.count("right") >= LEAST_RIGHT


def test_the_page_is_drawn_from_the_results():
    assert PAGE.read_text(encoding="utf-8") == page(recorded())


def test_the_results_are_of_every_type_of_the_transformers_that_made_them():
    facts = recorded()
    if facts["transformers"] != transformers.__version__:
        pytest.skip(f"made with transformers {facts['transformers']}, found {transformers.__version__}")
    assert [row["type"] for row in facts["types"]] == list(KINDS)


@pytest.mark.slow
def test_every_type_is_as_recorded(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "tests.architectures.sweep", *KINDS], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in found.stderr.splitlines() if line.startswith("{")]
    assert {row["type"]: row["verdict"] for row in rows} == {row["type"]: row["verdict"] for row in recorded()["types"]}
