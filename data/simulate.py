"""A LiDAR simulator that writes official data sets: KITTI's layout and nuScenes'. The data of the demo, without a download.

    python -m data.simulate --out datasets/sim-kitti                          # KITTI: 250 training frames, 80 held-out ones
    python -m data.simulate --out datasets/big --train 4000 --val 800 --workers 8
    python -m data.simulate compare --root datasets/sim-kitti --real /data/kitti --out figure.png     # realistic?
    python -m data.simulate nuscenes --out datasets/sim-nuscenes              # nuScenes: 24 training scenes, 8 held-out ones

Streets with traffic and clutter (shapes.py, scenes.py, traffic.py) seen by the data set's own scanner (scanner.py). KITTI's are
single frames of 64 beams, nuScenes' are scenes in which time passes, of 32 beams; simulate_kitti.py and simulate_nuscenes.py say
what is written. All of it is a function of the seed: the number of workers changes nothing, and an interrupted set is continued
by the same command.   (reads after: scanner.py; next: simulate_kitti.py)
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from cli import ArgumentParser, InputError, run_cli, write_text


def check_settings(out: Path, settings: dict) -> None:
    """Raise InputError if `out` holds anything but a set (or the beginning of one) with the same settings."""
    record = out / "simulation.json"
    if not record.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: expected an empty or new folder, found other files; give another --out")
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(
            f"{record}: expected JSON, found something else; delete the folder or give another --out"
        ) from None
    differs = [f"{k} {found.get(k)!r} (asked for: {v!r})" for k, v in settings.items() if found.get(k) != v]
    if differs:
        raise InputError(f"{out} holds a set with other settings: {', '.join(differs)}; give another --out")


def begin(out: Path, settings: dict, folders: Iterable[str]) -> None:
    """A new set, or one that goes on: its settings are checked and written down, its folders made."""
    try:
        check_settings(out, settings)
        for folder in folders:
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_text(out / "simulation.json", json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{out}: expected a folder to write a set in, found: {error.strerror or error}") from None


def run(write: Callable[[tuple], None], tasks: list[tuple], workers: int, total: int, unit: str) -> None:
    """Do the tasks that are left of `total`, in this process or in several (0: one per core), behind a bar if it has a unit."""
    from tqdm import tqdm

    workers = min(workers or os.cpu_count() or 1, len(tasks))
    with tqdm(total=total, initial=total - len(tasks), desc="simulating", unit=unit, disable=not (unit and tasks)) as bar:
        if workers <= 1:
            for task in tasks:
                write(task)
                bar.update()
            return
        # spawn: the caller may have started threads (torch), which do not survive a fork
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                for _ in pool.map(write, tasks, chunksize=max(1, min(4, len(tasks) // (4 * workers)))):
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def options(prog: str, root: str, train: int, val: int, unit: str) -> ArgumentParser:
    """What both layouts' commands have in common."""
    parser = ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--out", required=True, help=f"folder for the new {root} root")
    parser.add_argument("--train", type=int, default=train, help=f"training {unit} (default: %(default)s)")
    parser.add_argument("--val", type=int, default=val, help=f"held-out {unit} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 = one per core (default: %(default)s)")
    return parser


def nuscenes_main(arguments: list[str]) -> None:
    """The command line of `python -m data.simulate nuscenes`."""
    parser = options("python -m data.simulate nuscenes", "nuScenes", 24, 8, "scenes")
    parser.add_argument("--sweeps", type=int, default=2, help="scans written before a key frame, up to 9 (default: %(default)s)")
    parser.add_argument("--samples", type=int, nargs=2, default=(10, 20), metavar=("LEAST", "MOST"),
                        help="key frames of a scene, 2 a second (default: 10 20)")  # fmt: skip
    given = parser.parse_args(arguments)
    from data.simulate_nuscenes import simulate_nuscenes

    out = simulate_nuscenes(given.out, given.train, given.val, given.seed, given.workers, given.sweeps, tuple(given.samples))
    print(f"{out}: {given.train} training and {given.val} held-out scenes")


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        from data.resemblance import compare_main

        return compare_main(sys.argv[2:])
    if sys.argv[1:2] == ["nuscenes"]:
        return nuscenes_main(sys.argv[2:])
    parser = options("python -m data.simulate", "KITTI", 250, 80, "frames")
    parser.add_argument("--full-circle", action="store_true", help="whole turns, about 4 times as many points")
    given = parser.parse_args()
    from data.simulate_kitti import simulate_kitti

    out = simulate_kitti(given.out, given.train, given.val, given.seed, given.workers, given.full_circle)
    print(f"{out}: {given.train} training and {given.val} held-out frames")


if __name__ == "__main__":
    run_cli(main)
