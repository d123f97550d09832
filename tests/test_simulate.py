"""The simulator against plain loops, closed forms and KITTI's own definitions."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli import InputError, write_bytes, write_text
from data.kitti import Kitti
from data.kitti_files import read_objects, write_objects
from data.scanner import HDL64E, Pose, Scanner, first_hits, meet_ground, rotations, scan
from data.scenes import Builder, Ground, make_scene
from data.scenes import Scene as SceneOf
from data.shapes import BALL, BOX, OBJECTS, PART, POST, draw_size, part
from data.simulate_kitti import CALIBRATION, dont_care, label, make_frame
from data.simulate_kitti import simulate_kitti as simulate
from tests.scenes import extent

# Few rays, unevenly spaced, lasers at different heights; 7 x 180 or 7 x 60
COARSE = Scanner((9.0, 4.0, 1.0, -1.5, -4.0, -9.0, -20.0), (0.3, 0.25, 0.2, 0.2, 0.1, 0.1, 0.0), 2.0, 100.0)
AHEAD = replace(HDL64E, sector=45.0)


def scene_of(builder: Builder) -> SceneOf:
    parts = np.concatenate(builder.parts) if builder.parts else np.zeros(0, PART)
    boxes, velocity = np.array(builder.boxes).reshape(-1, 7), np.array(builder.velocity).reshape(-1, 2)
    return SceneOf(builder.ground, parts, boxes, tuple(builder.names), velocity)


def empty(seed: int = 0) -> Builder:
    return Builder(Ground(), np.random.default_rng(seed))


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------ rays


def inside(item: np.void, xyz: np.ndarray) -> np.ndarray:
    """Which points (n, 3) lie in a part, from the part's description alone."""
    yaw, pitch = float(item["yaw"]), float(item["pitch"])
    away = xyz - item["centre"]
    x, y, z = away.T
    x, y = x * math.cos(yaw) + y * math.sin(yaw), y * math.cos(yaw) - x * math.sin(yaw)  # turn back
    x, z = x * math.cos(pitch) - z * math.sin(pitch), z * math.cos(pitch) + x * math.sin(pitch)  # lean back
    hx, hy, hz = map(float, item["half"])
    if item["shape"] == BALL:
        return (x / hx) ** 2 + (y / hy) ** 2 + (z / hz) ** 2 <= 1
    if item["shape"] == POST:
        angle = np.radians(22.5 + 45 * np.arange(8))[:, None]
        return (np.abs(z) <= hz) & ((np.cos(angle) * x / hx + np.sin(angle) * y / hy).max(0) <= 0.96)
    up = (z + hz) / (2 * hz)  # 0 at the bottom, 1 at the top
    front, rear, side = map(float, item["taper"])
    within = (x <= hx * (1 - front * up)) & (x >= -hx * (1 - rear * up)) & (np.abs(y) <= hy * (1 - side * up))
    return within & (np.abs(z) <= hz)


