"""What a format costs the *output*: an estimate of KL(original || quantised), module by module, before quantising any.

To second order, changing a weight by ``D`` moves the model's next-token distribution by

    KL  ~  1/2 E[(dlog p(y) / dW . D)^2]  ~  1/2 sum_o  G_o (D A D^T)_oo

with ``A = E[x x^T]`` over the module's inputs and ``G_o = E[g_o^2]`` over the gradients at its outputs, where labels
``y`` are drawn from the model's own prediction (the Fisher information, its two factors taken as independent). One
forward and one backward pass over a calibration text give both, a layer at a time.

Derived in: notebooks/04_compress.ipynb
Source: Martens and Grosse 2015, arXiv:1503.05671 (the factors); Kunstner et al. 2019, arXiv:1905.12558 (why sampled
labels).
"""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.machine import one_thread
from lowvram_lab.memory.host import give_back_heap
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import GROUP_SIZES, Format, get_format
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.weights.codes import IntegerWeight
from lowvram_lab.weights.gptq import gptq, output_error
from lowvram_lab.weights.head import head_gradient, head_logits
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.moments import InputMoments, OutputGradients, captured_inputs
from lowvram_lab.weights.solvers import round_to_nearest, search_clip

SAMPLED_ROWS = 64
"""Output rows of a module that are really quantised for the estimate. Rows are independent, and alike enough."""

LOOKUPS = 1024
"""Tokens of the text whose embedding rows are quantised for the estimate."""

HEAD_TOKENS = 128
"""Tokens whose logits are held at once: 128 x 152k x 4 bytes is 74 MiB."""

_INTEGERS = ("int8", "int4", "packed")

CALIBRATED_BITS = (2, 3, 4)
"""GPTQ is run for these; what it gains over clip search at 4 bits is taken for 5, 6 and 8 as well."""


@dataclass(frozen=True)
class Sensitivity:
    """Estimated cost of every format of every module.

    Attributes:
        costs: Module name → format name → estimated KL in nats per token that this one change adds. A tied head is
            part of its embedding's entry.
        activation_costs: The same without gradients, ``sum_o (D A D^T)_oo``: how far the module's own output moves.
        tokens: Calibration tokens.
        lookup: Of a tied table: what an error in a looked-up row costs beside the same error in the head, per squared
            weight; added to the head's moments, it makes one measure of both uses. 0 where nothing is tied.
    """

    costs: dict[str, dict[str, float]]
    activation_costs: dict[str, dict[str, float]]
    tokens: int
    lookup: float = 0.0

    def table(self) -> pd.DataFrame:
        """Modules x formats, estimated KL."""
        return pd.DataFrame(self.costs).T

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Sensitivity":
        """The inverse of ``to_dict``."""
        return cls(values["costs"], values["activation_costs"], values["tokens"], values["lookup"])

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="{:.2e}".format, max_rows=12)


def formats_to_choose_among(names: Iterable[str]) -> list[Format]:
    """The formats of these names.

    Raises:
        PlanError: One is not known, or of two planes: what decodes by one plane or by both is all layers together.
    """
    formats = [get_format(name) for name in names]
    if two := [fmt.name for fmt in formats if fmt.planes > 1]:
        raise PlanError(f"{two[0]} is for whole models (convert --format {two[0]}), not one format among others")
    return formats


def candidate_formats(module: ModuleSpec, formats: tuple[str, ...] | None = None) -> list[str]:
    """The formats worth considering for a module: int8 and, for 2 to 6 bits, a small, a middle and a large group.

    Args:
        module: An embedding or a linear module.
        formats: Those to choose among instead; int8 is always added, which can hold any shape.
    """
    if formats:
        fitting = [
            fmt for fmt in formats_to_choose_among(formats) if fmt.refuse(module.kind, module.weight_shape) is None
        ]
        return list(dict.fromkeys(["int8", *(fmt.name for fmt in fitting if fmt.kind in _INTEGERS)]))
    sizes = [size for size in GROUP_SIZES if module.weight_shape[1] % size == 0]
    middle = next((size for size in sizes if size >= 64), None)
    chosen = sorted({size for size in (sizes[0], middle, sizes[-1]) if size}) if sizes else []
    names = [f"int{bits}" if size == 64 else f"int{bits}-g{size}" for bits in (6, 5, 4, 3, 2) for size in chosen]
    return ["int8", *names]


