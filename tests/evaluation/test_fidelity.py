"""Fidelity figures against a direct computation, and where they must be exact."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, CheckpointError, LowvramError
from lowvram_lab.evaluation import fidelity as module
from lowvram_lab.evaluation.fidelity import (
    SLICE,
    WINDOW,
    Fidelity,
    _windows,
    check_room,
    fidelity,
    load_reference,
    reference_plan,
    repetition,
)
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.plan import Plan
from lowvram_lab.packaged import sample_text
from tests.helpers.checkpoints import directory_spec, write_model
from tests.helpers.tiny import (
    dequantised_state,
    load_tiny,
    tiny_plan,
    tiny_spec,
    tiny_state,
    tiny_stock,
    tiny_tokenizer,
)

TEXT = (sample_text() * 3)[:700]


def reference(kind):
    return tiny_stock(kind)


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
    assert found.weight_bytes == found.reference_weight_bytes == model.lowvram.plan.weight_bytes()


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


@given(st.integers(0, 300), st.integers(0, 2), st.integers(4, 64), st.data())
@settings(max_examples=300, deadline=None)
def test_overlapping_windows_score_every_token_that_has_one_before_it_once(length, begun, window, data):
    body, first = window - begun, [-1, -2][:begun]
    stride, ids = data.draw(st.integers(1, body - 1)), torch.arange(length)
    scored, before = [], []
    for part, count in _windows(ids, first, window, stride):
        assert 1 <= count < len(part) <= window
        assert part[:begun].tolist() == first
        assert part[begun] % stride == 0
        scored += part[-count:].tolist()
        before += list(range(len(part) - count, len(part)))
    assert scored == list(range(0 if begun else 1, length))
    # what comes before a scored token: all there is, or as much as was promised
    seen = zip(scored, before, strict=True)
    assert all(known >= min(token + begun, window - stride) for token, known in seen)


@given(st.integers(0, 300), st.integers(0, 2), st.integers(3, 64))
@settings(max_examples=100, deadline=None)
def test_windows_one_after_another_score_all_that_have_one_before_them(length, begun, window):
    ids, first = torch.arange(length), [-1, -2][:begun]
    found = [(part.tolist(), count) for part, count in _windows(ids, first, window, None)]
    pieces = [part.tolist() for part in ids.split(window - begun)] if length else []
    expected = [(first + part, len(part) if begun else len(part) - 1) for part in pieces]
    assert found == [(part, count) for part, count in expected if count]


@torch.no_grad()
@pytest.mark.parametrize("stride", [None, 23, 9])
def test_strided_figures_are_those_of_stock_transformers(stride):
    window, text = 60, TEXT[:130]
    plan = tiny_plan("qwen2", "int4", dtype="fp32")
    ours, theirs = tiny_stock("qwen2", dequantised_state("qwen2", plan)), tiny_stock("qwen2")
    ids = torch.tensor(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
    step, nll, reference_nll, divergences = stride or window, [], [], []
    for target in range(1, len(ids)):  # a window of its own for each token: the first whose end lies beyond it
        number = max(0, math.ceil((target + 1 - window) / step))
        start = number * step
        if target == start:
            continue  # windows that do not overlap leave out their first
        p, q = (m(ids[None, start:target]).logits[0, -1].double().log_softmax(-1) for m in (theirs, ours))
        nll.append(-q[ids[target]].item())
        reference_nll.append(-p[ids[target]].item())
        divergences.append(float((p.exp() * (p - q)).sum()))
    found = fidelity(
        load_tiny("qwen2", plan),
        reference("qwen2"),
        tiny_tokenizer(),
        text,
        window=window,
        stride=stride,
        progress=False,
    )
    count = len(nll)
    assert found.tokens == count
    assert found.reference_perplexity == pytest.approx(math.exp(sum(reference_nll) / count), rel=1e-4)
    # our kernel rounds activations to bf16 (2^-9), the stock model does not: small beside int4's own error
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / count), rel=0.01)
    ordered = sorted(divergences)
    assert found.kl_mean == pytest.approx(sum(divergences) / count, rel=0.05)
    assert found.kl_median == pytest.approx(ordered[(count - 1) // 2], rel=0.15)
    assert found.kl_p99 == pytest.approx(ordered[math.ceil(0.99 * count) - 1], rel=0.15)
    assert 0 < found.kl_median < found.kl_p99


@torch.no_grad()
def test_one_whole_window_is_one_log_softmax(monkeypatch):
    ids = torch.tensor(tiny_tokenizer()(TEXT[:100], add_special_tokens=False)["input_ids"])
    p = tiny_stock("llama")(ids[None]).logits[0, :-1].log_softmax(-1)
    expected = math.exp(-p.gather(1, ids[1:, None]).double().mean())
    under_a_budget = load_tiny("llama", tiny_plan("llama", "fp32"))
    assert under_a_budget.lowvram.gpu.budget
    for size in (1, 7, 1000, None):  # however few tokens are fed at once
        monkeypatch.setattr(module, "SLICE", size)
        model = under_a_budget if size else reference("llama")
        found = fidelity(model, model, tiny_tokenizer(), TEXT[:100], window=len(ids), progress=False)
        assert found.tokens == len(ids) - 1
        assert found.perplexity == pytest.approx(expected, rel=1e-5)
        assert found.kl_mean == 0


def test_only_so_many_tokens_are_scored():
    model = reference("llama")
    for tokens, stride in ((50, 20), (1, 20), (10**6, 20)):
        options = {"window": 40, "stride": stride, "tokens": tokens, "progress": False}
        found = fidelity(model, model, tiny_tokenizer(), TEXT[:120], **options)
        length = len(TEXT[:120].encode())
        assert found.tokens == min(tokens, length - 1)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (0, None), (-5, None), (64, 65), (64, -1), (1, 1)])
def test_windows_and_strides_that_do_not_fit_together(window, stride):
    model = load_tiny("llama")
    with pytest.raises(LowvramError, match="expected a window of 2 or more and a stride up to it"):
        fidelity(model, model, tiny_tokenizer(), TEXT, window=window, stride=stride, progress=False)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (2, 2), (64, 64)])
def test_what_begins_a_window_takes_a_place_of_it(window, stride):
    model, tokenizer = load_tiny("llama"), copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.add_bos_token = True
    with pytest.raises(LowvramError, match=f"a stride up to the {window - 1} tokens of text that it holds, found"):
        fidelity(model, model, tokenizer, TEXT, window=window, stride=stride, progress=False)
    for text, scored in (("ab", 2), ("a", 1)):
        assert fidelity(model, model, tokenizer, text, window=2, progress=False).tokens == scored
    with pytest.raises(LowvramError, match="text of a token or more to evaluate on, found 0"):
        fidelity(model, model, tokenizer, "", progress=False)


@pytest.mark.parametrize(
    ("agreed", "tokens", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)
def test_the_interval_of_agreement_is_wilsons(agreed, tokens, low, high):
    found = Fidelity(tokens, 2.0, 2.0, 0.0, 0.0, 0.0, agreed / tokens, 1, 1, 128, None)
    assert found.top1_interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert f"{agreed / tokens:.1%} ({found.top1_interval[0]:.1%} to" in found.summary()


def test_the_librarys_own_text_is_the_default():
    text = sample_text()
    assert len(text) > 500
    assert any("\u4e00" <= letter <= "\u9fff" for letter in text)
    model, options = load_tiny("llama"), {"tokens": 60, "progress": False}
    by_default, stated, other = (fidelity(model, model, tiny_tokenizer(), t, **options) for t in (None, text, TEXT[9:]))
    assert by_default == stated
    assert by_default.perplexity != other.perplexity


def test_the_reference_is_stock_transformers_alone(tmp_path):
    """Its weights are in the plan's dtype, shared ones once, and nothing that ``load`` adds is on it."""
    directory = write_model(tmp_path / "model", "llama", dtype=torch.float32)
    plan = Plan.uniform(directory_spec(directory), "int4", context=64, dtype="bf16")
    model = load_reference(plan, progress=False)
    assert type(model).__module__.startswith("transformers.")
    assert not hasattr(model, "lowvram")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.config._attn_implementation == "sdpa"
    for name, weight in tiny_state("llama").items():
        assert torch.equal(model.get_parameter(name), weight.bfloat16()), name
    found = fidelity(load_tiny("llama"), model, tiny_tokenizer(), TEXT[:50], progress=False)
    assert found.reference_weight_bytes == tiny_plan("llama", "bf16").weight_bytes() == found.weight_bytes


