"""How faithful a compressed model is to its 16-bit reference: perplexity, KL divergence, top-1 agreement, repetition.

Derived in: notebooks/09_validated_chat.ipynb
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import resources

import torch
from tqdm.auto import tqdm

from lowvram_lab.engine.kv_cache import MeteredCache
from lowvram_lab.errors import LowvramError
from lowvram_lab.loader import load
from lowvram_lab.memory.device import StandInGpu
from lowvram_lab.plan import Plan

WINDOW = 128
"""Tokens that see each other."""

SLICE = 16
"""Tokens fed at once within a window: their logits (slice x vocab) must find room beside a plan that fills its card."""


@dataclass(frozen=True)
class Fidelity:
    """A model beside its reference on one text.

    Attributes:
        tokens: Positions scored.
        perplexity: exp of the mean negative log-likelihood of the model.
        reference_perplexity: The same of the reference.
        kl_mean: Mean KL(reference || model) over positions, in nats.
        top1_agreement: Share of positions where both find the same token most likely.
        weight_bytes: Exact bytes of all weights of the model.
        reference_weight_bytes: The same of the reference.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    top1_agreement: float
    weight_bytes: int
    reference_weight_bytes: int

    @property
    def perplexity_increase(self) -> float:
        """How much worse the model predicts than its reference, as a fraction."""
        return self.perplexity / self.reference_perplexity - 1

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


def sample_text() -> str:
    """The library's own small English and Chinese text."""
    return (resources.files("lowvram_lab") / "data" / "bilingual.txt").read_text(encoding="utf-8")


def load_reference(plan: Plan, spec, *, checkpoint=None, progress: bool = True):
    """The 16-bit model that a plan is compared with, wholly in RAM and without a cap.

    Args:
        plan: The plan; its dtype is the reference's.
        spec: The model.
        checkpoint: See ``load``.
        progress: Show a progress bar.
    """
    if spec.stored:
        raise LowvramError(
            f"{spec.name} holds quantised weights alone: compare it with the 16-bit model it was made from"
        )
    reference = Plan.uniform(spec, plan.dtype, context=plan.context).with_modules("*", device="cpu")
    return load(reference, StandInGpu(None), checkpoint=checkpoint, spec=spec, progress=progress)


@torch.no_grad()
def fidelity(model, reference, tokenizer, text: str | None = None, *, progress: bool = True) -> Fidelity:
    """Compares a model with its reference, position by position, in windows of 128 tokens.

    Args:
        model: From ``load``.
        reference: From ``load_reference``.
        tokenizer: Of both.
        text: Any text; by default ``sample_text()``.
        progress: Show a progress bar.

    Raises:
        LowvramError: The text is too short to score.
    """
    ids = torch.tensor(tokenizer(sample_text() if text is None else text, add_special_tokens=False)["input_ids"])
    windows = [window for window in ids.split(WINDOW) if len(window) > 1]
    if not windows:
        raise LowvramError(f"expected a text of two tokens or more to evaluate on, found {len(ids)}")
    total = Counter()
    for window in tqdm(windows, desc="evaluate", unit="window", disable=not progress, leave=False):
        ours, theirs = (_log_probabilities(m, window) for m in (model, reference))
        targets = window[1:].unsqueeze(1)
        total["tokens"] += len(targets)
        total["nll"] -= ours.gather(1, targets).sum().item()
        total["reference_nll"] -= theirs.gather(1, targets).sum().item()
        total["kl"] += (theirs.exp() * (theirs - ours)).sum().item()
        total["agree"] += (ours.argmax(1) == theirs.argmax(1)).sum().item()
    tokens = total["tokens"]
    return Fidelity(
        tokens=tokens,
        perplexity=math.exp(total["nll"] / tokens),
        reference_perplexity=math.exp(total["reference_nll"] / tokens),
        kl_mean=total["kl"] / tokens,
        top1_agreement=total["agree"] / tokens,
        weight_bytes=model.plan.weight_bytes(model.spec),
        reference_weight_bytes=reference.plan.weight_bytes(reference.spec),
    )


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that occurred before in it: near 0 in prose, near 1 in a model caught in a loop.

    Words are the units, or characters where the text has no spaces (Chinese).

    Args:
        text: The text.
        n: Length of the n-grams.
    """
    units = text.split() if text.count(" ") * 12 > len(text) else list(text)
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _log_probabilities(model, window: torch.Tensor) -> torch.Tensor:
    """``(tokens - 1, vocab)`` in float32 on the CPU."""
    cache, pieces = MeteredCache(model.gpu, model.plan.kv_format), []
    for ids in window[None, :-1].split(SLICE, dim=1):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0]
        pieces.append(torch.log_softmax(logits.cpu().float(), dim=-1))
    return torch.cat(pieces)