@pytest.mark.parametrize("shape", [BOX, BALL, POST])
@pytest.mark.parametrize("sector, tilt", [(180.0, 0.0), (60.0, 0.0), (180.0, 0.04)])
def test_first_hit_is_where_a_march_along_the_ray_enters_a_part(shape, sector, tilt):
    """With a tilt the sensor has a pose of its own, turned and leaning, far away."""
    rng = np.random.default_rng(5 + shape)
    pose = None
    if tilt:
        x_up, turn = [[math.cos(tilt), 0, -math.sin(tilt)], [0, 1, 0], [math.sin(tilt), 0, math.cos(tilt)]], np.pi / 3
        z_turn = [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]]
        pose = Pose(np.array(z_turn) @ np.array(x_up), np.array([30.0, -20.0, 2.0]))
    scanner = replace(COARSE, sector=sector)
    rows = []
    for k in range(14):
        angle = np.pi if k == 0 else rng.uniform(-1.2, 1.2) * sector / 180 * 2.6  # the first lies on the seam
        centre = rng.uniform(4, 9) * np.array([math.cos(angle), math.sin(angle), 0]) + [
            0,
            0,
            rng.uniform(-1, 1),
        ]
        rows.append(
            part(shape, tuple(centre), tuple(rng.uniform(0.2, 1.2, 3)), "stone", rng.uniform(-3, 3),
                 rng.choice([0, rng.uniform(-1, 1)]), tuple(rng.uniform(0, 0.8, 3)))
        )  # fmt: skip
    parts = np.array(rows, PART)
    low = Ground(height=-50.0)
    if pose:
        parts["centre"] += pose.origin.astype(np.float32)
    scene = SceneOf(low, parts, np.zeros((0, 7)), (), np.zeros((0, 2)))
    hits = first_hits(scene, scanner, rng, pose)
    start = np.array([[0, 0, z] for z in scanner.origins], np.float32)
    rotation, origin = pose or (np.eye(3), np.zeros(3))
    ahead, start = (hits.rays @ rotation.T).astype(np.float32), (start @ rotation.T + origin).astype(np.float32)
    ground, _ = meet_ground(low, ahead, start, scanner.max_range, low.height)
    step, found, grazing = 0.004, 0, 0
    distance = np.arange(1.5, 13, step)
    for b, a in itertools.product(range(hits.depth.shape[0]), range(hits.depth.shape[1])):
        xyz = (hits.rays[b, a] * distance[:, None] + [0, 0, scanner.origins[b]]) @ rotation.T + origin
        hit = np.any([inside(item, xyz) for item in parts], axis=0)
        if hit.any():
            found += 1
            if not hit[0] and abs(hits.depth[b, a] - distance[hit.argmax()]) > 2 * step:
                grazing += 1
        elif abs(hits.depth[b, a] - ground[b, a]) > 1e-3:
            grazing += 1  # a chord shorter than the march's step
    assert found > 20
    assert grazing <= 0.02 * found


def test_the_lean_of_a_part_moves_its_top_forward():
    rotation = rotations(
        np.array([part(BOX, (0, 0, 0), (1, 1, 1), "stone", yaw=np.pi / 2, pitch=0.3)], PART)
    )[0]
    np.testing.assert_allclose(
        rotation @ [0, 0, 1], [0, math.sin(0.3), math.cos(0.3)], atol=1e-6
    )  # forward is +y
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) > 0


def test_flat_ground_is_met_where_the_triangle_says():
    hits = first_hits(scene_of(empty()), COARSE, np.random.default_rng(0))
    for b, elevation in enumerate(COARSE.elevations):
        expected = (1.73 + COARSE.origins[b]) / math.sin(math.radians(-elevation)) if elevation < 0 else 200.0
        np.testing.assert_allclose(hits.depth[b], min(expected, 200.0), rtol=1e-4)


def test_points_on_uneven_ground_lie_on_it():
    builder = Builder(
        Ground(
            slope=(0.01, -0.02), curb=0.12, waves=np.array([[0.1, 0.2, 0.1, 1.0], [0.05, -0.3, 0.2, 2.0]])
        ),
        np.random.default_rng(0),
    )
    points = scan(scene_of(builder), replace(AHEAD, noise=0.0), np.random.default_rng(1)).points
    height = builder.ground.z(points[:, 0], points[:, 1])
    away = np.abs(points[:, 2] - height)
    assert len(points) > 5000 and np.quantile(away, 0.99) < 0.03
    assert builder.ground.z(0, 0) == pytest.approx(-1.73)


def test_the_road_is_where_its_coordinates_say():
    ground = Ground(heading=0.3, curvature=0.01, offset=-2.0)
    for u, d in ((0.0, -2.0), (20.0, 3.0), (-15.0, 1.0)):
        x, y, heading = ground.from_road(u, d)
        np.testing.assert_allclose(ground.to_road(x, y), (u, d), atol=1e-9)
        further = ground.from_road(u + 1e-4, d)
        assert heading == pytest.approx(math.atan2(further[1] - y, further[0] - x), abs=1e-3)
    assert ground.from_road(0, -2)[:2] == pytest.approx((0, 0))


# ------------------------------------------------------------------ echoes


