"""Weights made up as they are read: for what needs a model's shape, and no model."""

import torch

from lowvram_lab.model.checkpoint import ShapesOnly
from lowvram_lab.model.spec import ModelSpec


class RandomWeights(ShapesOnly):
    """A checkpoint of small random weights."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self._generator = torch.Generator().manual_seed(0)

    def read(self, name: str) -> torch.Tensor:
        """Normal values of standard deviation 0.02, in bf16."""
        return (torch.randn(self.shape(name), generator=self._generator) * 0.02).bfloat16()
