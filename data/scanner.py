"""A rotating LiDAR: the rays of a real sensor against the parts of a scene.   (after: scenes.py; next: simulate.py)

The lasers sit above one another near the origin of the LiDAR frame, so a part can be met only inside the
window of beams and azimuths that its outline spans: the scan is a grid, a window is a slice, and a part
costs as much as it is large to look at. Rays pass gaps (glass, fences) at random and enter vegetation as
far as chance lets them.
dims: B beams · A azimuth steps · P parts · F faces of a part · M labelled objects
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.scenes import Ground, Scene
from data.shapes import BALL, POST

NEVER = np.float32(1e9)  # a distance no ray gets to, m


@dataclass(frozen=True)
class Scanner:
    """A sensor's geometry and its errors. Angles in degrees, lengths in metres."""

    elevations: tuple[float, ...]  # B, from the top
    origins: tuple[float, ...]  # B, height of each laser above the origin of the LiDAR frame
    azimuth_step: float
    max_range: float
    min_range: float = 1.0
    noise: float = 0.02  # standard deviation of a range
    sector: float = 180.0  # half the angle it looks into, around x
    signal: float = 1.6  # ln of the power it hears half of the time, see `echoes`
    dark: float = 4.5  # ln of the power below which it mostly reports intensity 0
    full: float = 1.0  # the intensity it reports for reflectance 1;
    gamma: float = 1.0  # for others it goes with this power of the reflectance,
    top: float = 0.99  # up to here,
    decimals: int = 2  # in such steps

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Elevations (B,) and azimuths (A,) of the rays, rad. Azimuths grow from -sector."""
        count = round(2 * self.sector / self.azimuth_step)
        azimuth = np.radians(-self.sector + (np.arange(count) + 0.5) * self.azimuth_step)
        return np.radians(np.array(self.elevations)), azimuth


# HDL-64E as KITTI carries it, spun at 10 Hz: two blocks of 32 lasers, 1/3 and 1/2 degree apart, the upper
# block 8 cm above the lower one. First and last beam of each block: lines fitted to the rings of real
# clouds (residual 0.3 mm). The beams of a real sensor are not quite evenly spaced; these irregularities are
# ours.
HDL64E = Scanner(
    elevations=tuple(
        (np.r_[np.linspace(1.94, -8.71, 32), np.linspace(-9.03, -25.0, 32)]
         + np.random.default_rng(32).uniform(-0.08, 0.08, 64)).tolist()
    ),
    origins=tuple(np.r_[np.linspace(0.209, 0.198, 32), np.linspace(0.126, 0.116, 32)].tolist()),
    azimuth_step=0.172, max_range=80.0,
)  # fmt: skip
# HDL-32E as nuScenes carries it, at 20 Hz: 32 beams 4/3 degrees apart out of one point, 1084 firings a turn. Angles, and what
# the constants of the intensity were fitted to, from one real key frame.
HDL32E = Scanner(
    elevations=tuple(np.linspace(10.67, -30.67, 32).tolist()), origins=(0.0,) * 32, azimuth_step=360 / 1084, max_range=100.0,
    min_range=0.3, signal=2.2, dark=-9.0, full=190.0, gamma=2.0, top=255.0, decimals=0,
)  # fmt: skip


class Pose(NamedTuple):
    """Where a sensor is in a scene: its axes as columns, and its origin, m."""

    rotation: np.ndarray  # (3, 3)
    origin: np.ndarray  # (3,)


class Scan(NamedTuple):
    """What came back, and per object how many rays met it (before echoes got lost)."""

    points: np.ndarray  # (N, 4) float32 x, y, z, intensity, ring after ring, as KITTI writes them
    owner: np.ndarray  # (N,) row of the object a point lies on, -1 for the scenery
    visible: np.ndarray  # (M,) rays whose first hit is the object
    alone: np.ndarray  # (M,) rays that would meet it if nothing else were there
    ray: np.ndarray  # (N,) which of the B x A rays a point came back from


def rotations(parts: np.ndarray) -> np.ndarray:
    """(P, 3, 3) part axes -> LiDAR axes: first the lean about y, then the turn about z."""
    cy, sy, cp, sp = (f(parts[k]) for k in ("yaw", "pitch") for f in (np.cos, np.sin))
    zero = np.zeros_like(cy)
    return np.stack([cy * cp, -sy, cy * sp, sy * cp, cy, sy * sp, -sp, zero, cp], axis=-1).reshape(-1, 3, 3)


def faces(parts: np.ndarray, rotation: np.ndarray) -> list[np.ndarray]:
    """Per part (F, 4) float32: outward unit normals and their distance from the LiDAR, n·x <= b inside."""
    hx, hy, hz = parts["half"].T.astype(np.float64)
    zero, one = np.zeros_like(hx), np.ones_like(hx)
    front, rear, side = parts["taper"].T
    # A tapered box: the front face goes through (hx, -hz) and (hx - front*hx, +hz), the others likewise.
    tilt = [hx * front / (2 * hz), hx * rear / (2 * hz), hy * side / (2 * hz)]
    box = [(one, zero, tilt[0], hx - tilt[0] * hz), (-one, zero, tilt[1], hx - tilt[1] * hz),
           (zero, one, tilt[2], hy - tilt[2] * hz), (zero, -one, tilt[2], hy - tilt[2] * hz)]  # fmt: skip
    ends = [(zero, zero, one, hz), (zero, zero, -one, hz)]
    turn = (np.arange(8) + 0.5) * np.pi / 4
    # Eight sides of an elliptical post, in the middle between the inscribed and the circumscribed octagon
    post = [(math.cos(a) / hx, math.sin(a) / hy, zero, 0.96 * one) for a in turn]
    out: list[np.ndarray] = [np.zeros((0, 4), np.float32)] * len(parts)
    for sides, mask in ((box, parts["shape"] < BALL), (post, parts["shape"] == POST)):
        rows = np.flatnonzero(mask)
        planes = np.stack([np.stack(np.broadcast_arrays(*p), -1) for p in sides + ends], 1)[rows]  # (p, F, 4)
        planes /= np.linalg.norm(planes[..., :3], axis=-1, keepdims=True)
        normal = planes[..., :3] @ rotation[rows].transpose(0, 2, 1)
        offset = planes[..., 3] + (normal @ parts["centre"][rows][:, :, None])[..., 0]
        for i, n, b in zip(rows, normal, offset, strict=True):
            out[i] = np.concatenate([n, b[:, None]], axis=1).astype(np.float32)
    return out


def windows(scanner: Scanner, parts: np.ndarray, rotation: np.ndarray, tilted: bool = False) -> np.ndarray:
    """(P, 4) int: first and one-past-last beam, first and one-past-last azimuth that can meet each part.
    tilted: the sensor may lean by up to 3 degrees against the parts, and stand above one."""
    elevation, azimuth = scanner.grid()
    signs = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]) * 2 - 1
    corners = parts["centre"][:, None] + (signs * parts["half"][:, None]) @ rotation.transpose(
        0, 2, 1
    )  # (P, 8, 3)
    middle = np.arctan2(parts["centre"][:, 1], parts["centre"][:, 0])
    off = np.arctan2(corners[..., 1], corners[..., 0]) - middle[:, None]
    off = (off + np.pi) % (2 * np.pi) - np.pi
    step = np.radians(scanner.azimuth_step)
    first = np.floor((middle + off.min(1) - azimuth[0]) / step).astype(int)
    last = np.ceil((middle + off.max(1) - azimuth[0]) / step).astype(int) + 1
    # Elevation: the highest and lowest corner at the nearest horizontal distance the part reaches
    local = -(parts["centre"][:, None] @ rotation)[:, 0]
    gap = np.maximum(np.abs(local) - parts["half"], 0)
    upright = np.hypot(gap[:, 0], gap[:, 1])
    if tilted:
        first[upright < 0.1], last[upright < 0.1] = 0, len(azimuth)
        upright = 0.99 * upright - 0.06 * np.abs(corners[..., 2]).max(1)
    leaning = np.hypot(*parts["centre"][:, :2].T) - np.linalg.norm(parts["half"], axis=1)
    near = np.maximum(np.where(parts["pitch"] == 0, upright, leaning), 0.2)
    far = np.hypot(corners[..., 0], corners[..., 1]).max(1)
    top, bottom = corners[..., 2].max(1), corners[..., 2].min(1)
    top, bottom = top - min(scanner.origins), bottom - max(scanner.origins)
    high = np.arctan2(top, np.where(top > 0, near, far))
    low = np.arctan2(bottom, np.where(bottom > 0, far, near))
    descending = -elevation
    rows = np.searchsorted(descending, -high - 1e-6), np.searchsorted(descending, -low + 1e-6, side="right")
    return np.stack([*rows, first, last], axis=1)


def meet_faces(
    planes: np.ndarray, rays: np.ndarray, up: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays (b, a, 3) from (0, 0, up), up (b,), enter and leave a convex part, m, and the cosine of
    incidence; a ray that misses enters after it leaves."""
    along = rays @ planes[:, :3].T  # (b, a, F)
    ahead = (planes[:, 3] - up[:, None] * planes[:, 2])[
        :, None
    ]  # (b, 1, F) distance from the laser to the face
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = ahead / along
    enters = np.where(along < 0, distance, -NEVER)
    face = enters.argmax(-1)[..., None]
    enter = np.take_along_axis(enters, face, -1)[..., 0]
    leave = np.where(along > 0, distance, NEVER).min(-1)
    # A ray parallel to a face and outside it misses
    parallel = ((along == 0) & (ahead < 0)).any(-1)
    return enter, np.where(parallel, -NEVER, leave), -np.take_along_axis(along, face, -1)[..., 0]


