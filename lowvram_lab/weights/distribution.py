"""What a checkpoint's weights look like, tensor by tensor: spread, outliers, and what rounding them to few bits costs.

Streams: a tensor is mapped, worked on in chunks of rows, and given back. Knows nothing about activations: which error
matters to the output is ``sensitivity.py``'s question.

Derived in: notebooks/03_know_your_weights.ipynb
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import SCALE_DTYPE, Format, get_format
from lowvram_lab.model.source import find_source, read_config
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.units import MiB
from lowvram_lab.weights.solvers import round_to_nearest

CHUNK_BYTES = MiB
"""Float32 bytes of the rows worked on at once; twice that in float64 still fits a cache, and is quickest."""


def weight_statistics(
    model: Checkpoint | str | os.PathLike,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    group_sizes: Sequence[int] = (32, 64, 128),
    progress: bool = True,
) -> pd.DataFrame:
    """Describes every tensor of a 16- or 32-bit checkpoint; needs RAM for its largest tensor and some chunks.

    A tensor's last dimension is its columns (inputs), the others are its rows. Moments are of the finite values, over
    the population, in float64.

    Args:
        model: An open checkpoint, or what ``find_source`` understands.
        bits: Of the round-trip errors; 8 means int8, a scale a row.
        group_sizes: Weights that share a scale, for fewer than 8 bits.
        progress: Show a progress bar.

    Returns:
        A DataFrame, a row a tensor in the order of the file: ``name``, ``role`` (``q_proj``, ``embed_tokens``, any
        ``norm``), ``layer``, ``shape``, ``bytes`` as stored, ``dtype``, ``mean``, ``std``, ``kurtosis`` (excess: 0 of
        a normal distribution), ``max_over_std`` (largest distance from the mean), ``share_beyond_6_std``,
        ``row_spread`` and ``column_spread`` (99th percentile over median of the rows' and columns' root mean squares),
        ``exact_zeros`` (share), ``not_finite`` (count), ``duplicate_of`` (an earlier tensor with the same bytes; or the
        weight that a head is tied to, which lies in no file and has 0 bytes), and ``error_int4_g64``, ``error_int8``
        and so on: ``||W - W'|| / ||W||`` of symmetric ``round_to_nearest``. NaN where undefined: spreads and errors of
        vectors, errors of zeros, of tensors not finite, and of columns that do not divide into groups.

    Raises:
        CheckpointError: A tensor is in integers or 8-bit floats: its distribution is a quantiser's, not the model's.
        PlanError: No format has such bits and groups.
    """
    formats = _formats(bits, group_sizes)
    checkpoint = find_source(model).checkpoint() if isinstance(model, str | os.PathLike) else model
    _refuse_quantised(checkpoint)
    rows: dict[str, dict] = {}
    first: dict[tuple, str] = {}
    for name in tqdm(checkpoint.keys(), desc="weights", unit="tensor", disable=not progress):
        tensor = checkpoint.read(name)
        facts = {**_place(name), "shape": tuple(tensor.shape), "bytes": tensor.nbytes}
        facts["dtype"] = str(tensor.dtype).removeprefix("torch.")
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).digest()
        twin = first.setdefault((facts["shape"], tensor.dtype, digest), name)
        if twin == name:
            rows[name] = {**facts, **_describe(tensor, formats), "duplicate_of": None}
        else:
            rows[name] = {**rows[twin], **facts, "duplicate_of": twin}
    for name, owner in _ties(checkpoint).items():
        if name not in rows and owner in rows:
            rows[name] = {**rows[owner], **_place(name), "bytes": 0, "duplicate_of": owner}
    return pd.DataFrame(list(rows.values())).astype({"layer": "Int64"})


def error_curve(weight: torch.Tensor, bits: Sequence[int], group_sizes: Sequence[int], *, symmetric: bool = True):
    """Round-trip error of one weight at each number of bits and group size.

    Args:
        weight: ``(out, in)``, any float dtype.
        bits: As for ``weight_statistics``.
        group_sizes: As there.
        symmetric: A scale alone; else scale and zero point.

    Returns:
        A DataFrame: ``bits``, ``group_size`` (8 bits: the row's length), ``bits_per_weight`` (codes, and 16 bits for
        each scale and zero point), ``error`` (relative, Frobenius; NaN as in ``weight_statistics``).

    Raises:
        PlanError: No format has such bits and groups.
    """
    formats = _formats(bits, group_sizes)
    rows = [{"bits": fmt.bits, "group_size": fmt.group_size or weight.shape[1]} for fmt in formats.values()]
    per_group = SCALE_DTYPE.itemsize * 8 * (1 if symmetric else 2)
    table = pd.DataFrame(rows).assign(bits_per_weight=lambda t: t["bits"] + per_group / t["group_size"])
    return table.assign(error=_errors(weight, formats, symmetric).values())


def weight_histograms(checkpoint: Checkpoint, roles: Sequence[str] = (), *, limit: float = 12.0, bins: int = 97):
    """Densities of the weights of each kind of matrix, every tensor in its own standard deviations.

    Args:
        checkpoint: An open checkpoint of float weights.
        roles: Such as ``("q_proj", "down_proj")``; by default all there are.
        limit: The outermost bins end there and take all that lies beyond.
        bins: How many; odd, so that one is centred on the mean.

    Returns:
        A DataFrame: index the bins' centres, a column a role; a column times the bin width sums to one.

    Raises:
        LowvramError: A role without a matrix.
    """
    counts: dict[str, torch.Tensor] = {}
    for name in checkpoint:
        role = _place(name)["role"]
        if len(checkpoint.shape(name)) == 2 and role in (roles or (role,)):
            weight = checkpoint.read(name)
            _, mean, std, _ = _moments(weight)
            for values in _finite_chunks(weight):
                found = torch.histc(((values - mean) / (std or 1)).clamp_(-limit, limit), bins, -limit, limit)
                counts[role] = counts.get(role, 0) + found
    if not counts or not counts.keys() >= set(roles):
        raise LowvramError(
            f"expected matrices of kind {', '.join(roles) or 'any'}, found {', '.join(counts) or 'none'}"
        )
    width = 2 * limit / bins
    densities = {role: (counts[role] / counts[role].sum() / width).numpy() for role in roles or counts}
    return pd.DataFrame(densities, index=[width * (at + 0.5) - limit for at in range(bins)])


def _formats(bits: Sequence[int], group_sizes: Sequence[int]) -> dict[str, Format]:
    """By the name of their error's column."""
    grouped = {f"error_int{b}_g{g}": f"int{b}" + f"-g{g}" * (g != 64) for b in bits if b != 8 for g in group_sizes}
    names = {**grouped, "error_int8": "int8"} if 8 in bits else grouped
    return {column: get_format(name) for column, name in names.items()}


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    for name in checkpoint:
        if (dtype := checkpoint.dtype(name)).is_floating_point and dtype.itemsize > 1:
            continue
        recipe = checkpoint.directory / "recipe.json"  # ``convert`` notes there what it was given
        source = json.loads(recipe.read_text(encoding="utf-8")).get("source") if recipe.is_file() else None
        raise CheckpointError(
            f"{checkpoint.directory}: expected 16- or 32-bit floats, found {dtype} in {name}; these weights are "
            f"quantised already: name the original, {source or 'the checkpoint they were made from'}"
        )


