"""A ``.gguf`` file run as it is: its blocks against gguf-py, its tensors against stock transformers, its bytes counted.

No arithmetic of gguf-py's is in the library's way to read codes, none of the library's in what is compared with.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lowvram_lab import files
from lowvram_lab.cli.plan import add_plan_options, chosen_plan
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.errors import CheckpointError, PlanError
from lowvram_lab.evaluation.fidelity import load_reference
from lowvram_lab.faces.split import SplitState, recipes_of, split_plan
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.suited import RECIPES, not_above_held, quick_recipes
from lowvram_lab.repository.gguf_blocks import KEPT as BLOCKS
from lowvram_lab.repository.gguf_blocks import codes_of
from lowvram_lab.repository.gguf_weights import GgufWeights
from lowvram_lab.units import MiB
from tests.helpers.commands import run_command
from tests.helpers.gguf_files import blocks, write_gguf
from tests.helpers.tiny import relative_error

KEPT = {name: kept.format for name, kept in BLOCKS.items()}
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


def model_of(arch: str, tied: bool):
    torch.manual_seed(0)
    config, kind = (LlamaConfig, LlamaForCausalLM) if arch == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    model = kind(config(**SIZES, tie_word_embeddings=tied)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def written(folder: Path, kind: str, arch: str = "llama", tied: bool = True, **options) -> Path:
    path = folder / f"{kind}.gguf"
    write_gguf(path, model_of(arch, tied), arch=arch, kind=kind, **options)
    return path


@pytest.mark.parametrize("name", KEPT)
def test_codes_scales_and_zeros_make_the_weights_that_gguf_py_makes(name):
    kind, fmt = gguf.GGMLQuantizationType[name], get_format(KEPT[name])
    values = np.random.default_rng(1).normal(0, 0.02, (9, 768)).astype(np.float32)
    data = blocks(values, kind)
    codes, scale, zero = codes_of(name, torch.from_numpy(data))
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, (9, 768), (9, 768 // fmt.group_size))
    assert (zero is not None) == (name in ("Q4_1", "Q4_K", "Q5_1", "Q5_K", "Q2_K", "IQ1_S"))
    assert zero is None or fmt.has_zeros
    half = 1 << (fmt.bits - 1)
    assert -half <= codes.min().item() and codes.max().item() < half
    found = codes.double().view(*scale.shape, -1) * scale.double().unsqueeze(-1)
    found = found if zero is None else found + zero.double().unsqueeze(-1)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind)).double()
    assert torch.allclose(found.view_as(expected), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *KEPT])
def test_tensors_are_those_of_the_directory_that_stock_transformers_makes(tmp_path, kind, arch):
    source = find_source(written(tmp_path, kind, arch, tied=arch == "llama"))
    weights, converted = source.checkpoint(progress=False), Checkpoint(source.fetch(progress=False))
    assert isinstance(weights, GgufWeights) and set(weights) == set(converted)
    some = torch.tensor([5, 0, 5, 31])
    for name in weights:
        assert weights.dtype(name) == converted.dtype(name)
        assert torch.equal(weights.read(name), converted.read(name)), name
        assert torch.equal(weights.rows(name)(some), converted.read(name)[some]), name


@pytest.mark.parametrize("kind", KEPT)
def test_a_layer_holds_the_files_own_codes(tmp_path, kind):
    source = find_source(written(tmp_path, kind))
    spec, weights = source.spec(), source.checkpoint(progress=False)
    assert set(spec.held.values()) == {KEPT[kind]} and spec.held[spec.head] == KEPT[kind]
    plan = Plan.uniform(spec, "stored", context=64).with_modules("*", device="cpu")
    model = load(plan, StandInGpu(None), progress=False)
    for module in spec.modules:
        if module.kind == "other" or module.tied_to:
            continue
        found = model.get_submodule(module.name).weight_rows(slice(None), torch.float32)
        codes, scale, zero = weights.integers(f"{module.name}.weight", slice(None))
        groups = codes.float().view(*scale.shape, -1) * scale.bfloat16().float().unsqueeze(-1)
        groups = groups if zero is None else groups + zero.bfloat16().float().unsqueeze(-1)
        assert torch.equal(found, groups.view(codes.shape)), module.name
    assert not list(files.cache_dir().rglob("*.safetensors"))  # nor anything of the size


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KEPT)
def test_logits_are_near_those_of_stock_transformers(tmp_path, kind, arch):
    source = find_source(written(tmp_path, kind, arch, tied=arch == "llama"))
    plan = Plan.uniform(source.spec(), "stored", context=64, dtype="fp32").with_modules("*", device="cpu")
    stock = load_reference(plan, progress=False)
    model, ids = load(plan, StandInGpu(None), progress=False), torch.randint(250, (1, 40))
    with torch.no_grad():
        expected, found = stock(ids).logits, model(ids).logits
        decoder = decoder_for(model)
        decoder.prefill(ids[:, :-1])
        last = decoder.decode(ids[:, -1:])
    # scales to 8 bits of mantissa; inputs to bfloat16 where that is the kernel's
    # any scales side by side, as these are, make weights of IQ4_XS that are five times as large
    most = 0.05 if kind == "IQ4_XS" else 0.02
    assert relative_error(found, expected) < most
    assert relative_error(last.flatten(), expected[0, -1]) < most


@pytest.mark.parametrize("kind", KEPT)
def test_the_forecast_by_the_header_is_what_is_metered(tmp_path, kind):
    source = find_source(written(tmp_path, kind, "qwen2", tied=False, kinds={"output": "Q8_0", "ffn_down": "Q6_K"}))
    spec = source.spec()
    assert spec.held["lm_head"] == "int8-g32" and spec.held["model.layers.1.mlp.down_proj"] == "int6-g16"
    plan, workload = Plan.uniform(spec, "stored", context=64), Workload(40, 4)
    dry = forecast(plan, open_gpu("1000MiB"), workload=workload)
    real = run_workload(load(plan, open_gpu("1000MiB"), progress=False), workload)
    assert (dry.compare(real)["difference"] == 0).all(), dry.compare(real)
    assert (dry.weights_bytes, dry.kv_bytes) == (real.weights_bytes, real.kv_bytes)
    assert real.weights_bytes == plan.weight_bytes()


@pytest.mark.parametrize("kind", KEPT)
def test_codes_take_the_bytes_that_the_files_take_or_so_many_more(tmp_path, kind):
    fmt, number = get_format(KEPT[kind]), gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[number]
    excess = fmt.weight_bytes((256, 512)) * elements / (256 * 512 * size) - 1
    more = {"Q4_0": 5 / 4.5}  # which here has zeros
    # whose scales are scaled themselves, and here of 16 bits
    more |= {"Q2_K": 4 / 2.625, "Q3_K": 4 / 3.4375, "Q4_K": 5 / 4.5, "Q5_K": 6 / 5.5, "Q6_K": 7 / 6.5625}
    # whose codes look whole numbers up
    more |= {"IQ4_NL": 8.5 / 4.5, "IQ4_XS": 8.5 / 4.25, "MXFP4": 5.5 / 4.25}
    more |= {"IQ1_S": 3 / 1.5625, "IQ1_M": 6 / 1.75, "IQ2_XXS": 8.5 / 2.0625, "IQ2_XS": 9 / 2.3125, "IQ2_S": 9 / 2.5625}
    more |= {"IQ3_XXS": 6.5 / 3.0625, "IQ3_S": 5.5 / 3.4375}
    more |= {"TQ1_0": 2.0625 / 1.6875}  # whose digits are to the base of three
    assert excess == pytest.approx(more.get(kind, 1) - 1)


def test_a_plan_of_the_files_format_takes_its_codes_and_another_rounds_them(tmp_path):
    spec = find_source(written(tmp_path, "Q4_0")).spec()
    name = "model.layers.0.mlp.up_proj"
    weights = {}
    for recipe in ("stored", "int4-g32", "int8"):
        plan = Plan.uniform(spec, recipe, context=64).with_modules("*", device="cpu")
        layer = load(plan, StandInGpu(None), progress=False).get_submodule(name)
        weights[recipe] = layer.weight_rows(slice(None), torch.float32)
    assert torch.equal(weights["stored"], weights["int4-g32"])
    assert not torch.equal(weights["stored"], weights["int8"])


def test_the_planner_takes_what_the_file_holds_before_anything_larger(tmp_path):
    spec = find_source(written(tmp_path, "Q8_0", "qwen2", tied=False)).spec()
    choice = auto_plan(spec, "1GiB", 64)
    assert choice.plan.asked == "stored"
    assert (
        choice.plan == Plan.uniform(spec, "stored", context=64) or choice.plan.modules["lm_head"].format == "int8-g32"
    )


@pytest.mark.parametrize("kind", ["Q6_K", "IQ3_S"])
def test_a_type_without_a_format_is_read_in_floats_and_that_is_said(tmp_path, kind, caplog, monkeypatch):
    monkeypatch.delitem(BLOCKS, kind)
    spec = find_source(written(tmp_path, "Q8_0", kinds={"ffn_up": kind})).spec()
    assert spec.held == {}
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"Q8_0.gguf: no format here holds {kind}: its weights are read in bfloat16"]
    assert set(Plan.uniform(spec, "stored", context=64).modules[m.name].format for m in spec.modules) == {"bf16"}


def test_a_file_without_a_tensor_or_with_one_too_many_is_refused(tmp_path):
    short = written(tmp_path, "Q8_0", skip=("blk.1.attn_norm.weight",))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first model.layers.1.input_layernorm.weight"):
        find_source(short).checkpoint(progress=False)
    odd = written(tmp_path, "Q4_0", extra={"blk.0.extra.weight": np.zeros(4)})
    with pytest.raises(CheckpointError, match=r"holds 1 tensors .* has no place for, first blk.0.extra.weight"):
        find_source(odd).checkpoint(progress=False)


def parts_of(folder: Path, kind: str = "Q4_0", **options) -> list[Path]:
    """A file that gguf-py has split, four tensors a part."""
    written(folder, kind, in_part=4, **options)
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q6_K"])
def test_a_file_in_parts_is_the_file(tmp_path, kind):
    (tmp_path / "whole").mkdir()
    whole = find_source(written(tmp_path / "whole", kind))
    parts = parts_of(tmp_path, kind)
    assert len(parts) > 2 and parts[0].name == f"{kind}-00001-of-{len(parts):05}.gguf"
    source = find_source(parts[1])
    assert source == find_source(parts[0])
    assert source.spec().held == whole.spec().held and source.config().to_dict() == whole.config().to_dict()
    weights, expected = source.checkpoint(progress=False), whole.checkpoint(progress=False)
    assert weights.files == parts and set(weights) == set(expected)
    assert all(torch.equal(weights.read(name), expected.read(name)) for name in expected)
    plan = Plan.uniform(source.spec(), "stored", context=64)
    measured = run_workload(load(plan, open_gpu("1000MiB"), progress=False), Workload(40, 4))
    assert (forecast(plan, open_gpu("1000MiB"), workload=Workload(40, 4)).compare(measured)["difference"] == 0).all()
    stock = load_reference(Plan.uniform(whole.spec(), "stored", context=64), progress=False)
    found, ids = load_reference(plan, progress=False), torch.randint(250, (1, 40))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, stock(ids).logits)
    assert source.tokenizer()("he said 12")["input_ids"] == whole.tokenizer()("he said 12")["input_ids"]
    directories = [Checkpoint(each.fetch(progress=False)) for each in (source, whole)]
    assert all(torch.equal(directories[0].read(name), directories[1].read(name)) for name in directories[1])


def test_a_copy_in_another_folder_is_another_file(tmp_path, monkeypatch):
    """Of the same name, size and time."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    shutil.copytree(written(first, "Q4_0").parent, second)
    for folder in (first, second):
        monkeypatch.chdir(folder)
        assert find_source("Q4_0.gguf").checkpoint(progress=False).files == [folder / "Q4_0.gguf"]


