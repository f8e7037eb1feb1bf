"""What ``fidelity.py`` measures on: a model in float32, its evaluation tokens, its calibration text; and the measure.

Knows nothing about candidates: a candidate is a dictionary of float32 weights.
"""

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowvram_lab.conversion.convert import CALIBRATION_TOKENS
from lowvram_lab.evaluation.fidelity import Fidelity
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text
from lowvram_lab.repository.text import begins_with, equal_windows, first_ids, plain_ids
from lowvram_lab.weights.calibration import calibration_windows, evenly

STORIES, SMOLLM = "stories15M", "smollm2-135m"
WINDOW = {STORIES: 256, SMOLLM: 512}
SEEDS = {"validation": 1, "test": 2, "calibration": 3}
BOS = 1
CHUNK = 128
"""Tokens whose logits are held at once: two times 128 x 49152 x 4 bytes are 48 MiB."""


@dataclass
class Subject:
    """A model and what it is measured with.

    Attributes:
        name: Of ``WINDOW``.
        source: What ``convert`` is given.
        spec: The model.
        model: transformers' own, float32; its weights change from candidate to candidate.
        weights: Module name → the original weight, float32; a tied head is left out.
        windows: Evaluation tokens, ``(windows, tokens)``.
        calibration: Text file, or ``None`` for the library's own text.
        tokenizer: The model's.
        reference: The original's final normed states, ``(windows, tokens, hidden)``.
    """

    name: str
    source: str
    spec: ModelSpec
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]
    windows: torch.Tensor
    calibration: Path | None
    tokenizer: object
    reference: torch.Tensor | None = None

    @property
    def fp16_bytes(self) -> int:
        """The whole model in 16 bits: 100 %."""
        return 2 * self.spec.num_parameters

    def calibration_windows(self, text: Path | None, tokens: int = CALIBRATION_TOKENS) -> torch.Tensor:
        """The windows ``convert`` will calibrate on, of a text file or the library's own."""
        return calibration_windows(self.tokenizer, calibration_text(text), tokens, self.spec.max_position_embeddings)

    @property
    def begins_with(self) -> str | None:
        """What every window begins with: of stories, the BOS that each was sampled behind."""
        if self.name == STORIES:
            return self.tokenizer.convert_ids_to_tokens(BOS)
        return begins_with(self.tokenizer)

    @property
    def evaluation(self) -> str:
        """Eight hex digits of the evaluation tokens and what they are compared with."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()[:8]


def open_subject(name: str, options, work: Path) -> Subject:
    """Opens a model, makes or reads its texts, and notes the original's predictions."""
    source = find_source(str(options.stories) if name == STORIES else name)
    spec, checkpoint, tokenizer = (
        source.spec(),
        source.checkpoint(),
        source.tokenizer(),
    )
    names = [m.name for m in spec.modules if not m.tied_to]
    weights = {name: checkpoint.read(f"{name}.weight").float().clone() for name in names}
    model = AutoModelForCausalLM.from_config(spec.pretrained_config(), dtype=torch.float32).eval()
    model.generation_config = None
    fill(model, weights)
    if name == STORIES:
        windows, text = _stories(model, tokenizer, options, work)
    else:
        windows = _wikitext(tokenizer, options)
        text = options.wikitext / "validation.txt" if options.split == "test" else None
    subject = Subject(name, source.name, spec, model, weights, windows, text, tokenizer)
    subject.reference = torch.stack([_final_states(subject, window) for window in windows])
    return subject


