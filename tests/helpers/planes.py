"""Tiny models with weights in two planes, one of each kind for all tests, and what decodes them."""

import functools
from dataclasses import replace

import torch

from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.kernels.library import there
from tests.helpers.tiny import load_tiny, tiny_plan


def in_two_planes(kind: str, kv_format: str = "bf16"):
    """A loaded model; who changes it puts it back."""
    return _loaded(kind, kv_format, there())


@functools.cache
def _loaded(kind: str, kv_format: str, for_our_kernels: bool):  # how int4 lies depends on them
    return load_tiny(kind, replace(tiny_plan(kind, "int4+4"), kv_format=kv_format))


def decoded_by(decoder: Decoder, both: bool, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits after each token fed behind a prompt, by both planes or the high ones, ``(tokens, vocab)`` float32."""
    decoder.cache.keep(0)
    decoder.prefill(ids[:, :prompt])
    with loaded(decoder.model).planes.taking(both):
        return torch.cat([decoder.decode(token).float().clone() for token in ids[:, prompt:].split(1, dim=1)])