def board(distance: float, material: str = "stone", **more) -> SceneOf:
    """A board 30 m wide and 12 m high across the view."""
    builder = empty()
    builder.put([part(BOX, (0, 0, 0), (0.5, 15, 6), material, **more)], distance + 0.5, 0, 0)
    return scene_of(builder)


def test_range_noise_has_the_promised_spread_and_no_bias():
    points = scan(board(12.0), replace(AHEAD, noise=0.05), np.random.default_rng(0)).points.astype(float)
    points = points[(points[:, 0] > 11) & (np.abs(points[:, 1]) < 10) & (points[:, 2] > -1.4)]
    x, y, z = points[:, :3].T
    z = z - 0.2  # the upper block's height, to 1 cm; only the direction of the ray is wanted
    error = (x - 12.0) * np.sqrt(x**2 + y**2 + z**2) / x
    assert len(error) > 5000
    assert error.std() == pytest.approx(0.05, rel=0.05) and abs(error.mean()) < 0.003


def test_weak_and_far_echoes_are_lost_more_often():
    def returned(distance: float, reflectance: float) -> float:
        seen = scan(board(distance, reflectance=reflectance), AHEAD, np.random.default_rng(0))
        return (seen.points[:, 0] > distance - 0.5).mean() * len(seen.points)

    fraction = {r: returned(70.0, r) / returned(10.0, 0.3) for r in (0.3, 0.005)}
    assert fraction[0.005] < 0.5 * fraction[0.3]


def test_gaps_let_their_share_of_rays_through():
    points = scan(board(12.0, "fence"), AHEAD, np.random.default_rng(0)).points  # MATERIALS: 60 % pass
    solid = scan(board(12.0), AHEAD, np.random.default_rng(0)).points
    front, wall = ((np.abs(p[:, 0] - 12) < 0.2) & (np.abs(p[:, 1]) < 10) for p in (points, solid))
    assert front.sum() / wall.sum() == pytest.approx(0.4, abs=0.03)


def test_vegetation_is_entered_and_met_inside():
    builder = empty()
    builder.put([part(BALL, (0, 0, 1), (2, 2, 2), "leaf")], 12, 0, 0)
    seen = scan(scene_of(builder), replace(AHEAD, noise=0), np.random.default_rng(0))
    away = np.linalg.norm(seen.points[:, :3] - [12, 0, -0.73], axis=1)
    leaves = seen.points[(away < 2.001) & (seen.points[:, 2] > -1.6)]
    depth = leaves[:, 0].max() - leaves[:, 0].min()
    assert len(leaves) > 100 and depth > 2  # a solid ball would show its front only


def test_points_are_what_kitti_promises():
    points, _ = make_frame(3, 0, 0, full_circle=True)
    assert points.dtype == np.float32 and points.shape[1] == 4 and np.isfinite(points).all()
    assert 90_000 < len(points) < 134_000
    assert points[:, 3].min() >= 0 and points[:, 3].max() <= 1
    assert np.linalg.norm(points[:, :3], axis=1).max() < 80.5
    ahead, _ = make_frame(3, 0, 0, full_circle=False)
    assert 20_000 < len(ahead) < 34_000
    assert np.abs(np.degrees(np.arctan2(ahead[:, 1], ahead[:, 0]))).max() <= 45


def test_a_scanner_that_hears_nothing_gives_an_empty_frame(tmp_path):
    scene = make_scene(np.random.default_rng(0))
    seen = scan(scene, replace(AHEAD, max_range=0.5), np.random.default_rng(0))
    assert seen.points.shape == (0, 4)
    objects = label(scene, seen, CALIBRATION)
    write_objects(tmp_path / "none.txt", objects)
    assert len(objects) == 0 and (tmp_path / "none.txt").read_text() == ""


# ------------------------------------------------------------------ objects and labels


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_parts_stay_inside_the_box_that_is_labelled(name):
    rng = np.random.default_rng(1)
    for _ in range(60):
        size = draw_size(name, rng)
        parts = np.array(OBJECTS[name](*size, rng), PART)
        low, high = extent(parts)
        half = np.array([size[0] / 2, size[1] / 2])
        assert (low[:2] > -half - 0.02).all() and (high[:2] < half + 0.02).all(), (size, low, high)
        assert low[2] > -0.03 and high[2] < size[2] + 0.02, (size, low, high)
        assert high[2] > size[2] - 0.1 and (high - low)[0] > 0.4 * size[0]  # and fill it


