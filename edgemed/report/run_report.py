"""The run manifest of `--report`: what ran on what, so that a result can be traced and repeated.

Holds versions, digests, device, precision, timings and the prompt. Holds no path, no UID and nothing of the patient:
an input is known by the digest of its file.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from edgemed import __version__
from edgemed.core import Answer, Prompt, Scan
from edgemed.files import sha256_of, write_atomically
from edgemed.report.answer_json import provenance_to_json

SCHEMA = "edgemed.run/1"
LIBRARIES = ("highdicom", "numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pydicom", "tokenizers", "torch")
"""Distributions whose version is recorded where they are installed."""


def to_run_report(
    answer: Answer, scan: Scan | None, prompt: Prompt, *, source: str | Path, outputs: Mapping[str, str | Path]
) -> dict[str, Any]:
    """Return the manifest entry of one input, or of a question without one.

    source: the file that was read. outputs: kind ("overlay", "json", "seg" ...) -> the file that was written.
    Raises CannotRead if one of them cannot be read.
    """
    return {
        "input": None
        if scan is None
        else {
            "sha256": sha256_of(source),
            "bytes": Path(source).stat().st_size,
            "modality": scan.modality,
            "frame": prompt.frame,
            "frames": scan.frames,
            "rows": scan.rows,
            "columns": scan.columns,
        },
        "prompt": {
            "text": prompt.text,
            "language": prompt.language,
            "regions": [region.kind for region in prompt.regions],
        },
        "answer": {"regions": len(answer.regions), "masks": sum(r.mask is not None for r in answer.regions)},
        "outputs": {kind: sha256_of(path) for kind, path in outputs.items()},
        "provenance": provenance_to_json(answer.provenance),
    }


def write_run_report(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write the manifest of a run over one or more inputs as indented JSON.

    Raises CannotWrite; nothing half-written is left.
    """
    report = {
        "schema": SCHEMA,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "runs": [dict(entry) for entry in entries],
    }
    write_atomically(path, (json.dumps(report, ensure_ascii=False, indent=2) + "\n").encode())


def installed_versions() -> dict[str, str]:
    """Return name -> version of edgemed, Python and those of LIBRARIES that are installed."""
    versions = {"edgemed": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
