"""What a format costs the output, measured: one module at a time is really quantised, and the model run on from there.

An estimate (``weights/sensitivity.py``) prices hundreds of pairs at once; this takes a sample of them and says how far
to trust it. All variants go through the layers side by side, each from the layer where it departs from the original,
so that a model is read once and never held whole.

Derived in: notebooks/04_compress.ipynb
"""

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.weights.codes import rows_of
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.moments import InputMoments, captured_inputs, head_moments, normed_moments
from lowvram_lab.weights.sensitivity import HEAD_TOKENS, Sensitivity
from lowvram_lab.weights.solve import solve


@dataclass(frozen=True)
class MeasuredSensitivity:
    """Measured beside estimated costs.

    Attributes:
        table: ``module``, ``format``, ``measured`` (mean KL to the original in nats a token, on windows that the module
            was not fitted to), ``estimated`` and ``output_change`` (``costs`` and ``activation_costs`` of the
            ``Sensitivity``). A DataFrame.
        tokens: Measured on.
    """

    table: pd.DataFrame
    tokens: int

    def rank_correlations(self) -> dict[str, float]:
        """Spearman's rank correlation of each proxy with the measured KL: 1 where they agree on every order."""
        ranks = self.table[["measured", "estimated", "output_change"]].rank().corr()["measured"]
        return {proxy: float(ranks[proxy]) for proxy in ("estimated", "output_change")}

    def summary(self) -> str:
        """One line."""
        found, ratio = self.rank_correlations(), (self.table["measured"] / self.table["estimated"]).median()
        return (
            f"{len(self.table)} pairs over {self.tokens} tokens: rank correlation with the measured KL "
            f"{found['estimated']:.2f} (estimate), {found['output_change']:.2f} (how far the module's output moves); "
            f"measured / estimated, median {ratio:.2f}"
        )

    def _repr_html_(self) -> str:
        shown = self.table.to_html(index=False, float_format="{:.2e}".format, max_rows=24)
        return f"<b>Measured sensitivity</b> {self.summary()}<br>{shown}"


@torch.no_grad()
def measure_sensitivity(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    sensitivity: Sensitivity,
    ids: torch.Tensor,
    *,
    pairs: list[tuple[str, str]] | None = None,
    count: int = 24,
    solver: str = "gptq",
    progress: bool = True,
) -> MeasuredSensitivity:
    """Quantises some modules, each by itself, and measures what that does to the prediction.

    Args:
        spec: The model.
        checkpoint: Its 16- or 32-bit tensors.
        sensitivity: The estimate to check.
        ids: Tokens ``(windows, tokens)``: modules are fitted to every second window, measured on the others.
        pairs: Module and format names; by default ``count`` drawn from all pairs of the estimate, seed 0. Each takes
            ``tokens x hidden x 4`` bytes of RAM.
        count: How many to draw.
        solver: See ``convert``.
        progress: Show a progress bar.

    Raises:
        LowvramError: Fewer than two windows.
        PlanError: A pair that the estimate does not have.
        CheckpointError: See ``LayerByLayer``.
    """
    if len(ids) < 2:
        raise LowvramError(f"expected two windows of tokens or more, to fit and to measure on, found {len(ids)}")
    pairs = list(dict.fromkeys(pairs or _drawn(sensitivity, count)))
    for name, fmt in pairs:
        if fmt not in sensitivity.costs.get(name, ()):
            raise PlanError(
                f"expected pairs of the estimate, found {name} in {fmt}; estimate it with formats=({fmt!r},)"
            )
    stream = LayerByLayer(spec, checkpoint)
    fit = ids[::2]
    rows = spec.module(spec.embedding).weight_shape[0]
    held_out = ids[1::2]
    heads: dict[tuple[str, str], object] = {}
    fitted, states = stream.embed(fit), {None: stream.embed(held_out)}
    with tqdm(total=len(stream) + 1, desc="measuring", unit="layer", disable=not progress, leave=False) as bar:
        tables = [(name, fmt) for name, fmt in pairs if name == spec.embedding]
        moments = None
        if tables and spec.tied:
            moments = head_moments(stream, fit) + sensitivity.lookup * torch.eye(spec.hidden_size)
        for name, fmt in tables:
            table = stream.rows(f"{name}.weight")
            solution, *_ = solve(table, rows, get_format(fmt), moments, solver, name)
            states[name, fmt] = stream.embed(held_out, lambda ids, of=solution: rows_of(of, ids).dequantize())
            if spec.tied:
                heads[name, fmt] = solution
        for index in range(len(stream)):
            _through_layer(stream, index, fitted, states, pairs, solver)
            bar.update()
        for name, fmt in pairs:
            if name == spec.head and not spec.tied:
                table, moments = stream.rows(f"{name}.weight"), normed_moments(stream, fitted)
                heads[name, fmt], *_ = solve(table, rows, get_format(fmt), moments, solver, name)
        measured = _divergences(stream, states, heads, pairs)
        bar.update()
    rows = [(n, f, measured[n, f], sensitivity.costs[n][f], sensitivity.activation_costs[n][f]) for n, f in pairs]
    columns = ["module", "format", "measured", "estimated", "output_change"]
    return MeasuredSensitivity(pd.DataFrame(rows, columns=columns), held_out.numel())


