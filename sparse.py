"""Sparse convolution, from first principles.   (reads after: voxelize.py   next: backbone.py)

dims: B scans · V occupied sites (voxels) · C channels · D, H, W cells along z, y, x ·
      K taps of a kernel (3 x 3 x 3 = 27) · P pairs of a rule book

A LiDAR grid is 99.9 % empty. Instead of a dense (B, C, D, H, W) array we keep the list of the occupied sites,
coords (V, 4) = [batch, z, y, x], and a row of features for each, (V, C). A convolution is a sum over taps,

    out[o] = sum over taps k of  in[stride * o + k - padding] @ W[k]

and a term is zero where its input site is empty. All we need is the list of the other terms, the *rule book*:
triples (tap, row of the input site, row of the output site). In one dimension, kernel 3 with the taps - 0 +:

    cell      0   1   2   3   4   5   6
    input     .   a   b   .   .   c   .        three sites

    submanifold: the outputs are the input sites; the set does not grow, however many layers follow
    output    .   A   B   .   .   C   .        tap -: a>B      tap 0: a>A b>B c>C      tap +: b>A
                                               A = a W[0] + b W[+]    B = a W[-] + b W[0]    C = c W[0]
    strided (stride 2, padding 1): an output wherever a tap meets a site; output o is centred on cell 2 o
    output    E       F       G       H        tap -: a>F c>H  tap 0: b>F              tap +: a>E c>G
                                               E = a W[+]    F = a W[-] + b W[0]    G = c W[+]    H = c W[-]
                                               (three sites became four: such a kernel dilates)

A layer applies its rule book: gather the input rows of a tap's pairs, multiply them by the tap's weight, sum
all products into their output rows. The gradients walk the same list the other way. Layers on the same sites
share one rule book, and so do two networks that see the same voxels: a student reuses its teacher's.
On CUDA, where spconv is installed, the same layers hand their weights to its fused kernels (see `engine`).
"""

import math
import threading
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from voxelize import cell_dtype, split_keys

Triple = tuple[int, int, int]

# Who computes: "torch" = this file, "spconv" = spconv, "auto" = spconv where it is installed and the features
# are on CUDA, else this file. The state_dict is the same, and so are the results, to rounding.
engine = "auto"


@dataclass(frozen=True)
class SparseTensor:
    """Features at the occupied sites of a grid."""

    features: Tensor  # (V, C)
    coords: Tensor  # (V, 4) integer [batch, z, y, x], sorted, no site twice (as `voxelize` returns them)
    shape: Triple  # (D, H, W)
    batch_size: int
    rules: dict = field(default_factory=dict)  # see `RuleBook.rules`; pass another tensor's to share its rule books

    def __post_init__(self) -> None:
        coords, shape = self.rules.setdefault("sites", (self.coords, self.shape))
        if shape != self.shape or not (coords is self.coords or torch.equal(coords, self.coords)):
            raise ValueError("these `rules` belong to other sites")

    def replace(self, features: Tensor) -> "SparseTensor":
        """The same sites and rule books with other features (V, any C)."""
        return replace(self, features=features)

    def dense(self) -> Tensor:
        """(B, C, D, H, W), zero at the empty sites; in memory (B, H, W, C, D).

        That order is channels_last once z is folded into the channels by flatten(1, 2), which copies nothing.
        """
        b, z, y, x = self.coords.clone().long().unbind(1)  # a copy: autograd cannot save what inference mode made
        depth, height, width = self.shape
        dense = self.features.new_zeros(self.batch_size, height, width, self.features.shape[1], depth)
        dense[b, y, x, :, z] = self.features
        return dense.permute(0, 3, 4, 1, 2)


class SparseConv3d(nn.Module):
    """Sparse convolution whose outputs are all cells that at least one tap connects with a site.

    kernel_size, stride, padding: int or (z, y, x), with the meaning they have in nn.Conv3d.
    weight (out, kz, ky, kx, in): spconv's layout, so its checkpoints load as they are. bias (out,) or None.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Triple, stride: int | Triple = 1,
                 padding: int | Triple = 0, bias: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size, self.stride, self.padding = triple(kernel_size), triple(stride), triple(padding)
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel_size, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = (in_channels * math.prod(self.kernel_size)) ** -0.5  # PyTorch's default for convolutions
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """(V, in) -> (V_out, out)."""
        device = x.features.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.features.dtype
        if spconv_runs(x, dtype, math.prod(self.kernel_size)):
            return spconv_forward(self, x, dtype)
        book = self.rule_book(x)
        taps = self.weight.flatten(1, 3).permute(1, 2, 0).to(dtype).contiguous()  # (K, in, out)
        features = SparseConvolution.apply(x.features.to(dtype), taps, book)
        if self.bias is not None:
            features = features + self.bias.to(dtype)
        if book.centre is not None:
            return x.replace(features)
        return SparseTensor(features, book.coords, book.shape, x.batch_size, book.rules)

    def rule_book(self, x: SparseTensor) -> "RuleBook":
        """The layer's rule book on the sites of x: made by the first layer that asks, found by the others."""
        key = ("strided", self.kernel_size, self.stride, self.padding)
        if key not in x.rules:
            x.rules[key] = strided_rules(x.coords, x.shape, self.kernel_size, self.stride, self.padding)
        return x.rules[key]

    def extra_repr(self) -> str:
        out_channels, *_, in_channels = self.weight.shape
        return f"{in_channels}, {out_channels}, {self.kernel_size}, {self.stride}, {self.padding}"


