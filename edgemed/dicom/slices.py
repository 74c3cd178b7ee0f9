"""The slices of a series, one read at a time: what `edgemed.volume.SliceRun` asks about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgemed.core import Scan
from edgemed.dicom.geometry_verdict import Place
from edgemed.dicom.reader import Reader
from edgemed.dicom.series import Series
from edgemed.errors import EdgemedError
from edgemed.files import sha256_of


class DicomSlices:
    """The slices of a chosen series. shown: what a file is called in messages and results."""

    def __init__(self, series: Series, reader: Reader, window: str | None, shown: Callable[[str], str] = str) -> None:
        self.places: Sequence[Place] = series.places
        self._series, self._reader, self._window, self._shown = series, reader, window, shown
        self._digests: dict[str, str] = {}

    def read(self, index: int) -> Scan:
        """Return a slice. Raises what `Reader.read` raises, the file called as it is shown."""
        item = self._series.slices[index]
        try:
            return self._reader.read(item.path, frame=item.frame, window=self._window)
        except EdgemedError as error:
            raise type(error)(str(error).replace(item.path, self.path(index))) from None

    def path(self, index: int) -> str:
        """Return what the slice's file is called in results."""
        return self._shown(self._series.slices[index].path)

    def file(self, index: int) -> str:
        """Return where the slice's file is."""
        return self._series.slices[index].path

    def frame(self, index: int) -> int:
        """Return the slice's frame in its file."""
        return self._series.slices[index].frame

    def digest(self, index: int) -> str:
        """Return what tells the slice's content from another's."""
        item = self._series.slices[index]
        if item.path not in self._digests:
            self._digests[item.path] = sha256_of(item.path)
        return f"{self._digests[item.path]}#{item.frame}"
