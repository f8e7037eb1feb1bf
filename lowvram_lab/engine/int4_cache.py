"""Keys and values of one layer in 4 bits: keys per channel, values per token, the newest keys exact.

Keys have channels that are large at every token: a scale for each channel, over 32 tokens, costs a fifth of the error
of a scale for each token (KL 0.010 against 0.045 nats, SmolLM2-135M; values have no such channels). A group is
quantised when it is full; until then its keys stay as they are. Source: Liu et al. 2024 (KIVI), arXiv:2402.02750.
"""

import torch

from lowvram_lab.engine.cache_layers import FixedLayer
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.formats import SCALE_DTYPE
from lowvram_lab.model.geometry import KVShape

GROUP = 32
"""Tokens of a channel, or channels of a token, that share a scale and a zero."""


class Int4Layer(FixedLayer):
    """Keys and values of one decoder layer, all of it allocated now.

    Shapes, for a ``KVShape`` and ``blocks = ceil(tokens / 32)``: ``keys`` uint8 ``(batch, heads, blocks, 16,
    key_dim)``, two tokens a byte, the even one low; ``key_scale`` bf16 ``(batch, heads, blocks, 2, key_dim)``, scale
    and zero; ``recent`` ``(batch, heads, 32, key_dim)`` in the model's dtype; ``values`` uint8 ``(batch, heads,
    tokens, value_dim / 2)``; ``value_scale`` bf16 ``(batch, heads, tokens, 2, value_dim / 32)``.

    Its arguments are those of ``PreallocatedLayer``; value_dim is a multiple of 32.
    """

    def __init__(self, gpu: Gpu, place: str, shape: KVShape, dtype: torch.dtype):
        super().__init__(shape, dtype)
        batch, heads, _, width, value_dim = shape
        blocks = -(-self.max_tokens // GROUP)
        self.keys = gpu.zeros((batch, heads, blocks, GROUP // 2, width), torch.uint8, place)
        self.key_scale = gpu.zeros((batch, heads, blocks, 2, width), SCALE_DTYPE, place)
        self.recent = gpu.zeros((batch, heads, GROUP, width), dtype, place)
        self.values = gpu.zeros((batch, heads, self.max_tokens, value_dim // 2), torch.uint8, place)
        self.value_scale = gpu.zeros((batch, heads, self.max_tokens, 2, value_dim // GROUP), SCALE_DTYPE, place)
        self.device, self.is_initialized = self.keys.device, True

    def span(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """See ``FixedLayer``: keys in groups of 32 tokens, which are full."""
        groups, tokens = slice(start // GROUP, end // GROUP), slice(start, end)
        places = {"keys": groups, "key_scale": groups, "values": tokens, "value_scale": tokens}
        return {name: getattr(self, name)[:, :, place] for name, place in places.items()}

    def beginning(self, tokens: int) -> dict[str, torch.Tensor]:
        """See ``FixedLayer``: the newest keys, whose group is not full, lie by themselves."""
        return {**self.span(0, tokens), "recent": self.recent}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes new keys and values behind those there are; returns all of them, dequantised."""
        start, end = self.tokens, self.end_of(key_states, value_states)
        codes, self.value_scale[:, :, start:end] = _quantize(value_states.unflatten(-1, (-1, GROUP)), -1)
        codes = codes.flatten(-2)
        self.values[:, :, start:end] = codes[..., ::2] | codes[..., 1::2] << 4
        self._append_keys(key_states, start, end)
        self.tokens = end
        return self._keys(), self._values()

    def _append_keys(self, states: torch.Tensor, start: int, end: int) -> None:
        whole = end // GROUP * GROUP
        if whole > start:  # groups that are full now, the first of them begun before
            first = start // GROUP
            begun = self.recent[:, :, : start - first * GROUP]
            blocks = torch.cat((begun, states[:, :, : whole - start]), dim=2).unflatten(2, (-1, GROUP))
            codes, self.key_scale[:, :, first : whole // GROUP] = _quantize(blocks, 3)
            self.keys[:, :, first : whole // GROUP] = codes[:, :, :, ::2] | codes[:, :, :, 1::2] << 4
            start, states = whole, states[:, :, whole - start :]
        if end > start:
            self.recent[:, :, start % GROUP : start % GROUP + end - start] = states

    def _keys(self) -> torch.Tensor:
        blocks = self.tokens // GROUP
        codes = torch.stack((self.keys[:, :, :blocks] & 15, self.keys[:, :, :blocks] >> 4), dim=4)
        grid = self.key_scale[:, :, :blocks].to(self.dtype)
        whole = codes.flatten(3, 4).to(self.dtype).mul_(grid[:, :, :, :1]).add_(grid[:, :, :, 1:]).flatten(2, 3)
        return torch.cat((whole, self.recent[:, :, : self.tokens - blocks * GROUP]), dim=2)

    def _values(self) -> torch.Tensor:
        held = self.values[:, :, : self.tokens]
        codes = torch.stack((held & 15, held >> 4), dim=-1).flatten(-2).unflatten(-1, (-1, GROUP))
        grid = self.value_scale[:, :, : self.tokens].to(self.dtype)
        return codes.to(self.dtype).mul_(grid[:, :, :, 0, :, None]).add_(grid[:, :, :, 1, :, None]).flatten(-2)

    @property
    def forgettable(self) -> int:
        """See ``PreallocatedCache``: a group that is full is quantised, and its exact keys are written over."""
        return min(super().forgettable, GROUP - 1 - self.tokens % GROUP)

    def keep(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens; a group that is no longer full is read back."""
        if tokens >= self.tokens:
            return
        begun = tokens % GROUP
        if tokens // GROUP < self.tokens // GROUP and begun:
            first = tokens - begun
            self.recent[:, :, :begun] = self._keys()[:, :, first : first + begun]
        self.tokens = tokens


def _quantize(states: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 0 to 15, and scale and zero, side by side in the place of ``dim`` (values: before it)."""
    low, high = states.amin(dim, keepdim=True), states.amax(dim, keepdim=True)
    scale = ((high.float() - low.float()) / 15).clamp_(min=torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE)
    zero = low.to(SCALE_DTYPE)
    codes = ((states.float() - zero.float()) / scale.float()).round_().clamp_(0, 15).to(torch.uint8)
    grid = torch.cat((scale, zero), dim=dim)
    return codes, grid if dim != -1 else grid.transpose(-1, -2)
