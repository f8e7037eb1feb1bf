"""Arithmetic for the fake CUDA: each operator runs on "CUDA", for its allocations, then on the CPU, for its values.

Device memory is host memory, so a CUDA tensor has a twin: a CPU tensor over the same bytes. ``Arithmetic`` is a
dispatch mode at the bottom of the stack. It lets the real CUDA operator run (its kernels do nothing, its allocations,
launches and copies are true), runs the same operator on the twins and writes the results where CUDA's would be.
While a CUDA graph is captured nothing is computed; what is to be done is noted, and done at every replay.

Where the CPU has no such operator (fused attention, int4 packing) ``SPECIAL`` has one. Operators whose result's shape
depends on values (``nonzero``) are computed on the CPU first: their temporaries on the card are not those of CUDA.
"""

import contextlib
import ctypes
import math
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
SPECIAL = {}  # operator: function of the twins
# values are not theirs to make, or are right already (a copy that the runtime really does)
UNTOUCHED = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.resize_.default, aten.record_stream.default, aten._local_scalar_dense.default,
    aten.set_.source_Storage, aten.set_.source_Storage_storage_offset, aten.set_.source_Tensor, aten.set_.default,
    aten._pin_memory.default, aten.is_pinned.default, aten.is_same_size.default, aten.lift_fresh.default,
    aten._assert_async.default, aten._assert_async.msg, aten._fused_sdp_choice.default, aten.detach_.default,
}  # fmt: skip
# what they write does not depend on what was there
OVERWRITING = {
    aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default, aten.normal_.default,
    aten.uniform_.default, aten.random_.default, aten.random_.to, getattr(aten.random_, "from"),
}  # fmt: skip
SHAPED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default,
    aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
           aten._unsafe_index.Tensor, aten._unsafe_index_put.default}  # fmt: skip

_bytes = {}  # twins of storages by (address, size): a few, made anew when there are many


def _storage_twin(address, size):
    found = _bytes.get((address, size))
    if found is None:
        if len(_bytes) > 4096:
            _bytes.clear()
        buffer = (ctypes.c_char * size).from_address(address)
        found = _bytes[address, size] = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return found


def twin(value):
    """A CPU tensor over the memory of a CUDA tensor; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    if storage.nbytes() == 0 or value.numel() == 0:
        return torch.empty(value.shape, dtype=value.dtype)
    bare = torch.empty(0, dtype=value.dtype)
    bare.set_(_storage_twin(storage.data_ptr(), storage.nbytes()), value.storage_offset(), value.size(), value.stride())
    bare = bare.conj() if value.is_conj() else bare
    return bare._neg_view() if value.is_neg() else bare


def _on_cpu(value):
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, torch.Generator):
        return None
    return twin(value)


def _is_cuda(value):
    if isinstance(value, torch.Tensor):
        return value.device.type == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def _written(func, args, kwargs):
    """The CUDA tensors that the operator changes."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            for item in value if isinstance(value, list | tuple) else (value,):
                if _is_cuda(item):
                    found.append(item)
    return found


