"""KITTI's files and loader against plain loops, hand-made cases, real frames, and what users get wrong."""

import math
import struct
import sys

import numpy as np
import pytest
import torch

import boxes as box_ops
from cli import InputError, run_cli
from data.kitti import (
    TYPES,
    Calibration,
    Kitti,
    Objects,
    boxes_from_objects,
    image_boxes,
    image_size,
    main,
    objects_from_boxes,
    read_calibration,
    read_cloud,
    read_objects,
    write_calibration,
    write_objects,
)

AXES = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # LiDAR (forward, left, up) -> camera (right, down, forward)
P2 = np.array([[707.0, 0, 604, 45.7], [0, 707, 180.5, -0.35], [0, 0, 1, 0.005]])
LABELS = """Car 0.00 0 1.55 614.24 181.78 727.31 284.77 1.57 1.73 4.15 1.00 1.75 13.22 1.62
DontCare -1 -1 -10 5.00 229.89 214.12 367.61 -1 -1 -1 -1000 -1000 -1000 -10
Person_sitting 0.25 2 -0.20 712.40 143.00 810.73 307.92 1.29 0.48 1.20 1.84 1.47 8.41 0.01
"""
CAR = LABELS.splitlines()[0]


def turn(x: float, y: float, z: float) -> np.ndarray:
    cx, sx, cy, sy, cz, sz = (f(a) for a in (x, y, z) for f in (np.cos, np.sin))
    return (np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
            @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]))  # fmt: skip


TILTED = Calibration(P2, turn(0.01, -0.008, 0.005), np.c_[AXES @ turn(0.007, 0.015, -0.01), [0.01, -0.06, -0.29]])
LEVEL = Calibration(P2, np.eye(3), np.c_[AXES, [0.01, -0.06, -0.29]])


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(9)


@pytest.fixture
def root(tmp_path):
    """Two training frames, 000003 (labels, an image of 640 x 200) and 000010 (neither objects nor image), one test frame."""
    rng, root = np.random.default_rng(5), tmp_path / "kitti"
    for folder, ids in (("training", ("000003", "000010")), ("testing", ("000001",))):
        for name in ("velodyne", "calib", "label_2", "image_2")[: None if folder == "training" else 2]:
            (root / folder / name).mkdir(parents=True)
        for id in ids:
            points = rng.uniform((-20, -30, -3, 0), (60, 30, 2, 1), (500, 4)).astype("<f4")
            points.tofile(root / folder / "velodyne" / f"{id}.bin")
            write_calibration(root / folder / "calib" / f"{id}.txt", TILTED)
    (root / "training/label_2/000003.txt").write_text(LABELS)
    (root / "training/label_2/000010.txt").write_text("")
    (root / "training/image_2/000003.png").write_bytes(png(640, 200))
    (root / "ImageSets").mkdir()
    for split, text in {"train": "000010\n000003\n", "val": "000003", "test": "000001\n"}.items():
        (root / f"ImageSets/{split}.txt").write_text(text)
    return root


# ------------------------------------------------------------------ labels and results


def plain_objects(path):
    """What the format says, line by line: a list of dicts."""
    rows = []
    for line in open(path):
        w = line.split()
        if w:
            rows.append(dict(type=w[0], truncation=float(w[1]), occlusion=int(float(w[2])), alpha=float(w[3]),
                             bbox=[float(v) for v in w[4:8]], dimensions=[float(v) for v in w[8:11]],
                             location=[float(v) for v in w[11:14]], rotation_y=float(w[14]),
                             score=float(w[15]) if len(w) > 15 else math.nan))  # fmt: skip
    return rows


def assert_same(objects: Objects, rows: list[dict]) -> None:
    assert len(objects) == len(rows)
    for i, row in enumerate(rows):
        for column, value in row.items():
            found = getattr(objects, column)[i]
            assert found == value if column == "type" else np.array_equal(found, value, equal_nan=True), (i, column)


