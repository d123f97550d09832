"""All benchmarks: one table, one JSON, one picture.   (after: __init__.py)

    python -m benchmarks                                          every subject (make bench); minutes
    python -m benchmarks sparse boxes                             some
    python -m benchmarks --json results/bench.json --figure docs/bench.png

Each subject runs in a process of its own: what one leaves in memory or sets for the threads does not meet the next.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from cli import ArgumentParser, InputError, did_you_mean, run_cli, write_text

SUBJECTS = sorted({path.stem for path in Path(__file__).parent.glob("[!_]*.py")} - {"workloads"})


def measure(subject: str, repeats: int) -> dict:
    """The record of one subject, as its own --json writes it; its rows are printed on the way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{subject}", "--repeats", str(repeats), "--json", str(path)],
                              cwd=Path(__file__).parents[1], check=False)  # fmt: skip
        if done.returncode:
            raise InputError(f"benchmarks/{subject}.py: ended with status {done.returncode}")
        return json.loads(path.read_text())


def main() -> None:
    p = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"which of {', '.join(SUBJECTS)} [all]")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="turns after a warm-up [%(default)s]")
    p.add_argument("--json", type=Path, metavar="OUT", help="write the rows here (table.py reads results/bench.json); what is "
                   "there of other subjects stays")  # fmt: skip
    p.add_argument("--figure", type=Path, metavar="PNG", help="draw the ratios")
    args = p.parse_args()
    for name in args.subjects:
        if name not in SUBJECTS:
            raise InputError(f"unknown subject {name!r}{did_you_mean(name, SUBJECTS)}")
    try:
        records = json.loads(args.json.read_bytes()) if args.json and args.json.is_file() else {}
    except ValueError as error:
        raise InputError(f"{args.json}: expected what --json wrote, found something else ({error})") from None
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    for name in args.subjects or SUBJECTS:
        records[name] = measure(name, args.repeats) | {"command": command}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.json, json.dumps(dict(sorted(records.items())), indent=1) + "\n")
    if args.figure:
        from curves import ratios

        ratios(args.figure, [row for _, record in sorted(records.items()) for row in record["rows"]])


if __name__ == "__main__":
    run_cli(main)
