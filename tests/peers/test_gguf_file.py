"""The file that llama.cpp runs: which one, and llama.cpp's own quantiser where it is installed."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.peers import gguf_file as module
from lowvram_lab.peers.engines import Question, Task
from lowvram_lab.peers.gguf_file import NEAREST, TYPES, gguf_file, nearest_type, quantised, stated_type
from lowvram_lab.peers.others import LlamaCpp
from lowvram_lab.peers.process import LocalEngine
from tests.conversion.test_gguf_export import make_model
from tests.helpers.checkpoints import directory_spec, write_model


@pytest.fixture
def spec(tmp_path):
    return directory_spec(write_model(tmp_path / "model", "llama"))


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        ("int2", "Q2_K"), ("int3", "Q3_K_M"), ("int4", "Q4_0"), ("int4-g32", "Q4_0"), ("int5", "Q5_0"),
        ("int6", "Q6_K"), ("int8", "Q8_0"), ("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32"), ("nf4", "IQ4_NL"),
    ],
)  # fmt: skip
def test_the_nearest_type_has_codes_as_long(spec, fmt, kind):
    assert nearest_type(Plan.uniform(spec, fmt, context=64)) == kind
    assert kind in TYPES


def test_the_nearest_type_of_a_mixed_plan_is_that_of_its_average(spec):
    inside = [m.name for m in spec.modules if m.layer is not None and m.kind == "linear"]
    few = Plan.uniform(spec, "int3", context=64).with_modules(*inside[:1], format="int4")
    assert nearest_type(few) == "Q3_K_M"
    assert nearest_type(few.with_modules(*inside, format="int4")) == "Q4_0"
    assert set(NEAREST.values()) <= set(TYPES)


def test_what_a_user_states(tmp_path):
    file = tmp_path / "own.gguf"
    file.write_bytes(b"")
    assert stated_type(None) is stated_type(file) is stated_type(str(file)) is None
    assert (stated_type("q4_0"), stated_type("Q3_K"), stated_type("iq4_nl")) == ("Q4_0", "Q3_K_M", "IQ4_NL")
    with pytest.raises(LowvramError, match="found neither in 'Q4_9'$") as raised:
        stated_type("Q4_9")
    assert "\n" not in str(raised.value)


def test_where_the_file_comes_from(tmp_path, spec, monkeypatch):
    made = []
    monkeypatch.setattr(module, "quantised", lambda source, kind, *_: made.append((source.name, kind)))
    plans = {name: Plan.uniform(spec, name, context=64) for name in ("int3", "int4", "nf4")}
    file = tmp_path / "own.gguf"
    file.write_bytes(b"")
    assert gguf_file(Source("anything", "directory"), str(file), plans["int3"], tmp_path) == (file, "")
    assert gguf_file(Source(str(file), "gguf"), None, plans["int3"], tmp_path) == (file, "the model's own file")
    monkeypatch.setattr(module.builtin, "default_file", lambda progress: file)
    builtin = Source("smollm2-135m", "builtin")
    for name in ("int4", "nf4"):
        assert gguf_file(builtin, None, plans[name], tmp_path) == (file, "the model's own file")
    assert not made
    gguf_file(builtin, None, plans["int3"], tmp_path)
    gguf_file(builtin, "Q4_0", plans["int4"], tmp_path)
    gguf_file(Source(str(file), "gguf"), "Q8_0", plans["int4"], tmp_path)
    gguf_file(Source("x", "directory"), None, plans["nf4"], tmp_path)

    def unreachable(progress):
        raise SourceError("no network")

    monkeypatch.setattr(module.builtin, "default_file", unreachable)
    gguf_file(builtin, None, plans["int4"], tmp_path)
    names = ("smollm2-135m", "smollm2-135m", str(file), "x", "smollm2-135m")
    assert made == list(zip(names, ("Q3_K_M", "Q4_0", "Q8_0", "IQ4_NL", "Q4_0"), strict=True))


@pytest.mark.parametrize(("dtype", "exported"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_weights_are_exported_in_the_16_bits_they_are_in(tmp_path, monkeypatch, dtype, exported):
    calls = []

    def export(model, output, *, tensor_type, context, progress):
        calls.append(tensor_type)
        output.write_bytes(b"GGUF")

    monkeypatch.setitem(sys.modules, "lowvram_lab.conversion.gguf_export", SimpleNamespace(export_gguf=export))
    monkeypatch.setattr(module, "_quantise_apart", lambda source, target, kind: target.write_bytes(source.read_bytes()))
    source = find_source(write_model(tmp_path / "model", "llama", dtype=dtype))
    path, said = quantised(source, "Q5_0", tmp_path, progress=False)
    assert calls == [exported]
    assert (path.name, said) == ("model-Q5_0.gguf", "quantised by llama.cpp to Q5_0 from the same 16-bit weights")
    assert [file.name for file in tmp_path.glob("*.gguf")] == [path.name]  # the 16-bit file is gone
    assert quantised(source, "F32", tmp_path, progress=False)[1] == "the model's weights in F32"
    assert calls == [exported, "f32"]


def test_a_quantiser_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "fresh_python", lambda entry: [sys.executable, "-c", "raise SystemExit('no such type')"]
    )
    with pytest.raises(LowvramError, match="^llama.cpp's quantiser ended with status 1: no such type$"):
        module._quantise_apart(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A model of 256 columns, as K-quants want them."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    return make_model(tmp_path / "model", hidden_size=256, intermediate_size=256)


def task_of(directory, path, origin, *questions) -> Task:
    plan = Plan.uniform(directory_spec(directory), "bf16", context=64)
    return Task(str(directory), str(directory), plan.to_json(), None, questions, 1, str(path), origin)


@pytest.mark.parametrize("kind", ["Q3_K_M", "Q4_0", "Q5_0", "Q6_K", "Q8_0", "IQ4_NL", "BF16", "F16"])
def test_llama_cpp_quantises_and_runs_every_type(directory, tmp_path, kind):
    path, origin = quantised(find_source(directory), kind, tmp_path, progress=False)
    question = Question(((3, 4, 5, 6),), ((7, 8),), 4)
    engine = LocalEngine(LlamaCpp, task_of(directory, path, origin, question))
    assert len(engine.meet(0)["tokens"][0]) == 5
    assert engine.facts["weight_bytes"] < path.stat().st_size
    assert f"{directory.name}-{kind}.gguf, {origin}: " in engine.facts["note"]
    assert (f"({kind[:4]}" in engine.facts["note"]) or kind in ("IQ4_NL", "BF16", "F16")


def test_llama_cpp_answers_several_as_each_alone(directory, tmp_path):
    path, origin = quantised(find_source(directory), "F16", tmp_path, progress=False)
    prompts = tuple(tuple(range(3 + each, 15 + each)) for each in range(3))
    together = Question(prompts, ((5, 6),) * 3, 4)
    alone = [Question((prompt,), ((5, 6),), 4) for prompt in prompts]
    engine = LocalEngine(LlamaCpp, task_of(directory, path, origin, together, *alone))
    answers = engine.meet(0)["tokens"]
    assert [engine.meet(index)["tokens"] for index in (1, 2, 3)] == [[answer] for answer in answers]
    assert engine.likeliest(0, answers) == answers
    assert engine.turn(0)["tokens"] == answers
    engine.engine._batch._at_once = 7  # what a batch takes at once may end anywhere in a sequence
    assert engine.turn(0)["tokens"] == answers
