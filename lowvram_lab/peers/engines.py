"""What ``bench`` gives every engine, what it asks of one, and our own two ways of running a model.

Every engine answers greedily, ignores the end of a text, and notes when it knew each token; it keeps its KV cache from
one question to the next. Whatever reads a clock here reads it after a token has become a Python number, for which any
device is waited for.
"""

import importlib.util
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from lowvram_lab.decoding.decode import Decoder, ModuleDecoder
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.sampling import Sampling, choose


@dataclass(frozen=True)
class Question:
    """One length of prompt at one batch size: what a row of ``bench`` measures.

    Attributes:
        prompts: Token ids of each sequence, all of one length.
        follow_ups: Token ids of each sequence's second message.
        new_tokens: Decoded after the first token of the answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    follow_ups: tuple[tuple[int, ...], ...]
    new_tokens: int

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Length of each prompt."""
        return len(self.prompts[0])

    @property
    def tokens(self) -> int:
        """Most tokens of one sequence: prompt, answer, second message and the token that answers it."""
        return self.prompt_tokens + self.new_tokens + 1 + len(self.follow_ups[0]) + 1

    @property
    def mean_length(self) -> int:
        """Tokens of a sequence in the cache halfway through the answer."""
        return self.prompt_tokens + self.new_tokens // 2


@dataclass(frozen=True)
class Task:
    """What every engine is given; plain data, for it goes to other processes.

    Attributes:
        model: Name, path or hub id.
        directory: Its fetched directory, where one of the engines opens such; else empty.
        plan: For our engines, as JSON.
        budget: Total and context bytes of the card to be, or ``None`` for all of it.
        questions: What is asked of it, one after the other.
        threads: CPU threads.
        gguf: File for llama.cpp, or ``None``.
        gguf_origin: Where that comes from, in words.
    """

    model: str
    directory: str
    plan: str
    budget: tuple[int, int] | None
    questions: tuple[Question, ...]
    threads: int
    gguf: str | None = None
    gguf_origin: str = ""

    @property
    def tokens(self) -> int:
        """Most tokens of one sequence of any question."""
        return max(question.tokens for question in self.questions)

    def gpu(self):
        """This process's GPU; on CUDA its cap holds for every engine that allocates through torch."""
        return open_gpu(GpuBudget(*self.budget) if self.budget else None)

    def spec(self) -> ModelSpec:
        """The model's spec."""
        return find_source(self.model).spec()


class Engine:
    """One way of running a model.

    Args:
        task: What it is to run.

    Attributes:
        name: As in the table.
        package: What must be installed, ``(import name, distribution)``, or ``None``.
        note: What a reader has to know about the row.
        weight_bytes: Of all weights in memory.
        read_bytes: Of the weights that one token needs.
        one_memory: Whether all of it is read from one memory, so that its bandwidth bounds the speed.

    Raises:
        Exception: Whatever a peer raises where it cannot open the model.
    """

    name = ""
    package = None
    note = ""
    weight_bytes = read_bytes = 0
    one_memory = True

    def __init__(self, task: Task):
        raise NotImplementedError

    @classmethod
    def installed(cls) -> bool:
        """Whether its package is there."""
        return cls.package is None or importlib.util.find_spec(cls.package[0]) is not None

    @classmethod
    def absent(cls, cuda: bool) -> str:
        """Why it cannot run on this machine, whatever the model, or nothing."""
        return "" if cls.installed() else f"{cls.package[1]} is not installed"

    def kv_bytes(self, question: Question) -> int:
        """Keys and values of all sequences halfway through the answer."""
        return self.task.spec().kv_bytes(question.mean_length, question.batch_size)

    def forget(self, batch_size: int) -> None:
        """Empties the KV cache, which is then for so many sequences."""
        raise NotImplementedError

    def answer(self, ids: list[list[int]], count: int) -> tuple[list[list[int]], list[float]]:
        """Continues conversations greedily, all of one length, side by side.

        Args:
            ids: Of each, all of it so far; the part that the KV cache holds is not read again.
            count: Tokens wanted of each.

        Returns:
            The tokens of each, and when they were known, a time for all sequences' next ones, by
            ``time.perf_counter``.
        """
        raise NotImplementedError

    def likeliest(self, question: Question, answers: list[list[int]]) -> list[list[int]]:
        """The most likely token at every position of answers that it is made to give, one to each prompt."""
        self.forget(question.batch_size)
        found = [self.likeliest_after([list(prompt) for prompt in question.prompts])]
        for tokens in list(zip(*answers, strict=True))[:-1]:
            found.append(self.likeliest_after([[token] for token in tokens]))
        return [list(each) for each in zip(*found, strict=True)]

    def likeliest_after(self, ids: list[list[int]]) -> list[int]:
        """The most likely token of each sequence after ids that follow those in the KV cache."""
        raise NotImplementedError

    def metered(self):
        """A context in which GPU memory is counted, where that takes doing."""
        return nullcontext()

    def peak_bytes(self) -> int | None:
        """Most GPU memory since ``reset_peak``, without the CUDA context; ``None`` where there is no GPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def reset_peak(self) -> None:
        """Lets ``peak_bytes`` start again from what is held now."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def turn(self, question: Question) -> dict:
        """One round: prompts and their answers, then a second message.

        Returns:
            ``ttft_s``, ``decode_s`` (of ``new_tokens`` tokens of each sequence), ``follow_up_s`` (to its first token),
            ``tokens`` of each sequence.
        """
        prompts, count = [list(prompt) for prompt in question.prompts], question.new_tokens + 1
        self.forget(question.batch_size)
        began = time.perf_counter()
        tokens, times = self.answer(prompts, count)
        if {len(times), *map(len, tokens)} != {count}:
            raise LowvramError(f"expected {count} tokens from it, found {len(tokens[0])}")
        asked = time.perf_counter()
        parts = zip(prompts, tokens, question.follow_ups, strict=True)
        _, (replied,) = self.answer([prompt + answer + list(message) for prompt, answer, message in parts], 1)
        return {
            "ttft_s": times[0] - began,
            "decode_s": times[-1] - times[0],
            "follow_up_s": replied - asked,
            "tokens": tokens,
        }


