"""What holds for every test, and fixtures for data that lies beside the repository and may be absent: golden evaluator
outputs and real frames; and the records of a small suite."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

settings.register_profile("suite", derandomize=True, deadline=None)  # the same examples in every run, on every machine
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test may set the number of threads; the next one has what there was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _folder(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.is_dir():
        pytest.skip(f"needs {'/'.join(parts)} in a folder `shared` beside the repository (not part of it)")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the official evaluators and of the reference framework on synthetic data."""
    return _folder("golden")


@pytest.fixture(scope="session")
def real_kitti() -> Path:
    """A KITTI root with eight real frames (licence: not part of the repository)."""
    return _folder("real", "kitti")


@pytest.fixture(scope="session")
def real_nuscenes() -> Path:
    """A nuScenes root (v1.0-mini) with one real key frame and its labels (licence: not part of the repository)."""
    return _folder("real", "nuscenes")


@pytest.fixture()
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the record of a run of the suite "trial", of the student `small` or its teacher `big`; returns the folder."""
    from rows import record_name
    from suites import SUITES, Suite

    methods = {name: {"method": name} for name in ("none", "rdd", "hint")}
    monkeypatch.setitem(SUITES, "trial", Suite("sim", (("big", "small"),), methods, {"": 2}, {}))

    def write(student: str, variant: str, seed: int, ap: float, price: float | None = None, **more: Any) -> Path:
        level = {"easy": 0.0, "moderate": ap, "hard": 0.0}
        record = {"teacher": "big", "student": student, "variant": variant, "seed": seed, "epochs": 8, "steps": 10,
                  "method": variant.split(",")[0], "seconds": 60.0, "price": price, "config": {},
                  "parameters": 1000 if student == "small" else 5000, "macs": 2e9 if student == "small" else 8e9,
                  "scores": [{"moderate_map_3d": 0.0}, {"moderate_map_3d": ap, "moderate_map_bev": 2 * ap, "step": 10}],
                  "last": {"strict": {"Car": {"AP_R40": {"3d": level}}, "Cyclist": {"AP_R40": {"3d": None}}}},
                  "resampled": {"moderate_map_3d": [ap - 1, ap, ap + 1], "moderate_map_bev": [2 * ap] * 3}, **more}  # fmt: skip
        (tmp_path / f"{record_name(student, variant, seed)}.json").write_text(json.dumps(record))
        return tmp_path

    return write
