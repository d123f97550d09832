"""Sparse convolution on CPU: against spconv's CPU wheel.   (subject: sparse.py, backbone.py   next: boxes.py)

    python -m benchmarks.sparse

Every layer of the 8x encoder that has a rule book of its own, and the two whole encoders (SECOND's plain, CenterPoint's
residual), forward and forward + backward, on a KITTI frame (0.05 m) and nuScenes' ten merged sweeps (0.1 m). Rule books are
made anew in every call, as a training step does. spconv's CPU wheel is used in the only way in which it is right: one thread
(with two, its index pairs race), contiguous coordinates, training mode, and its backward given a CUDA stream object that it
asks for and does not use. So in the rows of two threads ours has two and spconv one. Both have the same weights;
the notes state the largest difference of outputs and of gradients, relative to the largest value; and what bounds ours: the
pairs of the rule book, and the share of this machine's own matrix rate, measured here, that the call's multiply-adds reach.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from backbone import ResidualBlock, SparseBlock, VoxelEncoder
from benchmarks import Row, compare, run
from benchmarks.voxels import kitti_cloud, nuscenes_cloud, one_scan
from cli import run_cli
from presets import cp_voxel, second
from sparse import SparseConv3d, SparseTensor, SubMConv3d, site_keys
from voxelize import Grid, voxelize


def matrix_rate(threads: int) -> float:
    """Multiply-adds a second of a large float32 product, the best of 5."""
    torch.set_num_threads(threads)
    a, times = torch.randn(1536, 1536), []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return len(a) ** 3 / min(times)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference over the largest value of all: a bias before a norm has no gradient but rounding's."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / max(float(b.abs().max()) for b in theirs)


# ------------------------------------------------------------------------------------------ spconv's twin


def theirs_of(module: nn.Module) -> nn.Module:
    """The same layer or stack of layers in spconv's own modules, on the same parameters."""
    import spconv.pytorch as spconv

    if isinstance(module, SparseConv3d):
        out_channels, *kernel, in_channels = module.weight.shape
        kind = spconv.SubMConv3d if isinstance(module, SubMConv3d) else spconv.SparseConv3d
        conv = kind(in_channels, out_channels, kernel, module.stride, module.padding, bias=module.bias is not None)
        conv.weight, conv.bias = module.weight, module.bias
        return conv
    if isinstance(module, SparseBlock):
        return spconv.SparseSequential(theirs_of(module.conv), batch_norm(module.norm), nn.ReLU())
    if isinstance(module, ResidualBlock):
        return SpconvResidual(module)
    return nn.Sequential(*[theirs_of(part) for part in module.children()])


def batch_norm(ours: nn.Module) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(ours.weight), ours.eps, ours.momentum)
    norm.weight, norm.bias = ours.weight, ours.bias
    return norm


class SpconvResidual(nn.Module):
    """backbone.ResidualBlock on spconv's tensors."""

    def __init__(self, ours: ResidualBlock) -> None:
        super().__init__()
        self.conv1, self.norm1 = theirs_of(ours.conv1), batch_norm(ours.norm1)
        self.conv2, self.norm2 = theirs_of(ours.conv2), batch_norm(ours.norm2)

    def forward(self, x: Any) -> Any:
        y = self.conv1(x)
        y = self.conv2(y.replace_feature(torch.relu(self.norm1(y.features))))
        return y.replace_feature(torch.relu(self.norm2(y.features) + x.features))


def share(encoder: nn.Module) -> None:
    """One rule book for all submanifold layers between two strided ones."""
    import spconv.pytorch as spconv

    stage = 0
    for conv in encoder.modules():
        if isinstance(conv, spconv.SubMConv3d):
            conv.indice_key = f"stage {stage}"
        elif isinstance(conv, spconv.SparseConv3d):
            stage += 1


def spconv_tensor(x: SparseTensor) -> Any:
    import spconv.pytorch as spconv

    return spconv.SparseConvTensor(x.features, x.coords.int().contiguous(), list(x.shape), x.batch_size)


# ------------------------------------------------------------------------------------------ what is timed


def step(call: Callable[[], Tensor], leaves: list[Tensor], backward: bool, threads: int) -> Callable[[], list[Tensor]]:
    """A function -> [output], or [output, the gradients at the leaves of the sum of its squares]."""

    def run() -> list[Tensor]:
        torch.set_num_threads(threads)
        with torch.set_grad_enabled(backward):
            out = call()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)] if backward else [out]

    return run