@pytest.mark.parametrize("scored", [False, True])
def test_read_objects_equals_a_plain_loop(tmp_path, scored):
    rng = np.random.default_rng(int(scored))
    lines = []
    for type_ in TYPES * 3:
        numbers = np.round(rng.uniform(0.1, 50, 14 + scored), 4)
        lines.append(" ".join([type_, str(numbers[0]), str(rng.integers(-1, 4)), *map(str, numbers[2:])]))
    lines[1:1] = ["", "   "]  # blank lines are no objects
    path = tmp_path / "000000.txt"
    path.write_bytes(("\r\n".join(lines).replace(" ", "  ", 40) + "  \r\n").encode())  # as an editor on Windows saves it
    objects = read_objects(path, scored)
    assert_same(objects, plain_objects(path))
    assert objects.occlusion.dtype == np.int64 and objects.bbox.shape == (27, 4)


def test_real_labels_are_read_as_a_plain_loop_does_and_rewritten_byte_for_byte(real_kitti, tmp_path):
    files = sorted((real_kitti / "training" / "label_2").glob("*.txt"))
    assert len(files) == 8
    for path in files:
        objects = read_objects(path, scored=False)
        assert_same(objects, plain_objects(path))
        write_objects(tmp_path / "out.txt", objects)
        assert (tmp_path / "out.txt").read_bytes() == path.read_bytes(), path.name


def test_real_results_are_rewritten_with_the_same_content(real_kitti, tmp_path):
    files = sorted((real_kitti / "detections").glob("*.txt"))
    assert len(files) == 5
    for path in files:
        write_objects(tmp_path / "out.txt", read_objects(path, scored=True))
        for ours, theirs in zip(open(tmp_path / "out.txt"), open(path), strict=True):
            assert ours.split()[:15] == theirs.split()[:15] and float(ours.split()[15]) == float(theirs.split()[15])


def test_results_keep_four_decimals_and_scores_that_hardly_differ(tmp_path):
    objects = read_objects(write(tmp_path, f"{CAR} 0.5\n{CAR} 0.5\n"), scored=True)
    scores = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1))], dtype=np.float64)
    moved = Objects(**{**vars(objects), "score": scores, "location": objects.location + 0.12344})
    write_objects(tmp_path / "out.txt", moved)
    again = read_objects(tmp_path / "out.txt", scored=True)
    assert again.score[0] < again.score[1]
    assert np.abs(again.location - moved.location).max() < 5.1e-5
    assert (tmp_path / "out.txt").read_text().startswith("Car 0 0 1.5500 614.2400 ")


def test_empty_file_is_a_frame_without_objects_and_back(tmp_path):
    for scored in (False, True):
        objects = read_objects(write(tmp_path, "\n"), scored)
        assert len(objects) == 0 and objects.bbox.shape == (0, 4) and objects.occlusion.dtype == np.int64
        write_objects(tmp_path / "out.txt", objects)
        assert (tmp_path / "out.txt").read_text() == ""


def test_labels_and_results_in_one_file_are_refused(tmp_path):
    objects = read_objects(write(tmp_path, f"{CAR}\n{CAR}\n"), scored=False)
    with pytest.raises(ValueError, match="some objects have a score"):
        write_objects(tmp_path / "out.txt", Objects(**{**vars(objects), "score": np.array([0.5, np.nan])}))
    assert not (tmp_path / "out.txt").exists()


def write(folder, text):
    path = folder / "000000.txt"
    path.write_text(text)
    return path


BAD_LINES = {
    "a column too few": (CAR.rsplit(" ", 1)[0], False, "expected 15 columns (a label), found 14"),
    "a result as label": (CAR + " 0.9", False, "expected 15 columns (a label), found 16"),
    "a label as result": (CAR, True, "expected 16 columns (a result: the last is the score), found 15"),
    "one word": ("nonsense", False, "expected 15 columns (a label), found 1"),
    "a word for a number": (CAR.replace("13.22", "far"), False, "column 14 (z): expected a number, found 'far'"),
    "NaN": (CAR.replace("1.55", "nan"), False, "column 4 (alpha): expected a number, found 'nan'"),
    "infinite score": (CAR + " inf", True, "column 16 (score): expected a number, found 'inf'"),
    "half an occlusion": (CAR.replace(" 0 ", " 0.5 "), False, "column 3 (occlusion): expected an integer, found 0.5"),
    "a type in lower case": (CAR.replace("Car", "car"), False, "expected a type, found 'car' (did you mean Car?)"),
    "a misspelt type": (CAR.replace("Car", "Cyclst"), False, "found 'Cyclst' (did you mean Cyclist?)"),
    "a strange type": (CAR.replace("Car", "xyz"), False, "found 'xyz' (known: Car, Van,"),
    "no width": (CAR.replace("1.73", "0.00"), False, "expected height, width, length > 0, found 1.57 0.00 4.15"),
    "negative sizes": (CAR.replace("1.57 1.73 4.15", "-1 -1 -1"), False, "length > 0, found -1 -1 -1"),
}


