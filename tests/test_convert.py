"""Converted directories: opened by stock transformers and by us, measured again, interrupted anywhere, refused in time."""

import errno
import functools
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import (
    TOLERANCES,
    directory_spec,
    known_bug,
    random_ids,
    read_state,
    relative_error,
    restored_state,
    seeded,
    tiny_spec,
    tiny_state,
    tiny_stock,
    tiny_tokenizer,
    write_model,
)
from safetensors import SafetensorError
from safetensors.torch import save_file

from lowvram_lab.convert import Conversion, convert
from lowvram_lab.dry_run import forecast
from lowvram_lab.errors import BudgetError, CheckpointError, LowvramError, PlanError
from lowvram_lab.evaluate import sample_text
from lowvram_lab.formats import get_format
from lowvram_lab.loader import load
from lowvram_lab.memory.device import open_gpu
from lowvram_lab.partial import PartialDirectory
from lowvram_lab.plan import Plan
from lowvram_lab.profile import Workload, run_workload
from lowvram_lab.quantize.gptq import output_error
from lowvram_lab.quantize.solvers import round_to_nearest
from lowvram_lab.quantize.streamed import CORRECTION, corrected
from lowvram_lab.quantize.streamed import relative_error as output_change
from lowvram_lab.source import find_source
from lowvram_lab.weights.calibration import calibration_text

module = importlib.import_module("lowvram_lab.convert")  # the package's name for it is the function

HELD_OUT = sample_text()[:900]
"""Some 1100 tokens of a byte each: two windows and a rest."""

TOKENS = 1024
CONTEXT = 256
EMBED, HEAD, UP = "model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj"

stand_in_only = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder for the whole file, a cache of its own, and less to read: these models learn nothing from more."""
    place = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(place / "cache"))
        patch.setattr(module, "sample_text", lambda: HELD_OUT)
        patch.setattr(module, "SENSITIVITY_TOKENS", 512)
        yield place


def mixed(kind: str) -> Plan:
    """Every width of code, both kinds of layout, groups of several sizes; what stock transformers opens."""
    plan = Plan.uniform(tiny_spec(kind), "int4", context=CONTEXT)
    for pattern, fmt in {
        "*.q_proj": "int3",
        "*.k_proj": "int5-g32",
        "*.v_proj": "int6-g128",
        "*.0.*.o_proj": "int2-g32",
        "*.1.*.o_proj": "int8",
        "*.2.*.o_proj": "bf16",
        "*.gate_proj": "int4-g128",
        "*.down_proj": "int4-g192",
        "lm_head": "int4-g32" if kind == "qwen2" else "int8",
        "model.embed_tokens": "bf16" if kind == "qwen2" else "int8",
    }.items():
        plan = plan.with_modules(pattern, format=fmt)
    return plan


def small_embedding(kind: str) -> Plan:
    plan = Plan.uniform(tiny_spec(kind), "int4", context=CONTEXT).with_modules(EMBED, format="int5")
    return plan.with_modules(HEAD, format="int5" if kind == "llama" else "int3-g32")


PLANS = {
    "llama": ("llama", mixed),
    "qwen2": ("qwen2", mixed),
    "llama, own": ("llama", small_embedding),
    "qwen2, own": ("qwen2", small_embedding),
}


def run(source, output, **options) -> Conversion:
    return convert(str(source), output, **{"calibration_tokens": TOKENS, "progress": False, **options})


@pytest.fixture(scope="module")
def sources(folder):
    return {kind: write_model(folder / kind, kind) for kind in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def made(folder, sources):
    """Name in ``PLANS`` → directory and ``Conversion``; each made once."""

    @functools.cache
    def make(name):
        kind, plan = PLANS[name]
        output = folder / f"{name} converted"
        return output, run(sources[kind], output, plan=plan(kind))

    return make


def original(source, kind, dtype=torch.float32):
    """The stock model of a directory's weights."""
    return tiny_stock(kind, {name: value.float() for name, value in read_state(source).items()}, dtype)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.cpu().float()


