"""The other engines that ``bench`` runs beside ours, each as its own documentation would have it run."""

import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import process_bytes
from lowvram_lab.peers.engines import Engine, Modules, Ours, Task
from lowvram_lab.peers.llama_batch import LlamaBatch
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.units import format_bytes

WORKSPACE_SHARE = 0.15
"""Of a capped card, left by a peer's placement for activations and the KV cache: stock tools ask for a number."""


class _Clock:
    """A streamer for ``generate`` that notes when each token came; it is given them on the CPU, so they are there."""

    def __init__(self):
        self.times: list[float] | None = None

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then a token at a time."""
        if self.times is None:
            self.times = []
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


class Transformers(Engine):
    """Stock ``from_pretrained`` in bf16 and ``generate``."""

    name, package = "transformers", ("transformers", "transformers")
    note = "bf16, generate with a DynamicCache kept between questions"

    def __init__(self, task: Task):
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.task, cuda = task, torch.cuda.is_available()
        if cuda:
            task.gpu()
            torch.cuda.reset_peak_memory_stats()
        options = {"dtype": torch.bfloat16, "local_files_only": True, "trust_remote_code": False}
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(task.directory, **options, **self._options(cuda))
        self.model = self._placed(model.eval(), cuda)
        # the model's own settings (sampling, penalties, the tokens that end a text) are not for a comparison of speed
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.weight_bytes = self.read_bytes = _weight_bytes(self.model)
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            self.read_bytes -= embedding.weight.nbytes
        self.forget(1)

    def _options(self, cuda: bool) -> dict:
        return {}

    def _placed(self, model: PreTrainedModel, cuda: bool):
        return model.to("cuda") if cuda else model

    def forget(self, batch_size: int):
        """See ``Engine``; this cache takes any number of sequences."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def _tensor(self, ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids, device=self.model.device)

    def answer(self, ids: list[list[int]], count: int):
        """See ``Engine``."""
        clock, given = _Clock(), self._tensor(ids)
        found = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=self.cache,
            max_new_tokens=count,
            streamer=clock,
        )
        return found[:, given.shape[1] :].tolist(), clock.times

    @torch.no_grad()
    def likeliest_after(self, ids: list[list[int]]):
        """See ``Engine``."""
        logits = self.model(self._tensor(ids), past_key_values=self.cache, logits_to_keep=1).logits
        return logits[:, -1].float().argmax(-1).tolist()


class Accelerate(Transformers):
    """The stock model with accelerate's hooks: weights that the card does not hold come to it for every token."""

    name, package = "accelerate", ("accelerate", "accelerate")

    @classmethod
    def absent(cls, cuda: bool):
        """See ``Engine``."""
        if not cuda:
            return "not applicable: it brings weights to a CUDA card, and there is none here"
        return super().absent(cuda)

    def _options(self, cuda: bool):
        usable = GpuBudget(*self.task.budget).usable_bytes if self.task.budget else torch.cuda.mem_get_info()[0]
        weights = int(usable * (1 - WORKSPACE_SHARE))
        return {"device_map": "auto", "max_memory": {0: weights, "cpu": psutil.virtual_memory().available}}

    def _placed(self, model: PreTrainedModel, cuda: bool):
        places = Counter(str(place) for place in getattr(model, "hf_device_map", {"": 0}).values())
        self.one_memory = set(places) == {"0"}
        self.note = "bf16, device_map auto; blocks by place: " + ", ".join(f"{n} on {p}" for p, n in places.items())
        return model

    def _tensor(self, ids: list[list[int]]):
        return torch.tensor(ids, device="cuda")


class BitsAndBytes(Transformers):
    """The stock model in bitsandbytes' nf4; embedding and head stay in 16 bits, as the usual recipe leaves them."""

    name, package = "bitsandbytes", ("bitsandbytes", "bitsandbytes")
    note = "nf4 through transformers, embedding and head in bf16; DynamicCache kept between questions"

    def _options(self, cuda: bool):
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        return {"quantization_config": config, "device_map": {"": 0 if cuda else "cpu"}}

    def _placed(self, model: PreTrainedModel, cuda: bool):
        return model


