"""How faithful a compressed model is to its 16-bit reference: perplexity, KL divergence, top-1 agreement, repetition.

Derived in: notebooks/09_validated_chat.ipynb
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass

import psutil
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.live import let_idle_chats_go
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import Loaded
from lowvram_lab.errors import BudgetError, CheckpointError, LowvramError, first_line
from lowvram_lab.evaluation.chance import wilson_interval
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import DTYPES
from lowvram_lab.model.host_bytes import in_flight_bytes, weights_in_ram
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import sample_text
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.repository.gguf import dequantised
from lowvram_lab.repository.gguf_weights import GgufWeights
from lowvram_lab.repository.text import begins_with, first_ids, plain_ids, windows_in_words
from lowvram_lab.units import format_bytes

WINDOW = 128
"""Tokens that see each other, by default; what begins a window is one of them."""

SLICE = 16
"""Tokens fed at once to a model under a budget: their logits (slice x vocab) must find room beside a full card."""


@dataclass(frozen=True)
class Fidelity:
    """A model beside its reference on one text.

    Attributes:
        tokens: Tokens of the text that were predicted.
        perplexity: Exponential of the mean negative log-likelihood of the model.
        reference_perplexity: The same of the reference.
        kl_mean: Mean KL(reference || model) over positions, in nats.
        kl_median: Median of the same.
        kl_p99: What 99 % of positions stay below: a mean can hide rare disasters.
        top1_agreement: Share of positions where both find the same token most likely.
        weight_bytes: Exact bytes of all weights of the model.
        reference_weight_bytes: The same of the reference.
        window: Tokens that saw each other, at most; what began a window was among them.
        begins_with: What the checkpoint puts before a text, such as ``"<s>"``, and what therefore began each window;
            ``None`` where it puts nothing.
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
    window: int
    begins_with: str | None

    @property
    def perplexity_increase(self) -> float:
        """How much worse the model predicts than its reference, as a fraction."""
        return self.perplexity / self.reference_perplexity - 1

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of ``top1_agreement``, positions taken as independent: ``wilson_interval``."""
        return wilson_interval(self.top1_agreement, self.tokens)

    def summary(self) -> str:
        """Three lines."""
        low, high = self.top1_interval
        return (
            f"perplexity {self.perplexity:.3f}, the reference's {self.reference_perplexity:.3f} "
            f"({self.perplexity_increase:+.2%}), {self.tokens} tokens "
            f"{windows_in_words(self.window, self.begins_with)}\n"
            f"KL to the reference: mean {self.kl_mean:.4f}, median {self.kl_median:.4f}, 99 % below {self.kl_p99:.3f}\n"
            f"same most likely token: {self.top1_agreement:.1%} ({low:.1%} to {high:.1%})"
        )

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), "top1_interval": list(self.top1_interval)}

    def _repr_html_(self) -> str:
        return "<b>Fidelity</b><br>" + self.summary().replace("\n", "<br>")


def reference_plan(plan: Plan, spec: ModelSpec | None = None) -> Plan:
    """A plan's reference as a plan: all of the 16-bit model in RAM, in the plan's dtype.

    Args:
        plan: The plan that is to be compared.
        spec: The 16-bit model; by default the plan's own.

    Raises:
        LowvramError: The model holds quantised weights alone.
    """
    spec = spec or plan.spec
    if spec.stored:
        raise LowvramError(
            f"{spec.name} holds quantised weights alone: compare it with the 16-bit model it was made from"
        )
    return Plan.uniform(spec, plan.dtype, context=plan.context).with_modules("*", device="cpu")


def check_room(*plans: Plan) -> None:
    """Refuses, before the first of them is loaded, models that RAM cannot hold side by side.

    Counted are all weights and, twice, the largest tensor on its way.

    Raises:
        BudgetError: Says what they take and what is free.
    """
    needed = sum(weights_in_ram(plan, gpu_in_ram=True) for plan in plans)
    needed += max(in_flight_bytes(plan.spec.modules) for plan in plans)
    if needed > (free := psutil.virtual_memory().available):
        what = "a model and its 16-bit reference take" if len(plans) > 1 else "the 16-bit reference takes"
        raise BudgetError(
            f"{what} {format_bytes(needed)} of RAM, found {format_bytes(free)} free; compare where there is more"
        )


def load_reference(
    plan: Plan, spec: ModelSpec | None = None, *, checkpoint: Checkpoint | None = None, progress: bool = True
) -> PreTrainedModel:
    """The 16-bit model that a plan is compared with, wholly in RAM and without a cap, as stock transformers opens it.

    Nothing of this library's own loading, layers and caches is in it, so that a fault of ours shows in the figures
    instead of cancelling out. It takes RAM for its weights in the plan's dtype; pages of its files that it has read lie
    in RAM as well (all that do where the file's dtype is the plan's), and the system may take those back.

    Args:
        plan: The plan; its dtype is the reference's.
        spec: The 16-bit model; by default the plan's own.
        checkpoint: Of that model; by default the source that the spec names is fetched.
        progress: Show a progress bar.

    Raises:
        LowvramError: The model holds quantised weights alone.
        BudgetError: RAM is too small for it.
        CheckpointError: Stock transformers cannot open it, or would make up some of its weights.
    """
    whole = reference_plan(plan, spec)
    check_room(whole)
    checkpoint = checkpoint or find_source(whole.model).checkpoint()
    directory = checkpoint.directory
    if isinstance(checkpoint, GgufWeights):
        return dequantised(checkpoint.files[0]).to(DTYPES[plan.dtype]).eval().requires_grad_(False)
    with tqdm(total=1, desc="reference", unit="model", disable=not progress, leave=False), quiet_transformers():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=DTYPES[plan.dtype],
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # a class may refuse a checkpoint in any way
            raise CheckpointError(f"{directory}: stock transformers cannot open it: {first_line(error)}") from error
    if made_up := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{directory}: expected every weight of {type(model).__name__}, found none for {', '.join(made_up[:3])}: "
            "stock transformers would draw them at random"
        )
    return model.eval().requires_grad_(False)


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
        reference: From ``load_reference``, or any other transformers model with the same vocabulary.
        tokenizer: Of both. What its checkpoint puts before a text (BOS, mostly) begins every window, not the first one
            alone, and is never scored: a window's own first token is predicted from it. Where there is no such thing,
            a window's first token has nothing before it, and is not scored.
        text: Any text; by default ``sample_text()``.
        window: Tokens that see each other, what begins the window included.
        stride: Tokens of the text that a window is ahead of the one before. If they are fewer than a window holds,
            windows overlap and only the tokens that no earlier window scored count, each with ``window - stride``
            tokens or more before it; by default windows follow one another.
        tokens: Score so many tokens of the text at most.
        progress: Show a progress bar.

    Raises:
        LowvramError: The text is too short to score, or window and stride do not fit together.
    """
    first = first_ids(tokenizer)
    _check_windows(window, stride, first)
    ids = plain_ids(tokenizer, sample_text() if text is None else text)
    unscored = 0 if first else 1  # nothing comes before the first token
    windows = list(_windows(ids[: tokens + unscored] if tokens else ids, first, window, stride))
    if not windows:
        least = "two tokens" if unscored else "a token"
        raise LowvramError(f"expected a text of {least} or more to evaluate on, found {len(ids)}")
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
        weight_bytes=_weight_bytes(model),
        reference_weight_bytes=_weight_bytes(reference),
        window=window,
        begins_with=begins_with(tokenizer),
    )


