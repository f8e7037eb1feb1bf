"""Run a model one decoder layer at a time: a 4 B model's calibration needs the RAM of one layer, not of the model.

Hidden states of all calibration windows go through layer 0, then through layer 1, and so on; a layer's weights are read
from the checkpoint when its turn comes and given back after it. Knows nothing about formats or plans.

Derived in: notebooks/04_compress.ipynb
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.memory.host import give_back_heap, give_back_large_blocks
from lowvram_lab.model.checkpoint import Checkpoint, check_tensor
from lowvram_lab.model.spec import ModelSpec, build_on_meta
from lowvram_lab.model.tensor_names import refuse_differing_ties
from lowvram_lab.units import MiB
from lowvram_lab.weights.head import head_logits
from lowvram_lab.weights.solvers import is_finite

TOKENS_AT_ONCE = 1024
"""Tokens of a forward pass: activations of the widest layer stay near 30 MiB for a 4 B model in float32."""


TRIMMED_BYTES = 64 * MiB
"""A layer larger than this leaves gaps in the heap that the next one does not fit into: it goes back to the system."""


def windows_at_once(tokens: int) -> int:
    """Windows of so many tokens that go through a layer in one forward pass."""
    return max(1, TOKENS_AT_ONCE // tokens)


class LayerByLayer:
    """A 16-bit checkpoint, run layer by layer.

    Where a layer takes more than ``TRIMMED_BYTES``, this process returns large blocks of memory as soon as they are
    freed, from then on (``give_back_large_blocks``).

    Args:
        spec: The model; one whose checkpoint is not quantised.
        checkpoint: Its tensors.
        dtype: Of the arithmetic; float32 keeps a small difference between two models visible.

    Raises:
        CheckpointError: An architecture whose layers cannot be run by themselves; it says what was looked for.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        if spec.stored:
            raise LowvramError(f"{spec.name} holds quantised weights alone; expected the 16-bit original")
        refuse_differing_ties(spec, checkpoint)
        self.spec = spec
        self.checkpoint = checkpoint
        self.dtype = dtype
        config = spec.pretrained_config()
        outside = {m.name: len(m.weight_shape) for m in spec.modules if m.layer is None and m.kind == "other"}
        norms = [name for name, dimensions in outside.items() if dimensions == 1]
        if odd := _oddity(spec, config, norms):
            raise CheckpointError(
                f"{config.model_type}: expected an embedding, decoder layers alike, one final norm and a plain head, "
                f"found {odd}; such a model cannot be calibrated layer by layer"
            )
        self.model = build_on_meta(config)
        self._shapes = {f"{m.name}.{key}": tuple(shape) for m in spec.modules for key, shape in m.parameters.items()}
        self.norm = self._fill(norms[0])
        self._arguments: tuple[tuple, dict] = (), {}
        if self._layer_bytes(0) > TRIMMED_BYTES:
            give_back_large_blocks()
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return self.spec.num_hidden_layers

    def weight(self, name: str) -> torch.Tensor:
        """A module's weight in the stream's dtype, read anew.

        Raises:
            CheckpointError: Not finite, or not a float tensor.
        """
        return self.read(f"{self.owner(name)}.weight")

    def bias(self, name: str) -> torch.Tensor | None:
        """A module's bias, if it has one."""
        return self.read(f"{name}.bias") if "bias" in self.spec.module(name).parameters else None

    def owner(self, name: str) -> str:
        """The module that owns a weight: a tied head's is the embedding."""
        return self.spec.module(name).tied_to or name

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, look_up: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """What the first layer is given for ``ids`` ``(windows, tokens)``: ``(windows, tokens, hidden)``.

        Also notes what the model hands its layers beside hidden states (positions, mask); it depends on the length of
        a window alone.

        Args:
            ids: Tokens.
            look_up: ``(tokens,)`` ids → their rows; by default of the checkpoint's embedding table.
        """
        if look_up is None:
            look_up = self.rows(f"{self.spec.embedding}.weight")
        if self.spec.sliding_window and ids.shape[1] > self.spec.sliding_window:
            raise LowvramError(
                f"{self.spec.name} sees {self.spec.sliding_window} tokens at a time, found windows of {ids.shape[1]}"
            )
        layers = self.model.get_submodule(self.spec.layers_path)
        catcher, first = _Catcher(), layers[0]
        layers[0] = catcher
        hidden = torch.empty(*ids.shape, self.spec.hidden_size, dtype=self.dtype)
        scale = self.spec.module(self.spec.embedding).scale
        try:
            for window, into in zip(ids, hidden, strict=True):
                try:
                    self.model.base_model(inputs_embeds=look_up(window).to(self.dtype)[None] * scale, use_cache=False)
                except _CaughtError:
                    into.copy_(catcher.hidden[0])
        finally:
            layers[0] = first
        self._arguments = catcher.arguments
        return hidden

    @contextmanager
    def layer(self, index: int):
        """A decoder layer with its weights, which go when the block ends. They may be changed meanwhile."""
        path = f"{self.spec.layers_path}.{index}"
        layer = self.model.get_submodule(path)
        try:
            for module in self.spec.modules:
                if module.layer == index:
                    self._fill(module.name)
            yield layer
        finally:
            for module in layer.modules():  # not layer.to("meta"): buffers the constructor made are not in the file
                for key, parameter in module.named_parameters(recurse=False):
                    setattr(module, key, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), False))
            if self._layer_bytes(index) > TRIMMED_BYTES:
                give_back_heap()

    def _layer_bytes(self, index: int) -> int:
        layer = self.model.get_submodule(f"{self.spec.layers_path}.{index}")
        return self.dtype.itemsize * sum(parameter.numel() for parameter in layer.parameters())

    def names(self, index: int) -> list[str]:
        """The linear modules of a layer, in forward order."""
        return [m.name for m in self.spec.modules if m.layer == index and m.kind == "linear"]

    def run(self, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """``(windows, tokens, hidden)`` through one layer, with whatever autograd mode is on."""
        positional, by_name = self._arguments
        pieces = []
        for piece in hidden.split(windows_at_once(hidden.shape[1])):
            beside = [_for_all(value, len(piece)) for value in positional]
            named = {name: _for_all(value, len(piece)) for name, value in by_name.items()}
            pieces.append(layer(piece, *beside, **named))
        pieces = [piece[0] if isinstance(piece, tuple) else piece for piece in pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @torch.no_grad()
    def run_in_place(self, layer: torch.nn.Module, hidden: torch.Tensor) -> None:
        """Like ``run``, writing over ``hidden``: calibration states are never held twice."""
        for window in hidden.split(windows_at_once(hidden.shape[1])):
            window.copy_(self.run(layer, window))

    def predictor(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes log-probabilities ``(tokens, vocab)`` of final states ``(tokens, hidden)``, before the norm.

        Give it ``HEAD_TOKENS`` of them at a time.
        """
        rows, count, bias = self.head()
        return lambda states: torch.log_softmax(head_logits(self.norm(states), rows, count, bias), dim=-1)

    def head(self) -> tuple[Callable[[slice], torch.Tensor], int, torch.Tensor | None]:
        """The head as ``head_logits`` takes it: some rows of its weight, how many there are, and its bias if any."""
        name = f"{self.owner(self.spec.head)}.weight"
        look_up = self.rows(name)

        def rows(select: slice) -> torch.Tensor:
            return look_up(select).to(self.dtype)

        return rows, self._shapes[name][0], self.bias(self.spec.head)

    @torch.no_grad()
    def final_states(
        self, ids: torch.Tensor, layers: Iterable[int] | None = None, *, progress: bool = False
    ) -> torch.Tensor:
        """Behind the last layer, before the norm: ``(windows, tokens, hidden)``.

        Args:
            ids: Tokens ``(windows, tokens)``.
            layers: Run these only, in this order; by default all.
            progress: Show a progress bar.
        """
        states, run = self.embed(ids), range(len(self)) if layers is None else list(layers)
        for index in tqdm(run, desc="measuring", unit="layer", disable=not progress, leave=False):
            with self.layer(index) as layer:
                self.run_in_place(layer, states)
        return states

    def _fill(self, name: str):
        module = self.model.get_submodule(name)
        for key in self.spec.module(name).parameters:
            setattr(module, key, torch.nn.Parameter(self.read(f"{name}.{key}"), requires_grad=False))
        return module

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """What gives some rows of a checked weight, by slice or index: of a large table only these take RAM."""
        if name not in self._checked:  # once: it reads the table whole
            self.stored(name)
            self._checked.add(name)
        return self.checkpoint.rows(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A checked tensor of the checkpoint, in ``dtype`` or else the stream's."""
        return self.stored(name).to(dtype or self.dtype)

    def stored(self, name: str) -> torch.Tensor:
        """A checked tensor of the checkpoint, as it is."""
        check_tensor(name, self._shapes[name], self.checkpoint)
        tensor = self.checkpoint.read(name)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{name}: expected a 16- or 32-bit float weight, found {tensor.dtype}")
        if not is_finite(tensor):
            raise CheckpointError(f"{name}: expected finite weights, found NaN or infinite values; fetch it anew")
        return tensor


def _oddity(spec: ModelSpec, config: PretrainedConfig, norms: list[str]) -> str | None:
    """What about a model would make a run layer by layer another than its own, or ``None``."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{name} {getattr(config, name)}"
    if len(set(getattr(config, "layer_types", None) or ["one"])) > 1:
        return "layers of several kinds of attention"
    known = (spec.embedding, spec.head, *norms)
    if more := [m.name for m in spec.modules if m.layer is None and m.name not in known]:
        return f"{more[0]} beside them"
    if not any(m.kind == "linear" and m.layer is not None for m in spec.modules):
        return "layers without plain linear modules"
    if transposed := [m.name for m in spec.modules if m.transposed]:
        return f"a weight that is stored transposed, {transposed[0]}"
    return None if len(norms) == 1 else f"{len(norms)} norms outside the layers"


def _for_all(value: object, windows: int) -> object:
    """What a layer is given beside the hidden states of one window (a mask), for so many windows of its length."""
    one = isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[0] == 1
    return value.expand(windows, *value.shape[1:]) if one else value


class _CaughtError(Exception):
    """Ends a forward pass where the first layer would begin."""


class _Catcher(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, *positional, **by_name):
        self.hidden, self.arguments = hidden, (positional, by_name)
        raise _CaughtError

    def __getattr__(self, name: str):
        if name.startswith("attention_type"):  # Qwen and others ask a layer which mask it wants
            return "full_attention"
        return super().__getattr__(name)
