"""Choose the next token from logits. Knows no model and no cache."""

from dataclasses import dataclass

import numpy as np
import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.model.rules import whole_number


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalty, temperature, top-k, top-p and min-p, in transformers' order.

    Attributes:
        temperature: 0 takes the most likely token (greedy).
        top_p: Smallest set of tokens with at least this probability (Holtzman et al. 2019, arXiv:1904.09751).
        seed: Makes a sampled answer repeatable.
        top_k: Only so many tokens, the most likely ones; 0 for all. Applied before ``top_p``.
        min_p: Only tokens at least this share as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: Divides positive logits of tokens that are there already, and multiplies negative ones
            (Keskar et al. 2019, arXiv:1909.05858); 1 for none. Also where the choice is greedy.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-5 <= self.temperature < float("inf"):
            raise LowvramError(f"expected a temperature of 0 (greedy) or 0.00001 and above, found {self.temperature}")
        whole_number("seed", self.seed, 0, 2**63 - 1, LowvramError)
        if not 0 < self.top_p <= 1:
            raise LowvramError(f"expected top_p above 0 and at most 1, found {self.top_p}")
        whole_number("top_k", self.top_k, 0, error=LowvramError)
        if not 0 <= self.min_p <= 1:
            raise LowvramError(f"expected min_p from 0 to 1, found {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            found = self.repetition_penalty
            raise LowvramError(f"expected a repetition_penalty from 0.01 to 100 (1 for none), found {found}")

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the choice is the largest logit, as it is."""
        return self.temperature <= 0 and self.repetition_penalty == 1


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token, in float32 as transformers' ``generate`` does; see also ``Decoder.choose``.

    Args:
        logits: ``(batch, vocab)``.
        sampling: How.
        generator: Where randomness comes from.
        seen: Ids of prompt and answer so far, ``(batch, tokens)``, for a repetition penalty.

    Returns:
        ``(batch, 1)`` int64.
    """
    if sampling.takes_the_likeliest:
        return likeliest(logits)
    if sampling.temperature <= 0:
        return likeliest(penalised(logits, sampling, seen))
    return torch.multinomial(distribution(logits, sampling, seen), 1, generator=generator)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit, the first of several: ``(rows, vocab)`` → ``(rows, 1)`` int64.

    On the CPU by numpy: torch's own takes 155 us for a row of 49,152 in bfloat16, this 12 (Zen 5, torch 2.13.0).
    """
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1, keepdim=True)
    found = logits.new_empty((*logits.shape[:-1], 1), dtype=torch.long)  # where logits are, as far as bytes are counted
    return found.copy_(torch.from_numpy(_in_float32(logits).argmax(axis=-1, keepdims=True)))


def _in_float32(tensor: torch.Tensor) -> np.ndarray:
    """The values of a CPU tensor; numpy has no bfloat16, which is the upper half of a float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return np.left_shift(tensor.view(torch.uint16).numpy(), 16, dtype=np.uint32).view(np.float32)
    return tensor.numpy().astype(np.float32, copy=False)


def distribution(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    """What the next token is drawn from.

    Args:
        logits: ``(batch, vocab)``; of the first tokens of the vocabulary only, the others have no chance.
        sampling: How; its temperature is not 0.
        seen: See ``choose``.

    Returns:
        Probabilities ``(batch, vocab)`` float32.
    """
    probabilities = torch.softmax(penalised(logits, sampling, seen) / sampling.temperature, dim=-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[..., -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, indices = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered.masked_fill(beyond, 0))
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def penalised(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None) -> torch.Tensor:
    """Logits in float32, lower for tokens that are there already."""
    logits = logits.float()
    if sampling.repetition_penalty == 1 or seen is None:
        return logits
    found = logits.gather(-1, seen)
    penalised = torch.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
    return logits.scatter(-1, seen, penalised)
