"""The tiny references of the published families: what the published code answers at a tiny size with random weights.

`tests/reference/<family>-tiny` is a compact copy of a full folder that lies outside the repository
(tests/reference/README.md says what is left out). The fixture `reference` gives one of them unpacked:

    tiny = reference("medrega-tiny")
    image = tiny.input("image_square")
    np.testing.assert_allclose(tiny.rows("vit_out_square", ours), tiny.expected("vit_out_square"), atol=1e-4)

`python tests/reference_data.py` makes the compact copies anew from the full folders.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
COMPACT = HERE / "reference"
FULL = HERE.parent.parent / "shared" / "reference"
FAMILIES = ("medrega-tiny", "medplib-tiny")

DROPPED_BITS = {"medrega-tiny": 3, "medplib-tiny": 6}
"""How many of a weight's 23 mantissa bits the compact copy rounds away: a relative error of at most 2 ** (bits - 24).

With 6, the logits of MedRegA (up to 11.6) moved by 2.9e-4, which is more than the 1e-4 they are tested with.
"""

WHOLE = ("low_res_mask_ground_square_demo",)
"""Expected arrays that are inputs of other expected arrays, so that all rows are kept."""

KEPT_BYTES = 4000
"""An expected array that deflates to n bytes, more than this, keeps every k-th row, k the smallest prime >= n / this.

Arrays of pixels keep a quarter of that: they are made again from the images when a copy is unpacked (`pixels`)."""


class Reference:
    """One reference folder: checkpoint files as paths, inputs and expected values as arrays."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file or sub-folder; skips the test if neither this copy nor a full folder has it."""
        for folder in (self.folder, full_folder(self.family)):
            if folder is not None and (folder / name).exists():
                return folder / name
        pytest.skip(f"{self.family}/{name} is left out of tests/reference and there is no full folder {FULL}")

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """What prompts.json holds: texts, answers, ids, sizes and versions."""
        prompts: dict[str, Any] = json.loads((self.folder / "prompts.json").read_text(encoding="utf-8"))
        return prompts

    @cached_property
    def steps(self) -> dict[str, int]:
        """Expected array -> k, for those of which only every k-th row is here."""
        file = self.folder / "rows.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the expected arrays."""
        with np.load(self.folder / "expected.npz") as arrays:
            return tuple(arrays)

    def input(self, name: str) -> np.ndarray[Any, Any]:
        """Return an array of inputs.npz, always whole."""
        with np.load(self.folder / "inputs.npz") as arrays:
            return np.asarray(arrays[name])

    def expected(self, name: str) -> np.ndarray[Any, Any]:
        """Return an array of expected.npz: in its own shape, or [rows kept, last axis] if it is in `steps`."""
        with np.load(self.folder / "expected.npz") as arrays:
            return np.asarray(arrays[name])

    def rows(self, name: str, computed: Any) -> np.ndarray[Any, Any]:
        """Return those rows of a computed array (all axes but the last counted through) that `expected(name)` holds."""
        array = np.asarray(computed)
        return _every(array, self.steps[name]) if name in self.steps else array


class References:
    """What the fixture `reference` is: call it with a family's folder name, or with a file of it for the path alone."""

    def __init__(self, scratch: Path, *, whole: bool) -> None:
        self._scratch = scratch
        self._whole = whole
        self._open: dict[str, Reference] = {}

    def __call__(self, family: str) -> Reference:
        """Return the compact copy unpacked or, with `whole`, the full folder; skips the test where that is not."""
        if family not in self._open:
            if not self._whole:
                self._open[family] = Reference(family, unpack(COMPACT / family, self._scratch / family))
            elif (folder := full_folder(family)) is not None:
                self._open[family] = Reference(family, folder)
            else:
                pytest.skip(f"no full reference {family} in {FULL}; the compact copy is tested")
        return self._open[family]


def full_folder(family: str) -> Path | None:
    """Return the full folder of a family, or None where it is not."""
    return FULL / family if (FULL / family / "expected.npz").is_file() else None


