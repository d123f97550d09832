"""A pretended GPU, for machines without one: a tensor that somebody forgot to move, or made on the CPU, is noticed.

    python -m tests.pretend_gpu ROOT RUNS       a step with every method and kind of head on it, and two whole runs

Tensors "on" it are CPU tensors in a shell that says device "gpu". Every operation passes `run`, which unwraps, computes on the
CPU, wraps again, and refuses what CUDA would refuse: operands on two devices. It knows nothing of kernels, streams, mixed
precision or spconv: the tests marked `gpu` are for those. tests/test_train.py runs it, in a process of its own, because a
device cannot be taken back.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import parallel
from config import METHODS, Config
from detector import build
from tests.scenes import few_points
from tests.test_baselines import KINDS, pair
from tests.test_train import config
from train import losses, start_distilling, train

aten = torch.ops.aten


class OnGpu(Tensor):
    """A CPU tensor, `inner`, that says it is on the GPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        return Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype,
                                             device="gpu:0")  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.inner.tolist()


class Gpu(TorchDispatchMode):
    """While it lasts, operations that make tensors from nothing reach `run` too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation. Raises RuntimeError where CUDA would: operands on two devices (numbers, of no dimension, may be mixed)."""
    operands: list[Tensor] = []

    def unwrap(x: Any) -> Any:
        operands.extend([x] if isinstance(x, Tensor) else [])
        return x.inner if isinstance(x, OnGpu) else x

    inner, named = each(unwrap, args), {name: each(unwrap, x) for name, x in kwargs.items()}
    there = any(isinstance(x, OnGpu) for x in operands)
    copies = func in (aten._to_copy.default, aten.copy_.default)
    if there and not copies and any(x.dim() and not isinstance(x, OnGpu) for x in operands):
        raise RuntimeError(f"{func}: operands on two devices: {[(tuple(x.shape), x.device.type) for x in operands]}")
    if named.get("device") is not None:
        there, named["device"] = torch.device(named["device"]).type == "gpu", torch.device("cpu")
    out = func(*inner, **named)
    if func is aten.copy_.default:
        return args[0]
    if not there:
        return out
    out = each(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if not copies and has_views(func) else out


def each(f: Callable[[Any], Any], x: Any) -> Any:
    """f of x, or of each thing in it, however deep."""
    return type(x)([each(f, y) for y in x]) if isinstance(x, (list, tuple)) else f(x)


@cache
def has_views(func: Any) -> bool:
    """Whether an operation changes an operand or returns a view of one."""
    return any(argument.alias_info for argument in func._schema.arguments)


class Driver(backend_registration._DummyBackendModule):
    """What torch asks a backend of this name."""

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


def plug_in() -> Any:
    """Make the device "gpu" known to torch. Keep what is returned: with it the registration ends."""
    backend_registration._setup_privateuseone_for_python_backend("gpu", Driver())
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to("gpu") brings parameters of another class
    torch.autograd.set_multithreading_enabled(False)  # the backward pass in the thread that asked: there is no other queue
    # torch.tensor(..., device="gpu"), and lists as indices, reach the device past `run`
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", lambda size, stride, dtype=None, **_: OnGpu(torch.empty_strided(size, stride, dtype=dtype)),
                 "PrivateUse1")  # fmt: skip
    library.impl("_copy_from", lambda source, to, non_blocking=False: run(aten.copy_.default, (to, source), {}), "PrivateUse1")
    return library


def step(cfg_t: Config, cfg_s: Config, **changes: Any) -> None:
    """A training step of a student, and its detections after it."""
    cfg = replace(cfg_s, score_threshold=0.0, proposal_score=0.0, **changes)
    batch, teacher, student = few_points(cfg).to("gpu"), build(cfg_t), build(cfg).to("gpu")
    distil = start_distilling(cfg, student, teacher, torch.device("gpu"))
    parameters = [*student.parameters(), *(distil.parameters() if distil else [])]
    detection, distillation, _, neck = losses(student, batch, teacher, distil, 1.0)
    sum([*detection.values(), *distillation.values()]).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 10.0)
    torch.optim.AdamW(parameters).step()
    student.eval()
    found = student.decode(student(student.prepare(batch)))
    assert all(x.device.type == "gpu" for x in (neck, *distillation.values(), *(boxes for boxes, *_ in found)))
    assert all(len(boxes) for boxes, *_ in found)
    print(cfg.preset, cfg.data, cfg.head, changes)


if __name__ == "__main__":
    root, runs = map(Path, sys.argv[1:])
    registration = plug_in()
    parallel.start = lambda: (0, 1, torch.device("gpu", 0))
    with Gpu():
        try:
            torch.zeros(2, device="gpu") + torch.zeros(2)
            raise SystemExit("it lets devices be mixed")
        except RuntimeError as error:
            assert "operands on two devices" in str(error)
        for kind in KINDS:
            for name in METHODS if kind in ("center", "anchor") else ("fg", "pp-logit", "rdd"):
                step(*pair(kind), method=name)
        for reading in ({"regions": "labels"}, {"normalise": "softmax"}, {"select": "soft"}, {"select": "random"},
                        {"select": "gaussian"}, {"psi_order": "map-first", "psi_norm": True}, {"p_cls": "peak"}):  # fmt: skip
            step(*pair("center"), method="rdd", **reading)
        step(*pair("center"), method="fg", label_kd=True, inherit=True)
        teacher = train(config(root), runs / "teacher")
        train(config(root, method="rdd"), runs / "student", teacher)
