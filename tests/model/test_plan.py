"""Plans: what is accepted, what is refused and under which name, and the round trip through JSON."""

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_lab.errors import LowvramError, PlanError, SourceError
from lowvram_lab.model.formats import FORMATS, LOADING_SOLVERS
from lowvram_lab.model.plan import Assignment, Plan
from lowvram_lab.model.rules import DEVICES, PRECISIONS
from lowvram_lab.model.source import find_source
from tests.helpers.tiny import PLACEMENTS, TINY, load_tiny, tiny_plan, tiny_spec, tiny_state

DOWN = "model.layers.1.mlp.down_proj"


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(PlanError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


@st.composite
def valid_plans(draw):
    """Any plan that the rules allow: a format for every module, devices for every block, any setting."""
    kind = draw(st.sampled_from(TINY))
    spec = tiny_spec(kind)
    dtype = draw(st.sampled_from(["bf16", "fp16", "fp32"]))
    places = draw(st.lists(st.sampled_from(["gpu", "cpu"]), min_size=6, max_size=6))
    farther = draw(st.lists(st.sampled_from(DEVICES), min_size=6, max_size=6))
    modules = {}
    for module in spec.modules:
        allowed = [name for name, f in FORMATS.items() if f.kind != "float" or name == dtype]
        allowed = [name for name in allowed if FORMATS[name].refuse(module.kind, module.weight_shape) is None]
        block = (
            module.layer
            if module.layer is not None
            else 3 + ["model.embed", "lm_head", "model.norm"].index(module.name.replace("_tokens", ""))
        )
        allowed = [name for name in allowed if FORMATS[name].planes == 1 or module.layer is not None]
        fmt, place = draw(st.sampled_from(allowed)), places[block]
        low = max(place, farther[block], key=DEVICES.index) if FORMATS[fmt].planes > 1 else None
        modules[module.name] = Assignment(fmt, place, low)
    if spec.tied:
        modules[spec.head] = modules[spec.embedding]
    context, threads = draw(st.integers(2, 1024)), draw(st.none() | st.integers(1, 64))
    kv_format = draw(st.sampled_from([dtype, "int8"]))
    nested = any(assignment.low for assignment in modules.values())
    precision = draw(st.sampled_from([None, *PRECISIONS] if nested else [None, "fast"]))
    solver = draw(st.sampled_from(LOADING_SOLVERS))
    return Plan(spec, modules, dtype, kv_format, context, threads, precision=precision, solver=solver)


@given(valid_plans())
def test_a_valid_plan_survives_json(plan):
    again = Plan.from_json(plan.to_json(), plan.spec)
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)
    assert list(again.modules) == list(plan.modules)
    assert sum(map(plan.weight_bytes, DEVICES)) == plan.weight_bytes()
    for module in plan.spec.modules:
        assert sum(plan.module_bytes(module, device) for device in DEVICES) == plan.module_bytes(module)
    assert [plan.modules[f"model.layers.{n}.mlp.up_proj"].device for n in range(3)] == plan.layer_devices()


@given(valid_plans(), valid_plans())
def test_plans_are_equal_if_they_say_the_same(plan, other):
    same = plan.to_dict() == other.to_dict()
    assert (plan == other) == same == (plan.digest == other.digest)
    again = replace(plan, modules=dict(plan.modules))
    assert again == plan
    assert hash(again) == hash(plan)
    assert plan != plan.to_dict()


@pytest.mark.parametrize("change", [{"format": "int8"}, {"device": "cpu"}])
def test_a_change_of_one_module_changes_the_digest(change):
    plan = tiny_plan("qwen2")
    name = "model.embed_tokens"
    changed = plan.with_modules(name, **change)
    assert changed.digest != plan.digest
    assert changed != plan
    assert [n for n in plan.modules if plan.modules[n] != changed.modules[n]] == [name]


def test_the_digest_is_stable_over_processes_and_order():
    plan = tiny_plan("qwen2", "int8")
    shuffled = replace(plan, modules=dict(reversed(plan.modules.items())))
    assert shuffled.digest == plan.digest
    assert plan.digest == "137218ef7b8b9b0b"


