"""A smaller vocabulary, measured: bytes, how much of a text stays as it was, and what the model makes of the rest.

    python benchmarks/slim_vocab.py --model smollm2-135m --vocab 16384 --text wikitext=test.txt

On the library's own bilingual text (held out: tokens are chosen on another) and on files that are named: the share of
the text's tokens that stay, tokens a byte before and after, the probability that the original gives to what was removed
(as nats that the rest gains by it), and nats a byte of both models in float32, over sentences all of whose tokens
stay, over the others, and over lines whole. Each text begins anew behind ``--begin``. Beside them tokens a second of
both, decoded in turns. Kept by model and number of tokens in results/slim_vocab_cpu.json.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pandas
import torch
from kept import keep
from texts import add_text_option, named_texts

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.profile import Workload
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids
from lowvram_lab.slimming.slim import slim_vocabulary

RESULTS = Path(__file__).parent / "results"
WINDOW = 512
SENTENCE = re.compile(r"[^.!?。！？\n]*[.!?。！？\n]+\s*")


class Reader:
    """A stock model in float32 and its tokenizer."""

    def __init__(self, directory: Path, begin: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.begin = self.tokenizer.convert_tokens_to_ids(begin)

    def ids(self, text: str) -> list[int]:
        """Of a text alone."""
        return plain_ids(self.tokenizer, text).tolist()

    @torch.no_grad()
    def nats(self, text: str) -> float:
        """Of a whole text, its first token among them."""
        ids = torch.tensor([[self.begin, *self.ids(text)]])
        logits = self.model(ids).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


@torch.no_grad()
def removed_nats(before: Reader, kept: torch.Tensor, text: str, tokens: int) -> float:
    """Mean of -log of the probability that the original gives to the tokens that stay, over a text's next tokens."""
    ids = plain_ids(before.tokenizer, text)[:tokens]
    lost = []
    for window in equal_windows(ids, first_ids(before.tokenizer) or [before.begin], WINDOW):
        logits = before.model(window[None]).logits[0, :-1]
        lost.append(torch.logsumexp(logits, -1) - torch.logsumexp(logits[:, kept], -1))
    return torch.cat(lost).mean().item()


def some(parts: Iterator[str], before: Reader, tokens: int) -> list[str]:
    """As many parts as fill so many tokens, none of them longer than a window."""
    found = []
    for part in parts:
        length = len(before.ids(part))
        if tokens <= 0:
            break
        if 0 < length <= WINDOW:
            found.append(part)
            tokens -= length
    return found


def nats_per_byte(before: Reader, after: Reader, parts: list[str]) -> dict:
    """Of both models over the same parts."""
    size = sum(len(part.encode()) for part in parts)
    return {
        "parts": len(parts),
        "bytes": size,
        "tokens_before": sum(len(before.ids(part)) for part in parts),
        "tokens_after": sum(len(after.ids(part)) for part in parts),
        "nats_per_byte_before": sum(map(before.nats, parts)) / size if parts else None,
        "nats_per_byte_after": sum(map(after.nats, parts)) / size if parts else None,
    }


def measured(before: Reader, after: Reader, kept: list[int], text: str, tokens: int) -> dict:
    """Everything about one text."""
    stays, old, new = set(kept), before.ids(text), after.ids(text)
    size = len(text.encode())
    sentences = [part for part in SENTENCE.findall(text) if part.strip()]
    covered = (part for part in sentences if stays.issuperset(before.ids(part)))
    others = (part for part in sentences if not stays.issuperset(before.ids(part)))
    lines = (line for line in text.splitlines(keepends=True) if line.strip())
    return {
        "bytes": size,
        "tokens": len(old),
        "share_of_tokens_that_stay": sum(index in stays for index in old) / len(old),
        "tokens_per_byte_before": len(old) / size,
        "tokens_per_byte_after": len(new) / size,
        "removed_nats": removed_nats(before, torch.tensor(kept), text, tokens),
        "covered sentences": nats_per_byte(before, after, some(covered, before, tokens)),
        "other sentences": nats_per_byte(before, after, some(others, before, tokens)),
        "whole lines": nats_per_byte(before, after, some(lines, before, tokens)),
    }


def speeds(model: str, directory: str, recipe: str, rounds: int) -> dict:
    """Tokens a second of both, decoded in turns by this library's decoder: medians, and the median of the ratios."""
    decoders, found = {}, {"before": [], "after": []}
    workload = Workload(prompt_tokens=64, new_tokens=64)
    for name, source in (("before", find_source(model)), ("after", find_source(directory))):
        plan = Plan.uniform(source.spec(), recipe, context=256).with_modules("*", device="cpu")
        loaded = load(plan, StandInGpu(None), progress=False)
        decoders[name] = loaded, decoder_for(loaded, workload.tokens, progress=False)
    for _ in range(rounds + 1):  # the first one warms up
        for name, (loaded, decoder) in decoders.items():
            found[name].append(run_speed(loaded, workload, decoder).decode_tokens_per_s)
    before, after = found["before"][1:], found["after"][1:]
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return {"before": median(before), "after": median(after), "ratio": median(ratios)}


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--vocab", default="16384", help="tokens that stay, or text")
    add_text_option(parser)
    parser.add_argument("--begin", default="<|endoftext|>", help="a token that comes before each text")
    parser.add_argument("--tokens", type=int, default=4096, help="read at most so many of each text, each way")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "int8", "int4"], help="that speeds are measured in")
    parser.add_argument("--rounds", type=int, default=7, help="of each speed")
    parser.add_argument("--output", type=Path, default=RESULTS / "slim_vocab_cpu.json")
    args = parser.parse_args()
    texts = named_texts(args)
    vocab = args.vocab if args.vocab == "text" else int(args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "slim"
        made = slim_vocabulary(args.model, output, vocab=vocab)
        kept = json.loads((output / "slim.json").read_text("utf-8"))["kept_ids"]
        before, after = Reader(find_source(args.model).fetch(), args.begin), Reader(output, args.begin)
        found = {"sizes": {key: value for key, value in made.to_dict().items() if key != "output"}}
        print(made.summary(), flush=True)
        found["threads"] = torch.get_num_threads()
        for recipe in args.recipes:
            found[f"tokens/s, {recipe}"] = speeds(args.model, str(output), recipe, args.rounds)
            print(recipe, found[f"tokens/s, {recipe}"], flush=True)
        for name, text in texts.items():
            found[name] = measured(before, after, kept, text, args.tokens)
            print(name, pandas.json_normalize(found[name]).T.to_string(header=False), sep="\n", flush=True)
    keep(args.output, f"{args.model}, {args.vocab} tokens", found)


if __name__ == "__main__":
    main()
