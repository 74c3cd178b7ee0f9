"""The PDF report as a DICOM object of the study: Encapsulated PDF, unverified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgemed.core import Language
from edgemed.report.dicom_object import ResultOptions, coded, common, plain_sources, refer_to
from edgemed.report.dicom_source import Group, quiet
from edgemed.report.findings import Finding
from edgemed.report.pdf import TITLE, to_pdf
from edgemed.terminology import Code

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
REPORT = Code("18748-4", "Diagnostic Imaging Report", "LN")


def to_encapsulated_pdf(
    group: Group, findings: Sequence[Finding], language: Language, options: ResultOptions
) -> Dataset:
    """Return the object that holds the PDF of `to_pdf`."""
    from highdicom import SOPClass
    from pydicom.dataset import Dataset
    from pydicom.uid import ExplicitVRLittleEndian

    sources = plain_sources(group)
    first = sources[0]
    pdf = to_pdf(group, findings, language, options)
    with quiet():
        made: Dataset = SOPClass(
            study_instance_uid=first.StudyInstanceUID,
            sop_class_uid=ENCAPSULATED_PDF,
            modality="DOC",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **common(group, "pdf", language, options),
        )
        made.copy_patient_and_study_information(first)
    made.Laterality = None
    made.ConversionType = "WSD"
    made.AcquisitionDateTime = None
    made.BurnedInAnnotation = "NO"
    made.RecognizableVisualFeatures = "NO"
    made.DocumentTitle = TITLE[language]
    made.ConceptNameCodeSequence = [coded(REPORT)]
    made.VerificationFlag = "UNVERIFIED"
    made.ContentQualification = "RESEARCH"
    made.MIMETypeOfEncapsulatedDocument = "application/pdf"
    made.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    made.EncapsulatedDocumentLength = len(pdf)
    items = []
    for header in sources:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        items.append(item)
    made.SourceInstanceSequence = items
    refer_to(made, group)
    return made