def unpack(source: Path, target: Path) -> Path:
    """Return `target` after laying a compact copy out as the full folder is: model.safetensors, inputs.npz, ..."""
    from PIL import Image

    shutil.copytree(source, target, dirs_exist_ok=True)  # what a failed attempt left is laid out again
    (target / "weights.npz").unlink()
    with np.load(source / "weights.npz") as packed:
        header = packed["header"].tobytes()
        weights = _join(packed["top"], packed["middle"], packed["low"], packed["dropped"].item())
    (target / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights.tobytes())
    with np.load(source / "inputs.npz") as stored:
        arrays = dict(stored)
    for file in sorted(source.glob("image_*.png")):
        with Image.open(file) as image:
            arrays[file.stem] = np.asarray(image.convert("RGB"))
    np.savez(target / "inputs.npz", allow_pickle=False, **arrays)
    steps = json.loads((source / "rows.json").read_text())
    with np.load(source / "expected.npz") as stored:
        expected = dict(stored)
    for name, whole in pixels(source).items():
        assert np.array_equal(_every(whole, steps.pop(name)), expected[name]), (
            f"{name} is made otherwise than published"
        )
        expected[name] = whole
    np.savez(target / "expected.npz", allow_pickle=False, **expected)
    (target / "rows.json").write_text(json.dumps(steps))
    return target


