"""A decoder for the Llama family that does as little as possible for a token: one function for all layers.

transformers' forward of a small model spends most of its time between its matrix products: masks, caches, a Python
call for every operation. Here a layer is one plain function of tensors (``layer.py``). Compiled, everything between two
matrix products becomes one loop over memory, and one library serves all layers. It works on the very weights of a
loaded model, whatever their formats (those with a common input laid side by side, ``fuse.py``), and on a
``PreallocatedCache``, so a token allocates nothing that stays.

Derived in: notebooks/06_the_engine.ipynb
"""

import functools
import logging
import weakref
from functools import partial

import torch

from lowvram_lab.engine.caches import PreallocatedCache
from lowvram_lab.engine.compiled import compiler, open_libraries, without_compiler
from lowvram_lab.engine.compiling import LEAST_ROOM, Library
from lowvram_lab.engine.decode import ModuleDecoder, prefill
from lowvram_lab.engine.fuse import fuse
from lowvram_lab.engine.graph import GraphedStep
from lowvram_lab.engine.layers import INT8_COLUMNS, Int4Linear, Int8Linear, QuantizedLinear
from lowvram_lab.engine.llama_layer import HeadShape, LayerShape, layer
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.machine import cpu_threads

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of configs whose layers are: norm, attention with rotary positions (q and k perhaps normed), norm,
gated SiLU. Smaller differences (biases, grouped heads, tied head) are read off the modules."""

logger = logging.getLogger(__name__)

_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Of a layer; those in one bracket have a common input."""


def why_not(model, max_tokens: int | None = None) -> str:
    """Why a loaded model cannot be decoded here (up to so many tokens), in words, or nothing if it can."""
    kind, window = model.config.model_type, getattr(model.config, "sliding_window", None)
    if kind not in FAMILIES:
        return f"{kind} is none of {', '.join(FAMILIES)}"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}, not silu"
    if "dynamic" in model.model.rotary_emb.rope_type or model.model.rotary_emb.rope_type == "longrope":
        return f"its rotary positions ({model.model.rotary_emb.rope_type}) depend on the length"
    places = {*model.plan.layer_places(model.spec), model.plan.modules[model.spec.head].device}
    if _on_card(model) and places != {"gpu"}:
        return "its layers are on both sides of a CUDA card"
    slides = kind == "mistral" or "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    if window and slides and (max_tokens or model.plan.context) > window:
        return f"its attention slides over {window} tokens"
    if model.plan.kv_format == "int4":
        return "its KV cache is in int4, which the modules read"
    if model.plan.stream_from is not None:
        return "its plan lets weights travel for long prompts"
    for block in model.model.layers:
        for name in (name for group in _PROJECTIONS for name in group):
            if _kernel(_projection(block, name)) is None:
                return f"{name} is in {_projection(block, name).format.name}, which has no kernel"
    return ""


def _on_card(model) -> bool:
    return model.gpu.kernels == "cuda" and "gpu" in model.plan.layer_places(model.spec)


def decoder_for(model, compiled: bool | None = None, progress: bool = True) -> "LeanDecoder | ModuleDecoder":
    """The fastest decoder there is for a loaded model: lean, or by its modules; ``name`` says which, and why.

    Args:
        model: From ``load``.
        compiled: See ``LeanDecoder``.
        progress: See ``LeanDecoder``.
    """
    reason = why_not(model)
    if not reason:
        try:
            return LeanDecoder(model, compiled=compiled, progress=progress)
        except torch.OutOfMemoryError:  # a cache that grows may do for a short chat
            reason = f"no room for a KV cache of {model.plan.context} tokens at once"
    return ModuleDecoder(model, reason)  # here: what the error held is free by now


