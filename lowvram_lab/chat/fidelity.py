"""How faithful a compressed model is to its 16-bit reference: perplexity, KL divergence, top-1 agreement, repetition.

Derived in: notebooks/09_validated_chat.ipynb
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load
from lowvram_lab.engine.loaded import Weights
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import sample_text

WINDOW = 128
"""Tokens that see each other, by default."""

SLICE = 16
"""Tokens fed at once to a model under a budget: their logits (slice x vocab) must find room beside a full card."""

Z_95 = 1.959964
"""Standard deviations of a normal distribution's middle 95 %."""


@dataclass(frozen=True)
class Fidelity:
    """A model beside its reference on one text.

    Attributes:
        tokens: Positions scored.
        perplexity: Exponential of the mean negative log-likelihood of the model.
        reference_perplexity: The same of the reference.
        kl_mean: Mean KL(reference || model) over positions, in nats.
        kl_median: Median of the same.
        kl_p99: What 99 % of positions stay below: a mean can hide rare disasters.
        top1_agreement: Share of positions where both find the same token most likely.
        weight_bytes: Exact bytes of all weights of the model.
        reference_weight_bytes: The same of the reference.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    weight_bytes: int
    reference_weight_bytes: int

    @property
    def perplexity_increase(self) -> float:
        """How much worse the model predicts than its reference, as a fraction."""
        return self.perplexity / self.reference_perplexity - 1

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of ``top1_agreement``, positions taken as independent.

        Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
        """
        n, share = self.tokens, self.top1_agreement
        middle, margin = share + Z_95**2 / (2 * n), Z_95 * math.sqrt(share * (1 - share) / n + (Z_95 / (2 * n)) ** 2)
        return (middle - margin) / (1 + Z_95**2 / n), (middle + margin) / (1 + Z_95**2 / n)

    def summary(self) -> str:
        """Three lines."""
        low, high = self.top1_interval
        return (
            f"perplexity {self.perplexity:.3f}, the reference's {self.reference_perplexity:.3f} "
            f"({self.perplexity_increase:+.2%}), {self.tokens} tokens\n"
            f"KL to the reference: mean {self.kl_mean:.4f}, median {self.kl_median:.4f}, 99 % below {self.kl_p99:.3f}\n"
            f"same most likely token: {self.top1_agreement:.1%} ({low:.1%} to {high:.1%})"
        )

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), "top1_interval": list(self.top1_interval)}

    def _repr_html_(self) -> str:
        return "<b>Fidelity</b><br>" + self.summary().replace("\n", "<br>")


def load_reference(
    plan: Plan, spec: ModelSpec | None = None, *, checkpoint: Weights | None = None, progress: bool = True
) -> PreTrainedModel:
    """The 16-bit model that a plan is compared with, wholly in RAM and without a cap.

    Args:
        plan: The plan; its dtype is the reference's.
        spec: The 16-bit model; by default the plan's own.
        checkpoint: See ``load``.
        progress: Show a progress bar.
    """
    spec = spec or plan.spec
    if spec.stored:
        raise LowvramError(
            f"{spec.name} holds quantised weights alone: compare it with the 16-bit model it was made from"
        )
    reference = Plan.uniform(spec, plan.dtype, context=plan.context).with_modules("*", device="cpu")
    return load(reference, StandInGpu(None), checkpoint=checkpoint, progress=progress)


@torch.no_grad()
def fidelity(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    tokens: int | None = None,
    progress: bool = True,
) -> Fidelity:
    """Compares a model with its reference, position by position.

    Args:
        model: From ``load``.
        reference: From ``load_reference``, or another model from ``load`` with the same vocabulary.
        tokenizer: Of both.
        text: Any text; by default ``sample_text()``.
        window: Tokens that see each other.
        stride: Tokens a window is ahead of the one before. Below ``window``, windows overlap and only the tokens that
            no earlier window scored count, each with ``window - stride`` tokens or more before it; by default windows
            follow one another.
        tokens: Score so many tokens of the text at most.
        progress: Show a progress bar.

    Raises:
        LowvramError: The text is too short to score, or window and stride do not fit together.
    """
    stride = stride or window
    if not 2 <= window or not 1 <= stride <= window:
        raise LowvramError(f"expected a window of 2 or more and a stride up to it, found {window} and {stride}")
    ids = torch.tensor(tokenizer(sample_text() if text is None else text, add_special_tokens=False)["input_ids"])
    windows = list(_windows(ids[: tokens + 1] if tokens else ids, window, stride))
    if not windows:
        raise LowvramError(f"expected a text of two tokens or more to evaluate on, found {len(ids)}")
    total, divergences = Counter(), []
    for part, scored in tqdm(windows, desc="evaluate", unit="window", disable=not progress, leave=False):
        ours, theirs = (_log_probabilities(m, part)[-scored:] for m in (model, reference))
        targets = part[-scored:].unsqueeze(1)
        total["tokens"] += scored
        total["nll"] -= ours.gather(1, targets).sum().item()
        total["reference_nll"] -= theirs.gather(1, targets).sum().item()
        divergences.append((theirs.exp() * (theirs - ours)).sum(dim=1))
        total["agree"] += (ours.argmax(1) == theirs.argmax(1)).sum().item()
    count, divergence = total["tokens"], torch.cat(divergences)
    return Fidelity(
        tokens=count,
        perplexity=math.exp(total["nll"] / count),
        reference_perplexity=math.exp(total["reference_nll"] / count),
        kl_mean=divergence.mean().item(),
        kl_median=divergence.median().item(),
        kl_p99=divergence.kthvalue(math.ceil(0.99 * count)).values.item(),
        top1_agreement=total["agree"] / count,
        weight_bytes=model.lowvram.plan.weight_bytes(),
        reference_weight_bytes=reference.lowvram.plan.weight_bytes(),
    )


def _windows(ids: torch.Tensor, window: int, stride: int):
    """Pieces of a text, and how many of each one's last tokens to score: every token but the first, once."""
    scored_until = 1
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        end = start + len(part)
        # without overlap a window's own first token has nothing before it
        scored = min(end - scored_until, len(part) - 1)
        if scored > 0:
            yield part, scored
            scored_until = end
        if end == len(ids):
            return


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


def _log_probabilities(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """``(tokens - 1, vocab)`` in float32 on the CPU."""
    slice_tokens = SLICE if model.lowvram.gpu.budget else len(window)
    cache, pieces = PreallocatedCache(model, len(window)), []
    for ids in window[None, :-1].split(slice_tokens, dim=1):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0]
        pieces.append(torch.log_softmax(logits.cpu().float(), dim=-1))
    return torch.cat(pieces)
