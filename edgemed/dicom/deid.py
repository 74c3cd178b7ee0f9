"""De-identified copies of DICOM files: DICOM PS3.15 Annex E, the Basic Application Level Confidentiality Profile.

    report = deidentify(["study/"], "out", Profile(retain_dates="modified"), read_key("site.key"))

The copies lie in OUT/<new series UID>/<new instance UID>.dcm, readable by themselves: UIDs, pseudonyms and shifted
dates follow from the key, so references between files hold, within a run and, with a key file, over runs. Each file is
parsed and written by a child process within limits (`deid_worker`); `deid_rules` has what becomes of each element.

The report names no path and no value of the files: an input is a number in the order given. What cannot be
de-identified (documents, DICOMDIRs, private classes, damaged files) is refused and listed there, never copied.

Does not cover text in pixels (it warns; a person names the regions to blank) and faces in slices of the head.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgemed import __version__
from edgemed.config import read_secret
from edgemed.dicom.deid_rules import Profile
from edgemed.dicom.deid_worker import Box
from edgemed.dicom.limits import DEFAULT_LIMITS, Limits
from edgemed.dicom.series import HeaderReader, _is_dicom, open_source
from edgemed.errors import CannotRead, CannotWrite, EdgemedError, NoInput
from edgemed.files import write_atomically

SCHEMA = "edgemed.deid/1"
REPORT = "deid.json"
KEY_BYTES = 32
_CPU_SECONDS = 600  # of a file: 120 frames of a film that are decoded to be blanked took 4

__all__ = ["REPORT", "SCHEMA", "Box", "Profile", "deidentify", "read_key"]


def read_key(path: str | Path) -> bytes:
    """Return the secret in a key file that only its owner may read; a file that is not there is made.

    Raises CannotRead as `read_secret` does, or if it is no key; CannotWrite if it cannot be made.
    """
    file = Path(path)
    if not os.path.lexists(file):
        try:
            made = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(made, "w") as stream:
                stream.write(secrets.token_hex(KEY_BYTES) + "\n")
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error
    try:
        key = bytes.fromhex(read_secret(file).decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise CannotRead(f"{path} is no key of edgemed deid; {2 * KEY_BYTES} hexadecimal digits were expected")
    return key


class _Cleaners(HeaderReader):
    """Sends files to the child process; a context manager."""

    worker = "edgemed.dicom.deid_worker"

    def __init__(self, folder: Path, profile: Profile, key: bytes, blank: Sequence[Box], limits: Limits) -> None:
        super().__init__(replace(limits, cpu_seconds=max(limits.cpu_seconds, _CPU_SECONDS)))
        self._same: dict[str, Any] = {
            "folder": os.path.abspath(folder),
            "profile": asdict(profile),
            "key": key.hex(),
            "blank": [list(box) for box in blank],
        }

    def __enter__(self) -> _Cleaners:
        return self

    def clean(self, path: str) -> dict[str, Any]:
        """Return the worker's reply. Raises its errors, which name no path."""
        self._request = {"path": os.path.abspath(path), **self._same}
        self.start()
        reply: Any = self._ask(path, 0, None)
        return dict(reply)


def deidentify(
    inputs: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    profile: Profile,
    key: bytes | None = None,
    *,
    blank: Sequence[Box] = (),
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_refusal: Callable[[str, EdgemedError], None] = lambda path, error: None,
) -> dict[str, Any]:
    """Write copies of the files in `inputs` (files, folders, DICOMDIRs, zip archives) and return the report.

    key: None for one that is forgotten at the end. blank: regions (x, y, width, height) in pixels of every frame.
    The report is written to OUT/deid.json, too. on_refusal gets the path and the error of a file that was refused.

    Raises NoInput if there is no DICOM file, CannotWrite if `folder` cannot be made, EdgemedError (usage) for a region
    without an inside, or what `open_source` raises.
    """
    out = Path(folder)
    if any(x < 0 or y < 0 or width < 1 or height < 1 for x, y, width, height in blank):
        raise EdgemedError("a region to blank needs x and y from 0 on, and a width and a height above 0")
    if profile.clean_pixel_data and not blank:
        raise EdgemedError("the pixels are not made clean by nothing; name the regions to blank")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {folder}: {error.strerror or 'refused'}") from error
    files: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    passed_over = number = 0
    with _Cleaners(out, profile, key or secrets.token_bytes(KEY_BYTES), blank, limits) as cleaners:
        for given in inputs:
            with open_source(given, limits) as source:
                for index, path in enumerate(source.paths):
                    if not _is_dicom(path):
                        passed_over += 1
                        continue
                    number += 1
                    try:
                        files.append({"input": number, **cleaners.clean(path)})
                    except EdgemedError as error:
                        on_refusal(source.shown(path), error)
                        name, code = type(error).__name__, error.exit_code
                        refused.append({"input": number, "name": name, "code": code, "message": str(error)})
                    progress(index + 1, len(source.paths))
    if not number:
        raise NoInput("none of the files is a DICOM file; nothing was written")
    report = {
        "schema": SCHEMA,
        "edgemed": __version__,
        "profile": {k: v for k, v in asdict(profile).items() if v},
        "codes": list(profile.codes),
        "blanked": [list(box) for box in blank],
        "key": "given" if key is not None else "forgotten",
        "files": files,
        "refused": refused,
        "passed_over": passed_over,
    }
    write_atomically(out / REPORT, json.dumps(report, ensure_ascii=False, indent=1).encode() + b"\n")
    return report
