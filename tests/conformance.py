"""Is every stage of a detector what OpenPCDet's own modules give?   (run by test_conformance.py, and by hand)

    python tests/conformance.py DIR [--keys DIR]

DIR holds cases `*.npz`, made by running OpenPCDet on real points with weights from a fixed recipe; the keys folder holds
`keys_<model>.json`, the reference's state_dict names and shapes. For every case: fill the reference's state_dict by the
recipe, import it as a user's checkpoint is imported, run our detector on the case's points, and compare voxels, each
stage of the encoder, neck, head maps, decoded boxes, training targets, each loss term and all gradients. Prints each
quantity's worst error beside its limit; exit status 1 when one is past it, 2 when a file is unusable.
"""

import json
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import ArgumentParser, InputError, run_cli
from config import Config
from data.batch import Batch
from detector import Detector
from presets import preset
from voxelize import Grid, voxelize
from weights import from_openpcdet, openpcdet_name

MODELS = {  # case name up to here: the keys file's model, our preset and its data set
    "second": ("second", "second", "kitti"),
    "pointpillars": ("pointpillars", "pointpillars", "kitti"),
    "centerpoint_voxel": ("centerpoint_voxel", "cp-voxel", "nuscenes"),
    "centerpoint_pillar": ("centerpoint_pillar", "cp-pillar-v0.2", "nuscenes"),
}
# Of the quantity's root mean square (features, maps), of the value (losses), of the norm (gradients); the reference's
# own distance between float32 and float64 is 3 to 300 times smaller, but for its gradients with batch statistics in
# float32 (ours are in float64), of which it gives no such distance.
LIMIT = {"exact": 0.0, "feature": 2e-4, "box": 2e-4, "loss": 1e-4, "gradient": 5e-3, "train gradient": 2e-2, "statistic": 1e-4}
NEAR = 1e-5  # of a threshold
BRANCH = {"heatmap": "hm"}


class Row(NamedTuple):
    """One comparison."""

    quantity: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


# ------------------------------------------------------------------ the recipe: weights and probes from key names


def normal(seed_text: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(seed_text.encode()))
    return torch.randn(shape, generator=generator)


def recipe_value(key: str, shape: tuple[int, ...], is_norm: bool, gain: dict[str, float]) -> Tensor:
    """The value of one state_dict entry (golden/models/README.md, "Weight recipe")."""
    kind = key.rpartition(".")[2]
    if kind in ("num_batches_tracked", "global_step"):
        return torch.zeros(shape, dtype=torch.int64)
    r = normal(key, shape)
    if kind == "running_mean":
        return 0.1 * r
    if kind == "running_var":
        return 1 + 0.2 * r.abs()
    if is_norm:
        return 1 + 0.1 * r if kind == "weight" else 0.1 * r
    if kind == "bias":
        return 0.05 * r
    return gain.get(key, gain.get(str(len(shape)))) / math.sqrt(math.prod(shape[1:])) * r


def recipe_state(spec: dict) -> dict[str, Tensor]:
    tensors = spec["tensors"]
    return {key: recipe_value(key, tuple(t["shape"]), key.rpartition(".")[0] + ".running_mean" in tensors, spec["gain"])
            for key, t in tensors.items()}  # fmt: skip


# ------------------------------------------------------------------ comparisons


def distance(ours: Tensor, theirs: np.ndarray) -> float:
    """Worst absolute difference as a share of the reference's root mean square; infinite for another shape."""
    a, b = ours.detach().double().numpy(), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape:
        return math.inf
    return float(np.abs(a - b).max() / max(np.sqrt(np.mean(b**2)), 1e-12)) if a.size else 0.0


def box_distance(ours: Tensor, theirs: np.ndarray) -> float:
    """Worst difference / (1 + |value|), headings compared modulo a turn."""
    a, b = ours.detach().double().numpy(), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape:
        return math.inf
    difference = np.abs(a - b)
    difference[..., 6] = np.abs((difference[..., 6] + math.pi) % (2 * math.pi) - math.pi)
    return float((difference / (1 + np.abs(b))).max()) if a.size else 0.0


