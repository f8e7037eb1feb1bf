"""Tiny checkpoints as GPTQ's, AWQ's and fp8's tools write them, from words put together bit by bit."""

import json
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from tests.helpers.tiny import tiny_config, tiny_stock, tiny_tokenizer

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Columns of numbers ``(n, m)`` → words ``(n * bits / 32, m)``: each column is one long number, lowest first."""
    columns = []
    for column in values.T.tolist():
        number = sum(value << (bits * place) for place, value in enumerate(column))
        words = [(number >> (32 * at)) & 0xFFFFFFFF for at in range(len(column) * bits // 32)]
        columns.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


@dataclass
class Rounded:
    """A weight ``(out, in)`` in groups: numbers without a sign, scales and zero points, and what they stand for."""

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    restored: torch.Tensor


def rounded(weight: torch.Tensor, bits: int, size: int, *, symmetric: bool, order=None, most: int = 0) -> Rounded:
    rows, columns = weight.shape
    size = columns if size == -1 else size
    groups = (torch.arange(columns) if order is None else order.argsort()) // size
    scales, zeros = torch.empty(rows, columns // size), torch.empty(rows, columns // size)
    top = (1 << bits) - 1
    for group in range(columns // size):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales[:, group], zeros[:, group] = part.abs().amax(1) * 2 / top, 1 << (bits - 1)
        else:
            scales[:, group] = (high - low) / top
            zeros[:, group] = (-low / scales[:, group]).round().clamp(1 if most else 0, most or top)
    scales = scales.half().float()
    numbers = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
    return Rounded(numbers.long(), scales, zeros.long(), groups, (numbers - zeros[:, groups]) * scales[:, groups])


def gptq(weight, bits=4, size=64, *, symmetric=False, reorder=False, version=1) -> tuple[dict, torch.Tensor]:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3)) if reorder else None
    # version 1 stores a zero point less one, so it has none of 0 and one more at the top
    most = 1 << bits if version == 1 else 0
    of = rounded(weight, bits, size, symmetric=symmetric, order=order, most=most)
    tensors = {
        "qweight": packed(of.numbers.T, bits),
        "qzeros": packed(of.zeros - (2 - version), bits).T.contiguous(),
        "scales": of.scales.T.half().contiguous(),
        "g_idx": of.groups.int(),
    }
    return tensors, of.restored


def awq(weight, size=64) -> tuple[dict, torch.Tensor]:
    of = rounded(weight, 4, size, symmetric=False)

    def words(numbers: torch.Tensor) -> torch.Tensor:
        eights = numbers.view(len(numbers), -1, 8)[..., list(AWQ_ORDER)]
        return packed(eights.reshape(-1, 8).T, 4).view(len(numbers), -1)

    tensors = {"qweight": words(of.numbers.T.contiguous()), "qzeros": words(of.zeros.T.contiguous())}
    return tensors | {"scales": of.scales.T.half().contiguous()}, of.restored


def fp8(weight, block=None) -> tuple[dict, torch.Tensor]:
    rows, columns = weight.shape
    height, width = block or weight.shape
    grid, restored = torch.empty(-(-rows // height), -(-columns // width)), torch.empty_like(weight)
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for y in range(grid.shape[0]):
        for x in range(grid.shape[1]):
            at = slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width)
            grid[y, x] = weight[at].abs().max() / 448
            stored[at] = (weight[at] / grid[y, x]).to(torch.float8_e4m3fn)
            restored[at] = stored[at].float() * grid[y, x]
    return {"weight": stored, "weight_scale_inv": grid if block else grid.flatten()[0]}, restored


def write(folder, kind: str, block: dict, make, *, also=(), config=None):
    """A directory of a tiny model whose layers' matrices are written by ``make``; and its weights as they stand for."""
    model, state, restored = tiny_stock(kind), {}, {}
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name}
    for name, value in model.state_dict().items():
        module, _, key = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if key == "weight" and (module in linear or module in also):
            tensors, restored[name] = make(value.float())
            state |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        else:
            state[name] = restored[name] = value.to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    values = (config or tiny_config(kind)).to_dict() | {"dtype": "bfloat16", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tiny_tokenizer().save_pretrained(folder)
    return {name: value.float() for name, value in restored.items()}