def _drawn(sensitivity: Sensitivity, count: int) -> list[tuple[str, str]]:
    pairs = [(name, fmt) for name, costs in sensitivity.costs.items() for fmt in costs]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return [pairs[index] for index in order[:count].sort().values.tolist()]


def _through_layer(
    stream: LayerByLayer, index: int, fitted: torch.Tensor, states: dict, pairs: list[tuple[str, str]], solver: str
) -> None:
    """Moves all runs on by a layer; those of its own modules depart from the original here."""
    with stream.layer(index) as layer:
        named = {name: stream.model.get_submodule(name) for name in stream.names(index)}
        moments = InputMoments()
        with captured_inputs(named) as seen:
            for window in fitted.split(1):
                window.copy_(stream.run(layer, window))
                moments.add(seen)
        departing = {}
        for name, fmt in pairs:
            if name in named:
                weight = named[name].weight
                original = weight.clone()
                rows, count = original.__getitem__, len(original)
                solution, *_ = solve(rows, count, get_format(fmt), moments[name], solver, name)
                weight.copy_(solution.dequantize())
                departing[name, fmt] = states[None].clone()
                stream.run_in_place(layer, departing[name, fmt])
                weight.copy_(original)
        for hidden in states.values():
            stream.run_in_place(layer, hidden)
    states |= departing


def _divergences(
    stream: LayerByLayer, states: dict, heads: dict, pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], float]:
    """Mean KL of every pair, a few tokens' logits at a time."""
    name, totals = stream.spec.head, dict.fromkeys(pairs, 0.0)
    plain, bias = stream.weight(name), stream.bias(name)

    def predictions(pair, weight, start: int):
        hidden = states.get(pair, states[None]).flatten(0, 1)[start : start + HEAD_TOKENS]
        return torch.log_softmax(F.linear(stream.norm(hidden), weight, bias), dim=-1)

    tokens = states[None].shape[:-1].numel()
    # a head of its own is dequantised once, and one at a time: a table takes more room than all hidden states
    for group in [[pair for pair in pairs if pair not in heads], *([pair] for pair in heads)]:
        weight = heads[group[0]].dequantize() if group and group[0] in heads else plain
        for start in range(0, tokens, HEAD_TOKENS) if group else ():
            expected = predictions(None, plain, start)
            for pair in group:
                found = predictions(pair, weight, start)
                totals[pair] += F.kl_div(found, expected, reduction="sum", log_target=True).item()
    return {pair: total / tokens for pair, total in totals.items()}
