"""``lowvram convert`` and ``lowvram evaluate``: the promised JSON; every mistake one line, nothing left behind."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab.model.plan import Plan
from lowvram_lab.packaged import calibration_text
from tests.helpers.checkpoints import directory_spec, read_state, restored_state, write_model
from tests.helpers.commands import run_command as run
from tests.helpers.tiny import tiny_config, tiny_spec, tiny_state, tiny_stock, tiny_tokenizer

TEXT = "Held-out words, some of which the model will never have seen. " * 6


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LOWVRAM_CACHE", str(place / "cache"))
        (place / "calibration.txt").write_text(calibration_text()[:2300], encoding="utf-8")
        (place / "text.txt").write_text(TEXT)
        yield place


@pytest.fixture(scope="module")
def source(folder):
    """Untied, with biases; its end token is the chat template's."""
    return write_model(folder / "model", "qwen2")


def convert(capsys, source, output, *words):
    text = source.parent / "calibration.txt"
    return run(capsys, "convert", "--input", source, "--output", output, "--calibration", text, *words)


@pytest.fixture(scope="module")
def converted(folder, source):
    """A directory converted by the command, and what it printed."""
    output = folder / "converted"
    words = ["--input", source, "--output", output, "--calibration", folder / "calibration.txt", "--json"]
    command = [sys.executable, "-m", "lowvram_lab.cli.main", "convert", "--format", "int4", *map(str, words)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in helpers/tiny.py: a second thread only waits for a busy core
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    return output, done


def test_convert_prints_one_document_and_prose_beside_it(converted, source):
    output, done = converted
    found = json.loads(done.stdout)
    promised = "output weight_bytes source_weight_bytes reduction seconds peak_rss_bytes"
    assert set(promised.split()) <= set(found)
    spec = directory_spec(output)
    plan = Plan.uniform(spec, "stored", context=64)
    assert found["output"] == str(output)
    assert found["weight_bytes"] == plan.weight_bytes()
    assert found["source_weight_bytes"] == sum(t.nbytes for t in read_state(source).values())
    assert found["reduction"] == pytest.approx(1 - found["weight_bytes"] / found["source_weight_bytes"])
    assert 0 < found["seconds"] < 300
    assert 50 * 2**20 < found["peak_rss_bytes"] < 4 * 2**30
    assert found["measured"]["kl_mean"] > 0
    for words in ("less than in 16 bits", "perplexity", f"next: lowvram chat {output}"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_json_the_same_is_said_on_stdout(capsys, tmp_path, source):
    status, out, err = convert(capsys, source, tmp_path / "out", "--format", "int8", "--solver", "rtn")
    assert status == 0
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{tmp_path / 'out'}: ")
    assert lines[3] == f"next: lowvram chat {tmp_path / 'out'}"


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["--reduce", "65%", "--formats", "int4,int3"], 0.35),
        (["--reduce", "0.65", "--formats", "int4,int3"], 0.35),
        (["--weight-bytes", "300KiB", "--formats", "int4"], 307_200 / 904_448),
        (["--gpu", "100MiB", "--context", "64", "--formats", "int8,int4"], 0.6),
    ],
)
def test_every_way_to_say_how_small(capsys, tmp_path, source, words, most):
    status, out, _ = convert(capsys, source, tmp_path / "out", *words, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["source_weight_bytes"] == 904_448
    assert found["weight_bytes"] <= most * found["source_weight_bytes"]
    assert directory_spec(tmp_path / "out").stored


def test_a_size_for_a_model_with_a_tied_head(capsys, tmp_path, folder):
    source = write_model(folder / "tied model", "llama")
    status, _, err = convert(capsys, source, tmp_path / "out", "--reduce", "60%", "--formats", "int4")
    assert (status, err) == (0, "")


def test_a_plan_by_hand_and_own_formats(capsys, tmp_path, source):
    spec = directory_spec(source)
    plan = Plan.uniform(spec, "int4", context=64).with_modules("*.down_proj", format="int5-g32")
    plan.to_json(tmp_path / "plan.json")
    status, _, _ = convert(capsys, source, tmp_path / "a", "--plan", tmp_path / "plan.json")
    assert status == 0
    assert directory_spec(tmp_path / "a").stored["model.layers.2.mlp.down_proj"] == "int5-g32"
    status, _, _ = convert(capsys, source, tmp_path / "b", "--reduce", "80%", "--own-formats", "--formats", "int4,int2")
    assert status == 0
    assert directory_spec(tmp_path / "b").stored["model.embed_tokens"] in ("int4", "int2")


def evaluate(capsys, model, *words):
    return run(capsys, "evaluate", model, *words, "--json")


def test_evaluate_prints_what_two_stock_models_say(capsys, converted, source, folder):
    output, _ = converted
    status, out, err = evaluate(
        capsys, output, "--reference", source, "--text", folder / "text.txt", "--window", "400", "--dtype", "fp32"
    )
    found = json.loads(out)
    promised = "perplexity reference_perplexity kl_mean top1_agreement weight_bytes reference_weight_bytes tokens"
    assert status == 0
    assert set(promised.split()) <= set(found)
    ids = torch.tensor(tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    assert len(ids) < 400
    with torch.no_grad():
        p, q = (
            tiny_stock("qwen2", state)(ids[None]).logits[0, :-1].double().log_softmax(-1)
            for state in ({n: t.float() for n, t in read_state(source).items()}, restored_state(output))
        )
    targets = ids[1:, None]
    assert found["tokens"] == len(ids) - 1
    assert found["reference_perplexity"] == pytest.approx(float((-p.gather(1, targets)).mean().exp()), rel=1e-4)
    # the int4 kernel rounds activations to bf16
    assert found["perplexity"] == pytest.approx(float((-q.gather(1, targets)).mean().exp()), rel=0.01)
    assert found["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=0.05)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()), abs=0.02)
    assert found["weight_bytes"] < found["reference_weight_bytes"]
    assert f"{found['tokens']} tokens" in err


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["--tokens", "50"], 50),
        (["--window", "64", "--stride", "16"], len(TEXT) - 1),
        (["--window", "64"], len(TEXT) - 6),
        (["--tokens", "100", "--window", "64", "--stride", "32", "--threads", "1"], 100),
    ],
)
def test_evaluate_how_much_and_how(capsys, converted, source, folder, words, tokens):
    status, out, _ = evaluate(capsys, converted[0], "--reference", source, "--text", folder / "text.txt", *words)
    assert status == 0
    assert json.loads(out)["tokens"] == tokens


