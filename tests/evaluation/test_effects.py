"""The effect table: what each row must equal, verdicts, pages read back, and stages that fail alone."""

import argparse
import contextlib
import functools
import importlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab import machine
from lowvram_lab.cli import report as cli_report
from lowvram_lab.cli.report import add_report, run_report, write_report
from lowvram_lab.conversion.convert import convert
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.evaluation.effect_report import CLAIMS, Effect, EffectReport, judged
from lowvram_lab.evaluation.effects import NOT_HERE, STAGES, Stage, effects, open_case, run_stage
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.packaged import sample_text
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.units import GiB
from tests.helpers.checkpoints import write_model
from tests.helpers.machines import Made
from tests.helpers.tiny import letters_state, tiny_spec, tiny_tokenizer

module = importlib.import_module("lowvram_lab.evaluation.effects")  # the package gives the function of that name

TEXT = sample_text()[:600]
QUANTITIES = [
    "GPU memory, 16 bits",
    "GPU memory, planned",
    "GPU memory, run",
    "first response",
    "later response",
    "decoding",
    "medium compression",
    "deep compression",
]


@pytest.fixture(autouse=True, scope="module")
def small():
    """Short answers and a short text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ANSWER_TOKENS", 6)
        patch.setattr("lowvram_lab.evaluation.fidelity.sample_text", lambda: TEXT)
        patch.setattr(module, "auto_plan", planned_once())
        patch.setattr("lowvram_lab.planner.speed.Machine", Made)  # to measure its rates is for tests/planner to check
        patch.setattr(module, "gc", SimpleNamespace(collect=lambda: None))  # a quarter of a second, ten times a report
        patch.setattr("lowvram_lab.machine.facts", functools.cache(machine.facts))
        yield


def planned_once():
    """``auto_plan`` that remembers, by model, card, context, and whether the GPU is an open one."""
    choices = {}

    def plan(spec, gpu, context):
        budget = gpu if isinstance(gpu, GpuBudget) else gpu.budget
        key = spec.fingerprint, budget, context, gpu is budget
        if key not in choices:
            choices[key] = auto_plan(spec, gpu, context)
        return choices[key]

    return plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("effects") / "a model", "qwen2", letters_state())


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def shown():
    """What appears on stderr meanwhile."""
    return io.StringIO()


@pytest.fixture(scope="module")
def report(folder, said, shown):
    with contextlib.redirect_stderr(shown):
        return effects(str(folder), "64MiB", context=256, say=said.append)


def rows_of(case, *names):
    """What some of the stages return, in their order."""
    return [row for stage in STAGES if stage.name in names for row in run_stage(stage, case)]


def rows(report):
    return {effect.quantity: effect for effect in report.effects}


def test_every_row_is_there_and_says_how(report, said, folder):
    found = rows(report)
    assert list(found) == QUANTITIES
    assert [line.split(maxsplit=1)[1] for line in said] == list(report.stages)
    assert said[-1].startswith(f"{len(said)}/{len(said)} ")
    for effect in found.values():
        assert effect.article == CLAIMS[effect.claim].text
        assert effect.how.startswith(("forecast", "measured"))
    assert 0 < sum(report.stages.values()) <= report.seconds
    assert report.model == report.weights_from == folder.name
    assert str(folder.parent) not in json.dumps(report.to_dict())


def test_no_progress_bar_has_another_inside(report, shown):
    names = set(re.findall(r"\r([\w ]+):", shown.getvalue()))
    assert names == {"load", "reference", "sensitivity", "evaluate"}
    assert "\x1b[A" not in shown.getvalue()  # how tqdm leaves the line of an inner bar


def test_memory_is_the_forecast_and_the_run_equals_its_own(report, folder):
    found, spec = rows(report), find_source(folder).spec("tiny")
    profile = forecast(Plan.uniform(spec, "bf16", context=256), "64MiB")
    assert found["GPU memory, 16 bits"].figures["peak_bytes"] == profile.device_peak_bytes
    run = found["GPU memory, run"]
    assert run.note.startswith(f"{run.ours.split(' (')[0]} by forecast for it")
    if not torch.cuda.is_available():
        assert "simulated" in run.how


@pytest.mark.skipif(torch.cuda.is_available(), reason="speed is a GPU's there")
@pytest.mark.parametrize("quantity", QUANTITIES[3:6])
def test_no_speed_of_a_stand_in_is_passed_off_as_a_card(report, quantity):
    effect = rows(report)[quantity]
    assert effect.ours.startswith(NOT_HERE)
    assert "this CPU" in effect.how and "simulated" in effect.how
    assert effect.held is None
    assert "no CUDA card" in effect.unchecked


def test_speed_rows_show_what_was_measured(report):
    found = rows(report)
    decoding = found["decoding"]
    assert f"{decoding.figures['decode_tokens_per_s']:.1f} tokens/s" in decoding.ours
    assert decoding.note.endswith(f"by {decoding.figures['engine']}")
    first, later = found["first response"], found["later response"]
    assert f"{first.figures['ttft_s']:.2f} s to the first token" in first.ours
    assert first.figures["cached_tokens"] == 0 < later.figures["cached_tokens"]
    assert first.figures["new_tokens"] <= 6


@pytest.mark.parametrize(("key", "saved"), [("medium", 0.6), ("deep", 0.7)])
def test_losses_are_those_of_models_so_small(report, key, saved):
    figures = rows(report)[f"{key} compression"].figures
    assert saved - 0.005 < figures["saved"] < saved + 0.05
    assert figures["tokens"] == pytest.approx(len(tiny_tokenizer()(TEXT)["input_ids"]), abs=10)
    assert figures["perplexity_increase"] == figures["perplexity"] / figures["reference_perplexity"] - 1
    assert f"{figures['perplexity_increase']:+.1%}" in rows(report)[f"{key} compression"].ours
    assert figures["kl_mean"] > 0


def test_deeper_compression_loses_more(report):
    medium, deep = (rows(report)[f"{key} compression"].figures for key in ("medium", "deep"))
    assert deep["kl_mean"] > medium["kl_mean"]
    assert deep["weight_bytes"] < medium["weight_bytes"]


# --- verdicts


@pytest.mark.parametrize(
    ("claim", "values", "held"),
    [
        ("before", [8 * GiB], True),
        ("before", [8 * GiB - 1], False),
        ("after", [3.8 * GiB], True),
        ("after", [4 * GiB], False),
        ("decoding", [5.0], True),
        ("decoding", [4.9], False),
        ("first", [1.0, 6.0], True),
        ("first", [6.1, 9.0], False),
        ("later", [1.0, 3.5], None),
        ("medium", [0.15, 0.15], True),
        ("deep", [0.26, 0.2], None),
        ("deep", [0.26, 0.3], False),
        ("deep", [], None),
    ],
)
def test_a_claim_holds_if_every_reading_keeps_its_limit(claim, values, held):
    effect = judged(claim, "a quantity", "so much", values)
    assert effect.held is held
    assert bool(effect.unchecked) == (held is None)


def test_what_cannot_be_compared_is_not_judged():
    effect = judged("decoding", "a quantity", "so much", [100.0], unchecked="no card")
    assert (effect.held, effect.unchecked) == (None, "no card")


def made_up(*shown, weights="hub"):
    return EffectReport(
        "m", "4.00 GiB of a card", 9, tuple(shown), weights, {"torch": "2"}, {"run": 1.0}, "2026-01-02", 3
    )


ROWS = (
    Effect("before", "q0", "8 GB or more", "9.00 GiB", "forecast", held=True),
    Effect("after", "q1", "3.5 to 3.8 GB", "3.60 GiB", "forecast", held=True),
    Effect("after", "q2", "3.5 to 3.8 GB", "3.90 GiB", "measured, a | card <b>", "a note", held=False),
    Effect("decoding", "q3", "5 to 10 tokens/s", NOT_HERE, unchecked="no card"),
    Effect("first", "q4", "3 to 6 s", NOT_HERE, unchecked="no card"),
    Effect("deep", "q5", "25%", "7%", "measured", unchecked="unclear", figures={"kl_mean": 1.0}),
)


def test_the_paragraph_follows_the_rows():
    text = made_up(*ROWS).summary()
    held, broken, unknown = re.search(
        r"Held: (.*)\. Did not hold: (.*)\. Could not be checked: (.*?)\. The", text
    ).groups()
    assert "memory in 16 bits" in held and "9.00 GiB" in held and "memory compressed" not in held
    assert "3.90 GiB" in broken and "3.60 GiB" not in text  # the run decides, not the forecast before it
    assert unknown == "decoding speed, first response (no card); deep compression (unclear)"
    assert "does not define its loss" in text
    turned = made_up(*(replace(row, held=not row.held) for row in ROWS[:3])).summary()
    assert "Held: memory compressed" in turned and "Did not hold: memory in 16 bits" in turned
    assert "does not define its loss" not in turned
    assert "No claim was found to hold. None was found not to hold." in made_up(ROWS[3]).summary()


def test_weights_that_were_quantised_before_are_said_so():
    assert "quantised once before (model.Q4_1.gguf)" in made_up(ROWS[5], weights="model.Q4_1.gguf").summary()
    assert "quantised" not in made_up(ROWS[5]).summary()


# --- pages


class Cells(HTMLParser):
    """Rows of the tables of a page, its paragraphs and title."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.text, self.tag = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.rows[-1][-1] += data.rstrip("\n")
        self.text += data

    def handle_endtag(self, tag):
        self.tag = ""