def meet_ball(centre: np.ndarray, half: np.ndarray, rotation: np.ndarray, rays: np.ndarray, up: np.ndarray):
    """The same for an ellipsoid: a unit sphere in its own axes."""
    to_unit = (rotation / half).T.astype(np.float32)  # LiDAR -> the part's axes, in units of its half lengths
    start = (up[:, None] * to_unit[:, 2] - to_unit @ centre)[:, None]  # (b, 1, 3)
    rays_unit = rays @ to_unit.T  # (b, a, 3)
    a = (rays_unit * rays_unit).sum(-1)
    b = (rays_unit * start).sum(-1)
    root = b * b - a * ((start * start).sum(-1) - 1)
    hit = root > 0
    width = np.sqrt(np.where(hit, root, 0))
    enter, leave = (-b - width) / a, np.where(hit, (-b + width) / a, -NEVER)
    normal = (start + enter[..., None] * rays_unit) @ to_unit  # not of unit length
    cosine = -(normal * rays).sum(-1) / np.linalg.norm(normal, axis=-1)
    return enter, leave, cosine


def meet_ground(ground: Ground, rays: np.ndarray, start: np.ndarray, max_range: float,
                below: float) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Range and cosine of incidence of each ray's ground point; twice `max_range` where there is none. rays (B, A, 3) and
    their starts (B, 3) in the scene's frame; below: height of the ground under the sensor, a first guess.

    Fixed point: guess the height, go to where the ray has it, look up the height there. The ground is so
    flat against all but the most grazing rays that this converges; those that do not are taken to graze it
    without an echo.
    """
    down = -rays[..., 2]
    x, y, up = start.T[..., None]  # (B, 1) each
    nothing, slant = 2 * max_range, np.maximum(down, 0.004)
    distance = np.clip((up - below) / slant, 0, nothing)
    for _ in range(6):
        height = ground.z(x + rays[..., 0] * distance, y + rays[..., 1] * distance)
        found = (up - height) / slant
        last, distance = distance, np.clip(0.3 * distance + 0.7 * found, 0.5, nothing)
    met = (down > 0.004) & (np.abs(found - last) < 0.02 * last)
    return np.where(met, found, nothing).astype(np.float32), slant


class Hits(NamedTuple):
    """What every ray of the grid (B, A) meets first, before echoes get lost."""

    rays: np.ndarray  # (B, A, 3) unit vectors
    depth: np.ndarray  # (B, A) m; beyond the scanner's range where there is nothing
    cosine: np.ndarray  # (B, A) of the angle of incidence
    bright: np.ndarray  # (B, A) reflectance
    owner: np.ndarray  # (B, A) row of the object, -1 for the scenery
    alone: np.ndarray  # (M,) rays that would meet each object if nothing else were there


def meet(item: np.void, planes: np.ndarray, rotation: np.ndarray, rays: np.ndarray, up: np.ndarray, rng):
    """Which rays of a window hit one part, where, and the cosine of incidence there."""
    if item["shape"] == BALL:
        enter, leave, cosine = meet_ball(item["centre"], item["half"], rotation, rays, up)
    else:
        enter, leave, cosine = meet_faces(planes, rays, up)
    hit = (enter < leave) & (enter > 0)
    if item["gap"] > 0:
        hit &= rng.random(hit.shape, np.float32) >= item["gap"]
    if item["density"] > 0:  # leaves are met after a path of random length, and face anywhere
        enter = enter + rng.exponential(1 / item["density"], hit.shape).astype(np.float32)
        hit &= enter < leave
        cosine = rng.uniform(0.2, 1, hit.shape).astype(np.float32)
    return hit, enter, cosine


def first_hits(scene: Scene, scanner: Scanner, rng: np.random.Generator, pose: Pose | None = None) -> Hits:
    """Send out all rays: the ground first, then the parts by object, each in its window of the grid. Without a pose the
    scene is in the sensor's frame already."""
    elevation, azimuth = scanner.grid()
    ce, se = np.cos(elevation)[:, None], np.sin(elevation)[:, None]
    level = np.broadcast_to(se, (len(elevation), len(azimuth)))
    rays = np.stack([ce * np.cos(azimuth), ce * np.sin(azimuth), level], axis=-1).astype(np.float32)
    up = np.array(scanner.origins, np.float32)
    start, ahead = np.stack([0 * up, 0 * up, up], axis=1), rays
    parts = scene.parts[np.argsort(scene.parts["owner"], kind="stable")]
    rotation = rotations(parts)
    below = scene.ground.height
    if pose is not None:
        below = float(scene.ground.z(*pose.origin[:2]))
        start, ahead = (np.einsum("...j,ij->...i", v, pose.rotation).astype(np.float32) for v in (start, rays))
        start += pose.origin.astype(np.float32)
        parts["centre"] = (parts["centre"] - pose.origin) @ pose.rotation
        rotation = pose.rotation.T @ rotation
    depth, cosine = meet_ground(scene.ground, ahead, start, scanner.max_range, below)
    x, y = (start[:, None, k] + ahead[..., k] * depth for k in (0, 1))
    road, beside = scene.ground.reflectance
    bright = np.where(np.abs(scene.ground.to_road(x, y)[1]) < scene.ground.half_road, road, beside).astype(np.float32)
    owner = np.full(depth.shape, -1, np.int32)
    alone = np.zeros(len(scene.names), int)

    planes, around = faces(parts, rotation), windows(scanner, parts, rotation, tilted=pose is not None)
    met = np.zeros(depth.shape, bool)  # rays that meet the object whose parts are being looked at
    # In a full turn a window may cross the seam: then it is two slices
    seams = (-len(azimuth), 0, len(azimuth)) if scanner.sector >= 180 else (0,)
    for i, item in enumerate(parts):
        b0, b1, a0, a1 = around[i]
        for shift in seams:
            lo, hi = max(a0 + shift, 0), min(a1 + shift, len(azimuth))
            if lo >= hi or b0 >= b1:
                continue
            window = np.s_[b0:b1, lo:hi]
            hit, enter, incidence = meet(item, planes[i], rotation[i], rays[window], up[b0:b1], rng)
            met[window] |= hit
            hit &= enter < depth[window]
            depth[window][hit], cosine[window][hit] = enter[hit], incidence[hit]
            bright[window][hit], owner[window][hit] = item["reflectance"], item["owner"]
        if i + 1 == len(parts) or parts["owner"][i + 1] != item["owner"]:  # that was its last part
            if item["owner"] >= 0:
                alone[item["owner"]] = met.sum()
            met[:] = False
    return Hits(rays, depth, cosine, bright, owner, alone)


