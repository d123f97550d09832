"""Augmentation: what it must leave as it is, what must move together, and pasted objects that never touch another."""

import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from cli import InputError
from data import Frame
from data import augment as augment_module
from data.augment import ObjectDatabase, augment, flip_x, flip_y, paste, rotate, scale

KINDS = {"Car": (3.9, 1.6, 1.5), "Pedestrian": (0.8, 0.6, 1.7), "Cyclist": (1.8, 0.6, 1.7), "Van": (5.0, 1.9, 2.2)}
ALWAYS = 1.0  # probability of flip_y


class Draws:
    """A random generator that says what it is told."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.value <= high
        return self.value

    def random(self) -> float:
        return self.value


def rectangle(box) -> Polygon:
    x, y, _, length, width, _, yaw = (float(v) for v in box[:7])
    corners = [(a * length / 2, b * width / 2) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    return Polygon([(x + a * np.cos(yaw) - b * np.sin(yaw), y + a * np.sin(yaw) + b * np.cos(yaw)) for a, b in corners])


def inside(points, box, grow: float = 0.0) -> np.ndarray:
    """Rows of the points in the box, enlarged on every side by `grow` m: distances from its three middle planes."""
    box = box.astype(float)
    axes = np.array([[np.cos(box[6]), np.sin(box[6]), 0], [-np.sin(box[6]), np.cos(box[6]), 0], [0, 0, 1]])
    return np.flatnonzero((np.abs((points[:, :3] - box[:3]) @ axes.T) <= box[3:6] / 2 + grow).all(axis=1))


def scene(seed: int, objects: int = 6, columns: int = 4, velocities: bool = False, clutter: int = 300) -> Frame:
    """Objects that do not touch, each full of points (clear of its walls), and points anywhere around. Its arrays refuse
    to be written."""
    rng = np.random.default_rng(seed)
    boxes, names, points = [], [], [rng.uniform((0, -40, -3), (70, 40, 1), (clutter, 3))]
    while len(boxes) < objects:
        name = str(rng.choice(list(KINDS)))
        box = np.array([rng.uniform(5, 65), rng.uniform(-35, 35), rng.uniform(-1.2, -0.5), *KINDS[name],
                        rng.uniform(-np.pi, np.pi)])  # fmt: skip
        if all(rectangle(box).distance(rectangle(other)) > 0.1 for other in boxes):
            cos, sin = np.cos(box[6]), np.sin(box[6])
            local = rng.uniform(-0.45, 0.45, (rng.integers(5, 40), 3)) * box[3:6]
            points.append(local @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + box[:3])
            boxes.append(box)
            names.append(name)
    points = np.concatenate(points)
    walls = [set(inside(points, box, 0.01)) - set(inside(points, box, -0.01)) for box in boxes]
    points = np.delete(points, sorted(set().union(*walls)), axis=0)  # rounding must not carry a point through a wall
    points = np.c_[points, rng.uniform(0, 1, (len(points), columns - 3))].astype(np.float32)
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 7)
    if velocities:
        boxes = np.c_[boxes, rng.uniform(-10, 10, (len(boxes), 2)).astype(np.float32)]
    points.flags.writeable = boxes.flags.writeable = False
    return Frame(f"{seed:06d}", points, boxes, tuple(names), dropped=seed)


def nothing(columns: int = 4, velocities: bool = False) -> Frame:
    return Frame("000000", np.zeros((0, columns), np.float32), np.zeros((0, 9 if velocities else 7), np.float32), ())


def assert_same(a: Frame, b: Frame, tolerance: float = 0.0) -> None:
    assert a.names == b.names and a.id == b.id and a.dropped == b.dropped
    for one, other in ((a.points, b.points), (a.boxes, b.boxes)):
        assert one.shape == other.shape and one.dtype == other.dtype == np.float32
    assert np.abs(a.points - b.points).max(initial=0) <= tolerance
    turned = (a.boxes[:, 6] - b.boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(turned).max(initial=0) <= max(tolerance, 2e-6)
    assert np.abs(np.delete(a.boxes - b.boxes, 6, axis=1)).max(initial=0) <= tolerance


MOVES = {
    "flip": lambda frame, rng: flip_y(frame, rng, ALWAYS),
    "rotate": lambda frame, rng: rotate(frame, rng, np.pi),
    "scale": lambda frame, rng: scale(frame, rng, 0.8, 1.3),
    "all": lambda frame, rng: augment(frame, rng, None, {}, True, 0.8, (0.9, 1.1)),
}
each_move = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)


# ------------------------------------------------------------------ flip, rotate, scale


@each_move
@pytest.mark.parametrize("velocities", [False, True])
def test_points_stay_in_their_boxes(move, velocities):
    """The very same points are in the very same box, whatever the world does."""
    for seed in range(4):
        frame = scene(seed, velocities=velocities, columns=5)
        moved = move(frame, np.random.default_rng(seed))
        assert not np.array_equal(moved.points, frame.points) or move is MOVES["all"]
        for before, after in zip(frame.boxes, moved.boxes, strict=True):
            assert len(inside(frame.points, before)) >= 5
            assert np.array_equal(inside(frame.points, before), inside(moved.points, after))


@each_move
def test_intensity_and_time_lag_are_not_geometry(move):
    frame = scene(1, columns=5)
    assert np.array_equal(move(frame, np.random.default_rng(0)).points[:, 3:], frame.points[:, 3:])


@each_move
def test_frame_without_objects_or_points(move):
    for frame in (nothing(), nothing(5, velocities=True), scene(0, objects=0), replace(scene(0), points=nothing().points)):
        moved = move(frame, np.random.default_rng(0))
        assert moved.points.shape == frame.points.shape and moved.boxes.shape == frame.boxes.shape


@each_move
def test_yaw_stays_in_its_range_and_dtype_float32(move):
    frame = scene(2)
    boxes = frame.boxes.copy()
    boxes[:3, 6] = -np.pi, 3.1415925, 0
    for seed in range(20):
        moved = move(replace(frame, boxes=boxes), np.random.default_rng(seed))
        assert moved.boxes.dtype == moved.points.dtype == np.float32
        assert (moved.boxes[:, 6] >= np.float32(-np.pi)).all() and (moved.boxes[:, 6] < np.float32(np.pi)).all()


@each_move
def test_a_moving_object_arrives_where_its_velocity_says(move):
    """Move, then wait a second; or wait a second, then move: the same place."""
    frame = scene(3, velocities=True)
    later = frame.boxes.copy()
    later[:, :2] += later[:, 7:]
    move_now = move(frame, np.random.default_rng(5)).boxes
    move_later = move(replace(frame, boxes=later), np.random.default_rng(5)).boxes
    assert np.abs(move_now[:, :2] + move_now[:, 7:] - move_later[:, :2]).max() < 1e-4
    assert np.abs(move_now[:, 7:] - frame.boxes[:, 7:]).max() > 1e-2 or move is MOVES["all"]


def test_flip_twice_is_the_identity_and_once_mirrors_y():
    frame = scene(0, velocities=True)
    once = flip_y(frame, np.random.default_rng(0), ALWAYS)
    assert_same(flip_y(once, np.random.default_rng(0), ALWAYS), frame)
    assert np.array_equal(once.points, frame.points * np.array([1, -1, 1, 1], np.float32))
    assert np.allclose(once.boxes, frame.boxes * [1, -1, 1, 1, 1, 1, -1, 1, -1], atol=1e-6)


def test_flip_happens_half_of_the_time():
    frame = scene(0)
    flipped = [not np.array_equal(flip_y(frame, np.random.default_rng(i)).points, frame.points) for i in range(400)]
    assert 150 < sum(flipped) < 250
    assert flip_y(frame, Draws(0.49)).points[0, 1] == -frame.points[0, 1]
    assert flip_y(frame, Draws(0.5)).points[0, 1] == frame.points[0, 1]


def test_the_other_mirror_and_the_shift_of_nuscenes():
    frame = scene(0)
    flipped = [flip_x(frame, np.random.default_rng(i)).points[0, 0] != frame.points[0, 0] for i in range(400)]
    assert 150 < sum(flipped) < 250
    rng = np.random.default_rng(0)
    moves = np.array([augment_module.shift(frame, rng, 0.5).points[0, :3] - frame.points[0, :3] for _ in range(2000)])
    assert np.allclose(moves.std(axis=0), 0.5, rtol=0.06) and np.abs(moves.mean(axis=0)).max() < 0.05
    assert np.abs(np.corrcoef(moves.T) - np.eye(3)).max() < 0.08, "each axis has its own"


def test_rotation_is_counter_clockwise_and_its_inverse_undoes_it():
    frame = scene(0, velocities=True)
    turned = rotate(frame, Draws(0.7), 0.785)
    assert_same(rotate(turned, Draws(-0.7), 0.785), frame, tolerance=3e-5)
    x, y = frame.points[:, 0].astype(float), frame.points[:, 1].astype(float)
    distance, azimuth = np.hypot(x, y), np.arctan2(y, x) + 0.7
    expected = np.c_[distance * np.cos(azimuth), distance * np.sin(azimuth), frame.points[:, 2:]]
    assert np.abs(turned.points - expected).max() < 1e-4
    assert np.allclose(np.cos(turned.boxes[:, 6] - frame.boxes[:, 6]), np.cos(0.7), atol=1e-5)


def test_scaling_multiplies_lengths_and_no_angle():
    frame = scene(0, velocities=True)
    larger = scale(frame, Draws(1.25), 0.5, 1.5)
    assert_same(scale(larger, Draws(0.8), 0.5, 1.5), frame, tolerance=3e-5)
    assert np.allclose(larger.points, frame.points * [1.25, 1.25, 1.25, 1])
    assert np.allclose(larger.boxes, frame.boxes * np.array([1.25] * 6 + [1] + [1.25] * 2))


def test_limits_are_kept_and_reached():
    frame = Frame("0", np.array([[10, 0, 0, 0]], np.float32), np.zeros((0, 7), np.float32), ())
    angles = [np.arctan2(*rotate(frame, np.random.default_rng(i), 0.3).points[0, 1::-1]) for i in range(300)]
    sizes = [scale(frame, np.random.default_rng(i), 0.9, 1.2).points[0, 0] / 10 for i in range(300)]
    assert -0.3 <= min(angles) < -0.28 and 0.28 < max(angles) <= 0.3
    assert 0.899 <= min(sizes) < 0.91 and 1.19 < max(sizes) <= 1.201


# ------------------------------------------------------------------ ground-truth paste


@pytest.fixture(scope="module")
def database_of(tmp_path_factory):
    def build(frames: list[Frame], **options) -> ObjectDatabase:
        folder = tmp_path_factory.mktemp("database") / "objects"
        return ObjectDatabase.build(folder, frames, ("Car", "Pedestrian", "Cyclist"), **options)

    return build


@pytest.fixture(scope="module")
def database(database_of) -> ObjectDatabase:
    return database_of([scene(seed, objects=12) for seed in range(100, 108)])


COUNTS = {"Car": 8, "Pedestrian": 5, "Cyclist": 6}


def test_database_holds_every_wanted_object_with_exactly_its_points(database_of):
    frames = [scene(seed) for seed in range(5)]
    database = database_of(frames)
    expected = [(name, box, inside(frame.points, box)) for frame in frames for name, box in zip(frame.names, frame.boxes)]
    expected = [(frame, *rest) for frame, rest in zip([f for f in frames for _ in f.names], expected) if rest[0] != "Van"]
    assert len(database) == len(expected) == len(database.begin) - 1
    for k, (frame, name, box, rows) in enumerate(expected):
        assert database.names[k] == name and np.array_equal(database.boxes[k], box)
        assert np.array_equal(database.points[database.begin[k] : database.begin[k + 1]], frame.points[rows])


@pytest.mark.parametrize("count, kept", [(4, 0), (5, 1)])
def test_objects_with_few_points_are_not_worth_pasting(database_of, count, kept):
    car = np.array([[20, 3, -1, 4, 2, 1.5, 0.3]], np.float32)
    points = np.tile(np.array([[20, 3, -1, 0.5]], np.float32), (count, 1))
    walker = scene(0, objects=0, clutter=0)
    box = np.array([[40, 3, -1, 0.8, 0.6, 1.7, 0]], np.float32)
    other = replace(walker, points=np.tile(np.array([[40, 3, -1, 0]], np.float32), (9, 1)), boxes=box, names=("Pedestrian",))
    database = database_of([Frame("0", points, car, ("Car",)), other])
    assert database.names.tolist() == ["Car"] * kept + ["Pedestrian"]


def test_objects_beyond_the_data_sets_levels_are_left_out(database_of):
    class Graded(list):
        def difficulty(self, _: int) -> np.ndarray:
            return np.array([0, -1, 2, -1, 1, 0])

    frame = scene(0)
    frames = Graded([replace(frame, names=("Car",) * 6)])
    assert np.array_equal(database_of(frames).boxes, frame.boxes[[0, 2, 4, 5]])


def test_no_object_at_all_is_an_input_error(database_of):
    for frames in ([nothing()], [scene(0, objects=0)], []):
        with pytest.raises(InputError, match="found none; switch it off with --paste 0$"):
            database_of(frames)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("velocities", [False, True])
def test_database_survives_its_folder_whoever_cut_it_out(tmp_path, velocities, workers):
    frames = [scene(seed, velocities=velocities, columns=5) for seed in range(5)]
    state = torch.get_rng_state()
    database = ObjectDatabase.build(tmp_path / "objects", frames, ("Car", "Pedestrian"), workers=workers)
    assert torch.equal(torch.get_rng_state(), state), "what is trained next does not depend on it"
    again = ObjectDatabase.load(tmp_path / "objects")
    expected = [(name, box, frame.points[inside(frame.points, box)]) for frame in frames
                for name, box in zip(frame.names, frame.boxes) if name in ("Car", "Pedestrian")]  # fmt: skip
    for found in (database, again):
        assert found.names.tolist() == [name for name, *_ in expected] and found.points.dtype == found.boxes.dtype == np.float32
        assert np.array_equal(found.boxes, np.stack([box for _, box, _ in expected]))
        assert np.array_equal(found.points, np.concatenate([points for *_, points in expected]))
    assert os.listdir(tmp_path) == ["objects"], "the temporary folder is gone"


def test_a_database_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(file, **_):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        ObjectDatabase.build(tmp_path / "objects", [scene(0)], ("Car", "Pedestrian", "Cyclist"))
    assert os.listdir(tmp_path) == []


def test_of_two_that_build_one_database_both_have_it(tmp_path, monkeypatch):
    real = np.savez

    def other_first(path, **arrays):
        monkeypatch.setattr(np, "savez", real)
        ObjectDatabase.build(tmp_path / "objects", [scene(0)], ("Car", "Pedestrian", "Cyclist"))
        real(path, **arrays)

    monkeypatch.setattr(np, "savez", other_first)
    monkeypatch.setattr("os.getpid", iter(range(9)).__next__)
    second = ObjectDatabase.build(tmp_path / "objects", [scene(0)], ("Car", "Pedestrian", "Cyclist"))
    first = ObjectDatabase.load(tmp_path / "objects")
    assert len(first) and np.array_equal(first.points, second.points) and os.listdir(tmp_path) == ["objects"]


def test_a_process_that_is_not_forked_opens_the_database_itself(tmp_path, monkeypatch):
    frames = [scene(seed) for seed in range(5)]
    monkeypatch.chdir(tmp_path)
    database = ObjectDatabase.build(Path("objects"), frames, ("Car", "Pedestrian", "Cyclist"))
    assert database.points.nbytes > 5000 > 10 * len(sent := pickle.dumps(database))
    monkeypatch.chdir("/")  # it may have another working directory
    found = pickle.loads(sent)
    for name in ("names", "boxes", "begin", "points"):
        assert np.array_equal(getattr(found, name), getattr(database, name))
    assert isinstance(found.points, np.memmap)


class Broken(list):
    def __getitem__(self, i: int) -> Frame:
        raise InputError(f"frame {i}: expected points, found cli.py")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_input_error_of_another_process_is_one_line(tmp_path, workers):
    with pytest.raises(InputError) as error:
        ObjectDatabase.build(tmp_path / "objects", Broken([0]), ("Car",), workers=workers)
    assert str(error.value) == "frame 0: expected points, found cli.py" and os.listdir(tmp_path) == []


def break_array(name, change):
    def write(folder, database):
        arrays = {key: getattr(database, key) for key in ("names", "boxes", "begin")}
        np.savez(folder / "objects.npz", **{**arrays, name: change(arrays[name])})

    return write


BROKEN_FOLDERS = {
    "cut off": lambda folder, _: (folder / "objects.npz").write_bytes((folder / "objects.npz").read_bytes()[:-200]),
    "empty": lambda folder, _: (folder / "objects.npz").write_bytes(b""),
    "text": lambda folder, _: (folder / "objects.npz").write_text("not a database"),
    "missing": lambda folder, _: (folder / "objects.npz").unlink(),
    "another npz": lambda folder, _: np.savez(folder / "objects.npz", x=np.zeros(3)),
    "an npy": lambda folder, _: np.save((folder / "objects.npz").open("wb"), np.zeros(3)),
    "pickled names": break_array("names", lambda a: a.astype(object)),
    "fewer boxes": break_array("boxes", lambda a: a[:-1]),
    "other counts": break_array("begin", lambda a: a * 7 + 1),
    "no points": lambda folder, _: (folder / "points.bin").unlink(),
    "fewer points": lambda folder, _: (folder / "points.bin").write_bytes((folder / "points.bin").read_bytes()[:-4]),
}


@pytest.mark.parametrize("spoil", BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_broken_database_is_an_input_error(tmp_path, database, spoil):
    folder = tmp_path / "objects"
    ObjectDatabase.build(folder, [scene(0)], ("Car", "Pedestrian", "Cyclist"))
    spoil(folder, database)
    with pytest.raises(InputError, match="objects: expected an object database") as error:
        ObjectDatabase.load(folder)
    assert "\n" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), objects=st.integers(0, 10))
def test_pasted_objects_touch_no_other_and_bring_their_points(database, seed, objects):
    frame = scene(seed % 50, objects)
    pasted = paste(frame, np.random.default_rng(seed), database, COUNTS)
    added = pasted.boxes[len(frame.boxes) :]
    assert np.array_equal(pasted.boxes[: len(frame.boxes)], frame.boxes)
    assert pasted.names[: len(frame.names)] == frame.names and len(pasted.names) == len(pasted.boxes)
    shapes = [rectangle(box) for box in pasted.boxes]
    for i in range(len(frame.boxes), len(shapes)):
        assert max((shapes[i].intersection(other).area for other in shapes[:i]), default=0) < 1e-6
    for name, limit in COUNTS.items():
        assert pasted.names.count(name) <= max(limit, frame.names.count(name))
    hidden = {row for box in added for row in inside(frame.points, box)}
    kept = np.delete(frame.points, sorted(hidden), axis=0)
    assert np.array_equal(pasted.points[: len(kept)], kept), "the scene's points, but for those in pasted boxes"
    sources = [next(k for k in range(len(database)) if np.array_equal(database.boxes[k], box)) for box in added]
    assert len(set(sources)) == len(sources), "no object twice"
    assert [database.names[k] for k in sources] == list(pasted.names[len(frame.names) :])
    bits = [database.points[database.begin[k] : database.begin[k + 1]] for k in sources]
    assert np.array_equal(pasted.points[len(kept) :], np.concatenate([frame.points[:0], *bits]))


def grid_of_cars(n: int, x0: float) -> tuple[Frame, ...]:
    """n cars far from each other, each in a frame of its own."""
    places = [(x0 + 6 * (i % 10), 4.0 * (i // 10)) for i in range(n)]
    boxes = [np.array([[x, y, -1, 3.9, 1.6, 1.5, 0]], np.float32) for x, y in places]
    return tuple(Frame(str(i), np.tile(np.r_[b[0, :3], 0.5].astype(np.float32), (5, 1)), b, ("Car",))
                 for i, b in enumerate(boxes))  # fmt: skip


@pytest.mark.parametrize("present, limit, added", [(0, 7, 7), (3, 7, 4), (7, 7, 0), (9, 7, 0), (0, 50, 30), (2, 0, 0)])
def test_paste_fills_up_to_the_count_and_not_beyond(database_of, present, limit, added):
    """Where nothing collides, exactly count - present objects are added, as many as there are."""
    database = database_of(grid_of_cars(30, 0))
    cars = grid_of_cars(10, 0)[:present]
    shift = np.array([0, 50, 0, 0, 0, 0, 0], np.float32)
    boxes = np.concatenate([np.zeros((0, 7), np.float32), *(f.boxes - shift for f in cars)])
    frame = Frame("x", np.zeros((0, 4), np.float32), boxes, ("Car",) * present)
    pasted = paste(frame, np.random.default_rng(0), database, {"Car": limit, "Pedestrian": 4})
    assert pasted.names == ("Car",) * (present + added)


def test_objects_of_any_class_are_in_the_way(database_of):
    database = database_of(grid_of_cars(1, 20))
    for name in ("Car", "Van", "Misc"):
        for shift, free in ((0, False), (1.55, False), (1.65, True)):  # the cars are 1.6 m wide
            box = database.boxes + np.array([0, shift, 0, 0, 0, 0, 0], np.float32)
            frame = Frame("x", np.zeros((0, 4), np.float32), box, (name,))
            assert len(paste(frame, np.random.default_rng(0), database, {"Car": 2}).boxes) == 1 + free


def test_an_object_that_was_dropped_is_in_nobodys_way(database_of):
    """A stands in the scene, B overlaps A, C overlaps B alone: C is pasted whatever the order."""
    place = {"A": 20.0, "B": 23.0, "C": 26.0}  # 3.9 m long
    boxes = {k: np.array([[x, 0, -1, 3.9, 1.6, 1.5, 0]], np.float32) for k, x in place.items()}
    frames = [Frame(k, np.tile(np.r_[b[0, :3], 0.5].astype(np.float32), (5, 1)), b, ("Car",)) for k, b in boxes.items()]
    for seed in range(10):
        pasted = paste(frames[0], np.random.default_rng(seed), database_of(frames[1:]), {"Car": 3})
        assert pasted.boxes[:, 0].tolist() == [20.0, 26.0]


def test_paste_into_nothing_and_paste_of_nothing(database):
    for frame in (nothing(), scene(0, objects=0), replace(scene(0), points=nothing().points)):
        assert len(paste(frame, np.random.default_rng(0), database, COUNTS).boxes) > len(frame.boxes)
    frame = scene(1)
    for counts in ({}, {"Car": 0}, {"Tram": 5}, {"Car": -3}):
        assert_same(paste(frame, np.random.default_rng(0), database, counts), frame)


def test_objects_with_velocities_are_pasted_with_them(database_of):
    database = database_of([scene(seed, velocities=True, columns=5) for seed in range(4)])
    pasted = paste(nothing(5, velocities=True), np.random.default_rng(0), database, COUNTS)
    assert pasted.boxes.shape[1] == 9 and pasted.points.shape[1] == 5
    assert all(any(np.array_equal(box, source) for source in database.boxes) for box in pasted.boxes)


def test_every_object_has_its_turn(database):
    """Over many frames each object is drawn, and about as often as any other of its class."""
    drawn = {}
    for seed in range(300):
        for box in paste(nothing(), np.random.default_rng(seed), database, {"Car": 1}).boxes:
            drawn[box.tobytes()] = drawn.get(box.tobytes(), 0) + 1
    cars = (database.names == "Car").sum()
    assert len(drawn) == cars and max(drawn.values()) < 4 * 300 / cars


# ------------------------------------------------------------------ all of it


def recipe(frame, seed, database, **changes):
    options = dict(counts=COUNTS, flip=True, rotation=0.785, scaling=(0.95, 1.05)) | changes
    return augment(frame, np.random.default_rng(seed), database, *options.values())


def test_augmentation_is_a_function_of_frame_and_seed(database):
    frame = scene(7)
    first = recipe(frame, (0, 3, 7), database)
    recipe(scene(8), (0, 3, 8), database)
    np.random.default_rng(0).random()
    assert_same(recipe(frame, (0, 3, 7), database), first)
    assert not np.array_equal(recipe(frame, (0, 4, 7), database).boxes[:6], first.boxes[:6])


def test_order_is_paste_flip_rotate_scale(database):
    frame = scene(9)
    rng = np.random.default_rng(1)
    expected = scale(rotate(flip_y(paste(frame, rng, database, COUNTS), rng), rng, 0.785), rng, 0.95, 1.05)
    assert_same(recipe(frame, 1, database), expected)


def test_everything_switched_off_is_the_identity(database):
    frame = scene(9)
    assert_same(recipe(frame, 1, None, flip=False, rotation=0.0, scaling=(1.0, 1.0)), frame)
    assert_same(recipe(frame, 1, database, counts={}, flip=False, rotation=0.0, scaling=(1.0, 1.0)), frame)


def test_pasted_points_stay_in_their_boxes_too(database):
    frame = scene(11)
    pasted = paste(frame, np.random.default_rng(2), database, COUNTS)
    moved = recipe(frame, 2, database)
    for before, after in zip(pasted.boxes, moved.boxes, strict=True):
        assert np.array_equal(inside(pasted.points, before), inside(moved.points, after))


def test_the_second_mirror_and_the_shift_move_velocities_as_they_should():
    """Written out: front and back change places; a shift moves centres and leaves sizes, yaw and velocity alone."""
    from data.augment import flip_x, shift

    points = np.array([[1.0, 2.0, 3.0, 0.5]], dtype=np.float32)
    boxes = np.array([[4.0, 5.0, 0.0, 3.0, 2.0, 1.0, 0.3, 6.0, 7.0]], dtype=np.float32)
    frame = Frame("f", points, boxes, ("car",))
    mirrored = flip_x(frame, np.random.default_rng(0), probability=1.0)
    assert mirrored.points[0].tolist() == [-1, 2, 3, 0.5]
    np.testing.assert_allclose(mirrored.boxes[0], [-4, 5, 0, 3, 2, 1, math.pi - 0.3, -6, 7], rtol=1e-6)
    front = boxes[0, :2] + 1.5 * np.array([math.cos(0.3), math.sin(0.3)])  # the middle of the car's front
    x, y, yaw = mirrored.boxes[0, [0, 1, 6]]
    np.testing.assert_allclose([x + 1.5 * math.cos(yaw), y + 1.5 * math.sin(yaw)], [-front[0], front[1]], rtol=1e-5)
    moved = shift(frame, np.random.default_rng(0), 0.5)
    by = moved.points[0, :3] - points[0, :3]
    assert np.abs(by).min() > 0 and moved.points[0, 3] == 0.5
    np.testing.assert_allclose(moved.boxes[0, :3] - boxes[0, :3], by, rtol=1e-5)
    assert moved.boxes[0, 3:].tolist() == boxes[0, 3:].tolist() and frame.boxes is boxes
