"""Items kept as bytes: they come back equal, the file is the same, and text is checked."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from pydicom import dcmwrite
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from edgemed.errors import InvalidInput
from edgemed.report.encoded import Encoded


def item(text: str) -> Dataset:
    code = Dataset()
    code.CodeMeaning = text
    made = Dataset()
    made.ConceptNameCodeSequence = [code]
    made.GraphicData = [0.5, 1.5]
    made.PatientName = text
    return made


def items() -> Iterator[Dataset]:
    return (item(text) for text in ("liver", "左侧肾", ""))


def written(sequence: Sequence) -> bytes:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet, ds.SOPClassUID, ds.SOPInstanceUID = "ISO_IR 192", "1.2.3", "1.2.4"
    ds.add(DataElement("ContentSequence", "SQ", sequence))
    stream = io.BytesIO()
    dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def test_items_come_back_as_they_were_and_make_the_same_file() -> None:
    kept = Encoded(items())
    assert len(kept) == 3
    assert list(kept) == list(kept) == list(items())
    assert kept[1].ConceptNameCodeSequence[0].CodeMeaning == "左侧肾"
    assert written(kept) == written(Sequence(list(items())))


def test_items_are_changed_before_and_not_after() -> None:
    kept = Encoded(items(), lambda ds: setattr(ds, "GraphicData", [2.0, 3.0]))
    kept[0].GraphicData = [7.0, 7.0]
    assert [list(ds.GraphicData) for ds in kept] == [[2.0, 3.0]] * 3


def test_text_that_utf_8_cannot_hold_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="UTF-8 cannot hold"):
        Encoded([item("\ud800")])