def estimate_sensitivity(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    *,
    formats: tuple[str, ...] | None = None,
    scratch: Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Estimates what each candidate format of each module would cost.

    Args:
        spec: The model.
        checkpoint: Its 16- or 32-bit tensors.
        ids: Calibration tokens, ``(windows, tokens)``; a few thousand in all suffice.
        formats: See ``candidate_formats``; fewer are quicker.
        scratch: Where to keep hidden states between layers; by default a temporary directory. They take
            ``layers x tokens x hidden x 4`` bytes of disk, and never more than one layer's of RAM.
        progress: Show a progress bar.

    Raises:
        LowvramError: No tokens.
        CheckpointError: Weights missing or not finite, or an architecture that cannot be run layer by layer.
    """
    if ids.numel() < 2 * spec.num_hidden_layers:
        raise LowvramError(f"expected a calibration text of some hundred tokens or more, found {ids.numel()} tokens")
    stream = LayerByLayer(spec, checkpoint)
    estimate = _Estimate(stream, formats)
    with (
        tempfile.TemporaryDirectory(dir=scratch) as folder,
        tqdm(total=2 * len(stream) + 1, desc="sensitivity", unit="layer", disable=not progress, leave=False) as bar,
    ):
        hidden = stream.embed(ids)
        for index in range(len(stream)):
            save_file({"hidden": hidden}, Path(folder) / f"{index}.safetensors")
            with stream.layer(index) as layer:
                stream.run_in_place(layer, hidden)
            bar.update()
        give_back_heap()
        gradient, moments, importance = _head(stream, hidden)
        bar.update()
        for index in reversed(range(len(stream))):
            hidden = load_file(Path(folder) / f"{index}.safetensors")["hidden"]
            estimate.add_layer(index, hidden, gradient)
            give_back_heap()
            bar.update()
    lookup = estimate.add_tables(ids, gradient, moments, importance)
    order = [m.name for m in spec.modules if m.name in estimate.costs]
    costs, moved = ({name: found[name] for name in order} for found in (estimate.costs, estimate.moved))
    return Sensitivity(costs, moved, ids.numel(), lookup)


def _head(stream: LayerByLayer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the head over the final states, labels drawn from the model's own prediction.

    Returns:
        The gradient at the last layer's output, the moments of the head's inputs, and ``G_o`` of its rows.
    """
    generator = _generator(0)
    rows, count, bias = stream.head()
    moments = 0
    importance = torch.zeros(count)
    tokens = hidden.shape[:-1].numel()
    gradient = torch.empty_like(hidden)
    pieces = [states.flatten(0, 1).split(HEAD_TOKENS) for states in (hidden, gradient)]
    for states, into in zip(*pieces, strict=True):
        states = states.detach().requires_grad_(True)
        with torch.enable_grad():
            normed = stream.norm(states)
        x = normed.detach()
        probabilities = torch.softmax(head_logits(x, rows, count, bias), dim=-1)
        labels = torch.multinomial(probabilities, 1, generator=generator)
        importance += (probabilities - probabilities.square()).sum(dim=0)
        moments = moments + x.T @ x
        probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=x.dtype))  # now d(-log p) / dlogits
        normed.backward(head_gradient(probabilities, rows))
        into.copy_(states.grad)
    return gradient, moments / tokens, importance / tokens


