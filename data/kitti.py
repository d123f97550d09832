"""KITTI object detection: a root of the official layout -> `Frame`s.   (after: kitti_files.py; next: augment.py)

A root holds training/{velodyne,calib,label_2,image_2}/NNNNNN.* and ImageSets/SPLIT.txt.
`python -m data.kitti ROOT` prints what a root holds and what is wrong with it ("is my data ok?").
dims: N points · M boxes of a frame
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cli import ArgumentParser, InputError, did_you_mean, run_cli
from data import Frame
from data.kitti_files import (  # noqa: F401 (whoever wants KITTI finds all of it here)
    TYPES,
    Calibration,
    Objects,
    boxes_from_objects,
    image_boxes,
    image_size,
    lines_of,
    no_objects,
    objects_from_boxes,
    read_calibration,
    read_cloud,
    read_objects,
    write_calibration,
    write_objects,
)


class Kitti:
    """The frames of a KITTI root: `Kitti(root)[i]` is a `Frame`.

    split: train, val, trainval, or test (folder testing, no labels). `frames` names the frames to use instead
    of the split's list. fov_only: keep only the points that the image shows, as all published models do.
    Raises InputError: for a wrong root with the expected and the found tree, for missing frames with a count.
    """

    def __init__(self, root: str | Path, split: str = "train", frames: Sequence[str] = (),
                 fov_only: bool = True) -> None:  # fmt: skip
        splits = ("train", "val", "trainval", "test")
        if split not in splits:
            raise InputError(f"expected a split, found {split!r}{did_you_mean(split, splits)}")
        self.root, self.fov_only = Path(root), fov_only
        self.folder = "testing" if split == "test" else "training"
        self.needs = {"velodyne": "bin", "calib": "txt"} | ({} if split == "test" else {"label_2": "txt"})
        listing = self.root / "ImageSets" / f"{split}.txt"
        if not all((self.root / self.folder / name).is_dir() for name in self.needs):
            raise InputError(self._tree(split))
        if not frames and not listing.is_file():
            raise InputError(f"{self._tree(split)}\n  KITTI's own download has no ImageSets: take OpenPCDet's, the folder "
                             "data/kitti/ImageSets of its repository, or use --frames")  # fmt: skip
        self.ids = [str(id).zfill(6) for id in frames if str(id)] if frames else [words[0] for _, words in lines_of(listing)]
        repeated = [id for id, count in Counter(self.ids).items() if count > 1]
        if repeated or not self.ids:
            found = f"{repeated[0]} twice" if repeated else "none"
            raise InputError(f"{'--frames' if frames else listing}: expected frame numbers, each once, found {found}")
        self._check_files(hint=not frames)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Frame:
        points, dropped = read_cloud(self._path("velodyne", i), 4)
        calib = self.calibration(i)
        if self.fov_only:
            camera = calib.lidar_to_camera(points[:, :3])
            ahead = np.flatnonzero(camera[:, 2] >= 0)
            u, v = calib.project(camera[ahead])[0].T
            width, height = image_size(self.root, self.ids[i], self.folder)
            points = points[ahead[(u >= 0) & (u < width) & (v >= 0) & (v < height)]]
        objects = self._objects_with_a_box(i)
        boxes = boxes_from_objects(objects, calib).astype(np.float32)
        return Frame(self.ids[i], points, boxes, tuple(objects.type.tolist()), dropped)

    def calibration(self, i: int) -> Calibration:
        return read_calibration(self._path("calib", i))

    def objects(self, i: int) -> Objects:
        """The label file as it stands, DontCare included; no objects for the split test."""
        if "label_2" not in self.needs:
            return no_objects()
        return read_objects(self._path("label_2", i), scored=False)

    def difficulty(self, i: int) -> np.ndarray:
        """(M,) int, per box of the frame: 0 easy, 1 moderate, 2 hard, -1 beyond, as OpenPCDet grades labels. (The
        evaluator's levels are others: each contains the easier ones, and a height at the limit is too low.)"""
        objects = self._objects_with_a_box(i)
        height = objects.bbox[:, 3] - objects.bbox[:, 1] + 1
        level = np.full(len(objects), -1)
        for grade, pixels, occlusion, truncation in ((2, 25, 2, 0.5), (1, 25, 1, 0.3), (0, 40, 0, 0.15)):
            fits = (height >= pixels) & (objects.occlusion <= occlusion) & (objects.truncation <= truncation)
            level[fits] = grade
        return level

    def _objects_with_a_box(self, i: int) -> Objects:
        objects = self.objects(i)
        return objects[objects.type != "DontCare"]

    def _path(self, name: str, i: int) -> Path:
        return self.root / self.folder / name / f"{self.ids[i]}.{self.needs[name]}"

    def _check_files(self, hint: bool) -> None:
        """Every frame has its files. One listing a folder: 3 x 3712 questions are slow on a network disk."""
        complete, missing = set(self.ids), []
        for name in self.needs:
            here = {path.name for path in (self.root / self.folder / name).iterdir()}
            lost = [i for i in range(len(self)) if self._path(name, i).name not in here]
            complete -= {self.ids[i] for i in lost}
            missing += [self._path(name, i).relative_to(self.root).as_posix() for i in lost]
        if missing:
            some = ",".join(sorted(complete)[:8]) + ",..." * (len(complete) > 8)
            advice = f"; to use those: --frames {some}" if some and hint else ""
            raise InputError(f"{self.root}: expected {len(self)} frames, found {len(complete)} (missing: "
                             f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}){advice}")  # fmt: skip

    def _tree(self, split: str) -> str:
        """The error for a root that is none: what was expected beside what was found."""
        there = self.root.is_dir()
        lines = [f"{self.root}: expected a KITTI root, found {'other things' if there else 'no such folder'}"]
        rows = {f"{self.folder}/{name}": f"/NNNNNN.{suffix}" for name, suffix in self.needs.items()}
        rows |= {f"{self.folder}/image_2": "/NNNNNN.png (optional)", f"ImageSets/{split}.txt": ""}
        for name, files in rows.items():
            path = self.root / name
            found = f"{sum(1 for _ in path.iterdir())} files" if path.is_dir() else "there" * path.is_file()
            lines.append(f"  {name + files:<42}{found or '-'}" if there else f"  {name}{files}")
        near = [self.root.parent, *sorted(self.root.glob("*/"))] if there else []
        near = [path for path in near if (path / self.folder / "velodyne").is_dir()][:1]
        return "\n".join(lines + [f"  did you mean {path}?" for path in near])