def expected_cells(report):
    table = report.table()
    return [list(table.columns), *(list(row) for row in table.itertuples(index=False))]


def markdown_cells(page):
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", f" {line[2:-2]} ")] for line in lines]
    return [[cell.strip() for cell in row] for row in cells if set(row[0].strip()) != {"-"}]


@pytest.mark.parametrize("which", ["measured", "made up"])
def test_every_page_reads_back(report, tmp_path, which):
    shown = report if which == "measured" else made_up(*ROWS)
    for name in ("a.md", "b.HTML", "c.json"):
        write_report(shown, tmp_path / name)
    markdown, page = ((tmp_path / name).read_text("utf-8") for name in ("a.md", "b.HTML"))
    assert markdown_cells(markdown) == expected_cells(shown)
    assert shown.summary() in markdown
    assert Cells(page).rows == expected_cells(shown)
    assert shown.summary() in Cells(page).text
    read = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert read == json.loads(json.dumps(shown.to_dict()))
    assert [row["quantity"] for row in read["effects"]] == [effect.quantity for effect in shown.effects]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "b.HTML", "c.json"]


def test_repr_has_every_row_note_and_the_paragraph(report):
    text = repr(report)
    for effect in report.effects:
        assert effect.ours in text and effect.note in text
    assert text.endswith(report.summary())


