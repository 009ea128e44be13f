"""Embeddings with fake-quantized rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.errors import InvalidConfigError
from eagerq.nn.qat.base import QATMixin
from eagerq.scheme import per_channel_affine_float_qparams

__all__ = ["Embedding", "EmbeddingBag"]


class _EmbeddingQAT(QATMixin):
    """What both have in common: a weight without a bias, each row with a float zero point."""

    _PARAMETERS = ("weight",)
    _TITLE: ClassVar[str]
    _OPTIONS: ClassVar[tuple[str, ...]]

    def _attach(self, qconfig: Any) -> None:
        super()._attach(qconfig)
        self._check_scheme(self, self.weight_fake_quant)

    @classmethod
    def _check_float(cls, mod: nn.Module) -> None:
        super()._check_float(mod)
        cls._check_scheme(mod, mod.qconfig.weight())  # type: ignore[union-attr, operator]

    @classmethod
    def _check_scheme(cls, module: nn.Module, fake_quant: Any) -> None:
        qscheme = getattr(fake_quant, "qscheme", None)
        if qscheme != per_channel_affine_float_qparams:
            raise InvalidConfigError(
                f"{cls._TITLE} weights requires a qscheme of torch.per_channel_affine_float_qparams, got {qscheme}",
                module=module,
                remedy="set its qconfig to eagerq.default_embedding_qat_qconfig",
            )

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
        arguments = {name: getattr(module, name) for name in (*names, "sparse", *cls._OPTIONS)}
        return {**arguments, "dtype": module.weight.dtype}

    def folded(self, as_trained: bool) -> tuple[Tensor, Tensor | None]:
        return self.weight.detach(), None

    def to_float(self) -> nn.Module:
        """The float module, with the trained weight."""
        plain: nn.Module = self._FLOAT_MODULE(**self._arguments(self), device="meta")
        plain.weight = nn.Parameter(self.weight.detach())
        return plain.train(self.training)


class Embedding(_EmbeddingQAT, nn.Embedding):
    """:class:`torch.nn.Embedding` whose rows are fake-quantized in ``forward``.

    Args:
        num_embeddings … sparse, device, dtype: as for :class:`torch.nn.Embedding`.
        qconfig: its ``weight`` makes the fake quantizer, with the qscheme
            ``per_channel_affine_float_qparams``.

    Raises:
        InvalidConfigError: without a qconfig, or for another qscheme.

    Example:
        >>> import torch
        >>> from eagerq.qconfig import default_embedding_qat_qconfig
        >>> layer = Embedding(10, 4, qconfig=default_embedding_qat_qconfig)
        >>> layer(torch.tensor([[1, 2, 1]])).shape
        torch.Size([1, 3, 4])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.Embedding
    _TITLE = "Embedding"
    _OPTIONS = ()

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
        qconfig: Any = None,
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
            device=device,
            dtype=dtype,
        )
        self._attach(qconfig)

    def forward(self, input: Tensor) -> Tensor:
        """Row numbers, int32 or int64 of any shape, to ``[*input.shape, embedding_dim]``."""
        return F.embedding(
            input,
            self.weight_fake_quant(self.weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class EmbeddingBag(_EmbeddingQAT, nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` whose rows are fake-quantized in ``forward``.

    Args:
        num_embeddings … padding_idx, device, dtype: as for :class:`torch.nn.EmbeddingBag`.
        qconfig: as for :class:`Embedding`.

    Raises:
        InvalidConfigError: without a qconfig, or for another qscheme.

    Example:
        >>> import torch
        >>> from eagerq.qconfig import default_embedding_qat_qconfig
        >>> layer = EmbeddingBag(10, 4, mode="sum", qconfig=default_embedding_qat_qconfig)
        >>> layer(torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])).shape
        torch.Size([2, 4])
    """

    _FLOAT_MODULE: ClassVar[Any] = nn.EmbeddingBag
    _TITLE = "Embedding Bag"
    _OPTIONS = ("mode", "include_last_offset")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device,
            dtype,
        )
        self._attach(qconfig)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Arguments as for :class:`torch.nn.EmbeddingBag`; the result is ``[bags, embedding_dim]``."""
        return F.embedding_bag(
            input,
            self.weight_fake_quant(self.weight),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
