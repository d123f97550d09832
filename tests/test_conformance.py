"""The golden model cases: every stage of all four detectors is OpenPCDet's; and the checker can fail."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import conformance

CASES = ("second", "pointpillars", "centerpoint_voxel", "centerpoint_pillar_hard", "centerpoint_pillar_dyn")


@pytest.mark.parametrize("case", CASES)
def test_every_stage_is_the_reference_s(case, golden):
    folder = golden / "models"
    rows = conformance.check_case(folder / f"{case}.npz", folder)
    assert len(rows) > 40
    worse = [row for row in rows if not row.ok]
    assert not worse, "\n".join(f"{row.quantity}: {row.error:.3g}, limit {row.limit:g}" for row in worse)


def test_a_changed_network_is_past_its_limits(golden, monkeypatch):
    """The comparison is not blind: one wrong epsilon in the neck's norms shows."""
    import backbone

    def other_norm(channels):
        return backbone.BatchNorm(channels, eps=1e-5, momentum=0.01)

    monkeypatch.setattr(backbone, "norm", other_norm)
    rows = conformance.check_case(golden / "models" / "pointpillars.npz", golden / "models")
    past = {row.quantity for row in rows if not row.ok}
    assert "bev_out" in past and "voxels: coordinates" not in past


def test_command_line_says_what_is_wrong(tmp_path, golden):
    def run(*arguments):
        command = [sys.executable, str(Path(conformance.__file__)), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    empty = run(tmp_path)
    assert empty.returncode == 2 and "expected cases *.npz, found none" in empty.stderr
    source = golden / "models" / "pointpillars.npz"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    no_keys = run(tmp_path)
    assert no_keys.returncode == 2 and "keys_pointpillars.json: no such file; name its folder with --keys" in no_keys.stderr
    arrays = dict(np.load(source))
    arrays["bev_out_val"] = arrays["bev_out_val"] * 1.01
    np.savez(tmp_path / source.name, **arrays)
    changed = run(tmp_path, "--keys", source.parent)
    assert changed.returncode == 1 and "PAST ITS LIMIT" in changed.stdout and "1 past their limits" in changed.stdout
