"""The PDF: its font is embedded, Chinese is text in it, the same content gives the same bytes."""

from __future__ import annotations

import importlib.util
import re
import zlib
from pathlib import Path

import pytest
from pydicom import dcmread

from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)


def write_pdf(folder, language="zh", text="肝脏可见。", read=None, regions=()):
    (path,) = inputs.write_series(folder, 1)
    (written,) = write_results(
        [Analysed(path, 0, inputs.answer(text, regions))], folder, ("pdf",), language=language,
        options=inputs.options(read=read),
    )  # fmt: skip
    return dcmread(written)


def streams(pdf):
    """Return the decoded streams of a PDF that reportlab wrote."""
    import base64

    for match in re.finditer(rb"(/Filter \[[^]]*\] )?/Length (\d+)[^>]*>>\s*stream\r?\n", pdf):
        data = pdf[match.end() : match.end() + int(match[2])]
        if b"ASCII85Decode" in (match[1] or b""):
            data = base64.a85decode(data.strip().removesuffix(b"~>"))
        yield zlib.decompress(data) if b"FlateDecode" in (match[1] or b"") else data


def test_the_object_is_an_unverified_pdf_of_the_study(tmp_path) -> None:
    ds = write_pdf(tmp_path)

    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.104.1"
    assert ds.EncapsulatedDocument.startswith(b"%PDF-")
    assert (ds.MIMETypeOfEncapsulatedDocument, ds.VerificationFlag) == ("application/pdf", "UNVERIFIED")
    assert ds.DocumentTitle == "AI 结果，不可用于诊断"
    assert (ds.ConceptNameCodeSequence[0].CodeValue, ds.StudyInstanceUID) == ("18748-4", "1.2.3")
    assert [item.ReferencedSOPInstanceUID for item in ds.SourceInstanceSequence] == ["1.2.3.4.1"]


def test_the_font_is_embedded_and_chinese_can_be_copied_out(tmp_path) -> None:
    write_pdf(tmp_path, text="先前的报告")  # a font must not outlive its report
    pdf = write_pdf(tmp_path).EncapsulatedDocument

    assert b"/FontFile2" in pdf
    maps = b"".join(data for data in streams(pdf) if b"beginbfchar" in data or b"beginbfrange" in data).upper()
    for character in "肝脏可见诊断":
        assert f"<{ord(character):04X}>".encode() in maps


def test_the_same_content_gives_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    first, second = (write_pdf(tmp_path / name).EncapsulatedDocument for name in ("a", "b"))

    assert first == second


@pytest.mark.parametrize("text", ["<b>not bold & not broken</b>", "\x1b[31m\u0000", "长" * 3000, "a" * 3000, ""])
def test_whatever_a_model_says_makes_a_page(tmp_path, text) -> None:
    regions = [inputs.Region("<odd> & 奇怪", (1.0, 1.0, 5.0, 5.0))]

    assert write_pdf(tmp_path, text=text, regions=regions).EncapsulatedDocument.rstrip(b"\0\n").endswith(b"%%EOF")


def test_no_name_of_the_patient_is_on_the_page(tmp_path) -> None:
    pdf = write_pdf(tmp_path, language="en").EncapsulatedDocument

    assert not any(b"Doe" in data for data in [pdf, *streams(pdf)])