class SubMConv3d(SparseConv3d):
    """Submanifold convolution (Graham, van der Maaten 2017): the outputs are the input sites. Odd kernels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Triple = 3, bias: bool = False) -> None:
        kernel = triple(kernel_size)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"a submanifold kernel needs a centre: odd sizes, found {kernel}")
        super().__init__(in_channels, out_channels, kernel, 1, tuple(k // 2 for k in kernel), bias)

    def rule_book(self, x: SparseTensor) -> "RuleBook":
        key = ("submanifold", self.kernel_size)
        if key not in x.rules:
            x.rules[key] = submanifold_rules(x.coords, x.shape, self.kernel_size)
        return x.rules[key]


def triple(value: int | Triple) -> Triple:
    return (value, value, value) if isinstance(value, int) else tuple(value)


# ------------------------------------------------------------------------------------------ rule books


@dataclass
class RuleBook:
    """Which input rows meet which output rows under which tap."""

    coords: Tensor  # (V_out, 4) output sites, sorted
    shape: Triple  # of the output grid
    taps: list[int]  # the taps that have pairs
    counts: list[int]  # how many pairs each of them has; P in all
    src: Tensor  # (P,) int32: input row of every pair, tap after tap
    dst: Tensor  # (P,) int32: output row of every pair
    into_src: tuple[Tensor, Tensor]  # the pairs listed by input row (see `group`), for the gradient
    into_dst: tuple[Tensor, Tensor]  # the pairs listed by output row
    centre: int | None = None  # submanifold: the tap of the site itself; it has no pairs and needs no gather
    # strided: `SparseTensor.rules` of the output, {"sites": ..., (kind, kernel, ...): RuleBook}: a tree, one level a stride
    rules: dict = field(default_factory=dict)


def submanifold_rules(coords: Tensor, shape: Triple, kernel: Triple) -> RuleBook:
    """The pairs (occupied neighbour -> site).

    Sites are sorted, so a neighbour is found by binary search, and most searches can be saved:
    - the taps of a kernel row are consecutive keys: search the first, the others follow it in the list or are
      empty; in the central row nothing is searched, the neighbours follow the site itself;
    - if b is a's neighbour under tap +k, a is b's under tap -k: half of the taps are searched, half mirrored.
    A 3 x 3 x 3 kernel takes 4 searches instead of 26. Cells are numbered as if each row, plane and scan
    were followed by as many empty cells as the kernel reaches: no neighbour beyond a border has a site's number.
    """
    reach = tuple(k // 2 for k in kernel)
    depth, height, width = (n + r for n, r in zip(shape, reach, strict=True))
    key = site_keys(coords, (depth, height, width))
    if not (key[1:] > key[:-1]).all():
        raise ValueError("coords must be sorted by (batch, z, y, x), each site once; `voxelize` sorts")
    ended = torch.cat([key, key.new_full((1,), -1)])  # a search may end behind the last key
    dz, dy, dx = (range(-r, r + 1) for r in reach)
    offsets = [(z * height + y) * width + x for z in dz for y in dy for x in dx]  # from a site's key, per tap
    centre = len(offsets) // 2
    taps, sites, neighbours = [], [], []
    for row in range(centre - reach[2], len(offsets), kernel[2]):  # the rows' first taps
        if row <= centre:  # the central row
            place = torch.arange(1, len(key) + 1, device=key.device)
        else:
            place = torch.searchsorted(key, key + offsets[row])
        for tap in range(max(row, centre + 1), row + kernel[2]):
            found = ended.index_select(0, place) == key + offsets[tap]
            site = found.nonzero()[:, 0]
            if len(site):
                taps.append(tap)
                sites.append(site)
                neighbours.append(place.index_select(0, site))
            place = place + found
    # Those are the pairs of the taps after the centre; turned round, of those before it: k and k + half mirror each other.
    near, far = (torch.cat([key.new_zeros(0), *rows]).int() for rows in (neighbours, sites))
    half = len(near)
    order, begin = group(torch.cat([far, near]), len(key))
    return RuleBook(
        coords,
        shape,
        taps=taps + [2 * centre - tap for tap in taps],
        counts=[len(site) for site in sites] * 2,
        src=torch.cat([near, far]),
        dst=torch.cat([far, near]),
        into_src=(torch.where(order < half, order + half, order - half), begin),  # of the turned-round pairs
        into_dst=(order, begin),
        centre=centre,
    )


def strided_rules(coords: Tensor, shape: Triple, kernel: Triple, stride: Triple, padding: Triple) -> RuleBook:
    """The pairs (site -> output) for every output that at least one tap connects with a site."""
    axes = list(zip(shape, kernel, stride, padding, strict=True))
    out_shape = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in axes)
    if min(out_shape) < 1:
        raise ValueError(f"a grid of {shape} cells is smaller than the kernel {kernel}, padding {padding}")
    # Per axis, tap and cell: the output o with stride * o + tap - padding = cell, -1 where there is none.
    dtype, tables = cell_dtype(int(coords[-1, 0]) + 1 if len(coords) else 0, out_shape), []
    for m, (n, k, s, p) in zip(out_shape, axes, strict=True):
        cell, tap = (torch.arange(count, device=coords.device) for count in (n, k))
        o = (shifted := cell + p - tap[:, None]) // s
        tables.append(torch.where((o * s == shifted) & (o >= 0) & (o < m), o, -1).to(dtype))  # (k, n)
    b, z, y, x = coords.to(dtype).unbind(1)
    sources, keys = [], []
    for out_z in tables[0]:
        in_plane, plane = connected(out_z, z, b * out_shape[0])
        for out_y in tables[1]:
            in_row, row = connected(out_y, y.index_select(0, in_plane), plane * out_shape[1])
            sites = in_plane.index_select(0, in_row)
            x_row, before = x.index_select(0, sites), row * out_shape[2]
            for out_x in tables[2]:
                source, key = connected(out_x, x_row, before)
                sources.append(sites.index_select(0, source))
                keys.append(key)
    # One sort names the outputs and lists the pairs of each: equal keys come to lie side by side.
    key, order = torch.cat(keys).sort(stable=True)
    key, output, pairs = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    src = torch.cat(sources).int()
    return RuleBook(
        split_keys(key, out_shape),
        out_shape,
        taps=[tap for tap, source in enumerate(sources) if len(source)],
        counts=[len(source) for source in sources if len(source)],
        src=src,
        dst=torch.empty_like(src).index_copy_(0, order, output.int()),
        into_src=group(src, len(coords)),
        into_dst=(order, pairs.cumsum(0) - pairs),
    )


def connected(output: Tensor, cell: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Which sites, at `cell` along an axis, a tap brings to an output: their rows, and before + that output."""
    output = output.index_select(0, cell)
    row = (output >= 0).nonzero()[:, 0]
    return row, (before + output).index_select(0, row)