def test_points_on_objects_lie_inside_their_boxes():
    """The box test is by complex numbers: independent of every rotation matrix."""
    total, outside = 0, 0
    for index in range(6):
        rng = np.random.default_rng((8, 0, index))
        scene = make_scene(rng)
        seen = scan(scene, replace(AHEAD, noise=0.0), rng)
        for row, box in enumerate(scene.boxes):
            xyz = seen.points[seen.owner == row, :3].astype(float)
            flat = (xyz[:, 0] + 1j * xyz[:, 1] - complex(box[0], box[1])) * np.exp(-1j * box[6])
            far = np.maximum(np.abs(flat.real) - box[3] / 2, np.abs(flat.imag) - box[4] / 2)
            far = np.maximum(far, np.abs(xyz[:, 2] - box[2]) - box[5] / 2)
            total, outside = total + len(far), outside + int((far > 0.03).sum())
    assert total > 5000 and outside == 0


def test_nothing_stands_inside_anything_else():
    shapely = pytest.importorskip("shapely")
    from shapely import affinity

    for index in range(4):
        scene = make_scene(np.random.default_rng((1, 0, index)))
        areas = []
        for x, y, _, length, width, _, yaw in scene.boxes:
            area = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
            areas.append(affinity.translate(affinity.rotate(area, yaw, (0, 0), use_radians=True), x, y))
        for a, b in itertools.combinations(areas, 2):
            assert a.intersection(b).area == 0


def car_behind(wall: tuple[float, float] | None):
    """Labels of one car at 20 m; a wall at 10 m, where the car spans about y = -0.4 .. 0.4, may hide it."""
    builder = empty()
    assert builder.add_object("Car", 20.0, 0.0, 0.0)
    if wall:
        low, high = wall
        builder.put([part(BOX, (0, 0, 1.5), (0.1, (high - low) / 2, 1.6), "stone")], 10, (low + high) / 2, 0)
    scene = scene_of(builder)
    return label(scene, scan(scene, AHEAD, np.random.default_rng(0)), CALIBRATION)


def test_occlusion_is_the_hidden_share():
    free = car_behind(None)
    assert free.type.tolist() == ["Car"] and free.occlusion.tolist() == [0] and free.truncation[0] == 0
    assert free.location[0, 2] == pytest.approx(20 - 0.27, abs=0.05)
    assert car_behind((0.0, 3.0)).occlusion.tolist() == [1]  # one half
    assert car_behind((-0.2, 3.0)).occlusion.tolist() == [2]  # about three quarters
    assert car_behind((-0.385, 3.0)).type.tolist() in (["DontCare"], [])  # all but a sliver
    assert len(car_behind((-3.0, 3.0))) == 0  # all
    assert car_behind((3.0, 6.0)).occlusion.tolist() == [0]  # beside it


def test_truncation_is_the_share_of_the_2d_box_outside_the_image():
    found = []
    for d in np.arange(4.0, 11.0, 0.5):
        builder = empty()
        builder.add_object("Car", 9.0, d, 0.4)
        scene = scene_of(builder)
        objects = label(scene, scan(scene, AHEAD, np.random.default_rng(0)), CALIBRATION)
        if len(objects) == 0 or objects.type[0] != "Car":
            continue
        x, y, z, length, width, height, yaw = scene.boxes[0]
        u, v = [], []
        for a, b, c in itertools.product((-0.5, 0.5), repeat=3):  # the corners, by hand
            dx, dy = a * length, b * width
            xyz = [x + dx * math.cos(yaw) - dy * math.sin(yaw), y + dx * math.sin(yaw) + dy * math.cos(yaw)]
            camera = CALIBRATION.lidar_to_camera(np.array([[*xyz, z + c * height]]))[0]
            u.append((721.5377 * camera[0] + 609.5593 * camera[2] + 44.85728) / camera[2])
            v.append((721.5377 * camera[1] + 172.854 * camera[2] + 0.2163791) / camera[2])
        whole = (max(u) - min(u)) * (max(v) - min(v))
        left, right, top, bottom = max(min(u), 0), min(max(u), 1241), max(min(v), 0), min(max(v), 374)
        assert objects.truncation[0] == pytest.approx(1 - (right - left) * (bottom - top) / whole, abs=0.02)
        np.testing.assert_allclose(
            objects.bbox[0], [left, top, right, bottom], atol=8
        )  # upright in the camera
        found.append(objects.truncation[0])
    assert min(found) == 0 and max(found) > 0.5 and found == sorted(found)  # further left, more outside


