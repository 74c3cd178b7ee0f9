"""Items of a DICOM sequence that are kept as their bytes: a tenth to a fiftieth of what they take as data sets."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pydicom.sequence import Sequence

from edgemed.report.dicom_object import check_text
from edgemed.report.dicom_source import quiet

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


class Encoded(Sequence):
    """A sequence whose items are read from their bytes (explicit VR, little endian, UTF-8) whenever they are asked for.

    What is changed in an item is not kept. items: taken one at a time. before: changes each before it is
    encoded.

    Raises InvalidInput if a text cannot be written without loss.
    """

    def __init__(self, items: Iterable[Dataset], before: Callable[[Dataset], None] | None = None) -> None:
        super().__init__()
        self._kept: list[bytes] = []
        for item in items:
            if before is not None:
                before(item)
            check_text(item)
            self._kept.append(_to_bytes(item))

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Dataset]:
        return map(_from_bytes, self._kept)

    def __getitem__(self, index: Any) -> Any:
        return _from_bytes(self._kept[index])


def _to_bytes(item: Dataset) -> bytes:
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    with quiet():
        write_dataset(stream, item, ["utf8"])
    return stream.getvalue()


def _from_bytes(data: bytes) -> Dataset:
    from pydicom.filereader import read_dataset

    return read_dataset(io.BytesIO(data), is_implicit_VR=False, is_little_endian=True, parent_encoding="utf8")
