"""Multi-head attention made of linear layers, each with an observer of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.errors import InvalidConfigError, InvalidInputError
from eagerq.nn.qat.base import hand_over
from eagerq.nn.quantizable.parts import average, cat, prepare_parts, qconfig_of, zeros
from eagerq.nn.quantized.functional_modules import FloatFunctional
from eagerq.nn.quantized.linear import Linear
from eagerq.qtensor import QTensor, quantize_per_tensor
from eagerq.stubs import DeQuantStub, QuantStub

__all__ = ["UNUSED", "MultiheadAttention"]

# the float module's own projections: prepared checkpoints have them, linear_Q and its like are used
UNUSED = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _real(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer in float, whether it is int8 or not."""
    if isinstance(layer, Linear):
        return layer.weight().dequantize(), layer.bias()
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


class MultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` made of linear layers: ``prepare`` puts it in its place.

    Projections run on integers when converted, softmax and the two products around it on real
    numbers.  Same arguments, inputs and results as :class:`torch.nn.MultiheadAttention`.

    Example:
        >>> mha = MultiheadAttention(embed_dim=8, num_heads=2)
        >>> x = torch.randn(5, 3, 8)
        >>> y, weights = mha(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([5, 3, 8]), torch.Size([3, 5, 5]))
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.MultiheadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: Any = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, **where
        )
        for name in UNUSED:
            value = getattr(self, name)
            if value is not None:
                value.requires_grad_(False)
        self.linear_Q = nn.Linear(embed_dim, embed_dim, bias=bias, **where)
        self.linear_K = nn.Linear(self.kdim, embed_dim, bias=bias, **where)
        self.linear_V = nn.Linear(self.vdim, embed_dim, bias=bias, **where)
        self.out_proj: Any = nn.Linear(embed_dim, embed_dim, bias=bias, **where)
        self.q_scaling_product = FloatFunctional()
        self.quant_attn_output, self.quant_attn_output_weights = QuantStub(), QuantStub()
        self.dequant_q, self.dequant_k, self.dequant_v = DeQuantStub(), DeQuantStub(), DeQuantStub()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of each query to all keys.

        Args:
            query: ``[L, N, embed_dim]``, with ``batch_first`` ``[N, L, embed_dim]``; or one sequence
                ``[L, embed_dim]``.
            key, value: laid out as ``query``: ``[S, N, kdim]`` and ``[S, N, vdim]``.
            key_padding_mask: ``[N, S]``, boolean (True: a key to ignore) or float (added to the scores).
            need_weights: whether to return the attention weights too.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``, boolean or float as above.
            average_attn_weights: average the weights over the heads.
            is_causal: says that ``attn_mask`` is the causal one; the mask itself is what counts.

        Returns:
            The attended values, laid out as ``query``, and the weights ``[N, L, S]`` (with all heads
            ``[N, num_heads, L, S]``) or None.

        Raises:
            InvalidInputError: for sizes that do not fit, or ``is_causal`` without a mask.
        """
        batched = query.dim() == 3
        query, key, value = (self._time_first(x, batched) for x in (query, key, value))
        self._check(query, key, value, attn_mask, key_padding_mask, is_causal)
        length, batch = query.shape[:2]
        q = self.q_scaling_product.mul_scalar(self.linear_Q(query), float(self.head_dim) ** -0.5)
        k, v = self._extended(self.linear_K(key), self.bias_k), self._extended(self.linear_V(value), self.bias_v)
        q, k, v = self.dequant_q(self._heads(q)), self.dequant_k(self._heads(k)), self.dequant_v(self._heads(v))
        scores = torch.bmm(q, k.transpose(1, 2))
        scores = self._masked(scores, batch, attn_mask, key_padding_mask)
        weights = F.dropout(F.softmax(scores, dim=-1), self.dropout, self.training)
        y = torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, self.embed_dim)
        y = self.out_proj(self.quant_attn_output(y))
        weights = self.quant_attn_output_weights(weights)
        if not batched:
            y = y.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = weights.view(batch, self.num_heads, length, weights.shape[-1])
        weights = average(weights, 1) if average_attn_weights else weights
        return y, (weights if batched else weights.squeeze(0))

    def _time_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Refuse sizes that do not fit one another."""

        def require(fits: bool, problem: str, remedy: str) -> None:
            if not fits:
                raise InvalidInputError(problem, module=self, remedy=remedy)

        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            fits = x.dim() == 3 and x.shape[2] == width
            require(fits, f"the {name} has shape {tuple(x.shape)}, expected {width} features", "check kdim and vdim")
        (length, batch, _), (source, key_batch, _) = query.shape, key.shape
        require(
            batch == key_batch and key.shape[:2] == value.shape[:2],
            f"lengths and batch sizes of query, key, value are {[tuple(x.shape[:2]) for x in (query, key, value)]}",
            "give all one batch size, and keys and values one length",
        )
        require(
            not is_causal or attn_mask is not None,
            "is_causal=True without attn_mask",
            "pass the causal mask itself as attn_mask",
        )
        shapes = ((length, source), (batch * self.num_heads, length, source))
        require(
            attn_mask is None or tuple(attn_mask.shape) in shapes,
            f"attn_mask has shape {() if attn_mask is None else tuple(attn_mask.shape)}",
            f"make it {shapes[0]}, or {shapes[1]} for each sample and head",
        )
        require(
            key_padding_mask is None or key_padding_mask.numel() == batch * source,
            f"key_padding_mask has shape {() if key_padding_mask is None else tuple(key_padding_mask.shape)}",
            f"make it {(batch, source)}",
        )

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with those of ``add_bias_kv`` and ``add_zero_attn`` behind them, ``[S, N, embed_dim]``."""
        batch = x.shape[1]
        if bias is not None:
            bias = bias.expand(1, batch, -1)
            if isinstance(x, QTensor):
                bias = quantize_per_tensor(bias.detach(), x.scale, x.zero_point, x.integers.dtype)
            x = cat([x, bias], 0)
        if self.add_zero_attn:
            x = cat([x, zeros(x, (1, *x.shape[1:]))], 0)
        return x

    def _heads(self, x: Tensor) -> Tensor:
        """``[length, batch, embed_dim]`` to ``[batch * heads, length, head_dim]``."""
        return x.reshape(x.shape[0], x.shape[1] * self.num_heads, self.head_dim).transpose(0, 1)

    def _masked(self, scores: Tensor, batch: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """Scores ``[batch * heads, L, S]`` with both masks on them; keys put behind are seen by all."""
        for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            mask = F.pad(mask, (0, scores.shape[-1] - mask.shape[-1]))
            if is_padding:
                mask = mask.reshape(batch, 1, 1, -1).expand(batch, self.num_heads, 1, -1).reshape(len(scores), 1, -1)
            if mask.is_floating_point():
                scores = scores + mask
            else:
                scores = scores.masked_fill(mask.bool(), float("-inf"))
        return scores

    def _get_name(self) -> str:
        return "QuantizableMultiheadAttention"

    @classmethod
    def from_float(cls, other: nn.Module) -> MultiheadAttention:
        """The prepared twin of a :class:`torch.nn.MultiheadAttention`: to calibrate, or in training mode to train.

        The projections of query, key and value are copied, all else is shared.

        Raises:
            InvalidConfigError: for another class of module, or one without a qconfig.
        """
        if type(other) is not cls._FLOAT_MODULE:
            raise InvalidConfigError(
                f"Expected type {cls._FLOAT_MODULE.__name__}, got {type(other).__name__}", module=other
            )
        source: Any = other
        config = qconfig_of(other)
        observed = cls(**cls._arguments(source), bias=source.in_proj_bias is not None, device="meta")
        for name in UNUSED:
            value = getattr(source, name)
            if value is not None:
                setattr(observed, name, nn.Parameter(value.detach(), requires_grad=False))
        observed.bias_k, observed.bias_v = source.bias_k, source.bias_v
        hand_over(source.out_proj, observed.out_proj, "weight", "bias")
        observed._take_projections(source)
        observed.train(other.training)
        prepare_parts(observed, config)
        return observed

    @staticmethod
    def _arguments(module: Any) -> dict[str, Any]:
        """Constructor arguments that rebuild the shape of a module, but for ``bias``."""
        names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
        return {**{name: getattr(module, name) for name in names}, "add_bias_kv": module.bias_k is not None}

    def _take_projections(self, source: Any) -> None:
        separate = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        weights = source.in_proj_weight.chunk(3) if source.in_proj_weight is not None else separate
        bias = source.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        for name, values in (("weight", weights), ("bias", biases)):
            for layer, part in zip((self.linear_Q, self.linear_K, self.linear_V), values, strict=True):
                copied = None if part is None else nn.Parameter(part.detach().clone(), part.requires_grad)
                setattr(layer, name, copied)

    @torch.no_grad()
    def dequantize(self) -> nn.MultiheadAttention:
        """The float module that a prepared or converted one stands for, with the weights as they are in it.

        Example:
            >>> mha = MultiheadAttention(8, 2)
            >>> type(mha.dequantize()) is nn.MultiheadAttention
            True
        """
        parts = [_real(layer) for layer in (self.linear_Q, self.linear_K, self.linear_V)]
        out_weight, out_bias = _real(self.out_proj)
        bias = parts[0][1] is not None
        plain = nn.MultiheadAttention(
            **self._arguments(self), bias=bias, device=out_weight.device, dtype=out_weight.dtype
        )
        new = {"out_proj.weight": out_weight, "bias_k": self.bias_k, "bias_v": self.bias_v}
        if plain.in_proj_weight is not None:
            new["in_proj_weight"] = torch.cat([weight for weight, _ in parts])
        else:
            new |= {f"{name}_proj_weight": weight for name, (weight, _) in zip("qkv", parts, strict=True)}
        if bias:
            new |= {
                "in_proj_bias": torch.cat([part for _, part in parts if part is not None]),
                "out_proj.bias": out_bias,
            }
        plain.load_state_dict({name: value for name, value in new.items() if value is not None})
        return plain.train(self.training)
