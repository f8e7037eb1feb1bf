"""Watching a model: what each module took and kept, and nothing left behind afterwards."""

import pytest
import torch

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.allocator import round_size
from lowvram_lab.memory.timeline import Timeline
from lowvram_lab.memory.watch import Watched, measure_overhead, watch
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.tiny import TINY, load_tiny, random_ids, tiny_plan

simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="counts bytes that CUDA's kernels allocate otherwise")


@pytest.fixture(scope="module", params=TINY)
def model(request):
    return load_tiny(request.param, tiny_plan(request.param, "bf16", "half"))


def run(model, tokens=40, steps=0):
    decoder = ModuleDecoder(model, tokens + steps)
    logits = decoder.prefill(random_ids(tokens))
    for _ in range(steps):
        logits = decoder.decode(torch.ones(1, 1, dtype=torch.long))
    return logits, decoder


def traces(model):
    """All that watching could leave on a model."""
    return {
        path: (
            id(vars(module).get("forward")),
            *(len(vars(module)[name]) for name in vars(module) if "hook" in name and vars(module)[name] is not None),
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("include", "matches"),
    [
        ("*", None),
        ("model.layers.0.*", lambda path: path.startswith("model.layers.0.")),
        ("*.mlp", lambda path: path.endswith(".mlp")),
        ("lm_head", lambda path: path == "lm_head"),
        ("model.layers.[01].self_attn", lambda path: path in {f"model.layers.{n}.self_attn" for n in range(2)}),
    ],
)
def test_modules_are_chosen_by_pattern(model, include, matches):
    with watch(model, include) as seen:
        run(model)
    expected = {path for path, _ in model.named_modules() if path and (matches is None or matches(path))}
    assert set(seen.modules) == expected
    called = {path for path, memory in seen.modules.items() if memory.calls}
    assert called == expected - {"model.layers"}  # a list is never called
    assert list(seen.table()["module"][:1]) == [max(seen.modules.values(), key=lambda m: m.peak_bytes).module]
    assert seen.timeline.events


def test_a_pattern_without_a_match_is_refused(model):
    before = traces(model)
    words = "no module matches 'model.layers.7.*'; paths look like model"
    with pytest.raises(LowvramError, match=words) as error, watch(model, "model.layers.7.*"):
        raise AssertionError("the block must not run")
    assert "\n" not in str(error.value)
    assert traces(model) == before
    assert model.lowvram.gpu.meter.timeline is None


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(model, fails):
    before, timeline = traces(model), Timeline()
    model.lowvram.gpu.meter.timeline = timeline
    try:
        if fails:
            with pytest.raises(ZeroDivisionError), watch(model):
                run(model)
                _ = 1 / 0
        else:
            with watch(model):
                assert model.lowvram.gpu.meter.timeline is not timeline
                assert traces(model) != before
                run(model)
        assert model.lowvram.gpu.meter.timeline is timeline
        assert traces(model) == before
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
        assert model.lowvram.gpu.meter.windows == []
        assert timeline.events == []
    finally:
        model.lowvram.gpu.meter.timeline = None


def test_a_forward_that_fails_leaves_no_window_open(model):
    before = traces(model)
    with pytest.raises(IndexError), watch(model) as seen:
        run(model)
        model(torch.tensor([[10_000]]))  # beyond the vocabulary
    assert traces(model) == before
    assert model.lowvram.gpu.meter.windows == []
    assert seen.modules["lm_head"].calls == 1
    assert seen.modules["model.embed_tokens"].calls == 2


def test_watching_changes_no_logits(model):
    plain, _ = run(model, steps=2)
    with watch(model):
        watched, _ = run(model, steps=2)
    again, _ = run(model, steps=2)
    assert torch.equal(plain, watched)
    assert torch.equal(plain, again)


@simulated
def test_watches_nest(model):
    with watch(model, "lm_head") as outer:
        run(model)
        with watch(model, "*.mlp") as inner:
            run(model)
        run(model)
    assert outer.modules["lm_head"].calls == 3
    assert {memory.calls for memory in inner.modules.values()} == {1}
    assert inner.timeline.events
    assert outer.timeline.events


@simulated
def test_what_each_module_took_and_kept():
    model, tokens = load_tiny("qwen2", tiny_plan("qwen2", "bf16")), 40
    with watch(model) as seen:
        result = run(model, tokens)
    hidden, wide, logits = (round_size(tokens * size * 2) for size in (128, 192, 320))
    row = round_size(1 * 320 * 2)  # only the last token's logits are made
    head, layer = seen.modules["lm_head"], "model.layers.1"
    assert (head.calls, head.peak_bytes, head.kept_bytes) == (1, row, row)
    up = seen.modules[f"{layer}.mlp.up_proj"]
    assert (up.peak_bytes, up.kept_bytes) == (wide, wide)
    assert seen.modules[f"{layer}.mlp"].kept_bytes == hidden
    assert seen.modules[f"{layer}.mlp"].peak_bytes >= 2 * wide + hidden
    assert seen.modules[f"{layer}.self_attn"].kept_bytes == hidden  # its result; keys and values have their place
    assert hidden <= seen.modules["model"].kept_bytes < 2 * hidden  # the rotary tables of the pass, too
    assert all(memory.peak_bytes >= memory.kept_bytes for memory in seen.modules.values())
    with torch.no_grad(), watch(model, "lm_head") as seen:
        whole = model(random_ids(tokens)).logits
    assert seen.modules["lm_head"].kept_bytes == logits == round_size(whole.nbytes)
    assert result[0].shape == (1, 320)


@simulated
def test_calls_add_up_and_the_cache_does_not_grow():
    model = load_tiny("llama", tiny_plan("llama", "bf16"))
    with watch(model, "model.layers.0.self_attn") as seen:
        _, decoder = run(model, 40, steps=3)
    memory = seen.modules["model.layers.0.self_attn"]
    assert memory.calls == 4
    assert decoder.cache.get_seq_length() == 43
    assert memory.kept_bytes == round_size(40 * 128 * 2) + 3 * round_size(128 * 2)  # four results


@simulated
def test_the_timeline_names_the_very_module():
    model = load_tiny("qwen2", tiny_plan("qwen2", "bf16"))
    with watch(model) as seen:
        run(model)
    owners = {event.owner for event in seen.timeline.events if event.size > 0}
    assert {"model.layers.2.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head", "model.norm"} <= owners
    assert model.lowvram.gpu.meter.timeline is None


@simulated
def test_the_timeline_goes_on_over_several_runs():
    model, workload = load_tiny("llama", tiny_plan("llama", "bf16")), Workload(10, 1)
    with watch(model) as seen:
        run_workload(model, workload)
        once = len(seen.timeline.events)
        run_workload(model, workload)
    assert len(seen.timeline.events) >= 2 * once - 10


@simulated
def test_modules_on_the_cpu_take_no_gpu_memory():
    model = load_tiny("qwen2", tiny_plan("qwen2", "bf16", "half"))
    with watch(model, "model.layers.*.mlp.up_proj") as seen:
        run(model)
    took = [seen.modules[f"model.layers.{index}.mlp.up_proj"].peak_bytes for index in range(3)]
    assert took[:2] == [0, 0]
    assert took[2] > 0


def test_tables():
    assert Watched().table().empty
    model = load_tiny("llama")
    with watch(model, "*_proj") as seen:
        run(model)
    table = seen.table()
    assert list(table.columns) == ["module", "calls", "peak_bytes", "kept_bytes"]
    assert len(table) == 3 * 7
    assert list(table["peak_bytes"]) == sorted(table["peak_bytes"], reverse=True)
    assert "<table" in seen._repr_html_()


def test_overhead_is_a_ratio():
    model = load_tiny("llama")
    calls = []

    def work():
        calls.append(model.lowvram.gpu.meter.timeline is not None)
        run(model, 8)

    assert measure_overhead(model, work, repeats=2) > 0
    assert calls == [False, True, False, True]  # in alternation
    assert traces(model) == traces(model)
    assert model.lowvram.gpu.meter.timeline is None
