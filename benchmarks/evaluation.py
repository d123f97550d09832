"""How long the official metrics take on data as large as the real sets, and how much memory.   (data: workloads.py)

    python -m benchmarks.evaluation

Each row is one command of its own, from start to end: imports, reading of every file, metrics, the table that is printed. KITTI:
3,769 frames, all classes, levels and both tables of overlaps. nuScenes: 6,019 samples, with the tables' index made anew and with
it kept from the time before; and that index alone for tables as large as v1.0-trainval's. Memory is the peak of the command and
its processes together (each counts what they share, so it is an upper bound). Where the official tools' times stand in a note,
they were taken on another run of a workload of that size, on 2 AMD EPYC cores without GPU.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import REPEATS, Row, run, workloads
from cli import InputError, run_cli

ROOT = Path(__file__).parents[1]
INDEX = "import sys; from data.nuscenes_tables import Tables; Tables(sys.argv[1], 'v1.0-trainval')"


def measure(words: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of `python words ..` with all its processes. Linux tells the memory; elsewhere NaN."""
    began, peak = time.perf_counter(), 0
    command = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while command.poll() is None:
        peak = max(peak, sum(map(_resident, _family(command.pid))))
        time.sleep(0.02)
    if command.returncode:
        raise InputError(f"python {' '.join(words)}: ended with status {command.returncode}")
    return time.perf_counter() - began, peak / 2**30 or float("nan")


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        tasks = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in os.listdir(f"/proc/{pid}/task")]
    except OSError:  # it has just ended
        return [pid]
    return [pid] + [member for text in tasks for child in text.split() for member in _family(int(child))]


def _resident(pid: int) -> int:
    """Bytes of memory."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def case(name: str, words: list[str], repeats: int, note: str, cold: Path | None = None) -> Iterator[Row]:
    """Two rows, of time and of memory. cold: the file to remove before every turn."""
    found = []
    for _ in range(repeats + 1):  # the first turn warms the disk's cache up
        if cold:
            cold.unlink(missing_ok=True)
        found.append(measure(words))
    seconds, memory = zip(*found[1:], strict=True)
    yield Row("evaluation", name, statistics.median(seconds), note=note)
    yield Row("evaluation", f"{name}: peak memory", max(memory), unit="GiB")


def rows(repeats: int = REPEATS) -> Iterator[Row]:
    """Time and memory of evaluate.py kitti, evaluate.py nuscenes, and of the index of trainval's tables."""
    from data.nuscenes_tables import CACHE

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        workloads.kitti(data)
        words = ["evaluate.py", "kitti", "--gt", str(data / "label_2"), "--results", str(data / "results")]
        yield from case("KITTI, 3,769 frames", words, repeats, "OpenPCDet's numba evaluator, its overlap kernel compiled for "
                        "the CPU: 127 s (both tables); KITTI's C++: 55 s (one table)")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        workloads.nuscenes(data)
        words = ["evaluate.py", "nuscenes", "--root", folder, "--version", "v1.0-trainval", "--split", "val", "--results",
                 str(data / "results.json")]  # fmt: skip
        yield from case("nuScenes, 6,019 samples, index made", words, repeats, "nuscenes-devkit 1.2.0: 82 s, 1.5 GiB",
                        data / "v1.0-trainval" / CACHE)  # fmt: skip
        yield from case("nuScenes, 6,019 samples, index kept", words, repeats, "nuscenes-devkit 1.2.0: 82 s, 1.5 GiB")
    with tempfile.TemporaryDirectory() as folder:
        workloads.trainval(Path(folder))
        words, few = ["-c", INDEX, folder], min(repeats, 3)
        cache = Path(folder) / "v1.0-trainval" / CACHE
        note = "at most 3 turns; nuscenes-devkit 1.2.0: 57 s, 7.7 GiB"
        yield from case("nuScenes, index of trainval made", words, few, note, cache)
        yield from case("nuScenes, index of trainval kept", words, repeats, "")


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
