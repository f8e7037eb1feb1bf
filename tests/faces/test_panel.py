"""The panel shows what its pure part says, tells of trouble in words, and a try puts measured beside predicted."""

import gc
import sys
import threading
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

import lowvram_lab
from lowvram_lab.errors import LowvramError, PlanError, SourceError
from lowvram_lab.faces import panel as widgets
from lowvram_lab.faces import split
from lowvram_lab.faces.panel import FITS_COLOUR, LayerSplitPanel
from lowvram_lab.faces.plot_memory import BUDGET_COLOUR
from lowvram_lab.faces.split import AS_LOADED, SplitState, evaluate_split, split_plan, state_of, try_split
from lowvram_lab.memory import host
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.units import MiB
from tests.helpers.checkpoints import RandomCheckpoint, directory_spec, write_model
from tests.helpers.machines import Made, stand_in
from tests.helpers.tiny import (
    DictCheckpoint,
    letters_state,
    load_tiny,
    tiny_config,
    tiny_plan,
    tiny_spec,
    tiny_state,
    tiny_tokenizer,
)

SIMULATED = pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")
SMALL_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # that of most cards, also where the tests run on Hopper
START = SplitState(3, 1024)
MOVES = {
    "gpu_layers": 1,
    "context": 512,
    "recipe": "int4",
    "kv_format": "int8",
    "threads": 1,
    "embedding_on_cpu": True,
}


def a_panel(gpu="1000MiB", **options):
    options = {"tokenizer": tiny_tokenizer(), "checkpoint": DictCheckpoint(tiny_state("qwen2")), **options}
    return LayerSplitPanel(tiny_spec("qwen2"), gpu, machine=Made(), **options)


def a_loaded_panel(plan=None, gpu=None):
    plan = plan or tiny_plan("qwen2", context=512)
    model = load_tiny("qwen2", plan, gpu or open_gpu("1000MiB"), letters_state())
    return LayerSplitPanel(model, tokenizer=tiny_tokenizer(), machine=Made())


@pytest.mark.parametrize("field", MOVES)
def test_a_split_is_its_plan_and_the_forecasts_of_that(field):
    spec, budget = tiny_spec("qwen2"), GpuBudget.parse("3MiB")
    state = replace(START, **{field: MOVES[field]})
    plan = Plan.uniform(spec, state.recipe, context=state.context).with_gpu_layers(state.gpu_layers)
    if state.embedding_on_cpu:
        plan = plan.with_modules(spec.embedding, device="cpu")
    plan = replace(plan, kv_format=state.kv_format, threads=state.threads)
    found = evaluate_split(state, spec, stand_in(budget), Made())
    assert found.plan == plan == split_plan(state, spec)
    assert found.forecast == forecast(plan, stand_in(budget))
    assert found.speed == forecast_speed(plan, machine=Made())
    assert state_of(plan) == state
    assert found.to_dict()["plan"] == plan.to_dict()
    assert found.verdict() in found._repr_html_()
    assert found.verdict() in repr(found)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("recipe", ["bf16", "fp32", "int8", "int4", "nf4", "int3"])
@pytest.mark.parametrize("placement", ["gpu", "half", "cpu", "embedding on the CPU"])
def test_a_plans_settings_give_the_plan_back(kind, recipe, placement):
    """Also where its formats are no recipe's and its places no split's."""
    spec, plan = tiny_spec(kind), tiny_plan(kind, recipe, placement)
    state = state_of(plan)
    assert split_plan(state, spec, plan) == plan
    assert (state.recipe == AS_LOADED) == (recipe in ("nf4", "int3"))
    nearest = replace(plan, solver="rtn")
    assert split_plan(state, spec, nearest) == nearest
    moved = split_plan(replace(state, gpu_layers=2), spec, plan)
    assert moved.layer_devices() == ["cpu", "gpu", "gpu"]
    assert {n: a.format for n, a in moved.modules.items()} == {n: a.format for n, a in plan.modules.items()}
    assert split_plan(replace(state, recipe="int8"), spec, plan).dtype == plan.dtype
    remembering = replace(plan, remember=1 << 30, prefill_chunk=64)
    other = split_plan(replace(state, recipe="int8"), spec, remembering)
    assert (other.remember, other.prefill_chunk) == (1 << 30, 64)


