"""RDD against plain loops, closed forms, and the wrong readings that would pass unnoticed."""

import math
import re
from pathlib import Path

import pytest
import torch

import baselines
import rdd
from data import Frame
from data.batch import collate
from detector import Output, build
from heads import Geometry
from presets import preset
from tests.scenes import few_points, tiny_config, tiny_frames
from train import losses

GEOMETRY = Geometry(x0=-2.0, y0=1.0, cell_x=0.5, cell_y=0.8)


class Head:
    """Stands in for a detection head: proposes the regions it is told to."""

    def __init__(self, regions):
        self.regions, self.asked = regions, None

    def proposals(self, _, score, limit):
        self.asked = score, limit
        return self.regions

    def class_logits(self, maps):
        return maps[0]["heatmap"]

    def regression(self, _):
        return None


def output(neck, regions, logits=None, geometry=GEOMETRY):
    logits = torch.full((len(neck), 3, *neck.shape[2:]), -2.0) if logits is None else logits
    return Output(neck, [{"heatmap": logits}], geometry, Head(regions))


def identity_rdd(**changes):
    """RDD whose psi changes nothing, so that equal necks are equal regions."""
    from dataclasses import replace

    distil = rdd.RDD(replace(preset("cp-voxel-xxs-cpu"), **changes), 6, 6)
    distil.psi = torch.nn.Identity()
    return distil


def boxes_in_cells(*cells, scan=0):
    """Regions (scan, x0, y0, x1, y1) in metres that cover the cells [i - 2, i + 2] x [j - 2, j + 2]."""
    g = GEOMETRY
    rows = [[scan, g.x0 + (j - 2) * g.cell_x, g.y0 + (i - 2) * g.cell_y, g.x0 + (j + 3) * g.cell_x,
             g.y0 + (i + 3) * g.cell_y] for i, j in cells]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)


# ---------------------------------------------------------------- phi


def bilinear(channel, y, x):
    """Value of a map at real cell coordinates (cell centres at +0.5), border repeated; plain Python."""
    height, width = channel.shape
    y, x = min(max(y - 0.5, 0), height - 1), min(max(x - 0.5, 0), width - 1)
    i, j = min(int(y), height - 2), min(int(x), width - 2)
    a, b = y - i, x - j
    return ((1 - a) * (1 - b) * channel[i, j] + (1 - a) * b * channel[i, j + 1] + a * (1 - b) * channel[i + 1, j]
            + a * b * channel[i + 1, j + 1])  # fmt: skip


def test_roi_align_equals_a_plain_loop_also_over_the_border():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    regions = torch.tensor([[1, 0.1, 2.3, 3.7, 6.1], [0, -3.0, 0.0, -1.0, 3.0], [1, 6.0, 8.0, 9.5, 12.0]]).double()
    got = rdd.roi_align(maps, regions, GEOMETRY, 5)
    for r, (scan, x0, y0, x1, y1) in enumerate(regions.tolist()):
        for p in range(5):
            for q in range(5):
                y = (y0 + (y1 - y0) * (p + 0.5) / 5 - GEOMETRY.y0) / GEOMETRY.cell_y
                x = (x0 + (x1 - x0) * (q + 0.5) / 5 - GEOMETRY.x0) / GEOMETRY.cell_x
                for c in range(3):
                    assert float(got[r, c, p, q]) == pytest.approx(float(bilinear(maps[int(scan), c], y, x)), abs=1e-9)


def test_roi_align_of_one_place_on_two_grids_sees_the_same_values():
    """A linear map is the same function of metres on any grid: regions are mapped in metres, not in cells."""
    fine, coarse = Geometry(0, 0, 0.5, 0.5), Geometry(0, 0, 1.0, 2.0)

    def ramp(g, height, width):
        y = (torch.arange(height) + 0.5) * g.cell_y
        x = (torch.arange(width) + 0.5) * g.cell_x
        return (3 * y[:, None] + x[None]).view(1, 1, height, width)

    regions = torch.tensor([[0, 3.0, 4.0, 6.0, 8.0]])
    a = rdd.roi_align(ramp(fine, 48, 40), regions, fine, 7)
    b = rdd.roi_align(ramp(coarse, 12, 20), regions, coarse, 7)
    torch.testing.assert_close(a, b)


