"""Quantise a model layer by layer over a stream, a shard for every layer, each finished before the next begins.

Two runs of the calibration text go through the layers side by side: one through the original weights, one through the
quantised ones. A layer's weights are fitted to the inputs that the *quantised* layers before it really produce, and are
asked to make up for some of what those got wrong. A held-out text goes along on both sides, so that the loss is
measured at the end without ever holding two models.

Where a format has two planes, the high one is fitted as if it were alone, and the low one to what that is off by, over
the original's inputs, which those of both planes resemble; the held-out text goes along through both as well.

Derived in: notebooks/04_compress.ipynb
Source: fitting to the original's outputs over the quantised model's inputs, Arai and Ichikawa 2025, arXiv:2504.09629.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm

from lowvram_lab.conversion.resumable import PartialDirectory
from lowvram_lab.memory.host import give_back_heap
from lowvram_lab.model.formats import DTYPES, Format, get_format
from lowvram_lab.model.low_plane import FILE as LOW_PLANE
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModuleSpec
from lowvram_lab.weights.cholesky import factor_, solved
from lowvram_lab.weights.codes import IntegerWeight, rows_of
from lowvram_lab.weights.head import HEAD_TOKENS, head_logits
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.moments import InputMoments, captured_inputs, head_moments
from lowvram_lab.weights.solve import solve
from lowvram_lab.weights.states_on_disk import StatesOnDisk
from lowvram_lab.weights.stored import read_stored, to_stored, to_stored_low

logger = logging.getLogger(__name__)

CORRECTION = 0.25
"""Share of the earlier layers' error that a layer is asked to make up for; all of it would fit the calibration text.

Measured at -70 %: stories15M's KL is 0.042, 0.035, 0.146 at 0, 0.5, 1; smollm2-135m's is lower at 0.2 than at 0.5.
"""

DAMPING = 0.01
"""Of the mean moment, against directions the calibration text hardly has."""

CALIBRATION = ("calibration", "calibration_quantised")
"""Runs of the calibration text: through the original's layers and the quantised ones."""


