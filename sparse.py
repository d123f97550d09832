"""Sparse convolution, from first principles.   (reads after: voxelize.py   next: backbone.py)

dims: V occupied sites (voxels) · C channels · K taps of a kernel (3 x 3 x 3 = 27) · P pairs of a rule book ·
      B scans · D, H, W grid along z, y, x

A LiDAR grid is 99.9 % empty. Instead of a dense (B, C, D, H, W) array we keep the list of occupied sites, coords
(V, 4) = [batch, z, y, x], and one feature row for each, (V, C). A convolution is a sum over taps,

    out[o] = sum over taps k of  in[stride * o + k - padding] @ W[k]

and a term is zero when its input site is empty. So all we need is the list of the terms that are not: the *rule
book*, triples (tap k, row of the input site, row of the output site). In one dimension, kernel 3, taps -1 0 +1:

    cell        0   1   2   3   4   5   6          sites a b c at 1, 2, 5
    sites       .   a   b   .   .   c   .

    submanifold: outputs = inputs (the set of sites stays as it is, however many layers follow)
        out[a] = W[0] a + W[+1] b          tap -1: (a -> b)
        out[b] = W[-1] a + W[0] b          tap  0: (a -> a) (b -> b) (c -> c)
        out[c] = W[0] c                    tap +1: (b -> a)

    strided (stride 2, padding 1): an output wherever at least one tap meets a site; output o is centred on cell 2 o
        cell        0       1       2       3      outputs 0 1 2 3 (all four see a site: the set has grown)
        out[0] = W[+1] a     out[1] = W[-1] a + W[0] b     out[2] = W[+1] c     out[3] = W[-1] c

To apply a rule book: gather the input rows of all pairs, one matrix product per tap, add up the products at their
output rows. Its gradients use the same list backwards. Layers on the same sites share one rule book, and so do two
networks that look at the same voxels (`SparseTensor.rules`): a student reuses its teacher's.

On CUDA, where spconv is installed, the same layers hand their weights to spconv's fused kernels instead (`engine`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Triple = tuple[int, int, int]

# "auto": spconv for features on CUDA when it can be imported, else the code in this file; "torch" | "spconv": always
engine = "auto"


@dataclass(frozen=True)
class SparseTensor:
    """Features at the occupied sites of a grid."""

    features: Tensor  # (V, C)
    coords: Tensor  # (V, 4) int64 [batch, z, y, x], sorted, no site twice
    shape: Triple  # (D, H, W)
    batch_size: int
    rules: dict = field(default_factory=dict)  # rule books of these sites; pass another tensor's to share them

    def __post_init__(self) -> None:
        owner = self.rules.setdefault("sites", self.coords)
        if owner is not self.coords and not torch.equal(owner, self.coords):
            raise ValueError("`rules` belong to another set of sites")

    def replace(self, features: Tensor) -> "SparseTensor":
        """The same sites and rule books with other features (V, any C)."""
        return replace(self, features=features)

    def dense(self) -> Tensor:
        """(B, C, D, H, W), zero at the empty sites."""
        n = self.batch_size * math.prod(self.shape)
        dense = self.features.new_zeros(n, self.features.shape[1])
        dense = dense.index_copy(0, site_keys(self.coords, self.shape), self.features)
        return dense.view(self.batch_size, *self.shape, -1).permute(0, 4, 1, 2, 3).contiguous()


@dataclass
class RuleBook:
    """Which input rows meet which output rows under which tap."""

    coords: Tensor  # (V_out, 4) output sites, sorted
    shape: Triple  # of the output grid
    src: Tensor  # (P,) row of the input, tap after tap
    dst: Tensor  # (P,) row of the output
    taps: list[int]  # taps that have pairs
    counts: list[int]  # how many, in the same order
    into_src: tuple[Tensor, Tensor]  # the pairs of each input row (see `group`)
    into_dst: tuple[Tensor, Tensor]  # the pairs of each output row
    centre: int | None = None  # the tap that maps every site to itself: needs no pairs, its product is features @ W
    rules: dict = field(default_factory=dict)  # of the tensor on the output sites


class SparseConv3d(nn.Module):
    """Sparse convolution whose outputs are all sites that at least one tap reaches; strides as in nn.Conv3d.

    kernel_size, stride, padding: int or (z, y, x). The weight has spconv's layout, (out, kz, ky, kx, in).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        stride: int | Triple = 1,
        padding: int | Triple = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = triple(kernel_size), triple(stride), triple(padding)
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel_size, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = (in_channels * math.prod(self.kernel_size)) ** -0.5  # PyTorch's and spconv's default
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """(V, in) -> (V_out, out)."""
        book = self.rule_book(x)
        features, weight = x.features, self.weight.flatten(1, 3).permute(1, 2, 0).contiguous()  # (K, in, out)
        device = features.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        with torch.autocast(device, enabled=False):
            features = SparseConvolution.apply(features.to(dtype), weight.to(dtype), book)
        if self.bias is not None:
            features = features + self.bias.to(dtype)
        return SparseTensor(features, book.coords, book.shape, x.batch_size, book.rules)

    def rule_book(self, x: SparseTensor) -> RuleBook:
        key = ("strided", self.kernel_size, self.stride, self.padding)
        if key not in x.rules:
            x.rules[key] = strided_rules(x.coords, x.shape, self.kernel_size, self.stride, self.padding)
        return x.rules[key]

    def extra_repr(self) -> str:
        out_channels, *_, in_channels = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class SubMConv3d(SparseConv3d):
    """Submanifold convolution (Graham & van der Maaten 2017): the output sites are the input sites; odd kernels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Triple = 3, bias: bool = False) -> None:
        kernel = triple(kernel_size)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"a submanifold kernel has a centre: sizes must be odd, found {kernel}")
        super().__init__(in_channels, out_channels, kernel, 1, tuple(k // 2 for k in kernel), bias)

    def rule_book(self, x: SparseTensor) -> RuleBook:
        key = ("submanifold", self.kernel_size)
        if key not in x.rules:
            x.rules[key] = submanifold_rules(x.coords, x.shape, self.kernel_size)
            x.rules[key].rules = x.rules  # same sites, same rule books
        return x.rules[key]


def triple(value: int | Triple) -> Triple:
    return (value, value, value) if isinstance(value, int) else tuple(value)


# ------------------------------------------------------------------------------------------------ rule books


def site_keys(coords: Tensor, shape: Triple, gap: Triple = (0, 0, 0)) -> Tensor:
    """One int64 per site, rising with (batch, z, y, x). `gap`: empty cells after each row, column and scan."""
    depth, height, width = (n + g for n, g in zip(shape, gap, strict=True))
    b, z, y, x = coords.long().unbind(1)
    return ((b * depth + z) * height + y) * width + x


def submanifold_rules(coords: Tensor, shape: Triple, kernel: Triple) -> RuleBook:
    """The pairs (neighbour -> site) for every neighbour that is occupied.

    Sites are sorted, so a neighbour is found by binary search; two facts save most of the searches:
    - the taps of one kernel row are neighbouring keys: one search finds the first, the others follow it in the list;
    - if b is a's neighbour under tap +k, then a is b's under tap -k: half of the taps are searched, half mirrored.
    With as many empty cells after each row as the kernel reaches, the key of a neighbour outside the grid is the key of
    no site, so borders need no test.
    """
    reach = tuple(k // 2 for k in kernel)
    key = site_keys(coords, shape, gap=reach)
    if not (key[1:] > key[:-1]).all():
        raise ValueError("coords must be sorted by (batch, z, y, x), each site once")
    height, width = shape[1] + reach[1], shape[2] + reach[2]
    centre = math.prod(kernel) // 2
    padded = torch.cat([key, key.new_full((1,), -1)])  # a search may end behind the last key

    sites, neighbours, taps = [], [], []
    for tap in range(centre - reach[2], math.prod(kernel), kernel[2]):  # rows of the kernel, from the central one on
        dz, dy = tap // (kernel[1] * kernel[2]) - reach[0], tap // kernel[2] % kernel[1] - reach[1]
        target = key + ((dz * height + dy) * width - reach[2])  # key of the neighbour under the row's first tap
        place = torch.searchsorted(key, target)
        for step in range(kernel[2]):
            found = padded[place] == target + step
            if tap + step > centre:
                site = found.nonzero()[:, 0]
                sites.append(site)
                neighbours.append(place[site])
                taps.append(tap + step)
            place = place + found
    # first all pairs of the taps after the centre, then the mirrored ones: tap -k has k's pairs, the other way round
    src, dst = torch.cat(neighbours + sites), torch.cat(sites + neighbours)
    counts = [len(s) for s in sites] * 2
    taps += [2 * centre - tap for tap in taps]
    into_dst = group(dst, len(key))
    into_src = ((into_dst[0] + len(src) // 2) % max(len(src), 1), into_dst[1])
    return RuleBook(coords, shape, src, dst, taps, counts, into_src, into_dst, centre)


def strided_rules(coords: Tensor, shape: Triple, kernel: Triple, stride: Triple, padding: Triple) -> RuleBook:
    """The pairs (site -> output) for every output cell that at least one tap connects with a site."""
    out_shape = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding, strict=True))
    if min(out_shape) < 1:
        raise ValueError(f"a grid of {shape} cells is too small for kernel {kernel} with padding {padding}")
    # Along one axis: site z meets output o under tap k when stride * o + k - padding = z
    output, meets = [], []  # per axis and tap, (V,): which output, and whether there is one
    for site, n, k, s, p in zip(coords[:, 1:].long().unbind(1), out_shape, kernel, stride, padding, strict=True):
        shifted = [site + p - tap for tap in range(k)]
        output.append([z.div(s, rounding_mode="floor") for z in shifted])
        meets.append([(z % s == 0) & (z >= 0) & (z < n * s) for z in shifted])
    sources, keys, taps = [], [], []
    for kz in range(kernel[0]):
        for ky in range(kernel[1]):
            meets_zy = meets[0][kz] & meets[1][ky]
            row = (coords[:, 0] * out_shape[0] + output[0][kz]) * out_shape[1] + output[1][ky]
            for kx in range(kernel[2]):
                site = (meets_zy & meets[2][kx]).nonzero()[:, 0]
                sources.append(site)
                keys.append(row[site] * out_shape[2] + output[2][kx][site])
    counts = [len(s) for s in sources]
    taps = [tap for tap, count in enumerate(counts) if count]
    key, dst = torch.cat(keys).unique(return_inverse=True)  # sorted
    src = torch.cat(sources)
    row, slab = key // out_shape[2], key // (out_shape[1] * out_shape[2])
    out_coords = torch.stack([slab // out_shape[0], slab % out_shape[0], row % out_shape[1], key % out_shape[2]], 1)
    return RuleBook(out_coords, out_shape, src, dst, taps, [c for c in counts if c], group(src, len(coords)), group(dst, len(key)))


def group(row: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Pairs listed by row: `order` (P,) and where each row's pairs begin in it, (n_rows,)."""
    counts = torch.bincount(row, minlength=n_rows)
    return row.argsort(stable=True), counts.cumsum(0) - counts