@pytest.mark.parametrize(
    ("pattern", "change", "words"),
    [
        (DOWN, {"format": "int7"}, ["int7", "int4-g128"]),
        (DOWN, {"format": "fp16"}, [DOWN, "bf16", "fp16"]),
        (DOWN, {"format": "int4-g128"}, [DOWN, "int4-g128", "192"]),
        (DOWN, {"device": "cuda:0"}, [DOWN, "'cuda:0'", "gpu or cpu or disk"]),
        (DOWN, {"device": "cpu"}, [DOWN, "one device", "cpu", "gpu"]),
        ("model.embed_tokens", {"format": "nf4"}, ["model.embed_tokens", "nf4", "embedding"]),
        ("model.norm", {"format": "int8"}, ["model.norm", "int8"]),
    ],
)
def test_a_refusal_names_the_module(pattern, change, words):
    message = refusal(lambda: tiny_plan("qwen2").with_modules(pattern, **change))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"format": "int8"}])
@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_tied_pair_stays_together(name, change):
    message = refusal(lambda: tiny_plan("llama").with_modules(name, **change))
    assert "lm_head shares its weight with model.embed_tokens" in message
    together = tiny_plan("llama").with_modules("lm_head", "model.embed_tokens", **change)
    assert together.modules["lm_head"] == together.modules["model.embed_tokens"]
    assert together != tiny_plan("llama")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("context", value) for value in (0, 1, -1, 1025, True, 2.5, "512", None)),
        *(("threads", value) for value in (0, -1, 1.5, "2")),
        ("threads", True),
        ("dtype", "fp8"),
        ("kv_format", "fp32"),
        ("kv_format", "nf4"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(setting, value):
    assert str(value) in refusal(lambda: replace(tiny_plan("qwen2"), **{setting: value}))


def test_another_models_plan():
    plan, other = tiny_plan("llama"), tiny_spec("qwen2")
    for way in (lambda: plan.made_for(other), lambda: Plan.from_json(plan.to_json(), other)):
        message = refusal(way)
        assert "'tiny-llama'" in message
        assert "'tiny-qwen2'" in message


def test_a_plans_json_asks_the_source_it_names():
    spec = find_source("smollm2-135m").spec()
    plan = Plan.uniform(spec, "int4", context=64)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(SourceError, match="tiny-qwen2"):
        Plan.from_json(tiny_plan("qwen2").to_json())


def test_missing_and_unknown_modules_are_named():
    plan = tiny_plan("qwen2")
    missing = {name: value for name, value in plan.modules.items() if name != DOWN}
    assert f"says nothing about module {DOWN} (1 missing)" in refusal(lambda: replace(plan, modules=missing))
    more = {**plan.modules, "nonsense": Assignment("bf16", "gpu")}
    assert "'nonsense'" in refusal(lambda: replace(plan, modules=more))


def test_with_modules_that_match_nothing():
    with pytest.raises(PlanError, match=r"no module of tiny-qwen2 matches '\*.gate'; names look like model.embed"):
        tiny_plan("qwen2").with_modules("*.gate", format="int8")


@pytest.mark.parametrize("count", range(4))
def test_with_gpu_layers_keeps_the_last_ones(count):
    plan = tiny_plan("qwen2").with_gpu_layers(count)
    assert plan.layer_devices() == ["cpu"] * (3 - count) + ["gpu"] * count
    assert plan.modules["lm_head"].device == "gpu"


@pytest.mark.parametrize("count", [-1, 4, True, 1.0, "2", None])
def test_with_gpu_layers_out_of_range(count):
    with pytest.raises(PlanError, match=f"GPU layers for tiny-qwen2 from 0 to 3, found {re.escape(repr(count))}"):
        tiny_plan("qwen2").with_gpu_layers(count)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "int8", "int4", "int4-g32", "int4+4", "nf4"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_recipe_and_placement_is_valid(kind, recipe, placement):
    plan = tiny_plan(kind, recipe, placement)
    assert plan.modules["model.layers.0.mlp.up_proj"].format == recipe
    ends = {plan.modules[name].format for name in ("model.embed_tokens", "lm_head")}
    assert ends == {"int8" if recipe.startswith("int") else "bf16" if recipe == "nf4" else recipe}


def test_a_layer_whose_shape_the_recipe_cannot_hold_takes_int8():
    plan = tiny_plan("qwen2", "int4-g128")  # down_proj has 192 inputs
    assert plan.modules[DOWN].format == "int8"
    assert plan.modules["model.layers.1.mlp.up_proj"].format == "int4-g128"


@pytest.mark.parametrize("kind", TINY)
def test_weight_bytes_of_a_float_plan_are_those_of_the_tensors(kind):
    expected = sum(value.nbytes for value in tiny_state(kind).values())
    assert tiny_plan(kind, "fp32").weight_bytes() == expected
    assert tiny_plan(kind, "bf16", "cpu").weight_bytes("cpu") == expected // 2
    assert tiny_plan(kind, "bf16", "cpu").weight_bytes("gpu") == 0


def changed(**changes) -> str:
    return json.dumps({**tiny_plan("qwen2").to_dict(), **changes})


def without(field: str) -> str:
    return json.dumps({key: value for key, value in tiny_plan("qwen2").to_dict().items() if key != field})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("[]", "JSON object, found list"),
        ("null", "JSON object, found NoneType"),
        ("{}", "version 1, found None"),
        *((without(field), f"'{field}' is missing") for field in ("model", "modules", "context", "threads")),
        (changed(colour="red"), "'colour' is not known"),
        *((changed(version=value), "version 1, found") for value in (0, 2, "1", None, [1])),
        (changed(version=True), "version 1"),
        (changed(model=3), "'model': expected str, found 3"),
        (changed(context="512"), "'context': expected a whole number, found '512'"),
        (changed(modules=[]), "'modules': expected dict"),
        (changed(modules={"lm_head": "bf16"}), "lm_head: expected an object with format and device"),
        (changed(modules={"lm_head": {"format": "bf16"}}), "lm_head: expected an object with format and device"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_json_that_is_no_plan(text, words):
    with pytest.raises(PlanError) as error:
        Plan.from_json(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_file_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    plan = tiny_plan("llama", "int4", "half")
    assert plan.to_json(path) == path.read_text()
    assert Plan.from_json(path, plan.spec) == plan
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path):
    with pytest.raises(LowvramError, match="cannot write .*no/plan.json: No such file") as error:
        tiny_plan("llama").to_json(tmp_path / "no" / "plan.json")
    assert "\n" not in str(error.value)
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(LowvramError, match="cannot write"):
        tiny_plan("llama").to_json(tmp_path / "plan.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]  # no temporary file is left behind


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"{"])
def test_a_plan_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match="expected a plan"):
        Plan.from_json(path)