class Ours(Engine):
    """A model from ``load`` and its ``Decoder``, as a chat runs it."""

    name = "lowvram"

    def __init__(self, task: Task):
        self.task = task
        spec = task.spec()
        plan = Plan.from_json(task.plan, spec)
        self._counting = False
        self.model = load(plan, task.gpu(), progress=False)
        self.weight_bytes = self.read_bytes = plan.weight_bytes()
        if not spec.tied:
            self.read_bytes -= plan.module_bytes(spec.module(spec.embedding))
        devices = {assignment.device for assignment in plan.modules.values()}
        places = {compute_place(device) for device in devices} if torch.cuda.is_available() else {"cpu"}
        self.one_memory = len(places) == 1 and "disk" not in devices
        self.decoder = None
        self.forget(task.questions[0].batch_size)
        self.note = self.decoder.name

    def kv_bytes(self, question: Question):
        """See ``Engine``."""
        return self.model.lowvram.plan.kv_bytes(question.mean_length) * question.batch_size

    def _decoder(self, batch_size: int) -> Decoder:
        return decoder_for(self.model, self.task.tokens, batch_size, progress=False)

    def forget(self, batch_size: int):
        """See ``Engine``; a decoder is for one batch size, and one at a time has its cache."""
        if self.decoder is None or self.decoder.batch_size != batch_size:
            if self.decoder is not None:
                self.decoder.release()
            self.decoder = None
            self.decoder = self._decoder(batch_size)
        self.decoder.cache.keep(0)

    def answer(self, ids: list[list[int]], count: int):
        """See ``Engine``."""
        found, times = [], []
        held = self.decoder.cache.get_seq_length()
        with self._timed():
            token = choose(self.decoder.prefill(torch.tensor([each[held:] for each in ids])), Sampling())
            while True:
                found.append(token.flatten().tolist())
                times.append(time.perf_counter())
                if len(found) == count:
                    return [list(tokens) for tokens in zip(*found, strict=True)], times
                token = self.decoder.choose(self.decoder.decode(token), Sampling())

    def likeliest_after(self, ids: list[list[int]]):
        """See ``Engine``; a prompt is read, single tokens are decoded."""
        given = torch.tensor(ids)
        with self._timed():
            decoded = given.shape[1] == 1 and self.decoder.tokens
            logits = self.decoder.decode(given) if decoded else self.decoder.prefill(given)
            return choose(logits, Sampling()).flatten().tolist()

    @contextmanager
    def metered(self):
        """Runs with the meter, which the timings are without."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def _timed(self):
        return nullcontext() if self._counting else self.model.lowvram.gpu.unmetered()

    def peak_bytes(self):
        """See ``Engine``; on the stand-in, the meter's figure."""
        return self.model.lowvram.gpu.peak_allocated_bytes

    def reset_peak(self):
        """See ``Engine``."""
        self.model.lowvram.gpu.reset_peak()


class Modules(Ours):
    """The same model by its own modules: what a chat runs that cannot be lean."""

    name = "lowvram (modules)"

    def _decoder(self, batch_size: int) -> Decoder:
        return ModuleDecoder(self.model, self.task.tokens, batch_size)
