"""``--target``: another machine's plan and speed, all said to be assumed; every mistake is one line and status 2."""

import json

import pytest

from lowvram_lab.model.plan import Plan
from lowvram_lab.rates.machine import Machine
from tests.helpers.commands import run_command as run
from tests.helpers.machines import BOARD
from tests.helpers.tiny import packaged_spec


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    """Offline, and no rate of this machine is measured or read."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def measured(*_, **__):
        raise AssertionError("this machine was measured")

    monkeypatch.setattr(Machine, "__init__", measured)
    monkeypatch.setattr(Machine, "_rates", measured)


def origins(found, path=()):
    """Every ``origin`` in a document, by where it is."""
    if isinstance(found, dict):
        here = {path: found["origin"]} if "origin" in found else {}
        return here | {
            key: value for name, each in found.items() for key, value in origins(each, (*path, name)).items()
        }
    return {}


@pytest.mark.parametrize("words", [["plan"], ["forecast", "--format", "int4"]])
def test_json_is_complete_and_says_assumed(capsys, words):
    status, out, err = run(capsys, words[0], "smollm2-135m", "--target", "pi5-8gb", *words[1:], "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found) == {"origin", "target", "plan", "memory", "speed", "why", "assumptions"}
    assert origins(found) == dict.fromkeys([(), ("target",), ("memory",), ("speed",)], "assumed")
    assert found["memory"]["fits"] and found["memory"]["peak_bytes"] <= found["target"]["usable_bytes"]
    assert found["speed"]["decode_tokens_per_s"] > 0 and found["speed"]["rates"].startswith("assumed")
    assert found["target"]["sources"]["memory_bytes_per_s"].startswith("measured")
    assert found["assumptions"]


@pytest.mark.parametrize("command", ["plan", "forecast"])
def test_prose_says_assumed_wherever_a_figure_of_the_target_is(capsys, command):
    status, out, _ = run(capsys, command, "smollm2-135m", "--target", "n100-16gb")
    assert status == 0
    for line in out.splitlines():
        if "tokens/s" in line or "that a model may have" in line or "GB/s" in line:
            assert "assumed" in line, line
    assert "that a model may have: fits" in out and "tokens/s" in out


def test_a_plan_is_written_and_read_again(capsys, tmp_path):
    file = str(tmp_path / "plan.json")
    assert run(capsys, "plan", "smollm2-135m", "--target", "pi4-4gb", "--output", file)[0] == 0
    plan = Plan.from_json(tmp_path / "plan.json", packaged_spec("smollm2-135m"))
    assert plan.threads == 4 and {each.device for each in plan.modules.values()} == {"cpu"}
    status, out, err = run(capsys, "forecast", "smollm2-135m", "--target", "pi4-4gb", "--plan", file, "--json")
    assert status == 0, err
    assert json.loads(out)["plan"] == plan.to_dict()


def test_a_profile_of_ones_own(capsys, tmp_path):
    values = {key: value for key, value in BOARD.to_dict().items() if key not in ("usable_bytes", "origin")}
    path = tmp_path / "my-board.json"
    path.write_text(json.dumps(values))
    status, out, _ = run(capsys, "plan", "smollm2-135m", "--target", str(path), "--json")
    assert status == 0
    assert json.loads(out)["target"]["title"] == "an imagined board"
    path.write_text(json.dumps({**values, "clock_hz": 2.4}))
    status, out, err = run(capsys, "plan", "smollm2-135m", "--target", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "my-board.json: clock_hz: expected a whole number" in err


def test_explain_says_where_the_seconds_go(capsys):
    _, out, _ = run(capsys, "plan", "smollm2-135m", "--target", "pi5-8gb", "--explain")
    assert "ms a token: bf16 weights on the cpu (assumed)" in out


def test_batches_take_more_keys_and_values(capsys):
    one, four = (
        json.loads(run(capsys, "forecast", "smollm2-135m", "--target", "pi5-8gb", "--batch", n, "--json")[1])["memory"]
        for n in ("1", "4")
    )
    assert four["kv_bytes"] == 4 * one["kv_bytes"] and four["activation_bytes"] > one["activation_bytes"]


def test_targets_are_listed(capsys):
    status, out, _ = run(capsys, "targets")
    assert status == 0 and "pi5-8gb" in out and "assumed" in out
    found = json.loads(run(capsys, "targets", "--json")[1])["targets"]
    assert [each["name"] for each in found] == sorted(each["name"] for each in found)
    assert {each["origin"] for each in found} == {"assumed"}


PLAN, FORECAST = ["plan", "smollm2-135m", "--target", "pi5-8gb"], ["forecast", "smollm2-135m", "--target", "pi5-8gb"]
MISTAKES = {
    "neither card nor target": (["plan", "smollm2-135m"], "--gpu"),
    "unknown": ([*PLAN[:-1], "pi5-16gb"], "the nearest is pi5-8gb"),
    "unknown, all named": ([*PLAN[:-1], "toaster"], "known: laptop2013-8gb, n100-16gb"),
    "no such file": ([*PLAN[:-1], "no-such.json"], "no-such.json"),
    "a card's memory": ([*PLAN, "--gpu", "4GiB"], "leave --gpu out"),
    "a card": ([*FORECAST, "--card", "t4"], "leave --card out"),
    "RAM": ([*PLAN, "--ram", "4GiB"], "leave --ram out"),
    "layers on a GPU": ([*PLAN, "--gpu-layers", "0"], "leave --gpu-layers out"),
    "several": ([*FORECAST, "--gpu", "4GiB", "--card", "t4"], "leave --gpu and --card out"),
    "a run": ([*FORECAST, "--compare"], "leave --compare out"),
    "a picture": ([*FORECAST, "--plot", "a.png"], "leave --plot out"),
    "the longest": ([*FORECAST, "--max-context"], "leave --max-context out"),
    "the longest, planned": ([*PLAN, "--context", "longest"], "a number of tokens"),
    "a stated plan is not chosen": ([*PLAN, "--format", "int8", "--prefer", "speed"], "--prefer and --disk"),
    "places without a plan": ([*PLAN, "--disk-layers", "3"], "--disk-layers"),
    "a dtype without a plan": ([*PLAN, "--dtype", "fp32"], "--dtype go with --format"),
    "a dtype of bf16": ([*FORECAST, "--format", "bf16", "--dtype", "fp32"], "weights in bf16 compute in bf16"),
    "too many threads": ([*PLAN, "--threads", "5"], "computes on 4 cores, found threads 5"),
    "fits in no format": (["plan", "qwen1.5-4b", "--target", "pi4-4gb"], "MiB too much (assumed)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(capsys, name):
    words, said = MISTAKES[name]
    status, out, err = run(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err


def test_a_plan_for_a_card_is_refused(capsys, tmp_path):
    Plan.uniform(packaged_spec("smollm2-135m"), "int8").to_json(tmp_path / "card.json")
    status, out, err = run(capsys, *FORECAST, "--plan", str(tmp_path / "card.json"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "has no GPU" in err
