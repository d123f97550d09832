"""benchmarks/voxels.py: without real frames the clouds are simulated ones."""

import numpy as np
import pytest

from benchmarks import voxels


@pytest.fixture(autouse=True)
def no_real_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(voxels, "REAL", tmp_path / "none")


def test_clouds_of_nobody_s_data_are_simulated():
    name, cut = voxels.kitti_cloud(image_crop=True)
    assert name == "simulated frame, sector" and cut.shape[1] == 4 and len(cut) > 10_000
    name, whole = voxels.kitti_cloud()
    assert name == "simulated frame" and len(whole) > 2 * len(cut)
    name, several = voxels.nuscenes_cloud()
    assert name == "3 simulated frames in one" and several.shape[1] == 5 and several.dtype == np.float32
    assert np.array_equal(several[: len(whole), :4], whole) and not several[:, 4].any()
