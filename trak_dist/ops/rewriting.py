"""Rewrites calls into simpler ones that `ops.hooks` has rules for.

torch's multi-head attention takes its weights whole and its inputs with positions before examples;
written with `linear`, examples first, each product has its rule. So has any layer whose input has
the examples elsewhere, as sequences with positions first, once they are put first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops.example_axis import ExampleAxis, axis_of
from trak_dist.ops.recurrence import RECURRENT
from trak_dist.ops.respelling import RESPELLED

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
# Their first operand may have any dimensions before those that they work on.
_LEADING = {
    *(F.linear, F.embedding, F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm),
    *_PRODUCTS,
}
_JOINS = {torch.cat, torch.concat}


def rewrite_call(  # noqa: PLR0911
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, uses: bool
) -> Callable[[], Any] | None:
    """The same call by others, if it is one of those; what that gives is None if it can't be.

    Parameters
    ----------
    uses : bool
        Whether parameters go into it that are to be followed.
    """
    if func is F.multi_head_attention_forward:
        return lambda: multi_head_attention(*args, **kwargs)
    if not uses:
        return None
    if (respell := RESPELLED.get(func) or RECURRENT.get(func)) and (
        respelled := respell(*args, **kwargs)
    ):
        return respelled
    if func in _LEADING and isinstance(found := axis_of(args[0]), ExampleAxis):
        x, *others = args
        if x.ndim == 1 and func is not F.embedding:
            return lambda: func(x[None], *others, **kwargs)[0]
        if found.dim and x.ndim > 1 and (func not in _PRODUCTS or others[0].ndim == 2):
            return lambda: func(x.movedim(found.dim, 0), *others, **kwargs).movedim(0, found.dim)
    if func in _JOINS and args:
        dims = {f.dim for t in args[0] if isinstance(f := axis_of(t), ExampleAxis)}
        along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0][0].ndim
        if len(dims) == 1 and (dim := dims.pop()) > 0 and along != dim:
            moved = along + 1 if along < dim else along
            return lambda: func([t.movedim(dim, 0) for t in args[0]], moved).movedim(0, dim)
    return None


def multi_head_attention(  # noqa: PLR0913, PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # noqa: ARG001  (torch gives the mask with it)
) -> tuple[Tensor, Tensor | None] | None:
    """`F.multi_head_attention_forward`; None where it is used in a way that is not written here."""
    unusual = [bias_k, bias_v, static_k, static_v]
    if any(t is not None for t in unusual) or add_zero_attn or query.ndim != 3:
        return None
    if training and dropout_p:
        return None
    weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    if query is key and key is value and not use_separate_proj_weight:
        assert in_proj_weight is not None
        heads = F.linear(query.transpose(0, 1), in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        if not use_separate_proj_weight:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        heads = tuple(
            F.linear(x.transpose(0, 1), w, b)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    q, k, v = (h.reshape(*h.shape[:2], num_heads, -1).transpose(1, 2) for h in heads)
    mask = _mask(attn_mask, key_padding_mask, num_heads, q)
    attention = None
    if need_weights:
        logits = q @ k.mT / q.shape[-1] ** 0.5
        attention = torch.softmax(logits if mask is None else logits + mask, -1)
        found = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        found = F.scaled_dot_product_attention(q, k, v, mask)
    out = F.linear(found.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), attention


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, like: Tensor
) -> Tensor | None:
    """One additive mask that broadcasts over (batch, heads, queries, keys)."""
    masks = []
    if attn_mask is not None and attn_mask.ndim == 3:
        masks.append(attn_mask.reshape(-1, heads, *attn_mask.shape[1:]))
    elif attn_mask is not None:
        masks.append(attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    added = [
        torch.zeros(m.shape, dtype=like.dtype, device=like.device).masked_fill(m, -torch.inf)
        if m.dtype == torch.bool
        else m
        for m in masks
    ]
    return sum(added[1:], added[0]) if added else None