# --- stages that fail


def failing(monkeypatch, folder, name, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, name, fail)
    if name != "forecast":
        monkeypatch.setattr(module, "forecast", known_forecast)
    monkeypatch.setattr(module, "estimate_sensitivity", no_sensitivity)
    return rows(effects(str(folder), "64MiB", context=256, progress=False))


@functools.cache
def known_forecast_of(context):
    return forecast(Plan.uniform(tiny_spec("qwen2"), "bf16", context=context), "64MiB")


def known_forecast(plan, budget):
    return known_forecast_of(plan.context)


def no_sensitivity(*args, **kwargs):
    raise LowvramError("left out: slow; never seen")


FAILURES = {
    "forecast": (PermissionError("no such right"), QUANTITIES[:1], NOT_HERE),
    "load": (torch.OutOfMemoryError("CUDA out of memory. Tried"), QUANTITIES[2:5], None),
    "run_workload": (MemoryError(), QUANTITIES[2:3], NOT_HERE),
    "ChatSession": (LowvramError("no chat template; name another"), QUANTITIES[3:5], "not measured"),
    "run_speed": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), QUANTITIES[5:6], NOT_HERE),
    "decoder_for": (BudgetError("the cache is full"), QUANTITIES[5:6], "does not fit"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_stage_that_fails_says_why_and_the_others_appear(monkeypatch, folder, name):
    error, missing, ours = FAILURES[name]
    found = failing(monkeypatch, folder, name, error)
    reason = (str(error) or "MemoryError").split(";")[0]
    assert list(found) == QUANTITIES
    for quantity in QUANTITIES[:6]:
        effect = found[quantity]
        assert (effect.unchecked == effect.note == reason) == (quantity in missing), quantity
        assert bool(effect.figures) == (quantity not in missing)
        if quantity in missing and ours:
            assert effect.ours == ours
    for quantity in QUANTITIES[6:]:
        assert found[quantity].note == "left out: slow"


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RuntimeError("a mistake of ours")])
def test_what_is_no_failure_of_a_machine_passes(folder, error):
    def fail(case):
        raise error

    case = open_case(str(folder), "64MiB", 256, None)
    with pytest.raises(type(error), match=str(error)):
        run_stage(Stage("run", fail, owes=("after", "GPU memory, run")), case)