def test_evaluate_quantises_while_loading_and_is_its_own_reference(capsys, source, folder, tmp_path):
    text = ["--text", folder / "text.txt"]
    kl = {}
    for fmt in ("bf16", "int8", "int4", "int2"):
        status, out, _ = evaluate(capsys, source, "--format", fmt, *text)
        found = json.loads(out)
        assert status == 0
        assert found["reference_weight_bytes"] == 904_448
        kl[fmt] = found["kl_mean"]
    assert kl["bf16"] == 0 < kl["int8"] < kl["int4"] < kl["int2"]
    Plan.uniform(directory_spec(source), "int4", context=64).to_json(tmp_path / "plan.json")
    status, out, _ = evaluate(capsys, source, "--plan", tmp_path / "plan.json", *text)
    assert status == 0
    assert json.loads(out)["kl_mean"] == kl["int4"]


@pytest.mark.parametrize(
    "words", [[], ["--gpu", "64MiB"], ["--gpu", "64MiB", "--gpu-layers", "1", "--format", "stored"]]
)
def test_a_converted_model_chats(capsys, converted, words):
    output, _ = converted
    options = ["--context", "300", "--prompt", "hello", "--max-new-tokens", "8"]
    status, out, err = run(capsys, "chat", output, *options, *words, "--json")
    found = json.loads(out)
    assert status == 0, err
    assert {"text", "ttft_s", "peak_bytes"} <= set(found)
    assert 0 < found["new_tokens"] <= 8 or found["stopped"]
    assert (
        found["peak_bytes"] > Plan.uniform(directory_spec(output), "stored", context=300).weight_bytes("gpu") / 3
    )  # a third with one layer of three on the card


