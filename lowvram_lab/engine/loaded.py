"""What ``load`` made of a model: one attribute, ``model.lowvram``, holds all that this library adds to it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lowvram_lab.engine.nested import Planes
from lowvram_lab.engine.placement import Placement
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.disk import WeightsOnDisk
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.memory.recording import Recording
from lowvram_lab.model.plan import Plan


class Weights(Protocol):
    """Where weights come from: a checkpoint, or what stands for one in a dry run or a test."""

    def read(self, name: str) -> torch.Tensor:
        """A parameter by its full name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""

    def __contains__(self, name: str) -> bool: ...


@dataclass(eq=False)
class Loaded:
    """The state of a loaded model. ``replan`` changes ``plan``, ``placement``, ``mapped`` and ``planes``.

    Attributes:
        plan: What it realises.
        gpu: What it lives on.
        weights: Where its weights came from, and come from again when it is planned anew.
        recording: What was measured on the GPU from its load on, until another model's.
        placement: What makes each block compute at its place; ``remove()`` undoes it.
        mapped: Files of the weights that lie on disk.
        decoders: Every ``Decoder`` on its weights.
        chats: Every chat's ``LiveDecoder`` on it: where there is no room for all, those that answer nothing let go.
        planes: Of weights in two, which are multiplied by.
    """

    plan: Plan
    gpu: Gpu
    weights: Weights
    recording: Recording
    placement: Placement | None = None
    mapped: list[WeightsOnDisk] = field(default_factory=list)
    decoders: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    chats: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    planes: Planes = field(default_factory=Planes)


def loaded(model: torch.nn.Module) -> Loaded:
    """The state of a model that ``load`` made.

    Raises:
        LowvramError: It was not loaded here.
    """
    state = getattr(model, "lowvram", None)
    if not isinstance(state, Loaded):
        raise LowvramError(f"expected a model from lowvram_lab's load, found a {type(model).__name__} made elsewhere")
    return state
