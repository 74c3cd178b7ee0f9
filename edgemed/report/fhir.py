"""Findings as a FHIR bundle, R4B or R5: DiagnosticReport, an Observation for each finding, the Device, and in R5 an
ImagingSelection with the boxes and the segment for each finding.

Everything is preliminary. Each resource is validated by fhir.resources before it is returned; ids are the same in every
run. References to the patient, study and images are by their DICOM identifiers.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from edgemed.core import Language
from edgemed.errors import InvalidInput
from edgemed.report.dicom_object import MAKER, Made, ResultOptions, device_uid, library, tracking_uid, warning_of
from edgemed.report.dicom_source import Group, Image
from edgemed.report.dicom_sr import CERTAINTY, LANGUAGES, MEASURES, outline, texts_of
from edgemed.report.findings import Finding, certainty_of, sizes_of
from edgemed.terminology import Code

Release = Literal["R4B", "R5"]
SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "UCUM": "http://unitsofmeasure.org",
    "LN": "http://loinc.org",
}
SOP_CLASSES = "urn:ietf:rfc:3986"
IMAGING_REPORT = Code("18748-4", "Diagnostic imaging study", "LN")


def to_fhir(
    group: Group,
    findings: Sequence[Finding],
    segs: Sequence[Made],
    release: str,
    language: Language,
    options: ResultOptions,
) -> dict[str, Any]:
    """Return the bundle as plain JSON values.

    release: "R4B" or "R5". segs: the segmentations whose segments R5 refers to; may be empty.
    Raises InvalidInput for another release, BackendUnavailable without fhir.resources.
    """
    homes = {"R4B": "fhir.resources.R4B.bundle", "R5": "fhir.resources.bundle"}
    if release not in homes:
        raise InvalidInput(f"FHIR release is {release!r}, R4B or R5 was expected")
    resources = [*_resources(group, findings, segs, release, language, options)]
    bundle = {
        "resourceType": "Bundle",
        "type": "collection",
        "entry": [{"fullUrl": f"urn:uuid:{r['id']}", "resource": r} for r in resources],
    }
    library(homes[release]).Bundle.model_validate(bundle)
    return bundle


def _resources(
    group: Group,
    findings: Sequence[Finding],
    segs: Sequence[Made],
    release: str,
    language: Language,
    options: ResultOptions,
) -> Iterator[dict[str, Any]]:
    p, header = group.provenance, group.header
    name = f"{MAKER} {p.bundle}"
    versions = [{"value": v} for v in (p.edgemed, p.bundle_sha256) if v]
    names = {"name": [{"value": name, "type": "registered-name"}]}
    device = {
        "resourceType": "Device",
        "id": _id(device_uid(group)),
        "manufacturer": MAKER,
        "version": versions,
        **(names if release == "R5" else {"deviceName": [{"name": name, "type": "manufacturer-name"}]}),
    }
    yield device
    study = {"identifier": _identifier(header.StudyInstanceUID), "type": "ImagingStudy"}
    about: dict[str, Any] = {"subject": {"type": "Patient", "identifier": {"value": str(header.PatientID)}}}
    if not header.PatientID:
        about = {}
    results = []
    for finding in findings:
        derived: list[dict[str, Any]] = [study]
        if release == "R5":
            selection = {**_selection(finding, group, segs, language, options), **about}
            yield selection
            derived.append(_reference(selection))
        observation = {
            "resourceType": "Observation",
            "id": _id(tracking_uid(group, finding.concept.key, options), "observation"),
            "identifier": [_identifier(tracking_uid(group, finding.concept.key, options))],
            "status": "preliminary",
            "code": _concept(finding.concept.type, finding.concept.name(language)),
            **about,
            **_site(finding),
            "device": _reference(device),
            "derivedFrom": derived,
            "note": [{"text": warning_of(options, language)}],
        }
        sizes = sizes_of(finding, group)
        components = [
            {"code": _concept(what), "valueQuantity": _quantity(value, unit)}
            for keyword, (what, unit) in MEASURES.items()
            if (value := getattr(sizes, keyword)) is not None
        ]
        if (certainty := certainty_of(finding)) is not None:
            what, unit = CERTAINTY
            components.append({"code": _concept(what), "valueQuantity": _quantity(certainty, unit)})
        yield {**observation, "component": components} if components else observation
        results.append(_reference(observation))
    report = {
        "resourceType": "DiagnosticReport",
        "id": _id(group.uid("fhir", options.task)),
        "language": LANGUAGES[language].value,
        "status": "preliminary",
        "code": _concept(IMAGING_REPORT),
        **about,
        "study" if release == "R5" else "imagingStudy": [study],
        "conclusion": "\n".join((warning_of(options, language), *texts_of(group, language))),
    }
    yield {**report, "result": results} if results else report


def _selection(
    finding: Finding, group: Group, segs: Sequence[Made], language: Language, options: ResultOptions
) -> dict[str, Any]:
    """Return the ImagingSelection of a finding: its boxes on the images, and its segment in each SEG that has it."""
    header = group.header
    instances = [_instance(image, finding) for image in finding.images]
    instances += [
        {
            "uid": seg.ds.SOPInstanceUID,
            "sopClass": _sop_class(seg.ds.SOPClassUID),
            "subset": [str(1 + seg.segments.index(finding))],
        }
        for seg in segs
        if finding in seg.segments
    ]
    uid = tracking_uid(group, finding.concept.key, options)
    return {
        "resourceType": "ImagingSelection",
        "id": _id(uid, "selection"),
        "identifier": [_identifier(uid)],
        "status": "available",
        "code": _concept(finding.concept.type, finding.concept.name(language)),
        "studyUid": header.StudyInstanceUID,
        "seriesUid": header.SeriesInstanceUID,
        **({"frameOfReferenceUid": header.FrameOfReferenceUID} if group.has_frame_of_reference else {}),
        **_site(finding, selection=True),
        "instance": instances,
    }


def _instance(image: Image, finding: Finding) -> dict[str, Any]:
    found: dict[str, Any] = {
        "uid": image.dicom.SOPInstanceUID,
        "sopClass": _sop_class(image.dicom.SOPClassUID),
        "imageRegion2D": [
            {"regionType": "polyline", "coordinate": [float(v) for point in outline(box) for v in point]}
            for box in (region.box for region in finding.on(image))
        ],
    }
    return {**found, "subset": [str(image.frame + 1)]} if "NumberOfFrames" in image.dicom else found


def _site(finding: Finding, *, selection: bool = False) -> dict[str, Any]:
    """Return bodySite with the side as a second coding; R5 selections want a CodeableReference."""
    concept = finding.concept
    place = concept.site or (concept.type if concept.is_anatomy and concept.is_coded else None)
    codes = [code for code in (place, concept.side) if code is not None]
    if not codes:
        return {}
    site = {"coding": [_coding(code) for code in codes], "text": " ".join(code.meaning for code in reversed(codes))}
    return {"bodySite": {"concept": site} if selection else site}


def _id(*what: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "\0".join(what)))


def _identifier(uid: str) -> dict[str, str]:
    return {"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"}


def _reference(resource: dict[str, Any]) -> dict[str, str]:
    return {"reference": f"urn:uuid:{resource['id']}"}


def _sop_class(uid: str) -> dict[str, str]:
    return {"system": SOP_CLASSES, "code": f"urn:oid:{uid}"}


def _coding(code: Code) -> dict[str, str]:
    return {"system": SYSTEMS[code.scheme], "code": code.value, "display": code.meaning}


def _concept(code: Code, text: str | None = None) -> dict[str, Any]:
    return {"coding": [_coding(code)], "text": text or code.meaning}


def _quantity(value: float, unit: Code) -> dict[str, Any]:
    return {"value": round(value, 2), "unit": unit.value, "system": SYSTEMS["UCUM"], "code": unit.value}