def test_roi_align_gradient():
    maps = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    regions = torch.tensor([[0, -1.5, 1.2, 0.3, 3.0], [1, -1.0, 2.0, 0.0, 3.9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: rdd.roi_align(m, regions, GEOMETRY, 3), maps)


# ---------------------------------------------------------------- the equations


def test_eq2_softmax_as_printed():
    region = torch.randn(2, 4, 3, 3)
    got = rdd.normalise(region, "softmax", "channel", 4.0)
    for c in range(4):
        expected = (region[:, c] / 4).exp() / sum((region[:, k] / 4).exp() for k in range(4))
        torch.testing.assert_close(got[:, c], expected)
    spatial = rdd.normalise(region, "softmax", "spatial", 4.0)
    torch.testing.assert_close(spatial.sum(dim=(2, 3)), torch.ones(2, 4))
    assert torch.equal(rdd.normalise(region, "none"), region)


def test_standardised_distance_is_the_correlation():
    s, t = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    d = rdd.disparity(rdd.normalise(s, "standardise"), rdd.normalise(t * 7 + 2, "standardise"))
    for i in range(5):
        rho = torch.corrcoef(torch.stack([s[i].flatten(), t[i].flatten()]))[0, 1]
        assert float(d[i]) == pytest.approx(math.sqrt(2 * (1 - float(rho))), abs=1e-5)


def test_eq3_gaussian_information_has_the_closed_form():
    s = torch.randn(1, 8, 30, 30)
    t = 0.6 * s + 0.8 * torch.randn(1, 8, 30, 30)
    rho = float(torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1])
    assert float(rdd.information(s, t, "gaussian")) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-4)
    assert float(rdd.information(s, -s, "gaussian")) == 0
    torch.testing.assert_close(rdd.information(s, t, "distance"), -(s - t).flatten().norm().view(1))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 5.0])
def test_eq5_threshold_is_the_minimum_over_the_whole_box(lam):
    """Brute force over a grid of m: no m in [0, 1]^R has a lower objective."""
    info = -torch.tensor([0.2, 0.5, 2.0])
    m = rdd.solve_selection(info, torch.zeros(3), "threshold", lam, 0.6)
    values = torch.linspace(0, 1, 6)
    grid = torch.cartesian_prod(values, values, values)
    best = min(float(rdd.inner_objective(g, info, lam)) for g in grid)
    assert float(rdd.inner_objective(m, info, lam)) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("rule", ["threshold", "relative", "soft", "gaussian"])
def test_lambda_zero_keeps_all_and_a_larger_lambda_fewer(rule):
    torch.manual_seed(1)
    info = -torch.rand(40) * 2 if rule != "gaussian" else torch.rand(40)
    scan = (torch.arange(40) % 2).float()
    kept = [float(rdd.solve_selection(info, scan, rule, lam, 0.6).sum()) for lam in (0.0, 0.2, 0.8, 2.5)]
    assert kept[0] == 40
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0]


def test_top_keeps_the_most_disparate_fraction_of_each_scan():
    d = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 100.0, 50.0])
    scan = torch.tensor([0.0, 0, 0, 0, 0, 1, 1])
    m = rdd.solve_selection(-d, scan, "top", 0.1, 0.6)
    assert m.tolist() == [1, 0, 1, 0, 1, 1, 0]
    assert rdd.solve_selection(-d, scan, "all", 0.1, 0.6).tolist() == [1] * 7


def test_least_and_random_keep_the_same_fraction_and_other_pairs():
    torch.manual_seed(5)
    d, scan = torch.rand(400) * 30, (torch.arange(400) % 2).float()
    top, least, anyone = (rdd.solve_selection(-d, scan, rule, 0.1, 0.4) for rule in ("top", "least", "random"))
    for b in (0, 1):
        mine = scan == b
        assert top[mine].sum() == least[mine].sum() == anyone[mine].sum() == 80
        assert d[mine][least[mine] > 0].max() <= d[mine][least[mine] == 0].min()
    # No more of it among the disparate than chance has: 160 of 400 are kept, 80 of the upper half within 4 standard deviations
    upper = d > d.median()
    assert abs(float(anyone[upper].sum()) - 80) < 4 * (200 * 0.4 * 0.6 / 2) ** 0.5
    assert torch.equal(anyone, rdd.solve_selection(-d, scan, "random", 0.1, 0.4)), "a run that is continued draws the same"


def test_eq4_and_eq7_agree_when_everything_is_selected():
    info = torch.randn(9)
    torch.testing.assert_close(rdd.selected_information(info, torch.ones(9)), rdd.naive_total(info))
    m = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 0.5])
    assert float(rdd.selected_information(info, m)) == pytest.approx(float(info[0] + info[2] + 0.5 * info[8]), abs=1e-6)


