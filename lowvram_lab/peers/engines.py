"""What ``bench`` gives every engine, what it asks of one, and our own two ways of running a model.

Every engine answers greedily, ignores the end of a text, and notes when it knew each token; it keeps its KV cache from
one question to the next. Whatever reads a clock here reads it after a token has become a Python number, for which any
device is waited for.
"""

import importlib.util
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

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
class Task:
    """What every engine is given; plain data, for it goes to other processes.

    Attributes:
        model: Name, path or hub id.
        directory: Its fetched directory.
        plan: For our engines, as JSON.
        budget: Total and context bytes of the card to be, or ``None`` for all of it.
        prompt: Token ids.
        follow_up: Token ids of a second message.
        new_tokens: Decoded after the first token of the answer.
        threads: CPU threads.
        gguf: File for llama.cpp, or ``None``.
    """

    model: str
    directory: str
    plan: str
    budget: tuple[int, int] | None
    prompt: tuple[int, ...]
    follow_up: tuple[int, ...]
    new_tokens: int
    threads: int
    gguf: str | None = None

    @property
    def tokens(self) -> int:
        """Most tokens of one sequence: prompt, answer, second message and the token that answers it."""
        return len(self.prompt) + self.new_tokens + 1 + len(self.follow_up) + 1

    @property
    def mean_length(self) -> int:
        """Tokens in the cache halfway through the answer."""
        return len(self.prompt) + self.new_tokens // 2

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
        kv_bytes: Of keys and values read halfway through the answer.
        one_memory: Whether all of it is read from one memory, so that its bandwidth bounds the speed.

    Raises:
        Exception: Whatever a peer raises where it cannot open the model.
    """

    name = ""
    package = None
    note = ""
    weight_bytes = read_bytes = kv_bytes = 0
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

    def forget(self) -> None:
        """Empties the KV cache."""
        raise NotImplementedError

    def answer(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """Continues a conversation greedily.

        Args:
            ids: All of it so far; the part that the KV cache holds is not read again.
            count: Tokens wanted.

        Returns:
            The tokens, and when each was known, by ``time.perf_counter``.
        """
        raise NotImplementedError

    def likeliest(self, ids: list[int], answer: list[int]) -> list[int]:
        """The most likely token at every position of an answer that it is made to give."""
        self.forget()
        return [self.likeliest_after(fed) for fed in (ids, *([token] for token in answer[:-1]))]

    def likeliest_after(self, ids: list[int]) -> int:
        """The most likely token after ids that follow those in the KV cache."""
        raise NotImplementedError

    def metered(self):
        """A context in which GPU memory is counted, where that takes doing."""
        return nullcontext()

    def peak_bytes(self) -> int | None:
        """Most GPU memory so far, loading included, without the CUDA context; ``None`` where there is no GPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def turn(self, task: Task) -> dict:
        """One round: a prompt and its answer, then a second message.

        Returns:
            ``ttft_s``, ``decode_s`` (of ``new_tokens`` tokens), ``follow_up_s`` (to its first token), ``tokens``.
        """
        prompt, message = list(task.prompt), list(task.follow_up)
        self.forget()
        began = time.perf_counter()
        tokens, times = self.answer(prompt, task.new_tokens + 1)
        if not len(tokens) == len(times) == task.new_tokens + 1:
            raise LowvramError(f"expected {task.new_tokens + 1} tokens from it, found {len(tokens)}")
        asked = time.perf_counter()
        _, (replied,) = self.answer(prompt + tokens + message, 1)
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
        self.model = load(plan, task.gpu(), checkpoint=find_source(Path(task.directory)).checkpoint(), progress=False)
        self.weight_bytes = self.read_bytes = plan.weight_bytes()
        if not spec.tied:
            self.read_bytes -= plan.module_bytes(spec.module(spec.embedding))
        self.kv_bytes = plan.kv_bytes(task.mean_length)
        devices = {assignment.device for assignment in plan.modules.values()}
        places = {compute_place(device) for device in devices} if torch.cuda.is_available() else {"cpu"}
        self.one_memory = len(places) == 1 and "disk" not in devices
        self.decoder = self._decoder()
        self.note = self.decoder.name

    def _decoder(self) -> Decoder:
        return decoder_for(self.model, self.task.tokens, progress=False)

    def forget(self):
        """See ``Engine``."""
        self.decoder.cache.keep(0)

    def answer(self, ids: list[int], count: int):
        """See ``Engine``."""
        tokens, times = [], []
        held = self.decoder.cache.get_seq_length()
        with self._timed():
            token = choose(self.decoder.prefill(torch.tensor([ids[held:]])), Sampling())
            while True:
                tokens.append(int(token))
                times.append(time.perf_counter())
                if len(tokens) == count:
                    return tokens, times
                token = self.decoder.choose(self.decoder.decode(token), Sampling())

    def likeliest(self, ids: list[int], answer: list[int]):
        """See ``Engine``."""
        self.forget()
        with self._timed():
            found = [int(choose(self.decoder.prefill(torch.tensor([ids])), Sampling()))]
            found += [int(choose(self.decoder.decode(torch.tensor([[token]])), Sampling())) for token in answer[:-1]]
        return found

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
        state = self.model.lowvram
        return max(state.recording.phases[0].peak_allocated_bytes, state.gpu.peak_allocated_bytes)


class Modules(Ours):
    """The same model by its own modules: what a chat runs that cannot be lean."""

    name = "lowvram (modules)"

    def _decoder(self) -> Decoder:
        return ModuleDecoder(self.model, self.task.tokens)