class LeanDecoder:
    """Decodes token by token on the weights of a loaded model.

    The stand-in does not meter what it does for a token (a layer's temporaries; uncompiled, its keys and values in
    float32), only what it keeps.

    Args:
        model: From ``load``.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        compiled: Whether to compile the layer's function: 10 to 20 s, once for a machine. By default where there is a
            C++ compiler that can.
        progress: Show that it compiles.

    Attributes:
        cache: The ``PreallocatedCache`` that prompt and answer are in.
        compiled: Whether it is compiled.
        released: Whether the model was planned anew since; then it decodes no more.

    Raises:
        LowvramError: The architecture or a format is none of those it knows (``why_not`` says so beforehand); or it was
            to be compiled and there is no compiler.
        torch.OutOfMemoryError: No room for the cache.
    """

    def __init__(
        self,
        model,
        max_tokens: int | None = None,
        batch_size: int = 1,
        compiled: bool | None = None,
        progress: bool = True,
    ):
        if reason := why_not(model, max_tokens):
            raise LowvramError(f"{model.spec.name} cannot be decoded by LeanDecoder: {reason}; use the model itself")
        if compiled and not compiler():
            missing = without_compiler() or "LOWVRAM_COMPILE=0 says not to compile; unset it"
            raise LowvramError(f"{missing}, or leave compiled=True out")
        self.model, self.gpu, self.released = model, model.gpu, False
        model.decoders = getattr(model, "decoders", None) or weakref.WeakSet()
        model.decoders.add(self)
        self.cache = PreallocatedCache(model, max_tokens, batch_size)
        room = self.cache.layers[0].max_tokens
        self._positions = torch.arange(room)
        self._cos, self._sin = self._rotary()
        bound = [self._bind(*both) for both in zip(model.model.layers, self.cache.layers, strict=True)]
        self._graphed, self.compiled = None, False
        if _on_card(model):
            tables = self._cos, self._sin
            by_modules = partial(_modules_head, model)
            self._graphed = GraphedStep(bound, by_modules, *tables, batch_size, model.config.hidden_size)
            return
        if compiled is None and (missing := without_compiler()):
            _warn_once(f"decoding without compiled layers, which is slower: {missing}")
        if compiled or (compiled is None and compiler() and room >= LEAST_ROOM):
            self.compiled = self._compile(bound, batch_size, progress, must=bool(compiled))
        if not self.compiled:
            self._layers = [(partial(_run_layer, shape), tensors) for shape, tensors in bound]
            self._head = partial(_modules_head, model)

    def release(self) -> None:
        """Lets go of the weights, which are about to be others; ``replan`` calls this."""
        self._layers, self._head, self._graphed, self.released = [], None, None, True

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of every position, ``(room, head_dim)`` float32, where the layers compute."""
        rotary = self.model.model.rotary_emb
        device = rotary.inv_freq.device
        cos, sin = rotary(torch.zeros(1, device=device), self._positions[None].to(device))
        half = sin.shape[-1] // 2
        # a half turn swaps the halves of a head; the sign of the first goes into the table
        tables = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        return tuple(table.to(self.cache.layers[0].keys.device) for table in tables)

    def _compile(self, bound: list, batch_size: int, progress: bool, must: bool) -> bool:
        """Opens the libraries of all layers and of the head; whether that could be done."""
        hidden = torch.zeros(batch_size, self.model.config.hidden_size)
        first = [hidden, self._cos[0], self._sin[0], self._positions[:2]]
        wanted = [Library.called_with(shape, first + tensors) for shape, tensors in bound]
        head = self._bind_head()
        if head:
            wanted.append(Library.called_with(head[0], [hidden, *head[1]]))
        try:
            with self.gpu.unmetered():
                runs = open_libraries(wanted, progress)
        except Exception as error:  # the compiler's, a folder that cannot be written, a library that cannot be opened
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if must:
                raise LowvramError(f"the layer could not be compiled: {reason}; leave compiled=True out") from error
            logger.warning("decoding without compiled layers, which is slower: %s", reason)
            return False
        self._layers = [(run, tensors) for run, (_, tensors) in zip(runs, bound, strict=False)]
        self._head = partial(_run_head, runs[-1], head[1]) if head else partial(_modules_head, self.model)
        return True

    def _bind_head(self) -> tuple[HeadShape, list[torch.Tensor]] | None:
        """The head's shape, and its tensors as ``head`` wants them; nothing where it is left to its module."""
        last, norm = self.model.lm_head, self.model.model.norm
        kernel = _kernel(last)
        if kernel is None or kernel[0] == "module":
            return None
        tensors = [norm.weight.detach(), *_tensors(last, self.model.dtype)]
        if any(tensor.device.type != "cpu" for tensor in tensors):  # the layers are in RAM, the head is on a card
            return None
        return HeadShape(kernel, norm.variance_epsilon), tensors

    def _bind(self, block, held) -> tuple[LayerShape, list[torch.Tensor]]:
        """A layer's shape, and its tensors as ``layer`` wants them."""
        attention, config, kernels, weights = block.self_attn, self.model.config, [], []
        for group in _PROJECTIONS:
            projections = [_projection(block, name) for name in group]
            common = self._fused(projections, f"model.layers.{attention.layer_idx}.self_attn.q_proj")
            of_each = projections[:1] if common else projections
            kernels.append(tuple(map(_kernel, of_each)))
            weights += [tensor for p in of_each for tensor in _tensors(p, self.model.dtype, common)]
        normed = hasattr(attention, "q_norm")
        shape = LayerShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=self.model.spec.head_dim,
            scaling=attention.scaling,
            eps=config.rms_norm_eps,
            products=tuple(kernels),
            normed_heads=normed,
            int8_cache=held.key_scale is not None,
            dtype=self.model.dtype,
        )
        norms = [block.input_layernorm.weight, block.post_attention_layernorm.weight]
        norms += [attention.q_norm.weight, attention.k_norm.weight] if normed else []
        cached = [held.keys, held.values] + ([held.key_scale, held.value_scale] if shape.int8_cache else [])
        return shape, [*(norm.detach() for norm in norms), *weights, *cached]

    def _fused(self, projections: list, name: str) -> dict | None:
        """Lays weights side by side where they are in RAM.

        Within a card's budget they stay as they were loaded: moving them would leave holes that no forecast has seen.
        So do those mapped from disk.
        """
        device = self.model.plan.modules[name].device
        in_ram = device == "cpu" or (device == "gpu" and self.gpu.simulated and self.gpu.budget is None)
        if not in_ram:
            return None
        with self.gpu.active(), self.gpu.meter.scope(owner="fused weights", category="weights"):
            return fuse(projections)

    @property
    def name(self) -> str:
        """In words."""
        how = ", compiled" if self.compiled else ", as CUDA graphs" if self._graphed and self._graphed.capture else ""
        return f"the lean decoder{how}"

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self.cache.get_seq_length()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads a prompt by the model's own forward.

        Args:
            ids: ``(batch, tokens)`` int64, those the cache has not seen.

        Returns:
            Logits of the last token, ``(batch, vocab)``.

        Raises:
            BudgetError: The cache has no room for them.
        """
        return prefill(self.model, ids, self.cache)

    @torch.inference_mode()
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Feeds one token of each sequence.

        Args:
            token: ``(batch, 1)`` int64.

        Returns:
            Logits, ``(batch, vocab)`` in the plan's dtype. On CUDA the next call writes over them.

        Raises:
            LowvramError: There is no prompt yet, the token is of another shape, or the model was planned anew.
            BudgetError: The cache is full.
        """
        position, sequences = self.tokens, self.cache.layers[0].keys.shape[0]
        if self.released:
            raise LowvramError("the model was planned anew meanwhile; make a new decoder")
        if tuple(token.shape) != (sequences, 1):
            raise LowvramError(f"expected one token of each sequence, ({sequences}, 1), found {tuple(token.shape)}")
        if position == 0:
            raise LowvramError("expected a prompt in the cache, found none: call prefill first")
        if position >= self.cache.layers[0].max_tokens:
            raise BudgetError(f"the KV cache of {position} tokens is full; plan a longer context")
        with self.gpu.lock, cpu_threads(self.model.plan.threads), self.gpu.unmetered():
            hidden = self.model.model.embed_tokens(token)[:, 0].float()
            if self._graphed:
                return self._counted(self._graphed(hidden, position), position)
            here = [self._cos[position], self._sin[position], self._positions[: position + 1]]
            for run, tensors in self._layers:
                hidden = run([hidden, *here, *tensors])[0]
            return self._counted(self._head(hidden), position)

    def _counted(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        for held in self.cache.layers:
            held.tokens = position + 1
        return logits.to(self.model.dtype)


def _modules_head(model, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden).to(model.dtype))