@pytest.mark.parametrize("line, scored, message", BAD_LINES.values(), ids=BAD_LINES)
def test_malformed_line_is_named_with_file_line_expected_and_found(tmp_path, line, scored, message):
    good = CAR + (" 0.5" if scored else "")
    path = write(tmp_path, f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(InputError) as error:
        read_objects(path, scored)
    assert str(error.value).startswith(f"{path}:3") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_results_may_hold_other_classes_and_2d_boxes_only(tmp_path):
    line = "Bus -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10 0.5\n"
    assert read_objects(write(tmp_path, line), scored=True).type.tolist() == ["Bus"]


@pytest.mark.parametrize("reader", [lambda p: read_objects(p, False), read_calibration, lambda p: read_cloud(p, 4)])
def test_missing_or_unreadable_file_is_an_input_error(tmp_path, reader):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            reader(path)


def test_binary_file_given_as_labels_is_an_input_error(tmp_path):
    path = tmp_path / "000000.txt"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(InputError, match="000000.txt:1"):
        read_objects(path, scored=False)


# ------------------------------------------------------------------ calibration


def plain_chain(calib, point):
    """One LiDAR point through the documented chain with nested sums: camera point and pixel."""
    cam0 = [sum(calib.tr_velo_to_cam[i][j] * point[j] for j in range(3)) + calib.tr_velo_to_cam[i][3] for i in range(3)]
    cam = [sum(calib.r0_rect[i][j] * cam0[j] for j in range(3)) for i in range(3)]
    u, v, w = (sum(calib.p2[i][j] * cam[j] for j in range(3)) + calib.p2[i][3] for i in range(3))
    return cam, (u / w, v / w)


def test_projection_equals_nested_sums_and_its_inverse_is_one():
    points = np.random.default_rng(0).uniform((2, -20, -3), (60, 20, 3), (50, 3))
    camera = TILTED.lidar_to_camera(points)
    pixels, depth = TILTED.project(camera)
    for i, point in enumerate(points):
        cam, pixel = plain_chain(TILTED, point)
        assert np.allclose(camera[i], cam, atol=1e-12) and np.allclose(pixels[i], pixel, atol=1e-9)
    assert np.array_equal(depth, camera[:, 2])
    assert np.abs(TILTED.camera_to_lidar(camera) - points).max() < 1e-12
    assert TILTED.lidar_to_camera(np.zeros((0, 3))).shape == (0, 3)


def test_calibration_survives_its_file(tmp_path):
    write_calibration(tmp_path / "c.txt", TILTED)
    again = read_calibration(tmp_path / "c.txt")
    for name, matrix in vars(TILTED).items():
        assert np.allclose(getattr(again, name), matrix, rtol=1e-12, atol=0), name
    keys = [line.split()[0] for line in open(tmp_path / "c.txt")]
    assert keys == ["P0:", "P1:", "P2:", "P3:", "R0_rect:", "Tr_velo_to_cam:", "Tr_imu_to_velo:"]


def test_real_calibration_is_read_as_written(real_kitti):
    calib = read_calibration(real_kitti / "training/calib/000000.txt")
    assert calib.p2[0].tolist() == [707.0493, 0, 604.0814, 45.75831] and calib.p2.shape == (3, 4)
    assert calib.r0_rect[0].tolist() == [0.9999128, 0.01009263, -0.008511932]
    assert calib.tr_velo_to_cam[0].tolist() == [0.006927964, -0.9999722, -0.002757829, -0.02457729]


BAD_CALIBRATIONS = {
    "a line missing": (("R0_rect", "R_rect"), r"c.txt: expected a line 'R0_rect: ...', found P0, P1, P2, P3, R_rect, Tr_"),
    "a value missing": (("P2: 7.070000000000e+02 ", "P2: "), r"c.txt:3: expected 12 values of P2, found 11"),
    "a value too many": (("R0_rect: ", "R0_rect: 1 "), r"c.txt:5: expected 9 values of R0_rect, found 10"),
    "a word": (("P2: 7.07", "P2: x7.07"), r"c.txt:3, value 1 of P2: expected a number, found 'x7.07"),
    "NaN": (("P2: 7.070000000000e+02", "P2: nan"), r"c.txt:3, value 1 of P2: expected a number, found 'nan'"),
    "all zeros": (("R0_rect:", f"R0_rect: {'0 ' * 9}\nX:"), r"c.txt:5: expected an invertible matrix R0_rect"),
}


@pytest.mark.parametrize("change, message", BAD_CALIBRATIONS.values(), ids=BAD_CALIBRATIONS)
def test_malformed_calibration_is_named_with_file_and_line(tmp_path, change, message):
    path = tmp_path / "c.txt"
    write_calibration(path, TILTED)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(InputError, match=message):
        read_calibration(path)


def test_empty_calibration_file_is_named(tmp_path):
    with pytest.raises(InputError, match="expected a line 'P2: ...', found an empty file"):
        read_calibration(write(tmp_path, ""))


# ------------------------------------------------------------------ boxes


def random_boxes(n: int, seed: int) -> np.ndarray:
    """In front of the camera and in its view."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(12, 60, n)
    size = rng.uniform((0.3, 0.3, 0.5), (5, 2.5, 3), (n, 3))
    return np.c_[x, x * rng.uniform(-0.5, 0.5, n), rng.uniform(-2, 0, n), size, rng.uniform(-np.pi, np.pi, n)]


def angle_between(a, b):
    return np.abs((np.asarray(a) - b + np.pi) % (2 * np.pi) - np.pi)


def test_boxes_survive_the_trip_to_the_camera_and_back():
    boxes = random_boxes(200, 1)
    scores = np.linspace(0, 1, 200)
    names = [TYPES[i % 8] for i in range(200)]
    objects = objects_from_boxes(boxes, names, scores, TILTED, (1242, 375))
    assert objects.type.tolist() == names and np.array_equal(objects.score, scores)
    again = boxes_from_objects(objects, TILTED)
    assert np.abs(again[:, :6] - boxes[:, :6]).max() < 1e-9
    assert angle_between(again[:, 6], boxes[:, 6]).max() < 1e-9
    assert (again[:, 6] >= -np.pi).all() and (again[:, 6] < np.pi).all()
    assert (np.abs(objects.rotation_y) <= np.pi).all() and (np.abs(objects.alpha) <= np.pi).all()
    assert set(objects.occlusion) == {-1} and set(objects.truncation) == {-1}
    wide = np.c_[boxes, np.ones((200, 2))].astype(np.float32)  # velocities are not KITTI's affair
    assert np.allclose(objects_from_boxes(wide, names, None, TILTED, (1242, 375)).location, objects.location, atol=1e-4)


def test_real_labels_survive_the_trip_to_lidar_and_back(real_kitti):
    frames = [path.stem for path in sorted((real_kitti / "training/velodyne").glob("*.bin"))]
    data, off = Kitti(real_kitti, frames=frames), []
    for i, id in enumerate(frames):
        objects = data.objects(i)
        objects = objects[objects.type != "DontCare"]
        size = image_size(real_kitti, id)
        again = objects_from_boxes(boxes_from_objects(objects, data.calibration(i)), objects.type.tolist(), None,
                                   data.calibration(i), size)  # fmt: skip
        assert np.abs(again.location - objects.location).max() < 1e-6
        assert np.abs(again.dimensions - objects.dimensions).max() < 1e-6
        assert angle_between(again.rotation_y, objects.rotation_y).max() < 1e-6
        assert angle_between(again.alpha, objects.alpha).max() < 0.04  # KITTI's own alpha is rounded
        off.append(np.abs(again.bbox - objects.bbox))
    assert np.max(np.concatenate(off)) < 14 and np.median(np.concatenate(off)) < 0.5  # px: theirs are drawn by hand


def one_object(size, location, rotation_y) -> Objects:
    height, width, length = size
    return Objects(np.array(["Car"]), np.zeros(1), np.zeros(1, int), np.zeros(1), np.zeros((1, 4)),
                   np.array([[height, width, length]]), np.array([location]), np.array([rotation_y]), np.full(1, np.nan))


@pytest.mark.parametrize("rotation_y, yaw", [(-np.pi / 2, 0), (0, -np.pi / 2), (np.pi / 2, -np.pi), (np.pi, np.pi / 2)])
def test_box_of_a_known_object(rotation_y, yaw):
    """13 m ahead of the camera, 2 m to its right, standing 1.6 m below it; the camera 0.29 m ahead of the LiDAR."""
    box = boxes_from_objects(one_object((1.5, 1.7, 4.0), (2.0, 1.6, 13.0), rotation_y), LEVEL)[0]
    assert np.allclose(box[:6], [13.29, -1.99, -1.6 - 0.06 + 0.75, 4.0, 1.7, 1.5], atol=1e-12)
    assert angle_between(box[6], yaw) < 1e-12


def test_alpha_is_the_heading_seen_along_the_ray():
    """A car that drives away: seen from behind wherever it stands straight ahead, more of its flank to the right."""
    boxes = np.array([[20.29, 0.01, -1, 4, 1.7, 1.5, 0.0], [20.29, 0.01 - 20, -1, 4, 1.7, 1.5, 0.0]])
    objects = objects_from_boxes(boxes, ["Car", "Car"], None, LEVEL, (1242, 375))
    assert np.allclose(objects.rotation_y, -np.pi / 2) and len(objects) == 2
    assert np.allclose(objects.alpha, [-np.pi / 2, -np.pi / 2 - np.pi / 4])


def test_image_box_surrounds_the_projected_corners_of_the_lidar_box():
    """With level frames the box's LiDAR corners (boxes.py), projected one by one, say the same."""
    boxes = random_boxes(100, 2)
    objects = objects_from_boxes(boxes, ["Car"] * 100, None, LEVEL, (10**6, 10**6))
    found = image_boxes(objects.location, objects.dimensions, objects.rotation_y, LEVEL)
    corners = box_ops.corners(torch.from_numpy(boxes)).numpy()
    for box, (left, top, right, bottom) in zip(corners, found, strict=True):
        pixels = np.array([plain_chain(LEVEL, corner)[1] for corner in box])
        assert np.allclose(pixels.min(axis=0), (left, top)) and np.allclose(pixels.max(axis=0), (right, bottom))


def test_2d_box_of_an_object_that_reaches_behind_the_camera():
    """The part in front counts, and only that: compared with dots along the box's edges."""
    rng = np.random.default_rng(3)
    dots, ends = np.linspace(-0.5, 0.5, 4001), [(a, b) for a in (-0.5, 0.5) for b in (-0.5, 0.5)]
    net = np.concatenate([np.insert(np.tile([a, b], (4001, 1)), axis, dots, axis=1) for axis in range(3) for a, b in ends])
    shown = 0
    for _ in range(40):
        box = np.array([rng.uniform(-1, 1), rng.choice([-1, 1]) * rng.uniform(1.5, 4), -0.9, 4.2, 1.7, 1.5,
                        rng.uniform(-0.5, 0.5)])  # fmt: skip
        cos, sin = np.cos(box[6]), np.sin(box[6])
        solid = (net * box[3:6]) @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + box[:3]
        camera = LEVEL.lidar_to_camera(solid)
        ahead = camera[camera[:, 2] >= 0.1]
        pixels = np.clip(LEVEL.project(ahead)[0], 0, (1241, 374))
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        objects = objects_from_boxes(box[None], ["Car"], None, LEVEL, (1242, 375))
        if (high > low).all():
            assert len(objects) == 1 and np.abs(objects.bbox[0] - [*low, *high]).max() < 6  # px: the dots are not dense
            shown += 1
        else:
            assert len(objects) == 0
    assert 10 < shown < 40


def test_objects_outside_the_image_are_left_out_and_others_are_clipped():
    car = [-1, 4, 1.7, 1.5, 0]
    places = {"seen": (20, 0), "behind": (-20, 0), "left": (10, 30), "right": (10, -30), "half": (10, 8.5)}
    boxes = np.array([[*xy, *car] for xy in places.values()])
    scores = np.arange(5) / 10
    objects = objects_from_boxes(boxes, list(places), scores, LEVEL, (1242, 375))
    assert objects.type.tolist() == ["seen", "half"] and objects.score.tolist() == [0, 0.4]
    assert objects.bbox[1, 0] == 0 and 0 < objects.bbox[1, 2] < 300
    assert np.isnan(image_boxes(np.array([[0, 1, -9.0]]), np.ones((1, 3)), np.zeros(1), LEVEL)).all()
    huge = objects_from_boxes(np.array([[3.0, 0, 0, 1, 20, 20, 0]]), ["Car"], None, LEVEL, (1242, 375))
    assert huge.bbox[0].tolist() == [0, 0, 1241, 374]  # KITTI's last pixel


def test_no_boxes_give_no_objects():
    for boxes in (np.zeros((0, 7)), np.zeros((0, 9), np.float32), np.zeros(0)):
        objects = objects_from_boxes(boxes, [], np.zeros(0), TILTED, (1242, 375))
        assert len(objects) == 0 and boxes_from_objects(objects, TILTED).shape == (0, 7)


# ------------------------------------------------------------------ clouds and images


def test_points_that_are_not_finite_are_dropped_and_counted(tmp_path):
    points = np.random.default_rng(0).uniform(0, 1, (9, 4)).astype(np.float32)
    for row, column, value in ((1, 0, np.nan), (4, 2, np.inf), (4, 1, np.nan), (7, 3, -np.inf)):
        points[row, column] = value
    points.tofile(tmp_path / "a.bin")
    read, dropped = read_cloud(tmp_path / "a.bin", 4)
    assert dropped == 3 and np.array_equal(read, points[[0, 2, 3, 5, 6, 8]])
    assert read.dtype == np.float32 and read.flags.writeable


def test_cut_off_cloud_is_an_input_error_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(16 * 5 + 4))
    with pytest.raises(InputError, match=r"a.bin: expected 16 bytes a point \(4 float32\), found 84 bytes"):
        read_cloud(tmp_path / "a.bin", 4)
    (tmp_path / "b.bin").write_bytes(b"")
    points, dropped = read_cloud(tmp_path / "b.bin", 4)
    assert points.shape == (0, 4) and dropped == 0


