"""Low-rank changes that bring the predictions of a model with fewer layers back to those of the whole one.

Every kept layer from the one before the first gap on learns a change of low rank to each of its linear modules, which
is added to the weight: no new parameters. What is lessened is KL(whole || slim) of the next token. A step takes one
window of the text forwards, a layer at a time, then backwards, a layer at a time, and computes each layer anew for its
gradients; layers before the first gap are run once, for all steps. So only one layer's weights are in memory, the
states of one window between layers, and what the optimiser keeps of the changes.

The gradients are those of the whole chain of layers: what one layer cannot give back, a later one may make up for.
How far that goes is limited: a text of some ten thousand tokens is partly learnt by heart in a second pass already
(SmolLM2-135M without three layers: KL 0.12 on it, 0.16 on text it has not seen).

Source: low-rank changes as in Hu et al. 2021, arXiv:2106.09685; healing after layers were left out as in Gromov et al.
2024, arXiv:2403.17887; learning from a larger model's predictions, Hinton et al. 2015, arXiv:1503.02531; Adam, Kingma
and Ba 2014, arXiv:1412.6980; layers computed anew for their gradients, Chen et al. 2016, arXiv:1604.06174.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError
from lowvram_lab.weights.head import HEAD_TOKENS, head_gradient, head_logits
from lowvram_lab.weights.layerwise import LayerByLayer

RANK, PASSES = 8, 2
"""Of each change, and how often all windows are seen."""

RATE, DECAYS = 2e-3, (0.9, 0.999)
"""Largest step of the optimiser, which falls to nothing by half a cosine, and what it keeps of earlier gradients."""

KEPT_EVERY = 8
"""Steps after which what was learnt is kept: what a killed run loses at most."""


@dataclass(frozen=True)
class LowRank:
    """A change of a weight.

    Attributes:
        left: ``(rank, in)``.
        right: ``(out, rank)``.
    """

    left: torch.Tensor
    right: torch.Tensor

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, float32."""
        return torch.addmm(weight.float(), self.right, self.left)


@dataclass(frozen=True)
class Healed:
    """What was learnt.

    Attributes:
        changes: Parameter name → what is added to it.
        kl: Of each pass, the mean KL to the whole model in nats a token while it was learnt on. A window counts as it
            is met, so the first pass says what unseen text would, and a later one less than that.
        tokens: Learnt on.
    """

    changes: dict[str, LowRank]
    kl: tuple[float, ...]
    tokens: int


class Keeps(Protocol):
    """Where a run that may be killed leaves what it has learnt so far."""

    def load(self) -> Mapping[str, torch.Tensor] | None:
        """What was saved last, if anything was."""

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keeps this instead of what was saved before."""


def heal(
    whole: LayerByLayer,
    slim: LayerByLayer,
    removed: Collection[int],
    ids: torch.Tensor,
    *,
    rank: int = RANK,
    passes: int = PASSES,
    keep: Keeps | None = None,
    progress: bool = True,
) -> Healed:
    """Learns low-rank changes of every kept layer from the one before the first gap on.

    Args:
        whole: The whole model.
        slim: The same with the weights that are to be healed, as ``repair`` made them.
        removed: Indices of the layers that go.
        ids: Tokens ``(windows, tokens)`` to learn on.
        rank: Of each change.
        passes: How often all windows are seen.
        keep: Lets a run that was killed go on, and end in the same bits; by default nothing is kept.
        progress: Show a progress bar.

    Raises:
        LowvramError: A rank or a number of passes below one.
    """
    if rank < 1 or passes < 1:
        raise LowvramError(f"expected a rank and a number of passes of one or more, found {rank} and {passes}")
    learning = _Learning(slim, _healed_layers(removed, len(whole)), rank, passes * len(ids))
    known = keep.load() if keep else None
    totals = torch.zeros(passes, dtype=torch.float64)
    if known is not None:
        learning.load(known)
        totals = known["totals"]
    if learning.step < learning.steps:
        given, expected = _both_ends(whole, _first(removed, len(whole)), ids)
        slim.embed(ids[:1])  # what it hands its layers beside states
        bar = tqdm(desc="healing", total=learning.steps, initial=learning.step, disable=not progress, leave=False)
        with bar, _rounded_products():
            while learning.step < learning.steps:
                at_pass, at = divmod(learning.step, len(ids))
                window = _order(at_pass, len(ids))[at]
                totals[at_pass] += learning.learn(given[window], expected[window])
                bar.update()
                if keep and (learning.step % KEPT_EVERY == 0 or learning.step == learning.steps):
                    keep.save({**learning.state(), "totals": totals})
    return Healed(learning.changes(), tuple((totals / len(ids)).tolist()), ids.numel())


def state_bytes(stream: LayerByLayer, removed: Collection[int], rank: int = RANK) -> int:
    """What ``heal`` keeps on disk, at one time: the changes and the optimiser's two moments, in float32."""
    shapes = (_shapes(stream, index) for index in _healed_layers(removed, len(stream)))
    return sum(3 * 4 * rank * sum(shape) for layer in shapes for shape in layer.values())


