"""Frames that are made as they are written: the same object as highdicom makes of the whole array of pixels."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from highdicom.seg import Segmentation, segread
from pydicom import dcmread, dcmwrite

from edgemed.report import dicom_seg
from edgemed.report.dicom_object import CREATOR, WARNING, common, refer_to, write_dicom
from edgemed.report.dicom_source import quiet, read_groups
from edgemed.report.findings import findings_of
from edgemed.report.results import Analysed, write_groups
from edgemed.volume.resample import evenly

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

ROWS, COLUMNS = 9, 7
"""63 pixels: a frame ends within a byte."""
OF_THE_RUN = ("ContentDate", "ContentTime", "InstanceCreationDate", "InstanceCreationTime", "ContributionDateTime",
              "DimensionOrganizationUID")  # fmt: skip


def some(count, rows=ROWS, columns=COLUMNS):
    """Answers about `count` slices: nothing on the second, a cyst inside of the liver on some, a spleen beside it."""

    def regions(k):
        liver = inputs.masked("liver", inputs.ellipse(rows, columns, 0.6, 0.6, 0.35, 0.35))
        cyst = inputs.masked("liver cyst", inputs.ellipse(rows, columns, 0.6, 0.6, 0.2, 0.2))
        spleen = inputs.masked("spleen", inputs.ellipse(rows, columns, 0.1, 0.1, 0.2, 0.2))
        return [] if k == 1 else [liver, *[cyst] * (k != 2), *[spleen] * (k > 1)]

    return [inputs.answer("x", regions(k)) for k in range(count)]


def without(answers, *labels):
    return [replace(a, regions=tuple(r for r in a.regions if r.label not in labels)) for a in answers]


def series(folder, answers):
    rows, columns = next(r.mask.shape for a in answers for r in a.regions)
    paths = inputs.write_series(folder, len(answers), rows=rows, columns=columns)
    (group,), _ = read_groups([Analysed(p, 0, a) for p, a in zip(paths, answers, strict=True)])
    return group


def uneven(folder, answers):
    paths = inputs.write_series(folder, len(answers), rows=ROWS, columns=COLUMNS)
    for path, depth in zip(paths, (0, 2, 4, 9, 11), strict=True):
        ds = dcmread(path)
        ds.ImagePositionPatient = [-30, 12.5, depth]
        dcmwrite(path, ds)
    (group,), _ = read_groups([Analysed(p, 0, a) for p, a in zip(paths, answers, strict=True)])
    even = evenly(group)
    assert even is not None
    return even


def real(name):
    (group, *_), _ = read_groups(inputs.analyse(inputs.real_file(inputs.REAL[name])))
    return group


GROUPS = {
    "segments that overlap": lambda folder: series(folder, some(5)),
    "segments apart": lambda folder: series(folder, without(some(5), "liver cyst")),
    "one segment": lambda folder: series(folder, without(some(5), "liver cyst", "spleen")),
    "an odd number of whole bytes": lambda folder: series(folder, without(some(4, 8, 9), "liver cyst", "spleen")),
    "one slice": lambda folder: series(folder, some(1)),
    "resampled": lambda folder: uneven(folder, some(5)),
    "frames of one file": lambda folder: real("enhanced CT"),
    "no frame of reference": lambda folder: real("CT head, no frame of reference"),
}


def whole(group, findings, options):
    """Return the SEG that highdicom makes of all pixels as one array."""
    first = group.first
    frame_of = group.is_multiframe and group.has_frame_of_reference and not group.resampled
    count = group.header.NumberOfFrames if frame_of else len(group.images)
    stack = np.zeros((count, first.rows, first.columns, len(findings)), np.uint8)
    for k, image in enumerate(group.images):
        for index, finding in enumerate(findings):
            mask = finding.mask(image)
            if mask is not None:
                stack[image.frame if frame_of else k, ..., index] = mask
    if options.labelmap:
        labels = np.zeros(stack.shape[:-1], np.uint8)
        for index in np.argsort([-stack[..., i].sum(dtype=int) for i in range(len(findings))], kind="stable"):
            labels[stack[..., index] > 0] = index + 1
        stack = labels
    with quiet():
        made = Segmentation(
            source_images=dicom_seg._thick(group, options),
            pixel_array=stack,
            segmentation_type="LABELMAP" if options.labelmap else "BINARY",
            segment_descriptions=[dicom_seg._describe(i, f, group, "en", options) for i, f in enumerate(findings, 1)],
            omit_empty_frames=not options.seg_full_frames,
            content_label="AI_RESULT",
            content_description=WARNING["en"],
            content_creator_name=CREATOR,
            **dicom_seg._planes(group),
            **common(group, "seg", "en", options, *(["resampled"] if group.resampled else [])),
        )
    made.ContentQualification = "RESEARCH"
    if not group.has_frame_of_reference:
        made.PatientOrientation = None
    refer_to(made, group, None if group.has_frame_of_reference else group.first.frame)
    return made


def bare(ds):
    """Return the data set without what differs from run to run."""
    for element in list(ds):
        if element.keyword in OF_THE_RUN:
            del ds[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                bare(item)
    return ds


@pytest.mark.parametrize("full", [False, True], ids=["shown", "full frames"])
@pytest.mark.parametrize("labelmap", [False, True], ids=["BINARY", "LABELMAP"])
@pytest.mark.parametrize("kind", GROUPS)
def test_the_file_is_the_one_that_highdicom_makes_of_all_pixels(tmp_path, kind, labelmap, full) -> None:
    group = GROUPS[kind](tmp_path)
    options = inputs.options(labelmap=labelmap, seg_full_frames=full)
    findings = tuple(f for f in findings_of(group) if f.masked_images)

    (written,) = write_groups([group], tmp_path / "out", ("seg",), language="en", options=options)
    expected = tmp_path / "expected.dcm"
    with expected.open("wb") as stream:
        write_dicom(whole(group, findings, options), stream)

    found, whole_file = dcmread(written), dcmread(expected)
    assert found.file_meta == whole_file.file_meta
    assert found.PixelData == whole_file.PixelData
    assert bare(found) == bare(whole_file)
    with quiet():
        np.testing.assert_array_equal(segread(written).pixel_array, segread(expected).pixel_array)


def test_more_than_255_segments_have_labels_of_two_bytes(tmp_path) -> None:
    regions = [inputs.masked(f"thing {k}", np.eye(20, dtype=bool)[[k // 20]].T @ np.eye(20, dtype=bool)[[k % 20]])
               for k in range(300)]  # fmt: skip
    (path,) = inputs.write_series(tmp_path, 1, rows=20, columns=20)
    (written,) = write_groups(
        read_groups([Analysed(path, 0, inputs.answer("x", regions))])[0],
        tmp_path / "out", ("seg",), language="en", options=inputs.options(labelmap=True),
    )  # fmt: skip
    labels = segread(written).pixel_array
    assert labels.ravel()[:300].tolist() == list(range(1, 301))