def site_keys(coords: Tensor, shape: Triple) -> Tensor:
    """(V,) int64: the number of each site's cell, rising with (batch, z, y, x)."""
    b, z, y, x = coords.long().unbind(1)
    return ((b * shape[0] + z) * shape[1] + y) * shape[2] + x


def group(row: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Pairs listed by row: (P,) the pairs of row 0, then of row 1, ...; (n_rows,) where each row's begin."""
    counts = torch.bincount(row, minlength=n_rows)
    return row.argsort(stable=True), counts.cumsum(0) - counts


# ------------------------------------------------------------------------------------------ the convolution


class SparseConvolution(torch.autograd.Function):
    """features (V, in), weight (K, in, out), rule book -> (V_out, out), and its gradients. Over all pairs:

    out[dst] += features[src] @ W   d_features[src] += d_out[dst] @ W^T   d_W += features[src]^T @ d_out[dst]
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, book: RuleBook) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.book = book
        products = scratch(len(book.src), weight.shape[2], features)
        pairs = (rows.split(book.counts) for rows in (book.src, products))
        # tap after tap: what was gathered is still in the cache when it is multiplied
        for tap, src, product in zip(book.taps, *pairs, strict=True):
            torch.mm(features.index_select(0, src), weight[tap], out=product)
        out = sum_into(products, *book.into_dst)
        return out if book.centre is None else out.addmm_(features, weight[book.centre])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (features, weight), book = ctx.saved_tensors, ctx.book
        for_features, for_weight, _ = ctx.needs_input_grad
        grad_features, grad_weight = None, torch.zeros_like(weight)
        products = scratch(len(book.src), weight.shape[1], grad)
        pairs = (rows.split(book.counts) for rows in (book.src, book.dst, products))
        for tap, src, dst, product in zip(book.taps, *pairs, strict=True):
            grads = grad.index_select(0, dst)
            if for_features:
                torch.mm(grads, weight[tap].T, out=product)
            if for_weight:
                torch.mm(features.index_select(0, src).T, grads, out=grad_weight[tap])
        if for_features:
            grad_features = sum_into(products, *book.into_src)
            if book.centre is not None:
                grad_features.addmm_(grad, weight[book.centre].T)
        if for_weight and book.centre is not None:
            torch.mm(features.T, grad, out=grad_weight[book.centre])
        return grad_features, grad_weight if for_weight else None, None


def sum_into(products: Tensor, order: Tensor, begin: Tensor) -> Tensor:
    """(P, C) -> (V, C): the sum of each row's pairs; `order`, `begin` as from `group`."""
    if not len(order):
        return products.new_zeros(len(begin), products.shape[1])
    # adds a row's pairs one after the other: the same bits in every run, and 3 times the speed of index_add_
    return F.embedding_bag(order, products, begin, mode="sum")


_kept = threading.local()


def scratch(rows: int, channels: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, channels) buffer, valid until the next call.

    On the CPU it is kept: products are the largest arrays of all, and taking fresh pages from the operating
    system for each costs more than all the arithmetic of a layer of 16 channels.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, channels)
    kept = _kept.__dict__.get(like.dtype)
    if kept is None or len(kept) < rows * channels:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to in training
            kept = _kept.__dict__[like.dtype] = torch.empty(rows * channels, dtype=like.dtype)
    return kept[: rows * channels].view(rows, channels)