def test_alpha_is_rotation_seen_from_the_camera():
    _, objects = make_frame(0, 0, 0, full_circle=False)
    cared = objects[objects.type != "DontCare"]
    expected = cared.rotation_y - np.arctan2(cared.location[:, 0], cared.location[:, 2])
    np.testing.assert_allclose(np.cos(cared.alpha - expected), 1, atol=1e-9)


def test_dont_care_regions_of_groups():
    boxes = np.array([[0, 0, 10, 10], [30, 0, 40, 10], [8, 5, 32, 9], [100, 100, 110, 120.0]])
    regions = dont_care(boxes)
    assert sorted(map(tuple, regions.bbox)) == [(0, 0, 40, 10), (100, 100, 110, 120)]
    assert (
        set(regions.type) == {"DontCare"}
        and set(regions.alpha) == {-10}
        and set(regions.location[0]) == {-1000}
    )
    assert len(dont_care(np.zeros((0, 4)))) == 0


# ------------------------------------------------------------------ the set on the disk


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("sim") / "set", train=3, val=2, seed=4, workers=1, progress=False)


def test_loader_reads_the_set_and_finds_the_objects_of_the_scene(small):
    train, val, both = (Kitti(small, split) for split in ("train", "val", "trainval"))
    assert train.ids == ["000000", "000001", "000002"] and val.ids == ["000003", "000004"]
    assert both.ids == train.ids + val.ids
    for i, index in enumerate([(4, 0, 0), (4, 0, 1), (4, 0, 2), (4, 1, 0), (4, 1, 1)]):
        scene = make_scene(np.random.default_rng(index))
        frame = both[i]
        assert 14_000 < len(frame.points) < 21_000 and len(frame.boxes) > 0
        for box, name in zip(frame.boxes, frame.names):
            away = np.linalg.norm(scene.boxes[:, :3] - box[:3], axis=1)
            nearest = away.argmin()
            # 2 decimals, and the label's vertical is the camera's, about a degree from the LiDAR's
            assert away[nearest] < 0.03 and scene.names[nearest] == name
            np.testing.assert_allclose(scene.boxes[nearest, 3:6], box[3:6], atol=0.0051)
            assert math.cos(scene.boxes[nearest, 6] - box[6]) > math.cos(0.006)


def test_labels_are_within_kittis_limits(small):
    seen = 0
    for path in sorted((small / "training" / "label_2").iterdir()):
        objects = read_objects(path, scored=False)
        cared = objects[objects.type != "DontCare"]
        assert set(cared.type) <= set(OBJECTS) and set(cared.occlusion) <= {0, 1, 2}
        assert (cared.truncation >= 0).all() and (cared.truncation <= 1).all()
        assert (objects.bbox >= 0).all() and (objects.bbox <= [1241, 374, 1241, 374]).all()
        assert (objects.bbox[:, :2] <= objects.bbox[:, 2:]).all()
        seen += len(cared)
    assert seen > 15


