"""benchmarks/distillation.py: every method gets its price."""

from benchmarks import distillation
from suites import METHODS


def test_every_method_has_a_price(monkeypatch):
    monkeypatch.setattr(distillation, "PAIRS", (("cp-voxel-cpu", "cp-voxel-xxs-cpu", 1),))
    rows = list(distillation.rows(1))
    steps = {row.case.split(",")[0]: row for row in rows if row.case.startswith("a step with")}
    assert set(steps) == {f"a step with {method}" for method in METHODS}
    assert all(min(row.ours, row.theirs, row.ratio) > 0 for row in steps.values())
    (solving,) = [row for row in rows if row not in steps.values()]
    assert 0 < solving.ours < 100, "a share of a step"
