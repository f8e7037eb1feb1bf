"""Fidelity figures against a direct computation, and where they must be exact."""

import json
import math

import pytest
import torch
from models import (
    DictCheckpoint,
    dequantised_state,
    load_tiny,
    tiny_plan,
    tiny_spec,
    tiny_state,
    tiny_stock,
    tiny_tokenizer,
)

from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluate import SLICE, WINDOW, Fidelity, fidelity, load_reference, repetition, sample_text

TEXT = (sample_text() * 3)[:700]


def reference(kind, dtype="fp32"):
    checkpoint = DictCheckpoint(tiny_state(kind))
    return load_reference(tiny_plan(kind, dtype), tiny_spec(kind), checkpoint=checkpoint, progress=False)


def compare(kind, recipe, text=TEXT, **options):
    model = load_tiny(kind, tiny_plan(kind, recipe, **options))
    return fidelity(model, reference(kind), tiny_tokenizer(), text, progress=False), model


@torch.no_grad()
def directly(ours, theirs, text):
    """The same figures from whole windows of two stock models."""
    tokens = torch.tensor(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
    figures = []
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        if len(window) > 1:
            p, q = (model(window[None]).logits[0, :-1].log_softmax(-1) for model in (theirs, ours))
            rows = torch.arange(len(window) - 1)
            kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            agree = (p.argmax(-1) == q.argmax(-1)).float()
            figures.append(torch.stack((-q[rows, window[1:]], -p[rows, window[1:]], kl, agree)))
    every = torch.cat(figures, dim=1)
    loss, reference_loss, kl, agree = every.double().mean(dim=1).tolist()
    return every.shape[1], math.exp(loss), math.exp(reference_loss), kl, agree


@pytest.mark.parametrize(("kind", "placement"), [("llama", "gpu"), ("qwen2", "half")])
def test_the_figures_are_those_of_stock_transformers(kind, placement):
    plan = tiny_plan(kind, "int4", placement, dtype="fp32")
    model = load_tiny(kind, plan)
    found = fidelity(model, reference(kind), tiny_tokenizer(), TEXT, progress=False)
    tokens, perplexity, reference_perplexity, kl, agree = directly(
        tiny_stock(kind, dequantised_state(kind, plan)), tiny_stock(kind), TEXT
    )
    assert found.tokens == tokens == len(TEXT.encode()) - math.ceil(len(TEXT.encode()) / WINDOW)
    assert found.reference_perplexity == pytest.approx(reference_perplexity, rel=1e-4)
    # our kernel rounds activations to bf16 (2^-9), the stock model does not: small beside int4's own error
    assert found.perplexity == pytest.approx(perplexity, rel=0.01)
    assert found.kl_mean == pytest.approx(kl, rel=0.05)
    assert found.top1_agreement == pytest.approx(agree, abs=0.03)
    assert found.kl_mean > 0.001
    assert 0 < found.top1_agreement < 1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_identical_models_do_not_differ(kind):
    found, model = compare(kind, "fp32")
    assert found.kl_mean == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert found.perplexity_increase == pytest.approx(0, abs=1e-5)
    assert found.weight_bytes == found.reference_weight_bytes == model.plan.weight_bytes(model.spec)


def test_fewer_bits_differ_more():
    int8, int4 = (compare("qwen2", recipe)[0] for recipe in ("int8", "int4"))
    assert 0 < int8.kl_mean < int4.kl_mean
    assert 1 >= int8.top1_agreement > int4.top1_agreement
    assert int8.weight_bytes > int4.weight_bytes
    assert int8.perplexity != int8.reference_perplexity
    assert int4.perplexity_increase == int4.perplexity / int4.reference_perplexity - 1


def test_int8_kv_is_part_of_what_is_scored():
    from dataclasses import replace

    plan = replace(tiny_plan("qwen2", "fp32"), kv_format="int8")
    found = fidelity(load_tiny("qwen2", plan), reference("qwen2"), tiny_tokenizer(), TEXT, progress=False)
    assert 1e-7 < found.kl_mean < 0.01


def test_the_slices_of_a_window_see_each_other():
    """A prediction late in the window knows the text before its slice: shuffling that text changes it."""
    words = TEXT[: WINDOW - 1]
    whole, _ = compare("qwen2", "fp32", words)
    assert whole.tokens == len(words.encode()) - 1 - (len(words.encode()) > WINDOW)
    _, perplexity, *_ = directly(tiny_stock("qwen2"), tiny_stock("qwen2"), words)
    assert whole.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert SLICE < WINDOW


@pytest.mark.parametrize("text", ["a", "ab"])
def test_a_text_too_short_to_score(text):
    model = load_tiny("llama")
    if len(text) < 2:
        with pytest.raises(LowvramError, match="text of two tokens or more to evaluate on, found 1"):
            fidelity(model, model, tiny_tokenizer(), text, progress=False)
    else:
        assert fidelity(model, model, tiny_tokenizer(), text, progress=False).tokens == 1


def test_the_librarys_own_text_is_the_default():
    text = sample_text()
    assert len(text) > 500
    assert any("\u4e00" <= letter <= "\u9fff" for letter in text)
    tokenizer, seen = tiny_tokenizer(), []

    def spy(given, **options):
        seen.append(given)
        return tokenizer("only this", **options)

    model = load_tiny("llama")
    fidelity(model, model, spy, progress=False)
    assert seen == [text]


def test_the_reference_is_whole_on_the_cpu():
    model = reference("qwen2", "bf16")
    assert {assignment.device for assignment in model.plan.modules.values()} == {"cpu"}
    assert {assignment.format for assignment in model.plan.modules.values()} == {"bf16"}
    assert model.gpu.budget is None
    assert model.gpu.meter.allocated["gpu"] == 0


def test_to_dict_is_plain():
    fields = Fidelity(10, 2.0, 1.9, 0.01, 0.005, 0.1, 1.0, 100, 200)
    assert json.loads(json.dumps(fields.to_dict())) == {
        "tokens": 10,
        "perplexity": 2.0,
        "reference_perplexity": 1.9,
        "kl_mean": 0.01,
        "kl_median": 0.005,
        "kl_p99": 0.1,
        "top1_agreement": 1.0,
        "top1_interval": [pytest.approx(0.7224672), pytest.approx(1.0)],  # 10 of 10: Wilson's lower end is n / (n + z^2)
        "weight_bytes": 100,
        "reference_weight_bytes": 200,
    }


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four", 0.0),
        ("a b c d a b c d", 1 - 4 / 5),  # five 4-grams, abcd twice
        (" ".join(["no"] * 103), 0.99),
        ("很好" * 50, 1 - 2 / 97),  # no spaces: characters
        ("the cat sat on the mat and then the dog came in to look at it", 0.0),
    ],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


def test_repetition_by_length():
    assert repetition("a b a b a b", n=2) == pytest.approx(1 - 2 / 5)
    assert repetition("a b a b a b", n=1) == pytest.approx(1 - 2 / 6)
