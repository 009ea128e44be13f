"""An observer that keeps a histogram and cuts the tails that would cost more than they are worth."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, MutableMapping
from ctypes import c_float
from functools import cache
from itertools import accumulate, islice, repeat
from operator import add, sub
from typing import Any

import torch
from torch import Tensor

from eagerq.errors import UnsupportedError
from eagerq.observer.base import DEFAULT_EPS, UniformQuantizationObserverBase, fill_empty_bounds
from eagerq.scheme import integer_type, per_tensor_affine

__all__ = ["HistogramObserver"]

# The search gives up this share of the values at a time.
_STEP = 1e-5
# Wider ranges are refused: float32 could not hold their width.
_WIDEST = 2.0**127
# float32 counts exactly up to here, so a larger tensor is counted in parts.
_EXACT_COUNT = 2**24


class HistogramObserver(UniformQuantizationObserverBase):
    """Histogram of all batches seen, and the range that quantizes it with the least squared error.

    The histogram spans the smallest to the largest value so far; a batch outside of it widens the
    range and spreads the old counts over the new bins.  When parameters are asked for, the range is
    narrowed from both ends, a hundred-thousandth of the values at a time and on the side where this
    gives up more bins, as long as the expected squared error of quantizing the histogram (each bin's
    values spread evenly) keeps falling.  This is the L2 ``NonlinearQuantizationParamsSearch`` of Caffe2
    (caffe2/quantization/server/norm_minimization.cc).  Scale and zero point of the narrowed range
    follow :func:`eagerq.functional.affine_qparams` or :func:`~eagerq.functional.symmetric_qparams`.

    Infinities are dropped from a batch; a batch with a NaN, or one that would make the range wider
    than 2**127, is skipped.  Both are counted in ``nonfinite_batches``.  Observing and asking for the
    parameters read the device.

    Args:
        bins: number of bins of the histogram.
        others: as for :class:`~eagerq.observer.UniformQuantizationObserverBase`; per-tensor schemes
            only.

    Example:
        >>> import torch
        >>> observer = HistogramObserver()
        >>> _ = observer(torch.special.ndtri(torch.linspace(1e-6, 1 - 1e-6, 100_001)))  # normal
        >>> observer.min_val, observer.max_val
        (tensor(-4.7534), tensor(4.7508))
        >>> observer.calculate_qparams()  # of the range from -4.02 to 4.74
        (tensor([0.0343]), tensor([117]))
    """

    histogram: Tensor

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.uint8,
        qscheme: Any = per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = DEFAULT_EPS,
        is_dynamic: bool = False,
    ) -> None:
        if is_dynamic:
            raise UnsupportedError(f"{type(self).__name__} does not support dynamic quantization")
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self._require(per_channel=False, qscheme=qscheme)
        kind = integer_type(self.dtype)
        self.bins = bins
        # all that the dtype can tell apart, even when quant_min and quant_max use less
        self.dst_nbins = kind.maximum - kind.minimum + 1
        self.upsample_rate = 16
        kwargs = dict(factory_kwargs or {})
        self.register_buffer("histogram", torch.zeros(bins, **kwargs))
        self.register_buffer("min_val", torch.tensor(torch.inf, **kwargs))
        self.register_buffer("max_val", torch.tensor(-torch.inf, **kwargs))

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take a batch into account and return it unchanged."""
        if x_orig.numel():
            self._observe(x_orig.detach().float())
        return x_orig

    def _observe(self, x: Tensor) -> None:
        low, high, old_low, old_high = self._ranges(x)
        finite = math.isfinite(low) and math.isfinite(high)
        if not finite:
            self.nonfinite_batches += 1
            x = x[~x.isinf()]
            if x.numel() == 0:
                return
            low, high, *_ = self._ranges(x)
        low, high = min(low, old_low), max(high, old_high)
        if not high - low < _WIDEST:  # a NaN, or too wide
            self.nonfinite_batches += finite
            return
        counts = _count(x, self.bins, low, high).to(self.histogram.device)
        if old_low <= old_high:
            old = self.histogram
            if (low, high) != (old_low, old_high):
                old = self._spread(old_low, old_high, low, high).to(old.device)
            counts = counts + old
        self.histogram.copy_(counts)
        self.min_val.fill_(low)
        self.max_val.fill_(high)

    def _ranges(self, x: Tensor) -> tuple[float, float, float, float]:
        """Range of ``x``, and the range so far, in one read of the device."""
        so_far = self.min_val.to(x), self.max_val.to(x)
        low, high, old_low, old_high = torch.stack([*torch.aminmax(x), *so_far]).tolist()
        return low, high, old_low, old_high

    def _spread(self, old_low: float, old_high: float, low: float, high: float) -> Tensor:
        """The histogram so far, over the bins of a wider range; computed on the host."""
        old = self.histogram.float().cpu()
        if old_low == old_high:
            one = torch.tensor([old_low], dtype=torch.float32, device="cpu")
            return _count(one, self.bins, low, high) * old.sum()
        # in units of a power of two near the width, so that denormal ranges keep their digits
        unit = math.ldexp(1.0, -math.frexp(high - low)[1])
        old_low, old_high, low, high = old_low * unit, old_high * unit, low * unit, high * unit
        parts = self.bins * self.upsample_rate
        edges = torch.linspace(old_low, old_high, parts + 1, dtype=torch.float32, device="cpu")
        width = (edges[-1] - edges[0]) / parts
        centers = edges[:-1] + 0.5 * width
        bounds = torch.linspace(low, high, self.bins + 1, dtype=torch.float32, device="cpu")
        places = (torch.bucketize(centers, bounds, right=True) - 1).clamp_(0, self.bins - 1)
        shares = (old / self.upsample_rate).repeat_interleave(self.upsample_rate)
        return torch.bincount(places, weights=shares, minlength=self.bins)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the narrowed range; 1 and 0 before data. Reads the device."""
        low, high = self.min_val, self.max_val
        range_so_far = torch.stack([low, high]).tolist()
        if range_so_far[0] < range_so_far[1]:
            first, last = self._search(range_so_far[1] - range_so_far[0])
            width = (high - low) / self.bins
            low, high = low + width * first, low + width * (last + 1)
        return self._qparams_of(low, high)

    def _search(self, span: float) -> tuple[int, int]:
        """First and last bin of the range with the least error that the narrowing meets."""
        histogram = self.histogram.float().cpu()
        # Power-of-two units leave every comparison as it is, and keep cubes from over- and underflow.
        width = math.frexp(span / self.bins)[0]
        best, chosen = math.inf, (0, self.bins - 1)
        narrowed = _narrow(histogram)
        # A few at a time: most searches end soon, and to share larger tensors out to threads takes
        # longer than the work.
        chunk = min(8, max(1, 2**14 // self.bins))
        while candidates := list(islice(narrowed, chunk)):
            for error, candidate in zip(_errors(histogram, width, candidates, self.dst_nbins), candidates, strict=True):
                if error > best:
                    return chosen
                best, chosen = error, candidate
        return chosen

    def reset_min_max_vals(self) -> None:
        self.histogram.zero_()
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        fill_empty_bounds(state, prefix)
        super()._upgrade_state(state, prefix, version)


def _count(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Histogram of ``x`` over ``[low, high]``: float32 ``[bins]``."""
    if (high - low) * bins >= _WIDEST:  # histc multiplies a distance by the number of bins
        unit = math.ldexp(1.0, -64)
        x, low, high = x * unit, low * unit, high * unit
    counts = [torch.histc(part, bins, min=low, max=high) for part in torch.split(x.flatten(), _EXACT_COUNT)]
    return torch.stack(counts).sum(0) if len(counts) > 1 else counts[0]


