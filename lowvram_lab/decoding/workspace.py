"""How many bytes one decoded token needs beside weights and cache: the lean decoder's functions, replayed on meta.

The lean decoder keeps so many bytes for itself from the start, as a CUDA graph keeps its pool, so that decoding can
run out of memory nowhere else than where it begins.
"""

from __future__ import annotations

import torch
from torch.func import functional_call

from lowvram_lab.decoding.llama_layer import HeadShape, LayerShape, head, llama_layer
from lowvram_lab.memory.temporaries import temporaries_bytes


def layer_bytes(shape: LayerShape, hidden: torch.Tensor, tensors: list, tokens: int, compiled: bool) -> int:
    """Most bytes of temporaries at once in a layer that looks at so many tokens; for the arguments see ``llama_layer``.

    ``compiled``: it will be a library.
    """
    row = torch.empty(shape.head_dim, device="meta")

    def run(hidden: torch.Tensor, arguments: list, loops: list | None) -> torch.Tensor:
        cos, sin, *tensors = arguments
        return llama_layer(shape, hidden, cos, sin, tensors, tokens, None, loops)

    return temporaries_bytes(run, hidden, [row, row, *tensors], compiled=compiled)


def head_bytes(model: torch.nn.Module, hidden: torch.Tensor, bound: tuple[HeadShape, list] | None) -> int:
    """Most bytes of temporaries at once in the last norm and the product with the head, logits included.

    ``bound`` is from ``bind_head`` where the head is a compiled library; else it is the model's module.
    """
    if bound is not None:

        def run(hidden: torch.Tensor, tensors: list, loops: list | None) -> torch.Tensor:
            return head(bound[0], hidden, tensors, loops)

        return temporaries_bytes(run, hidden, bound[1], compiled=True)
    norm, last = model.model.norm, model.lm_head
    names = dict([*last.named_parameters(recurse=False), *last.named_buffers(recurse=False)])

    def by_module(hidden: torch.Tensor, tensors: list, loops: list | None) -> torch.Tensor:
        normed = functional_call(norm, {"weight": tensors[0]}, hidden).to(model.dtype)
        return functional_call(last, dict(zip(names, tensors[1:], strict=True)), normed)

    return temporaries_bytes(by_module, hidden, [norm.weight, *names.values()], compiled=False)
