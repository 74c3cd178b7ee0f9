"""LabelledSlice: one training picture with a label map, and the random changes made to it.

Covers geometry (rotation, scale, shift, elastic deformation), intensity (window, contrast phase made from the label
map, noise, blur) and things beside the patient (arms, table). Everything is drawn from one NumPy generator, so a sample
is repeatable from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from edgemed.core import Box, Window
from edgemed.families.native_lexicon import STRUCTURES

INDEX = {term.key: i for i, term in enumerate(STRUCTURES)}
Image = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class LabelledSlice:
    """One picture with what is known about it.

    image: float32 [rows, columns] (HU for CT, else any grey scale) or uint8 [rows, columns, 3].
    labels: uint8 [rows, columns], structure index + 1, 0 where nothing is labelled.
    known: bool [structures]: True where `labels` tells presence and absence of that structure for certain.
    boxes: structure -> box in pixels, where people drew a box and no mask.
    windows: the VOI windows a viewer may show the picture with; empty for colour.
    """

    image: Image
    labels: npt.NDArray[np.uint8]
    known: npt.NDArray[np.bool_]
    modality: int
    body_part: int
    source: str
    patient: str
    spacing: tuple[float, float] = (1.0, 1.0)
    windows: tuple[Window, ...] = ()
    boxes: tuple[tuple[int, Box], ...] = ()


# Contrast phase: structures whose CT value changes with contrast medium, with the range (HU) of the shift.
_CONTRAST = {
    "aorta": (-110, 160), "inferior_vena_cava": (-70, 110), "portal_vein": (-70, 110), "kidney_left": (-70, 120),
    "kidney_right": (-70, 120), "spleen": (-50, 70), "liver": (-45, 50), "pancreas": (-40, 50), "heart": (-90, 120),
    "pulmonary_artery": (-110, 160), "iliac_vessels": (-90, 140), "stomach": (-25, 60), "colon": (-20, 40),
    "small_bowel": (-20, 60), "urinary_bladder": (-5, 60), "gallbladder": (-10, 20), "duodenum": (-20, 40),
}  # fmt: skip


def shift_contrast(piece: LabelledSlice, rng: np.random.Generator) -> LabelledSlice:
    """Return the CT slice as if another contrast phase had been taken: one random shift per labelled structure."""
    change = np.zeros(256, np.float32)
    for key, (low, high) in _CONTRAST.items():
        if rng.random() < 0.7:
            change[INDEX[key] + 1] = rng.uniform(low, high)
    shift = change[piece.labels]
    soft = F.avg_pool2d(torch.from_numpy(shift)[None, None], 3, stride=1, padding=1)[0, 0].numpy()
    return replace(piece, image=(piece.image + soft).astype(np.float32))


# Typical CT values (HU) by structure, used to paint a slice from its label map alone. Textbook values, portal phase.
_TYPICAL_HU = {
    "liver": 105, "spleen": 120, "stomach": 40, "aorta": 150, "inferior_vena_cava": 120, "portal_vein": 150,
    "pancreas": 95, "kidney_left": 160, "kidney_right": 160, "gallbladder": 12, "duodenum": 50, "small_bowel": 45,
    "colon": 0, "urinary_bladder": 10, "prostate": 50, "lung_left": -830, "lung_right": -830, "heart": 120,
    "vertebra": 230, "sacrum": 220, "spinal_cord": 35, "ribs": 300, "costal_cartilages": 100, "hip_left": 300,
    "hip_right": 300, "femur_left": 350, "femur_right": 350,
}  # fmt: skip


def paint(piece: LabelledSlice, rng: np.random.Generator) -> LabelledSlice:
    """Return a CT slice painted from the label map: each structure a random value near its typical one.

    The real texture shows through, and the unlabelled body keeps its own values under a random gain, so organ borders
    and texture stay true.
    """
    value = np.zeros(256, np.float32)
    weight = np.zeros(256, np.float32)
    for i, term in enumerate(STRUCTURES):
        value[i + 1] = _TYPICAL_HU.get(term.key, 60) + rng.normal(0, 45)
        weight[i + 1] = rng.uniform(0.5, 1.0)
    if rng.random() < 0.3:  # stomach and bowel full of gas or of contrast medium
        value[INDEX["stomach"] + 1] = rng.choice([-700.0, 200.0, 10.0])
    w = F.avg_pool2d(torch.from_numpy(weight[piece.labels])[None, None], 3, stride=1, padding=1)[0, 0].numpy()
    image = piece.image * (1 - w) + value[piece.labels] * w
    soft_tissue = (piece.image > -200) & (piece.labels == 0)
    image = np.where(soft_tissue, image * rng.uniform(0.7, 1.3) + rng.normal(0, 20), image)
    return replace(piece, image=image.astype(np.float32))


def warp(piece: LabelledSlice, rng: np.random.Generator, rows: int, columns: int, strength: float) -> LabelledSlice:
    """Return the slice resampled to rows x columns under a random affine and elastic map. `strength` 0 only resizes.

    The picture's physical extent fills the canvas with its aspect ratio kept; spacing is then square.
    """
    height = piece.image.shape[0] * piece.spacing[0]
    width = piece.image.shape[1] * piece.spacing[1]
    per_pixel = max(height / rows, width / columns)
    angle = rng.normal(0, 0.12) * strength
    zoom = np.exp(rng.normal(0, 0.10, 2) * strength)
    shift = rng.normal(0, 0.04, 2) * strength
    ys, xs = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    x = (xs * np.cos(angle) - ys * np.sin(angle)) / zoom[0] + shift[0]
    y = (xs * np.sin(angle) + ys * np.cos(angle)) / zoom[1] + shift[1]
    if strength > 0:
        coarse = rng.normal(0, 1, (2, 6, 6)).astype(np.float32) * 0.018 * strength * rng.uniform(0, 1.5)
        bend = F.interpolate(torch.from_numpy(coarse)[None], (rows, columns), mode="bicubic", align_corners=True)[0]
        x, y = x + bend[0].numpy(), y + bend[1].numpy()
    # from canvas units (-1..1 over rows x columns at per_pixel) to picture units (-1..1 over its own extent)
    grid = np.stack([x * columns * per_pixel / width, y * rows * per_pixel / height], axis=-1)
    place = torch.from_numpy(grid.astype(np.float32))[None]
    colour = piece.image.ndim == 3
    planes = torch.from_numpy(np.ascontiguousarray(piece.image.astype(np.float32)))
    planes = planes.permute(2, 0, 1) if colour else planes[None]
    floor = float(piece.image.min()) if not colour else 0.0
    mode = "bicubic" if planes.shape[-1] < columns else "bilinear"
    out = F.grid_sample(planes[None] - floor, place, mode=mode, align_corners=False)[0] + floor
    labels = torch.from_numpy(piece.labels.astype(np.float32))[None, None]
    onto = (
        _smooth_labels(piece.labels, place)
        if labels.shape[-1] < columns
        else (F.grid_sample(labels, place, mode="nearest", align_corners=False)[0, 0].numpy().astype(np.uint8))
    )
    image = out.permute(1, 2, 0).clamp(0, 255).round().numpy().astype(np.uint8) if colour else out[0].numpy()
    boxes = tuple((s, _warp_box(b, piece.image.shape, grid)) for s, b in piece.boxes)
    kept = tuple((s, b) for s, b in boxes if b is not None)
    return replace(piece, image=image, labels=onto, spacing=(per_pixel, per_pixel), boxes=kept)


def _smooth_labels(labels: npt.NDArray[np.uint8], place: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the label map enlarged with smooth borders: each label's membership is interpolated, the largest wins."""
    values = np.unique(labels)
    best = torch.full(place.shape[1:3], -1.0)
    out = torch.zeros(place.shape[1:3], dtype=torch.uint8)
    for value in values:
        member = torch.from_numpy((labels == value).astype(np.float32))[None, None]
        soft = F.grid_sample(member, place, mode="bilinear", align_corners=False)[0, 0]
        better = soft > best
        best = torch.where(better, soft, best)
        out[better] = int(value)
    return out.numpy()