def pixels(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the expected `pixel_*` arrays [images, 3, rows, columns], made from the images of a reference folder.

    Bit for bit what the published preprocessing gave: `pack` compares all rows, `unpack` those that were kept.
    """
    from PIL import Image

    def scaled(image: Image.Image, side: int) -> np.ndarray[Any, Any]:
        size = (round(image.width * side / max(image.size)), round(image.height * side / max(image.size)))
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR))

    def centred(array: np.ndarray[Any, Any], side: int, fill: Any) -> np.ndarray[Any, Any]:
        top, left = (side - array.shape[0]) // 2, (side - array.shape[1]) // 2
        canvas = np.broadcast_to(np.asarray(fill, array.dtype), (side, side, 3)).copy()
        canvas[top : top + array.shape[0], left : left + array.shape[1]] = array
        return canvas

    def normal(array: Any, mean: Any, deviation: Any, unit: float = 255) -> np.ndarray[Any, np.dtype[np.float32]]:
        share = np.asarray(array, np.float32) / np.float32(unit)
        return np.asarray((share - np.array(mean, np.float32)) / np.array(deviation, np.float32), np.float32)

    def batch(*images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))

    scans = {file.stem.removeprefix("image_"): Image.open(file).convert("RGB") for file in folder.glob("image_*.png")}
    made = {}
    if (folder / "clip-tiny-patch14-336").exists():
        mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        for name, scan in scans.items():
            square = centred(scaled(scan, 336), 336, (122, 116, 104)) * (1 / 255)
            made[f"pixel_clip_{name}"] = batch(normal(square, mean, deviation, 1))
            sam = normal(scaled(scan, 256), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 1)
            made[f"pixel_sam_{name}"] = batch(centred(sam, 256, 0))
        return made
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    squares = {f"pixel_{name}": [scan.resize((112, 112))] for name, scan in scans.items()}
    squares["pixel_interp_square"] = [scans["square"].resize((168, 168))]
    padded = centred(np.asarray(scans["four_three"]), 240, [int(255 * share) for share in mean])
    squares["pixel_pad2square_four_three"] = [Image.fromarray(padded).resize((112, 112))]
    halves = scans["two_one"].resize((224, 112))
    boxes = ((0, 0, 112, 112), (112, 0, 224, 112))
    squares["pixel_tiles_two_one"] = [*map(halves.crop, boxes), scans["two_one"].resize((112, 112))]
    return {name: batch(*(normal(part, mean, deviation) for part in parts)) for name, parts in squares.items()}


def pack(source: Path, target: Path) -> None:
    """Write the compact copy of a full folder to `target`, which must not exist."""
    target.mkdir(parents=True)
    left = {"model.safetensors", "inputs.npz", "expected.npz", "README.md"}
    for file in source.rglob("*"):
        inner = file.relative_to(source)
        if file.is_file() and inner.name not in left and inner.parts[0] not in ("bin", "sharded"):
            (target / inner).parent.mkdir(exist_ok=True)
            (target / inner).write_bytes(file.read_bytes())
    data = (source / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start]
    assert all(entry["dtype"] == "F32" for name, entry in json.loads(header).items() if name != "__metadata__")
    dropped = DROPPED_BITS[source.name]
    top, middle, low = _split(np.frombuffer(data, np.uint32, offset=start), dropped)
    planes = {"dropped": np.array(dropped), "top": top, "middle": middle, "low": low}
    _save(target / "weights.npz", {"header": np.frombuffer(header, np.uint8), **planes})
    with np.load(source / "inputs.npz") as stored:
        _save(target / "inputs.npz", {name: stored[name] for name in stored if not name.startswith("image_")})
    kept: dict[str, np.ndarray[Any, Any]] = {}
    steps: dict[str, int] = {}
    made = pixels(source)
    with np.load(source / "expected.npz") as stored:
        assert set(made) == {name for name in stored if name.startswith("pixel_") and "shuffle" not in name}
        for name in stored:
            kept[name] = array = stored[name]
            assert name not in made or np.array_equal(made[name], array), f"{name} is made otherwise than published"
            size, limit = len(zlib.compress(array.tobytes(), 9)), KEPT_BYTES // 4 if name in made else KEPT_BYTES
            if size > limit and name not in WHOLE:
                steps[name] = next(k for k in _primes() if k * limit >= size)
                kept[name] = _every(array, steps[name])
    _save(target / "expected.npz", kept)
    (target / "rows.json").write_text(json.dumps(steps, indent=1))


def _every(array: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    return array.reshape(-1, array.shape[-1])[::step]


def _primes() -> Iterable[int]:
    number = 2
    while True:
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            yield number
        number += 1


def _low_columns(dropped: int) -> list[int]:
    """Return which bits of the lowest byte are kept, the highest being 0: mantissa bits, then the sign."""
    return [*range(7 - dropped), 7]


def _split(bits: np.ndarray[Any, np.dtype[np.uint32]], dropped: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Return float32 bit patterns as three planes: exponents, 16 bits of mantissa, and what is kept of the last byte.

    The sign is turned to the low end, so that the first plane holds exponents alone, which compress to a third.
    """
    rounded = (bits + np.uint32(1 << dropped >> 1)) >> np.uint32(dropped) << np.uint32(dropped)
    turned = rounded << np.uint32(1) | rounded >> np.uint32(31)  # exponent 8, mantissa 23, sign 1
    low = np.unpackbits(turned.astype(np.uint8)[:, None], axis=1)[:, _low_columns(dropped)]
    return (turned >> np.uint32(24)).astype(np.uint8), (turned >> np.uint32(8)).astype(np.uint16), np.packbits(low)


def _join(
    top: np.ndarray[Any, Any], middle: np.ndarray[Any, Any], low: np.ndarray[Any, Any], dropped: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    columns = _low_columns(dropped)
    bits = np.zeros((top.size, 8), np.uint8)
    bits[:, columns] = np.unpackbits(low, count=top.size * len(columns)).reshape(-1, len(columns))
    last = np.packbits(bits, axis=1)[:, 0].astype(np.uint32)
    turned = top.astype(np.uint32) << np.uint32(24) | middle.astype(np.uint32) << np.uint32(8) | last
    whole: np.ndarray[Any, Any] = turned >> np.uint32(1) | turned << np.uint32(31)
    return whole.view(np.float32)


def _save(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write an .npz whose members are packed with LZMA; numpy.load reads it as any other. Dates are fixed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FAMILIES:
        made_anew = COMPACT / f"{chosen}.part"
        shutil.rmtree(made_anew, ignore_errors=True)
        pack(FULL / chosen, made_anew)
        shutil.rmtree(COMPACT / chosen, ignore_errors=True)
        made_anew.rename(COMPACT / chosen)
        print(chosen, sum(file.stat().st_size for file in (COMPACT / chosen).rglob("*") if file.is_file()))