def test_eq8_and_eq9_equal_plain_loops():
    torch.manual_seed(2)
    s, t, m = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.tensor([1.0, 0, 1, 1, 0, 0.5])
    feat = sum(float(m[i]) * math.sqrt(float(((s[i] - t[i]) ** 2).sum())) for i in range(6)) / 6
    assert float(rdd.feature_loss(rdd.disparity(s, t), m)) == pytest.approx(feat, rel=1e-5)
    for reduce, over in (("sum", 1), ("mean", 48)):
        logit = sum(float(m[i]) * float((s[i] - t[i]).abs().sum()) / over for i in range(6)) / 6
        assert float(rdd.logit_loss(s, t, m, reduce)) == pytest.approx(logit, rel=1e-5)
        # the regression term of anchor heads: plain differences of codes, the sine of yaw's
        codes_s, codes_t = torch.randn(6, 7), torch.randn(6, 7)
        codes_s[0], codes_t[0, 6] = codes_t[0], codes_t[0, 6] + math.pi  # the same box, turned round
        codes_s[0, 6] = codes_t[0, 6] - math.pi
        apart = [[abs(float(a - b)) for a, b in zip(x[:6], y[:6], strict=True)] + [abs(math.sin(float(x[6] - y[6])))]
                 for x, y in zip(codes_s, codes_t, strict=True)]  # fmt: skip
        assert sum(apart[0]) < 1e-5
        regression = sum(float(m[i]) * sum(apart[i]) / (1 if reduce == "sum" else 7) for i in range(6)) / 6
        both = rdd.logit_loss(s, t, m, reduce, codes_s, codes_t)
        assert float(both) == pytest.approx(logit + regression, rel=1e-5)


def test_eq10_is_the_sum_of_its_weighted_terms():
    terms = {"cls": torch.tensor(1.5), "reg": torch.tensor(0.25)}, {"feat": torch.tensor(2.0), "logit": torch.tensor(4.0)}
    assert float(rdd.total_loss(*terms)) == 7.75


def test_gradient_of_the_distance_of_equal_regions_is_zero_not_nan():
    s = torch.ones(2, 3, 4, 4, requires_grad=True)
    rdd.feature_loss(rdd.disparity(s, torch.ones(2, 3, 4, 4)), torch.ones(2)).backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("normalise", ["none", "softmax", "standardise"])
def test_identical_teacher_and_student_give_zero_loss(normalise):
    neck, regions = torch.rand(2, 6, 12, 20), boxes_in_cells((3, 4), (8, 15))
    terms, _ = identity_rdd(normalise=normalise, select="all")(output(neck, regions), output(neck.clone(), regions))
    assert float(terms["feat"]) == 0 and float(terms["logit"]) == 0


@pytest.mark.parametrize("normalise", ["none", "softmax", "standardise"])
@pytest.mark.parametrize("select", ["top", "threshold", "relative", "gaussian"])
def test_a_difference_in_one_place_is_selected_there(normalise, select):
    torch.manual_seed(3)
    neck_t = torch.rand(1, 6, 24, 40)
    neck_s = neck_t.clone()
    neck_s[:, :3, 16:22, 26:34] = torch.rand(1, 3, 6, 8) * 6  # around cell (19, 30)
    places = boxes_in_cells((4, 5), (4, 30), (19, 30), (19, 6))
    distil = identity_rdd(normalise=normalise, select=select, fraction=0.25, lam=1e-3)
    pairs = distil.compare(output(neck_s, places[:2]), output(neck_t, places[2:]))
    assert pairs.regions.shape == (4, 5) and pairs.side.tolist() == [0, 0, 1, 1]
    assert pairs.m.tolist() == [1, 0, 0, 0]  # the teacher's first proposal is the third place


def test_gaussian_information_selects_the_uncorrelated_pair_though_another_is_farther_apart():
    neck_t, other = torch.rand(2, 1, 6, 12, 20, generator=torch.Generator().manual_seed(7)).unbind()
    neck_s = torch.cat([3 * neck_t[..., :10], other[..., 10:]], dim=3)  # in the left half only the scale differs: rho = 1
    places = boxes_in_cells((5, 4), (5, 15))
    pairs = identity_rdd(select="gaussian").compare(output(neck_s, places[:0]), output(neck_t, places))
    assert pairs.m.tolist() == [0, 1] and pairs.d[0] > pairs.d[1]


def test_regions_come_from_both_models():
    neck = torch.rand(1, 6, 12, 20)
    pairs = identity_rdd().compare(output(neck, boxes_in_cells((3, 4))), output(neck, boxes_in_cells((8, 9), (5, 5))))
    assert (pairs.side == 0).sum() == 2 and (pairs.side == 1).sum() == 1


def test_both_models_are_asked_for_the_proposals_that_the_options_say():
    out_s, out_t = (output(torch.zeros(1, 6, 12, 20), boxes_in_cells((5, 8))) for _ in range(2))
    identity_rdd(proposals=7, proposal_score=0.25)(out_s, out_t)
    assert out_s.head.asked == out_t.head.asked == (0.25, 7)


