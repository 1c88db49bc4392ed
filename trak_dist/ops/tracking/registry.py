"""Which function of torch has which rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops.tracking import elementwise, indexing, products, reshaping, writing
from trak_dist.ops.tracking.call import Rule

_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg, torch.fft, torch._C._nn)  # noqa: SLF001

_UNARY = """
    abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan
    atanh bernoulli bfloat16 bitwise_not bool byte ceil celu char clamp clip clone conj
    contiguous cos cosh cpu cuda deg2rad detach digamma double elu erf erfc erfinv exp exp2
    expm1 fix float floor frac gelu half hardshrink hardsigmoid hardswish hardtanh int isfinite
    isinf isnan isneginf isposinf isreal leaky_relu lgamma log log10 log1p log2 logical_not
    logit logsigmoid long mish nan_to_num neg negative pin_memory positive rad2deg reciprocal
    relu relu6 requires_grad_ rrelu round rsqrt selu sgn short sigmoid sign silu sin sinc sinh
    softplus softshrink softsign sqrt square tan tanh tanhshrink threshold tril triu trunc
    dropout alpha_dropout dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout
    expit i0 ndtr log_ndtr __abs__ __invert__ __neg__ __pos__
"""
_BINARY = """
    add addcdiv addcmul atan2 arctan2 bitwise_and bitwise_or bitwise_xor copysign div divide eq
    fill float_power floor_divide fmax fmin fmod ge greater greater_equal gt heaviside hypot
    ldexp le lerp less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor lt
    masked_fill maximum minimum mul multiply ne nextafter not_equal pow remainder rsub sub
    subtract true_divide xlogy isclose clamp_min clamp_max copy __add__ __radd__ __iadd__
    __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__
    __rdiv__ __div__ __idiv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __imod__ __pow__
    __rpow__ __ipow__ __and__ __rand__ __iand__ __or__ __ror__ __ior__ __xor__ __rxor__ __ixor__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__
"""
_AS_FIRST = "to type type_as as_tensor asarray alias"
_NOTHING = """
    zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros
    new_ones new_empty new_empty_strided arange zeros ones empty eye zero_
"""
_REDUCED = """
    sum nansum mean nanmean prod amax amin max min argmax argmin any all logsumexp softmax
    log_softmax softmin var std var_mean std_mean cumsum cumprod cummax cummin logcumsumexp
    count_nonzero median nanmedian mode aminmax
"""
_VIEWED = """
    permute transpose t swapaxes swapdims movedim moveaxis squeeze unsqueeze expand expand_as
    broadcast_to select narrow chunk split split_with_sizes tensor_split hsplit vsplit dsplit
    unsafe_chunk unsafe_split unbind diagonal unfold adjoint flip fliplr flipud rot90