def main() -> None:
    """`python -m data.kitti ROOT`: a table, then one line for each problem; status 1 if there is any."""
    parser = ArgumentParser(prog="python -m data.kitti", description="What a KITTI root holds, problems too.")
    parser.add_argument("root", help="the folder that holds training/ and ImageSets/")
    parser.add_argument("--split", help="train, val, trainval or test; default: every frame that has points")
    parser.add_argument("--frames", default="", metavar="A,B", help="only these frames, e.g. 000000,000003")
    args = parser.parse_args()
    clouds = (Path(args.root) / "training" / "velodyne").glob("*.bin")
    frames = args.frames.split(",") if args.frames else [] if args.split else sorted(path.stem for path in clouds)
    data = Kitti(args.root, args.split or "train", frames)

    import torch  # only now: --help and a wrong root should answer at once
    from tqdm import tqdm

    from boxes import points_in_boxes

    points, inside, problems = [], {}, []  # inside: class -> points in each of its boxes
    for i in tqdm(range(len(data)), disable=None):
        try:
            frame = data[i]
        except InputError as error:
            problems.append(str(error))
            continue
        points.append(len(frame.points))
        counts = points_in_boxes(torch.from_numpy(frame.points), torch.from_numpy(frame.boxes)).sum(dim=0)
        for name, count in zip(frame.names, counts.tolist(), strict=True):
            inside.setdefault(name, []).append(count)
        intensity = frame.points[:, 3]
        if frame.dropped:
            problems.append(f"{frame.id}: {frame.dropped} points are not finite and were left out")
        if not len(intensity):
            problems.append(f"{frame.id}: no points in the image")
        elif intensity.min() < 0 or intensity.max() > 1:
            found = f"{intensity.min():g} .. {intensity.max():g}"
            problems.append(f"{frame.id}: expected intensity in [0, 1], found {found}")
    images = sum((data.root / data.folder / "image_2" / f"{id}.png").is_file() for id in data.ids)
    print(f"{data.root}: {len(data)} frames, {images} images (where there is none: 1242 x 375 px)")
    print(f"points in the image: {np.mean(points or [0]):.0f} a frame")
    print(f"{'class':<16}{'objects':>8}{'without points':>16}{'points (median)':>17}")
    for name in sorted(inside, key=lambda name: -len(inside[name])):
        counts = np.array(inside[name])
        print(f"{name:<16}{len(counts):>8}{(counts == 0).sum():>16}{np.median(counts):>17.0f}")
    every = [count for counts in inside.values() for count in counts]
    if every.count(0) > len(every) / 2:
        problems.append("most boxes hold no points: do calib and label_2 belong to these clouds?")
    print("\n".join(f"problem: {problem}" for problem in problems) or "no problems found")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    run_cli(main)
