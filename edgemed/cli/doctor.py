"""`edgemed doctor`: is this workstation ready? Libraries are loaded and run, files are hashed; versions prove little.

Covers the system, memory and disk, the packages of the install, pixel decoders, onnxruntime (by running a graph), the
font, the bundles (every hash). Does not cover GPUs or the network: nothing here needs the second.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import click

from edgemed.cli.verbs import debug_option, describe
from edgemed.errors import BackendUnavailable, BundleError, EdgemedError, OutOfMemory, UnsupportedDicom

SCHEMA = "edgemed.doctor/1"
AGAIN = "install edgemed again"

MEMORY_MIB = 700
"""Peak memory of `edgemed infer` with the embedded bundle, rounded up (README, section Speed)."""

MATMUL_ONNX = bytes.fromhex(
    "08083a550a110a01610a016212016322064d61744d756c1201675a130a0161120e0a0c080112080a0208020a0208025a130a0162120e"
    "0a0c080112080a0208020a02080262130a0163120e0a0c080112080a0208020a02080242040a00100d"
)
"""The smallest graph that computes: c = MatMul(a, b), float32 [2, 2], opset 13, IR version 8."""

SYNTAXES = {
    "DeflatedExplicitVRLittleEndian": "deflated",
    "RLELossless": "RLE",
    "JPEGBaseline8Bit": "JPEG 8 bit",
    "JPEGExtended12Bit": "JPEG 12 bit",
    "JPEGLosslessSV1": "JPEG lossless",
    "JPEGLSLossless": "JPEG-LS",
    "JPEG2000Lossless": "JPEG 2000",
    "HTJ2KLossless": "HTJ2K",
}
"""Transfer syntaxes that clinics meet (pydicom's names) and how people call them."""


@dataclass(frozen=True)
class Check:
    """What one check found. `code` 0: ready; else the command ends with it, and `advice` says what to do."""

    name: str
    found: str
    advice: str = ""
    code: int = 0


def _attempt(name: str, check: Callable[[], Check]) -> Check:
    """Return what `check` found; an error of it is a finding, too."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 (a broken install may raise anything, and the other checks still matter)
        line, code = describe(error)
        return Check(name, type(error).__name__, line, code)


def check_system() -> Check:
    """Return the system and Python."""
    found = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    if sys.version_info < (3, 11) or sys.maxsize < 2**32:  # an install can be forced
        return Check("system", found, "64-bit Python 3.11 or newer is needed", EdgemedError.exit_code)
    return Check("system", found)


def check_memory() -> Check:
    """Return the memory that is free, where the system tells it."""
    free = free_memory_mib()
    if free is None:
        return Check("memory", f"{os.cpu_count()} processors; this system does not tell its free memory")
    found = f"{free} MiB free, {os.cpu_count()} processors"
    if free < MEMORY_MIB:
        advice = f"close other programs: answering takes up to {MEMORY_MIB} MiB"
        return Check("memory", found, advice, OutOfMemory.exit_code)
    return Check("memory", found)


def free_memory_mib() -> int | None:
    """Return the memory that a new process could use in MiB, or None if the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    except OSError:
        return None
    return None if kib is None else kib // 1024


def check_packages() -> Check:
    """Return the installed packages, or which requirement of the base install is missing."""
    from importlib import metadata

    missing, versions = [], []
    for requirement in metadata.requires("edgemed") or []:
        if ";" in requirement:  # of an extra
            continue
        name = requirement.split("<")[0].split(">")[0].split("=")[0].split("[")[0].strip()
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", f"missing: {', '.join(missing)}", AGAIN, EdgemedError.exit_code)
    return Check("packages", ", ".join(versions))


def check_decoders() -> Check:
    """Return the compressed transfer syntaxes that pixels can be read from."""
    import importlib
    import warnings

    from pydicom import uid
    from pydicom.pixels import get_decoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usable = {called: get_decoder(getattr(uid, name)).is_available for name, called in SYNTAXES.items()}
    importlib.import_module("imagecodecs")
    missing = [called for called, there in usable.items() if not there]
    if missing:
        return Check("decoders", f"missing: {', '.join(missing)}", AGAIN, UnsupportedDicom.exit_code)
    return Check("decoders", ", ".join(usable))


def check_onnxruntime() -> Check:
    """Return version and execution provider of onnxruntime after it has computed a product of two matrices."""
    import numpy as np

    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable("onnxruntime is missing; install edgemed[cpu] or edgemed[gpu-ort]") from error
    session = onnxruntime.InferenceSession(MATMUL_ONNX, providers=["CPUExecutionProvider"])
    a = np.array([[1, 2], [3, 4]], np.float32)
    (product,) = session.run(None, {"a": a, "b": a})
    right = np.array_equal(product, a @ a)
    found = f"onnxruntime {onnxruntime.__version__} computed on {', '.join(session.get_providers())}"
    if not right:
        return Check("onnxruntime", found, "the product is wrong; install it again", BackendUnavailable.exit_code)
    return Check("onnxruntime", found)


def check_font() -> Check:
    """Return that the font for overlays draws Latin and Chinese letters."""
    from edgemed.report.fonts import open_font

    font = open_font(16)
    drawn = {bytes(font.getmask(letter)) for letter in "A肝脾"}
    if len(drawn) != 3:
        return Check("font", "letters are missing", AGAIN, EdgemedError.exit_code)
    return Check("font", f"{font.getname()[0]}, Latin and Chinese")


def check_bundles() -> list[Check]:
    """Return one check a bundle: every file against its hash."""
    from edgemed.bundle import Listed, list_bundles, open_bundle

    def check(listed: Listed) -> Check:
        bundle = open_bundle(listed.path)
        return Check(f"bundle {listed.name}", f"{len(bundle.manifest.files)} files match their hashes")

    bundles = list_bundles()
    if not bundles:
        return [Check("bundles", "none", f"{AGAIN}: a bundle comes with it", BundleError.exit_code)]
    return [_attempt(f"bundle {listed.name}", partial(check, listed)) for listed in bundles]


CHECKS = {
    "system": check_system,
    "memory": check_memory,
    "packages": check_packages,
    "decoders": check_decoders,
    "onnxruntime": check_onnxruntime,
    "font": check_font,
}


@click.command("doctor", short_help="Check this workstation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def command(as_json: bool) -> int:
    """Check whether this workstation is ready: by running things, not by looking at version numbers.

    The exit code is 0 if everything is, else the code of the first check that failed.
    """
    checks = [_attempt(name, check) for name, check in CHECKS.items()]
    checks += check_bundles()
    code = next((check.code for check in checks if check.code), 0)
    if as_json:
        import json

        found = [{**asdict(check), "ready": not check.code} for check in checks]
        print(json.dumps({"schema": SCHEMA, "ready": not code, "checks": found}, ensure_ascii=False))
        return code
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'FAIL' if check.code else 'ok  '}  {check.name:{width}}  {check.found}")
        if check.advice:
            print(f"{'':{width + 6}}  {check.advice}")
    return code
