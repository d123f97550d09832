"""Official metrics: of a checkpoint on the data set it was trained for, or of any detector's saved results.

(reads after: train.py; beside: metrics/kitti.py, metrics/nuscenes.py  next: suites.py)

    python evaluate.py runs/NAME/last.pt                                  a checkpoint, on its own data set
    python evaluate.py runs/NAME/last.pt --export DIR --json OUT.json     also write the official result files
    python evaluate.py kitti --gt DIR --results DIR --json OUT.json       score result files, whoever wrote them
    python evaluate.py nuscenes --root DIR --version v1.0-trainval --split val --results FILE --json OUT.json

Everything runs on a CPU and needs no compiler. The numbers are the official evaluators' to the last printed digit, in their
units: KITTI's AP in percent, nuScenes' 0..1; what a checkpoint's evaluation prints and logs is in percent for both.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import ArgumentParser, InputError, did_you_mean, run_cli, write_text
from config import MODEL, Config, add_options
from presets import DEFAULT_PAIR

if TYPE_CHECKING:
    from data.kitti import Kitti
    from data.nuscenes import NuScenes
    from detector import Detector


DECODING = ("score_threshold", "nms_iou", "circle_nms", "max_detections")  # what may differ from training


def detect(detector: "Detector", dataset: "Kitti | NuScenes", device: Any, batch_size: int = 4,
           workers: int = 0) -> dict[str, tuple]:  # fmt: skip
    """The detections of every frame, {id: (boxes (n, 7 or 9), scores (n,), n class names)}; processes share the frames."""
    import torch
    from tqdm import tqdm

    import parallel
    from data.batch import load, report_dropped

    mine = range(parallel.rank(), len(dataset), parallel.world_size())
    groups = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    found: dict[str, tuple] = {}
    told: set[str] = set()
    training = detector.training
    detector.eval()
    batches = tqdm(load(dataset, groups, detector.cfg, workers), total=len(groups), desc="evaluating", unit="batch", leave=False,
                   disable=parallel.rank() > 0, dynamic_ncols=True)  # fmt: skip
    for indices, batch in zip(groups, batches, strict=True):
        report_dropped(batch, told)
        batch = batch.to(device)
        with torch.no_grad():
            detections = detector.decode(detector(detector.prepare(batch)))
        for i, (boxes, scores, labels) in zip(indices, detections, strict=True):
            names = [detector.cfg.classes[k] for k in labels.tolist()]
            found[dataset.ids[i]] = boxes.cpu().numpy(), scores.cpu().numpy(), names
    detector.train(training)
    return {id: what for part in parallel.gather(found) for id, what in part.items()}


def evaluate_detector(detector: "Detector", dataset: "Kitti | NuScenes", device: Any, batch_size: int = 4,
                      export: Path | None = None, workers: int = 0) -> dict:  # fmt: skip
    """The official metrics of a detector on a data set; with `export`, the official result files too."""
    import parallel

    if export is not None and parallel.rank() == 0:  # before the work, whose result it is to hold
        writable_folder(export)
    found = detect(detector, dataset, device, batch_size, workers)
    if detector.cfg.layout == "nuscenes":
        return parallel.of_first(lambda: nuscenes_scores(dataset, found, export, detector.cfg.classes))
    return parallel.of_first(lambda: kitti_scores(dataset, found, export, detector.cfg.classes))


def kitti_scores(dataset: "Kitti", found: dict[str, tuple], export: Path | None, classes: tuple[str, ...]) -> dict:
    """KITTI's metrics; with `export`, result files too. {} of the test split: without labels the files are what is wanted."""
    from data.kitti import write_objects
    from metrics.kitti import evaluate

    labels, objects = kitti_objects(dataset, found)
    if export is not None:
        for id, what in zip(dataset.ids, objects, strict=True):
            write_objects(export / f"{id}.txt", what)
    if dataset.folder == "testing":
        return {}
    return evaluate(labels, objects, classes)