def test_settings_a_model_does_not_have_are_refused():
    spec = tiny_spec("llama")
    for wrong in ({"gpu_layers": 4}, {"context": 2048}, {"kv_format": "int3"}, {"threads": 0}, {"recipe": AS_LOADED}):
        with pytest.raises(PlanError):
            split_plan(replace(START, **wrong), spec)


@pytest.mark.parametrize("field", MOVES)
def test_each_control_changes_plan_text_and_picture(field):
    panel = a_panel("64MiB")
    before, text, picture = panel.plan, panel.verdict.value, panel.picture.value
    panel.controls[field].value = MOVES[field]
    assert panel.state == replace(START, **{field: MOVES[field]})
    assert panel.plan == split_plan(panel.state, panel.spec) != before
    assert panel.plan.summary() in panel.verdict.value
    assert panel.forecast == panel.result.forecast
    assert panel.speed.summary() in repr(panel).replace(": simulated", "")
    if field != "threads":  # the made-up rates are the same for any number
        assert panel.verdict.value != text
        assert panel.picture.value != picture
    panel.controls[field].value = getattr(START, field) or 0
    assert (panel.plan, panel.verdict.value) == (before, text)


def test_a_split_seen_before_is_not_forecast_again(monkeypatch):
    panel, evaluated = a_panel(), []
    original = split.evaluate_split
    monkeypatch.setattr(widgets, "evaluate_split", lambda *given: (evaluated.append(given[0]), original(*given))[1])
    panel.controls["gpu_layers"].value = 1
    panel.controls["gpu_layers"].value = 3
    panel.controls["gpu_layers"].value = 1
    panel.state = SplitState(0, 256, "int8", "int8", None, True)
    assert evaluated == [replace(START, gpu_layers=1), panel.state]