def test_a_fault_of_our_own_loading_does_not_cancel_out(tmp_path, monkeypatch):
    """Both sides used to be read by the same code: a wrong weight on both gave a divergence of nothing."""
    directory = write_model(tmp_path / "model", "qwen2")
    read = Checkpoint.read

    def wrongly(self, name):
        return read(self, name).flip(0) if name.endswith("1.mlp.up_proj.weight") else read(self, name)

    monkeypatch.setattr(Checkpoint, "read", wrongly)
    plan = Plan.uniform(directory_spec(directory), "bf16", context=64)
    model = load(plan, StandInGpu(None), progress=False)
    found = fidelity(model, load_reference(plan, progress=False), tiny_tokenizer(), TEXT[:120], progress=False)
    assert found.kl_mean > 0.01


def test_a_reference_that_stock_transformers_would_make_up(tmp_path):
    state = tiny_state("qwen2")
    del state["model.layers.1.mlp.up_proj.weight"]
    directory = write_model(tmp_path / "model", "qwen2", state)
    plan = Plan.uniform(directory_spec(directory), "bf16", context=64)
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight: stock transformers would draw them"):
        load_reference(plan, progress=False)
    (directory / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_reference(plan, progress=False)


def test_too_little_ram_for_both_is_said_before_either_is_loaded(monkeypatch):
    plan = tiny_plan("qwen2", "int4")
    whole = reference_plan(plan)
    largest = 4 * tiny_spec("qwen2").vocab_size * tiny_spec("qwen2").hidden_size
    needed = plan.weight_bytes() + whole.weight_bytes() + largest
    for free in (needed, needed - 1):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if free == needed:
            check_room(plan, whole)
            continue
        with pytest.raises(BudgetError, match="a model and its 16-bit reference take .* of RAM, found .* free"):
            check_room(plan, whole)


def test_to_dict_is_plain():
    fields = Fidelity(10, 2.0, 1.9, 0.01, 0.005, 0.1, 1.0, 100, 200, 128, "<s>")
    assert json.loads(json.dumps(fields.to_dict())) == {
        "tokens": 10,
        "perplexity": 2.0,
        "reference_perplexity": 1.9,
        "kl_mean": 0.01,
        "kl_median": 0.005,
        "kl_p99": 0.1,
        "top1_agreement": 1.0,
        "top1_interval": [pytest.approx(0.7224672), pytest.approx(1.0)],  # n / (n + z^2)
        "weight_bytes": 100,
        "reference_weight_bytes": 200,
        "window": 128,
        "begins_with": "<s>",
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