def differing(ours: Tensor | np.ndarray, theirs: np.ndarray) -> float:
    """How many entries differ; infinite for another shape."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return float((a != b).sum()) if a.shape == b.shape else math.inf


def stats(rows: Tensor) -> Tensor:
    """(n, C) -> (2, C): mean and root mean square of every channel."""
    rows = rows.detach().double()
    return torch.stack([rows.mean(dim=0), rows.square().mean(dim=0).sqrt()])


def cells(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B*H*W, C): row number = flat cell number of the golden files."""
    return maps.detach().permute(0, 2, 3, 1).flatten(0, 2)


# ------------------------------------------------------------------ one case


class Case:
    """A golden file beside our detector with the same weights."""

    def __init__(self, path: Path, keys: Path) -> None:
        self.z = np.load(path)
        self.meta = json.loads(str(self.z["meta"]))
        name = next((m for m in MODELS if self.meta["case"].startswith(m)), None)
        if name is None:
            raise InputError(f"{path}: expected a case of {', '.join(MODELS)}, found {self.meta['case']!r}")
        model, preset_name, data = MODELS[name]
        spec = keys / f"keys_{model}.json"
        if not spec.is_file():
            raise InputError(f"{spec}: no such file; name its folder with --keys")
        self.cfg: Config = replace(
            preset(preset_name, data), point_range=tuple(map(float, self.meta["point_cloud_range"])),
            voxel_size=tuple(self.meta["voxel_size"]), max_points=self.meta["max_points_per_voxel"] or 0, max_voxels=0,
            any_height=self.meta["vfe"] == "DynPillarVFE")  # fmt: skip
        self.detector = Detector(self.cfg)
        self.detector.load_state_dict(from_openpcdet(recipe_state(json.loads(spec.read_text())), self.detector, spec))
        self.names = {openpcdet_name(name): name for name in self.detector.state_dict()}
        boxes = torch.from_numpy(self.z["gt_boxes"])
        kept = [b[b[:, -1] > 0] for b in boxes]
        self.batch = Batch([str(b) for b in range(len(kept))], torch.from_numpy(self.z["points"]),
                           [b[:, :-1] for b in kept], [b[:, -1].long() - 1 for b in kept], {})  # fmt: skip
        self.rows: list[Row] = []

    def add(self, quantity: str, error: float, kind: str) -> None:
        self.rows.append(Row(quantity, error, LIMIT[kind]))

    def run(self) -> list[Row]:
        detector = self.detector.eval()
        seen = self.watch()
        x = detector.prepare(self.batch)
        output = detector(x)
        self.voxels(x)
        self.sampled("bev_in", seen["bev_in"])
        self.encoder(x, seen)
        self.sampled("bev_out", output.neck)
        centre = self.cfg.head == "center"
        if centre:
            self.sampled("shared_conv", seen["shared"])
        (self.centre_maps if centre else self.anchor_maps)(output)
        (self.centre_decoded if centre else self.anchor_decoded)(output)
        (self.centre_targets if centre else self.anchor_targets)(output)
        self.losses("eval", output)
        self.gradients("grad", detector.loss(output, self.batch), probe=True)
        # Batch statistics amplify rounding: in float32 the reference is 1e-4 from itself in float64. So: in float64.
        detector.double().train()
        self.batch = replace(self.batch, points=self.batch.points.double(), boxes=[b.double() for b in self.batch.boxes])
        output = detector(detector.prepare(self.batch))
        self.losses("train_float64", output)
        self.gradients("train_grad", detector.loss(output, self.batch), probe=False)
        self.statistics()
        return self.rows

    def watch(self) -> dict[str, object]:
        """What the stages between input and output give, by hooks."""
        seen: dict[str, object] = {}

        def keep(name: str):
            return lambda _module, _inputs, output: seen.__setitem__(name, output)

        encoder = self.detector.encoder
        encoder.register_forward_hook(keep("bev_in"))
        if self.cfg.encoder == "voxel":
            for i, stage in enumerate(encoder.stages):
                stage.register_forward_hook(keep(f"x_conv{i + 1}"))
            encoder.conv_out.register_forward_hook(keep("out"))
        if self.cfg.head == "center":
            self.detector.head.shared.register_forward_hook(keep("shared"))
        return seen

    # -------------------------------------------------------------- points to neck

    def voxels(self, x) -> None:
        """The same cells, and in each the same points."""
        z = self.z
        theirs = z["voxel_coords"] if "voxel_coords" in z else z["pillar_coords"]
        order = np.lexsort(theirs.T[::-1])
        self.add("voxels: coordinates", differing(x.voxels.coords, theirs[order].astype(np.int64)), "exact")
        if "voxel_coords" not in z:
            return
        self.add("voxels: points in each", differing(x.voxels.counts, z["voxel_num_points"][order]), "exact")
        index = z["voxel_point_index"][order]
        voxel = np.full(len(z["points"]), -1)
        row, slot = np.nonzero(index >= 0)
        voxel[index[row, slot]] = row
        self.add("voxels: voxel of each point", differing(x.voxels.point_voxel, voxel), "exact")

    def encoder(self, x, seen: dict) -> None:
        z = self.z
        if self.cfg.encoder == "voxel":
            order = np.lexsort(z["voxel_coords"].T[::-1])
            self.add("vfe", distance(x.voxels.features, z["vfe_out"][order]), "feature")
            for i in range(4):
                stage, expected = seen[f"x_conv{i + 1}"], self.meta["sparse"][f"x_conv{i + 1}"]
                error = distance(stats(stage.features), z[f"sparse_x_conv{i + 1}_stats"])
                self.add(f"x_conv{i + 1}: sites", abs(len(stage.coords) - expected["sites"]), "exact")
                self.add(f"x_conv{i + 1}: statistics", error, "feature")
            out = seen["out"]
            order = torch.from_numpy(np.lexsort(out.coords.numpy().T[::-1]))
            self.add("sparse out: sites", differing(out.coords[order], z["sparse_out_coords"].astype(np.int64)), "exact")
            rows = torch.from_numpy(z["sparse_out_rows"].astype(np.int64))
            self.add("sparse out: features", distance(out.features[order][rows], z["sparse_out_feat"]), "feature")
            self.add("sparse out: statistics", distance(stats(out.features), z["sparse_out_stats"]), "feature")
            return
        self.pillar_rows("vfe", z["voxel_coords"] if "voxel_coords" in z else z["pillar_coords"], z, "", seen["bev_in"])
        if "z_inside" in z:  # the same network on the points inside the range's height only
            grid = Grid(self.cfg.point_range, self.cfg.voxel_size)
            voxels = voxelize(self.batch.points, grid, len(self.batch))
            order = np.lexsort(z["zf_pillar_coords"].T[::-1])
            self.add("vfe, z filtered: pillars", differing(voxels.coords, z["zf_pillar_coords"][order].astype(np.int64)), "exact")
            with torch.no_grad():
                canvas = self.detector.encoder(replace(x, voxels=voxels))
            self.pillar_rows("vfe, z filtered", z["zf_pillar_coords"], z, "zf_", canvas)

    def pillar_rows(self, name: str, coords: np.ndarray, z, prefix: str, canvas: Tensor) -> None:
        b, _, i, j = torch.from_numpy(coords.astype(np.int64)).unbind(1)
        features = canvas.detach()[b, :, i, j]
        rows = torch.from_numpy(z[f"{prefix}vfe_rows"].astype(np.int64))
        self.add(name, distance(features[rows], z[f"{prefix}vfe_out"]), "feature")
        self.add(f"{name}: statistics", distance(stats(features), z[f"{prefix}vfe_stats"]), "feature")

    def sampled(self, name: str, maps: Tensor) -> None:
        z, rows = self.z, cells(maps)
        self.add(f"{name}: shape", differing(np.array(maps.shape), z[f"{name}_shape"]), "exact")
        self.add(name, distance(rows[torch.from_numpy(z[f"{name}_idx"].astype(np.int64))], z[f"{name}_val"]), "feature")
        self.add(f"{name}: statistics", distance(stats(rows), z[f"{name}_stats"]), "feature")

    # -------------------------------------------------------------- heads: maps

    def head_map(self, name: str, key: str, maps: Tensor) -> None:
        index = torch.from_numpy(self.z["map_idx"].astype(np.int64))
        self.add(name, distance(cells(maps)[index], self.z[f"{key}_val"]), "feature")
        self.add(f"{name}: statistics", distance(stats(cells(maps)), self.z[f"{key}_stats"]), "feature")

    def centre_maps(self, output) -> None:
        for t, task in enumerate(output.maps):
            for name, maps in task.items():
                self.head_map(f"map {t} {name}", f"map_head{t}_{BRANCH.get(name, name)}", maps)

    def anchor_maps(self, output) -> None:
        for ours, theirs in (("cls", "cls"), ("box", "box"), ("direction", "dir")):
            self.head_map(f"map {ours}", f"map_{theirs}", output.maps[0][ours])

    # -------------------------------------------------------------- heads: decoded boxes, before NMS

    def centre_decoded(self, output) -> None:
        """Matched by (cell, class inside the task): equal scores may stand in another order."""
        z, head, width = self.z, output.head, output.neck.shape[3]
        for t, task in enumerate(output.maps):
            worst_box = worst_score = absent = 0.0
            for b in range(len(self.batch)):
                maps = {name: m[b].detach() for name, m in task.items()}
                box, score, label, cell = head._best(t, maps, 500, peaks=False)
                place = {(int(i) * width + int(j), int(k)): n for n, ((i, j), k) in enumerate(zip(cell, label, strict=True))}
                theirs = list(zip(z[f"dec{t}_{b}_cell"].tolist(), (z[f"dec{t}_{b}_label"] - 1).tolist(), strict=True))
                at = [place[key] for key in theirs if key in place]
                absent += len(theirs) - len(at)
                if len(at) == len(theirs):
                    worst_box = max(worst_box, box_distance(box[at], z[f"dec{t}_{b}_boxes"]))
                    worst_score = max(worst_score, distance(score[at], z[f"dec{t}_{b}_scores"]))
                shifted = (task["heatmap"][b].detach() - 3).sigmoid().flatten()
                shifted = shifted.topk(min(500, len(shifted))).values
                limit = self.cfg.score_threshold
                kept = shifted > limit
                # A score within rounding of the threshold may fall on either side of it, here and in `anchor_decoded`.
                near = int(((shifted - limit).abs() < NEAR).sum())
                count, total = int(z["dec_shift3_kept"][t, b]), float(z["dec_shift3_score_sum"][t, b])
                self.add(f"decoded {t} of {b}, logits - 3: kept", max(abs(int(kept.sum()) - count) - near, 0), "exact")
                beyond = max(abs(float(shifted[kept].sum()) - total) - near * (limit + NEAR), 0)
                self.add(f"decoded {t} of {b}, logits - 3: scores", beyond / (1 + total), "loss")
            self.add(f"decoded {t}: absent", absent, "exact")
            self.add(f"decoded {t}: boxes", worst_box, "box")
            self.add(f"decoded {t}: scores", worst_score, "feature")

    def anchor_decoded(self, output) -> None:
        z = self.z
        height, width = output.neck.shape[2:]
        boxes, logits = (part.detach() for part in output.head.decode_all(output.maps))
        best, label = logits.sigmoid().max(dim=2)
        at = torch.from_numpy(z["dec_anchor"].astype(np.int64))
        rows = torch.arange(len(at))[:, None]
        self.add("decoded: boxes", box_distance(boxes[rows, at], z["dec_boxes"]), "box")
        self.add("decoded: scores", distance(best[rows, at], z["dec_scores"]), "feature")
        self.add("decoded: labels", differing(label[rows, at] + 1, z["dec_labels"]), "exact")
        for score in ("0.1", "0.9"):
            found = (best >= float(score)).sum(dim=1)
            near = ((best - float(score)).abs() < NEAR).sum(dim=1).numpy()
            beyond = np.maximum(np.abs(found.numpy() - z[f"count_score_ge_{score}"]) - near, 0).sum()
            self.add(f"decoded: scores >= {score}", float(beyond), "exact")
        at = torch.from_numpy(z["rand_anchor"].astype(np.int64))
        self.add("random anchors: boxes", box_distance(boxes[:, at], z["rand_boxes"]), "box")
        self.add("random anchors: logits", distance(logits[:, at], z["rand_scores_logit"]), "feature")
        anchors = output.head.anchors(height, width, boxes.device)
        self.add("random anchors: anchors", distance(anchors[at], z["rand_anchor_values"]), "feature")

    # -------------------------------------------------------------- heads: training targets

    def centre_targets(self, output) -> None:
        z, head = self.z, output.head
        height, width = output.neck.shape[2:]
        for t, task in enumerate(output.maps):
            target = head.targets(t, self.batch.boxes, self.batch.labels, task["heatmap"].shape)
            expected = np.zeros(tuple(z[f"tgt{t}_hm_shape"]), dtype=np.float32)
            expected.reshape(-1)[z[f"tgt{t}_hm_idx"]] = z[f"tgt{t}_hm_val"]
            worst = np.abs(target["heatmap"].numpy() - expected).max() if target["heatmap"].shape == expected.shape else math.inf
            self.add(f"target {t}: heat map", float(worst), "feature")
            kept = z[f"tgt{t}_mask"].astype(bool)  # (B, M), objects of a scan in their order
            b, i, j = target["cell"].unbind(1)
            theirs = np.nonzero(kept)[0] * height * width + z[f"tgt{t}_inds"][kept]
            self.add(f"target {t}: cells", differing((b * height + i) * width + j, theirs), "exact")
            self.add(f"target {t}: codes", distance(target["code"], z[f"tgt{t}_boxes"][kept]), "feature")

    def anchor_targets(self, output) -> None:
        z = self.z
        height, width = output.neck.shape[2:]
        target = output.head.targets(self.batch.boxes, self.batch.labels, height, width)
        self.add("target: label of each anchor", differing(target.labels, z["tgt_labels"]), "exact")
        self.add("target: positives", differing(target.positive, z["tgt_pos"]), "exact")
        self.add("target: codes", distance(target.code, z["tgt_reg_at_pos"]), "feature")
        self.add("target: directions", differing(target.bin, z["tgt_dir_at_pos"]), "exact")

    # -------------------------------------------------------------- losses and gradients

    def losses(self, mode: str, output) -> None:
        theirs = self.meta["losses"][mode]
        ours = {name: float(value.detach()) for name, value in self.detector.loss(output, self.batch).items()}
        if self.cfg.head == "anchor":
            pairs = {"cls": (ours["cls"], theirs["rpn_loss_cls"]), "reg": (ours["reg"], theirs["rpn_loss_loc"]),
                     "dir": (ours["dir"], theirs["rpn_loss_dir"])}  # fmt: skip
        else:
            pairs, weight = {}, torch.tensor(self.cfg.code_weights)
            for t, maps in enumerate(output.maps):
                focal, codes = output.head.task_loss(t, maps, self.batch.boxes, self.batch.labels)
                loc = float(self.cfg.loc_weight * (weight * codes).sum().detach())
                pairs[f"hm {t}"] = (float(focal.detach()), theirs[f"hm_loss_head_{t}"])
                pairs[f"loc {t}"] = (loc, theirs[f"loc_loss_head_{t}"])
                if f"reg_per_code_head_{t}" in theirs:
                    pairs |= {f"code {t} {k}": (float(codes[k].detach()), value)
                              for k, value in enumerate(theirs[f"reg_per_code_head_{t}"])}  # fmt: skip
        pairs["total"] = (sum(ours.values()), theirs["total"])
        for name, (mine, value) in pairs.items():
            self.add(f"loss, {mode}: {name}", abs(mine - value) / max(abs(value), 1e-3), "loss")

    def gradients(self, key: str, losses: dict[str, Tensor], probe: bool) -> None:
        """Norm of each parameter's gradient, and its product with a fixed direction as a share of that norm."""
        self.detector.zero_grad()
        sum(losses.values()).backward()
        parameters = dict(self.detector.named_parameters())
        norms = self.z[f"{key}_norm"]
        # A bias before a batch norm has no gradient in training but rounding: measured against the largest there is.
        floor = 1e-6 * norms.max()
        worst_norm, worst_probe = (0.0, ""), (0.0, "")
        for n, name in enumerate(self.meta["param_keys"]):
            grad = parameters[self.names[name]].grad
            error = abs(float(grad.double().norm()) - norms[n]) / (norms[n] + floor / LIMIT["gradient"])
            worst_norm = max(worst_norm, (error, name))
            if probe:
                product = float((grad * normal("probe." + name, tuple(grad.shape))).double().sum())
                error = abs(product - self.z[f"{key}_probe"][n]) / (norms[n] + floor / LIMIT["gradient"])
                worst_probe = max(worst_probe, (error, name))
        self.add(f"{key}: norm of {len(norms)} gradients, worst {worst_norm[1]}", worst_norm[0],
                 "gradient" if probe else "train gradient")  # fmt: skip
        if probe:
            self.add(f"{key}: direction, worst {worst_probe[1]}", worst_probe[0], "gradient")

    def statistics(self) -> None:
        """Running statistics of all norms after one step in training mode."""
        state = self.detector.state_dict()
        ours = [state[self.names[name]].double() for name in self.meta["running_keys"]]
        norm, total = torch.stack([v.norm() for v in ours]), torch.stack([v.sum() for v in ours])
        error = (norm.numpy() - self.z["train_running_norm"]) / self.z["train_running_norm"]
        self.add("running statistics: norms", float(np.abs(error).max()), "statistic")
        error = (total.numpy() - self.z["train_running_sum"]) / self.z["train_running_norm"]
        self.add("running statistics: sums", float(np.abs(error).max()), "statistic")


def check_case(path: Path, keys: Path) -> list[Row]:
    """All comparisons of one golden file."""
    return Case(path, keys).run()


def main() -> None:
    p = ArgumentParser(prog="conformance.py", description=__doc__)
    p.add_argument("dir", type=Path, metavar="DIR", help="folder of *.npz cases")
    p.add_argument("--keys", type=Path, metavar="DIR", help="folder of keys_<model>.json [DIR]")
    args = p.parse_args()
    cases = sorted(args.dir.glob("*.npz"))
    if not cases:
        raise InputError(f"{args.dir}: expected cases *.npz, found none")
    failed = 0
    for path in cases:
        rows = check_case(path, args.keys or args.dir)
        print(f"{path.name}: {len(rows)} quantities")
        for row in rows:
            print(f"  {row.quantity:72} {row.error:9.2g}  limit {row.limit:g}{'' if row.ok else '   PAST ITS LIMIT'}")
        failed += sum(not row.ok for row in rows)
    print("all within their limits" if not failed else f"{failed} past their limits")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_cli(main)
