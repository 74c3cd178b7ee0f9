"""Stored values -> what a Scan holds: rescaled float32 where larger is brighter, or uint8 RGB, with its window.

Modality values: slope and intercept of the top level directly; functional groups of enhanced objects and Modality LUTs
through `highdicom.Image`, which costs 230 ms more to import than pydicom alone (measured: 0.50 s against 0.27 s), so
only the files that have them pay. pydicom's `apply_modality_lut` ignores functional groups in silence (HU off by the
intercept). Real World Value Maps are not applied: the VOI window of a file is defined on the modality values (PS3.3
C.11.2).

Colour becomes sRGB: an ICC profile is applied, or ignored if it is damaged.

MONOCHROME1, or Presentation LUT Shape INVERSE: values are mirrored about the middle of the representable range, so that
the twin with inverted stored values gives equal pixels; the window is mirrored along.

Supplemental palettes (Pixel Presentation COLOR or MIXED): the result is RGB; grey through the window below the first
mapped stored value, colour from there on (PS3.3 C.7.6.16.2.1, C.8.16.2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Window
from edgemed.dicom import voi
from edgemed.dicom.header import Header
from edgemed.errors import InvalidInput, UnsupportedDicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Array = npt.NDArray[Any]
_STRIP = 256  # rows converted at a time, so that the float64 intermediate stays small


@dataclass(frozen=True, eq=False)
class Shown:
    """Pixels float32 [rows, columns] with a window, or uint8 [rows, columns, 3] with None."""

    pixels: Array
    window: Window | None


def to_shown(stored: Array, photometric: str, header: Header, frame: int, user_window: Window | None) -> Shown:
    """Return frame `frame`, stored as `stored`, as a Scan shows it.

    Raises UnsupportedDicom for a colour space that is not supported, InvalidInput for tables that do not fit.
    """
    shown = _shown(stored, photometric, header, frame, user_window)
    return shown if shown.window else Shown(_to_srgb(shown.pixels, header.ds), None)


def _shown(stored: Array, photometric: str, header: Header, frame: int, user_window: Window | None) -> Shown:
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        return _grey(stored, photometric, header, frame, user_window)
    if photometric == "PALETTE COLOR":
        return Shown(_palette(stored, header), None)
    if stored.ndim == 3 and photometric in ("RGB", "YBR_ICT", "YBR_RCT"):
        return Shown(_to_bytes(stored, header), None)
    if stored.ndim == 3 and photometric in ("YBR_FULL", "YBR_FULL_422"):
        from pydicom.pixels.processing import convert_color_space

        return Shown(convert_color_space(_to_bytes(stored, header), "YBR_FULL", "RGB"), None)
    if stored.ndim == 3 and photometric.startswith("YBR_PARTIAL"):
        return Shown(_from_partial(_to_bytes(stored, header)), None)
    raise UnsupportedDicom(f"photometric interpretation {photometric!r} is not supported")


def pixel_spacing(header: Header, frame: int) -> tuple[float, float] | None:
    """Return (row, column) spacing in mm from Pixel Spacing or the functional groups, None where the file has none.

    Imager Pixel Spacing is measured at the detector, not in the patient, and is never used.
    """
    for ds in groups(header.ds, frame, "PixelMeasuresSequence"):
        value = ds.get("PixelSpacing")
        try:
            row, column = (float(v) for v in value)
        except (TypeError, ValueError):
            continue
        if 0 < row < 1e4 and 0 < column < 1e4:
            return (row, column)
    return None


def groups(ds: Dataset, frame: int, macro: str) -> list[Dataset]:
    """Return the datasets that may describe `frame`: its own group, the shared group, the top level, in this order."""
    found: list[Dataset] = []
    for keyword, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = ds.get(keyword)
        if items and index < len(items):
            inner = items[index].get(macro)
            if inner:
                found.append(inner[0])
    return [*found, ds]


def _grey(stored: Array, photometric: str, header: Header, frame: int, user_window: Window | None) -> Shown:
    if stored.ndim != 2:
        raise InvalidInput(f"a {photometric} image has {stored.shape[-1]} samples per pixel, 1 was expected")
    ds = header.ds
    high_bit = ds.get("HighBit")
    if header.native and isinstance(high_bit, int) and ds.BitsStored <= high_bit < header.bits:
        # Values in the upper bits (ACR-NEMA style): bring them down; pydicom assumes HighBit = BitsStored - 1.
        whole = np.dtype(f"{stored.dtype.kind}{stored.dtype.itemsize}")
        stored = _upper_bits(header, frame, whole, high_bit + 1 - ds.BitsStored)
    low, high = _range(ds, stored)
    rescale = _rescale(ds, frame, low, high)
    pixels = rescale.apply(stored)
    window = user_window or voi.header_window(groups(ds, frame, "FrameVOILUTSequence")) or _full_range(header, rescale)
    first_mapped = _supplemental(ds)
    if first_mapped is None:
        if window is None:
            window = voi.default_window(pixels, _modality(ds), _padding(ds, stored))
        if photometric == "MONOCHROME1" or str(ds.get("PresentationLUTShape") or "").strip() == "INVERSE":
            # A window the user typed is in the file's own values, so it is mirrored too.
            pixels, window = _mirrored(pixels, window, float(rescale(low) + rescale(high)))
        return Shown(pixels, window)
    coloured = stored >= first_mapped
    if window is None:
        window = voi.default_window(pixels, _modality(ds), coloured)
    grey = np.rint(np.clip((pixels - window.low) * (255 / (window.high - window.low)), 0, 255)).astype(np.uint8)
    image = np.repeat(grey[..., None], 3, axis=2)
    image[coloured] = _palette(stored, header)[coloured]
    return Shown(image, None)


def _mirrored(pixels: Array, window: Window, about: float) -> tuple[Array, Window]:
    """Return pixels and window mirrored: x -> about - x."""
    center = about - window.center
    if not window.exact:
        # LINEAR covers [c - w/2, c + w/2 - 1]: its mirror image is centered one value higher.
        center += 1
    np.subtract(np.float32(about), pixels, out=pixels)
    return pixels, replace(window, center=center)


def _modality(ds: Dataset) -> str:
    return str(ds.get("Modality") or "").strip().upper()


def _range(ds: Dataset, stored: Array) -> tuple[float, float]:
    """Return the smallest and largest representable stored value; (0, 0) for floating point."""
    if stored.dtype.kind == "f":
        return 0.0, 0.0
    bits = int(ds.BitsStored)
    if ds.PixelRepresentation == 1 and bits > 1:
        return float(-(2 ** (bits - 1))), float(2 ** (bits - 1) - 1)
    return 0.0, float(2**bits - 1)


@dataclass(frozen=True, eq=False)
class _Rescale:
    """value = stored * slope + intercept, or table[stored - first] where the file has a Modality LUT."""

    slope: float = 1.0
    intercept: float = 0.0
    table: npt.NDArray[np.float64] | None = None
    first: int = 0

    def __call__(self, stored: Any) -> Any:
        if self.table is None:
            return stored * self.slope + self.intercept
        index = np.clip(np.asarray(stored, np.int64) - self.first, 0, self.table.size - 1)
        return self.table[index]

    def apply(self, stored: Array) -> npt.NDArray[np.float32]:
        """Return float32 of the same shape; what is not finite becomes the smallest finite value."""
        out = np.empty(stored.shape, np.float32)
        exact = stored if stored.dtype.kind == "f" else None
        for at in range(0, stored.shape[0], _STRIP):
            part = stored[at : at + _STRIP]
            with np.errstate(over="ignore", invalid="ignore"):
                out[at : at + _STRIP] = self(part if self.table is not None else part.astype(np.float64))
        if exact is not None or not np.isfinite(self.slope * self.intercept):
            finite = np.isfinite(out)
            if not finite.all():
                out[~finite] = out[finite].min() if finite.any() else 0.0
        return out

    @property
    def is_identity(self) -> bool:
        return self.table is None and self.slope == 1 and self.intercept == 0


def _rescale(ds: Dataset, frame: int, low: float, high: float) -> _Rescale:
    """Return the modality transform of `frame` for stored values `low`..`high`."""
    if ds.get("ModalityLUTSequence"):
        if high - low >= 1 << 16:
            raise InvalidInput("a Modality LUT needs stored values of at most 16 bits")
        # One row with every representable value through highdicom gives the table, whatever the frame's size.
        ramp = np.arange(int(low), int(high) + 1)
        return _Rescale(table=_through_highdicom(ds, frame, ramp), first=int(low))
    if len(groups(ds, frame, "PixelValueTransformationSequence")) > 1:
        zero, one = _through_highdicom(ds, frame, np.arange(2))
        return _Rescale(float(one - zero), float(zero))
    if _modality(ds) == "RTDOSE":
        return _Rescale(_number(ds, "DoseGridScaling") or 1.0)
    # Empty values are seen in real files and mean 1 and 0; a slope of 0 would erase the image.
    return _Rescale(_number(ds, "RescaleSlope") or 1.0, _number(ds, "RescaleIntercept") or 0.0)


def _number(ds: Dataset, keyword: str) -> float | None:
    try:
        value = float(ds.get(keyword))
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _through_highdicom(ds: Dataset, frame: int, probe: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the modality values of the stored values `probe`, by highdicom, for frame `frame`.

    A one-frame image [1, len(probe)] with this frame's functional groups stands in for the file: highdicom then reads
    only what the transform needs, and the frame itself never passes through it.
    """
    from highdicom import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    signed = ds.PixelRepresentation == 1
    stand_in = Dataset()
    for keyword in ("SOPClassUID", "ModalityLUTSequence", "SharedFunctionalGroupsSequence"):
        if keyword in ds:
            stand_in[keyword] = ds[keyword]
    per_frame = ds.get("PerFrameFunctionalGroupsSequence")
    if per_frame:
        stand_in.PerFrameFunctionalGroupsSequence = [per_frame[min(frame, len(per_frame) - 1)]]
    stand_in.SOPInstanceUID = generate_uid(entropy_srcs=["edgemed"])
    stand_in.SeriesInstanceUID = stand_in.StudyInstanceUID = stand_in.SOPInstanceUID
    stand_in.Rows, stand_in.Columns, stand_in.NumberOfFrames = 1, probe.size, 1
    stand_in.SamplesPerPixel, stand_in.PhotometricInterpretation = 1, "MONOCHROME2"
    stand_in.BitsAllocated = 16 if int(ds.BitsStored) <= 16 else 32
    stand_in.BitsStored = max(int(ds.BitsStored), 2)
    stand_in.HighBit = stand_in.BitsStored - 1
    stand_in.PixelRepresentation = int(signed)
    stand_in.PixelData = probe.astype(f"<{'i' if signed else 'u'}{stand_in.BitsAllocated // 8}").tobytes()
    stand_in.file_meta = FileMetaDataset()
    stand_in.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    try:
        image = Image.from_dataset(stand_in, copy=False)
        values = image.get_frame(
            1,
            dtype=np.float64,
            apply_real_world_transform=False,
            apply_voi_transform=False,
            apply_presentation_lut=False,
            apply_icc_profile=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  highdicom's texts may quote values of the file
        raise InvalidInput(f"the modality transform cannot be read ({type(error).__name__})") from None
    return np.asarray(values, np.float64).reshape(-1)


def _full_range(header: Header, rescale: _Rescale) -> Window | None:
    """Return the window of images that are ready for display: 1-bit masks, and 8-bit pictures, not measurements."""
    bits = int(header.ds.BitsStored)
    measured = _modality(header.ds) in ("CT", "MR", "NM", "PT")
    if header.keyword != "PixelData" or not rescale.is_identity or header.ds.PixelRepresentation == 1:
        return None
    if bits == 1 or (bits <= 8 and not measured):
        top = float(2**bits - 1)
        return Window(top / 2, top)
    return None


def _padding(ds: Dataset, stored: Array) -> npt.NDArray[np.bool_] | None:
    """Return where stored values are padding, None if the file declares none. Source: PS3.3 C.7.5.1.1.2."""
    value = _number(ds, "PixelPaddingValue")
    if value is None:
        value = _number(ds, "FloatPixelPaddingValue")
    if value is None:
        return None
    limit = _number(ds, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    mask: npt.NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return mask


def _upper_bits(header: Header, frame: int, dtype: np.dtype[Any], shift: int) -> Array:
    """Return native stored values whose bits lie `shift` above the lowest."""
    if header.transfer_syntax == "1.2.840.10008.1.2.2":
        dtype = dtype.newbyteorder(">")
    count = header.rows * header.columns
    header.file.seek(header.offset + frame * count * dtype.itemsize)
    words = np.frombuffer(header.file.read(count * dtype.itemsize), dtype).reshape(header.rows, header.columns)
    top = header.bits - int(header.ds.HighBit) - 1
    native = words.astype(words.dtype.newbyteorder("="))
    return (native << top) >> (top + shift)


def _to_bytes(stored: Array, header: Header) -> npt.NDArray[np.uint8]:
    """Return uint8 of the same shape: the upper 8 of the stored bits."""
    shift = max(int(header.ds.BitsStored) - 8, 0)
    if stored.dtype == np.uint8:
        return np.ascontiguousarray(stored)
    if stored.dtype.kind == "f":
        raise UnsupportedDicom("floating point colour pixels are not supported")
    out: npt.NDArray[np.uint8] = np.clip(stored >> shift, 0, 255).astype(np.uint8)
    return out


def _from_partial(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return RGB of YBR_PARTIAL (luma 16..235, chroma 16..240). Source: ITU-R BT.601; PS3.3 C.7.6.3.1.2."""
    y, b, r = np.moveaxis(image.astype(np.float32), -1, 0)
    y, b, r = 1.1644 * (y - 16), b - 128, r - 128
    rgb = np.stack((y + 1.5960 * r, y - 0.3917 * b - 0.8130 * r, y + 2.0173 * b), axis=-1)
    out: npt.NDArray[np.uint8] = np.rint(np.clip(rgb, 0, 255)).astype(np.uint8)
    return out


def _to_srgb(image: npt.NDArray[np.uint8], ds: Dataset) -> npt.NDArray[np.uint8]:
    """Return RGB as sRGB where the file has an ICC profile (of a slide: its first optical path's) that can be read.

    One that calls itself sRGB changes nothing. Little CMS would: through "sRGB v4 ICC preference", which highdicom
    writes, random colours came back 12 levels off on average, 104 at most.

    Source: PS3.3 C.11.15, C.8.12.5.
    """
    paths = ds.get("OpticalPathSequence")
    profile = ds.get("ICCProfile") or (paths[0].get("ICCProfile") if paths else None)
    if not isinstance(profile, bytes):
        return image
    import io

    from highdicom.color import ColorManager
    from PIL import ImageCms

    try:
        name: str = ImageCms.getProfileDescription(io.BytesIO(profile))
        return image if "srgb" in name.lower() else np.asarray(ColorManager(profile).transform_frame(image), np.uint8)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  a profile that Pillow refuses, by any of four classes, says nothing of the pixels
        return image


def _supplemental(ds: Dataset) -> int | None:
    """Return the first stored value that a supplemental palette colours, None if the image is grey."""
    descriptor = ds.get("RedPaletteColorLookupTableDescriptor")
    shown = str(ds.get("PixelPresentation") or "").strip()
    return int(descriptor[1]) if descriptor and len(descriptor) == 3 and shown in ("COLOR", "MIXED") else None


def _palette(stored: Array, header: Header) -> npt.NDArray[np.uint8]:
    """Return uint8 RGB of palette indices; those outside the table take its nearest end (PS3.3 C.7.6.3.1.5)."""
    from pydicom.dataset import Dataset
    from pydicom.pixels.processing import apply_color_lut

    ds = header.ds
    descriptor = ds.get("RedPaletteColorLookupTableDescriptor")
    if stored.ndim != 2 or not descriptor or len(descriptor) != 3:
        raise InvalidInput("the palette of a PALETTE COLOR image is missing or incomplete")
    entries, first = int(descriptor[0]) or 1 << 16, int(descriptor[1])
    inside = np.clip(stored.astype(np.int64), first, first + entries - 1)
    try:
        # pydicom refuses a dataset with a supplemental palette: hand it the tables alone.
        tables = Dataset({e.tag: e for e in ds.group_dataset(0x0028) if 0x1100 <= e.tag.elem <= 0x1223})
        tables.set_original_encoding(*ds.original_encoding)
        image = apply_color_lut(inside.astype(np.int32), tables)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  pydicom raises any of five classes here; texts may quote values
        raise InvalidInput(f"the colour palette does not fit its descriptor ({type(error).__name__})") from None
    image = image[..., :3]
    if image.dtype == np.uint8:
        return image
    # A 16-bit table that only uses its lower 8 bits is a known writer fault; shifting it would give black.
    top = int(image.max(initial=0))
    return (image >> (8 if top > 255 else 0)).astype(np.uint8)