def ours(directory, dtype="bf16"):
    spec = directory_spec(directory)
    plan = Plan.uniform(spec, "stored", context=CONTEXT, dtype=dtype)
    gpu = open_gpu("1000MiB")
    return load(plan, gpu, spec=spec, checkpoint=find_source(directory).checkpoint(), progress=False)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_stock_transformers_opens_it_and_agrees(made, name):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    directory, _ = made(name)
    ids, kind = random_ids(70), PLANS[name][0]
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = logits(tiny_stock(kind, restored_state(directory)), ids)
    assert relative_error(logits(stock, ids), expected) < 1e-4
    assert relative_error(logits(ours(directory), ids), expected) < TOLERANCES["bf16"]


@pytest.mark.parametrize("name", PLANS)
def test_it_opens_here_with_the_very_weights_that_the_files_hold(made, name):
    directory, done = made(name)
    ids, kind = random_ids(70), PLANS[name][0]
    expected = logits(tiny_stock(kind, restored_state(directory)), ids)
    found = ours(directory, "fp32")
    # torch's int4 kernel (int4-g32 to -g256) casts activations to bf16 around the call; nothing else does
    assert relative_error(logits(found, ids), expected) < TOLERANCES["bf16"]
    assert {n: a.format for n, a in found.plan.modules.items() if a.format != "fp32"} == {
        n: a.format for n, a in done.plan.modules.items() if a.format != "bf16"
    }
    assert 0.01 < relative_error(expected, logits(original(done_source(directory), kind), ids)) < TOLERANCES["int3"]


def done_source(directory) -> Path:
    return Path(json.loads((directory / "recipe.json").read_text())["source"])