def test_parts_that_are_no_whole_are_refused(tmp_path):
    parts = parts_of(tmp_path)
    gone = parts[2].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"one of {len(parts)} parts, of which {parts[2].name} is missing"):
        find_source(parts[0]).spec()
    parts[1].rename(parts[2])
    gone.rename(parts[1])
    with pytest.raises(CheckpointError, match=f"{parts[1].name}: expected part 2 of {len(parts)}"):
        find_source(parts[0]).spec()
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=f"one of {len(parts)} parts, under another name; expected"):
        find_source(alone).spec()


def test_a_part_without_the_first_is_refused_by_its_own_name(tmp_path, monkeypatch):
    parts = parts_of(tmp_path)
    parts[0].unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{parts[1].name}: .* of which {parts[0].name} is missing"):
        find_source(parts[1].name).spec()


@pytest.mark.parametrize(
    ("count", "says"), [("3", "split.count is 3"), (True, "split.count is True"), (2, "one of 2 parts")]
)
def test_a_count_of_parts_that_cannot_be_is_refused(tmp_path, count, says):
    with pytest.raises(CheckpointError, match=says):
        find_source(written(tmp_path, "Q4_0", split__count=count)).spec()


@pytest.mark.parametrize("ending", ["00001-of-00000", "00003-of-00002", "00000-of-00001"])
def test_a_name_that_counts_wrongly_is_a_name(tmp_path, ending):
    path = written(tmp_path, "Q4_0").rename(tmp_path / f"m-{ending}.gguf")
    assert find_source(path).spec().num_hidden_layers == 2