"""


def _functions(
    names: str | Iterable[str], namespaces: Sequence[Any] = _NAMESPACES, *, in_place: bool = True
) -> Iterator[Any]:
    """Those of these names, in place too, wherever torch keeps them."""
    for name in names.split() if isinstance(names, str) else names:
        for namespace in (Tensor,) if name.startswith("__") else namespaces:
            for spelled in (name, f"{name}_") if in_place else (name,):
                found = getattr(namespace, spelled, None)
                if callable(found):
                    yield found


def _of(names: str, rule: Rule) -> dict[Any, Rule]:
    return dict.fromkeys(_functions(names), rule)


def _of_layers(names: str, rule: Rule) -> dict[Any, Rule]:
    """Those of `torch.nn.functional` alone; namesakes in `torch` take arguments otherwise."""
    return dict.fromkeys(_functions(names, (F,)), rule)


RULES: dict[Any, Rule] = {
    **_of(_UNARY, elementwise.entrywise),
    **_of(_BINARY, elementwise.entrywise),
    **_of(_AS_FIRST, elementwise.like_first_operand),
    **_of(_NOTHING, elementwise.no_example),
    **_of("full full_like", elementwise.filled(1)),
    **_of("new_full", elementwise.filled(2)),
    **_of(_REDUCED, elementwise.along(1)),
    **_of("glu", elementwise.along(1, default=-1)),
    **_of("norm vector_norm", elementwise.along(2)),
    **_of("quantile nanquantile", elementwise.quantile),
    **_of("normalize topk kthvalue fft ifft rfft irfft hfft", elementwise.along(2, default=-1)),
    F.normalize: elementwise.along(2, default=1),
    **_of("fft2 ifft2 rfft2 irfft2", elementwise.along(2, default=(-2, -1))),
    **_of("diff", elementwise.diff),
    **_of("cosine_similarity", elementwise.reduced_pair),
    **_of("gumbel_softmax", elementwise.along(4, default=-1)),
    **_of("sort argsort", elementwise.sorted_along(1)),
    **_of("bucketize", elementwise.last(0)),
    **_of("cdist", elementwise.last(1)),
    **_of("pixel_shuffle pixel_unshuffle channel_shuffle", elementwise.last(3)),
    **_of("view_as_real view_as_complex diag_embed", elementwise.added_last),
    F.one_hot: elementwise.one_hot,
    **_of_layers(
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
        "binary_cross_entropy_with_logits kl_div gaussian_nll_loss poisson_nll_loss",
        elementwise.of_each_entry,
    ),
    **_of_layers("cross_entropy nll_loss", elementwise.of_each_class),
    **dict.fromkeys(_functions(_VIEWED, in_place=False), reshaping.by_view),
    **{getattr(Tensor, name).__get__: reshaping.by_view for name in ("T", "mT", "H", "mH")},
    **{
        getattr(Tensor, name).__get__: elementwise.like_first_operand
        for name in ("data", "real", "imag")
    },
    Tensor.requires_grad.__set__: elementwise.like_first_operand,  # type: ignore[attr-defined]
    Tensor.retain_grad: elementwise.like_first_operand,
    **_of("reshape view view_as reshape_as flatten unflatten ravel", reshaping.reshaped),
    **_of("cat concat concatenate", reshaping.concatenated),
    **_of("prelu", products.prelu),
    **_of("stack", reshaping.stacked),
    **_of("pad_sequence", reshaping.padded_together),
    **_of("pad", reshaping.padded),
    **_of("repeat tile", reshaping.repeated),
    **_of("repeat_interleave", reshaping.repeated_each),
    **_of("roll", reshaping.rolled),
    Tensor.__getitem__: indexing.indexed,
    Tensor.__setitem__: writing.assigned,
    **_of("index_select", indexing.selected),
    **_of("gather", indexing.gathered),
    **_of("take_along_dim", indexing.taken_along),
    **_of("masked_select", indexing.masked),
    **_of("nonzero argwhere", indexing.positions),
    **_of("where", indexing.where),
    **_of("index_put", writing.put_at),
    **_of(
        "index_add index_copy index_fill scatter scatter_add scatter_reduce index_reduce",
        writing.added_at,
    ),
    **_of("matmul mm bmm mv __matmul__ __imatmul__", products.matmul),
    **_of("addmm baddbmm addmv", products.added_product),
    **_of("linear", products.linear),
    **dict.fromkeys(_functions("_grouped_mm", in_place=False), products.grouped),
    **_of("einsum", products.einsum),
    **_of("scaled_dot_product_attention", products.attention),
    **_of("layer_norm rms_norm", products.layer_norm),
    **_of_layers("group_norm instance_norm local_response_norm", products.by_example),
    torch.group_norm: products.by_example,
    F.batch_norm: products.batch_norm,
    F.embedding: products.embedding,
    F.embedding_bag: products.embedding_bag,
    **_of("lstm gru rnn_tanh rnn_relu", products.recurrent),
    **_of("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", products.recurrent_cell),
    **_of("interpolate upsample unfold fold grid_sample affine_grid", products.come_first),
    **{
        function: products.images(dims, channels=True)
        for dims in (1, 2, 3)
        for function in _functions(f"conv{dims}d conv_transpose{dims}d")
    },
    **{
        function: products.images(dims, channels=False)
        for dims in (1, 2, 3)
        for kind in ("avg_pool", "max_pool", "lp_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for function in _functions([f"{kind}{dims}d", f"{kind}{dims}d_with_indices"])
    },
    Tensor.unfold: reshaping.by_view,
}

# Where a function that chooses or writes by indices has them: they may come of other examples.
INDEX_AT: dict[Any, int] = {
    Tensor.__getitem__: 1,
    Tensor.__setitem__: 1,
    **dict.fromkeys(_functions("_grouped_mm", in_place=False), 2),
    **dict.fromkeys(_functions("index_put"), 1),
    **dict.fromkeys(_functions("take_along_dim masked_select"), 1),
    **dict.fromkeys(
        _functions("index_select gather index_add index_copy index_fill scatter scatter_add "
                   "scatter_reduce index_reduce"),
        2,
    ),
}  # fmt: skip
