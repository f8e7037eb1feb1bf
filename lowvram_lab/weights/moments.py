"""What flows through a layer's linear modules: inputs and their second moments forwards, gradients backwards.

Derived in: notebooks/04_compress.ipynb
"""

from contextlib import contextmanager

import torch

from lowvram_lab.weights.layerwise import LayerByLayer

NORMED_TOKENS = 64
"""Tokens behind the final norm that are summed at once."""


@contextmanager
def captured_inputs(modules: dict[str, torch.nn.Module]):
    """Yields a dictionary that holds each module's latest input ``(..., in)`` while the block runs.

    Args:
        modules: What to watch, by the name to file it under.
    """
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class InputMoments:
    """Second moments of modules' inputs over all tokens added: ``E[x x^T]``, and with a second model's ``E[y x^T]``.

    Modules that are given the very same tensor (q, k and v; gate and up) share their matrices. All tokens are added
    before a mean is read: it takes the place of the sum, for the matrices are hundreds of MiB.
    """

    def __init__(self):
        self.tokens = 0
        self._are_means = False
        self._sums: dict[str, torch.Tensor] = {}
        self._cross: dict[str, torch.Tensor] = {}
        self._shares: dict[str, str] = {}
        self._users: dict[str, set[str]] = {}

    def add(self, inputs: dict[str, torch.Tensor], others: dict[str, torch.Tensor] | None = None) -> None:
        """Adds what ``captured_inputs`` holds after a forward pass.

        Args:
            inputs: Module name → input ``(..., in)``.
            others: The same modules' inputs in another model, ``y`` above, for the same tokens.

        Raises:
            RuntimeError: A mean was read.
        """
        if self._are_means:
            raise RuntimeError("moments are means by now: add all tokens before one is read")
        leader, latest = "", None
        for name, tensor in inputs.items():
            if tensor is latest:
                self._shares[name] = leader
                self._users[leader].add(name)
                continue
            leader, latest = name, tensor
            self._users.setdefault(name, {name})
            rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
            accumulate(self._sums, name, rows, rows)
            if others is not None:
                accumulate(self._cross, name, others[name].detach().reshape(rows.shape).float(), rows)
        self.tokens += rows.shape[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        """``(in, in)`` float32, the mean over tokens of ``x x^T``."""
        return self._means()._sums[self._shares.get(name, name)]

    def cross(self, name: str) -> torch.Tensor:
        """``(in, in)`` float32, the mean over tokens of ``y x^T``."""
        return self._means()._cross[self._shares.get(name, name)]

    def forget_cross(self, name: str) -> None:
        """Lets ``cross`` of a module go, once no other shares it."""
        leader = self._shares.get(name, name)
        if self._users[leader] == {name}:
            self._cross.pop(leader, None)

    def forget(self, name: str) -> None:
        """Lets a module's matrices go, once no other shares them."""
        leader = self._shares.get(name, name)
        self._users[leader].discard(name)
        if not self._users[leader]:
            del self._sums[leader]
            self._cross.pop(leader, None)

    def _means(self) -> "InputMoments":
        for matrix in () if self._are_means else (*self._sums.values(), *self._cross.values()):
            matrix.div_(self.tokens)
        self._are_means = True
        return self


def head_moments(stream: LayerByLayer, ids: torch.Tensor) -> torch.Tensor:
    """Second moments ``(hidden, hidden)`` of what a model's head is given for tokens ``(windows, tokens)``."""
    return normed_moments(stream, stream.final_states(ids))


def normed_moments(stream: LayerByLayer, hidden: torch.Tensor) -> torch.Tensor:
    """The same for final states ``(windows, tokens, hidden)``, behind the norm, ``NORMED_TOKENS`` at a time."""
    moments = InputMoments()
    for states in hidden.flatten(0, 1).split(NORMED_TOKENS):
        moments.add({"head": stream.norm(states)})
    return moments["head"]


class OutputGradients:
    """Sums of squared gradients at modules' outputs during backward passes."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """``(out,)`` float32: the sum over tokens of ``g^2``."""
        return self._sums[name]

    @contextmanager
    def watch(self, modules: dict[str, torch.nn.Module]):
        """Collects while the block runs; see ``captured_inputs``."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def add(gradient: torch.Tensor) -> None:
            squares = gradient.detach().float().square().sum(dim=tuple(range(gradient.dim() - 1)))
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares

        def watch_output(module, inputs, output) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return watch_output


def accumulate(sums: dict[str, torch.Tensor], name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds ``left^T right`` to a sum by its name, in place.

    Args:
        sums: Name → sum; one that is not there is begun.
        name: Of the sum.
        left: ``(tokens, a)``.
        right: ``(tokens, b)``.
    """
    if name in sums:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] = left.T @ right