def test_regions_of_labels_are_the_gaussian_areas_of_their_objects():
    g = Geometry(x0=-10.0, y0=-8.0, cell_x=0.5, cell_y=0.5)
    batch = collate(tiny_frames(2), tiny_config())
    batch.boxes = [torch.tensor([[0.3, -1.1, 0.0, 4.0, 1.8, 1.5, 0.4], [5.2, 2.6, 0.0, 0.6, 0.6, 1.7, 0.0]]), torch.zeros(0, 7)]
    beside = batch.boxes[0].clone()
    beside[:, 0] += torch.tensor([20.0, -15.3])
    batch.boxes[0] = torch.cat([batch.boxes[0], beside])
    regions, side = rdd.labelled_regions(batch, g, (32, 40))
    assert regions[:, 0].tolist() == [0, 0] and side.tolist() == [0, 0]
    for region, box in zip(regions, batch.boxes[0][:2], strict=True):
        x0, y0, x1, y1 = region[1:].tolist()
        assert x1 - x0 == pytest.approx(y1 - y0) and (x1 - x0) / 0.5 >= 5 and ((x1 - x0) / 0.5) % 2 == pytest.approx(1)
        assert abs((x0 + x1) / 2 - float(box[0])) <= 0.25 and abs((y0 + y1) / 2 - float(box[1])) <= 0.25
    necks = torch.randn(2, 6, 32, 40, generator=torch.Generator().manual_seed(0)).unbind()
    out_s, out_t = (output(neck[None].repeat(2, 1, 1, 1), boxes_in_cells((1, 1)), geometry=g) for neck in necks)
    pairs = identity_rdd(regions="labels", select="all").compare(out_s, out_t, batch)
    assert pairs.regions.equal(regions), "whatever the heads propose"
    batch.boxes = [torch.zeros(0, 7)] * 2
    terms, _ = identity_rdd(regions="labels")(out_s, out_t, batch)
    assert all(float(term) == 0 for term in terms.values())


def test_regions_of_labels_are_cells_of_the_teacher_s_map_which_an_object_has_to_be_on():
    """Its map is 40 m along x and 32 m along y, in cells of 1 m; the student's has others."""
    batch = collate(tiny_frames(1), tiny_config())
    batch.boxes = [torch.tensor([[35.4, 5.4, 0.0, 1.0, 1.0, 1.0, 0.0], [5.4, 35.4, 0.0, 1.0, 1.0, 1.0, 0.0]])]
    out_t = output(torch.rand(1, 6, 32, 40), boxes_in_cells(), geometry=Geometry(0.0, 0.0, 1.0, 1.0))
    out_s = output(torch.rand(1, 6, 80, 80), boxes_in_cells(), geometry=Geometry(-0.2, -0.2, 0.5, 0.5))
    pairs = identity_rdd(regions="labels").compare(out_s, out_t, batch)
    assert pairs.regions.tolist() == [[0, 33, 3, 38, 8]]  # the least radius, 2 cells, around cell (5, 35)


def test_psi_without_its_norm_is_a_convolution_and_a_relu():
    from dataclasses import replace

    distil = rdd.RDD(replace(preset("cp-voxel-xxs-cpu"), psi_norm=False), 6, 8).train()
    region = torch.randn(5, 6, 7, 7, generator=torch.Generator().manual_seed(2))
    weight, bias = distil.psi.state_dict().values()
    expected = (torch.einsum("rcij,dc->rdij", region, weight[:, :, 0, 0]) + bias[:, None, None]).clamp(min=0)
    assert torch.allclose(distil.psi(region), expected, atol=1e-5)


@pytest.mark.parametrize("order", ["map-first", "psi-first"])
def test_the_norm_in_psi_sees_the_whole_map_or_the_crops_alone(order):
    from dataclasses import replace

    neck_s, neck_t = torch.randn(2, 1, 6, 8, 8, generator=torch.Generator().manual_seed(4)).unbind()
    distil = rdd.RDD(replace(preset("cp-voxel-xxs-cpu"), psi_order=order, psi_norm=True, roi_size=5, select="all"), 6, 6).train()
    pairs = distil.compare(output(neck_s, boxes_in_cells((3, 3))), output(neck_t, boxes_in_cells((3, 3))))
    here = (..., slice(1, 6), slice(1, 6))  # 5 x 5 bins on 5 x 5 cells: their centres
    x = torch.einsum("bcij,dc->bdij", neck_s, distil.psi[0].weight[:, :, 0, 0])
    rows = (x if order == "map-first" else x[here]).transpose(0, 1).flatten(1)  # what the norm's statistics are of
    mean, std = (statistic[:, None, None] for statistic in (rows.mean(dim=1), (rows.var(dim=1, unbiased=False) + 1e-5).sqrt()))
    expected = (((x - mean) / std).clamp(min=0) - neck_t)[here].flatten(1).norm(dim=1)
    assert torch.allclose(pairs.d, expected.repeat(2), atol=1e-4)