def _describe(tensor: torch.Tensor, formats: dict[str, Format]) -> dict:
    count, mean, std, kurtosis = _moments(tensor)
    furthest = far = zeros = columns = 0
    rows = [torch.empty(0, dtype=torch.float64)]
    for values in _finite_chunks(tensor):
        zeros += int((values == 0).sum())
        distances = values.sub_(mean).abs_()
        far += int((distances > 6 * std).sum())
        furthest = max(furthest, distances.max().item())
    matrix = tensor.dim() > 1 and tensor.numel() > 0
    for chunk in _chunks(tensor) if matrix else ():
        squares = chunk.double().nan_to_num_(0, 0, 0).square_()
        rows.append(squares.mean(dim=1).sqrt())
        columns = columns + squares.sum(dim=0)
    sound = matrix and count == tensor.numel()
    return {
        "mean": mean,
        "std": std,
        "kurtosis": kurtosis,
        "max_over_std": furthest / std if std > 0 else math.nan,
        "share_beyond_6_std": far / count if count else math.nan,
        "row_spread": _spread(torch.cat(rows)) if matrix else math.nan,
        "column_spread": _spread(columns.sqrt()) if matrix else math.nan,
        "exact_zeros": zeros / count if count else math.nan,
        "not_finite": tensor.numel() - count,
        **(_errors(tensor, formats) if sound else dict.fromkeys(formats, math.nan)),
    }