def scan(scene: Scene, scanner: Scanner, rng: np.random.Generator, pose: Pose | None = None) -> Scan:
    """One turn of the scanner in a scene, as a snapshot: nothing moves meanwhile."""
    hits = first_hits(scene, scanner, rng, pose)
    visible = np.bincount(hits.owner[hits.owner >= 0], minlength=len(scene.names))
    heard, measured, intensity = echoes(scanner, hits, rng)
    xyz = hits.rays * measured[..., None]
    xyz[..., 2] += np.array(scanner.origins, np.float32)[:, None]
    points = np.concatenate([xyz, intensity[..., None]], axis=-1)
    return Scan(points[heard], hits.owner[heard], visible, hits.alone, np.flatnonzero(heard))


def echoes(
    scanner: Scanner, hits: Hits, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rays (B, A) come back, with which range and intensity.

    An echo's power is reflectance · sqrt(cos incidence) / range² (real surfaces are rough: cos itself would
    lose the road at 30 m, where a real sensor still hears it). The chance to hear it is a logistic function
    of its logarithm, and so is the chance that its intensity reads 0, as most do beyond 60 m. Otherwise
    intensity is the reflectance, as KITTI's calibrated values hardly depend on range, with a gain per laser
    and noise, in steps of the sensor's.
    """
    depth, bright, shape = hits.depth, hits.bright, hits.depth.shape
    texture = np.exp(rng.normal(0, 0.25, shape)).astype(np.float32)
    power = np.log(
        bright * texture * np.sqrt(np.maximum(hits.cosine, 0.02)) * 1e6 / np.maximum(depth, 0.1) ** 2
    )
    clear = rng.uniform(0.93, 1.0)  # weather and a dirty lens take a share of all echoes
    chance = clear / (1 + np.exp((scanner.signal - power) / 0.5))
    heard = (
        (rng.random(shape, np.float32) < chance) & (depth < scanner.max_range) & (depth > scanner.min_range)
    )
    measured = depth + rng.normal(0, scanner.noise, shape).astype(np.float32)
    gain = np.random.default_rng(64).normal(
        1, 0.17, (shape[0], 1)
    )  # a property of the sensor, not of the frame
    intensity = bright * texture * gain + rng.normal(0, 0.02, shape)
    intensity[rng.random(shape, np.float32) < 1 / (1 + np.exp((power - scanner.dark) / 0.4))] = 0
    intensity = np.sign(intensity) * np.abs(intensity) ** scanner.gamma * scanner.full
    return heard, measured, np.clip(np.round(intensity, scanner.decimals), 0, scanner.top).astype(np.float32)
