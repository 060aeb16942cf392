"""Attention for training on a CPU, at short lengths or with weights dropped: few passes over memory, in the fast number format.

    A = softmax(s Q Kᵀ + b),   out = D(A) V,   D dropout

    dV = D(A)ᵀ dO,   dA = D(dO Vᵀ),   dS = A ∘ (dA − rowsum(dA ∘ A)),   dQ = s dS K,   dK = s dSᵀ Q

A is kept in the format of Q and the mask of D in a byte; D(A) is made again. Eager attention adds an fp32 mask and so goes on
in fp32, with three such matrices kept; SDPA's kernel recomputes A block by block, but has no dropout, for which SDPA goes the way of
eager attention. Grouped heads read their keys and values in place. Which of the three runs is chosen once for a phase
(`probe.choose`), at its median length. A longer call is right here, too; in fp32, without dropout and with more than `LONG`
keys, it goes to SDPA, whose kernel is ahead there.

Shapes: B rows, T queries, S keys, H heads, N heads of keys and values, D features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paretune import anatomy
from paretune.step import dropout

NAME = "paretune_short"  # in transformers' table
LONG = 384  # keys beyond which SDPA's kernel is ahead, where it runs: in fp32, without dropout and without a gradient for the bias
VECTOR = 32  # numbers of bf16 in a vector of 512 bits
LEAST = -3e38  # stands for minus infinity, in bf16 too; a row without any key then averages all of them, as eager attention does


def _short_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """The output (B, T, H, D) of queries (B, H, T, D), keys and values (B, N, S, D); the mask is additive, as eager attention takes it."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    biases = [b for b in (kwargs.get("position_bias"), mask) if b is not None]
    bias = None if not biases else sum(biases[1:], biases[0]).clamp(min=LEAST).to(dtype)
    scale, p = kwargs.get("scaling"), kwargs.get("dropout", 0.0) if module.training else 0.0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    k = min(round(dropout.STEPS * p), dropout.STEPS - 1)
    if key.shape[2] > LONG and dtype == torch.float32 and not k and not (bias is not None and bias.requires_grad):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
        return out.transpose(1, 2).contiguous(), None
    return _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), bias, scale, k), None


class _Attention(torch.autograd.Function):
    """What the module's docstring says; k of 2^16 weights are dropped."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, k: int) -> Tensor:
        (rows, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
        q, k_, v = (x.reshape(rows * groups, -1, width) for x in (query, key, value))  # (B·N, H/N·T or S, D)
        if bias is None:
            scores = torch.bmm(q, k_.mT).mul_(scale)
        else:
            scores = bias.expand(rows, heads, length, keys).reshape(q.shape[0], -1, keys).baddbmm(q, k_.mT, alpha=scale)
        weights = scores.to(_wide(scores)).softmax(-1).to(scores.dtype)  # (B·N, H/N·T, S)
        ctx.mask = dropout.mask(weights.shape, k) if k else None
        ctx.scale, ctx.kept, ctx.shapes = scale, dropout.STEPS / (dropout.STEPS - k), (query.shape, key.shape, None if bias is None else bias.shape)
        ctx.save_for_backward(q, k_, v, weights)
        out = torch.bmm(_dropped(weights, ctx), v)
        return out.view(rows, heads, length, width).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, weights = ctx.saved_tensors
        of_query, of_key, of_bias = ctx.shapes
        gradient = gradient.transpose(1, 2).reshape(q.shape)
        d_value = torch.bmm(_dropped(weights, ctx).mT, gradient)
        d_weights = _dropped(torch.bmm(gradient, v.mT), ctx)
        wide = _wide(weights)
        d_scores = torch._softmax_backward_data(d_weights.to(wide), weights.to(wide), -1, wide).to(weights.dtype)
        d_query, d_key = torch.bmm(d_scores, k).mul_(ctx.scale), torch.bmm(d_scores.mT, q).mul_(ctx.scale)
        d_bias = d_scores.view(*of_query[:3], -1).sum_to_size(of_bias) if ctx.needs_input_grad[3] else None
        return d_query.view(of_query), d_key.view(of_key), d_value.view(of_key), d_bias, None, None


def _wide(x: Tensor) -> torch.dtype:
    """The format of a softmax over the last dimension: at least fp32 where S is less than a vector of bf16, whose kernels are then several times slower."""
    return torch.promote_types(x.dtype, torch.float32) if x.shape[-1] < VECTOR else x.dtype


def _dropped(weights: Tensor, ctx: Any) -> Tensor:
    return weights if ctx.mask is None else dropout.masked(weights, ctx.mask, scale=ctx.kept)


anatomy.register_attention(NAME, _short_attention, masks="eager")
