"""FHIR bundles: validated, the same in every run, with codes, sides, boxes and units."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from edgemed.errors import InvalidInput
from edgemed.report.results import Analysed, write_results

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "result_inputs.py"
_spec = importlib.util.spec_from_file_location("result_inputs", HELPER)
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

pytest.importorskip("fhir.resources")


def bundles(folder, regions, kinds=("fhir",), language="en", count=1, **changes):
    mask = [Analysed(p, 0, inputs.answer("Seen.", regions)) for p in inputs.write_series(folder, count)]
    written = write_results(mask, folder, kinds, language=language, options=inputs.options(**changes))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in written if "fhir" in path.name]
    return [{e["resource"]["resourceType"]: e["resource"] for e in bundle["entry"]} for bundle in found]


def kidney():
    return inputs.masked("左肾", inputs.ellipse(16, 12, 0.5, 0.5, 0.3, 0.3))


def test_both_releases_have_a_preliminary_report_with_its_findings(tmp_path) -> None:
    older, newer = bundles(tmp_path, [kidney()])

    assert set(newer) - set(older) == {"ImagingSelection"}
    for bundle in (older, newer):
        report, observation = bundle["DiagnosticReport"], bundle["Observation"]
        assert (report["status"], observation["status"]) == ("preliminary", "preliminary")
        assert report["conclusion"] == "AI result, not for diagnosis. nano is a demo.\nSeen."
        assert report["result"] == [{"reference": f"urn:uuid:{observation['id']}"}]
        assert observation["code"]["coding"][0]["code"] == "64033007"
        assert [c["code"] for c in observation["bodySite"]["coding"]] == ["64033007", "7771000"]
        assert observation["subject"]["identifier"]["value"] == "42"
        assert [(c["code"]["text"], c["valueQuantity"]["code"]) for c in observation["component"]] == [
            ("Area", "mm2"), ("Long axis", "mm"), ("Short axis", "mm"), ("Certainty of Finding", "%")
        ]  # fmt: skip


def test_a_selection_has_the_box_and_the_segment(tmp_path) -> None:
    region = kidney()
    _, newer = bundles(tmp_path, [region], kinds=("seg", "fhir"))

    image, segment = newer["ImagingSelection"]["instance"]
    x0, y0, x1, y1 = region.box
    assert image["uid"] == "1.2.3.4.1"
    assert image["imageRegion2D"][0]["coordinate"] == [x0, y0, x1, y0, x1, y1, x0, y1, x0, y0]
    assert segment["subset"] == ["1"]
    assert segment["sopClass"]["code"] == "urn:oid:1.2.840.10008.5.1.4.1.1.66.4"


def test_nothing_found_is_a_report_without_results(tmp_path) -> None:
    for bundle in bundles(tmp_path, [], language="zh"):
        assert "result" not in bundle["DiagnosticReport"]
        assert "未标出任何区域" in bundle["DiagnosticReport"]["conclusion"]
        assert bundle["DiagnosticReport"]["language"] == "zh-CN"


def test_a_repeated_run_gives_the_same_bundle(tmp_path) -> None:
    assert bundles(tmp_path, [kidney()], count=2) == bundles(tmp_path, [kidney()], count=2)


def test_another_release_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="R3"):
        bundles(tmp_path, [], fhir=("R3",))


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "US1_UNCR.dcm", "emri_small.dcm", "chrX2.dcm"])
def test_real_files_validate(tmp_path, name) -> None:
    analysed = inputs.analyse(inputs.real_file(name))

    written = write_results(analysed, tmp_path, ("seg", "fhir"), language="zh", options=inputs.options())

    assert sum("fhir" in path.name for path in written) == 2