@pytest.mark.parametrize("order", ["map-first", "psi-first", "normalise-first"])
def test_mixed_precision_rounds_features_and_not_where_a_region_is(order):
    """On a map of 400 columns, where a position in bfloat16 would be off by up to a cell."""
    from dataclasses import replace

    neck_s, neck_t = torch.randn(2, 1, 6, 8, 400, generator=torch.Generator().manual_seed(6)).unbind()
    distil = rdd.RDD(replace(preset("cp-voxel-xxs-cpu"), psi_order=order), 6, 6)
    out_s, out_t, regions = output(neck_s, None), output(neck_t, None), boxes_in_cells((3, 290.3), (4, 351.7))
    exact, _ = distil.crop(out_s, regions, out_t)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = distil.crop(out_s, regions, out_t)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(("axis", "tau"), [("channel", 4.0), ("spatial", 4.0), ("channel", 0.5)])
@pytest.mark.parametrize("order", ["map-first", "psi-first", "normalise-first"])
def test_both_regions_have_the_softmax_of_the_options(order, axis, tau):
    """psi changes nothing here, so each region of the student is one softmax of its crop, whatever the order."""
    torch.manual_seed(1)
    regions = boxes_in_cells((5, 8), (6, 11))
    out_s, out_t = (output(torch.randn(1, 6, 12, 20), regions) for _ in range(2))
    distil = identity_rdd(normalise="softmax", softmax_axis=axis, tau=tau, psi_order=order)
    for region, out in zip(distil.crop(out_s, regions, out_t), (out_s, out_t), strict=True):
        crop = rdd.roi_align(out.neck, regions, GEOMETRY, 7) / tau
        expected = crop.softmax(1) if axis == "channel" else crop.flatten(2).softmax(2).view_as(crop)
        torch.testing.assert_close(region, expected)


def test_the_selection_is_constant_for_training():
    """Where m* depends on d smoothly, as with `soft`, L_feat's gradient is that of m* d with m* fixed."""
    torch.manual_seed(2)
    neck = torch.randn(1, 6, 12, 20, requires_grad=True)
    out_s, out_t = (output(n, boxes_in_cells((5, 8))) for n in (neck, torch.randn(1, 6, 12, 20)))
    for lam in (1e-3, 1e3):  # every m* is 1, and every one d / lam
        distil = identity_rdd(select="soft", lam=lam)
        terms, _ = distil(out_s, out_t)
        d = rdd.disparity(*distil.crop(out_s, distil.compare(out_s, out_t).regions, out_t))
        expected = torch.autograd.grad(distil.cfg.alpha1 * (d * (d.detach() / lam).clamp(max=1)).mean(), neck)
        torch.testing.assert_close(torch.autograd.grad(terms["feat"], neck), expected)


def test_normalise_first_is_psi_of_a_normalised_region_beside_the_teacher_s():
    from dataclasses import replace

    neck_s, neck_t = torch.randn(2, 1, 6, 8, 8, generator=torch.Generator().manual_seed(5)).unbind()
    changes = {"psi_order": "normalise-first", "normalise": "softmax", "tau": 2.0, "roi_size": 5, "select": "all"}
    distil = rdd.RDD(replace(preset("cp-voxel-xxs-cpu"), **changes), 6, 6).train()
    pairs = distil.compare(output(neck_s, boxes_in_cells((3, 3))), output(neck_t, boxes_in_cells((3, 3))))
    here = (slice(0, 1), slice(None), slice(1, 6), slice(1, 6))  # 5 x 5 bins on 5 x 5 cells: their centres
    soft_s, soft_t = ((neck[here] / 2).exp() / (neck[here] / 2).exp().sum(dim=1, keepdim=True) for neck in (neck_s, neck_t))
    weight, bias = distil.psi.state_dict().values()
    ours = (torch.einsum("bcij,dc->bdij", soft_s, weight[:, :, 0, 0]) + bias[:, None, None]).clamp(min=0)
    assert torch.allclose(pairs.d, (ours - soft_t).flatten(1).norm(dim=1).repeat(2), atol=1e-5)


def test_p_cls_at_the_peak_is_that_of_the_centre_cell_and_else_of_the_area():
    neck, generator = torch.rand(1, 6, 12, 20), torch.Generator().manual_seed(6)
    ours, theirs = (torch.randn(1, 10, 12, 20, generator=generator) for _ in range(2))
    region, difference = boxes_in_cells((4, 7)), (ours.sigmoid() - theirs.sigmoid()).abs()[0]
    for p_cls, expected in (("peak", difference[:, 4, 7].sum()), ("sum", difference[:, 2:7, 5:10].sum())):
        distil = identity_rdd(p_cls=p_cls, select="all", alpha2=0.5, roi_size=5, classes=tuple("abcdefghij"))
        terms, _ = distil(output(neck, region, ours), output(neck, region, theirs))
        assert float(terms["logit"]) == pytest.approx(0.5 * float(expected), rel=1e-4)