def test_faces_say_the_split():
    plan = tiny_plan("qwen2", "int4", "half")
    assert "1 of 3 layers on the GPU" in plan.summary()
    assert plan.table()["count"].sum() == len(plan.modules)
    assert "tiny-qwen2" in plan._repr_html_()


def test_a_device_map_of_accelerates_is_a_placement():
    spec = tiny_spec("qwen2")
    plan = Plan.uniform(spec, "int8", context=64)
    found = plan.with_device_map(
        {"": 0, "model.embed_tokens": "cpu", "model.layers.0": torch.device("cpu"), "model.layers.1": "cuda:0"}
    )
    assert found == plan.with_gpu_layers(2).with_modules("model.embed_tokens", device="cpu")
    assert plan.with_device_map({"": "cpu"}) == plan.with_modules("*", device="cpu")


@pytest.mark.parametrize("kind", TINY)
def test_the_map_of_a_loaded_model_comes_back(kind):
    spec = tiny_spec(kind)
    for plan in (tiny_plan(kind).with_gpu_layers(count) for count in range(4)):
        found = load_tiny(kind, plan).hf_device_map
        assert "model.rotary_emb" in found
        assert Plan.uniform(spec, context=plan.context).with_device_map(found).modules == plan.modules


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"model": 0}, "says nothing about lm_head"),
        ({"": 0, "model.layers.9": "cpu"}, "names 'model.layers.9', which tiny-qwen2 does not have"),
        ({"": 0, "transformer.h.0": "cpu"}, "names 'transformer.h.0'"),
        ({"": "tape"}, "all: expected gpu, cuda, a GPU's number, cpu or disk, found 'tape'"),
        ({"": True}, "found True"),
        ({"": 0, "model.layers.1.mlp": "cpu"}, "a decoder layer lives on one device"),
    ],
)
def test_a_device_map_that_is_none(device_map, words):
    spec = tiny_spec("qwen2")
    with pytest.raises(PlanError, match=words):
        Plan.uniform(spec, context=64).with_device_map(device_map)


