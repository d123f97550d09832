"""Fixtures for data that lies beside the repository and may be absent: golden evaluator outputs and real frames."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