def test_image_size_is_the_pngs_or_the_commonest(root, real_kitti):
    assert image_size(real_kitti, "000000") == (1224, 370) and image_size(real_kitti, "000001") == (1242, 375)
    assert image_size(root, "000003") == (640, 200) and image_size(root, "000010") == (1242, 375)
    for broken in (b"", b"\x89PNG", b"\xff\xd8\xff" + bytes(50)):
        (root / "training/image_2/000003.png").write_bytes(broken)
        with pytest.raises(InputError, match="000003.png: expected a PNG image"):
            image_size(root, "000003")


# ------------------------------------------------------------------ the data set


def test_field_of_view_crop_equals_a_plain_loop(root):
    data = Kitti(root, frames=["3", "10"])
    for i, (width, height) in enumerate(((640, 200), (1242, 375))):
        points, _ = read_cloud(root / f"training/velodyne/{data.ids[i]}.bin", 4)
        kept = []
        for point in points:
            (_, _, z), (u, v) = plain_chain(data.calibration(i), point.tolist())
            if z >= 0 and 0 <= u < width and 0 <= v < height:
                kept.append(point)
        assert 10 < len(kept) < 400, "the case should cut somewhere"
        assert np.array_equal(data[i].points, kept)
        assert np.array_equal(Kitti(root, frames=["3", "10"], fov_only=False)[i].points, points)