# --- two planes ---


def nested(low: str | None = None, kind: str = "qwen2") -> Plan:
    plan = tiny_plan(kind, "int4+4")
    return plan.with_modules("*", low=low) if low else plan


def lows(plan: Plan) -> list[str]:
    """Where the low planes of each layer are."""
    found = [{a.low for name, a in plan.modules.items() if f"layers.{n}." in name and a.low} for n in range(3)]
    assert all(len(places) == 1 for places in found)
    return [place for (place,) in found]


def linear_bytes(plan: Plan) -> int:
    """Of the low planes of all layers."""
    shapes = [m.weight_shape for m in plan.spec.modules if m.layer is not None and m.kind == "linear"]
    return sum(FORMATS["int4-g32"].weight_bytes(shape) for shape in shapes)


@pytest.mark.parametrize("kind", TINY)
def test_two_planes_take_the_low_ones_bytes_more_than_int4(kind):
    plan, one = nested(kind=kind), tiny_plan(kind, "int4")
    assert plan.weight_bytes() - one.weight_bytes() == linear_bytes(plan) > 0
    ends = ("model.embed_tokens", "lm_head")
    assert all(plan.modules[name] == one.modules[name] == Assignment("int8", "gpu") for name in ends)
    assert plan.low_planes() == {"gpu"}
    assert one.low_planes() == set()


@pytest.mark.parametrize("low", ["cpu", "disk"])
def test_each_device_has_the_bytes_of_its_planes(low):
    plan, one = nested(low), tiny_plan("qwen2", "int4")
    assert plan.low_planes() == {low}
    assert plan.weight_bytes("gpu") == one.weight_bytes()
    assert plan.weight_bytes(low) == linear_bytes(plan)
    assert plan.weight_bytes() == nested().weight_bytes()
    biased = plan.spec.module("model.layers.0.self_attn.q_proj")
    high, low_plane = (FORMATS[name].weight_bytes(biased.weight_shape) for name in ("int4", "int4-g32"))
    bias = 2 * biased.weight_shape[0]  # it lies with the high plane
    assert [plan.module_bytes(biased, place) for place in ("gpu", low, None)] == [
        high + bias, low_plane, high + low_plane + bias,
    ]  # fmt: skip


def test_low_planes_go_along_with_their_layers():
    apart = nested("cpu")
    assert lows(nested().with_gpu_layers(1)) == ["cpu", "cpu", "gpu"]
    assert lows(nested().with_gpu_layers(1, disk=1)) == ["disk", "cpu", "gpu"]
    assert lows(apart.with_gpu_layers(1, disk=1)) == ["disk", "cpu", "cpu"]
    assert lows(nested("disk").with_gpu_layers(1)) == ["disk"] * 3
    assert lows(nested().with_device_map({"": 0, "model.layers.1": "cpu"})) == ["gpu", "cpu", "gpu"]
    assert lows(apart.with_device_map({"": 0, "model.layers.1": "disk"})) == ["cpu", "disk", "cpu"]
    assert lows(apart.with_modules("model.layers.0.*", device="disk")) == ["disk", "cpu", "cpu"]
    assert lows(nested().with_modules("model.layers.2.*", device="cpu", low="disk")) == ["gpu", "gpu", "disk"]
    assert apart.with_modules("*", low="gpu") == nested()