def fill(model, weights: dict[str, torch.Tensor]) -> None:
    """Puts weights into the model; a tied head follows its embedding."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)


@torch.inference_mode()
def score(subject: Subject, weights: dict[str, torch.Tensor], weight_bytes: int) -> tuple[Fidelity, list[float]]:
    """Compares a candidate with the original: every window's tokens but the first, BOS or the text's, are predicted.

    Returns:
        The figures, and the mean KL of every window (windows are nearly independent; tokens are not).
    """
    fill(subject.model, weights)
    heads = [_head(subject, which).T for which in (subject.weights, weights)]
    buffers = [torch.empty(CHUNK, heads[0].shape[1]) for _ in range(3)]  # anew for each chunk they would cost more
    parts = []
    for window, reference in zip(subject.windows, subject.reference, strict=True):
        states = _final_states(subject, window)
        for theirs, ours, targets in zip(*(x.split(CHUNK) for x in (reference, states, window[1:])), strict=True):
            parts.append(_compare(theirs, ours, targets, heads, [buffer[: len(targets)] for buffer in buffers]))
    kl, nll, reference_nll, agree = (torch.cat(column) for column in zip(*parts, strict=True))
    found = Fidelity(
        tokens=len(kl),
        perplexity=nll.double().mean().exp().item(),
        reference_perplexity=reference_nll.double().mean().exp().item(),
        kl_mean=kl.double().mean().item(),
        kl_median=kl.median().item(),
        kl_p99=kl.quantile(0.99).item(),
        top1_agreement=agree.double().mean().item(),
        weight_bytes=weight_bytes,
        reference_weight_bytes=subject.fp16_bytes,
        window=subject.windows.shape[1],
        begins_with=subject.begins_with,
    )
    return found, kl.view(len(subject.windows), -1).mean(dim=1).tolist()


def _compare(theirs, ours, targets, heads, buffers) -> tuple[torch.Tensor, ...]:
    """KL, both negative log-likelihoods and agreement of some positions, from ``(tokens, hidden)`` of either model."""
    reference, changed, difference = buffers
    best, likelihood, total = [], [], []
    for states, head, logits in ((theirs, heads[0], reference), (ours, heads[1], changed)):
        torch.mm(states, head, out=logits)
        top, index = logits.max(dim=1, keepdim=True)
        logits -= top
        torch.exp(logits, out=difference)
        total.append(difference.sum(dim=1, keepdim=True).log())
        best.append(index)
        likelihood.append((total[-1] - logits.gather(1, targets.unsqueeze(1))).squeeze(1))
    torch.sub(reference, changed, out=difference)
    probabilities = reference.sub_(total[0]).exp_()
    kl = torch.linalg.vecdot(probabilities, difference) - (total[0] - total[1]).squeeze(1)
    return kl, likelihood[1], likelihood[0], (best[0] == best[1]).squeeze(1)


@torch.inference_mode()
def channel_power(subject: Subject) -> dict[str, torch.Tensor]:
    """Mean squared input of every linear module, by channel, over the text that ``convert`` calibrates on."""
    fill(subject.model, subject.weights)
    sums: dict[str, torch.Tensor] = {}
    named = {m.name: subject.model.get_submodule(m.name) for m in subject.spec.modules if m.kind == "linear"}
    ids = subject.calibration_windows(subject.calibration)
    with _inputs_added_to(sums, named):
        for window in ids:
            subject.model(window.unsqueeze(0))
    owners = {m.name: m.tied_to or m.name for m in subject.spec.modules}
    return {owners[name]: total / ids.numel() for name, total in sums.items()}


@contextmanager
def _inputs_added_to(sums: dict, modules: dict):
    def hook(name):
        def add(_, inputs):
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).square().sum(dim=0)

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _final_states(subject: Subject, window: torch.Tensor) -> torch.Tensor:
    """``(tokens - 1, hidden)`` behind the final norm: all that predict a token of the window."""
    return subject.model.model(window[None, :-1], use_cache=False).last_hidden_state[0]


def _head(subject: Subject, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return weights[subject.spec.embedding if subject.spec.tied else subject.spec.head]


def _wikitext(tokenizer, options) -> torch.Tensor:
    """Windows of the raw text, evenly spread: a prefix of 16 k tokens would be four articles."""
    text = (options.wikitext / f"{options.split}.txt").read_text(encoding="utf-8")
    length = WINDOW[SMOLLM]
    windows = equal_windows(plain_ids(tokenizer, text), first_ids(tokenizer), length)
    return windows[evenly(len(windows), max(1, options.tokens // length))].clone()


def _stories(model, tokenizer, options, work: Path) -> tuple[torch.Tensor, Path]:
    """The model's own stories to evaluate on, and a text of others to calibrate on."""
    length = WINDOW[STORIES]
    count = max(1, options.tokens // length)
    windows = _sampled(model, count, length, SEEDS[options.split], work)
    path = work / "stories-calibration.txt"
    if not path.exists():
        wanted = CALIBRATION_TOKENS // length
        sampled = _sampled(model, wanted * 5 // 4, length, SEEDS["calibration"], work)
        text = "".join(text for text in _faithful_texts(tokenizer, sampled)[:wanted])
        path.write_text(text, encoding="utf-8")
    return windows, path


def _faithful_texts(tokenizer, sequences: torch.Tensor) -> list[str]:
    """Sampled sequences as text, those that the tokenizer reads back as the same tokens.

    ``<s>`` stays in the text, so that a joined file falls into windows that begin with a story, as in the evaluation.
    """
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in sequences.tolist()]
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [text for text, again, ids in zip(texts, read, sequences.tolist(), strict=True) if again == ids]


@torch.inference_mode()
def _sampled(model, count: int, length: int, seed: int, work: Path) -> torch.Tensor:
    """Token sequences ``(count, length)`` at temperature 1, each begun with BOS; kept, as sampling is not portable."""
    path = work / f"stories-{seed}-{count}x{length}.safetensors"
    if not path.exists():
        generator, cache = torch.Generator().manual_seed(seed), None
        ids = torch.full((count, 1), BOS)
        while ids.shape[1] < length:
            result = model(ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            drawn = torch.multinomial(torch.softmax(result.logits[:, -1], dim=-1), 1, generator=generator)
            ids = torch.cat((ids, drawn), dim=1)
        save_file({"ids": ids}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    return load_file(path)["ids"]
