"""Voxels against a plain Python loop, spconv's own voxeliser, and the reference framework's stored arrays."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelize import Grid, voxelize

GRID = Grid((0.0, -1.0, -2.0, 4.0, 2.0, 0.0), (0.5, 0.25, 1.0))  # 2 x 12 x 8 cells


def random_points(n: int, batch_size: int, seed: int = 0, features: int = 4) -> torch.Tensor:
    """(n, 1 + features), scans interleaved, about a third outside of GRID."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform((-1, -1.5, -2.3), (5, 2.5, 0.3), (n, 3))
    scan = rng.integers(0, batch_size, (n, 1))
    return torch.from_numpy(np.hstack([scan, xyz, rng.uniform(0, 1, (n, features - 3))])).float()


def loop_voxelize(points, grid, batch_size, max_points, max_voxels):
    """What the docstring says, point by point: {(b, z, y, x): rows of the points kept}."""
    low, size = np.float32(grid.point_range[:3]), np.float32(grid.voxel_size)
    voxels, per_scan = {}, [0] * batch_size
    with np.errstate(over="ignore", invalid="ignore"):
        cells = np.floor((points[:, 1:4].numpy() - low) / size)  # float32
    for row, point in enumerate(points.numpy()):
        if not np.isfinite(point).all():
            continue
        x, y, z = cells[row]
        depth, height, width = grid.shape
        if not (0 <= x < width and 0 <= y < height and 0 <= z < depth):
            continue
        cell = (int(point[0]), int(z), int(y), int(x))
        if cell not in voxels:
            if max_voxels is not None and per_scan[cell[0]] >= max_voxels:
                continue
            per_scan[cell[0]] += 1
            voxels[cell] = []
        if max_points is None or len(voxels[cell]) < max_points:
            voxels[cell].append(row)
    return voxels


def check_against_loop(points, grid, batch_size, max_points=None, max_voxels=None):
    expected = loop_voxelize(points, grid, batch_size, max_points, max_voxels)
    voxels = voxelize(points, grid, batch_size, max_points, max_voxels)
    assert [tuple(c) for c in voxels.coords.tolist()] == sorted(expected)
    point_voxel = torch.full((len(points),), -1)
    for row, cell in enumerate(sorted(expected)):
        point_voxel[expected[cell]] = row
        torch.testing.assert_close(voxels.features[row], points[expected[cell], 1:].double().mean(0).float())
    assert torch.equal(voxels.point_voxel, point_voxel)
    assert voxels.counts.tolist() == [len(expected[cell]) for cell in sorted(expected)]
    return voxels


@pytest.mark.parametrize("max_points", [None, 1, 3])
@pytest.mark.parametrize("max_voxels", [None, 1, 40, 10_000])
def test_equals_a_loop_over_points(max_points, max_voxels):
    voxels = check_against_loop(random_points(900, 3), GRID, 3, max_points, max_voxels)
    assert voxels.coords.dtype == torch.int64 and voxels.features.dtype == torch.float32


# coordinates on and around the cells' borders, far outside, and not finite
borders = [0.0, -0.0, 0.5, 4.0, -1.0, 2.0, -2.0, 1e-7, 3.9999998, -1.0000001]
not_finite = [np.nan, np.inf, -np.inf]
coordinate = st.one_of(st.sampled_from([*borders, 1e30, -1e30, 3e38, *not_finite]), st.floats(-3, 5, width=32))
# Up to 40 values of at most 4 m or 4: then float32 sums are within assert_close's 1e-5 of a mean, in any order.
intensity = st.one_of(st.sampled_from([*borders, *not_finite]), st.floats(-4, 4, width=32))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), coordinate, coordinate, coordinate, intensity), max_size=40),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 1, 3]),
)
def test_borders_and_wild_values_equal_the_loop(rows, max_points, max_voxels):
    check_against_loop(torch.tensor(rows, dtype=torch.float32).reshape(-1, 5), GRID, 3, max_points, max_voxels)


def test_lower_border_is_inside_and_upper_border_is_outside():
    low, high = GRID.point_range[:3], GRID.point_range[3:]
    below = [b - 1e-6 for b in high]
    points = torch.tensor([[0, *low, 1], [0, *high, 1], [0, high[0], low[1], low[2], 1], [0, *below, 1]])
    voxels = voxelize(points, GRID, 1)
    assert voxels.point_voxel.tolist() == [0, -1, -1, 1]
    assert voxels.coords.tolist() == [[0, 0, 0, 0], [0, 1, 11, 7]]


def test_cells_are_found_in_float32():
    """On the cells' borders, where float64 would find others: the reference's voxels are those of float32."""
    x = np.arange(1408, dtype=np.float32) * np.float32(0.05)
    grid = Grid((0, 0, 0, 70.4, 1, 1), (0.05, 1, 1))
    expected = np.floor(x / np.float32(0.05)).astype(int)
    assert (expected != np.floor(x.astype(float) / 0.05)).any()
    points = torch.zeros(len(x), 5)
    points[:, 1] = torch.from_numpy(x)
    voxels = voxelize(points, grid, 1)
    assert np.array_equal(voxels.coords[voxels.point_voxel, 3], expected)