def test_another_format_drops_and_brings_the_low_plane():
    one = tiny_plan("qwen2", "int4")
    assert nested("cpu").with_modules("model.layers.*_proj", format="int4") == one
    assert one.with_modules("model.layers.*_proj", format="int4+4", low="cpu") == nested("cpu")
    assert one.with_modules("*", low="cpu") == one  # none has a low plane


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: nested().with_gpu_layers(0).with_modules("*", low="gpu"), "high plane is on the cpu, .* found 'gpu'"),
        (lambda: nested("disk").with_modules("*", low="tape"), "low plane may be on gpu, cpu, disk; found 'tape'"),
        (lambda: nested().with_modules(DOWN, low="cpu"), f"{DOWN}: the low planes of a decoder layer lie in one place"),
        (
            lambda: replace(nested(), modules={**nested().modules, "lm_head": Assignment("int8", "gpu", "cpu")}),
            "lm_head: int8 has no low plane, found a place for one: 'cpu'",
        ),
        (lambda: nested().with_modules("model.embed_tokens", format="int4+4"), "int4.4 is for linear modules"),
        (
            lambda: nested().with_modules("lm_head", format="int4+4-g32"),
            r"lm_head: int4\+4-g32 is for decoder layers; take int8 or int4-g32$",
        ),
        (lambda: replace(nested(), precision="exact"), "expected precision fast, precise, auto, found 'exact'"),
    ],
)
def test_a_low_plane_where_it_cannot_be(change, words):
    assert re.search(words, refusal(change))


def test_where_low_planes_are_survives_json_and_is_said_of_nothing_else():
    plan = replace(nested("cpu"), precision="auto")
    again = Plan.from_json(plan.to_json(), plan.spec)
    assert again == plan
    assert again.modules == plan.modules
    assert again.precision == "auto"
    assert len({each.digest for each in (plan, nested("cpu"), nested("disk"), nested())}) == 4
    values = tiny_plan("qwen2", "int4").to_dict()
    assert "precision" not in values
    assert {key for entry in values["modules"].values() for key in entry} == {"format", "device"}


@pytest.mark.parametrize("low", [None, 3, ["cpu"]])
def test_json_whose_low_plane_is_nowhere(low):
    values = nested("cpu").to_dict()
    values["modules"][DOWN]["low"] = low
    with pytest.raises(PlanError, match=f"{DOWN}: expected format, device and low as text"):
        Plan.from_json(json.dumps(values), tiny_spec("qwen2"))


def test_json_of_a_plan_made_before_there_were_two_planes_says_beside():
    values = nested().to_dict()
    for entry in values["modules"].values():
        entry.pop("low", None)
    assert Plan.from_json(json.dumps(values), tiny_spec("qwen2")) == nested()


@pytest.mark.parametrize(("precision", "way"), [(None, "precise"), *((each, each) for each in PRECISIONS)])
def test_how_it_decodes(precision, way):
    assert replace(nested(), precision=precision).decodes_by == way


def test_a_model_of_one_plane_decodes_by_it_however_it_is_asked():
    plan = tiny_plan("qwen2", "int4")
    assert plan.decodes_by is None
    assert replace(plan, precision="fast").decodes_by is None
    for precision in ("precise", "auto"):
        message = refusal(lambda precision=precision: replace(plan, precision=precision))
        assert f"precision {precision} needs weights in two planes, found tiny-qwen2 in one" in message


def test_a_converted_model_of_two_planes_can_be_planned_by_its_high_ones():
    spec = tiny_spec("qwen2")
    formats = {name: a.format for name, a in nested().modules.items() if a.format != "bf16"}
    stored = replace(spec, stored=formats)
    high = stored.without_low_planes()
    assert high.stored == {name: fmt.replace("int4+4", "int4") for name, fmt in formats.items()}
    assert high.fingerprint == stored.fingerprint
    one = tiny_plan("qwen2", "int4")
    assert Plan.uniform(high, "stored", context=512) == one == Plan.uniform(stored, "int4", context=512)
    assert Plan.uniform(stored, "stored", context=512) == nested()
    assert spec.without_low_planes() == spec
    message = refusal(lambda: Plan.uniform(high, "int4+4", context=512))
    assert "holds it in int4, found int4+4" in message