def test_squared_distance_is_the_mean_over_cells_of_the_squared_difference():
    necks = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1)).unbind()
    out_s, out_t = (output(neck[None], boxes_in_cells((3, 3))) for neck in necks)
    changes = {"roi_size": 5, "select": "all", "alpha1": 0.5}
    norm, squared = (identity_rdd(distance=kind, **changes)(out_s, out_t)[0]["feat"] for kind in ("norm", "squared"))
    difference = (necks[0] - necks[1])[:, 1:6, 1:6]  # 5 x 5 bins on 5 x 5 cells: their centres
    assert float(norm) == pytest.approx(0.5 * float(difference.norm()), rel=1e-4)
    assert float(squared) == pytest.approx(0.5 * float(difference.square().sum(dim=0).mean()), rel=1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("select", ["top", "threshold", "relative", "soft", "gaussian", "all", "least", "random"])
def test_no_or_one_proposal(counts, select):
    """Zero loss with a gradient path when nobody proposes; no failure of psi's batch norm with one region."""
    from dataclasses import replace

    distil = rdd.RDD(replace(preset("cp-voxel-xxs-cpu"), select=select, psi_norm=True), 6, 8).train()
    neck = torch.rand(1, 6, 12, 20, requires_grad=True)
    n, k = counts
    terms, seen = distil(output(neck, boxes_in_cells((3, 4))[:n]), output(torch.rand(1, 8, 12, 20), boxes_in_cells((8, 9))[:k]))
    total = rdd.total_loss(terms, {})
    assert total.isfinite() and (n + k > 0 or float(total.detach()) == 0)
    total.backward()
    assert float(seen["pairs_t"]) == k and float(seen["pairs_s"]) == n and ("d_50" in seen) == (n + k > 0)


def test_regions_over_the_border_have_finite_losses():
    neck = torch.rand(1, 6, 12, 20)
    regions = boxes_in_cells((0, 0), (11, 19), (-3, 25))
    terms, _ = identity_rdd(select="all")(output(neck, regions), output(neck + 1, regions))
    assert all(t.isfinite() for t in terms.values())


def test_gradients_reach_student_and_psi_and_never_the_teacher():
    cfg = tiny_config(method="rdd")
    teacher = build(tiny_config(width=(1.0, 1.0, 1.0))).eval()  # not frozen: the loop asks it without gradients
    student = build(cfg).train()
    distil = rdd.RDD(cfg, student.backbone.out_channels, teacher.backbone.out_channels).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}  # parameters AND buffers
    optimizer = torch.optim.SGD([*student.parameters(), *distil.parameters()], lr=0.01)
    for _ in range(3):
        batch = collate(tiny_frames(2), cfg)
        _, terms, seen, _ = losses(student, batch, teacher, distil, 1.0)
        optimizer.zero_grad()
        rdd.total_loss(terms, {}).backward()
        optimizer.step()
    assert float(seen["pairs_t"] + seen["pairs_s"]) > 0
    for name, p in [*student.encoder.named_parameters(), *distil.named_parameters()]:
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_student_s_proposals_carry_no_gradient():
    cfg = tiny_config()
    student = build(cfg)
    out = student(student.prepare(collate(tiny_frames(1), cfg)))
    assert not out.proposals(0.01, 20).requires_grad


def test_gradient_norms_measure_the_pull_on_the_neck():
    neck = torch.ones(1, 2, 3, 3, requires_grad=True)
    norms = rdd.gradient_norms({"a": neck.sum(), "b": (2 * neck[0, 0, 0, 0]), "c": torch.ones((), requires_grad=True)}, neck)
    assert norms["a"] == pytest.approx(math.sqrt(18)) and norms["b"] == pytest.approx(2) and norms["c"] == 0


def test_printed_reading_is_the_paper_s():
    from presets import READINGS

    printed = READINGS["printed"]
    assert (printed["normalise"], printed["softmax_axis"], printed["select"]) == ("softmax", "channel", "threshold")
    assert [printed[name] for name in ("tau", "lam", "alpha1", "alpha2", "psi_norm")] == [4, 0.1, 0.2, 0.2, True]


def test_empty_scan_in_a_batch_is_distilled_as_nothing():
    cfg = tiny_config(method="rdd")
    empty = Frame("empty", torch.zeros(0, 4).numpy(), torch.zeros(0, 7).numpy(), ())
    batch = collate([empty, *tiny_frames(1)], cfg)
    model = build(cfg)
    out = model(model.prepare(batch))
    terms, _ = rdd.RDD(cfg, model.backbone.out_channels, model.backbone.out_channels)(out, out)
    assert all(t.isfinite() for t in terms.values())