@torch.no_grad()
def independently(ours, theirs) -> dict:
    """What a recipe's ``measured`` says, from two stock models in float32 and one direct sum over windows."""
    ids = torch.tensor(tiny_tokenizer()(HELD_OUT, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    p, q = (model(windows).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in (theirs, ours))
    targets = windows[:, 1:].reshape(-1, 1)
    return {
        "tokens": len(targets),
        "perplexity": math.exp(-q.gather(1, targets).mean()),
        "reference_perplexity": math.exp(-p.gather(1, targets).mean()),
        "kl_mean": float((p.exp() * (p - q)).sum(1).mean()),
        "top1_agreement": float((p.argmax(1) == q.argmax(1)).double().mean()),
    }


@pytest.mark.parametrize("name", PLANS)
def test_the_measured_loss_is_that_of_two_whole_models(made, name):
    directory, done = made(name)
    kind = PLANS[name][0]
    expected = independently(tiny_stock(kind, restored_state(directory)), original(done_source(directory), kind))
    assert done.measured.keys() == expected.keys()
    assert done.measured["tokens"] == expected["tokens"] == 2 * 511
    for key in ("perplexity", "reference_perplexity", "kl_mean", "top1_agreement"):
        assert done.measured[key] == pytest.approx(expected[key], rel=1e-4), key
    assert json.loads((directory / "recipe.json").read_text())["measured"] == done.measured


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sources_of_other_dtypes(folder, dtype):
    """Weights that stay in 16 bits are rounded to bf16; the original is measured as it is, so that shows in the KL."""
    source = write_model(folder / f"source {dtype}", "qwen2", dtype=dtype)
    output = folder / f"converted {dtype}"
    done = run(source, output, plan=mixed("qwen2"))
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert read_state(output)["model.norm.weight"].dtype == torch.bfloat16
    expected = independently(tiny_stock("qwen2", restored_state(output)), original(source, "qwen2"))
    assert done.measured["kl_mean"] == pytest.approx(expected["kl_mean"], rel=0.02)
    assert done.measured["reference_perplexity"] == pytest.approx(expected["reference_perplexity"], rel=1e-3)


@pytest.mark.parametrize("name", PLANS)
def test_the_files_and_what_they_say(made, sources, name):
    directory, done = made(name)
    kind = PLANS[name][0]
    shards = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    beside = ["README.md", "chat_template.jinja", "config.json", "model.safetensors.index.json", "recipe.json"]
    assert sorted(f.name for f in directory.iterdir()) == sorted(
        [*shards, *beside, "tokenizer.json", "tokenizer_config.json"]
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (directory / file).read_bytes() == (sources[kind] / file).read_bytes()
    tensors = read_state(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == set(shards)
    # in memory: as the plan says; on disk the shape of a packed weight, and a tied head's own scales, come on top
    extra = sum(
        t.nbytes for n, t in tensors.items() if n.endswith("_shape") or n == "lm_head.weight_scale" and kind == "llama"
    )
    assert done.weight_bytes == done.plan.weight_bytes(tiny_spec(kind))
    if any(get_format(a.format).kind == "int4" for a in done.plan.modules.values()):
        zeros = sum(
            2 * math.prod(m.weight_shape) // get_format(done.plan.modules[m.name].format).group_size
            for m in tiny_spec(kind).modules
            if get_format(done.plan.modules[m.name].format).kind == "int4"
        )  # torch's kernel wants zero points; a file of symmetric codes has none
    assert index["metadata"]["total_size"] - extra == done.weight_bytes - zeros
    assert done.file_bytes == sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    assert done.source_weight_bytes == 2 * tiny_spec(kind).num_parameters
    assert done.reduction == pytest.approx(1 - done.weight_bytes / done.source_weight_bytes)
    assert done.estimated_kl is None
    assert done.seconds > 0
    assert done.peak_rss_bytes > 2**20
    json.dumps(done.to_dict())


@pytest.mark.parametrize("name", PLANS)
def test_the_config_is_the_originals_and_how_it_is_stored(made, sources, name):
    directory, done = made(name)
    config, before = (json.loads((d / "config.json").read_text()) for d in (directory, sources[PLANS[name][0]]))
    block = config.pop("quantization_config")
    assert config == {**before, "dtype": "bfloat16"}
    assert block["quant_method"] == "compressed-tensors"
    stored = directory_spec(directory).stored
    assert stored == {n: a.format for n, a in done.plan.modules.items() if a.format != "bf16"}


@pytest.mark.parametrize("name", PLANS)
def test_the_recipe_makes_it_again(made, sources, folder, name):
    directory, done = made(name)
    facts = json.loads((directory / "recipe.json").read_text())
    plan = Plan.from_json(json.dumps(facts["plan"]))
    assert plan == done.plan
    assert facts["source"] == str(sources[PLANS[name][0]])
    assert (facts["solver"], facts["calibration_tokens"]) == ("gptq", TOKENS)
    quantised = {n for n, a in plan.modules.items() if a.format != "bf16"} - ({HEAD} if "llama" in name else set())
    assert facts["modules"].keys() == quantised
    for module_name, report in facts["modules"].items():
        assert report["format"] == plan.modules[module_name].format
        assert report["solver"] in ("gptq", "clip", "rtn")
        assert 0 <= report["output_error"] < 1
    again = folder / f"{name} again"
    run(sources[PLANS[name][0]], again, plan=plan)
    assert contents(again) == contents(directory)


def contents(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("name", PLANS)
def test_the_model_card_says_what_it_costs_and_who_opens_it(made, name):
    yaml = pytest.importorskip("yaml")
    directory, done = made(name)
    text = (directory / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "compressed-tensors" in head["tags"]
    for words in (
        f"-{done.reduction:.1%}",
        f"{done.measured['kl_mean']:.4f} nats",
        f"{done.measured['top1_agreement']:.1%}",
        f"{TOKENS} tokens",
        "the text that comes with lowvram_lab",
    ):
        assert words in text, words
    assert ("lowvram_lab alone" in text) == ("own" in name)
    for fmt, count in {a.format: 0 for a in done.plan.modules.values()}.items():
        count = sum(a.format == fmt for a in done.plan.modules.values())
        assert f"| {fmt} | {count} |" in text


@stand_in_only
@pytest.mark.parametrize("name", ["llama", "qwen2, own"])
@pytest.mark.parametrize("split", [False, True])
def test_the_forecast_of_a_converted_model_is_exact(made, name, split):
    directory, _ = made(name)
    spec, gpu = directory_spec(directory), open_gpu("1000MiB")
    plan = Plan.uniform(spec, "stored", context=CONTEXT)
    placed = plan.with_gpu_layers(spec, 1) if split else plan
    model = load(placed, gpu, checkpoint=find_source(directory).checkpoint(), spec=spec, progress=False)
    workload = Workload(100, 3)  # 100 tokens take the dequantised paths, one token the kernels
    table = forecast(placed, spec, gpu, workload=workload).compare(run_workload(model, workload))
    assert (table["difference"] == 0).all(), table
    assert plan.weight_bytes(spec) == plan.weight_bytes(tiny_spec(PLANS[name][0]))


# --- interrupted ---

TINIER = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(scope="module")
def tinier(folder):
    """Sources, and how each is converted: a tied one after a plan, an untied one after a recipe of its own."""
    llama, qwen2 = (write_model(folder / f"tinier {kind}", kind, **TINIER) for kind in ("llama", "qwen2"))
    text = folder / "calibration.txt"
    text.write_text(calibration_text()[:2100], encoding="utf-8")  # the library's own text takes as long to tokenize
    return {
        "plan": (llama, {"calibration": text, "plan": Plan.uniform(directory_spec(llama), "int3", context=64)}),
        "recipe": (qwen2, {"calibration": text, "reduction": 0.65, "formats": ("int4", "int3-g32")}),
    }


@pytest.fixture(scope="module")
def whole(folder, tinier):
    """Every file of an uninterrupted conversion."""

    @functools.cache
    def make(name):
        source, options = tinier[name]
        run(source, folder / f"whole {name}", **options)
        return contents(folder / f"whole {name}")

    return make


class Killed(BaseException):
    """Not an ``Exception``: nothing may catch it, as nothing catches a kill."""


def killer(monkeypatch, name: str, count: int):
    """Makes the ``count``-th call of a method raise, before it does anything; returns how often it was called."""
    calls, method = [], getattr(PartialDirectory, name)

    def wrapped(self, *arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise Killed
        return method(self, *arguments)

    monkeypatch.setattr(PartialDirectory, name, wrapped)
    return calls


# embedding, two layers and head: four shards, three states, three reports, index, recipe and config
STAGES = {
    "plan": [("_adopt", n) for n in range(1, 14)] + [("forget", n) for n in range(1, 5)] + [("publish", 1)],
    "recipe": [("_adopt", n) for n in range(2, 14, 3)],
}


@pytest.mark.parametrize("name", STAGES)
def test_killed_at_any_stage_and_resumed_the_bytes_are_the_same(tmp_path, tinier, whole, name):
    """Every stage one after the other, each from a fresh start: twice as many conversions of a very small model."""
    (source, options), expected = tinier[name], whole(name)
    for stage, count in STAGES[name]:
        output = tmp_path / f"{stage}-{count}"
        with pytest.MonkeyPatch.context() as patch:
            killer(patch, stage, count)
            with pytest.raises(Killed):
                run(source, output, **options)
        assert not output.exists()
        assert output.with_name(f".{output.name}.partial").is_dir()
        run(source, output, **options)
        assert contents(output) == expected, (stage, count)
        assert not output.with_name(f".{output.name}.partial").exists()


def test_killed_again_and_again_it_goes_on_each_time(tmp_path, tinier, whole):
    source, options = tinier["plan"]
    output, shards = tmp_path / "out", []
    for _ in range(30):
        with pytest.MonkeyPatch.context() as patch:
            calls = killer(patch, "save_tensors", 3)  # a shard and its state further, then dead
            try:
                run(source, output, **options)
            except Killed:
                shards += [file for file, _ in calls[:-1] if file.startswith("model-")]
                continue
        break
    assert contents(output) == whole("plan")
    assert shards == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3)]


def test_what_is_finished_is_not_made_again(tmp_path, tinier, whole):
    source, options = tinier["plan"]
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, "save_tensors", 7)  # the head, after embedding, two layers and their three states
        with pytest.raises(Killed):
            run(source, tmp_path / "out", **options)
    with pytest.MonkeyPatch.context() as patch:
        calls = killer(patch, "save_tensors", 0)
        run(source, tmp_path / "out", **options)
    assert [file for file, _ in calls] == ["model-00004-of-00004.safetensors"]
    assert contents(tmp_path / "out") == whole("plan")


@pytest.mark.parametrize(
    ("changed", "value"), [("solver", "clip"), ("calibration_tokens", 512), ("plan", "int4"), ("the source", None)]
)
def test_interrupted_and_called_with_other_settings_it_starts_afresh(tmp_path, tinier, changed, value):
    source, options = tinier["plan"]
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, "save_tensors", 5)
        with pytest.raises(Killed):
            run(source, tmp_path / "out", **options)
    if changed == "plan":
        value = Plan.uniform(directory_spec(source), value, context=64)
    if changed == "the source":
        source = Path(shutil.copytree(source, tmp_path / "source"))  # copies times too
        os.utime(source / "model.safetensors")
        options = {**options}
    else:
        options = {**options, changed: value}
    run(source, tmp_path / "out", **options)
    run(source, tmp_path / "fresh", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_one_call_more_would_have_been_none(tmp_path, tinier):
    """That the stages above are all there are."""
    source, options = tinier["plan"]
    with pytest.MonkeyPatch.context() as patch:
        files, forgotten = killer(patch, "_adopt", 0), killer(patch, "forget", 0)
        run(source, tmp_path / "out", **options)
    assert (len(files), len(forgotten)) == (13, 4)


@pytest.mark.parametrize("damage", ["a shard", "a state", "both"])
def test_a_file_damaged_meanwhile_is_made_again(tmp_path, tinier, whole, damage):
    source, options = tinier["plan"]
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, "save_tensors", 7)
        with pytest.raises(Killed):
            run(source, tmp_path / "out", **options)
    partial = tmp_path / ".out.partial"
    files = {"a shard": ["model-00002-of-00004.safetensors"], "a state": ["state/states-2.safetensors"]}
    for file in sum(files.values(), []) if damage == "both" else files[damage]:
        data = bytearray((partial / file).read_bytes())
        data[-3] ^= 255
        (partial / file).write_bytes(data)
    run(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == whole("plan")


COMMAND = [sys.executable, "-m", "lowvram_lab.cli", "convert", "--format", "int3", "--json"]


@pytest.mark.slow
def test_kill_9_and_again_ends_in_the_same_bytes(tmp_path):
    """A real process, a real kill, as soon as each shard is there; about a minute."""
    source = write_model(tmp_path / "source", "qwen2", num_hidden_layers=4)
    assert subprocess.run([*COMMAND, "--input", source, "--output", tmp_path / "whole"], timeout=300).returncode == 0
    partial, kills = tmp_path / ".out.partial", 0
    for shard in range(1, 6):
        process = subprocess.Popen(
            [*COMMAND, "--input", source, "--output", tmp_path / "out"], stdout=subprocess.DEVNULL
        )
        try:
            until = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < until:
                if (partial / f"model-0000{shard}-of-00006.safetensors").exists():
                    break
                time.sleep(0.001)
            kills += process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "out").exists():
            break
    assert kills >= 2
    if not (tmp_path / "out").exists():
        assert partial.is_dir()
        subprocess.run([*COMMAND, "--input", source, "--output", tmp_path / "out"], timeout=300, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- no room ---


@pytest.mark.parametrize("free", [0, 300_000])
def test_too_little_disk_is_said_before_work_begins(tmp_path, tinier, free, monkeypatch):
    source, options = tinier["plan"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(LowvramError, match=r"the conversion needs .* of disk, found .* free"):
        run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("os error 28")])
@pytest.mark.parametrize("count", [1, 4])
def test_a_disk_that_fills_up_leaves_no_output_and_can_be_gone_on_with(tmp_path, tinier, whole, error, count):
    source, options = tinier["plan"]
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise error
        return save_file(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowvram_lab.partial.save_file", full)
        with pytest.raises(type(error)):
            run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == whole("plan")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no such limit here")
@known_bug("safetensors raises an error of its own, neither OSError nor LowvramError")
def test_a_file_that_cannot_grow_is_an_error_the_command_line_explains(tmp_path, tinier):
    """A real refusal of the system, by a limit on the size of files instead of a full disk."""
    source, options = tinier["plan"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
        with pytest.raises((LowvramError, OSError)):
            run(source, tmp_path / "out", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
