"""What holds for every test, and fixtures for data that lies beside the repository and may be absent: golden evaluator
outputs and real frames."""

from collections.abc import Iterator
from pathlib import Path

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