# ------------------------------------------------------------------------------------------ spconv, on CUDA


@cache
def find_spconv() -> ModuleType | None:
    """spconv.pytorch if it is installed with CUDA kernels, else None; says once what is missing."""
    try:
        import spconv.pytorch as spconv
        from spconv.cppconstants import CPU_ONLY_BUILD as no_kernels
        if not no_kernels:
            return spconv
        reason = "this one is built for CPUs"
    except ImportError as error:  # also of a library that it needs
        reason = str(error)
    warnings.warn(f"no spconv with CUDA kernels ({reason}): sparse layers run in PyTorch", stacklevel=2)
    return None


def spconv_runs(x: SparseTensor, dtype: torch.dtype, taps: int) -> bool:
    """Whether spconv computes a layer. It takes no empty list, no float64; its 1x1x1 layout is another."""
    if engine == "torch" or not len(x.coords) or dtype not in (torch.float32, torch.float16) or taps == 1:
        return False
    return engine == "spconv" or (x.features.is_cuda and find_spconv() is not None)


def spconv_forward(layer: SparseConv3d, x: SparseTensor, dtype: torch.dtype) -> SparseTensor:
    """`layer` on spconv's kernels, with the layer's own parameters."""
    import spconv.pytorch as spconv

    submanifold = isinstance(layer, SubMConv3d)
    theirs = layer.__dict__.get("_spconv")  # not in the module tree: parameters and state_dict stay ours
    if theirs is None:
        # It stays in training mode: in eval mode it records no gradient, and its rule books cannot serve one.
        out_channels, *kernel, in_channels = layer.weight.shape
        theirs = layer.__dict__["_spconv"] = (spconv.SubMConv3d if submanifold else spconv.SparseConv3d)(
            in_channels, out_channels, kernel, layer.stride, layer.padding, bias=layer.bias is not None,
            indice_key=str(layer.kernel_size) if submanifold else None,  # strided ones it cannot share
        )  # fmt: skip
    theirs.weight, theirs.bias = layer.weight, layer.bias
    if "spconv sites" not in x.rules:
        x.rules["spconv sites"] = x.coords.int().contiguous()
    sites, books = x.rules["spconv sites"], x.rules.get("spconv books", {}) if submanifold else {}
    with torch.autocast(x.features.device.type, dtype=dtype, enabled=dtype == torch.float16):
        features = x.features.to(dtype)
        y = theirs(spconv.SparseConvTensor(features, sites, list(x.shape), x.batch_size, indice_dict=books))
    if submanifold:
        x.rules["spconv books"] = y.indice_dict  # a copy of `books`, with this kernel's
        return x.replace(y.features)
    # Its outputs come in no fixed order: sort. What lies below them is shared as usual.
    key, order = site_keys(y.indices, shape := tuple(y.spatial_shape)).sort()
    below = x.rules.setdefault(("spconv", layer.kernel_size, layer.stride, layer.padding), {})
    coords = below["sites"][0] if below else split_keys(key, shape)
    return SparseTensor(y.features.index_select(0, order), coords, shape, x.batch_size, below)
