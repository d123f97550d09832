"""benchmarks/workloads.py: read and scored, twice the same. benchmarks/evaluation.py: the time and memory of a command."""

import json
import sys

import numpy as np
import pytest

import benchmarks
from benchmarks import evaluation, workloads
from cli import InputError
from data.kitti_files import read_objects
from data.nuscenes_tables import Tables
from metrics import kitti, nuscenes


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_kitti_workload_is_scored_and_the_same_twice(tmp_path):
    for name in ("one", "two"):
        workloads.kitti(tmp_path / name, frames=30)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    labels = [read_objects(path, scored=False) for path in sorted((tmp_path / "one/label_2").iterdir())]
    found = [read_objects(path, scored=True) for path in sorted((tmp_path / "one/results").iterdir())]
    assert len(labels) == len(found) == 30 and {"dontcare", "van"} <= {t.lower() for objects in labels for t in objects.type}
    assert 0 < kitti.evaluate(labels, found)["strict"]["Car"]["AP_R40"]["bbox"]["moderate"] < 100


def test_nuscenes_workload_is_scored_and_the_same_twice(tmp_path):
    for name in ("one", "two"):
        workloads.nuscenes(tmp_path / name, scenes=3, samples=20)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    tables = Tables(tmp_path / "one", "v1.0-trainval")
    samples = tables.split("val")
    result, counts = nuscenes.evaluate(tables, samples, tmp_path / "one/results.json")
    assert len(samples) == 20 and 0.05 < result["mean_ap"] < 0.9 and 0 < result["tp_errors"]["vel_err"] < 1
    assert counts["predictions"]["all"] > counts["predictions"]["in range"] > 0
    assert counts["labels"]["in range"] > counts["labels"]["with points"] > counts["labels"]["outside racks"] - 1 > 0


def test_tables_of_all_sensors_are_linked(tmp_path):
    workloads.nuscenes(tmp_path, scenes=2, samples=6, sensors=workloads.SENSORS, predictions=False)
    records = {path.stem: json.loads(path.read_bytes()) for path in (tmp_path / "v1.0-trainval").iterdir()}
    assert sorted(records) == sorted(workloads.TABLES) and len(records["sensor"]) == 12
    assert len(records["sample_data"]) == len(records["ego_pose"]) == 6 * sum(workloads.SENSORS.values())
    tables = Tables(tmp_path, "v1.0-trainval")
    assert not (tmp_path / "results.json").exists() and len(tables.samples) == 6
    scans = tables.scans(tables.samples[2], 30)  # the third of a scene: its key frame and two before, ten turns each
    assert len(scans) == 30 and np.all(np.diff([scan.time for scan in scans]) < 0)
    assert sum(scan.file.startswith("samples/LIDAR_TOP/") for scan in scans) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory of processes is read from /proc")
def test_time_and_memory_are_those_of_the_command_and_its_processes():
    block = "import time; x = b'1' * 2**28; time.sleep(0.4)"
    seconds, alone = evaluation.measure(["-c", block])
    assert seconds > 0.4 and 0.25 < alone < 0.4
    both = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {block!r}]); {block}; p.wait()"
    assert 0.5 < evaluation.measure(["-c", both])[1] < 0.7
    with pytest.raises(InputError, match="ended with status 3"):
        evaluation.measure(["-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("words, said", [
    (["--threads", "-1"], "--threads: expected at least 1, found -1"),
    (["--threads", "0"], "--threads: expected at least 1, found 0"),
    (["--repeats", "0"], "--repeats: expected at least 1, found 0"),
])  # fmt: skip
def test_numbers_below_one_are_refused(monkeypatch, words, said):
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *words])
    with pytest.raises(InputError, match=said):
        benchmarks.run(lambda repeats: iter(()), "nothing")