def test_frames_do_not_depend_on_workers_or_interruptions(small, tmp_path):
    expected = digest(small)
    simulate(tmp_path / "two", train=3, val=2, seed=4, workers=2, progress=False)
    assert digest(tmp_path / "two") == expected

    for kind, number in (("velodyne", 1), ("label_2", 3), ("velodyne", 4)):
        next((tmp_path / "two" / "training" / kind).glob(f"00000{number}.*")).unlink()
    (tmp_path / "two" / "ImageSets" / "train.txt").unlink()
    kept = tmp_path / "two" / "training" / "velodyne" / "000000.bin"
    kept.write_bytes(b"\0" * 16)  # a complete frame is kept as it is, not made again
    simulate(tmp_path / "two", train=3, val=2, seed=4, workers=1, progress=False)
    found = digest(tmp_path / "two")
    assert {name for name in expected if found[name] != expected[name]} == {"training/velodyne/000000.bin"}
    assert set(found) == set(expected)  # no temporary files are left


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode() and list(tmp_path.iterdir()) == [path]
    real = Path.write_bytes
    for reason in (OSError("disk full"), KeyboardInterrupt()):

        def half(self, content, reason=reason):
            real(self, content[:3])
            raise reason

        with monkeypatch.context() as patched, pytest.raises(type(reason)):
            patched.setattr(Path, "write_bytes", half)
            write_bytes(path, b"another")
        assert path.read_bytes() == "größer\n".encode() and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        write_bytes(tmp_path, b"a folder is in the way")
    with pytest.raises(OSError):
        write_bytes(path / "below a file", b"")


def test_other_seeds_splits_and_indices_are_other_frames():
    frames = [make_frame(*which, False)[0][:500] for which in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(frames, 2))


def test_other_settings_and_other_folders_are_refused(small, tmp_path):
    before = digest(small)
    with pytest.raises(InputError, match=r"other settings: seed 4 \(asked for: 5\)"):
        simulate(small, train=3, val=2, seed=5, progress=False)
    with pytest.raises(InputError, match="train 3"):
        simulate(small, train=4, val=2, seed=4, progress=False)
    with pytest.raises(InputError, match="at least one frame"):
        simulate(tmp_path / "none", train=0, val=0, progress=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "real" / "training").mkdir(parents=True)
    with pytest.raises(InputError, match="empty or new folder"):
        simulate(tmp_path / "real", train=1, val=0, progress=False)
    assert digest(small) == before and not (tmp_path / "real" / "ImageSets").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "simulation.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON"):
        simulate(tmp_path / "broken", train=1, val=0, progress=False)
    with pytest.raises(InputError, match=r"simulation\.json/new: expected a folder to write a set in, found: ") as error:
        simulate(tmp_path / "broken" / "simulation.json" / "new", train=1, val=0, progress=False)
    assert "\n" not in str(error.value)


def command(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-m", "data.simulate", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line(tmp_path):
    out = tmp_path / "set"
    done = command("--out", str(out), "--train", "1", "--val", "1", "--workers", "1", "--full-circle")
    assert done.returncode == 0, done.stderr
    assert "1 training and 1 held-out" in done.stdout and "simulating" in done.stderr
    assert json.loads((out / "simulation.json").read_text())["full_circle"] is True
    wrong = command("--out", str(out), "--trian", "3")
    assert (
        wrong.returncode == 2 and "did you mean --train" in wrong.stderr and "Traceback" not in wrong.stderr
    )
    assert command("compare", "--root", str(out), "--real", str(tmp_path), "--out", "x.png").returncode == 2


def test_comparison_with_real_frames(small, real_kitti, tmp_path):
    """Coarse on purpose: it fails when scanner or scenes drift away from the sensor, not from chance."""
    from data.resemblance import compare_main, measure

    compare_main(["--root", str(small), "--real", str(real_kitti), "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    frames = ["000000", "000001", "000002", "000003", "000004", "000005"]
    real, simulated = measure(Kitti(real_kitti, frames=frames)), measure(Kitti(small, "trainval"))
    assert real["points"].tolist() == [20285, 18630, 20210, 18911, 19063, 19962]  # the published counts
    assert abs(simulated["points"].mean() / real["points"].mean() - 1) < 0.15
    profile = [m["rings"] / m["rings"].sum() for m in (simulated, real)]
    assert 0.5 * np.abs(profile[0] - profile[1]).sum() < 0.12  # total variation distance
