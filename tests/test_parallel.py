"""Batch norm against torch's, two processes against one, mixed precision by device, and memory that is kept."""

import ctypes
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from config import Config
from parallel import BatchNorm, autocast_dtype, average_gradients, gather, mean_over_processes, of_first


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 6)])
def test_batch_norm_is_torch_s(shape):
    torch.manual_seed(0)
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, eps=1e-3, momentum=0.01)
    ours = BatchNorm(5, eps=1e-3, momentum=0.01)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("amp", "on_cpu", "on_cuda"), [
    ("off", None, None), ("float16", None, torch.float16), ("bfloat16", torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_mixed_precision_is_off_where_it_would_not_be_fast(amp, on_cpu, on_cuda):
    assert amp in next(f.metadata["choices"] for f in fields(Config) if f.name == "amp")
    assert autocast_dtype(amp, torch.device("cpu")) is on_cpu
    assert autocast_dtype(amp, torch.device("cuda", 1)) is on_cuda


@pytest.mark.parametrize("n", [0, 1])
def test_batch_norm_of_nothing_or_one_row_uses_the_running_statistics(n):
    norm = BatchNorm(4)
    out = norm(torch.randn(n, 4))
    assert out.shape == (n, 4) and out.isfinite().all() and int(norm.num_batches_tracked) == 0


def test_batch_norm_of_many_rows_is_as_exact_as_float64_s():
    """Most rows alike and far from 0, as a pillar network's are: adding them up in float32 would be off by a tenth."""
    torch.manual_seed(0)
    x = 5 + 1e-2 * torch.randn(70_000, 3)
    x[5_000:] = x[0]
    theirs, ours = nn.BatchNorm1d(3).double(), BatchNorm(3)
    weight = torch.randn(70_000, 3)
    exact, rows = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, got = theirs(exact), ours(rows)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)
    (expected * weight).sum().backward(), (got * weight).sum().backward()
    for found, right in ((rows.grad, exact.grad), (ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad),
                         (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):  # fmt: skip
        assert (found - right).norm() < 1e-4 * right.norm()
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(rows).double(), theirs(exact), atol=1e-3, rtol=0)


def _half(rank: int, x: torch.Tensor, folder: str) -> None:
    """One of two processes: rows of rank 0 are the first 6, of rank 1 the other 3 (uneven on purpose)."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    norm, mine = BatchNorm(4).double(), (x[:6] if rank == 0 else x[6:]).clone().requires_grad_()
    weight = torch.arange(9, dtype=torch.float64)[:, None]
    weight = weight[:6] if rank == 0 else weight[6:]
    count = mean_over_processes(torch.tensor(float(len(mine)), dtype=torch.float64))
    loss = (norm(mine).square() * weight).sum() / count
    loss.backward()
    average_gradients(list(norm.parameters()))
    parts = gather(mine.grad.numpy())
    assert of_first(lambda: {"made by": rank}) == {"made by": 0}
    if rank == 0:
        x0, x1 = (torch.tensor(part) for part in parts)
        torch.save({"norm": norm.state_dict(), "grad": norm.weight.grad, "x": x0, "x1": x1}, f"{folder}/out.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Uneven halves: statistics, parameter gradients and input gradients are those of the whole batch."""
    torch.manual_seed(1)
    x = torch.randn(9, 4, dtype=torch.float64)
    mp.spawn(_half, (x, str(tmp_path)), nprocs=2)
    got = torch.load(tmp_path / "out.pt", weights_only=True)

    norm, whole = nn.BatchNorm1d(4).double(), x.clone().requires_grad_()
    loss = (norm(whole).square() * torch.arange(9, dtype=torch.float64)[:, None]).sum() / 9
    loss.backward()
    torch.testing.assert_close(got["norm"]["running_var"], norm.running_var)
    torch.testing.assert_close(got["norm"]["running_mean"], norm.running_mean)
    torch.testing.assert_close(got["grad"], norm.weight.grad)
    # each process's loss counts double in its own rows' gradient, because the mean over processes is taken later
    torch.testing.assert_close(torch.cat([got["x"], got["x1"]]) / 2, whole.grad)


def test_alone_everything_is_the_identity():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    average_gradients([p])
    assert p.grad.tolist() == [3, 3] and gather("a") == ["a"] and of_first(lambda: "a") == "a"
    assert float(mean_over_processes(torch.tensor(4.0, requires_grad=True))) == 4


def faults(first: str) -> int:
    """Page faults of eight tensors of 64 MiB in a process that has run the statement `first`, after 32 more of them."""
    code = (f"import resource, torch; {first}\n"
            "for i in range(40):\n"
            "    if i == 32: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    torch.ones(2**24)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_freed_memory_is_kept():
    """Taken from the operating system, a tensor of 64 MiB costs 16,384 page faults, every time. Small blocks settle in the
    first holes that such tensors leave; once they have, the next tensor finds its place and costs none."""
    usual = faults("pass")  # 131,072
    if usual < 1000:
        pytest.skip("here memory is kept anyway (another allocator), or comes in huge pages")
    assert faults("from parallel import start; start()") < usual / 100
