"""Embeddings whose rows are stored in 8 or 4 bits; what they return is float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from eagerq import kernels
from eagerq.errors import (
    InvalidArgumentError,
    InvalidConfigError,
    InvalidInputError,
    UnsupportedError,
)
from eagerq.nn.quantized.base import IntegerWeight, quantize_weight
from eagerq.qconfig import float_qparams_weight_only_qconfig
from eagerq.qtensor import QTensor
from eagerq.scheme import integer_dtype, per_channel_affine_float_qparams, uint4

__all__ = ["Embedding", "EmbeddingBag"]

_Self = TypeVar("_Self", bound="Embedding")


def _check_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    stored = integer_dtype(dtype)
    if stored not in (torch.uint8, uint4):
        raise UnsupportedError(
            f"rows are stored in uint8 or uint4, not in {dtype}", module=module, remedy="pass torch.uint8"
        )
    return stored


def _within_norm(table: QTensor, max_norm: float, norm_type: float) -> QTensor:
    """The rows scaled down to ``max_norm`` where they exceed it: the integers stay, the scales shrink."""
    norms = torch.linalg.vector_norm(table.dequantize(), norm_type, dim=1)
    # 1e-7: as torch.nn.functional.embedding guards its own division
    factor = torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0)
    return QTensor(table.integers, table.scale * factor, table.zero_point, table.axis)


class Embedding(IntegerWeight):
    """:class:`torch.nn.Embedding` on rows of ``uint8`` or ``uint4``, each with a float scale and zero point.

    The state has ``weight`` (uint8 ``[num_embeddings, embedding_dim]``), ``weight_scale`` and
    ``weight_zero_point`` (float32 ``[num_embeddings]``).  Of 4 bits there are two values a byte, the first
    in the low half, so that the weight has ``ceil(embedding_dim / 2)`` columns.

    Args:
        num_embeddings, embedding_dim: rows and columns of the table.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: as for
            :class:`torch.nn.Embedding`.  All but ``padding_idx`` are for training; rows over
            ``max_norm`` are scaled down once, by :meth:`from_float`.
        _weight: the table; zeros when left out.
        dtype: ``torch.uint8`` or ``torch.uint4``.

    Raises:
        UnsupportedError: for rows of another dtype.
        InvalidConfigError: for a table that does not fit.

    Example:
        >>> import eagerq
        >>> rows, scale = torch.tensor([[0.0, 0.5], [1.0, 2.0]]), torch.tensor([0.5, 1.0])
        >>> table = eagerq.quantize_per_channel(rows, scale, torch.zeros(2), 0, torch.uint8)
        >>> Embedding(2, 2, _weight=table)(torch.tensor([1, 0]))
        tensor([[1.0000, 2.0000],
                [0.0000, 0.5000]])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: QTensor | None = None,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise InvalidArgumentError(
                f"padding_idx {padding_idx} is none of the {num_embeddings} rows",
                module=self,
                remedy="pass a row number",
            )
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.dtype = _check_dtype(self, dtype)
        if _weight is None:
            width = embedding_dim if self._columns is None else -(-embedding_dim // 2)
            integers = torch.zeros(num_embeddings, width, dtype=torch.uint8)
            self._store(integers, torch.ones(num_embeddings), torch.zeros(num_embeddings))
        else:
            self._store(*self._parts(_weight))

    @property
    def _columns(self) -> int | None:
        """How many 4-bit values a row has; None of whole bytes."""
        return self.embedding_dim if self.dtype is uint4 else None

    def weight(self) -> QTensor:
        """The table, a value to each ``uint8``."""
        integers = self._weight if self._columns is None else kernels.unpack_halves(self._weight, self._columns)
        return QTensor(integers, self._weight_scale, self._weight_zero_point, 0)

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super()._state_problems(state, prefix)
        weight = state.get(prefix + "weight")
        odd = self._columns is not None and self._columns % 2
        if (
            odd
            and isinstance(weight, Tensor)
            and weight.shape == self._weight.shape
            and bool((weight[:, -1] > 15).any())
        ):
            yield f"{prefix}weight has more than {self._columns} values of 4 bits in a row"

    def _parts(self, w: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Integers, scales and zero points of a table, checked."""
        if not isinstance(w, QTensor) or w.axis != 0 or w.integers.dtype is not torch.uint8:
            got = f"dtype {w.integers.dtype}, axis {w.axis}" if isinstance(w, QTensor) else type(w).__name__
            raise InvalidConfigError(
                f"the weight has to be a QTensor of torch.uint8 with a scale for each row (axis 0), got {got}",
                module=self,
                remedy="make it with eagerq.quantize_per_channel(w, scales, zero_points, 0, torch.uint8)",
            )
        wanted, rows = (self.num_embeddings, self.embedding_dim), (self.num_embeddings,)
        shapes = tuple(w.integers.shape), tuple(w.scale.shape), tuple(w.zero_point.shape)
        if shapes != (wanted, rows, rows):
            raise InvalidConfigError(
                f"the weight has shape {shapes[0]}, {shapes[1]} scales and {shapes[2]} zero points, but "
                f"{wanted} and {rows} were expected",
                module=self,
                remedy="pass a table of num_embeddings rows and embedding_dim columns",
            )
        integers = w.integers
        if self._columns is not None:
            if integers.numel() and int(integers.max()) > 15:
                raise InvalidConfigError(
                    f"the weight has values up to {int(integers.max())}, which 4 bits do not hold",
                    module=self,
                    remedy="quantize it to 0 … 15, or pass dtype=torch.uint8",
                )
            integers = kernels.pack_halves(integers)
        return integers, w.scale.to(torch.float32), w.zero_point.to(torch.float32)

    def set_weight(self, w: QTensor) -> None:
        """Adopt a table of quantized rows.

        Args:
            w: QTensor of ``uint8``, ``[num_embeddings, embedding_dim]``, per channel of axis 0.

        Raises:
            InvalidConfigError: for anything else.
        """
        self._weight, self._weight_scale, self._weight_zero_point = self._parts(w)

    def _check_indices(self, indices: Tensor) -> None:
        if indices.dtype not in (torch.int64, torch.int32):
            raise InvalidInputError(
                f"expected row numbers in int64 or int32, got {indices.dtype}",
                module=self,
                remedy="pass integer indices; no QuantStub belongs before an embedding",
            )

    def forward(self, indices: Tensor) -> Tensor:
        """Row numbers of any shape to float32 ``[*indices.shape, embedding_dim]``.

        Raises:
            InvalidInputError: for indices that are not int32 or int64.
            IndexError: for an index out of range.
        """
        self._check_indices(indices)
        table = (self._weight, self._weight_scale, self._weight_zero_point, self._columns)
        return kernels.embedding(indices, *table)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type")
        return {name: getattr(module, name) for name in (*names, "scale_grad_by_freq", "sparse")}

    @classmethod
    def from_float(
        cls: type[_Self], mod: nn.Module, use_precomputed_fake_quant: bool = False, as_trained: bool = False
    ) -> _Self:
        """The module of 8 or 4 bits that a QAT or float module stands for; ``mod`` is left as it is.

        Args:
            mod: a QAT module, or a float one with a ``qconfig``; one without ``weight`` means
                ``float_qparams_weight_only_qconfig``.
            use_precomputed_fake_quant: keep the weight range seen so far, without another look.
            as_trained: keep the scales of training (see :func:`eagerq.convert`).

        Raises:
            InvalidConfigError: for another class of module or another qscheme, or without a qconfig.
            UnsupportedError: when the rows are to be of another dtype than uint8 or uint4.
        """
        if not isinstance(mod, cls._FLOAT_MODULE):
            raise InvalidConfigError(
                f"nnq.{cls.__name__}.from_float only works for {cls._FLOAT_MODULE.__name__}, got {type(mod).__name__}",
                module=mod,
            )
        float_module: Any = mod
        trained = hasattr(mod, "weight_fake_quant")
        if trained:
            observer = float_module.weight_fake_quant
        elif hasattr(mod, "qconfig"):
            factory = getattr(mod.qconfig, "weight", None) or float_qparams_weight_only_qconfig.weight
            observer = factory().to(float_module.weight.device)
        else:
            raise InvalidConfigError("Input float module must have qconfig defined", module=mod)
        if observer.qscheme != per_channel_affine_float_qparams:
            raise InvalidConfigError(
                f"{cls.__name__} is quantized with torch.per_channel_affine_float_qparams only, got {observer.qscheme}",
                module=mod,
                remedy="set its qconfig to eagerq.float_qparams_weight_only_qconfig",
            )
        dtype = _check_dtype(mod, observer.dtype)
        refresh = not (trained and use_precomputed_fake_quant)
        table = quantize_weight(mod, float_module.weight.detach(), observer, as_trained, refresh)
        if float_module.max_norm is not None:
            table = _within_norm(table, float_module.max_norm, float_module.norm_type)
        return cls(**cls._arguments(mod), _weight=table, dtype=dtype)

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, "
            f"dtype={self.dtype}, qscheme={per_channel_affine_float_qparams}"
        )


class EmbeddingBag(Embedding):
    """:class:`torch.nn.EmbeddingBag` on rows of ``uint8`` or ``uint4``; state and errors as for :class:`Embedding`.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset, padding_idx: as for :class:`torch.nn.EmbeddingBag`.
        others: as for :class:`Embedding`.

    Example:
        >>> bags = EmbeddingBag(10, 4)(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 3]))
        >>> bags.shape
        torch.Size([2, 4])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "sum",
        sparse: bool = False,
        _weight: QTensor | None = None,
        include_last_offset: bool = False,
        dtype: torch.dtype = torch.uint8,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            dtype,
        )
        if mode not in ("sum", "mean", "max"):
            raise InvalidArgumentError(f"unknown mode {mode!r}", module=self, remedy="choose 'sum', 'mean' or 'max'")
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """The bags' rows put together.

        Args:
            indices: row numbers, int32 or int64: ``[n]`` with ``offsets``, or ``[bags, length]``.
            offsets: int32 or int64, where each bag starts in ``indices``.
            per_sample_weights: a factor for each index, shape of ``indices``; mode ``"sum"`` only.

        Returns:
            float32 ``[bags, embedding_dim]``; zeros for an empty bag.

        Raises:
            InvalidInputError: for indices that are not int32 or int64.
            InvalidArgumentError: for shapes that do not fit together.
            UnsupportedError: for ``per_sample_weights`` in another mode.
            IndexError: for an index out of range.
        """
        self._check_indices(indices)
        self._check_bags(indices, offsets, per_sample_weights)
        return kernels.embedding_bag(
            indices,
            self._weight,
            self._weight_scale,
            self._weight_zero_point,
            offsets,
            self.mode,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            self._columns,
        )

    def _check_bags(self, indices: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> None:
        fits = indices.dim() == 2 if offsets is None else indices.dim() == offsets.dim() == 1
        if not fits:
            got = "no offsets" if offsets is None else f"offsets of shape {tuple(offsets.shape)}"
            raise InvalidArgumentError(
                f"got indices of shape {tuple(indices.shape)} and {got}",
                module=self,
                remedy="pass 1-d indices with 1-d offsets, or 2-d indices alone, a bag in each row",
            )
        if per_sample_weights is None:
            return
        if self.mode != "sum":
            raise UnsupportedError(f"per_sample_weights with mode {self.mode!r}", module=self, remedy="use mode='sum'")
        if per_sample_weights.shape != indices.shape:
            raise InvalidArgumentError(
                f"per_sample_weights has shape {tuple(per_sample_weights.shape)}, indices {tuple(indices.shape)}",
                module=self,
                remedy="pass one weight for each index",
            )

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        options = {"mode": module.mode, "include_last_offset": module.include_last_offset}
        return {**super()._arguments(module), **options}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"
