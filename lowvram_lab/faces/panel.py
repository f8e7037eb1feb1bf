"""LayerSplitPanel: sliders over a split of a model between GPU and CPU, with its memory, its speed and a try of it.

A thin face of ``split.py``, where every figure comes from; ``LayerSplitPanel.figure`` draws them without widgets.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import gc
import html
import io
import os
import threading
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.engine.load import load, replan
from lowvram_lab.engine.loaded import Weights
from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.faces.plot_memory import (
    BUDGET_COLOUR,
    COLOURS,
    label_point,
    memory_parts,
    plot_profiles,
    stack_bars,
    unit_name,
    unit_of,
)
from lowvram_lab.faces.split import (
    SplitResult,
    SplitState,
    Trial,
    contexts_of,
    evaluate_split,
    longest_context,
    recipes_of,
    split_plan,
    state_of,
    trials_table,
    try_split,
    why_no_weights,
)
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.profile import MemoryProfile, SpeedProfile
from lowvram_lab.planner.suited import RECIPES, sixteen_bits
from lowvram_lab.rates.machine import Machine
from lowvram_lab.units import format_bytes

CONTEXT = 2048
PROMPT = "What is a language model?"
FITS_COLOUR, SHOWN_COLOUR = "#2e7d32", "#fff3c4"
DOES_NOT_FIT = {"facecolor": "#f2f2f2", "edgecolor": BUDGET_COLOUR}
HEADINGS = {
    "gpu_layers": "GPU layers",
    "kv_format": "KV cache",
    "predicted_bytes": "GPU peak: predicted",
    "measured_bytes": "measured",
    "predicted_tokens_per_s": "tokens/s: predicted",
    "measured_tokens_per_s": "measured",
    "predicted_ttft_s": "first token, s: predicted",
    "measured_ttft_s": "measured",
}


class LayerSplitPanel:
    """Sliders for layers on the GPU, context, formats and threads; a live memory bar, predicted speed, a try.

    Nothing is loaded before "Load and try" is pressed; later tries load only what another split changes.

    Args:
        model: A name (its config alone is read), a ``ModelSpec``, or a model from ``load``, which is shown as it is.
        gpu: Beside a name or spec: a budget such as ``"4GiB"``, forecast as a CUDA card until something is loaded, or
            an opened GPU.
        context: Tokens to begin with; by default 2048 or the most the model has, or the loaded plan's.
        tokenizer: By default the source's own, fetched at the first try.
        checkpoint: See ``load``.
        machine: Rates for the speed; by default this machine's, measured where they are not known.

    Attributes:
        widget: The ``VBox`` that is displayed.
        controls: Name of a ``SplitState`` field → its control.
        picture: The memory bar, a PNG.
        verdict: Fits or not, in green or red, plan and predicted speed: HTML.
        prompt: What a try asks.
        button: Calls ``load_and_try``; disabled where there are no weights.
        message: What the last try came to, or why it failed: HTML.
        trials: Every try that came to an answer, oldest first.
        model: The loaded model, or ``None``.

    Raises:
        LowvramError: ipywidgets is not installed; or a budget is missing, or is given beside a loaded model.
        SourceError: An unknown model name.
        PlanError: A context the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel | ModelSpec | str | os.PathLike,
        gpu: Gpu | GpuBudget | str | int | None = None,
        context: int | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        checkpoint: Weights | None = None,
        machine: Machine | None = None,
    ):
        widgets = import_widgets("LayerSplitPanel")
        self._lock = threading.RLock()  # JupyterLab runs callbacks beside cells
        self._known: dict[SplitState, SplitResult] = {}
        self._moving = False
        self._tokenizer = tokenizer
        self._checkpoint = checkpoint
        self._machine = machine or Machine()
        self.model = None
        self._base = None
        self.trials = []
        if isinstance(model, str | os.PathLike):
            self.spec = find_source(os.fspath(model)).spec()
        elif isinstance(model, ModelSpec):
            self.spec = model
        elif gpu is not None:
            raise LowvramError("a loaded model stays on its own GPU; leave gpu out, or name the model instead")
        else:
            self.model = model
            self.spec = model.lowvram.plan.spec
            self._base = model.lowvram.plan
            gpu = model.lowvram.gpu
        if gpu is None:
            raise LowvramError("expected a GPU budget beside a name or a spec, found none; give one, e.g. gpu='4GiB'")
        self._gpu = gpu if isinstance(gpu, Gpu) else None
        self._budget = self._gpu.budget if self._gpu else GpuBudget.parse(gpu)
        if self._base is None and not self.spec.stored:
            dtype = sixteen_bits(self.spec, self._gpu or self._budget, context)
            if dtype != RECIPES[0]:
                self._base = Plan.uniform(self.spec, dtype, context=min(CONTEXT, longest_context(self.spec)))
        state = self._start(context)
        split_plan(state, self.spec, self._base)  # an impossible context is refused before anything is drawn
        self._build(widgets, state)
        self._refresh()

    def _start(self, context: int | None) -> SplitState:
        if self._base is not None:
            state = state_of(self._base)
            return replace(state, context=state.context if context is None else context)
        context = min(CONTEXT, longest_context(self.spec)) if context is None else context
        return SplitState(self.spec.num_hidden_layers, context, recipe=recipes_of(self.spec)[0])

    def _build(self, widgets, state: SplitState) -> None:
        narrow = widgets.Layout(width="27em", max_width="100%")
        dtype, most = self._base.dtype if self._base else "bf16", max(os.cpu_count() or 1, state.threads or 1)
        contexts = [(f"{tokens:,}", tokens) for tokens in contexts_of(self.spec, state.context)]
        counts = [("auto", 0), *((str(count), count) for count in range(1, most + 1))]
        ends = "embedding and head" if self.spec.tied else "embedding"

        def control(kind, description: str, **options):
            return kind(description=description, style={"description_width": "7em"}, layout=narrow, **options)

        slider, total = widgets.IntSlider, self.spec.num_hidden_layers
        self.controls = {
            "gpu_layers": control(slider, "GPU layers", min=0, max=total, continuous_update=False),
            "context": control(widgets.SelectionSlider, "context", options=contexts, continuous_update=False),
            "recipe": control(widgets.Dropdown, "weights", options=recipes_of(self.spec, self._base)),
            "kv_format": control(widgets.ToggleButtons, "KV cache", options=list(dict.fromkeys((dtype, "int8")))),
            "threads": control(widgets.SelectionSlider, "CPU threads", options=counts, continuous_update=False),
            "embedding_on_cpu": control(widgets.Checkbox, f"{ends} on the CPU"),
        }
        self.controls["kv_format"].style.button_width = "5em"
        self.controls["kv_format"].add_class("widget-inline-hbox")  # ipywidgets forgets it: the label beside, not above
        self.picture = widgets.Image(format="png", layout=widgets.Layout(width="640px", max_width="100%"))
        self.verdict, self.message = widgets.HTML(), widgets.HTML()
        self.prompt = control(widgets.Text, "prompt", value=PROMPT)
        own_weights = self._checkpoint is not None or self.model is not None
        reason = "" if own_weights and self._tokenizer is not None else why_no_weights(self.spec)
        fetches = "" if own_weights else "; fetches the weights, if they are not on this machine"
        tooltip = reason or f"loads this split and measures an answer{fetches}"
        self.button = widgets.Button(description="Load and try", tooltip=tooltip, disabled=bool(reason))
        self.message.value = f"nothing to load: {html.escape(reason)}" if reason else ""
        self._move(state)
        for each in self.controls.values():
            each.observe(lambda _: self._refresh(), names="value")
        self.button.on_click(lambda _: self.load_and_try())
        beside = widgets.Layout(flex="1 1 26em", min_width="0")  # else a long verdict pushes the picture below
        columns = [
            widgets.VBox(list(self.controls.values())),
            widgets.VBox([self.picture, self.verdict], layout=beside),
        ]
        wrapping = widgets.Layout(flex_flow="row wrap")
        asking = widgets.Box([self.prompt, self.button], layout=wrapping)
        self.widget = widgets.VBox([widgets.Box(columns, layout=wrapping), asking, self.message])

    @property
    def state(self) -> SplitState:
        """The settings shown. May be set: ``PlanError`` for one that is not offered."""
        values = {name: control.value for name, control in self.controls.items()}
        return SplitState(**{**values, "threads": values["threads"] or None})

    @state.setter
    def state(self, state: SplitState) -> None:
        split_plan(state, self.spec, self._base)
        offered = {
            "context": [tokens for _, tokens in self.controls["context"].options],
            "recipe": recipes_of(self.spec, self._base),
            "threads": [count or None for _, count in self.controls["threads"].options],
        }
        for name, values in offered.items():
            if getattr(state, name) not in values:
                raise PlanError(f"expected {name} {', '.join(map(str, values))}, found {getattr(state, name)!r}")
        with self._lock:
            self._move(state)
            self._refresh()

    @property
    def gpu_layers(self) -> int:
        """Decoder layers on the GPU. May be set: ``PlanError`` for more than the model has."""
        return self.state.gpu_layers

    @gpu_layers.setter
    def gpu_layers(self, count: int) -> None:
        self.state = replace(self.state, gpu_layers=count)

    @property
    def result(self) -> SplitResult:
        """Plan, memory and speed of the settings shown."""
        return self._evaluate(self.state)

    @property
    def plan(self) -> Plan:
        """The plan shown."""
        return self.result.plan

    @property
    def forecast(self) -> MemoryProfile:
        """Its memory, over the whole context."""
        return self.result.forecast

    @property
    def speed(self) -> SpeedProfile:
        """Its speed, for a prompt of half the context."""
        return self.result.speed

    def _evaluate(self, state: SplitState) -> SplitResult:
        with self._lock:
            if state not in self._known:
                card = self._gpu or self._budget
                self._known[state] = evaluate_split(state, self.spec, card, self._machine, self._base)
            return self._known[state]

    def _move(self, state: SplitState) -> None:
        """Moves the controls, without a forecast for each."""
        self._moving = True
        try:
            for name, control in self.controls.items():
                control.value = getattr(state, name) or 0 if name == "threads" else getattr(state, name)
        finally:
            self._moving = False

    def _refresh(self) -> None:
        if self._moving:
            return
        with self._lock:
            if self.state not in self._known:
                self.verdict.value = "forecasting …"
            try:
                found = self.result
            except LowvramError as error:  # a model that the dry run cannot replay, say
                self.verdict.value = coloured(str(error), fits=False)
                return
            lines = found.plan.summary(), f"predicted: {found.speed.summary()}"
            picture = _png(self._bar(found))  # made before either is shown, so that they change together
            self.verdict.value = "<br>".join([coloured(found.verdict(), found.fits), *map(html.escape, lines)])
            self.picture.value = picture

    def load_and_try(self) -> Trial | None:
        """What the button does: realises the plan shown, answers the prompt, puts measured beside predicted.

        Returns:
            The trial, or ``None`` where it failed: the panel says why, in red, and the GPU is given back what the
            failed load or answer took.
        """
        with self._lock:
            failure = ""
            self.button.disabled, self.message.value = True, "loading …"
            try:
                self._realise(self.plan)
                self.message.value = "answering …"
                self.trials.append(try_split(self.model, self._tokenizer, self.prompt.value, self._machine))
            except (LowvramError, torch.OutOfMemoryError) as error:
                failure = str(error) or type(error).__name__
            finally:
                self.button.disabled, self.message.value = False, ""
                self.button.focus()  # a disabled button loses it
            if not failure:
                self.message.value = self._outcome()
                return self.trials[-1]
            gc.collect()  # the error is gone, and with it the frames that held the tensors they worked on
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.message.value = coloured(failure, fits=False)
            return None

    def _realise(self, plan: Plan) -> None:
        if self._tokenizer is None:
            self._tokenizer = find_source(self.spec.name).tokenizer()
        if self._gpu is None:
            self._gpu = open_gpu(self._budget)
            if self._gpu.kernels != self._budget.kernels:  # from here on, the forecast is of what runs
                self._known.clear()
                self._refresh()
        if self.model is None:
            self.model = load(plan, self._gpu, checkpoint=self._checkpoint, progress=False)
        elif plan != self.model.lowvram.plan:
            with self._gpu.lock:  # no forward pass of another thread over half a split
                replan(self.model, plan, progress=False)

    def _outcome(self) -> str:
        trial, table = self.trials[-1], trials_table(self.trials)
        forms = {column: format_bytes if "bytes" in column else "{:.2f}".format for column in table.columns[3:]}
        table = table.assign(**{column: table[column].map(form) for column, form in forms.items()})
        shown = table.rename(columns=HEADINGS).to_html(index=False, border=0)
        shown = f'<div class="jp-RenderedHTMLCommon" style="overflow-x: auto">{shown}</div>'
        where = f"memory on {trial.gpu}, speed on {trial.measured.where}; both of that answer alone"
        return f"<b>answer</b>: {html.escape(trial.answer)}{shown}{html.escape(where)}"

    def figure(self) -> Figure:
        """The panel without widgets: memory and predicted speed of some GPU-layer counts, the one shown among them.

        Returns:
            A matplotlib ``Figure``: the forecast peak of each count, stacked, against the card; its tokens/s.
        """
        with self._lock:
            state, total = self.state, self.spec.num_hidden_layers
            counts = sorted({total * quarter // 4 for quarter in range(5)} | {state.gpu_layers})
            found = [self._evaluate(replace(state, gpu_layers=count)) for count in counts]
        names = list(map(str, counts))
        shown = counts.index(state.gpu_layers)
        bars = len(counts)
        names[shown] += "\n(shown)"
        figure = Figure(figsize=(3.4 + 1.9 * bars, 4.4), dpi=90, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(bars + 2.4, bars))
        plot_profiles([each.forecast for each in found], names, ax=left)
        left.set_title(f"memory forecast\n{self._forecast_for()}", fontsize="medium")
        for position, each in enumerate(found):
            speed, style = each.speed.decode_tokens_per_s, {"color": COLOURS["weights"]} if each.fits else DOES_NOT_FIT
            right.bar(position, speed, width=0.6, **style)
            text, colour = (f"{speed:.1f}", "black") if each.fits else (f"{speed:.1f}\ndoes\nnot fit", BUDGET_COLOUR)
            label_point(right, text, (position, speed), colour)
        right.set_xticks(range(bars), names)
        right.set_ylabel("predicted tokens/s")
        left.set_ylim(bottom=0)
        right.set_ylim(0, 1.32 * max(each.speed.decode_tokens_per_s for each in found))  # room for three lines
        right.set_title(f"speed forecast\n{found[-1].speed.where}", fontsize="medium", wrap=True)
        for ax in (left, right):
            ax.axvspan(shown - 0.42, shown + 0.42, color=SHOWN_COLOUR, zorder=0)
            ax.set_xlabel(f"decoder layers on the GPU, of {total}")
        settings = f"{self.spec.name}: {state.recipe} weights, {state.kv_format} KV cache, context {state.context:,}"
        figure.suptitle(settings, fontsize="medium", fontweight="bold")
        return figure

    def _bar(self, found: SplitResult) -> Figure:
        """The live picture: what GPU and CPU hold at the GPU's peak, and where the card ends."""
        plan, gpu_parts = found.plan, found.forecast.breakdown
        cpu_kv = plan.kv_bytes(plan.context, "cpu")
        stacks = [gpu_parts, {"weights": found.forecast.cpu_weights_bytes, "kv": cpu_kv}]
        sizes, card = [sum(stack.values()) for stack in stacks], self._budget.total_bytes if self._budget else 0
        widest = max(card, sum(sizes))  # the sum hardly moves with the layers, so the scale stands still
        unit = unit_of(widest)
        figure = Figure(figsize=(7.2, 2.6), dpi=110, layout="constrained")
        ax = figure.add_subplot()
        stack_bars(ax, [0, 1], memory_parts(stacks, unit), sideways=True)
        if card:
            label = f"the card, {format_bytes(card)}"
            ax.plot([card / unit] * 2, [-0.45, 0.45], "--", color=BUDGET_COLOUR, linewidth=2, label=label)
        for position, size in enumerate(sizes):
            # beyond the bar it would cover the card's line
            within = position == 0 and size < card < size + 0.16 * widest
            side = {"xytext": (-5, 0), "ha": "right"} if within else {"xytext": (5, 0), "ha": "left"}
            text = format_bytes(size) if size else "nothing"
            label_point(ax, text, (size / unit, position), va="center", **side)
        ax.set_yticks([0, 1], ["GPU", "CPU"])
        ax.set(xlim=(0, 1.16 * widest / unit), ylim=(1.5, -0.5))
        ax.set_xlabel(f"{unit_name(unit)} at the GPU's peak, {plan.context:,} tokens")
        ax.set_title(f"{self.spec.name}: memory forecast {self._forecast_for()}", fontsize="medium")
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
        return figure

    def _forecast_for(self) -> str:
        kernels = (self._gpu or self._budget).kernels
        return "for " + ("a CUDA card" if kernels == "cuda" else "the stand-in GPU (simulated)")

    def __repr__(self) -> str:
        try:
            return f"{self.plan.summary()}\n{self.result.verdict()}\n{self.speed.summary()}"
        except LowvramError as error:
            return f"LayerSplitPanel of {self.spec.name}: {error}"

    def _repr_mimebundle_(self, **options) -> dict:
        return {**self.widget._repr_mimebundle_(**options), "text/plain": repr(self)}


def import_widgets(panel: str):
    """The module ipywidgets, which a panel of this name needs."""
    try:
        import ipywidgets
    except ImportError as error:
        raise LowvramError(f"{panel} needs ipywidgets; run pip install 'lowvram_lab[notebook]'") from error
    return ipywidgets


def coloured(text: str, fits: bool) -> str:
    """Good news in green, or bad in red: HTML."""
    colour, mark = (FITS_COLOUR, "✓") if fits else (BUDGET_COLOUR, "✗")
    return f'<b style="color: {colour}">{mark} {html.escape(text)}</b>'


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