def kitti_objects(dataset: "Kitti", found: dict[str, tuple]) -> tuple[list, list]:
    """Labels and detections of every frame, in KITTI's columns. Objects that do not project into the image are left out,
    as in every KITTI submission."""
    from data.kitti import image_size, objects_from_boxes

    objects = [objects_from_boxes(boxes, names, scores, dataset.calibration(i), image_size(dataset.root, id, dataset.folder))
               for i, id in enumerate(dataset.ids) for boxes, scores, names in [found[id]]]  # fmt: skip
    return [dataset.objects(i) for i in range(len(dataset))], objects


def nuscenes_scores(dataset: "NuScenes", found: dict[str, tuple], export: Path | None, classes: tuple[str, ...]) -> dict:
    """nuScenes' metrics, of the submission file that is written on the way: export/results.json, or a temporary one. {} of
    frames without labels, as of the test split, whose file it is that is wanted."""
    import tempfile

    from metrics.nuscenes import evaluate, nothing_found

    with tempfile.TemporaryDirectory() as temporary:
        path = (export or Path(temporary)) / "results.json"
        write_json(path, dataset.submission(found), indent=None)
        if export and not any(dataset.names(i) for i in range(len(dataset))):
            return {}
        if not any(len(boxes) for boxes, *_ in found.values()):  # the official tool takes no file without a box
            return nothing_found(classes)
        result, _ = evaluate(dataset.tables, dataset.ids, path, classes)
    return result


def resampled(dataset: "Kitti | NuScenes", found: dict[str, tuple], cfg: Config, draws: int = 200) -> dict[str, list[float]]:
    """`headline` on bootstrap samples of a data set, {name: (draws,)}: how much its frames alone could have changed.

    Frames are drawn with replacement, on nuScenes whole scenes, whose frames are alike. Draw k is the same for every
    detector: the differences of two detectors are paired.
    """
    import tempfile

    import numpy as np

    if cfg.layout == "nuscenes":
        from metrics.nuscenes import curves, draw_samples, load, nothing_found, summary

        group = dataset.scenes()
        if any(len(boxes) for boxes, *_ in found.values()):
            with tempfile.TemporaryDirectory() as temporary:
                write_json(path := Path(temporary) / "results.json", dataset.submission(found), indent=None)
                labels, predictions, ego, _ = load(dataset.tables, dataset.ids, path)
            score = lambda i: summary(curves(*(draw_samples(boxes, i) for boxes in (labels, predictions)), ego[i], cfg.classes))  # noqa: E731
        else:
            score = lambda _: nothing_found(cfg.classes)  # noqa: E731
    else:
        from metrics.kitti import draw_frames, gather, moderate

        group, work = np.arange(len(dataset)), gather(*kitti_objects(dataset, found), cfg.classes)
        score = lambda i: moderate(draw_frames(work, i), cfg.classes)  # noqa: E731
    rng, groups = np.random.default_rng(0), [np.flatnonzero(group == g) for g in np.unique(group)]
    rows = [headline(score(np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])))
            for _ in range(draws)]  # fmt: skip
    return {name: [round(row[name], 3) for row in rows] for name in rows[0]}


def headline(result: dict) -> dict[str, float]:
    """The two numbers of a log, in percent, the one that chooses best.pt first.

    KITTI: mean over the classes of the moderate AP_R40 at the strict overlaps, 3D and BEV. nuScenes: NDS and mAP.
    """
    if "nd_score" in result:
        return {"nds": 100 * result["nd_score"], "map": 100 * result["mean_ap"]}
    from metrics.kitti import moderate_map

    return {f"moderate_map_{metric}": moderate_map(result, metric) for metric in ("3d", "bev")}


def writable_folder(path: Path) -> None:
    """Make the folder, if it is not there, and see that files can be written in it. Raises InputError."""
    import tempfile

    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: expected a folder to write in, found: {error.strerror or error}") from None


def write_json(path: Path, content: dict | list, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all. indent None: all in one line, three times as fast. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=indent) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


# ------------------------------------------------------------------ command line