def _moments(tensor: torch.Tensor) -> tuple[int, float, float, float]:
    """Count, mean, standard deviation and excess kurtosis; first the mean, for powers about a guess cancel."""
    count = 0
    total = second = fourth = 0.0
    for values in _finite_chunks(tensor):
        count += values.numel()
        total += values.sum().item()
    if not count:
        return 0, math.nan, math.nan, math.nan
    for values in _finite_chunks(tensor):
        squares = values.sub_(total / count).square_()
        second += squares.sum().item()
        fourth += squares.square_().sum().item()
    kurtosis = count * fourth / second**2 - 3 if second**2 > 0 else math.nan
    return count, total / count, math.sqrt(second / count), kurtosis


def _errors(weight: torch.Tensor, formats: dict[str, Format], symmetric: bool = True) -> dict[str, float]:
    norm = sum(chunk.double().square_().sum().item() for chunk in _chunks(weight))
    fit = {key: fmt for key, fmt in formats.items() if norm > 0 and weight.shape[-1] % (fmt.group_size or 1) == 0}
    squares = dict.fromkeys(fit, 0.0)
    for chunk in _chunks(weight):
        for key, fmt in fit.items():
            restored = round_to_nearest(chunk, fmt, symmetric=symmetric).dequantize()
            squares[key] += restored.sub_(chunk).double().square_().sum().item()
    return {key: math.sqrt(squares[key] / norm) if key in fit else math.nan for key in formats}


def _chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """``(some rows, columns)`` each; a vector is one row."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return rows.split(max(1, CHUNK_BYTES // (4 * rows.shape[1]))) if tensor.numel() else ()


def _finite_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The finite values of each chunk that has any, in float64, to be written over."""
    for chunk in _chunks(tensor):
        values = chunk.to(torch.float64, copy=True)
        values = values if (mask := values.isfinite()).all() else values[mask]
        if values.numel():
            yield values


def _spread(channels: torch.Tensor) -> float:
    middle, top = (torch.quantile(channels, at).item() for at in (0.5, 0.99))
    return top / middle if middle > 0 else math.nan


def _place(name: str) -> dict:
    """What a tensor is called, and where it belongs, by its name alone."""
    *path, kind = name.split(".")
    role = "norm" if path and "norm" in path[-1] else path[-1] if path else kind
    layer = re.search(r"\.(\d+)\.", name)
    suffix = f".{kind}" if path and kind != "weight" else ""
    return {"name": name, "role": role + suffix, "layer": int(layer.group(1)) if layer else None}


def _ties(checkpoint: Checkpoint) -> dict[str, str]:
    """Weight → weight it shares, by the config beside the checkpoint; nothing where we could not run such a model."""
    try:
        spec = ModelSpec.from_config(read_config(checkpoint.directory))
    except LowvramError:
        return {}
    return {f"{module.name}.weight": f"{module.tied_to}.weight" for module in spec.modules if module.tied_to}