def test_crop_of_real_frames_keeps_the_published_number_of_points(real_kitti):
    data = Kitti(real_kitti, frames=[f"{i:06d}" for i in range(6)])
    assert [len(data[i].points) for i in range(6)] == [20285, 18630, 20210, 18911, 19063, 19962]


@pytest.mark.parametrize("id, name, count", [("000000", "Pedestrian", 377), ("000003", "Car", 674)])
def test_real_boxes_hold_the_published_number_of_points(real_kitti, id, name, count):
    frame = Kitti(real_kitti, frames=[id])[0]
    inside = box_ops.points_in_boxes(torch.from_numpy(frame.points), torch.from_numpy(frame.boxes))
    assert frame.names == (name,) and inside.sum(dim=0).tolist() == [count]


def test_frames_come_in_the_order_of_the_split_with_their_objects(root):
    data = Kitti(root)
    assert data.ids == ["000010", "000003"] and len(data) == 2
    empty, frame = data[0], data[1]
    assert empty.boxes.shape == (0, 7) and empty.names == () and len(empty.points)
    assert frame.id == "000003" and frame.names == ("Car", "Person_sitting") and frame.dropped == 0
    assert frame.boxes.dtype == frame.points.dtype == np.float32
    assert np.allclose(frame.boxes[:, 3:6], [[4.15, 1.73, 1.57], [1.20, 0.48, 1.29]])  # length, width, height
    assert data.objects(1).type.tolist() == ["Car", "DontCare", "Person_sitting"]
    expected = boxes_from_objects(data.objects(1)[np.array([0, 2])], data.calibration(1))
    assert np.allclose(frame.boxes, expected, atol=1e-5)
    assert Kitti(root, "val").ids == ["000003"] and Kitti(root, "val", frames=["10", 3]).ids == ["000010", "000003"]


