"""What this machine takes for the parts of a forward pass, as plain figures; ``machine.py`` measures them.

Derived in: notebooks/05_split_the_layers.ipynb
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelRates:
    """A linear layer of one format, as a module. Seconds: ``call + weights * (weight + row * (tokens - 1))``.

    Attributes:
        call_s: A call with next to no weights.
        weight_s: Per weight, for the first token.
        row_s: Per weight and further token.
    """

    call_s: float
    weight_s: float
    row_s: float

    def seconds(self, weights: int, tokens: int = 1) -> float:
        """A forward pass of ``tokens`` tokens through ``weights`` weights."""
        return self.call_s + weights * (self.weight_s + self.row_s * (tokens - 1))


@dataclass(frozen=True)
class ProductRates:
    """One token times a weight matrix inside the lean decoder; what a call takes is in ``TokenRates.layer_s``.

    Attributes:
        weight_s: Per weight.
    """

    weight_s: float


@dataclass(frozen=True)
class RowsRates:
    """Several tokens in one pass of the lean decoder over its weights.

    Attributes:
        row_share: What each token beyond the first adds, as a share of the first one's products.
    """

    row_share: float


@dataclass(frozen=True)
class PromptRates:
    """Reading a prompt by the model's modules, without its linear layers.

    Attributes:
        model_s: What a model has around its layers: embedding, mask, final norm.
        layer_s: A layer: norms, rotary embedding, attention over a few tokens, Python.
        width_s: Per further token and hidden feature: element-wise work.
        pair_s: Per pair of tokens that see each other, and query feature.
    """

    model_s: float
    layer_s: float
    width_s: float
    pair_s: float


@dataclass(frozen=True)
class TokenRates:
    """Decoding one token by one engine, without its products.

    Attributes:
        model_s: What there is around the layers: embedding, final norm, copying logits, choosing.
        layer_s: A layer with next to nothing cached.
    """

    model_s: float
    layer_s: float


@dataclass(frozen=True)
class AttentionRates:
    """One token's attention to those that are cached.

    Attributes:
        query_s: Per cached token and query feature.
        key_s: Per cached token and key feature.
    """

    query_s: float
    key_s: float


@dataclass(frozen=True)
class LinkRates:
    """Copies between CPU and GPU, bytes a second, and what a small one takes.

    Attributes:
        to_gpu: From ordinary memory.
        to_gpu_pinned: From page-locked memory.
        to_cpu: Into ordinary memory.
        to_cpu_pinned: Into page-locked memory.
        crossing_s: A few KiB, waited for.
    """

    to_gpu: float
    to_gpu_pinned: float
    to_cpu: float
    to_cpu_pinned: float
    crossing_s: float


@dataclass(frozen=True)
class DiskRates:
    """Reading weights that the system does not hold in RAM.

    Attributes:
        read: Bytes a second, one after the other, where the cache folder is.
    """

    read: float
