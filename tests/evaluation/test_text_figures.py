"""Figures of a text on three trained models, with and without BOS, beside plain transformers' own."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram_lab.conversion.convert import convert
from lowvram_lab.engine.load import load
from lowvram_lab.evaluation.fidelity import fidelity, load_reference
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.weights.solvers import dequantize, quantize
from tests.helpers.checkpoints import directory_spec
from tests.helpers.commands import run_command
from tests.helpers.trained import CONTEXT, TRAINED, write_trained

TEXT = sample_text()[:700]
WINDOW = 24
TOLERANCE = 1e-4
FORMAT = "int2"
"""Coarse, so that the divergence is large; and computed in float32, as int4 and int8 by their own kernels are not."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("figures")
        patch.setenv("LOWVRAM_CACHE", str(place / "cache"))
        yield place


def stock_ids(directory, begins):
    """A text's ids as stock transformers has them, taken apart into what begins it and the rest."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if begins:
        tokenizer.add_bos_token = True  # stock's own switch: beside a tokenizer.json it passes over the config's
    ids = tokenizer(TEXT)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == begins
    return (ids[:1], ids[1:]) if begins else ([], ids)


@torch.no_grad()
def loss(model, first, ids, window):
    """Mean loss a token and their number: transformers' own loss of one window after another."""
    total = count = 0
    body = window - len(first)
    for start in range(0, len(ids), body):
        part = torch.tensor([first + ids[start : start + body]])
        predicted = part.shape[1] - 1
        if predicted:
            total += model(part, labels=part).loss.item() * predicted
            count += predicted
    return total / count, count


@torch.no_grad()
def gained_by_bos(model, ids):
    """By what share BOS lowers the perplexity of the very same tokens, each window's first left out."""
    with_bos = without = count = 0
    for start in range(0, len(ids), WINDOW):
        body = torch.tensor(ids[start : start + WINDOW])
        if len(body) > 1:
            labels = torch.cat((torch.tensor([-100, -100]), body[1:]))
            with_bos += model(torch.cat((torch.tensor([1]), body))[None], labels=labels[None]).loss * (len(body) - 1)
            without += model(body[None], labels=body[None]).loss * (len(body) - 1)
            count += len(body) - 1
    return 1 - math.exp((with_bos - without) / count)


@torch.no_grad()
def divergence(ours, theirs, first, ids, window):
    """Mean KL and agreement, from whole windows' logits in float64."""
    found = []
    body = window - len(first)
    for start in range(0, len(ids), body):
        part = torch.tensor([first + ids[start : start + body]])
        p, q = (model(part).logits[0, :-1].double().log_softmax(-1) for model in (theirs, ours))
        agree = (p.argmax(-1) == q.argmax(-1)).double()
        found.append(torch.stack(((p.exp() * (p - q)).sum(-1), agree)))
    return torch.cat(found, dim=1).mean(dim=1).tolist()


