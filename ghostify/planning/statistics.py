"""Second moments at a site, accumulated chunk by chunk, and the least-squares problems that they solve.

Products are taken in float32, sums are kept in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

_LARGEST_PART = 64_000_000
# Columns of a Gram matrix that are computed together: enough for the processor to run at its full speed.
_WIDE = 512
# Of float32 sums, as a share of their terms.
_ROUNDING = 1e-6
# Deviations between zero and a mean from which on it is taken off first: float32 has lost two of seven digits by then.
_FAR = 10
# Samples that tell it.
_FEW = 1_000


@dataclass(frozen=True)
class Window:
    """Which input pixels an output pixel of a convolution sees, in one to three dimensions.

    Attributes:
        kernel: Side lengths ``(h, w)``.
        stride: Steps ``(h, w)``.
        dilation: Distances of the taps ``(h, w)``.
        pads: Pixels before and after, last dimension first, as ``F.pad`` takes them: ``(left, right, top, bottom)``.
        mode: Padding mode as in ``nn.Conv2d``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    mode: str = "zeros"

    @staticmethod
    def of(conv: _ConvNd) -> Window:
        """The window of a plain convolution."""
        pads = tuple(conv._reversed_padding_repeated_twice)
        dims = len(conv.kernel_size)
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and len(conv.padding) == 1:
            pads *= dims  # one number counts for all sides
        stride, dilation = (tuple(some) * (dims // len(some)) for some in (conv.stride, conv.dilation))
        return Window(tuple(conv.kernel_size), stride, dilation, pads, conv.padding_mode)

    @staticmethod
    def depthwise(side: int, dims: int) -> Window:
        """The window of a cheap operation with kernels of the given side."""
        ones = (1,) * dims
        return Window((side,) * dims, ones, ones, (side // 2,) * (2 * dims))

    def size_after(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size ``(h, w)``."""
        padded = (side + sum(self.pads[2 * i : 2 * i + 2]) for side, i in zip(size, reversed(range(len(size)))))
        return tuple(
            (side - dilation * (kernel - 1) - 1) // stride + 1
            for side, dilation, kernel, stride in zip(padded, self.dilation, self.kernel, self.stride, strict=True)
        )

    def patches(self, x: Tensor, pixels: Tensor) -> Tensor:
        """What the given output pixels see.

        Args:
            x: ``(b, c, …)``.
            pixels: Flat indices of output pixels, ``(p,)``.

        Returns:
            ``(b·p, c, k)`` with the ``k`` taps in the order of a flattened kernel.
        """
        mode = "constant" if self.mode == "zeros" else self.mode
        padded = F.pad(x, self.pads, mode=mode) if any(self.pads) else x
        size = padded.shape[2:]
        strides = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
        taps = torch.tensor(
            [
                sum(tap * dilation * stride for tap, dilation, stride in zip(at, self.dilation, strides, strict=True))
                for at in product(*map(range, self.kernel))
            ],
            device=x.device,
        )
        place = torch.unravel_index(pixels, self.size_after(tuple(x.shape[2:])))
        corners = torch.zeros_like(pixels)
        for at, step, stride in zip(place, self.stride, strides, strict=True):
            corners += at * step * stride
        index = (corners[:, None] + taps).flatten()
        b, c = x.shape[:2]
        gathered = padded.flatten(2).gather(2, index.expand(b, c, -1))  # five times as fast as index_select
        return gathered.view(b, c, len(pixels), len(taps)).transpose(1, 2).reshape(b * len(pixels), c, len(taps))


def at_pixels(maps: Tensor, pixels: Tensor) -> Tensor:
    """The values of maps ``(b, n, …)`` at flat pixel indices ``(p,)``, as ``(b·p, n)``."""
    return maps.flatten(2).gather(2, pixels.expand(*maps.shape[:2], -1)).transpose(1, 2).flatten(0, 1)


def in_parts(pixels: Tensor, numbers_per_pixel: int) -> Iterator[Tensor]:
    """Pixel indices in parts, so that the patches of a part hold at most 64 million numbers (256 MB)."""
    limit = max(1, _LARGEST_PART // numbers_per_pixel)
    for start in range(0, len(pixels), limit):
        yield pixels[start : start + limit]


def sample_pixels(maps: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Flat indices of some pixels of maps ``(b, n, …)``; at least one, all of them if ``share ≥ 1``."""
    total = math.prod(maps.shape[2:])
    count = min(total, max(1, round(total * share)))
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    return chosen.to(maps.device)


def channel_means(maps: Iterable[Tensor]) -> Tensor:
    """Mean of every channel of maps ``(b, n, …)`` over all examples and pixels, ``(n,)`` in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for numbers in map(_by_channel, maps):
        examples, _, pixels = numbers.shape
        total = total + pixels * numbers.mean(2).double().sum(0)
        count += examples * pixels
    return total / count


def channel_moments(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over all examples and pixels, ``(n,)`` each, in float64."""
    total = square = torch.zeros((), dtype=torch.float64)
    count = 0
    for numbers in map(_by_channel, maps):
        examples, _, pixels = numbers.shape
        mean = numbers.mean(2, keepdim=True)
        about = (numbers - mean).square_().sum(2).double()  # several times faster than torch.var_mean, and as exact
        total = total + pixels * mean.double().sum((0, 2))
        square = square + (about + pixels * mean.double().square().squeeze(2)).sum(0)
        count += examples * pixels
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0)


def _by_channel(maps: Tensor) -> Tensor:
    """``(b, n, …)`` as ``(b, n, pixels)``, in float32 at least."""
    return (maps if maps.dtype == torch.float64 else maps.float()).flatten(2)


@dataclass
class Moments:
    """Sums over samples of features ``A`` ``(rows, p)`` and targets ``Y`` ``(rows, t)``, in float64.

    What lies far from zero for its spread is counted from near its mean: else its variance would be lost in the
    rounding of the products.

    Attributes:
        rows: Samples seen.
        gram: ``Aᵀ A``, ``(p, p)``.
        cross: ``Aᵀ Y``, ``(p, t)``.
        sum_a: Sum of features ``(p,)``.
        sum_y: Sum of targets ``(t,)``.
        origin_a: What was taken off the features before ``(p,)``, 0 for most.
        origin_y: The same of the targets ``(t,)``.
    """

    rows: int
    gram: Tensor
    cross: Tensor
    sum_a: Tensor
    sum_y: Tensor
    origin_a: Tensor
    origin_y: Tensor

    @staticmethod
    def of(pairs: Iterable[tuple[Tensor, Tensor]], onto: Moments | None = None) -> Moments:
        """Accumulate pairs of ``(rows, p)`` and ``(rows, t)``, or of batches of them ``(k, rows, ·)``.

        Args:
            pairs: Part after part.
            onto: Sums to add them to; changed in place.
        """
        total = onto
        for features, wanted in pairs:
            a, y = features.float(), wanted.float()
            if total is None:
                origins = _origin(a), _origin(y)
                total = Moments._of_part(a, y, *origins)
            else:
                part = Moments._of_part(a, y, total.origin_a, total.origin_y)
                total = total._with(part)
        assert total is not None  # callers hold at least one chunk
        return total

    @staticmethod
    def _of_part(a: Tensor, y: Tensor, origin_a: Tensor, origin_y: Tensor) -> Moments:
        a, y = _counted_from(a, origin_a), _counted_from(y, origin_y)
        transposed, ones = a.transpose(-2, -1), a.new_ones(1, a.shape[-2])
        return Moments(
            a.shape[-2],
            _gram(a).double(),
            (transposed @ y).double(),
            (ones @ a).squeeze(-2).double(),  # several times faster than a sum over this dimension
            (ones @ y).squeeze(-2).double(),
            origin_a,
            origin_y,
        )

    def _with(self, part: Moments) -> Moments:
        return Moments(
            self.rows + part.rows,
            self.gram.add_(part.gram),
            self.cross.add_(part.cross),
            self.sum_a + part.sum_a,
            self.sum_y + part.sum_y,
            self.origin_a,
            self.origin_y,
        )

    @property
    def mean_a(self) -> Tensor:
        """Of the features, ``(p,)``."""
        return self.sum_a / self.rows + self.origin_a

    @property
    def mean_y(self) -> Tensor:
        """Of the targets, ``(t,)``."""
        return self.sum_y / self.rows + self.origin_y

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariances: ``gram`` and ``cross`` per sample, with the means taken out."""
        mean_a, mean_y = self.sum_a / self.rows, self.sum_y / self.rows
        gram = self.gram / self.rows - mean_a.unsqueeze(-1) * mean_a.unsqueeze(-2)
        # Where features hardly vary, what is left is the rounding of float32 products; it must not be divided by.
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1) / self.rows
        gram = gram + torch.diag_embed(_ROUNDING * diagonal.mean(-1, keepdim=True).expand_as(diagonal))
        cross = self.cross / self.rows - mean_a.unsqueeze(-1) * mean_y.unsqueeze(-2)
        return gram, cross

    def plain(self) -> tuple[Tensor, Tensor]:
        """``gram`` and ``cross`` per sample, with the means left in."""
        gram, cross = self.gram / self.rows, self.cross / self.rows
        if bool(self.origin_a.any()) or bool(self.origin_y.any()):
            near_a, near_y = self.sum_a / self.rows, self.sum_y / self.rows
            gram += _outer(self.mean_a, self.mean_a) - _outer(near_a, near_a)
            cross += _outer(self.mean_a, self.mean_y) - _outer(near_a, near_y)
        return gram, cross


def _origin(values: Tensor) -> Tensor:
    """Near the mean of what lies far from zero for its spread, else 0: of ``(…, rows, p)``, ``(…, p)`` in float64."""
    some = values[..., :: math.ceil(values.shape[-2] / _FEW), :]
    mean = some.mean(-2)
    square = some.square().mean(-2)
    far = mean.square() > _FAR**2 * (square - mean.square()).clamp_min(0)
    return torch.where(far & (mean != 0), mean, 0).double()


def _counted_from(values: Tensor, origin: Tensor) -> Tensor:
    return values - origin.to(values).unsqueeze(-2) if bool(origin.any()) else values


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _gram(a: Tensor) -> Tensor:
    """``Aᵀ A`` of ``(…, rows, p)``; of a wide matrix only one of the two halves that mirror each other is computed."""
    width = a.shape[-1]
    if width <= _WIDE:
        a = a.contiguous()  # of many narrow matrices, products of strided ones take several times as long
        return a.transpose(-2, -1) @ a
    gram = a.new_empty(*a.shape[:-2], width, width)
    for start in range(0, width, _WIDE):
        stop = start + _WIDE
        rows = a[..., start:stop].transpose(-2, -1) @ a[..., start:]
        gram[..., start:stop, start:] = rows
        gram[..., start:, start:stop] = rows.transpose(-2, -1)
    return gram


def ridge_solve(gram: Tensor, cross: Tensor, ridge: float, prior: Tensor | None = None) -> Tensor:
    """Minimise ``‖A x − Y‖² + λ‖x − prior‖²``, with ``λ`` the given share of the mean of ``gram``'s diagonal.

    Args:
        gram: ``(…, p, p)``.
        cross: ``(…, p, t)``.
        ridge: Share, > 0.
        prior: ``(…, p, t)``, zero by default.

    Returns:
        ``(…, p, t)``.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    strength = ridge * diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    damped = gram + torch.diag_embed(strength.expand_as(diagonal))
    right = cross if prior is None else cross + strength.unsqueeze(-1) * prior
    solved: Tensor = torch.linalg.solve(damped, right)
    return solved