class LlamaCpp(Engine):
    """llama.cpp through llama-cpp-python; its ``generate`` reads only what its KV cache has not seen.

    ``generate`` is for one sequence: several go through the same model's batches.
    """

    name, package = "llama.cpp", ("llama_cpp", "llama-cpp-python")

    def __init__(self, task: Task):
        import llama_cpp
        from gguf import GGUFReader

        self.task, self._batch = task, None
        tensors = GGUFReader(task.gguf).tensors
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
        kinds: Counter = Counter()
        for tensor in tensors:
            kinds[tensor.tensor_type.name] += int(tensor.n_bytes)
        self.weight_bytes = self.read_bytes = sum(sizes.values())
        if "output.weight" in sizes:
            self.read_bytes -= sizes.get("token_embd.weight", 0)
        self._on_gpu = torch.cuda.is_available() and llama_cpp.llama_supports_gpu_offload()
        layers = self._gpu_layers() if self._on_gpu else 0
        self.one_memory = layers in (0, -1)
        self.model = llama_cpp.Llama(
            task.gguf,
            n_ctx=task.tokens,
            n_threads=task.threads,
            n_threads_batch=task.threads,
            n_gpu_layers=layers,
            verbose=False,
        )
        self.note = self._described(kinds, layers)

    def _described(self, kinds: Counter, layers: int) -> str:
        origin = f", {self.task.gguf_origin}" if self.task.gguf_origin else ""
        types = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds.most_common(3))
        where = {0: "on the CPU", -1: "all layers on the GPU"}.get(layers, f"{layers} layers on the GPU")
        size = format_bytes(self.weight_bytes)
        note = f"{Path(self.task.gguf).name}{origin}: {size} ({types}), {where}, KV cache in fp16"
        return f"{note}, not capped" if layers and self.task.budget else note

    def _gpu_layers(self) -> int:
        """As many as the card to be holds beside its workspace."""
        if not self.task.budget:
            return -1
        share = GpuBudget(*self.task.budget).usable_bytes * (1 - WORKSPACE_SHARE) / self.weight_bytes
        return -1 if share >= 1 else int(self.task.spec().num_hidden_layers * share)

    def forget(self, batch_size: int):
        """See ``Engine``."""
        self.model.reset()
        if self._batch is not None and self._batch.size != batch_size:
            self._batch.close()
            self._batch = None
        if batch_size > 1:
            self._batch = self._batch or LlamaBatch(self.model, batch_size, self.task.tokens)
            self._batch.forget()

    def answer(self, ids: list[list[int]], count: int):
        """See ``Engine``."""
        if self._batch is not None:
            return self._batch.answer(ids, count)
        tokens, times = [], []
        for token in self.model.generate(ids[0], temp=0.0, repeat_penalty=1.0):
            tokens.append(int(token))
            times.append(time.perf_counter())
            if len(tokens) == count:
                break
        return [tokens], times

    def likeliest_after(self, ids: list[list[int]]):
        """See ``Engine``."""
        if self._batch is not None:
            return self._batch.read(ids)
        self.model.eval(ids[0])
        return [int(self.model.sample(temp=0.0, repeat_penalty=1.0))]

    def peak_bytes(self):
        """What the driver says of this process now: llama.cpp does not allocate through torch."""
        return process_bytes(torch.cuda.current_device()) if self._on_gpu else None


def _weight_bytes(model: PreTrainedModel) -> int:
    """Parameters and the buffers saved with them, shared ones once, with bitsandbytes' scales."""
    total, tensors = 0, [*model.parameters()]
    for module in model.modules():
        tensors += [b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set]
    for tensor in {id(tensor): tensor for tensor in tensors if tensor is not None}.values():
        total += tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        total += sum(part.nbytes for part in (state.absmax, state.code)) if state is not None else 0
    return total


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Ours, Modules, Transformers, Accelerate, BitsAndBytes, LlamaCpp)
}
"""Every engine that ``bench`` knows, by name."""

MODULES = Modules.name
OURS = (Ours.name, MODULES)
"""The first is what others are compared with where it runs."""