def quantised(directory, plan):
    """Stock transformers with the weights that a plan's formats leave."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for module in plan.spec.modules:
            fmt = get_format(plan.modules[module.name].format)
            if fmt.kind != "float" and not module.tied_to:
                weight = model.get_submodule(module.name).weight
                weight.copy_(dequantize(quantize(weight, fmt, solver=plan.solver), fmt))
    return model.eval()


def float32_plan(directory, recipe):
    spec = directory_spec(directory)
    plan = Plan.uniform(spec, recipe, context=CONTEXT, dtype="fp32")
    return replace(plan.with_modules(spec.embedding, spec.head, format="fp32"), kv_format="fp32")


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", TRAINED)
def test_figures_are_plain_transformers_own(folder, kind, begins):
    directory = write_trained(folder / f"{kind} {begins}", kind, begins)
    plan = float32_plan(directory, FORMAT)
    tokenizer = find_source(directory).tokenizer()
    model = load(plan, StandInGpu(None), progress=False)
    reference = load_reference(plan, progress=False)
    found = fidelity(model, reference, tokenizer, TEXT, window=WINDOW, progress=False)

    first, ids = stock_ids(directory, begins)
    ours, theirs = quantised(directory, plan), AutoModelForCausalLM.from_pretrained(directory).eval()
    expected, count = loss(theirs, first, ids, WINDOW)
    assert found.tokens == count == len(ids) - (0 if begins else math.ceil(len(ids) / WINDOW))
    assert (found.window, found.begins_with) == (WINDOW, "<s>" if begins else None)
    assert f"{count} tokens in windows of {WINDOW} with {'<s>' if begins else 'nothing'} before" in found.summary()
    assert found.reference_perplexity == pytest.approx(math.exp(expected), rel=TOLERANCE)
    assert found.perplexity == pytest.approx(math.exp(loss(ours, first, ids, WINDOW)[0]), rel=TOLERANCE)
    kl, agreement = divergence(ours, theirs, first, ids, WINDOW)
    assert found.kl_mean == pytest.approx(kl, rel=TOLERANCE)
    assert found.kl_mean > 0.003
    assert found.top1_agreement == pytest.approx(agreement, abs=1e-9)
    if TRAINED[kind]:  # leaving it out would show
        assert gained_by_bos(theirs, ids) > 10 * TOLERANCE


def test_overlapping_windows_each_begin_with_bos(folder):
    """A token at a time: the last of a window of its own, which begins with BOS wherever in the text it lies."""
    directory = write_trained(folder / "strided", "llama")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    first, ids = stock_ids(directory, True)
    stride, window, scored = 7, 20, 90
    nll = []
    for target in range(scored):
        number = max(0, math.ceil((target + 1 - (window - 1)) / stride))
        part = torch.tensor([first + ids[number * stride : target + 1]])
        with torch.no_grad():
            nll.append(-model(part).logits[0, -2].double().log_softmax(-1)[part[0, -1]].item())
    options = {"window": window, "stride": stride, "tokens": scored, "progress": False}
    found = fidelity(model, model, find_source(directory).tokenizer(), TEXT, **options)
    assert found.tokens == scored
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / scored), rel=TOLERANCE)


def test_the_command_states_how_windows_begin(capsys, folder):
    directory = write_trained(folder / "command", "mistral")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ["--text", folder / "text.txt", "--dtype", "fp32", "--window", "4000", "--format", FORMAT, "--json"]
    status, out, err = run_command(capsys, "evaluate", directory, *words)
    found = json.loads(out)
    first, ids = stock_ids(directory, True)
    expected, count = loss(AutoModelForCausalLM.from_pretrained(directory).eval(), first, ids, CONTEXT)
    assert status == 0
    assert (found["begins_with"], found["window"], found["tokens"]) == ("<s>", CONTEXT, count)
    assert found["reference_perplexity"] == pytest.approx(math.exp(expected), rel=TOLERANCE)
    assert f"{count} tokens in windows of {CONTEXT} with <s> before each" in err


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_conversion_measures_its_held_out_text_as_well_begun(folder, kind):
    directory = write_trained(folder / f"source {kind}", kind)
    text = folder / "calibration.txt"
    text.write_text(calibration_text()[:9000], encoding="utf-8")
    plan = Plan.uniform(directory_spec(directory), FORMAT, context=CONTEXT)
    output = folder / f"converted {kind}"
    done = convert(str(directory), output, plan, calibration=text, calibration_tokens=2048, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    first = [tokenizer.bos_token_id] if TRAINED[kind] else []
    ids = tokenizer(sample_text(), add_special_tokens=False)["input_ids"]
    body = CONTEXT - len(first)
    whole = ids[: len(ids) // body * body]
    expected, count = loss(AutoModelForCausalLM.from_pretrained(directory).eval(), first, whole, CONTEXT)
    begins = "<s>" if TRAINED[kind] else None
    assert (done.measured["tokens"], done.measured["window"]) == (count, CONTEXT)
    assert done.measured["begins_with"] == begins
    assert done.measured["reference_perplexity"] == pytest.approx(math.exp(expected), rel=TOLERANCE)
    card = " ".join((output / "README.md").read_text(encoding="utf-8").split())
    assert f"in windows of {CONTEXT} with {begins or 'nothing'} before each" in card