def _run_head(run, tensors: list, hidden: torch.Tensor) -> torch.Tensor:
    """The head, by its compiled library."""
    return run([hidden, *tensors])[0]


@functools.cache
def _warn_once(message: str) -> None:
    """A missing compiler is the machine's state, not one decoder's."""
    logger.warning(message)


def _run_layer(shape: LayerShape, arguments: list) -> list:
    """``layer`` as a compiled library is called."""
    hidden, cos, sin, positions, *tensors = arguments
    return [layer(shape, hidden, cos, sin, tensors, positions.shape[0])]


def _projection(block, name: str):
    return getattr(block.self_attn if hasattr(block.self_attn, name) else block.mlp, name)


def _kernel(projection) -> tuple[str, int, bool] | None:
    """How a linear layer is multiplied in ``layer``, or ``None`` where that is not known."""
    with_bias = projection.bias is not None
    if not isinstance(projection, QuantizedLinear):
        return "float", 0, with_bias
    if isinstance(projection, Int4Linear) and projection.layout == projection.kernels:
        return "int4" if projection.layout == "cpu" else "int4 on CUDA", projection.format.group_size, with_bias
    if projection.kernels == "cuda":
        return "module", 0, with_bias
    whole = isinstance(projection, Int8Linear) and projection.in_features % INT8_COLUMNS == 0
    return ("int8", 0, with_bias) if whole else None


def _tensors(projection, dtype: torch.dtype, common: dict | None = None) -> list:
    """The weight as ``layer`` wants it: its own, or the common one it is part of."""
    if _kernel(projection)[0] == "module":
        return [
            partial(_multiplied, projection, dtype),
            *([] if projection.bias is None else [projection.bias.detach()]),
        ]
    names = {Int4Linear: ("packed", "scale_and_zero", "bias"), Int8Linear: ("weight", "scale", "bias")}
    found = [
        common[name] if common else getattr(projection, name)
        for name in names.get(type(projection), ("weight", "bias"))
    ]
    return [tensor.detach() for tensor in found if tensor is not None]


def _multiplied(projection: QuantizedLinear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return projection.multiply(x.to(dtype))