@contextlib.contextmanager
def _seeded(func, args, kwargs):
    """The CPU's generator, for the block, in a state that follows from CUDA's."""
    if torch.Tag.nondeterministic_seeded not in func.tags or torch.cuda.is_current_stream_capturing():
        yield
        return
    flat = tree_flatten((args, kwargs))[0]
    generator = next((v for v in flat if isinstance(v, torch.Generator)), None)
    if generator is None or generator.device.type != "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed((generator.initial_seed() * 1_000_003 + generator.get_offset()) % (1 << 63))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _compute(func, args, kwargs):
    """The operator on twins; in fp32 where the CPU has no kernel for a narrower type."""
    run = SPECIAL.get(func, func)
    try:
        return run(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented for" not in str(error) and "not supported" not in str(error):
            raise
        narrow = (torch.float16, torch.bfloat16)
        wide = [a.float() if isinstance(a, torch.Tensor) and a.dtype in narrow else a for a in args]
        result = run(*wide, **kwargs)
        for before, after in zip(args, wide, strict=True):
            if before is not after and isinstance(before, torch.Tensor):
                before.copy_(after)  # an operator in place
        return result


def _write(found, computed):
    """Puts computed values where the CUDA operator's results are."""
    for real, value in zip(tree_flatten(found)[0], tree_flatten(computed)[0], strict=False):
        if isinstance(real, torch.Tensor) and isinstance(value, torch.Tensor) and real.numel():
            target = twin(real)
            if target.data_ptr() != value.data_ptr() or target.stride() != value.stride():
                target.copy_(value)


def _from_cpu(value, device):
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    twin(made).copy_(value)
    return made


def _plain_indices(args):
    """Boolean masks among the indices, as the positions they stand for (CUDA would look for them in empty results)."""
    indices = []
    for index in args[1]:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and _is_cuda(index):
            indices += [_from_cpu(part.contiguous(), index.device) for part in twin(index).nonzero().unbind(1)]
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


class Arithmetic(TorchDispatchMode):
    """See the module."""

    def __init__(self):
        super().__init__()
        self.notes = None  # what the running capture has to do at a replay
        self.missing = {}  # operators that the CPU could not do: how often

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator on CUDA and its twins."""
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        made_so = any(isinstance(value, torch.Tensor) and value.is_inference() for value in flat)
        if made_so or torch.is_inference_mode_enabled():  # composite operators arrive whole: "to" as if a view
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if not any(map(_is_cuda, flat)) or func.is_view or func in UNTOUCHED:
            return func(*args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            result = func(*args, **kwargs)
            self._note(func, args, kwargs, result)
            return result
        if func in SHAPED_BY_VALUES or "linalg_" in func.__name__:  # linalg: cuSOLVER's status is read back
            return self._values_first(func, args, kwargs)
        return self._both(func, _plain_indices(args) if func in INDEXED else args, kwargs)

    def _both(self, func, args, kwargs):
        """CUDA's operator, then the CPU's, whose values are written where CUDA's are."""
        written = _written(func, args, kwargs)
        keep = [(twin(t), twin(t).clone()) for t in written] if func not in OVERWRITING else []
        with _seeded(func, args, kwargs):
            try:
                result = func(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if not any(word in str(error) for word in ("cusolver", "cuDNN", "CUDNN", "cusparse", "CUFFT")):
                    raise
                return self._values_first(func, args, kwargs)
            for target, before in keep:
                target.copy_(before)
            try:
                computed = _compute(func, tree_map(_on_cpu, args), _cpu_options(kwargs))
            except (RuntimeError, NotImplementedError, TypeError) as error:
                self._missed(func, error)
                return result
        if not any(isinstance(v, torch.Tensor) for v in tree_flatten(result)[0]):
            return result if result is None else computed
        _write(result, computed)
        return result

    def _values_first(self, func, args, kwargs):
        device = next(v.device for v in tree_flatten((args, kwargs))[0] if _is_cuda(v) and isinstance(v, torch.Tensor))
        computed = _compute(func, tree_map(_on_cpu, args), _cpu_options(kwargs))
        written = _written(func, args, kwargs)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda value: _from_cpu(value, device), computed)

    def _note(self, func, args, kwargs, result):
        if self.notes is None:
            return
        arguments, options = tree_map(_on_cpu, args), _cpu_options(kwargs)
        target = tree_map(twin, result)

        def again():
            _write(target, _compute(func, arguments, options))

        self.notes.append((func, again))

    def _missed(self, func, error):
        if func not in self.missing:
            print(f"fake CUDA: no arithmetic for {func}: {str(error).splitlines()[0][:160]}", flush=True)
        self.missing[func] = self.missing.get(func, 0) + 1


def _cpu_options(kwargs):
    found = {key: tree_map(_on_cpu, value) for key, value in kwargs.items()}
    found.pop("pin_memory", None)
    found.pop("non_blocking", None)
    if found.get("generator", 0) is None:
        found.pop("generator")
    return found


# ---------------------------------------------------------------- operators that the CPU has not, or has otherwise


def special(*operators):
    """Registers a function of twins in place of operators."""

    def register(function):
        for operator in operators:
            SPECIAL[operator] = function
        return function

    return register


def _attention(q, k, v, bias, causal, scale, dropout=0.0):
    """Softmax attention in fp32: output and log-sum-exp, heads shared in groups where there are fewer keys."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if not dropout:
        bias = bias.float().expand(*q.shape[:-1], k.shape[2]) if bias is not None else None
        output, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), 0.0, causal, attn_mask=bias, scale=scale
        )
        return output.to(q.dtype), sums
    scores = q.float() @ k.float().transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        rows, columns = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(1), -math.inf)
    weights = torch.nn.functional.dropout(torch.nan_to_num(scores.softmax(-1)), dropout)
    return (weights @ v.float()).to(q.dtype), scores.logsumexp(-1)


@special(aten._scaled_dot_product_flash_attention.default)
def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None, **_):
    return _attention(q, k, v, None, is_causal, scale, dropout_p)


@special(aten._scaled_dot_product_efficient_attention.default)
def _efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None, **_):
    output, sums = _attention(q, k, v, bias, is_causal, scale, dropout_p)
    return (output, sums) if compute_log_sumexp else (output,)


@special(aten._scaled_dot_product_cudnn_attention.default)
def _cudnn(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *_, scale=None):
    output, sums = _attention(q, k, v, bias, is_causal, scale, dropout_p)
    return (output, sums) if compute_log_sumexp else (output,)


@special(aten._softmax.default)
def _softmax(x, dim, half_to_float):
    return torch._softmax(x.float() if half_to_float else x, dim, False)


@special(aten._log_softmax.default)
def _log_softmax(x, dim, half_to_float):
    return torch._log_softmax(x.float() if half_to_float else x, dim, False)


def _mm(multiply):
    """Products in fp32, rounded once: CPU kernels for half precision differ from machine to machine."""

    def run(*args, **kwargs):
        kwargs.pop("out_dtype", None)
        dtype = args[0].dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return multiply(*args, **kwargs)
        return multiply(*[a.float() if isinstance(a, torch.Tensor) else a for a in args], **kwargs).to(dtype)

    return run


for _name in ("mm", "bmm", "addmm", "baddbmm"):
    SPECIAL[getattr(aten, _name).default] = _mm(getattr(aten, _name).default)


@special(aten._convert_weight_to_int4pack.default)
def _int4_pack(codes, inner_k_tiles):
    """tinygemm's layout for tensor cores: (n/8, k/16/tiles, 32 lanes, tiles/2) words of eight codes.

    A lane holds, of a row, bytes (two columns, the even one in the high nibble) j and j+4 of two k-tiles of eight; the
    odd columns' codes lie in the word's upper half.
    """
    n, half = codes.shape
    pairs = inner_k_tiles // 2
    parts = codes.to(torch.int64).view(n // 8, 8, half // (pairs * 16), pairs, 4, 4)  # tile, row, k, pair, word's, lane
    parts = parts.permute(0, 2, 1, 5, 3, 4).reshape(n // 8, -1, 32, pairs, 4)
    shift = torch.arange(4) * 4
    word = (((parts & 15) << (shift + 16)) | ((parts >> 4) << shift)).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _int4_unpack(packed):
    tiles, supers, _, pairs = packed.shape
    word = packed.to(torch.int64)[..., None] & 0xFFFFFFFF
    shift = torch.arange(4) * 4
    codes = torch.stack(((word >> shift) & 15, (word >> (shift + 16)) & 15), -1)  # even and odd column
    codes = codes.view(tiles, supers, 8, 4, pairs, 4, 2).permute(0, 2, 1, 4, 5, 3, 6)
    return codes.reshape(tiles * 8, -1)


@special(aten._weight_int4pack_mm.default)
def _int4_mm(x, packed, group_size, scale_and_zero):
    codes = _int4_unpack(packed)
    scale, zero = (part.T.repeat_interleave(group_size, 1).float() for part in scale_and_zero.unbind(-1))
    weight = ((codes - 8) * scale + zero).to(x.dtype)
    return (x.float() @ weight.float().T).to(x.dtype)


# ---------------------------------------------------------------- switching on


_mode = None


def enable():
    """Arithmetic from now on, in this thread and in those started later."""
    global _mode
    if _mode is not None:
        return
    _mode = Arithmetic()
    _mode.__enter__()
    run = threading.Thread.run

    def run_with_mode(self):
        with _mode:
            run(self)

    threading.Thread.run = run_with_mode
    _patch_graphs()


def _patch_graphs():
    """CUDA graphs note their work while captured and do it when replayed."""
    graph = torch.cuda.CUDAGraph
    begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay
    ctypes.CDLL(None).fakecuda_graph_copies(0)  # the notes do the copies, in their order

    def capture_begin(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        _mode.notes = []

    def capture_end(self):
        self._notes, _mode.notes = _mode.notes or [], None
        end(self)

    def replay_with_notes(self):
        replay(self)
        for _, again in self._notes:
            again()

    graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replay_with_notes