def _warp_box(box: Box, shape: tuple[int, ...], grid: npt.NDArray[Any]) -> Box | None:
    x = (grid[..., 0] + 1) / 2 * shape[1]
    y = (grid[..., 1] + 1) / 2 * shape[0]
    inside = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
    if inside.sum() < 16:
        return None
    ys, xs = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))


def add_surroundings(piece: LabelledSlice, rng: np.random.Generator) -> LabelledSlice:
    """Return the CT slice with arms beside the body and a table under it, each at random; the canvas grows for them."""
    image, labels, boxes = piece.image, piece.labels, piece.boxes
    rows, columns = image.shape
    body = image > -300
    if body.sum() < 100:
        return piece
    if rng.random() < 0.35:  # arms: ellipses of fat and muscle with a bone in the middle
        room = int(columns * 0.16)
        image = np.pad(image, ((0, 0), (room, room)), constant_values=float(image.min()))
        labels = np.pad(labels, ((0, 0), (room, room)))
        boxes = tuple((s, (b[0] + room, b[1], b[2] + room, b[3])) for s, b in boxes)
        xs_body = np.flatnonzero(body.any(0))
        yy, xx = np.mgrid[0:rows, 0 : columns + 2 * room]
        for side in (-1, 1):
            radius = columns * rng.uniform(0.05, 0.085)
            edge = xs_body[0] + room if side < 0 else xs_body[-1] + room
            cx = edge + side * radius * rng.uniform(0.85, 1.15)
            cy = rows * rng.uniform(0.4, 0.7)
            far = ((xx - cx) / radius) ** 2 + ((yy - cy) / (radius * rng.uniform(0.9, 1.2))) ** 2
            free = (labels == 0) & (image < -300)
            image = np.where(free & (far < 1), -90.0, image)
            image = np.where(free & (far < 0.72), 55.0, image)
            image = np.where(free & (far < 0.07), 600.0, image)
    if rng.random() < 0.4:
        ys_body = np.flatnonzero(body.any(1))
        row = min(ys_body[-1] + int(rng.uniform(1, 4)), rows - 1)
        image = image.copy()
        image[row : row + max(1, rows // 60), columns // 8 : -columns // 8] = rng.uniform(-300, 150)
    return replace(piece, image=image.astype(np.float32), labels=labels, boxes=boxes)


def roughen(image: Image, rng: np.random.Generator, strength: float) -> Image:
    """Return the grey picture blurred or sharpened a little and with noise, relative to its own spread."""
    out = image.astype(np.float32)
    if rng.random() < 0.5:
        soft = F.avg_pool2d(F.pad(torch.from_numpy(out)[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[
            0, 0
        ].numpy()
        out = out + (out - soft) * rng.uniform(-0.7, 1.6)
    return out + rng.normal(0, 1, out.shape).astype(np.float32) * strength * rng.uniform(0, 1)


def show(image: Image, window: Window, rng: np.random.Generator | None) -> npt.NDArray[np.uint8]:
    """Return uint8 RGB of the grey picture through `window`, jittered where `rng` is given."""
    centre, width = window.center, window.width
    if rng is not None:
        centre = centre + rng.normal(0, 0.06) * width
        width = width * float(np.exp(rng.normal(0, 0.18)))
    grey = np.clip((image - (centre - width / 2)) / width, 0, 1)
    if rng is not None:
        grey = grey ** float(np.exp(rng.normal(0, 0.12)))
    return np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=2)


def tint(image: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return the colour picture with random gain per channel, brightness and gamma."""
    out = image.astype(np.float32) / 255
    out = out ** float(np.exp(rng.normal(0, 0.15))) * (1 + rng.normal(0, 0.06, 3)) * (1 + rng.normal(0, 0.08))
    return np.rint(np.clip(out, 0, 1) * 255).astype(np.uint8)
