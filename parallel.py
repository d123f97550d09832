"""Many processes, one training run: what they must agree on.   (reads beside: train.py)

`torchrun --nproc-per-node 2 train.py ...` starts two copies of the same program. Each takes its share of every global
batch; three things make them one run, equal to a single process up to rounding: losses are normalised by GLOBAL counts
(`mean_over_processes`), batch norm uses GLOBAL statistics (`BatchNorm`), gradients are averaged (`average_gradients`).
On one process nothing is communicated.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import Tensor, nn
from torch.nn import functional as F

from cli import InputError


def start() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; joins the group when torchrun started it. gloo on CPU, nccl on CUDA."""
    keep_freed_memory()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # The others wait while the first one simulates data or scores results: longer than nccl's ten minutes.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=4), device_id=device if cuda else None)
    return rank, world, device


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What `Config.amp` means on a device; None: everything in float32."""
    if name == "off" or (name == "float16" and device.type == "cpu"):  # no CPU is fast in float16
        return None
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, rather than return it to the operating system and ask for it again.

    Every feature map of some MB is otherwise mapped anew, and the kernel fills page after page with zeros: a quarter of a
    training step on a CPU (LOG.md, Where did a quarter of a CPU step go?). No result depends on it; where there is no glibc
    nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap does not shrink


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def alone(program: str) -> None:
    """Raises InputError under torchrun, for a program that is one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{program} under torchrun: expected one process")


def finish(device: torch.device) -> None:
    """Go on when a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_processes(value: Tensor) -> Tensor:
    """Average of a count or a logged number over the processes; carries no gradient.

    A loss written as local_sum / mean_over_processes(local_count) has, averaged over the processes, the value and the
    gradient of global_sum / global_count.
    """
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def at_least_one(mean: Tensor) -> Tensor:
    """A mean over processes of a count, with the TOTAL count raised to 1: what nothing was counted for divides by 1.

    (clamp(min=1) on the mean would let 8 processes with 4 objects in all divide by 8.)
    """
    return torch.where(mean > 0, mean, torch.full_like(mean, 1 / world_size()))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message; a missing gradient counts as zero."""
    if world_size() == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p) / world_size())


def gather(value: object) -> list:
    """The `value` of every process, in order of rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def of_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, in every process: for what takes long, is large, and is the same for all."""
    made = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(made)
    return made[0]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over (N, C) or (N, C, H, W) with the statistics of the global batch, for any N.

    Same parameters and state_dict as nn.BatchNorm1d / 2d. torch's own refuses to train on fewer than two values a
    channel (an empty scan) and its SyncBatchNorm refuses CPU tensors; with fewer than two values this one falls back
    to the running statistics.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name)
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (N, C) or (N, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self._check_input_dim(input)
        per_channel = input.numel() // self.num_features
        if self.training and world_size() > 1:
            return self._global_forward(input, per_channel)
        training = self.training and per_channel > 1
        if training and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        # torch adds up rows (N, C) in float32 on a CPU: over 145,000 rows of a pillar network, most of them alike, its
        # variance was off by 0.6 %. (1, C, N) it adds up in float64, at twice the time: for many rows only.
        rows = training and input.dim() == 2 and len(input) > 2**16 and input.device.type == "cpu"
        x = input.T.contiguous()[None] if rows else input
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps)
        return x[0].T.contiguous() if rows else x  # a row's values side by side: the next layer gathers rows

    def _global_forward(self, x: Tensor, per_channel: int) -> Tensor:
        axes = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        x32 = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        total = dist_fn.all_reduce(torch.cat([x32.new_full((1,), per_channel), x32.sum(axes)]))
        count = total[0]
        if per_channel < 2 and count < 2:  # where one has two values no process waits to hear it
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        # Two messages rather than one with sums of squares: E[x^2] - E[x]^2 loses the digits that a "same curve" needs.
        mean = total[1:] / count
        centred = x32 - mean.view(shape)
        var = dist_fn.all_reduce(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
