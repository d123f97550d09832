"""plot.py: pictures show what they were given, the right way round, and survive having nothing to show."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import curves
import plot
from cli import InputError
from tests.test_curves import write_run

FRONT_LEFT = np.array([[20.0, 10.0, 0.0, 4.0, 1.6, 1.5, 0.0]])  # 20 m ahead, 10 m to the left, looking ahead
NOTHING = np.zeros((0, 7))


def points(n=50):
    return np.random.default_rng(0).uniform(-10, 40, (n, 4))


def drawn_lines(ax, role):
    (collection,) = [c for c in ax.collections if c.get_label() == role]
    return np.array(collection.get_segments())


def is_blank(path):
    pixels = imread(path)[..., :3]
    return bool((pixels == pixels[0, 0]).all())


# ------------------------------------------------------------------ scenes


def test_box_in_front_to_the_left_is_drawn_up_and_left(tmp_path):
    figure = plot.bev_scene(tmp_path / "a.png", [{"points": points(), "boxes": {"teacher": FRONT_LEFT}}])
    (ax,) = figure.axes
    figure.canvas.draw()
    sensor, box = ax.transData.transform([[0, 0], drawn_lines(ax, "teacher")[0, 0]])  # px from bottom left
    assert box[0] < sensor[0], "y is to the LEFT in the LiDAR frame: y > 0 belongs left of the sensor"
    assert box[1] > sensor[1], "x is forward: a box with x > 0 belongs above the sensor"
    assert not is_blank(tmp_path / "a.png")


@pytest.mark.parametrize("yaw, up, left", [(0, 1, 0), (np.pi / 2, 0, 1), (np.pi, -1, 0), (-np.pi / 2, 0, -1)])
def test_heading_tick_points_where_the_object_looks(tmp_path, yaw, up, left):
    box = FRONT_LEFT.copy()
    box[0, 6] = yaw  # counter-clockwise from above: pi/2 looks to the left
    (ax,) = plot.bev_scene(tmp_path / "a.png", [{"points": points(), "boxes": {"student": box}}]).axes
    centre, front = drawn_lines(ax, "student")[0, :2]
    ax.figure.canvas.draw()
    on_paper = np.subtract(*ax.transData.transform([front, centre]))
    assert np.allclose(on_paper / np.linalg.norm(on_paper), [-left, up], atol=1e-6)
    assert np.isclose(np.linalg.norm(front - centre), 2.0)  # half of the length


def test_outline_goes_round_the_four_corners():
    x, y, length, width, yaw = 3.0, -2.0, 4.0, 1.6, 0.7
    line = plot.outlines(np.array([[x, y, 9.0, length, width, 1.5, yaw]]))[0]
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    ends = {(round(a, 6), round(b, 6)) for a, b in line[2:6]}
    expected = [turn @ [i * length / 2, j * width / 2] + [x, y] for i in (1, -1) for j in (1, -1)]
    assert ends == {(round(a, 6), round(b, 6)) for a, b in expected}
    assert np.allclose(line[0], [x, y]) and np.allclose(line[1], line[6])


def test_axes_show_the_range_and_both_forms_of_it(tmp_path):
    for point_range in ((0, -20, 50, 30), (0, -20, -3, 50, 30, 1)):
        panel = {"points": points(), "boxes": {}, "point_range": point_range}
        (ax,) = plot.bev_scene(tmp_path / "a.png", [panel]).axes
        assert ax.get_xlim() == (30, -20) and ax.get_ylim() == (0, 50)
        assert ax.get_aspect() == 1 and "(m)" in ax.get_xlabel() and "(m)" in ax.get_ylabel()


def test_every_panel_role_and_box_is_there_in_its_colour(tmp_path):
    many = np.repeat(FRONT_LEFT, 5, axis=0)
    panels = [{"title": role, "points": points(), "boxes": {"ground truth": many, role: many[:3]}}
              for role in ("teacher", "student", "student + RDD")]  # fmt: skip
    figure = plot.bev_scene(tmp_path / "a.png", panels)
    assert [ax.get_title() for ax in figure.axes] == ["teacher", "student", "student + RDD"]
    for ax in figure.axes:
        assert len(drawn_lines(ax, "ground truth")) == 5 and len(drawn_lines(ax, ax.get_title())) == 3
    (legend,) = figure.legends
    shown = [line.get_color() for line in legend.get_lines()]
    assert dict(zip((text.get_text() for text in legend.texts), shown, strict=True)) == plot.COLOURS


@pytest.mark.parametrize("count, grid", [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (5, (2, 3)), (6, (2, 3))])
def test_number_of_panels(tmp_path, count, grid):
    panels = [{"points": points(3), "boxes": {}}] * count
    figure = plot.bev_scene(tmp_path / "a.png", panels)
    assert len(figure.axes) == count
    assert figure.axes[0].get_gridspec().get_geometry() == grid


def test_low_scores_fade_and_names_are_written(tmp_path):
    boxes = np.repeat(FRONT_LEFT, 2, axis=0)
    panel = {"points": points(), "boxes": {"teacher": boxes}, "scores": {"teacher": np.array([0.1, 0.9])},
             "names": {"teacher": ("Car", "Van")}}  # fmt: skip
    (ax,) = plot.bev_scene(tmp_path / "a.png", [panel]).axes
    (collection,) = [c for c in ax.collections if c.get_label() == "teacher"]
    faint, strong = collection.get_colors()[:, 3]
    assert 0.2 < faint < strong <= 1
    assert [t.get_text().strip() for t in ax.texts] == ["Car", "Van"]


def test_an_arrow_leads_where_a_box_will_be_in_a_second_and_only_moving_boxes_have_one(tmp_path):
    velocity = np.array([[3.0, 4.0], [0.1, 0.1], [np.nan, np.nan]])
    boxes = np.concatenate([np.repeat(FRONT_LEFT, 3, axis=0), velocity], axis=1)
    (ax,) = plot.bev_scene(tmp_path / "a.png", [{"points": points(), "boxes": {"ground truth": boxes}}]).axes
    (arrows,) = [c for c in ax.collections if type(c).__name__ == "Quiver"]
    assert arrows.XY.tolist() == [[10.0, 20.0]] and (arrows.U.tolist(), arrows.V.tolist()) == ([4.0], [3.0])  # across is y


def test_a_nuscenes_frame_is_turned_so_that_ahead_is_x():
    ahead = np.array([[1.0, 20.0, 0.5, 4.0, 1.6, 1.5, np.pi / 2, 0.5, 7.0]])  # y ahead, x to the right: driving away
    points, boxes = plot.face_forward(ahead[:, :3], ahead)
    assert np.allclose(points, [[20.0, -1.0, 0.5]])
    assert np.allclose(boxes, [[20.0, -1.0, 0.5, 4.0, 1.6, 1.5, 0.0, 7.0, -0.5]])
    assert ahead[0, 0] == 1.0, "the frame's own arrays stay"


def test_nothing_to_show_is_no_error(tmp_path):
    panels = [{"points": np.zeros((0, 4)), "boxes": {"teacher": NOTHING, "ground truth": np.zeros(0)}},
              {"points": np.zeros(0), "boxes": {}}]  # fmt: skip
    assert len(plot.bev_scene(tmp_path / "new" / "a.png", panels).axes) == 2
    assert (tmp_path / "new" / "a.png").is_file()  # and its folder was made


def test_colours_follow_roles_and_are_never_shared():
    found = plot.colours(["sim-xxs-rdd", "sim-teacher", "hint", "none", "sim-xs-rdd", "a", "b", "c"])
    assert found["sim-xxs-rdd"] == plot.COLOURS["student + RDD"]
    assert found["sim-teacher"] == plot.COLOURS["teacher"] and found["none"] == plot.COLOURS["student"]
    assert len(set(found.values())) == len(found)
    assert plot.colours(["rdd", "student + RDD"])["student + RDD"] == plot.COLOURS["student + RDD"]
    for alone in ("student alone", "none", "student"):
        assert plot.colours(["student + hint", alone])[alone] == plot.COLOURS["student"]


@pytest.mark.parametrize("name, said", [("x.foo", r"ending in .*\.png.*; found \.foo"), ("file/x.png", "can be written")])
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, name, said):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=said) as error:
        plot.save(plot.new_figure(1, 1), tmp_path / name)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------ regions


def some_regions(n, columns=5):
    rng = np.random.default_rng(1)
    centre = rng.uniform([5, -15], [35, 15], (n, 2))
    boxes = np.column_stack([np.zeros(n), centre - 2, centre + [2, 3]])[:, 5 - columns :]
    d = rng.gamma(4, 5, n)
    return boxes, (np.arange(n) % 3 > 0).astype(int), d, (d > 18).astype(float)


def rectangles(ax):
    return [line for line in ax.lines if len(line.get_xdata()) == 5]


def extent(line):
    """x0, y0, x1, y1 of a rectangle on paper, where y goes across and x up."""
    x, y = line.get_ydata(), line.get_xdata()
    return min(x), min(y), max(x), max(y)


@pytest.mark.parametrize("columns", [4, 5])
def test_regions_are_drawn_in_place_selected_ones_solid(tmp_path, columns):
    region, side, d, m = some_regions(40, columns)
    figure = plot.regions(tmp_path / "r.png", points(), region, side, d, m, threshold=18, boxes=FRONT_LEFT)
    scene, histogram, bar = figure.axes
    lines = rectangles(scene)
    assert len(lines) == 40
    solid = [line for line in lines if line.get_linestyle() == "-"]
    assert len(solid) == m.sum() and min(x.get_linewidth() for x in solid) > 1
    assert all(line.get_linewidth() < 1 for line in lines if line not in solid)
    assert np.allclose(sorted(map(extent, lines)), sorted(map(tuple, region[:, -4:])))
    markers = [line.get_marker() for line in scene.lines if len(line.get_xdata()) == 1]
    assert markers.count("s") == (side == 0).sum() and markers.count("o") == (side == 1).sum()
    assert histogram.get_title() == f"{int(m.sum())} of 40 pairs selected ({m.mean():.0%})"
    assert np.isclose(sum(patch.get_height() for patch in histogram.patches), 40)
    (cut,) = histogram.lines
    assert list(cut.get_xdata()) == [18, 18]
    assert histogram.get_xlim() == bar.get_xlim() == (d.min(), d.max())  # the colour bar is its axis


def test_more_disparate_is_darker_and_on_top(tmp_path):
    region, side, d, m = some_regions(30)
    scene = plot.regions(tmp_path / "r.png", points(), region, side, d, m).axes[0]
    solid = [line for line in rectangles(scene) if line.get_linestyle() == "-"]
    place = {tuple(np.round(r[-4:], 6)): value for r, value in zip(region, d, strict=True)}
    order = [place[tuple(np.round(extent(line), 6))] for line in solid]
    assert order == sorted(order)
    darkness = [-np.dot(line.get_color()[:3], [0.3, 0.6, 0.1]) for line in solid]
    assert darkness == sorted(darkness)


@pytest.mark.parametrize("n", [0, 1])
def test_no_region_and_one_region(tmp_path, n):
    region, side, d, m = some_regions(n)
    figure = plot.regions(tmp_path / "r.png", np.zeros((0, 4)), region, side, d, m, boxes=NOTHING)
    assert len(rectangles(figure.axes[0])) == n
    assert figure.axes[1].get_title().startswith(f"{int(m.sum())} of {n} pairs")
    assert not is_blank(tmp_path / "r.png")


# ------------------------------------------------------------------ command line


@pytest.mark.parametrize("metrics, said", [({"moderate_map_3d": 1.0}, "a run with map and nds, found moderate_map_3d"),
                                           (None, "expected runs of the suite sensitivity, found none")])  # fmt: skip
def test_sweeps_of_another_suites_records_are_one_line(tmp_path, monkeypatch, metrics, said):
    if metrics:
        record = dict.fromkeys(("config", "teacher", "seed", "epochs", "steps", "seconds", "parameters", "macs"), 1)
        record |= {"student": "s", "variant": "v", "scores": [metrics], "last": {"strict": {}}, "resampled": metrics}
        (tmp_path / "s-v-seed1.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=said) as error:
        run_main(monkeypatch, "sweeps", "--results", tmp_path, "--out", tmp_path / "x.png")
    assert "\n" not in str(error.value)


def test_a_suite_s_picture_is_of_its_records(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="expected runs of a suite, the student alone among them; found none"):
        run_main(monkeypatch, "suite", "demo", "--results", tmp_path, "--out", tmp_path / "x.png")
    records = Path(__file__).parents[1] / "results" / "demo"
    run_main(monkeypatch, "suite", "demo", "--results", records, "--out", tmp_path / "x.png")
    assert not is_blank(tmp_path / "x.png")


def test_what_methods_gain_against_their_pull_is_one_picture_of_several_suites(tmp_path, monkeypatch):
    records = Path(__file__).parents[1] / "results" / "tuning"
    run_main(monkeypatch, "pulls", "tuning", "tuning", "--results", records, "--out", tmp_path / "x.png")
    assert not is_blank(tmp_path / "x.png")


def run_main(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["plot.py", *map(str, words)])
    plot.main()


def test_command_line_groups_seeds_and_takes_labels(tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(curves, "curves", lambda path, runs, *_, timed: drawn.update(path=path, runs=runs, timed=timed))
    a, b, c = (write_run(tmp_path / name) for name in ("x-rdd-seed0", "x-rdd-seed1", "other"))
    run_main(monkeypatch, a, b, f"my label={c}")
    assert drawn == {"path": tmp_path / "curves.png", "timed": True,
                     "runs": [("x-rdd", a), ("x-rdd", b), ("my label", c)]}  # fmt: skip
    run_main(monkeypatch, a, "--steps-only")
    assert drawn["path"] == a / "curves.png" and not drawn["timed"]
    assert capsys.readouterr().out.splitlines()[-1] == str(a / "curves.png")


def test_command_line_draws_a_frame_of_a_kitti_root(tmp_path, monkeypatch):
    training = tmp_path / "training"
    for name in ("velodyne", "calib", "label_2"):
        (training / name).mkdir(parents=True)
    points().astype("<f4").tofile(training / "velodyne" / "000007.bin")
    (training / "calib" / "000007.txt").write_text(
        "".join(f"P{i}: 700 0 600 0 0 700 180 0 0 0 1 0\n" for i in range(4))
        + "R0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
        + "Tr_imu_to_velo: 1 0 0 0 0 1 0 0 0 0 1 0\n"
    )
    label = "Car 0.00 0 0.00 500 150 600 250 1.50 1.60 4.00 -10.00 1.60 20.00 0.00\n"
    (training / "label_2" / "000007.txt").write_text(label)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "000007.txt").write_text(label.replace("\n", " 0.75\n"))
    seen = {}
    monkeypatch.setattr(plot, "bev_scene", lambda path, panels, *_: seen.update(path=path, panel=panels[0]))
    run_main(monkeypatch, "scene", "--root", tmp_path, "--frame", "7", "--results", tmp_path / "found")
    assert seen["path"] == "000007.png"
    box = seen["panel"]["boxes"]["ground truth"]
    # 20 m ahead of the camera and 10 m to its left; rotation_y 0 looks to the right: yaw -pi/2
    assert np.allclose(box[0, [0, 1, 3, 4, 6]], [20, 10, 4, 1.6, -np.pi / 2], atol=1e-3)
    assert np.allclose(seen["panel"]["boxes"]["detections"], box, atol=1e-3)
    assert list(seen["panel"]["scores"]["detections"]) == [0.75]
    assert seen["panel"]["names"]["ground truth"] == ("Car",)
    with pytest.raises(InputError):
        run_main(monkeypatch, "scene", "--root", tmp_path, "--frame", "8")


def test_real_frame(real_kitti, tmp_path, monkeypatch):
    out = tmp_path / "real.png"
    run_main(monkeypatch, "scene", "--root", real_kitti, "--frame", "000008", "--out", out)
    assert not is_blank(out)


def test_real_nuscenes_key_frame_with_its_published_velocities(real_nuscenes, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(plot, "bev_scene", lambda path, panels, *_: seen.update(path=path, panel=panels[0]))
    words = ("scene", "--data", "nuscenes", "--root", real_nuscenes, "--version", "v1.0-mini", "--frame", "0")
    run_main(monkeypatch, *words)
    panel = seen["panel"]
    assert len(panel["points"]) == 34688 and len(panel["boxes"]["ground truth"]) == 68
    assert np.isnan(panel["boxes"]["ground truth"][:, 7:]).all(), "one key frame defines no velocity"
    run_main(monkeypatch, *words, "--velocities", real_nuscenes / "lidar_frame_velocity.json")
    boxes = seen["panel"]["boxes"]["ground truth"]
    published = json.loads((real_nuscenes / "lidar_frame_velocity.json").read_text())
    speeds = np.hypot(*np.array(list(published.values()), dtype=float).T)  # null: NaN
    assert np.allclose(np.sort(np.hypot(*boxes[:, 7:].T)), np.sort(speeds), atol=1e-5, equal_nan=True)
    fast = np.hypot(*boxes[:, 7:].T) > 3  # what drives, drives where it looks (or backs)
    along = boxes[fast, 7] * np.cos(boxes[fast, 6]) + boxes[fast, 8] * np.sin(boxes[fast, 6])
    assert fast.sum() > 3 and np.allclose(np.abs(along), np.hypot(*boxes[fast, 7:].T), rtol=0.02)
    with pytest.raises(InputError, match="expected a place below 1"):
        run_main(monkeypatch, *words[:-1], "3")
    with pytest.raises(InputError, match="no-such.json: expected"):
        run_main(monkeypatch, *words, "--velocities", tmp_path / "no-such.json")
    (tmp_path / "wrong.json").write_text('{"meta": {}}')
    for name, found in (("no-such", "FileNotFoundError"), ("wrong", "KeyError")):
        with pytest.raises(InputError, match=rf"{name}\.json: expected a nuScenes submission.*{found}") as error:
            run_main(monkeypatch, *words, "--results", tmp_path / f"{name}.json")
        assert "\n" not in str(error.value)