def test_a_converted_model_is_forecast_exactly(capsys, converted):
    words = [
        "forecast",
        converted[0],
        "--gpu",
        "64MiB",
        "--context",
        "200",
        "--compare",
        "--json",
        "--format",
        "stored",
    ]
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert [row["difference"] for row in json.loads(out)["comparison"]] == [0, 0, 0]


def one_line(status, out, err, words):
    lines = [line for line in err.splitlines() if line.startswith("lowvram")]
    assert (status, out) == (2, ""), err
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in err


MISTAKES = {
    "no size": ([], "one of the arguments"),
    "two sizes": (["--reduce", "60%", "--format", "int4"], "not allowed with"),
    "a share above one": (["--reduce", "170%"], "share such as 70%"),
    "a share of nothing": (["--reduce", "0"], "share such as 70%"),
    "70 without a sign": (["--reduce", "70"], "share such as 70%"),
    "not a share": (["--reduce", "nan"], "share such as 70%"),
    "more than can be saved": (["--reduce", "99%"], "at the least"),
    "bytes without a unit": (["--weight-bytes", "1.9"], "GiB"),
    "a card too small": (["--gpu", "2MiB", "--context", "1024"], "lowvram"),
    "a context without a card": (["--reduce", "60%", "--context", "100"], "--context goes with --gpu"),
    "a context beyond the model": (["--gpu", "1GiB", "--context", "5000"], "1024"),
    "an unknown format": (["--format", "int9"], "unknown format 'int9'"),
    "nf4": (["--format", "nf4"], "nf4 has no place"),
    "unknown formats": (["--reduce", "60%", "--formats", "int4,int9"], "unknown format 'int9'"),
    "formats beside a plan": (["--format", "int4", "--formats", "int4"], "--formats goes with a size"),
    "an unknown solver": (["--format", "int4", "--solver", "awq"], "gptq, clip, rtn"),
    "a missing plan": (["--plan", "missing.json"], "missing.json"),
    "a missing text": (["--format", "int4", "--calibration", "missing.txt"], "missing.txt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, tmp_path, source, name):
    words, expected = MISTAKES[name]
    one_line(*convert(capsys, source, tmp_path / "out", *words), expected)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == []


def test_what_is_wrong_with_input_and_output_is_said(capsys, tmp_path, source, converted):
    (tmp_path / "empty").mkdir()
    one_line(*convert(capsys, source, source, "--format", "int4"), "expected a new or empty directory")
    one_line(*convert(capsys, source, tmp_path / "a" / "b", "--format", "int4"), "its folder does not exist")
    before = sorted(file.name for file in converted[0].iterdir())
    one_line(*convert(capsys, source, converted[0], "--format", "int4"), "found something in it")
    assert sorted(file.name for file in converted[0].iterdir()) == before
    words = ["--output", tmp_path / "out", "--format", "int4"]
    one_line(*run(capsys, "convert", "--input", "no-such-model", *words), "no-such-model")
    one_line(*run(capsys, "convert", "--input", tmp_path / "empty", *words), "config.json")
    one_line(*run(capsys, "convert", "--input", converted[0], *words), "converted model")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


BAD_WEIGHTS = {
    "NaN": (lambda t: t.clone().fill_(float("nan")), "finite weights"),
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), "16- or 32-bit float weight"),
    "integers": (lambda t: t.to(torch.int8), "16- or 32-bit float weight"),
    "too short": (lambda t: t[:-1], "expected shape"),
    "missing": (None, "found none"),
}