# ------------------------------------------------------------------------------------------------ the convolution


class SparseConvolution(torch.autograd.Function):
    """Gather -> matmul -> scatter, and its gradients: features (V, in), weight (K, in, out), book -> (V_out, out)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, book: RuleBook) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.book = book
        return apply_taps(features, weight, book, book.src, book.into_dst)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (features, weight), book = ctx.saved_tensors, ctx.book
        grad = grad.contiguous()
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:  # out = sum W[k] in, so in's gradient = sum W[k]^T out's, over the same pairs
            grad_features = apply_taps(grad, weight.transpose(1, 2), book, book.dst, book.into_src)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            inputs = features.index_select(0, book.src).split(book.counts)
            outputs = grad.index_select(0, book.dst).split(book.counts)
            for tap, x, g in zip(book.taps, inputs, outputs, strict=True):
                torch.mm(x.T, g, out=grad_weight[tap])
            if book.centre is not None:
                torch.mm(features.T, grad, out=grad_weight[book.centre])
        return grad_features, grad_weight, None


def apply_taps(x: Tensor, weight: Tensor, book: RuleBook, rows: Tensor, into: tuple[Tensor, Tensor]) -> Tensor:
    """(rows of x) @ weight[tap] for all pairs, summed into their rows of the result."""
    gathered = x.index_select(0, rows)  # (P, in)
    products = x.new_empty(len(rows), weight.shape[2])  # (P, out)
    for tap, a, b in zip(book.taps, gathered.split(book.counts), products.split(book.counts), strict=True):
        torch.mm(a, weight[tap], out=b)
    order, begin = into
    # embedding_bag sums each row's products in a fixed order: repeatable, and several times faster than index_add_
    out = F.embedding_bag(order, products, begin, mode="sum") if len(rows) else products.new_zeros(len(begin), weight.shape[2])
    return out if book.centre is None else out.addmm_(x, weight[book.centre])