def work(module: nn.Module, x: SparseTensor) -> tuple[int, int]:
    """(pairs, multiply-adds of one forward) of all layers together, the centres' included."""
    found = []

    def count(conv: SparseConv3d, inputs: tuple[SparseTensor], _: SparseTensor) -> None:
        book = conv.rule_book(inputs[0])
        pairs = len(book.src) + (0 if book.centre is None else len(book.coords))
        found.append((pairs, pairs * conv.weight.shape[0] * conv.weight.shape[-1]))

    handles = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, SparseConv3d)]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return sum(pairs for pairs, _ in found), sum(operations for _, operations in found)


def both(case: str, module: nn.Module, x: SparseTensor, threads: int, rate: float, goal: float, repeats: int) -> Iterator[Row]:
    """Forward; forward + backward to all parameters and the input's features."""
    case = f"{case}, {threads} thread{'s' * (threads > 1)}"
    pairs, operations = work(module, x)
    twin = theirs_of(module)
    share(twin)
    for backward in (False, True):
        features = x.features.clone().requires_grad_(backward)
        leaves = [features, *module.parameters()]
        start = x.replace(features)
        ours = step(lambda start=start: module(replace(start, rules={})).features, leaves, backward, threads)
        theirs = step(lambda start=start: twin(spconv_tensor(start)).features, leaves, backward, 1)
        with torch.no_grad():
            order = site_keys((sites := twin(spconv_tensor(x))).indices, tuple(sites.spatial_shape)).argsort()
        (out, *grads), (their_out, *their_grads) = ours(), theirs()
        accuracy = f"output same to {difference([out], [their_out[order]]):.0e}"
        if backward:
            accuracy += f", gradients to {difference(grads, their_grads):.0e}"
        row = compare("sparse convolution", f"{'forward + backward' if backward else 'forward'}, {case}", ours,
                      "spconv CPU, 1 thread", theirs, goal, repeats)  # fmt: skip
        reached = operations * (3 if backward else 1) / row.ours / rate
        yield replace(row, note=f"{accuracy}; {pairs:,} pairs, {reached:.0%} of the matrix rate")


def rows(repeats: int) -> Iterator[Row]:
    before = torch.get_num_threads()
    try:
        import spconv.pytorch  # noqa: F401
    except ImportError:
        yield Row("sparse convolution", "layers and encoders", None, note="spconv is not installed")
        return
    stream = torch.cuda.current_stream
    if not torch.cuda.is_available():
        torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)  # spconv's backward asks, and does not use it
    rate = {threads: matrix_rate(threads) for threads in sorted({1, before})}
    torch.set_num_threads(1)
    wide = cp_voxel("nuscenes")
    pairs = ((kitti_cloud(), cp_voxel(), second()), (nuscenes_cloud(), wide, replace(wide, residual=False)))
    for (name, cloud), cfg, plain in pairs:
        voxels = voxelize(one_scan(cloud), Grid(cfg.point_range, cfg.voxel_size), 1)
        encoders = [("CenterPoint's encoder", VoxelEncoder(cfg)), ("SECOND's encoder", VoxelEncoder(plain))]
        x = SparseTensor(voxels.features, voxels.coords, encoders[0][1].shape, 1)
        where = f"{name}, {len(cloud):,} points"
        for what, encoder in encoders:
            layers = nn.Sequential(encoder.conv_input, *encoder.stages, encoder.conv_out)
            for threads in sorted(rate):
                yield from both(f"{what}, {where}", layers, x, threads, rate[threads], 1.5 if threads > 1 else 1.0, repeats)
        torch.manual_seed(0)
        for c, following, padding in ((16, 32, 1), (32, 64, 1), (64, 128, (0, 1, 1)), (128, 128, None)):
            x = x.replace(torch.randn(len(x.coords), c))
            down = SparseConv3d(c, following, 3, 2, padding) if padding else SparseConv3d(c, c, (3, 1, 1), (2, 1, 1))
            for kind, conv in (("submanifold", SubMConv3d(c, c)), ("strided", down)):
                kernel = "x".join(map(str, conv.kernel_size))
                case = f"{kind} {kernel}, {c} > {conv.weight.shape[0]} channels, {len(x.coords):,} sites, {where}"
                yield from both(case, conv, x, 1, rate[1], 1.0, repeats)
            with torch.no_grad():
                x = down(x)
    torch.cuda.current_stream = stream
    torch.set_num_threads(before)


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