def _first(removed: Collection[int], count: int) -> int:
    """Up to this layer both models are one, and are given the same."""
    return max(min(removed, default=count) - 1, 0)


def _healed_layers(removed: Collection[int], count: int) -> list[int]:
    return [index for index in range(_first(removed, count), count) if index not in removed]


def _order(at_pass: int, windows: int) -> list[int]:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(at_pass)).tolist()


def _both_ends(whole: LayerByLayer, first: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer is given in either model, and the whole one's final states.

    In bfloat16, to be half as large: of SmolLM2-135M either rounding moves the prediction by 1e-5 nats (KL).
    """
    states = whole.embed(ids)
    _run(whole, range(first), states)
    given = states.bfloat16()
    _run(whole, range(first, len(whole)), states)
    return given, states.bfloat16()


def _run(stream: LayerByLayer, layers: Iterable[int], states: torch.Tensor) -> None:
    for index in layers:
        with stream.layer(index) as layer:
            stream.run_in_place(layer, states)


def _shapes(stream: LayerByLayer, index: int) -> dict[str, tuple[int, ...]]:
    """Of the weights of a layer's linear modules."""
    return {name: tuple(stream.spec.module(name).weight_shape) for name in stream.names(index)}


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Matrices are rounded to bfloat16 before they are multiplied, where the CPU can: a product takes half the time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Learning:
    """Changes of some layers while they are learnt.

    Of a layer all changes are one vector: it, and the two moments that Adam keeps of its gradients, are its state.

    Attributes:
        layers: Indices of those that are healed, which are run in this order.
        step: How many were made.
        steps: How many there will be.
    """

    def __init__(self, stream: LayerByLayer, layers: list[int], rank: int, steps: int):
        self._stream, self._rank = stream, rank
        self.layers, self.step, self.steps = layers, 0, steps
        self._value = {index: self._drawn(index) for index in layers}
        self._mean = {index: torch.zeros_like(value) for index, value in self._value.items()}
        self._square = {index: torch.zeros_like(value) for index, value in self._value.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step needs; ``load`` takes it."""
        named = {"value": self._value, "mean": self._mean, "square": self._square}
        found = {f"{name}.{index}": tensor for name, each in named.items() for index, tensor in each.items()}
        return found | {"step": torch.tensor(self.step)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a state."""
        for name, each in (("value", self._value), ("mean", self._mean), ("square", self._square)):
            each.update({index: state[f"{name}.{index}"] for index in each})
        self.step = int(state["step"])

    def changes(self) -> dict[str, LowRank]:
        """By parameter name."""
        found = {}
        for index, value in self._value.items():
            found |= {f"{name}.weight": change for name, change in self._parts(index, value).items()}
        return found

    def learn(self, given: torch.Tensor, expected: torch.Tensor) -> float:
        """Makes a step.

        Args:
            given: To the first of the layers, ``(tokens, hidden)``.
            expected: The whole model's final states of the same window.

        Returns:
            Mean KL to the whole model before the step.
        """
        states, inputs = given.to(self._stream.dtype)[None], []
        for index in self.layers:
            inputs.append(states)
            with self._stream.layer(index) as layer, self._changed(index, self._value[index]), torch.no_grad():
                states = self._stream.run(layer, states)
        arriving, kl = _kl_gradient(self._stream, states[0], expected.to(states.dtype))
        arriving = arriving[None]
        rate = RATE * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.step += 1
        for index in reversed(self.layers):
            arriving = self._learn_layer(index, inputs.pop(), arriving, rate)
        return kl

    def _learn_layer(self, index: int, given: torch.Tensor, arriving: torch.Tensor, rate: float) -> torch.Tensor:
        """Changes one layer by the gradient at its output, and says the gradient at its input."""
        value = self._value[index].detach().requires_grad_()
        given = given.detach().requires_grad_()
        with self._stream.layer(index) as layer, self._changed(index, value), torch.enable_grad():
            self._stream.run(layer, given).backward(arriving)
        self._adam(index, value.grad, rate)
        return given.grad

    def _adam(self, index: int, gradient: torch.Tensor, rate: float) -> None:
        slow, slower = DECAYS
        mean, square = self._mean[index], self._square[index]
        mean.lerp_(gradient, 1 - slow)
        square.lerp_(gradient.square(), 1 - slower)
        length = (square / (1 - slower**self.step)).sqrt_().add_(1e-8)
        self._value[index].addcdiv_(mean, length, value=-rate / (1 - slow**self.step))

    def _drawn(self, index: int) -> torch.Tensor:
        """Of each module the left part drawn and the right one zero: nothing is changed at first."""
        draw, pieces = torch.Generator().manual_seed(index), []
        for out, width in _shapes(self._stream, index).values():
            pieces.append(torch.randn(self._rank * width, generator=draw) / width**0.5)
            pieces.append(torch.zeros(out * self._rank))
        return torch.cat(pieces)

    def _parts(self, index: int, value: torch.Tensor) -> dict[str, LowRank]:
        """Views of a layer's vector, by module name."""
        shapes = _shapes(self._stream, index)
        pieces = iter(value.split([self._rank * size for out, width in shapes.values() for size in (width, out)]))
        return {
            name: LowRank(next(pieces).view(self._rank, width), next(pieces).view(out, self._rank))
            for name, (out, width) in shapes.items()
        }

    @contextmanager
    def _changed(self, index: int, value: torch.Tensor) -> Iterator[None]:
        """A layer's modules say what they would with changed weights, while the block runs."""

        def hook(change: LowRank):
            return lambda module, inputs, output: output + inputs[0] @ change.left.T @ change.right.T

        parts = self._parts(index, value)
        modules = {name: self._stream.model.get_submodule(name) for name in parts}
        handles = [module.register_forward_hook(hook(parts[name])) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _kl_gradient(stream: LayerByLayer, said: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of the mean KL(whole || slim) of a window, with respect to the slim model's final states, and that KL.

    The head is read a few rows at a time, forwards and backwards: autograd would keep all of it in float32.

    Args:
        stream: Of either model: norm and head are the same.
        said: The slim model's final states ``(tokens, hidden)``, before the norm.
        expected: The whole model's.
    """
    rows, count, bias = stream.head()
    gradient, total = torch.empty_like(said), 0.0
    pieces = (states.split(HEAD_TOKENS) for states in (said, expected, gradient))
    for mine, theirs, into in zip(*pieces, strict=True):
        mine = mine.detach().requires_grad_()
        with torch.enable_grad():
            normed = stream.norm(mine)
        with torch.no_grad():
            wanted = torch.log_softmax(head_logits(stream.norm(theirs), rows, count, bias), dim=-1)
            found = torch.log_softmax(head_logits(normed, rows, count, bias), dim=-1)
            total += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
            normed.backward(head_gradient(found.exp_().sub_(wanted.exp_()), rows))
        into.copy_(mine.grad)
    return gradient / len(said), total / len(said)