def label_folder(path: Path) -> Path:
    """The folder of label files that --gt means: itself, a KITTI root's, or its training folder's."""
    for folder in (path, path / "label_2", path / "training" / "label_2"):
        if any(folder.glob("[0-9]*.txt")):
            return folder
    wanted = "label files NNNNNN.txt (or a KITTI root with training/label_2)"
    raise InputError(f"{path}: expected {wanted}, found none")


def result_files(path: Path) -> list[Path]:
    """The result files that --results means: in the folder, or in its `data`, where KITTI's kit puts them."""
    for folder in (path, path / "data"):
        if files := sorted(folder.glob("[0-9]*.txt")):
            return files
    raise InputError(f"{path}: expected result files NNNNNN.txt (or a folder data of them), found none")


def kitti_main(words: list[str]) -> None:
    """Score saved KITTI results: all frames that have a result file."""
    p = ArgumentParser(prog="evaluate.py kitti", description="Score KITTI result files (16 columns a line).")
    p.add_argument("--gt", type=Path, required=True, metavar="DIR", help="label files, or a KITTI root")
    p.add_argument("--results", type=Path, required=True, metavar="DIR", help="result files, named like labels")
    p.add_argument("--json", type=Path, metavar="OUT", help="also write all numbers here")
    every = "Car,Pedestrian,Cyclist"
    p.add_argument("--classes", default=every, metavar="A,B", help=f"which of them [{every}]")
    args = p.parse_args(words)
    from data.kitti import TYPES, read_objects
    from metrics.kitti import count_labels, evaluate, format_table

    folder = label_folder(args.gt)
    results = result_files(args.results)
    lost = [r.name for r in results if not (folder / r.name).is_file()]
    if lost:
        missing = f"found {len(lost)} without one, first {lost[0]}"
        raise InputError(f"{args.results}: expected a label file in {folder} for each result, {missing}")
    print(f"scoring the {len(results)} frames that have a result file, labels from {folder}")
    without = sorted({path.stem for path in folder.glob("[0-9]*.txt")} - {r.stem for r in results})
    if without:
        print(f"note: {len(without)} frames have labels but no result file: {', '.join(without[:8])}"
              + (", ..." if len(without) > 8 else "") + "\n      (KITTI's own evaluator wants one, if only an "
              "empty one, for every frame of the split)")  # fmt: skip
    labels = [read_objects(folder / r.name, scored=False) for r in results]
    detections = [read_objects(r, scored=True) for r in results]
    known = {word.lower() for word in TYPES}  # the official evaluator ignores case
    for path, objects in zip(results, detections, strict=True):
        for word in map(str, objects.type):
            if word.lower() not in known:
                raise InputError(f"{path}: expected a KITTI type, found {word!r}{did_you_mean(word, TYPES)}")
    classes = tuple(name for name in args.classes.split(",") if name)
    result = evaluate(labels, detections, classes, progress=True)
    print(format_table(result, count_labels(labels, classes)))
    if args.json:
        write_json(args.json, result)