@pytest.mark.parametrize("how", BAD_WEIGHTS)
def test_bad_weights_are_one_line_and_leave_nothing(capsys, tmp_path, folder, how):
    change, expected = BAD_WEIGHTS[how]
    name, state = "model.layers.2.mlp.up_proj.weight", tiny_state("qwen2")
    weight = state.pop(name)
    if change:
        state[name] = change(weight)
    source = write_model(folder / f"bad {how}", "qwen2", state)
    for words in (["--format", "int4"], ["--reduce", "60%", "--formats", "int4"]):
        result = convert(capsys, source, tmp_path / "out", *words)
        one_line(*result, name)
        assert expected in result[2]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == []


def test_no_room_is_one_line(capsys, tmp_path, source, monkeypatch):
    import shutil

    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    one_line(*convert(capsys, source, tmp_path / "out", "--format", "int4"), "of disk")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_one_line(capsys, tmp_path, source, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lowvram_lab.conversion.resumable.save_file", full)
    one_line(*convert(capsys, source, tmp_path / "out", "--format", "int4"), "No space left on device")
    assert not (tmp_path / "out").exists()


EVALUATE_MISTAKES = {
    "a window of one": (["--window", "1"], "2 "),
    "a stride beyond the window": (["--window", "32", "--stride", "33"], "stride"),
    "a missing text": (["--text", "missing.txt"], "missing.txt"),
    "an unknown dtype": (["--dtype", "fp64"], "fp64"),
    "no tokens": (["--tokens", "0"], "above zero"),
    "other formats than it holds": (["--format", "int2"], "converted model"),
    "a reference that is no model": (["--reference", "no-such-model"], "no-such-model"),
}


@pytest.mark.parametrize("name", EVALUATE_MISTAKES)
def test_a_mistake_in_evaluating_is_one_line(capsys, converted, source, folder, name):
    words, expected = EVALUATE_MISTAKES[name]
    given = ["--reference", source, "--text", folder / "text.txt", *words]
    one_line(*evaluate(capsys, converted[0], *given), expected)


def test_no_ram_for_both_models_is_one_line_before_the_first_is_loaded(capsys, converted, source, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr("lowvram_lab.cli.evaluate.load", None)
    result = evaluate(capsys, converted[0], "--reference", source)
    one_line(*result, "a model and its 16-bit reference take")
    assert "of RAM, found 1.0 MiB free" in result[2]


def test_references_that_cannot_be_one(capsys, converted, folder, tmp_path):
    output, _ = converted
    one_line(*evaluate(capsys, output), "name its original with --reference")
    one_line(*evaluate(capsys, output, "--reference", output), "holds quantised weights alone")
    other = write_model(folder / "other", "qwen2", vocab_size=352)
    one_line(*evaluate(capsys, output, "--reference", other), "same vocabulary of 320")
    (tmp_path / "short.txt").write_text("a")
    words = ["--reference", folder / "model", "--text", tmp_path / "short.txt"]
    one_line(*evaluate(capsys, output, *words), "two tokens or more")


def test_the_spec_of_the_config_alone_is_enough_to_plan(capsys, converted, tmp_path):
    """A converted directory without its weights: what a forecast needs is in the config."""
    (tmp_path / "config.json").write_bytes((converted[0] / "config.json").read_bytes())
    status, out, _ = run(
        capsys, "forecast", tmp_path, "--gpu", "64MiB", "--context", "128", "--format", "stored", "--json"
    )
    assert status == 0
    assert json.loads(out)["weights_bytes"] == json.loads(converted[1].stdout)["weight_bytes"]
    assert tiny_spec("qwen2").fingerprint == directory_spec(tmp_path).fingerprint
    assert tiny_config("qwen2").vocab_size == directory_spec(tmp_path).vocab_size