def test_callbacks_wait_for_one_another(monkeypatch):
    """JupyterLab runs them beside cells."""
    panel, inside, most = a_panel(), [], []
    original = split.evaluate_split

    def watched(*given):
        inside.append(given[0])
        most.append(len(inside))
        found = original(*given)
        inside.remove(given[0])
        return found

    monkeypatch.setattr(widgets, "evaluate_split", watched)
    states = [replace(START, gpu_layers=count, context=context) for count in (0, 1) for context in (256, 512)]
    threads = [threading.Thread(target=setattr, args=(panel, "state", state)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) == len(states)
    assert panel.state in states
    assert panel.plan.summary() in panel.verdict.value


def test_too_small_a_card_is_said_in_red_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv(*SMALL_WORKSPACE)
    panel = a_panel("24MiB")  # a matrix product on CUDA reserves 20 MiB, however small it is
    assert BUDGET_COLOUR in panel.verdict.value
    oom = panel.forecast.first_oom
    assert f"out of memory in {oom.phase} at {oom.module}: does not fit, would take" in panel.verdict.value
    assert "on a card without a limit; this one has" in panel.verdict.value
    panel.state = replace(panel.state, gpu_layers=0, recipe="int4")
    assert panel.forecast.fits
    assert FITS_COLOUR in panel.verdict.value
    assert "to spare" in panel.verdict.value
    assert panel.model is None


def test_what_cannot_be_forecast_is_said_in_red(monkeypatch):
    panel = a_panel()

    def refuse(*_):
        raise PlanError("this plan <cannot> be replayed")

    monkeypatch.setattr(widgets, "evaluate_split", refuse)
    panel.controls["gpu_layers"].value = 2
    assert "this plan &lt;cannot&gt; be replayed" in panel.verdict.value
    assert "cannot" in repr(panel)
    with pytest.raises(PlanError):
        _ = panel.plan


def test_settings_by_attribute_are_checked():
    panel = a_panel()
    panel.gpu_layers = 2
    assert panel.state == replace(START, gpu_layers=2)
    wrong = [{"gpu_layers": 4}, {"gpu_layers": -1}, {"context": 700}, {"recipe": "int3"}, {"threads": 1000}]
    for each in wrong:
        with pytest.raises(PlanError):
            panel.state = replace(panel.state, **each)
    with pytest.raises(PlanError, match="expected GPU layers for tiny-qwen2 from 0 to 3"):
        panel.gpu_layers = 99
    assert panel.state == replace(START, gpu_layers=2)
    panel.controls["gpu_layers"].value = 99  # a slider stops at its end
    assert panel.gpu_layers == 3


def test_what_a_panel_can_be_made_of():
    with pytest.raises(SourceError, match="did you mean"):
        LayerSplitPanel("qwen1.5-4bb", gpu="4GiB")
    with pytest.raises(LowvramError, match="gpu='4GiB'"):
        LayerSplitPanel(tiny_spec("llama"))
    with pytest.raises(LowvramError, match="leave gpu out"):
        LayerSplitPanel(load_tiny("llama"), gpu="4GiB")
    with pytest.raises(PlanError, match="1024 positions"):
        a_panel(context=4096)
    panel = a_panel(context=700)
    assert [tokens for _, tokens in panel.controls["context"].options] == [256, 512, 700, 1024]
    assert panel.plan.context == 700


def test_a_converted_model_is_split_in_its_own_formats():
    spec = tiny_spec("qwen2")
    stored = {m.name: "int8" for m in spec.modules if m.kind == "linear"}
    converted = replace(spec, stored=stored)
    panel = LayerSplitPanel(converted, "16MiB", machine=Made())
    assert panel.controls["recipe"].options == ("stored",)
    assert panel.plan == Plan.uniform(converted, "stored", context=1024)


@pytest.mark.parametrize(("card", "dtype"), [("t4", "fp16"), ("rtx3050", "bf16")])
def test_the_start_is_in_the_16_bits_that_the_card_has_units_for(card, dtype):
    spec = ModelSpec.from_config(tiny_config("qwen2", max_position_embeddings=2048), "longer")
    panel = LayerSplitPanel(spec, GpuBudget.parse("1000MiB", card=card), machine=Made())
    assert panel.plan.dtype == panel.state.recipe == dtype
    panel.state = replace(panel.state, recipe="int8")
    assert panel.plan.dtype == dtype
    assert {assignment.format for assignment in panel.plan.modules.values()} == {dtype, "int8"}


def test_a_loaded_models_plan_and_gpu_are_the_start():
    tiny_spec("qwen2")
    plan = replace(tiny_plan("qwen2", "int3").with_gpu_layers(1), kv_format="int8", threads=1)
    panel = a_loaded_panel(plan)
    assert panel.plan == plan
    assert panel.controls["recipe"].options == (AS_LOADED, "bf16", "int8", "int4")
    assert panel.forecast == forecast(plan, panel.model.lowvram.gpu)
    unlimited = a_loaded_panel(gpu=open_gpu(None))
    assert "without a limit" in unlimited.verdict.value
    assert isinstance(unlimited.figure(), Figure)


def test_a_try_puts_measured_beside_predicted():
    panel = a_loaded_panel()
    panel.button.click()
    (trial,) = panel.trials
    assert trial.plan == panel.plan == panel.model.lowvram.plan
    assert trial.answer.isalpha()
    assert trial.answer in panel.message.value
    assert trial.predicted.new_tokens == trial.measured.new_tokens
    assert trial.predicted.prompt_tokens == trial.measured.prompt_tokens
    if not torch.cuda.is_available():
        assert trial.measured_bytes == trial.predicted_bytes
    assert trial.to_dict()["plan"] == panel.plan.to_dict()
    for figure in (
        f"{trial.measured.decode_tokens_per_s:.2f}",
        f"{trial.predicted.ttft_s:.2f}",
        panel.model.lowvram.gpu.name,
    ):
        assert figure in panel.message.value
    assert f"{trial.answer!r} on {trial.gpu}" in repr(trial)
    assert not panel.button.disabled


def test_after_another_split_the_model_is_replanned_not_loaded_again(monkeypatch):
    panel, read = a_panel(), []
    assert panel.load_and_try() is panel.trials[0]
    model, original = panel.model, panel.model.lowvram.weights.read
    monkeypatch.setattr(model.lowvram.weights, "read", lambda name: (read.append(name), original(name))[1])
    panel.controls["gpu_layers"].value = 2
    panel.button.click()
    assert panel.model is model
    assert model.lowvram.plan == panel.plan
    assert read and all(name.startswith("model.layers.0.") for name in read)
    panel.button.click()  # the same split once more: nothing is read
    assert len(panel.trials) == 3
    assert all(name.startswith("model.layers.0.") for name in read)
    assert panel.message.value.count("<tr>") == 3
    assert list(split.trials_table(panel.trials)["gpu_layers"]) == [3, 2, 2]


def test_a_directory_is_loaded_with_its_own_tokenizer(tmp_path):
    folder = write_model(tmp_path / "model")
    panel = LayerSplitPanel(str(folder), gpu="1000MiB", machine=Made())
    assert panel.spec.fingerprint == directory_spec(folder).fingerprint
    assert panel.load_and_try() is not None
    assert panel.model.lowvram.plan.model == str(folder)


@SIMULATED
def test_once_loaded_the_forecast_is_of_what_runs():
    panel = a_panel()
    panel.state = replace(panel.state, recipe="int4")
    on_cuda = panel.forecast
    panel.load_and_try()
    assert panel.forecast == forecast(panel.plan, open_gpu("1000MiB")) != on_cuda
    panel.figure()


@SIMULATED
def test_out_of_memory_on_load_is_said_and_memory_given_back():
    config = tiny_config("qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    gpu, spec = open_gpu("6MiB"), ModelSpec.from_config(config, "larger")
    panel = LayerSplitPanel(spec, gpu, tokenizer=tiny_tokenizer(), checkpoint=RandomCheckpoint(spec), machine=Made())
    assert panel.load_and_try() is None
    assert panel.trials == []
    assert panel.model is None
    assert "simulated GPU out of memory" in panel.message.value
    assert BUDGET_COLOUR in panel.message.value
    assert gpu.meter.allocated["gpu"] == 0
    panel.state = replace(panel.state, gpu_layers=0, recipe="int4")
    assert panel.load_and_try() is not None
    held, plan = gpu.meter.allocated["gpu"], panel.plan
    panel.state = replace(panel.state, gpu_layers=8, recipe="bf16")
    panel.button.click()
    assert "out of memory" in panel.message.value
    assert panel.model.lowvram.plan == plan
    gc.collect()
    assert gpu.meter.allocated["gpu"] == held
    assert len(panel.trials) == 1


@SIMULATED
def test_out_of_memory_while_answering_is_said_and_memory_given_back():
    panel = a_loaded_panel(tiny_plan("qwen2", context=1024), open_gpu("3MiB"))
    held = panel.model.lowvram.gpu.meter.allocated["gpu"]
    panel.prompt.value = "x" * 900
    assert panel.load_and_try() is None
    assert "during run" in panel.message.value
    assert panel.model.lowvram.gpu.meter.allocated["gpu"] == held


def test_prompts_that_cannot_be_answered_are_said():
    panel = a_loaded_panel()
    panel.prompt.value = "x" * 600
    assert panel.load_and_try() is None
    assert "the plan&#x27;s context is 512" in panel.message.value
    bare = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(PlanError, match="write something"):
        try_split(panel.model, bare, "", Made())
    assert try_split(panel.model, bare, "abc", Made()).measured.prompt_tokens == 3
    nearly_full = "x" * 511
    assert try_split(panel.model, bare, nearly_full, Made()).measured.prompt_tokens == 511


def test_a_load_beyond_the_ram_is_refused_in_words(monkeypatch):
    panel = a_panel()
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    assert panel.load_and_try() is None
    assert "of RAM, found 1000 B free" in panel.message.value
    assert panel.model is None


def test_where_there_are_no_weights_the_button_is_off_and_says_why(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    panel = LayerSplitPanel("qwen1.5-0.5b", gpu="1GiB", machine=Made())
    assert panel.button.disabled
    assert "HF_HUB_OFFLINE forbids the network" in panel.message.value
    assert "HF_HUB_OFFLINE" in panel.button.tooltip
    assert panel.load_and_try() is None  # from a cell: no traceback either
    assert BUDGET_COLOUR in panel.message.value
    assert a_panel(tokenizer=None).button.disabled  # nothing is called tiny-qwen2


def test_threads_of_a_try_are_not_left_behind():
    before = torch.get_num_threads()
    panel = a_loaded_panel()
    panel.controls["threads"].value = 1
    torch.set_num_threads(2)
    try:
        panel.load_and_try()
        assert panel.model.lowvram.plan.threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_static_twin_shows_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv(*SMALL_WORKSPACE)
    panel = a_panel("23MiB", context=512)
    panel.state = replace(panel.state, gpu_layers=1, recipe="int8")
    figure = panel.figure()
    assert isinstance(figure, Figure)
    left, right = figure.axes
    names = ["0", "1\n(shown)", "2", "3"]
    for ax in (left, right):
        assert [label.get_text() for label in ax.get_xticklabels()] == names
    splits = [panel._evaluate(replace(panel.state, gpu_layers=count)) for count in range(4)]
    tops = [max(bar.get_y() + bar.get_height() for stack in left.containers for bar in [stack[n]]) for n in range(4)]
    assert tops == pytest.approx([each.forecast.device_peak_bytes / MiB for each in splits])
    speeds = [bar.get_height() for stack in right.containers for bar in stack]
    assert speeds == pytest.approx([each.speed.decode_tokens_per_s for each in splits])
    assert "simulated" in right.get_title()
    assert "CUDA card" in left.get_title()
    unfit = [text for text in right.texts if "not fit" in text.get_text()]
    assert len(unfit) == sum(not each.fits for each in splits) > 0
    figure.savefig(tmp_path / "figure.png")


@SIMULATED
def test_pictures_of_the_stand_in_say_simulated():
    panel = a_panel(open_gpu("8MiB"))
    for figure in (panel.figure(), panel._bar(panel.result)):
        assert "stand-in GPU (simulated)" in figure.axes[0].get_title()


def test_the_live_picture_is_a_png_of_both_sides(tmp_path):
    panel = a_panel("32MiB")
    panel.controls["gpu_layers"].value = 1
    (tmp_path / "bar.png").write_bytes(panel.picture.value)
    assert matplotlib.image.imread(tmp_path / "bar.png").shape[1] > 500
    (ax,) = panel._bar(panel.result).axes
    width = {n: max(bar[n].get_x() + bar[n].get_width() for bar in ax.containers) for n in (0, 1)}
    assert width[0] == pytest.approx(panel.forecast.device_peak_bytes / MiB)
    on_cpu = panel.plan.weight_bytes("cpu") + panel.plan.kv_bytes(1024, "cpu")
    assert width[1] == pytest.approx(on_cpu / MiB)
    assert "the card, 32.0 MiB" in ax.get_legend_handles_labels()[1]


def test_it_is_displayed_as_its_widget():
    panel = a_panel()
    bundle = panel._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.widget.model_id
    assert bundle["text/plain"] == repr(panel)
    assert "fits" in repr(panel)


def test_without_ipywidgets_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(LowvramError, match=r"pip install 'lowvram_lab\[notebook\]'"):
        lowvram_lab.LayerSplitPanel("qwen1.5-4b", gpu="4GiB")