def test_a_config_alone_gives_forecasts(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    report = effects(str(tmp_path), "64MiB", context=256, progress=False)
    found = rows(report)
    assert list(found) == QUANTITIES
    assert report.weights_from == ""
    for quantity in QUANTITIES[:2]:
        assert found[quantity].figures["peak_bytes"] > 0
    for quantity in QUANTITIES[2:5]:
        assert found[quantity].ours == NOT_HERE
        assert "safetensors" in found[quantity].note
    assert found["decoding"].how.startswith("forecast")
    for quantity in QUANTITIES[6:]:
        assert found[quantity].ours.startswith(f"{NOT_HERE}; -")
        assert (found[quantity].how, found[quantity].held) == ("forecast", None)
        assert found[quantity].figures["peak_bytes"] > 0
        assert CLAIMS[found[quantity].claim].saved <= found[quantity].figures["saved"] < 0.9
    assert "does not define its loss" not in report.summary()


def test_the_articles_own_model_is_judged_by_forecast():
    case = open_case("qwen1.5-4b", GpuBudget.parse("4GiB"), None, None)
    before, after = rows_of(case, "forecast", "plan")
    assert before.held is (before.figures["peak_bytes"] >= CLAIMS["before"].limit)
    assert after.held is (after.figures["peak_bytes"] <= CLAIMS["after"].limit)
    assert "what it would take without a limit: out of memory in load, at model.layers." in before.note
    assert after.figures["fits"]
    assert open_case("qwen1.5-4b", "6GiB", None, None).other
    assert not case.other


@pytest.mark.parametrize(("card", "size", "words"), [(80 * GiB, "4GiB", "larger card"), (4 * GiB, "4GiB", "")])
def test_only_a_card_of_that_size_has_its_speed(monkeypatch, card, size, words):
    gpu = SimpleNamespace(simulated=False, name="Some Card", device=0)
    monkeypatch.setattr(module, "open_gpu", lambda budget: gpu)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (card, card))
    case = open_case("qwen1.5-4b", size, None, None)
    assert bool(case.slow) == bool(words)
    assert words in case.slow
    effect = case.timed("decoding", "decoding", "9 tokens/s", [9.0])
    assert effect.ours == (f"{NOT_HERE}; 9 tokens/s" if words else "9 tokens/s")
    assert effect.unchecked == case.slow


# --- converted directories, arguments, the command


@pytest.fixture(scope="module")
def converted(folder):
    output = folder.parent / "converted"
    spec = find_source(folder).spec("tiny")
    plan = Plan.uniform(spec, "int4", context=256)
    convert(str(folder), output, plan=plan, calibration_tokens=2048, solver="rtn", progress=False)
    return output