def test_the_lines_of_the_readme_are_rdd_with_the_default_settings():
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def rdd\(.*?)```", page, re.DOTALL)
    lines: dict = {"torch": torch, "roi_align": rdd.roi_align}
    exec(code, lines)  # noqa: S102 (our own page)
    torch.manual_seed(4)
    regions = torch.cat([boxes_in_cells((3, 4), (8, 9), (5, 5)), boxes_in_cells((9, 2), scan=1)])
    out_s = output(torch.randn(2, 6, 12, 20), regions, torch.randn(2, 3, 12, 20))
    out_t = output(torch.randn(2, 8, 12, 20), regions[[0, 1, 3]] + 0.3, torch.randn(2, 3, 12, 20))
    out_t.head.regions[:, 0] = regions[[0, 1, 3], 0]
    distil = rdd.RDD(preset("cp-voxel-xxs-cpu"), 6, 8)
    terms, seen = distil(out_s, out_t)
    assert out_s.head.asked == out_t.head.asked == (0.1, 50) and float(seen["selected"]) == pytest.approx(4 / 7)
    torch.testing.assert_close(torch.stack(lines["rdd"](out_s, out_t, distil.psi)), torch.stack([terms["feat"], terms["logit"]]))


# ---------------------------------------------------------------- the four detectors and the paper's ten students

STUDENTS = {
    "cp-voxel-s": "cp-voxel", "cp-voxel-xs": "cp-voxel", "cp-voxel-xxs": "cp-voxel",
    "cp-pillar-v0.4": "cp-pillar", "cp-pillar-v0.48": "cp-pillar", "cp-pillar-v0.64": "cp-pillar",
    "second-s": "second", "second-xs": "second", "pointpillars-s": "pointpillars", "pointpillars-xs": "pointpillars",
}  # fmt: skip


def small(name):
    """The full-width preset over a few metres; a range that its own pillars divide."""
    from dataclasses import replace

    cfg = preset(name)
    half = 7.68 if name.endswith("0.48") else 6.4
    return replace(cfg, point_range=(-half, -half, *cfg.point_range[2:3], half, half, cfg.point_range[5]))


@pytest.mark.parametrize("student", STUDENTS)
def test_each_of_the_paper_s_students_trains_a_step_decodes_and_distils(student):
    cfg_t, cfg_s = small(STUDENTS[student]), small(student)
    teacher, model = build(cfg_t).eval().requires_grad_(False), build(cfg_s).train()
    batch = few_points(cfg_s)
    distil = baselines.seeded(rdd.RDD, cfg_s, model.backbone.out_channels, teacher.backbone.out_channels)
    parameters = [*model.parameters(), *distil.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with torch.no_grad():
        out_t = teacher(teacher.prepare(batch))
    for task in out_t.maps:  # an untrained teacher proposes nothing: let it believe in a few places
        name = "heatmap" if "heatmap" in task else "cls"
        task[name][:, :, 3:9:5, 3:9:5] = 1.0
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    out_s = model(model.prepare(batch))
    detection = model.loss(out_s, batch)
    terms, seen = distil(out_s, out_t)
    assert float(seen["pairs_t"]) > 0 and all(float(t.detach()) > 0 for t in terms.values())
    rdd.total_loss(detection, terms).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distil.parameters())
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    found = model.eval().decode(model(model.prepare(batch)))
    columns = 9 if cfg_s.velocity else 7
    assert len(found) == 2 and all(d.boxes.shape[1] == columns and d.boxes.isfinite().all() for d in found)


class Anchors(Head):
    """Stands in for an anchor head, of these maps."""

    def __init__(self, regions, cls, box):
        super().__init__(regions)
        self.cls, self.box = cls, box

    def class_logits(self, _):
        return self.cls

    def regression(self, _):
        return self.box


def test_logit_loss_of_an_anchor_head_is_of_each_class_s_surest_anchor_and_of_the_best_one_s_code():
    """Six anchors a cell, three classes; maps that are constant over the cells, so that a region's values are known."""
    torch.manual_seed(0)
    cls_s, cls_t, box_s, box_t = torch.randn(18), torch.randn(18), torch.randn(42), torch.randn(42)
    neck, regions = torch.zeros(1, 6, 12, 20), boxes_in_cells((5, 8))

    def model(cls, box, proposed):
        maps = (values.view(1, -1, 1, 1).expand(1, -1, 12, 20).clone().requires_grad_() for values in (cls, box))
        return Output(neck, [], GEOMETRY, Anchors(proposed, *maps))

    out_s, out_t = model(cls_s, box_s, regions[:0]), model(cls_t, box_t, regions)
    distil = identity_rdd(select="all")
    terms, _ = distil(out_s, out_t)
    p_s, p_t = (sigmoid_rows(cls.tolist()) for cls in (cls_s, cls_t))
    expected = 49 * sum(abs(max(p_s[a * 3 + k] for a in range(6)) - max(p_t[a * 3 + k] for a in range(6))) for k in range(3))
    best = max(range(6), key=lambda a: max(p_t[a * 3 : a * 3 + 3]))  # the teacher proposed
    code_s, code_t = (box[7 * best : 7 * best + 7].tolist() for box in (box_s, box_t))
    expected += sum(abs(a - b) for a, b in zip(code_s[:6], code_t[:6], strict=True)) + abs(math.sin(code_s[6] - code_t[6]))
    assert float(terms["logit"].detach()) == pytest.approx(distil.cfg.alpha2 * expected, rel=1e-4)
    terms["logit"].backward()
    assert out_s.head.box.grad.abs().sum() > 0


def sigmoid_rows(values):
    return [1 / (1 + math.exp(-value)) for value in values]


def test_each_neck_is_cut_on_its_own_grid():
    """Both necks are one function of metres, 3 y + x, on other cells and from another origin: nothing disagrees."""

    def ramp(g, height, width):
        y, x = g.y0 + (torch.arange(height) + 0.5) * g.cell_y, g.x0 + (torch.arange(width) + 0.5) * g.cell_x
        return (3 * y[:, None] + x[None]).expand(1, 6, -1, -1)

    coarse = Geometry(x0=-3.0, y0=0.0, cell_x=1.0, cell_y=1.6)
    regions = boxes_in_cells((5, 8), (6, 11))
    out_s, out_t = output(ramp(GEOMETRY, 12, 20), regions), output(ramp(coarse, 8, 14), regions, geometry=coarse)
    pairs = identity_rdd(select="all").compare(out_s, out_t)
    torch.testing.assert_close(pairs.d, torch.zeros(4), atol=1e-3, rtol=0)


def test_selection_against_plain_loops():
    """Per scan where it says so, and a share is rounded; of the scans one has a hundred times the d of the other."""
    d = [1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 300.0]
    scan, info = torch.tensor([0, 0, 0, 0, 0, 1, 1]), -torch.tensor(d)
    cases = {
        ("relative", 1.0, 0.6): [0, 0, 1, 1, 1, 0, 1],  # d >= the mean of its scan, 3 and 200
        ("gaussian", 2.0, 0.6): [0, 0, 1, 1, 1, 0, 1],  # I at least 2 below the scan's largest, -1 and -100
        ("soft", 10.0, 0.6): [0.1, 0.2, 0.3, 0.4, 0.5, 1, 1],
        ("top", 0.0, 0.3): [0, 0, 0, 1, 1, 0, 1],  # 1.5 and 0.6 of them, rounded: 2 and 1
        ("top", 0.0, 0.1): [0, 0, 0, 0, 1, 0, 1],  # at least one
        ("least", 0.0, 0.3): [1, 1, 0, 0, 0, 1, 0],
    }  # fmt: skip
    for (rule, lam, fraction), expected in cases.items():
        assert rdd.solve_selection(info, scan, rule, lam, fraction).tolist() == pytest.approx(expected), rule


def test_summary_and_gradient_norms_in_numbers():
    side, d, m = torch.tensor([0] * 7 + [1] * 14), torch.linspace(0, 1, 21), (torch.arange(21) < 6).float()
    expected = {"pairs_t": 7, "pairs_s": 14, "selected": 6 / 21}
    expected |= {"d_05": 0.05, "d_25": 0.25, "d_50": 0.5, "d_75": 0.75, "d_95": 0.95}
    got = rdd.summary(rdd.RegionPairs(torch.zeros(21, 5), side, d, m))
    assert {name: float(value) for name, value in got.items()} == pytest.approx(expected)
    neck = torch.ones(3, requires_grad=True)
    terms = {"three": (neck * 3).sum(), "none": torch.ones(1, requires_grad=True).sum()}
    for scale in (1.0, 1024.0):
        assert rdd.gradient_norms(terms, neck, scale) == {"three": pytest.approx(math.sqrt(27)), "none": 0.0}


def test_box_codes_are_those_of_the_proposing_side_s_best_anchor():
    """Two anchors a cell, two classes; in the one region the sides believe in different anchors."""

    def model(best):
        cls = torch.full((1, 4, 6, 6), -3.0)
        cls[0, 2 * best + 1] = 2.0
        box = torch.arange(14.0).view(1, 14, 1, 1).expand(1, 14, 6, 6) + 100 * best
        return Output(torch.zeros(1, 1, 6, 6), [], GEOMETRY, Anchors(boxes_in_cells((3, 3)), cls, box.clone().requires_grad_()))

    out_s, out_t = model(best=0), model(best=1)
    regions, side = rdd.bilateral_regions(out_s, out_t, 0.1, 50)
    codes_s, codes_t = rdd.box_codes(out_s, out_t, regions, side)
    assert side.tolist() == [0, 1]
    assert codes_t[0].tolist() == [107.0 + k for k in range(7)] and codes_s[0].tolist() == [7.0 + k for k in range(7)]
    assert codes_t[1].tolist() == [100.0 + k for k in range(7)] and codes_s[1].tolist() == [0.0 + k for k in range(7)]
    nothing = rdd.box_codes(out_s, out_t, regions[:0], side[:0])
    assert nothing[0].shape == nothing[1].shape == (0, 7)