@pytest.mark.parametrize("column", range(1, 6))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_point_that_is_not_finite_is_left_out(column, value):
    points = torch.tensor([[0, 1, 1, -1, 0.5, 0.1], [0, 1, 1, -1, 0.7, 0.3]])
    points[0, column] = value
    voxels = voxelize(points, GRID, 1)
    assert voxels.point_voxel.tolist() == [-1, 0] and torch.equal(voxels.features, points[1:, 1:])


def test_a_huge_value_is_finite_and_stays():
    points = torch.tensor([[0, 1, 1, -1, 3e38, -3e38]])
    voxels = voxelize(points, GRID, 1)
    assert voxels.point_voxel.tolist() == [0] and torch.equal(voxels.features, points[:, 1:])


def test_no_points_and_scans_without_points():
    empty = voxelize(torch.zeros(0, 5), GRID, 2)
    assert empty.coords.shape == (0, 4) and empty.features.shape == (0, 4) and empty.counts.shape == (0,)
    nothing_inside = voxelize(torch.full((3, 5), 100.0) * torch.tensor([0, 1, 1, 1, 1.0]), GRID, 2, 5, 7)
    assert len(nothing_inside.coords) == 0 and nothing_inside.point_voxel.tolist() == [-1, -1, -1]
    points = random_points(50, 1)
    points[:, 0] = 2  # scans 0, 1 and 3 have no points
    alone = voxelize(points, GRID, 4, 2, 10)
    assert set(alone.coords[:, 0].tolist()) == {2} and len(alone.coords) == 10


@pytest.mark.parametrize("scan", [-1, 2, float("nan")])
def test_a_wrong_scan_number_is_an_error(scan):
    points = random_points(10, 2)
    points[3, 0] = scan
    with pytest.raises(ValueError, match="scan numbers"):
        voxelize(points, GRID, 2)


def test_a_batch_is_its_scans_side_by_side():
    points = random_points(900, 3)
    whole = voxelize(points, GRID, 3, 2, 30)
    for scan in range(3):
        alone = points[points[:, 0] == scan]
        alone[:, 0] = 0
        voxels, rows = voxelize(alone, GRID, 1, 2, 30), whole.coords[:, 0] == scan
        assert torch.equal(whole.coords[rows, 1:], voxels.coords[:, 1:])
        assert torch.equal(whole.features[rows], voxels.features)  # bit for bit


def test_the_order_of_the_points_does_not_matter_without_caps():
    points = random_points(2000, 2)
    shuffle = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    a, b = voxelize(points, GRID, 2), voxelize(points[shuffle], GRID, 2)
    assert torch.equal(a.coords, b.coords) and torch.equal(a.counts, b.counts)
    assert torch.equal(a.point_voxel[shuffle], b.point_voxel)
    torch.testing.assert_close(a.features, b.features)


def test_centers_are_voxelised_into_their_own_cells():
    coords = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(12), torch.arange(8))
    xyz = GRID.centers(coords)
    assert xyz[0].tolist() == [0.25, -0.875, -1.5] and xyz[-1].tolist() == [3.75, 1.875, -0.5]
    voxels = voxelize(torch.cat([coords[:, :1].float(), xyz], 1), GRID, 2)
    assert torch.equal(voxels.coords, coords)


def test_any_height_is_the_lowest_and_the_top_layer_for_points_below_and_above():
    """The oracle moves such points onto the layer's middle first; all that differs then is their mean z."""
    points = random_points(900, 2)
    low, high = GRID.point_range[2], GRID.point_range[5]
    moved = points.clone()
    moved[:, 3] = torch.where(points[:, 3] < low, low + 0.5, torch.where(points[:, 3] >= high, high - 0.5, points[:, 3]))
    assert (moved != points).any()
    grid = Grid(GRID.point_range, GRID.voxel_size, any_height=True)
    for caps in ((None, None), (2, 40)):
        got, expected = voxelize(points, grid, 2, *caps), voxelize(moved, GRID, 2, *caps)
        assert torch.equal(got.coords, expected.coords) and torch.equal(got.counts, expected.counts)
        assert torch.equal(got.point_voxel, expected.point_voxel)
        assert torch.equal(got.features[:, [0, 1, 3]], expected.features[:, [0, 1, 3]])
        for row in range(len(got.coords)):  # the mean is of the heights as they are
            mean = points[got.point_voxel == row, 3].double().mean()
            assert float(got.features[row, 2]) == pytest.approx(float(mean), abs=1e-5)


@pytest.mark.parametrize("z", [-1e30, -3.0, 0.0, 5.0, 3e38])
def test_any_height_is_any_finite_height_inside_x_and_y(z):
    grid = Grid((0.0, -1.0, -2.0, 4.0, 2.0, 0.0), (0.5, 0.25, 2.0), any_height=True)
    points = torch.tensor([[0, 1.1, 0.1, z, 1], [0, -0.1, 0.1, z, 1], [0, 1.1, 2.1, z, 1], [0, 1.1, 0.1, float("nan"), 1],
                           [0, 1.1, 0.1, float("inf"), 1]])  # fmt: skip
    voxels = voxelize(points, grid, 1)
    assert voxels.coords.tolist() == [[0, 0, 4, 2]] and voxels.point_voxel.tolist() == [0, -1, -1, -1, -1]
    assert voxels.features[0, 2] == points[0, 3]