def nuscenes_main(words: list[str]) -> None:
    """Score a nuScenes results file, as a submission has it."""
    p = ArgumentParser(prog="evaluate.py nuscenes", description="Score a nuScenes results file (a submission).")
    p.add_argument("--root", type=Path, required=True, metavar="DIR", help="the folder that holds the version's")
    p.add_argument("--version", required=True, metavar="V", help="v1.0-mini, v1.0-trainval or v1.0-test")
    p.add_argument("--split", required=True, metavar="S", help="train, val, test, mini_train, mini_val or all")
    p.add_argument("--results", type=Path, required=True, metavar="FILE", help='{"meta": .., "results": ..}')
    p.add_argument("--json", type=Path, metavar="OUT", help="also write all numbers here")
    args = p.parse_args(words)
    from data.nuscenes_tables import Tables
    from metrics.nuscenes import evaluate, format_table

    tables = Tables(args.root, args.version)
    samples = tables.split(args.split)
    print(f"scoring {args.results} on the {len(samples)} samples of {args.split}, labels from {args.root}")
    result, counts = evaluate(tables, samples, args.results)
    print(format_table(result, counts))
    if args.json:
        write_json(args.json, result)


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="evaluate.py", description=__doc__,
                       epilog="saved results: python evaluate.py kitti --help, python evaluate.py nuscenes --help")  # fmt: skip
    p.add_argument("checkpoint", help="a run's last.pt or best.pt, or the word kitti or nuscenes")
    p.add_argument("--data", metavar="NAME", help="another data set than it was trained for")
    p.add_argument("--root", metavar="DIR", help="another folder of data")
    p.add_argument("--frames", metavar="A,B", help="only these frames")
    p.add_argument("--version", metavar="V", help="nuScenes: another version of the tables")
    p.add_argument("--split", default="val", metavar="NAME",
                   help="train, val, test or trainval; of nuScenes, any that splits.json names [val]")
    p.add_argument("--batch-size", type=int, default=4, metavar="X", help="scans at a time [4]")
    p.add_argument("--workers", type=int, default=0, metavar="X", help="data loading processes; changes no result [0]")
    p.add_argument("--export", type=Path, metavar="DIR", help="write the official result files here")
    p.add_argument("--json", type=Path, metavar="OUT", help="also write all numbers here")
    add_options(p, (MODEL,), only=DECODING)
    return p


def main() -> None:
    if sys.argv[1:2] == ["kitti"]:
        return kitti_main(sys.argv[2:])
    if sys.argv[1:2] == ["nuscenes"]:
        return nuscenes_main(sys.argv[2:])
    args = parser().parse_args()
    for option, number, lowest in (("--batch-size", args.batch_size, 1), ("--workers", args.workers, 0)):
        if number < lowest:
            raise InputError(f"{option}: expected a number from {lowest} on, found {number}")
    if args.data and args.data not in DEFAULT_PAIR:
        raise InputError(f"--data: unknown data set {args.data!r}{did_you_mean(args.data, DEFAULT_PAIR)}")
    import parallel
    from data.batch import open_data
    from metrics import kitti, nuscenes
    from weights import load_detector

    _, _, device = parallel.start()
    detector, content = load_detector(args.checkpoint, **{k: getattr(args, k) for k in DECODING if hasattr(args, k)})
    if args.data not in (None, detector.cfg.data) and not args.root:
        raise InputError(f"--data {args.data}: expected its --root too, found none, and that of the checkpoint holds"
                         f" {detector.cfg.data}")  # fmt: skip
    cfg = replace(detector.cfg, root=args.root or detector.cfg.root, data=args.data or detector.cfg.data,
                  version=args.version or detector.cfg.version)  # fmt: skip
    if cfg.layout == "kitti" and args.split == "test" and not args.export:
        raise InputError("--split test: KITTI's has no labels to score by; expected --export DIR for the result files")
    if args.json:
        writable_folder(args.json.parent)  # not an hour later
    frames = tuple(args.frames.split(",")) if args.frames else cfg.frames
    dataset = open_data(replace(cfg, frames=frames), args.split)
    if parallel.rank() == 0:
        print(f"{args.checkpoint}: {cfg.preset}, step {content['step']}, on {len(dataset)} frames of {cfg.root}"
              + (f" (split {args.split})" if not frames else " (given by --frames)"))  # fmt: skip
    result = evaluate_detector(detector.to(device), dataset, device, args.batch_size, args.export, args.workers)
    if parallel.rank() == 0:
        if not result:
            print(f"{args.export}: result files written; these frames have no labels to score them by"
                  + (f", so no {args.json}" if args.json else ""))  # fmt: skip
        elif cfg.layout == "nuscenes":
            print(nuscenes.format_table(result))
        else:
            labels = [dataset.objects(i) for i in range(len(dataset))]
            print(kitti.format_table(result, kitti.count_labels(labels, cfg.classes)))
        if args.json and result:
            write_json(args.json, result)


if __name__ == "__main__":
    run_cli(main)