@dataclass
class LayerQuantizer:
    """Writes the shards of a quantised model into a partial directory, going on where an earlier run was killed.

    Attributes:
        stream: The original.
        plan: Formats.
        partial: Where shards and state go.
        ids: Calibration windows.
        held_out: Windows of another text, of the same length.
        solver: One of ``solve.SOLVERS``.
        progress: Show a progress bar.
        lookup: See ``Sensitivity``.
        modules: After ``run``: module name → ``format``, ``solver`` and ``output_error`` (relative mean square).
    """

    stream: LayerByLayer
    plan: Plan
    partial: PartialDirectory
    ids: torch.Tensor
    held_out: torch.Tensor
    solver: str
    progress: bool
    lookup: float = 0.0
    modules: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec = self.stream.spec
        self._states: dict[str, torch.Tensor] = {}
        self._calibration: dict[str, StatesOnDisk] = {}

    @property
    def shards(self) -> list[str]:
        """Names of the files, in order: the embedding, each layer, the final norm and head."""
        count = len(self.stream) + 2
        return [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]

    @torch.no_grad()
    def run(self) -> dict:
        """Makes every shard that is not finished.

        Returns:
            The held-out text's ``tokens``, ``perplexity``, ``reference_perplexity``, ``kl_mean``, ``top1_agreement``;
            of formats in two planes by the high one, and under ``both_planes`` the same by both.

        Raises:
            CheckpointError: A weight cannot be held in its format, is missing, or is not finite.
        """
        first = self._resume()
        bar = tqdm(total=len(self.shards), initial=first, desc="convert", unit="shard", disable=not self.progress)
        with bar:
            for index in range(first, len(self.shards) - 1):
                self._save(index, self._embedding() if index == 0 else self._layer(index - 1))
                bar.update()
            self.partial.save_tensors(self.shards[-1], self._head())
            give_back_heap()
            measured = self._measure("held_out_quantised")
            if self.low_planes:
                self.partial.save_joined(LOW_PLANE, [self._low_shard(index) for index in self._layers_in_two()])
                measured["both_planes"] = self._measure("held_out_both")
            bar.update()
        return measured

    @property
    def low_planes(self) -> list[str]:
        """The modules whose format has two planes."""
        return [module.name for module in self.spec.modules if self._format(module).planes > 1]

    def _layers_in_two(self) -> list[int]:
        return sorted({self.spec.module(name).layer for name in self.low_planes})

    def _low_shard(self, index: int) -> str:
        """The file of a layer's low planes, until all are in one."""
        return f"state/low-{index}.safetensors"

    def _resume(self) -> int:
        """Loads the last state whose shards are all there; the number of the shard to make next."""
        for index in reversed(range(len(self.shards) - 1)):
            states = self.partial.load_tensors(f"state/states-{index}.safetensors")
            modules = self.partial.load_json(f"state/modules-{index}.json")
            made = self.shards[: index + 1] + [self._low_shard(n) for n in self._layers_in_two() if n < index]
            if states and modules is not None and all(map(self.partial.finished, made)):
                for run in CALIBRATION:
                    self._keep_on_disk(run, states.pop(run))
                # copies: the file stays mapped, and on disk, as long as one of its tensors is there
                self._states, self.modules = {run: of.clone() for run, of in states.items()}, modules
                self.stream.embed(self.ids[:1])  # notes positions and mask
                logger.info("going on after %s", self.shards[index])
                return index + 1
        return 0

    def _save(self, index: int, tensors: dict) -> None:
        self.partial.save_tensors(self.shards[index], tensors)
        calibration = {run: states.read() for run, states in self._calibration.items()}
        self.partial.save_tensors(f"state/states-{index}.safetensors", self._states | calibration)
        del calibration
        self.partial.save_json(f"state/modules-{index}.json", self.modules)
        if index:
            self.partial.forget(f"state/states-{index - 1}.safetensors")
            self.partial.forget(f"state/modules-{index - 1}.json")
        give_back_heap()

    def _embedding(self) -> dict:
        module = self.spec.module(self.spec.embedding)
        fmt = self._format(module)
        tensors, look_up = self._plain(module), None
        if fmt.kind != "float":
            quarter = self.ids[:: max(1, min(4, len(self.ids)))]
            moments = head_moments(self.stream, quarter) if self.spec.tied else None
            if self.lookup:
                moments = moments + self.lookup * torch.eye(len(moments))
            solution = self._solve(module, self.stream.rows(f"{module.name}.weight"), moments)
            tensors |= to_stored(module.name, solution, fmt)
            if fmt.kind == "int8" and self.spec.tied:  # stock transformers looks for the head's scales by themselves
                tensors[f"{self.spec.head}.weight_scale"] = solution.scale.clone()

            def look_up(ids: torch.Tensor) -> torch.Tensor:
                return rows_of(solution, ids).dequantize()

        for run, table in zip(CALIBRATION, (None, look_up), strict=True):
            self._keep_on_disk(run, self.stream.embed(self.ids, table))
        self._states["held_out"] = self.stream.embed(self.held_out)
        self._states["held_out_quantised"] = self.stream.embed(self.held_out, look_up)
        if self.low_planes:
            self._states["held_out_both"] = self._states["held_out_quantised"].clone()
        return tensors

    def _keep_on_disk(self, run: str, states: torch.Tensor) -> None:
        self._calibration[run] = StatesOnDisk(states, self.partial.state / f"{run}.bin")

    def _layer(self, index: int) -> dict:
        states, tensors, low_planes, high_planes = self._states, {}, {}, []
        with self.stream.layer(index) as layer:
            named = {name: self.stream.model.get_submodule(name) for name in self.stream.names(index)}
            moments, of_original = self._moments(layer, named)
            self.stream.run_in_place(layer, states["held_out"])
            for module in self.spec.modules:
                if module.layer != index:
                    continue
                fmt = self._format(module)
                tensors |= self._plain(module)
                if fmt.kind != "float":
                    weight = named[module.name].weight
                    target = corrected(weight, moments[module.name], moments.cross(module.name))
                    moments.forget_cross(module.name)
                    solution = self._solve(module, target.__getitem__, moments[module.name])
                    tensors |= to_stored(module.name, solution, fmt)
                    high = solution.dequantize()
                    if fmt.planes > 1:
                        # by both planes inputs are nearly the original's
                        low = self._solve_low(module, weight - high, of_original[module.name])
                        low_planes |= to_stored_low(module.name, low, fmt)
                        high_planes.append((weight, high))
                        weight.copy_(high + low.dequantize())
                    else:
                        weight.copy_(high)
                    del target, solution, high
                    moments.forget(module.name)
                    give_back_heap()
            if "held_out_both" in states:
                self.stream.run_in_place(layer, states["held_out_both"])
            for weight, high in high_planes:
                weight.copy_(high)
            self._calibration["calibration_quantised"].run(self.stream, layer)
            self.stream.run_in_place(layer, states["held_out_quantised"])
        if low_planes:
            self.partial.save_tensors(self._low_shard(index), low_planes)
        return tensors

    def _moments(self, layer: torch.nn.Module, named: dict[str, torch.nn.Module]) -> tuple[InputMoments, InputMoments]:
        """Moments of the quantised run's inputs, crossed with the original's; and of those, where there are low planes.

        The original's run moves on.
        """
        moments, of_original, in_two = InputMoments(), InputMoments(), set(self.low_planes)
        for original, quantised in self._side_by_side():
            with captured_inputs(named) as theirs:
                after = self.stream.run(layer, original)
            with captured_inputs(named) as ours:
                self.stream.run(layer, quantised)
            moments.add(ours, theirs)
            if in_two & set(named):
                of_original.add(theirs)
            original.copy_(after)
        return moments, of_original

    def _side_by_side(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some windows of both runs of the calibration text after the other."""
        return zip(*(self._calibration[run].windows() for run in CALIBRATION), strict=True)

    def _head(self) -> dict:
        tensors = {}
        for module in self.spec.modules:
            if module.layer is not None or module.name == self.spec.embedding or module.tied_to:
                continue
            fmt = self._format(module)
            tensors |= self._plain(module)
            if fmt.kind != "float":
                moments = InputMoments()
                for windows in self._side_by_side():
                    for original, quantised in self._normed(*windows):
                        moments.add({module.name: quantised}, {module.name: original})
                rows = self.stream.rows(f"{module.name}.weight")
                solution = self._solve(module, rows, moments[module.name])
                tensors |= to_stored(module.name, solution, fmt)
        return tensors

    def _normed(self, *runs: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Final states of several models ``(windows, tokens, hidden)`` behind the norm, some tokens of each at once."""
        for states in zip(*(run.flatten(0, 1).split(HEAD_TOKENS) for run in runs), strict=True):
            yield tuple(map(self.stream.norm, states))

    def _format(self, module: ModuleSpec) -> Format:
        return get_format(self.plan.modules[module.name].format)

    def _solve(
        self, module: ModuleSpec, rows: Callable[[slice], torch.Tensor], moments: torch.Tensor | None
    ) -> IntegerWeight:
        fmt, count = self._format(module), module.weight_shape[0]
        solution, kind, error = solve(rows, count, fmt.plane, moments, self.solver, module.name)
        self.modules[module.name] = {"format": fmt.name, "solver": kind, "output_error": error}
        return solution

    def _solve_low(self, module: ModuleSpec, residual: torch.Tensor, moments: torch.Tensor) -> IntegerWeight:
        """The low plane of a module whose high plane is off by ``residual``."""
        fmt = self._format(module).low_plane
        rows, count = residual.__getitem__, len(residual)
        solution, kind, share = solve(rows, count, fmt, moments, self.solver, module.name, symmetric=False)
        # a share of what the high plane's own product is off by
        self.modules[module.name] |= {"low_solver": kind, "low_output_error": share}
        return solution

    def _plain(self, module: ModuleSpec) -> dict[str, torch.Tensor]:
        """What of a module is not quantised, in the plan's dtype."""
        is_float = self._format(module).kind == "float"
        names = [f"{module.name}.{key}" for key in module.parameters if key != "weight" or is_float]
        return {name: self.stream.read(name, DTYPES[self.plan.dtype]) for name in names}

    def _measure(self, ours: str) -> dict:
        """Compares predictions of the held-out text, the original's and those of final states by their name."""
        head, owner = self.spec.head, self.stream.owner(self.spec.head)
        rows, count, bias = self.stream.head()
        file = self.shards[0 if owner == self.spec.embedding else -1]
        head_rows = stored_rows(self.partial.load_tensors(file), owner, self._format(self.spec.module(head)))
        totals = dict.fromkeys(("nll", "reference_nll", "kl", "agree"), 0.0)
        targets = self.held_out.flatten().roll(-1).split(HEAD_TOKENS)
        last = self.held_out.shape[1] - 1  # of a window; it predicts nothing that is in the window
        counted = (torch.arange(self.held_out.numel()) % (last + 1) < last).split(HEAD_TOKENS)
        runs = self._normed(self._states["held_out"], self._states[ours])
        for (theirs_x, ours_x), target, counts in zip(runs, targets, counted, strict=True):
            theirs = torch.log_softmax(head_logits(theirs_x[counts], rows, count, bias), -1)
            mine = torch.log_softmax(head_logits(ours_x[counts], head_rows, count, bias), -1)
            target = target[counts].unsqueeze(1)
            totals["nll"] -= mine.gather(1, target).sum().item()
            totals["reference_nll"] -= theirs.gather(1, target).sum().item()
            totals["agree"] += (mine.argmax(1) == theirs.argmax(1)).sum().item()
            totals["kl"] += F.kl_div(mine, theirs, reduction="sum", log_target=True).item()
        tokens = int(torch.cat(counted).sum())
        return {
            "tokens": tokens,
            "perplexity": _perplexity(totals["nll"] / tokens),
            "reference_perplexity": _perplexity(totals["reference_nll"] / tokens),
            "kl_mean": totals["kl"] / tokens,
            "top1_agreement": totals["agree"] / tokens,
        }


def corrected(weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """A weight that makes up for wrong inputs: part of the way to ``argmin_V E|W y - V x|^2``.

    Args:
        weight: ``W``, ``(out, in)``.
        moments: ``E[x x^T]`` of the inputs the layer will get.
        cross: ``E[y x^T]`` with the inputs ``y`` it should have got.
    """
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * moments.diagonal().mean().clamp(min=1e-30))
    factor = factor_(damped)
    if factor is None:
        return weight
    shift = solved(factor, (weight @ cross - weight @ moments).T).T
    if not bool(torch.isfinite(shift).all()):
        return weight
    return weight + CORRECTION * shift


def stored_rows(tensors: dict, name: str, fmt: Format):
    """Slice → those rows of a stored weight in float32, restored when they are due."""
    if fmt.kind == "float":
        return lambda select: tensors[f"{name}.weight"][select].float()
    return lambda select: read_stored(name, fmt, lambda key: tensors[key][select]).dequantize()


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that a float overflows, and nobody cares by how much