@cache
def _levels() -> tuple[array[float], array[float]]:
    """Shares of the values at which the lower and the upper end stand after 0, 1, 2 … steps."""
    steps = repeat(_STEP, round(1 / _STEP) + 1)
    lower = array("d", accumulate(steps, add, initial=0.0))
    steps = repeat(_STEP, round(1 / _STEP) + 1)
    return lower, array("d", accumulate(steps, sub, initial=1.0))


def _narrow(histogram: Tensor) -> Iterator[tuple[int, int]]:
    """Ever narrower ranges, each as its first and last bin.

    Both ends have a level, the share of values that lies below them.  A step moves one end's level by
    ``_STEP``: the end that would thereby pass more bins.  Levels meet float32 counts as float32.
    """
    below = torch.cumsum(histogram, 0).tolist()
    total = histogram.sum().item()

    def count_at(level: float) -> float:
        return c_float(level * total).value

    lower, upper = _levels()
    i = j = 0
    first, last = 0, len(below) - 1
    while first < last and lower[i] < upper[j]:
        next_first = bisect_left(below, count_at(lower[i + 1]), first, last)
        next_last = max(first, bisect_right(below, count_at(upper[j + 1]), first, last + 1) - 1)
        if next_first - first > last - next_last:
            i, first = i + 1, next_first
        elif next_last < last:
            j, last = j + 1, next_last
        else:  # neither end moves before the upper level has sunk below the last bin
            j = bisect_right(upper, -below[last], j + 2, key=lambda level: -count_at(level)) - 1
            continue
        yield first, last


def _errors(histogram: Tensor, width: float, candidates: list[tuple[int, int]], levels: int) -> Iterator[float]:
    """Squared error of quantizing the histogram to ``levels`` values over each candidate range.

    A source bin from ``begin`` to ``end`` meets the targets ``low`` to ``high``; a target stands for
    the values within half a target's width, and the outermost for all beyond them.  The error is the
    integral of the squared distance to the target over the piece in the first target, those between,
    and the piece in the last.  Rounds as a float32 loop over the candidates does, operation for operation.
    """
    steps = [[width * (last - first + 1) / levels] for first, last in candidates]
    start = torch.tensor([[first] for first, _ in candidates], dtype=torch.float32, device="cpu")
    step = torch.tensor(steps, dtype=torch.float32, device="cpu")
    bins = torch.arange(len(histogram), dtype=torch.float32, device="cpu")
    half = step / 2
    begin = (bins - start) * width
    end = begin + width
    low = torch.div(begin, step, rounding_mode="floor").clamp_(0, levels - 1)
    high = torch.div(end, step, rounding_mode="floor").clamp_(0, levels - 1)
    density = histogram / width

    error = density * _square_integral(begin - (low + 0.5) * step, half)
    error += (high - low - 1) * (density * _square_integral(-half, half))
    error += density * _square_integral(-half, end - (high * step + half))
    for row in error.unbind():  # each for itself: a joint reduction would sum in another order
        yield row.sum().item()


def _square_integral(begin: Tensor, end: Tensor) -> Tensor:
    return (end * end * end - begin * begin * begin) / 3
