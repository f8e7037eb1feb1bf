"""The report passes what is good, fails what is not, and never passes on nothing."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.evaluation.validation import Check, Limits, ValidationReport, validate
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import SpeedProfile, Workload
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_stock, tiny_tokenizer

TEXT = "a small text that is long enough to be scored, whatever it says about anything at all"
SPEED = SpeedProfile("this CPU, standing in for a GPU (simulated)", 5, 5, 0.5, 12.34)
# A tiny random model babbles, and quantises badly: what it must keep here is little.
LENIENT = Limits(perplexity_increase=10, kl_mean=10, top1_agreement=0, repetition=1)


def chat(recipe="int8", turns=2):
    gpu = StandInGpu(None)
    model = load_tiny("qwen2", tiny_plan("qwen2", recipe), gpu, letters_state())
    session = ChatSession(model, tiny_tokenizer(), max_new_tokens=6)
    for _ in range(turns):
        session.ask("say something")
    return session


@pytest.fixture(scope="module")
def evidence():
    session = chat()
    plan = session.model.lowvram.plan
    workload = Workload(60, 2)
    fresh = load_tiny("qwen2", plan, StandInGpu(None), letters_state())  # the chat's own KV cache is not in its peaks
    return {
        "session": session,
        "reference": tiny_stock("qwen2", letters_state(), torch.bfloat16),
        "measured": run_workload(fresh, workload),
        "forecast": forecast(plan, session.model.lowvram.gpu, workload=workload),
        "speed": SPEED,
        "text": TEXT,
        "limits": LENIENT,
        "progress": False,
    }


def verdicts(report):
    return {check.name: check.passed for check in report.checks}


def test_a_report_that_passes(evidence):
    report = validate(**evidence)
    assert report.passed, report
    found = verdicts(report)
    assert {name for name, passed in found.items() if passed} == {
        *(f"{phase} peak" for phase in ("load", "prefill", "decode")),
        "perplexity",
        "mean KL",
        "top-1 agreement",
        "every turn answered",
        "repeated 4-grams",
    }
    assert {name for name, passed in found.items() if passed is None} == {
        "weights, all",
        "text scored",
        "first token, first turn",
        "first token, later turns",
        "decoding",
    }
    assert report.summary() == f"PASS: 8 of 8 checks, tiny-qwen2 on {evidence['session'].model.lowvram.gpu.name}"
    assert "simulated" in report.summary()
    assert report.fidelity.weight_bytes == evidence["session"].model.lowvram.plan.weight_bytes()
    assert {check.name: check.value for check in report.checks}["text scored"] == (
        f"{len(TEXT) - 1} tokens in windows of 128 with nothing before each"
    )
    shown = repr(report)
    assert all(words in shown for words in ("PASS", "12.3 tokens/s", "standing in for a GPU", "demanded"))


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ({"perplexity_increase": -0.99}, "perplexity"),
        ({"kl_mean": 1e-9}, "mean KL"),
        ({"top1_agreement": 1.01}, "top-1 agreement"),
        ({"repetition": -0.1}, "repeated 4-grams"),
        ({"forecast_error": -0.1}, "prefill peak"),
    ],
)
def test_each_limit_can_fail_it(evidence, limit, name):
    report = validate(**{**evidence, "limits": replace(LENIENT, **limit)})
    assert not report.passed
    assert verdicts(report)[name] is False
    assert report.summary().startswith("FAIL: ")
    assert name in report.summary()
    assert "FAIL" in set(report.table()["verdict"])
    assert report.to_dict()["passed"] is False


def test_a_wrong_forecast_fails_it(evidence):
    wrong = evidence["forecast"]
    phases = tuple(
        replace(phase, peak_allocated_bytes=int(phase.peak_allocated_bytes * 1.05)) for phase in wrong.phases
    )
    report = validate(**{**evidence, "forecast": replace(wrong, phases=phases)})
    assert [verdicts(report)[f"{phase} peak"] for phase in ("load", "prefill", "decode")] == [False] * 3


def test_a_peak_above_the_card_fails_it(evidence):
    session = evidence["session"]
    gpu = session.model.lowvram.gpu
    for total, passed in ((gpu.peak_reserved_bytes, True), (gpu.peak_reserved_bytes - 1, False)):
        gpu.budget = type("Budget", (), {"total_bytes": total, "context_bytes": 0, "usable_bytes": total})()
        try:
            assert verdicts(validate(session, limits=LENIENT, progress=False))["peak GPU memory"] is passed
        finally:
            gpu.budget = None


def test_an_empty_answer_and_a_looping_one_fail_it(evidence):
    session = evidence["session"]
    kept = list(session.history)
    try:
        session.history[-1] = {"role": "assistant", "content": "  "}
        assert verdicts(validate(session, limits=LENIENT, progress=False))["every turn answered"] is False
        session.history[-1] = {"role": "assistant", "content": "and so on " * 50}
        assert verdicts(validate(session, limits=Limits(), progress=False))["repeated 4-grams"] is False
    finally:
        session.history[:] = kept


def test_a_chat_that_said_nothing_does_not_pass():
    report = validate(chat(turns=0), progress=False)
    assert not report.passed
    assert "every turn answered" in report.summary()


def test_without_checks_nothing_has_passed():
    for checks in ((), (Check("decoding", "5 tokens/s"),)):
        report = ValidationReport("model", "gpu", checks)
        assert not report.passed
        assert report.summary() == "FAIL: no check was made (model on gpu)"
        assert report.to_dict()["passed"] is False


def test_what_is_left_out_is_not_checked(evidence):
    bare = verdicts(validate(evidence["session"], limits=LENIENT, progress=False))
    assert not any("peak" in name or name in ("perplexity", "decoding") for name in bare)
    half = verdicts(validate(evidence["session"], forecast=evidence["forecast"], limits=LENIENT, progress=False))
    assert not any("peak" in name for name in half)


def test_every_field_is_plain_data(evidence):
    report = validate(**evidence)
    values = json.loads(json.dumps(report.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(ValidationReport)} | {"passed"}
    assert len(values["checks"]) == len(report.checks)
    for check in values["checks"]:
        assert set(check) == {field.name for field in dataclasses.fields(Check)}
    assert values["fidelity"] == json.loads(json.dumps(report.fidelity.to_dict()))
    without = validate(evidence["session"], limits=LENIENT, progress=False)
    assert json.loads(json.dumps(without.to_dict()))["fidelity"] is None
    for part in (evidence["forecast"], evidence["measured"], evidence["speed"]):
        assert json.loads(json.dumps(part.to_dict()))


def test_as_a_table(evidence):
    report = validate(**evidence)
    table = report.table()
    assert list(table.columns) == ["check", "measured", "demanded", "verdict"]
    assert len(table) == len(report.checks)
    assert set(table["verdict"]) == {"pass", ""}
    assert report._repr_html_().startswith("<b>PASS")