def _check_windows(window: int, stride: int | None, first: list[int]) -> None:
    body = window - len(first)
    if window < 2 or body < 1 or not 1 <= (body if stride is None else stride) <= body:
        least = max(2, 1 + len(first))
        most = f"the {body} tokens of text that it holds" if first else "it"
        raise LowvramError(
            f"expected a window of {least} or more and a stride up to {most}, found {window} and {stride}"
        )


def _windows(ids: torch.Tensor, first: list[int], window: int, stride: int | None):
    """Pieces of a text, each behind ``first``, and how many of each one's last tokens to score, each of them once."""
    beginning = torch.tensor(first, dtype=ids.dtype)
    body = window - len(first)
    scored_until = 0 if first else 1
    for start in range(0, len(ids), stride or body):
        part = torch.cat((beginning, ids[start : start + body]))
        end = min(start + body, len(ids))
        # a window's own first token may have nothing before it
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


def _weight_bytes(model: PreTrainedModel) -> int:
    """Of all weights: by the plan where they are ours, a shared one counted once."""
    state = getattr(model, "lowvram", None)
    if isinstance(state, Loaded):
        return state.plan.weight_bytes()
    return sum(parameter.nbytes for parameter in model.parameters())


def _log_probabilities(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """``(tokens - 1, vocab)`` in float32 on the CPU."""
    state = getattr(model, "lowvram", None)
    if not isinstance(state, Loaded):
        logits = model(window[None, :-1], use_cache=False).logits[0]
        return torch.log_softmax(logits.cpu().float(), dim=-1)
    while True:
        try:
            return _by_slices(model, window, SLICE if state.gpu.budget else len(window))
        except torch.OutOfMemoryError:  # what is measured beside a chat was not planned for
            if not let_idle_chats_go(model):
                raise


def _by_slices(model: PreTrainedModel, window: torch.Tensor, slice_tokens: int) -> torch.Tensor:
    cache, pieces = PreallocatedCache(model, len(window)), []
    for ids in window[None, :-1].split(slice_tokens, dim=1):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0]
        pieces.append(torch.log_softmax(logits.cpu().float(), dim=-1))
    return torch.cat(pieces)
