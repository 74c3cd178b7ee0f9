"""The package's names, and that asking for them costs no heavy import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgemed.report as report


def test_every_name_is_importable() -> None:
    for name in report.__all__:
        assert callable(getattr(report, name))
    assert report.__all__ == sorted(report.__all__)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = report.nothing_like_this


def test_text_and_json_need_no_imaging_library() -> None:
    code = (
        "import sys; from edgemed.report import to_json, to_text, write_overlay, write_run_report; "
        "print(sorted({'PIL', 'rich', 'torch', 'pydicom', 'jsonschema'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