def test_converted_directories_are_measured_instead(monkeypatch, folder, converted):
    monkeypatch.setattr(module, "estimate_sensitivity", None)  # nobody asks
    case = open_case(str(folder), "64MiB", 256, {"medium": converted, "deep": converted})
    medium, deep = rows_of(case, "fetch", "sensitivity", "medium", "deep")
    assert medium.how == deep.how == "measured, as converted"
    assert medium.note.startswith("directory converted")
    assert medium.figures == deep.figures
    spec = find_source(converted).spec("c")
    size = Plan.uniform(spec, "stored", context=256).weight_bytes()
    assert medium.figures["weight_bytes"] == size
    assert 0.6 < medium.figures["saved"] < 0.695  # int4, its table in int8: not as small as deep compression
    assert deep.held is None and "saved, not 70%" in deep.unchecked


def test_a_large_tied_table_is_compressed_below_8_bits(tmp_path):
    """In 8 bits it alone would be 27 % of this model, and the rest cannot be in the 3 % that are left."""
    source = write_model(tmp_path / "tied", "llama", vocab_size=3200)
    case = open_case(str(source), "64MiB", 256, None)
    (deep,) = rows_of(case, "fetch", "sensitivity", "deep")
    assert deep.figures["saved"] > 0.695


def test_bad_arguments_are_said_at_once(folder, converted, tmp_path):
    other = write_model(tmp_path / "other", "qwen2", vocab_size=352)
    for words, expected in (
        ({"model": str(converted)}, "expected a 16-bit model, found a directory from lowvram convert"),
        ({"converted": {"medium": folder}}, "expected a directory from lowvram convert, found a 16-bit model"),
        ({"converted": {"deep": tmp_path / "nothing"}}, "no such file"),
        ({"model": str(other), "converted": {"deep": converted}}, "352 words, found 320"),
        ({"context": 5000}, "5000"),
        ({"gpu": "many"}, "expected the card's memory, e.g. 4GiB, found 'many'"),
        ({"model": "no-such-model"}, "no-such-model"),
    ):
        with pytest.raises(LowvramError, match=re.escape(expected)):
            effects(**{"model": str(folder), "gpu": "64MiB", "progress": False, **words})


def command(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    add_report(parser)
    return run_report(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def measured(monkeypatch, report):
    """What ``effects`` was called with; it returns the report there is."""
    calls = []

    def pretend(*args, **kwargs):
        calls.append((args, kwargs))
        return report

    monkeypatch.setattr(cli_report, "effects", pretend)
    monkeypatch.setattr(cli_report, "find_source", lambda name: find_source("smollm2-135m"))
    return calls


def test_the_command_prints_the_table_and_writes_the_file(capsys, measured, report, tmp_path):
    words = ["m", "--gpu", "4GiB", "--context", "99", "--medium", "a", "--deep", "b", "--output", tmp_path / "r.md"]
    assert command(*words) == 0
    out, _ = capsys.readouterr()
    assert repr(report) in out
    assert (tmp_path / "r.md").read_text("utf-8") == report.to_markdown()
    (args, kwargs), *_ = measured
    assert args == ("m", "4GiB")
    assert (kwargs["context"], kwargs["converted"]) == (99, {"medium": "a", "deep": "b"})


def test_json_is_alone_on_stdout(capsys, measured, report):
    assert command("m", "--gpu", "4GiB", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(json.dumps(report.to_dict()))
    assert report.summary() in err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(measured, tmp_path):
    (tmp_path / "folder.md").mkdir()
    for name, expected in (
        ("r.txt", r"ending in \.md, \.html, \.json"),
        ("r", r"ending in \.md"),
        ("missing/r.md", "its folder does not exist"),
        ("folder.md", "it is a folder"),
    ):
        with pytest.raises(LowvramError, match=expected):
            command("m", "--gpu", "4GiB", "--output", tmp_path / name)
    assert measured == []


def test_a_disk_that_is_full_leaves_nothing(monkeypatch, measured, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LowvramError, match="No space left on device"):
        command("m", "--gpu", "4GiB", "--output", tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
    assert cli_report.ENDINGS == (".md", ".html", ".json")