def test_a_part_of_another_conversion_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    parts, others = parts_of(tmp_path), parts_of(tmp_path / "other", skip=("blk.0.attn_q.weight",))
    assert len(others) == len(parts)
    others[1].replace(parts[1])
    with pytest.raises(CheckpointError, match="which another part holds too|expected .* tensors in its parts"):
        find_source(parts[0]).spec()


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = written(tmp_path, "Q8_0")
    weights = find_source(path).checkpoint(progress=False)
    start = weights._header.places["blk.0.ffn_up.weight"].start
    data = bytearray(path.read_bytes())
    data[start : start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    plan = Plan.uniform(find_source(path).spec(), "stored", context=64)
    with pytest.raises(CheckpointError, match=r"up_proj.weight: expected finite scales, found NaN or infinite"):
        load(plan, StandInGpu(None), progress=False)


def test_the_small_files_are_written_once_and_hold_no_weights(tmp_path, monkeypatch):
    source = find_source(written(tmp_path, "Q8_0"))
    assert source.needs_cache()
    folder = source.small_files(progress=False)
    assert not source.needs_cache()
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 100_000
    monkeypatch.setattr("lowvram_lab.repository.gguf._write_small_files", lambda *_: pytest.fail("written again"))
    assert source.small_files(progress=False) == folder
    assert source.tokenizer()("hello").input_ids


def test_a_held_format_is_no_law(tmp_path):
    spec = find_source(written(tmp_path, "Q4_1")).spec()
    Plan.uniform(spec, "bf16", context=64)
    with pytest.raises(PlanError, match="converted model that holds it in"):
        Plan.uniform(replace(spec, stored=spec.held, held={}), "bf16", context=64)


LOADING = """
import gc, sys
from lowvram_lab.engine.load import load
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.memory.host import give_back_heap, watch_host
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source

source = find_source(sys.argv[1])
plan = Plan.uniform(source.spec(), "stored", context=64).with_modules("*", device="cpu")
weights = source.checkpoint(False)
load(plan, StandInGpu(None), checkpoint=weights, progress=False)  # what it imports stays
gc.collect()
give_back_heap()
with watch_host() as seen:
    model = load(plan, StandInGpu(None), checkpoint=weights, progress=False)
print(seen.growth_bytes, plan.weight_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux counts it")
def test_loading_takes_little_more_ram_than_the_weights(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    path = tmp_path / "larger.gguf"
    write_gguf(path, LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), kind="Q4_1")
    ran = subprocess.run([sys.executable, "-c", LOADING, str(path)], capture_output=True, text=True, check=True)
    growth, size = map(int, ran.stdout.split())
    assert size > 75 * MiB
    assert growth < 1.15 * size + 48 * MiB  # packing a module of 4 million weights takes half of that


def test_the_panel_offers_what_the_file_holds_first(tmp_path):
    spec = find_source(written(tmp_path, "Q4_1")).spec()
    assert recipes_of(spec) == ("stored", "bf16", "int8", "int4")
    plan = split_plan(SplitState(spec.num_hidden_layers, 64, recipe="stored"), spec)
    assert plan.modules == Plan.uniform(spec, "stored", context=64).modules


ODD = {
    "llama__attention__layer_norm_rms_epsilon": (float("nan"), "nan for llama.attention.layer_norm_rms_epsilon"),
    "llama__rope__freq_base": (0.0, "0.0 for llama.rope.freq_base; expected a positive number"),
    "llama__rope__scaling__factor": (-2.0, "-2.0 for llama.rope.scaling.factor"),
    "llama__attention__head_count_kv": (3, "expected a number that divides the 8 heads of queries"),
    "llama__embedding_length": (128, r"tensor token_embd.weight: expected shape \(260, 128\) by the file's metadata"),
    "llama__feed_forward_length": (320, r"ffn_\w+.weight: expected shape"),
}


@pytest.mark.parametrize("key", ODD)
def test_numbers_that_no_model_has_are_refused_by_the_header(tmp_path, key):
    value, words = ODD[key]
    path = written(tmp_path, "Q8_0", **{key: value})
    with pytest.raises(CheckpointError, match=words) as error:
        find_source(path).spec()
    assert "config.json" not in str(error.value)


def test_more_tokens_than_rows_are_refused_before_a_text_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    config = LlamaConfig(**{**SIZES, "vocab_size": 250}, tie_word_embeddings=True)
    write_gguf(path, LlamaForCausalLM(config), kind="Q8_0")
    with pytest.raises(CheckpointError, match="tokens and 250 rows for them"):
        find_source(path).spec()


def test_a_file_that_is_cut_short_after_it_was_opened_is_refused(tmp_path):
    path = written(tmp_path, "Q8_0")
    weights = find_source(path).checkpoint(progress=False)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cannot be read any more; download the file again"):
        for name in weights:
            weights.read(name)


def test_on_a_card_without_bf16_the_files_codes_are_multiplied_in_fp16(tmp_path):
    spec = find_source(written(tmp_path, "Q8_0", "qwen2", tied=False)).spec()
    choice = auto_plan(spec, GpuBudget.parse("1GiB", card="t4"), 64)
    assert choice.plan.asked == "stored" and choice.plan.dtype == choice.plan.kv_format == "fp16"


def test_codes_are_split_before_they_are_rounded_again(tmp_path):
    spec = find_source(written(tmp_path, "Q4_1", "qwen2", tied=False)).spec()
    plan = Plan.uniform(spec, "stored", context=64)
    smallest = replace(plan, kv_format="int4")
    card = next(n * MiB for n in range(60, 0, -1) if not forecast(smallest, n * MiB).fits)
    choice = auto_plan(spec, card, 64)
    assert choice.plan.asked == "stored" and choice.plan.weight_bytes("cpu") > 0


def test_for_speed_no_recipe_takes_more_bytes_than_the_file(tmp_path):
    spec = find_source(written(tmp_path, "Q4_0", "qwen2", tied=False)).spec()
    offered = not_above_held(spec, quick_recipes(RECIPES))
    held = Plan.uniform(spec, "stored", context=64).weight_bytes()
    assert offered[0] == "stored" and "int6" not in offered
    assert all(Plan.uniform(spec, name, context=64).weight_bytes() < held for name in offered[1:])


def chosen(spec, gpu, *words):
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    return chosen_plan(parser.parse_args(["a model", "--context", "64", *words]), spec, gpu)[0]


@pytest.mark.parametrize(
    ("kinds", "kernels", "words", "dtype"),
    [
        ((), "cpu", (), "fp32"),
        ((), "cpu", ("--format", "stored"), "fp32"),
        ((), "cpu", ("--format", "stored", "--dtype", "bf16"), "bf16"),
        ((), "cpu", ("--format", "int8"), "bf16"),
        ((), "cuda", (), "bf16"),
        ((), "cpu", ("--gpu", "64MiB"), "bf16"),
        ((("output", "F16"),), "cpu", (), "bf16"),
    ],
)
def test_codes_of_a_file_in_ram_compute_in_float32(tmp_path, kinds, kernels, words, dtype):
    write_gguf(tmp_path / "a.gguf", LlamaForCausalLM(LlamaConfig(**SIZES)), kind="Q8_0", kinds=kinds)
    budget = GpuBudget.parse(words[1], 0) if "--gpu" in words else None
    plan = chosen(find_source(tmp_path / "a.gguf").spec(), DryRunGpu(budget, kernels), *words)
    assert plan.dtype == plan.kv_format == dtype


def test_a_forecast_is_of_what_a_run_computes(tmp_path, capsys):
    write_gguf(tmp_path / "a.gguf", LlamaForCausalLM(LlamaConfig(**SIZES)), kind="Q8_0")
    words = ("forecast", str(tmp_path / "a.gguf"), "--context", "64", "--json")
    alone, run = (json.loads(run_command(capsys, *words, *more)[1]) for more in ((), ("--compare",)))
    target = json.loads(run_command(capsys, *words, "--target", "pi5-8gb")[1])
    assert alone["plan"] == run["plan"]
    assert target["plan"]["dtype"] == "fp32"