def test_reference_dynamic_pillars_of_any_height(golden):
    """The same cells as OpenPCDet's dynamic pillars, which look at x and y only."""
    case = np.load(golden / "models" / "centerpoint_pillar_dyn.npz")
    meta = json.loads(str(case["meta"]))
    grid = Grid(tuple(meta["point_cloud_range"]), tuple(meta["voxel_size"]), any_height=True)
    voxels = voxelize(torch.from_numpy(case["points"]), grid, meta["batch_size"])
    assert np.array_equal(voxels.coords, case["pillar_coords"][np.lexsort(case["pillar_coords"].T[::-1])])
    assert (voxels.point_voxel >= 0).all() and not case["z_inside"].all()


def test_shape_of_the_published_grids():
    assert Grid((0, -40, -3, 70.4, 40, 1), (0.05, 0.05, 0.1)).shape == (40, 1600, 1408)
    assert Grid((0, -39.68, -3, 69.12, 39.68, 1), (0.16, 0.16, 4)).shape == (1, 496, 432)
    assert Grid((-54, -54, -5, 54, 54, 3), (0.075, 0.075, 0.2)).shape == (40, 1440, 1440)


@pytest.mark.parametrize("name", ["second", "pointpillars", "centerpoint_voxel", "centerpoint_pillar_hard"])
def test_reference_hard_voxels(golden, name):
    """Cells, counts, which points, and the mean of them (MeanVFE), as the reference framework stores them."""
    case = np.load(golden / "models" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    grid = Grid(tuple(meta["point_cloud_range"]), tuple(meta["voxel_size"]))
    points = torch.from_numpy(case["points"])
    voxels = voxelize(points, grid, meta["batch_size"], meta["max_points_per_voxel"])
    order = np.lexsort(case["voxel_coords"].T[::-1])  # theirs are in order of appearance
    assert np.array_equal(voxels.coords, case["voxel_coords"][order])
    assert np.array_equal(voxels.counts, case["voxel_num_points"][order])
    index = case["voxel_point_index"][order]
    point_voxel = np.full(len(case["points"]), -1)
    point_voxel[index[index >= 0]] = np.nonzero(index >= 0)[0]
    assert np.array_equal(voxels.point_voxel, point_voxel)
    assert (voxels.point_voxel < 0).any() or name == "pointpillars"  # the cap on points was at work
    if case["vfe_out"].shape == voxels.features.shape:  # MeanVFE; the pillars' encoder has weights
        np.testing.assert_allclose(voxels.features, case["vfe_out"][order], rtol=1e-5, atol=1e-6)


def test_reference_dynamic_pillars_inside_z(golden):
    """The reference's dynamic pillars keep points above and below the range; ours, unless any_height, do not."""
    case = np.load(golden / "models" / "centerpoint_pillar_dyn.npz")
    meta = json.loads(str(case["meta"]))
    grid = Grid(tuple(meta["point_cloud_range"]), tuple(meta["voxel_size"]))
    voxels = voxelize(torch.from_numpy(case["points"]), grid, meta["batch_size"])
    assert np.array_equal(voxels.point_voxel >= 0, case["z_inside"].astype(bool))
    theirs = {tuple(c) for c in case["pillar_coords"].tolist()}
    assert {tuple(c) for c in voxels.coords.tolist()} < theirs


@pytest.mark.parametrize(("max_points", "max_voxels"), [(1, 20), (5, 60), (3, 10_000)])
def test_spconv_voxeliser(max_points, max_voxels):
    """spconv's C++ voxeliser, caps included, on points away from borders (its arithmetic there differs)."""
    utils = pytest.importorskip("spconv.pytorch.utils", reason="spconv's CPU wheel is an optional oracle")
    points = random_points(700, 1, seed=3)
    cells = (points[:, 1:4] - torch.tensor(GRID.point_range[:3])) / torch.tensor(GRID.voxel_size)
    points = points[((cells - cells.round()).abs() > 1e-3).all(1)]
    voxeliser = utils.PointToVoxel(list(GRID.voxel_size), list(GRID.point_range), 4, max_voxels, max_points)
    features, coords, counts = voxeliser(points[:, 1:].contiguous())
    order = np.lexsort(coords.numpy().T[::-1])
    voxels = voxelize(points, GRID, 1, max_points, max_voxels)
    assert np.array_equal(voxels.coords[:, 1:], coords[order])
    assert np.array_equal(voxels.counts, counts[order])
    mean = features.sum(1)[order] / counts[order][:, None]
    torch.testing.assert_close(voxels.features, mean)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("max_voxels", [None, 30])
def test_cuda_equals_cpu(max_voxels):
    points = random_points(5000, 3)
    on_cpu, on_cuda = (voxelize(p, GRID, 3, 4, max_voxels) for p in (points, points.cuda()))
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert torch.equal(a, b.cpu())