def test_test_split_has_no_labels(root):
    data = Kitti(root, "test")
    frame = data[0]
    assert data.ids == ["000001"] and frame.names == () and frame.boxes.shape == (0, 7) and len(frame.points)
    assert len(data.objects(0)) == 0


def test_empty_and_broken_clouds_reach_the_frame(root):
    path = root / "training/velodyne/000003.bin"
    path.write_bytes(b"")
    frame = Kitti(root, "val")[0]
    assert frame.points.shape == (0, 4) and frame.points.dtype == np.float32 and len(frame.boxes) == 2
    np.array([[20, 0, 0, 0.5], [20, np.nan, 0, 0.5]], dtype="<f4").tofile(path)
    frame = Kitti(root, "val")[0]
    assert len(frame.points) == 1 and frame.dropped == 1


def test_difficulty_is_openpcdets_grade_of_each_box(root):
    def line(height, occlusion, truncation, name="Car"):
        return f"{name} {truncation} {occlusion} 0 100 100 200 {100 + height} 1.5 1.6 4 0 1.7 20 0\n"

    cases = [((39, 0, 0.15), 0), ((38.9, 0, 0.15), 1), ((39, 1, 0.15), 1), ((39, 0, 0.16), 1), ((24, 1, 0.3), 1),
             ((24, 1, 0.31), 2), ((24, 2, 0.3), 2), ((24, 2, 0.5), 2), ((23.9, 0, 0), -1), ((60, 3, 0), -1),
             ((60, 0, 0.51), -1)]  # fmt: skip
    text = "".join(line(*case) for case, _ in cases)
    (root / "training/label_2/000003.txt").write_text(line(60, 0, 0, "DontCare") + text)
    assert Kitti(root, "val").difficulty(0).tolist() == [level for _, level in cases]


