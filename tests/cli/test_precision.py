"""``chat``, ``complete`` and ``plan`` with weights in two planes: options, what is printed, mistakes in one line."""

import json
import shutil

import pytest
import torch

from lowvram_lab.conversion.convert import convert
from lowvram_lab.model import low_plane
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source
from lowvram_lab.packaged import calibration_text
from tests.helpers.checkpoints import directory_spec, write_model
from tests.helpers.commands import run_command as run
from tests.helpers.tiny import letters_state

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")
SIZE = ("--gpu", "100MiB", "--context", 512)
SHORT = ("--prompt", "hello", "--max-new-tokens", 8)
PLANES = (*SIZE, "--format", "int4+4", *SHORT)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("planes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(place / "cache"))
        patch.setattr("lowvram_lab.chat.margins.TOKENS", 1024)
        patch.setattr("lowvram_lab.chat.margins.FLIPS", 1)
        yield place


@pytest.fixture(scope="module")
def model(folder):
    return write_model(folder / "model", "qwen2", letters_state())


@pytest.fixture(scope="module")
def converted(folder, model):
    """By its high planes and low ones."""
    (folder / "calibration.txt").write_text(calibration_text()[:2300], encoding="utf-8")
    output, text = folder / "converted", folder / "calibration.txt"
    plan = Plan.uniform(directory_spec(model), "int4+4", context=512)
    convert(model, output, plan=plan, calibration=text, solver="rtn", progress=False)
    return output


def answered(capsys, model, *words):
    status, out, err = run(capsys, "chat", model, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_auto_says_how_many_tokens_both_planes_computed(capsys, model):
    found = answered(capsys, model, *PLANES, "--precision", "auto", "--flip-rate", "5%")
    assert {"text", "engine", "budget_bytes", "drafted", "accepted", "precise_tokens", "new_tokens"} <= set(found)
    assert len(found["text"]) == found["new_tokens"] == 8
    assert 1 <= found["precise_tokens"] <= 8
    status, out, err = run(capsys, "chat", model, *PLANES, "--precision", "auto", "--flip-rate", "0.05")
    assert (status, out.strip()) == (0, found["text"])
    assert f"{found['precise_tokens']} of 8 tokens by both planes" in err


def test_the_flip_rate_is_what_is_asked_for(capsys, model):
    words = (*SIZE, "--format", "int4+4", "--prompt", "hello", "--max-new-tokens", 40, "--precision", "auto")
    counts = [answered(capsys, model, *words, "--flip-rate", rate)["precise_tokens"] for rate in ("99%", "0.1%")]
    assert counts[0] == 1 and counts[1] > 5


@pytest.mark.parametrize(
    "precision, expected", [((), 8), (("--precision", "precise"), 8), (("--precision", "fast"), 1)]
)
def test_the_other_precisions(capsys, model, precision, expected):
    found = answered(capsys, model, *PLANES, *precision)
    assert (found["precise_tokens"], found["drafted"], len(found["text"])) == (expected, 0, 8)


def test_weights_in_one_plane_say_nothing_of_planes(capsys, model):
    words = (*SIZE, "--format", "int4", *SHORT)
    found = answered(capsys, model, *words)
    assert found["precise_tokens"] is None
    assert answered(capsys, model, *words, "--precision", "fast")["text"] == found["text"]
    _, _, err = run(capsys, "chat", model, *words)
    assert "by both planes" not in err


def test_complete_takes_them_too(capsys, model):
    status, out, _ = run(capsys, "complete", model, *PLANES, "--precision", "auto", "--json")
    assert status == 0 and 1 <= json.loads(out)["precise_tokens"] <= 8


@pytest.mark.parametrize("place", ["gpu", "cpu", "disk"])
def test_low_planes_lie_where_they_are_told_to_and_say_the_same(capsys, model, folder, place):
    found = answered(capsys, model, *PLANES, "--low-plane", place)
    assert found["text"] == answered(capsys, model, *PLANES)["text"]
    plan, output = Plan.uniform(directory_spec(model), "int4+4", context=128), folder / f"{place}.json"
    plan.with_modules("*_proj", low=place).to_json(output)
    status, out, err = run(capsys, "chat", model, "--gpu", "100MiB", "--plan", output, "--precision", "auto", *SHORT)
    assert status == 0, err
    assert len(out.strip()) == 8


@pytest.fixture
def nothing_fetched(monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(Source, "fetch", fetch)


IN_ONE = "needs weights in two planes, found"
MISTAKES = {
    "auto of int4": (("--format", "int4", "--precision", "auto"), f"precision auto {IN_ONE}"),
    "precise of bf16": (("--format", "bf16", "--precision", "precise"), f"precision precise {IN_ONE}"),
    "of what the planner chooses": (("--precision", "auto"), f"precision auto {IN_ONE}"),
    "a low plane of int4": (("--format", "int4", "--low-plane", "cpu"), "--low-plane is for weights in int4+4"),
    "a low plane and no format": (("--low-plane", "cpu"), "--low-plane goes with --format or --plan"),
    "no place": (("--format", "int4+4", "--low-plane", "moon"), "invalid choice: 'moon'"),
    "no precision": (("--format", "int4+4", "--precision", "exact"), "invalid choice: 'exact'"),
    "no rate": (("--format", "int4+4", "--flip-rate", "often"), "--flip-rate: expected a share such as"),
    "more than all": (("--format", "int4+4", "--flip-rate", "150%"), "--flip-rate: expected a share such as"),
    "less than none": (("--format", "int4+4", "--flip-rate=-1%"), "--flip-rate: expected a share such as"),
}


@pytest.mark.parametrize("words, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_loaded(capsys, model, nothing_fetched, words, expected):
    status, out, err = run(capsys, "chat", model, *SIZE, *SHORT, *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert expected in err


@pytest.mark.parametrize(
    "how", [(), ("--format", "stored"), ("--format", "int4+4")], ids=["planned", "stored", "named"]
)
@pytest.mark.parametrize("precision", ["auto", "precise", "fast"])
def test_a_converted_model_has_its_planes(capsys, converted, how, precision):
    found = answered(capsys, converted, *SIZE, *SHORT, *how, "--precision", precision)
    if precision != "fast":
        assert found["precise_tokens"] >= 1
    assert len(found["text"]) == 8


def test_fast_reads_no_low_planes(capsys, converted, monkeypatch):
    def nothing(*_):
        raise AssertionError("low planes were read")

    monkeypatch.setattr("lowvram_lab.engine.fill.stored_low_plane", nothing)
    found = answered(capsys, converted, *SIZE, *SHORT, "--precision", "fast")
    assert found["precise_tokens"] is None


def test_without_the_file_of_the_low_planes_it_is_a_model_in_one(capsys, converted, folder):
    alone = shutil.copytree(converted, folder / "alone")
    (alone / low_plane.FILE).unlink()
    fast = answered(capsys, converted, *SIZE, *SHORT, "--precision", "fast")
    assert answered(capsys, alone, *SIZE, *SHORT)["text"] == fast["text"]
    status, out, err = run(capsys, "chat", alone, *SIZE, *SHORT, "--precision", "auto")
    assert (status, out) == (2, "")
    assert f"precision auto {IN_ONE}" in err.splitlines()[-1] and "low_plane.safetensors" in err