class _Estimate:
    """Costs of modules as they become known: ``costs`` and ``moved`` are the two tables of a ``Sensitivity``."""

    def __init__(self, stream: LayerByLayer, formats: tuple[str, ...] | None):
        self.stream, self.formats = stream, formats
        self.costs: dict[str, dict[str, float]] = {}
        self.moved: dict[str, dict[str, float]] = {}

    def add_layer(self, index: int, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        """Costs of one layer's modules; ``gradient``, at its output, becomes that at its input."""
        stream = self.stream
        inputs, outputs = InputMoments(), OutputGradients()
        with stream.layer(index) as layer, torch.enable_grad():
            named = {name: stream.model.get_submodule(name) for name in stream.names(index)}
            with captured_inputs(named) as seen, outputs.watch(named):
                for states, arriving in zip(hidden.split(1), gradient.split(1), strict=True):
                    states.requires_grad_(True)
                    stream.run(layer, states).backward(arriving)
                    arriving.copy_(states.grad)
                    inputs.add(seen)
        for name in named:  # without the layer: what GPTQ needs takes as much room again
            importance = outputs[name] / inputs.tokens
            self._add(stream.spec.module(name), stream.stored(f"{name}.weight"), inputs[name], importance)

    def add_tables(
        self, ids: torch.Tensor, gradient: torch.Tensor, moments: torch.Tensor, importance: torch.Tensor
    ) -> float:
        """Costs of the head and of the embedding; returns ``Sensitivity.lookup``.

        An error in a row of the embedding moves the first layer's input wherever the text has that token, and every
        dimension of the input counts alike: ``1/2 energy |D_row|^2``. A head's row counts by ``G_o``, which is about
        how often the token is expected. A tied row is off in both places at once.
        """
        stream, spec = self.stream, self.stream.spec
        energy = gradient.square().sum(dim=-1).mean().item() / spec.hidden_size
        owner = spec.module(stream.owner(spec.head))
        lookup = 0.0
        if spec.tied:
            lookup = energy / max(importance.sum().item(), 1e-30)
            moments = moments + lookup * torch.eye(len(moments))
        self._add(owner, stream.stored(f"{owner.name}.weight"), moments, importance)
        table = spec.module(spec.embedding)
        if table.kind == "embedding" and not spec.tied:
            rows = stream.stored(f"{table.name}.weight")[ids.flatten()[_sample(ids.numel(), LOOKUPS)]].float()
            errors = {}
            for fmt in candidate_formats(table, self.formats):
                restored = round_to_nearest(rows, get_format(fmt)).dequantize()
                errors[fmt] = (restored - rows).square().sum(dim=1).mean().item()
            self.costs[table.name] = {fmt: 0.5 * energy * error for fmt, error in errors.items()}
            self.moved[table.name] = errors
        return lookup

    def _add(self, module: ModuleSpec, weight: torch.Tensor, moments: torch.Tensor, importance: torch.Tensor) -> None:
        found = _module_costs(module, weight, moments, importance, self.formats)
        self.costs[module.name], self.moved[module.name] = found


@torch.no_grad()
@one_thread()
def _module_costs(
    module: ModuleSpec,
    weight: torch.Tensor,
    moments: torch.Tensor,
    importance: torch.Tensor,
    formats: tuple[str, ...] | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Estimated KL and output error of a module's candidate formats, from samples of its rows.

    The rows for the KL are drawn by their importance: of a head's, a few hundred frequent tokens have nearly all.
    """
    size = SAMPLED_ROWS * (4 if module.layer is None else 1)
    drawn = torch.multinomial(importance.clamp(min=0) + 1e-30, size, True, generator=_generator(len(weight)))
    picked = weight[torch.cat((drawn, _sample(len(weight))))].float()
    total = importance.sum().item()
    gains: dict[int, float] = {}
    costs, moved = {}, {}
    names = candidate_formats(module, formats)
    for name in names:
        fmt = get_format(name)
        errors = _errors(picked, search_clip(picked, fmt, moments.diagonal(), stride=4), moments)
        bits = fmt.bits if fmt.bits in CALIBRATED_BITS else CALIBRATED_BITS[-1]
        if bits not in gains:
            gains[bits] = _gain(picked, names, bits, moments)
        costs[name] = 0.5 * total * gains[bits] * errors[: len(drawn)].mean().item()
        moved[name] = len(weight) * gains[bits] * errors[len(drawn) :].mean().item()
    return costs, moved


def _gain(picked: torch.Tensor, names: list[str], bits: int, moments: torch.Tensor) -> float:
    """What GPTQ leaves of clip search's error in this module."""
    same = [name for name in names if get_format(name).bits == bits] or names[-1:]
    fmt = get_format(same[len(same) // 2])
    before = _errors(picked, search_clip(picked, fmt, moments.diagonal(), stride=4), moments).sum()
    after = _errors(picked, gptq(picked, fmt, moments), moments).sum()
    return float((after / before.clamp(min=1e-30)).clamp(max=1.0))


def _errors(weight: torch.Tensor, solution: IntegerWeight, moments: torch.Tensor) -> torch.Tensor:
    return output_error(solution.dequantize() - weight, moments)


def _sample(rows: int, size: int = SAMPLED_ROWS) -> torch.Tensor:
    return torch.randperm(rows, generator=_generator(rows))[:size].sort().values


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