def without(*paths):
    def change(root):
        for path in paths:
            target = root / path
            target.rename(root.with_name("elsewhere")) if target.is_dir() else target.unlink()

    return change


def rewrite(path, text):
    return lambda root: (root / path).write_text(text)


BAD_ROOTS = {
    "unknown split": (lambda _: None, {"split": "tain"}, "expected a split, found 'tain' (did you mean train?)"),
    "no labels": (without("training/label_2"), {}, "training/label_2/NNNNNN.txt               -"),
    "no list": (without("ImageSets/train.txt"), {}, "data/kitti/ImageSets of its repository, or use --frames"),
    "empty list": (rewrite("ImageSets/train.txt", "\n"), {}, "train.txt: expected frame numbers, each once, found none"),
    "twice in the list": (rewrite("ImageSets/train.txt", "000003\n000003\n"), {}, "found 000003 twice"),
    "twice asked for": (lambda _: None, {"frames": ["3", "000003"]}, "--frames: expected frame numbers, each once, found"),
    "nothing asked for": (lambda _: None, {"frames": ["", ""]}, "--frames: expected frame numbers, each once, found none"),
    "a label missing": (without("training/label_2/000010.txt"), {},
                        "expected 2 frames, found 1 (missing: training/label_2/000010.txt); to use those: --frames 000003"),
    "all missing": (rewrite("ImageSets/train.txt", "\n".join(f"{i:06d}" for i in range(20, 30))), {},
                    "expected 10 frames, found 0 (missing: training/velodyne/000020.bin, training/velodyne/000021.bin, "
                    "training/velodyne/000022.bin, ...)"),
    "asked for and missing": (lambda _: None, {"frames": ["77"]}, "expected 1 frames, found 0 (missing: training/velodyne/0"),
}  # fmt: skip


def test_commas_too_many_among_the_frames_are_dropped(root):
    assert Kitti(root, frames=["", "3", ""]).ids == ["000003"]


@pytest.mark.parametrize("change, options, message", BAD_ROOTS.values(), ids=BAD_ROOTS)
def test_incomplete_root_is_an_input_error_that_says_what_is_missing(root, change, options, message):
    change(root)
    with pytest.raises(InputError) as error:
        Kitti(root, **options)
    assert message in str(error.value)


def test_wrong_root_shows_the_expected_tree_and_the_right_root_nearby(root, tmp_path):
    for wrong in (root / "training", root.parent):
        with pytest.raises(InputError) as error:
            Kitti(wrong)
        lines = str(error.value).splitlines()
        assert lines[0] == f"{wrong}: expected a KITTI root, found other things"
        assert [line.split()[0] for line in lines[1:6]] == [
            "training/velodyne/NNNNNN.bin", "training/calib/NNNNNN.txt", "training/label_2/NNNNNN.txt",
            "training/image_2/NNNNNN.png", "ImageSets/train.txt"]  # fmt: skip
        assert lines[-1].strip() == f"did you mean {root}?"
    with pytest.raises(InputError, match="found no such folder"):
        Kitti(tmp_path / "none")


def test_errors_in_a_frames_files_surface_when_it_is_read(root):
    data = Kitti(root, "val")
    (root / "training/label_2/000003.txt").write_text(CAR.replace("Car", "Lorry"))
    with pytest.raises(InputError, match="label_2/000003.txt:1: expected a type, found 'Lorry'"):
        data[0]
    (root / "training/velodyne/000003.bin").unlink()
    with pytest.raises(InputError, match="000003.bin: cannot be read"):
        data[0]


# ------------------------------------------------------------------ python -m data.kitti


def check(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["kitti", *map(str, words)])
    with pytest.raises(SystemExit) as status:
        run_cli(main)
    return int(status.value.code), *capsys.readouterr()


def test_report_on_a_sound_root(root, monkeypatch, capsys):
    (root / "training/image_2/000003.png").write_bytes(png(1242, 375))
    objects = Kitti(root, "val").objects(0)
    x, y, z = boxes_from_objects(objects, TILTED)[0, :3]
    np.array([[x, y, z, 0.5], [x, y, z + 0.1, 0.5], [x, y, z + 30, 0.5]], "<f4").tofile(root / "training/velodyne/000003.bin")
    status, text, errors = check(monkeypatch, capsys, root)
    assert status == 0 and errors == "" and text.splitlines()[-1] == "no problems found"
    assert "2 frames, 1 images" in text
    assert [line.split() for line in text.splitlines()[3:-1]] == [["Car", "1", "0", "2"], ["Person_sitting", "1", "1", "0"]]


def test_report_names_every_problem_on_a_line_and_ends_with_status_1(root, monkeypatch, capsys):
    (root / "training/label_2/000003.txt").write_text(CAR + "\n" + CAR.replace("13.22", "x"))
    np.array([[20, 0, 0, 255], [20, np.nan, 0, 0]], "<f4").tofile(root / "training/velodyne/000010.bin")
    status, text, _ = check(monkeypatch, capsys, root)
    problems = [line for line in text.splitlines() if line.startswith("problem:")]
    assert status == 1 and len(problems) == 3
    assert "000003.txt:2, column 14" in problems[0]
    assert problems[1] == "problem: 000010: 1 points are not finite and were left out"
    assert problems[2] == "problem: 000010: expected intensity in [0, 1], found 255 .. 255"
    (root / "training/label_2/000003.txt").write_text(CAR.replace("13.22", "500"))  # where no point is
    (root / "training/velodyne/000010.bin").write_bytes(b"")
    status, text, _ = check(monkeypatch, capsys, root)
    assert status == 1 and "000010: no points in the image" in text and "most boxes hold no points" in text


def test_report_on_a_wrong_root_is_an_error(tmp_path, monkeypatch, capsys):
    status, text, errors = check(monkeypatch, capsys, tmp_path / "none", "--split", "val")
    assert status == 2 and text == "" and "found no such folder" in errors
