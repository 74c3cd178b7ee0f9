"""`edgemed doctor`: is this workstation ready? Libraries are loaded and run, files are hashed; versions prove little.

Covers the system, memory and disk, the packages of the install, pixel decoders, the font, onnxruntime (every execution
provider that it has runs a graph), the NVIDIA driver and its GPUs, engine libraries, engines that were built, the list
of trusted keys, and the bundles: every hash, the memory each needs, what can run it. Does not cover the network:
nothing here needs it.

The driver is asked in a child process with a time limit, so that a broken one cannot hold this command up.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.options import check_device
from edgemed.cli.verbs import debug_option, describe
from edgemed.errors import (
    BackendUnavailable,
    BundleError,
    CannotRead,
    CannotWrite,
    DeviceOutOfMemory,
    EdgemedError,
    OutOfMemory,
    SignatureError,
    UnsupportedDicom,
)

if TYPE_CHECKING:
    from edgemed.backends import Device
    from edgemed.backends.engine_cache import EngineKey
    from edgemed.bundle import Bundle
    from edgemed.keys import KeyList
    from edgemed.nvidia import Driver

SCHEMA = "edgemed.doctor/1"
AGAIN = "install edgemed again"

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

LEAST_DISK_BYTES = 1 << 30
"""Free space below which importing bundles and keeping engines is not worth trying."""

CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
"""What makes matrix products fast, as Linux names it: x86-64, then ARM."""

PROVIDER = "ExecutionProvider"  # how the names of onnxruntime's end
ON_CUDA = "onnxruntime on CUDA"
GPU_PACKAGES = ("onnxruntime-gpu", "cuda-bindings", "cuda-core", "tensorrt-rtx", "tensorrt")
LEAST_CAPABILITY = 7.5
"""Of the GPUs that TensorRT-RTX builds engines for."""

KEY_DAYS = 60
"""A key that counts for so few days more is told: a new one has to be made, listed and carried here until then."""

EXPIRES = "expires soon"
ANY_TARGET = "any"  # `engine_build.ANY`: keys are compared without the GPU they are for


@dataclass(frozen=True)
class Check:
    """What one check found. `code` 0: ready; else `advice` says what to do.

    main: whether the main job (the chosen bundle on the chosen device) needs it; then the command ends with `code`.
    """

    name: str
    found: str
    advice: str = ""
    code: int = 0
    main: bool = True
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Facts:
    """What was asked for, and what earlier checks found: `runs` says what can run a graph ("onnxruntime on CPU")."""

    bundle: str = "nano"
    device: str = "auto"
    driver: Callable[[], Driver | None] = lambda: None
    runs: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was asked for."""
        return self.device.startswith("gpu")

    def place(self) -> Device:
        """Return where the main job runs: the GPU where one was asked for or onnxruntime can use one, else the CPU."""
        from edgemed.backends import Device, device_from_text

        wanted = device_from_text(self.device)
        auto_gpu = wanted.kind == "auto" and ON_CUDA in self.runs
        return Device("gpu") if auto_gpu else wanted if wanted.kind == "gpu" else Device("cpu")

    def free(self, place: Device) -> int | None:
        """Return the bytes that are free at a place, or None where that is not told."""
        from edgemed.memory import free_host_bytes

        if place.kind == "cpu":
            return free_host_bytes()
        driver = self.driver()
        return next((gpu.free_bytes for gpu in driver.gpus if gpu.index == place.index), None) if driver else None


def _attempt(name: str, check: Callable[[], Check], *, main: bool = True) -> Check:
    """Return what `check` found; an error of it is a finding, too."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 (a broken install may raise anything, and the other checks still matter)
        line, code = describe(error)
        return Check(name, type(error).__name__, line, code, main)


# --- the machine ------------------------------------------------------------------------------------------------------


def check_system(facts: Facts) -> Check:
    """Return the system and Python."""
    found = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    if sys.version_info < (3, 11) or sys.maxsize < 2**32:  # an install can be forced
        return Check("system", found, "64-bit Python 3.11 or newer is needed", EdgemedError.exit_code)
    return Check("system", found)


def check_processor(facts: Facts) -> Check:
    """Return how many processors there are and which of `CPU_FEATURES` they have, where the system tells."""
    count = f"{os.cpu_count()} processors"
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return Check("processor", count)
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(said.get("flags", said.get("Features", "")).split())
    features = [name for name in CPU_FEATURES if name in flags]
    found = ", ".join(filter(None, (count, said.get("model name", ""), *features)))
    return Check("processor", found, details={"features": features})


def check_memory(facts: Facts) -> Check:
    """Return the memory that is free, where the system tells it. What a bundle needs of it is told with the bundle."""
    from edgemed.memory import MIB, free_host_bytes

    free = free_host_bytes()
    if free is None:
        return Check("memory", "this system does not tell its free memory")
    return Check("memory", f"{free // MIB} MiB free for this process", details={"free_bytes": free})


def check_disk(facts: Facts) -> Check:
    """Return the room on the disk of the user's bundles, and whether that folder is the user's own."""
    import shutil

    from edgemed.bundle import user_folder

    folder = user_folder()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 1e9:.1f} GB free for bundles in {folder}"
    advice, code = "", 0
    if not os.access(there, os.W_OK | os.X_OK):
        advice, code = (
            "it cannot be written, so no bundle can be imported; set EDGEMED_HOME",
            CannotWrite.exit_code,
        )
    elif free < LEAST_DISK_BYTES:
        advice, code = "the disk is nearly full, so no bundle can be imported; make room", CannotWrite.exit_code
    elif there == folder and hasattr(os, "getuid"):
        info = folder.stat()
        if info.st_uid != os.getuid() or info.st_mode & 0o022:
            advice = "other users can change the bundles in it: make it yours alone (chmod 700)"
    return Check("disk", found, advice, code, main=False, details={"folder": str(folder), "free_bytes": free})


# --- the install ------------------------------------------------------------------------------------------------------


def check_packages(facts: Facts) -> Check:
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


def check_decoders(facts: Facts) -> Check:
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


def check_font(facts: Facts) -> Check:
    """Return that the font for overlays draws Latin and Chinese letters."""
    from edgemed.report.fonts import open_font

    font = open_font(16)
    drawn = {bytes(font.getmask(letter)) for letter in "A肝脾"}
    if len(drawn) != 3:
        return Check("font", "letters are missing", AGAIN, EdgemedError.exit_code)
    return Check("font", f"{font.getname()[0]}, Latin and Chinese")


# --- engines ----------------------------------------------------------------------------------------------------------


def check_onnxruntime(facts: Facts) -> Check:
    """Return the execution providers of onnxruntime that have computed a product of two matrices, each on its own."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable("onnxruntime is missing; install edgemed[cpu] or edgemed[gpu-ort]") from error
    computed, others = [], []
    for provider in onnxruntime.get_available_providers():
        problem = _try_provider(provider, facts)
        if problem:
            others.append(f"{provider} {problem}")
        else:
            computed.append(provider)
            facts.runs.append(f"onnxruntime on {provider.removesuffix(PROVIDER)}")
    found = f"onnxruntime {onnxruntime.__version__} computed on {', '.join(computed) or 'none'}"
    details = {"computed": computed, "others": others}
    found = "; ".join((found, *others))
    if "CPUExecutionProvider" not in computed:
        return Check("onnxruntime", found, "install it again", BackendUnavailable.exit_code, details=details)
    return Check("onnxruntime", found, details=details)


def _try_provider(provider: str, facts: Facts) -> str:
    """Return "" where a provider computes, else what kept it from that."""
    import numpy as np
    import onnxruntime

    if provider not in ("CPUExecutionProvider", "AzureExecutionProvider") and not _gpus(facts):
        return "was not tried: no GPU"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":  # or the CPU would take what the provider does not
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    a = np.array([[1, 2], [3, 4]], np.float32)
    try:
        session = onnxruntime.InferenceSession(MATMUL_ONNX, options, providers=[provider])
        if provider not in session.get_providers():
            return "does not start"
        (product,) = session.run(None, {"a": a, "b": a})
    except Exception:  # noqa: BLE001 (the library raises classes of its own for each reason)
        return "runs no graph"
    return "" if np.array_equal(product, a @ a) else "computed a wrong product"


def _gpus(facts: Facts) -> Sequence[Any]:
    driver = facts.driver()
    return driver.gpus if driver else ()


def check_gpu(facts: Facts) -> Check:
    """Return the NVIDIA driver and its GPUs. None is no failure unless a GPU was asked for."""
    from edgemed.memory import MIB
    from edgemed.nvidia import LIBRARY

    driver = facts.driver()
    code = BackendUnavailable.exit_code if facts.on_gpu else 0
    if driver is None:
        advice = f"--device gpu needs the NVIDIA driver: {LIBRARY} was not found" if code else ""
        return Check("gpu", "no NVIDIA GPU: the CPU is used" if not code else "no NVIDIA driver", advice, code)
    details = asdict(driver)
    known = f"NVIDIA driver for CUDA {driver.version}"
    if not driver.gpus:
        advice = "run nvidia-smi to see why, or use --device cpu" if code or driver.problem else ""
        return Check("gpu", f"{known}: {driver.problem or 'no GPU'}", advice, code, details=details)
    told = [
        f"gpu:{gpu.index} {gpu.name} ({gpu.capability}), "
        + (f"{gpu.free_bytes // MIB} of " if gpu.free_bytes is not None else "")
        + f"{gpu.total_bytes // MIB} MiB{' free' if gpu.free_bytes is not None else ', cannot be opened'}"
        for gpu in driver.gpus
    ]
    missing = code and facts.place().index >= len(driver.gpus)
    advice = f"there is no GPU {facts.place().index}: use another --device" if missing else ""
    return Check("gpu", "; ".join((known, *told)), advice, code if missing else 0, details=details)


def check_engines(facts: Facts) -> Check:
    """Return the libraries that a GPU needs: TensorRT loaded, others by version (cuda-core would wait for a driver)."""
    from importlib import metadata

    from edgemed.backends.engine_build import find_library, library_version, targets_of

    versions = {}
    for name in GPU_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    targets: tuple[str, ...] = ()
    found = [f"{name} {version}" for name, version in versions.items() if not name.startswith("tensorrt")]
    try:
        library = find_library()
        targets = targets_of(library)
        found.insert(0, f"{library_version(library)} builds for {', '.join(targets) or 'the GPU that is there'}")
        if any(float(gpu.capability) >= LEAST_CAPABILITY for gpu in _gpus(facts)):
            facts.runs.append("tensorrt on GPU")
    except BackendUnavailable as error:
        found.append(str(error))
    details = {"versions": versions, "targets": list(targets)}
    if facts.on_gpu and _gpus(facts) and not any("CPU" not in way for way in facts.runs):
        advice = "nothing here can run a graph on a GPU: install edgemed[gpu] or edgemed[gpu-ort], or use --device cpu"
        return Check("engines", "; ".join(found), advice, BackendUnavailable.exit_code, details=details)
    return Check("engines", "; ".join(found), details=details)


# --- bundles ----------------------------------------------------------------------------------------------------------


def check_keys(facts: Facts) -> Check:
    """Return the keys whose signatures count, and what becomes of them soon. What a bundle lacks is told with it."""
    from edgemed.keys import read_key_list
    from edgemed.signing import read_policy

    policy = read_policy()
    required = policy.require_signature
    rule = f"a signature of {' and '.join(policy.required_roles) or 'any role'}" if required else "no signature"
    rule += " is required"
    details: dict[str, Any] = {"require_signature": required, "required_roles": policy.required_roles}
    if policy.trusted_keys is None:
        advice = "set bundles.trusted_keys and bundles.root_keys, or only embedded bundles can be used"
        found = f"{rule}; there is no list of keys"
        failed = (advice, SignatureError.exit_code) if required else ("", 0)
        return Check("keys", found, *failed, main=False, details=details)
    details["list"] = str(policy.trusted_keys)
    try:
        listed = read_key_list(policy.trusted_keys, policy.root_keys)
    except SignatureError as error:
        found = f"{rule}; the list of keys cannot be used"
        return Check("keys", found, str(error), error.exit_code, main=False, details=details)
    states = {key: _key_state(key, listed) for key in sorted({*listed.keys, *listed.revoked})}
    details |= {"sequence": listed.sequence, "issued": listed.issued, "keys": states}
    good = [listed.keys[key].role for key, state in states.items() if state in ("counts", EXPIRES)]
    found = f"{rule}; list {listed.sequence} of {listed.issued}: {len(good)} of {len(states)} keys count"
    told, code = list(_told_of_keys(listed, states)), 0
    lacking = Counter(policy.required_roles) - Counter(good)
    if required and (lacking or not good):
        told.insert(0, f"no {' and no '.join(lacking) or 'vendor and no site'} key is left for what is required")
        code = SignatureError.exit_code
    return Check("keys", found, "; ".join(told), code, main=False, details=details)


def _key_state(key: str, listed: KeyList) -> str:
    """Return "counts", "expires soon", "expired", "not yet" or "revoked"."""
    if key in listed.revoked:
        return "revoked"
    trusted, day = listed.keys[key], listed.day()
    if trusted.problem(day):
        return "not yet" if trusted.not_before > day else "expired"
    soon = date.fromisoformat(day) + timedelta(KEY_DAYS)
    return EXPIRES if trusted.not_after and trusted.not_after <= soon.isoformat() else "counts"


def _told_of_keys(listed: KeyList, states: Mapping[str, str]) -> Iterator[str]:
    """Yield what is to be done about keys, and about a clock that is behind the list."""
    from edgemed.keys import today_iso

    for key, state in states.items():
        if state in ("expired", EXPIRES):
            trusted = listed.keys[key]
            until = "counted" if state == "expired" else "counts"
            yield f"{trusted.role} key {key[:16]} {until} until {trusted.not_after}: make the next one and list it"
    if listed.day() > today_iso():
        yield f"the clock says {today_iso()}, which is before the day of the list: set the clock"


def check_shared(facts: Facts) -> Check:
    """Return the folder of the machine's bundles; that it may be written to by others is a failure."""
    from edgemed.bundle import list_bundles, shared_folder

    folder = shared_folder()
    if folder is None:
        return Check("shared bundles", "no folder of the whole machine (bundles.shared)", main=False)
    listed = [listed for listed in list_bundles() if listed.place == "shared"]
    hidden = [f"{one.name} goes before the one in {one.hides}" for one in listed if one.hides]
    details = {"folder": str(folder), "bundles": [one.name for one in listed]}
    return Check("shared bundles", f"{len(listed)} in {folder}", "; ".join(hidden), 0, False, details)


def check_bundles(facts: Facts) -> list[Check]:
    """Return one check a bundle, and one of the engines that were built from them."""
    from edgemed.bundle import find_bundle, list_bundles, open_bundle

    bundles: dict[str, Path] = {}
    with contextlib.suppress(EdgemedError):  # `check_shared` tells it
        bundles = {listed.name: listed.path for listed in list_bundles()}
    opened: list[Bundle] = []

    def check(name: str) -> Check:
        opened.append(open_bundle(bundles.get(name) or find_bundle(name)))
        return _check_bundle(name, opened[-1], facts)

    checks = [
        _attempt(f"bundle {name}", partial(check, name), main=name == facts.bundle)
        for name in dict.fromkeys((*bundles, facts.bundle))
    ]
    return [*checks, _attempt("engine cache", partial(_check_cache, opened), main=False)]


def _check_bundle(name: str, bundle: Bundle, facts: Facts) -> Check:
    """Return how much memory a bundle needs, whether that is free, and what can run it; its hashes were checked."""
    from edgemed import memory
    from edgemed.families import open_family

    open_family(bundle)
    place = facts.place()
    plan = memory.plan_memory(bundle, kind=place.kind)
    where = f"GPU {place.index}" if place.kind == "gpu" else "the host"
    ways = ", ".join(facts.runs) or "nothing here"
    found = (
        f"{len(bundle.manifest.files)} files match their hashes, needs about {plan.total // memory.MIB} MiB of {where} "
        f"for {plan.tokens} tokens, runs with {ways}"
    )
    free = facts.free(place)
    details = {"needed_bytes": plan.total, "place": place.kind, "free_bytes": free, "runs": facts.runs}
    check = Check(f"bundle {name}", found, main=name == facts.bundle, details=details)
    if free is not None:
        try:
            memory.check_memory(plan, place, free)
        except (OutOfMemory, DeviceOutOfMemory) as error:
            return replace(check, advice=str(error), code=error.exit_code)
    return check


def _check_cache(bundles: Sequence[Bundle]) -> Check:
    """Return how many engines of the user's folder can be used, are stale, or were changed or may not be trusted.

    One that is stale was built from a graph that no bundle here has, or by another version of the library.
    """
    from edgemed.backends.engine_build import find_library, graph_key, library_version
    from edgemed.backends.engine_cache import engines_folder

    folder = engines_folder()
    files = sorted(folder.glob("*.engine")) if folder.is_dir() else []
    if not files:
        return Check("engine cache", f"no engines in {folder}", main=False)
    try:
        library = library_version(find_library())
    except BackendUnavailable:
        library = "none"  # no engine can be used, so all are stale
    graphs = [(b.graph_path(role), spec) for b in bundles for role, spec in b.manifest.graphs.items()]
    known = {graph_key(path, spec, library=library) for path, spec in graphs}
    states = [_engine_state(file, known) for file in files]
    counts = {state: states.count(state) for state in ("valid", "stale", "tampered")}
    found = ", ".join(f"{count} {state}" for state, count in counts.items()) + f" in {folder}"
    if counts["tampered"]:
        names = ", ".join(file.name for file, state in zip(files, states, strict=True) if state == "tampered")
        advice = f"remove what may not be trusted, it is built again when it is needed: {names}"
        return Check("engine cache", found, advice, BundleError.exit_code, main=False, details=counts)
    return Check("engine cache", found, main=False, details=counts)


def _engine_state(file: Path, known: Collection[EngineKey]) -> str:
    """Return "valid", "stale" or "tampered" after reading an engine file whole."""
    import json

    from edgemed.backends.engine_cache import EngineKey, load_cached

    if file.is_symlink() or not file.is_file():  # opening a pipe would wait for ever
        return "tampered"
    try:
        with file.open("rb") as stream:
            stream.readline(64)  # what kind of file it is; `load_cached` checks it
            header = json.loads(stream.readline(1 << 16))
        key = EngineKey(**{name.name: str(header[name.name]) for name in fields(EngineKey)})
        if key.file_name != file.name:
            return "tampered"
        load_cached(file.parent, key)
    except (OSError, ValueError, KeyError, TypeError, BundleError, CannotRead):
        return "tampered"
    return "valid" if replace(key, target=ANY_TARGET) in known else "stale"


CHECKS: dict[str, Callable[[Facts], Check]] = {
    "system": check_system,
    "processor": check_processor,
    "memory": check_memory,
    "disk": check_disk,
    "packages": check_packages,
    "decoders": check_decoders,
    "font": check_font,
    "gpu": check_gpu,
    "onnxruntime": check_onnxruntime,
    "engines": check_engines,
    "keys": check_keys,
    "shared bundles": check_shared,
}
BESIDE = ("disk", "keys", "shared bundles")
"""Checks that the main job does not need: what a bundle lacks by them, its own check tells."""


@click.command("doctor", short_help="Check this workstation.")
@click.option("--bundle", default="nano", show_default=True, metavar="NAME|FOLDER", help="The model of the main job.")
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|gpu|gpu:N", callback=check_device, help="Where."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def command(bundle: str, device: str, as_json: bool) -> int:
    """Check whether this workstation is ready: by running things, not by looking at version numbers.

    The exit code is 0 if the main job can run, --bundle on --device, else the code of the first check that it needs and
    that failed. A GPU that is missing is told, and fails only where --device asks for one.
    """
    from concurrent.futures import ThreadPoolExecutor

    from edgemed.nvidia import ask_driver

    with ThreadPoolExecutor(1, thread_name_prefix="ask-driver") as pool:
        facts = Facts(bundle, device, pool.submit(ask_driver).result)  # the child starts while the checks begin
        checks = [_attempt(name, partial(check, facts), main=name not in BESIDE) for name, check in CHECKS.items()]
        checks += check_bundles(facts)
    code = next((check.code for check in checks if check.code and check.main), 0)
    if as_json:
        import json

        found = [{**asdict(check), "ready": not check.code} for check in checks]
        print(json.dumps({"schema": SCHEMA, "ready": not code, "checks": found}, ensure_ascii=False))
        return code
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "FAIL" if check.code and check.main else "note" if check.code or check.advice else "ok  "
        click.echo(f"{mark}  {check.name:{width}}  {check.found}")
        if check.advice:
            click.echo(f"{'':{width + 6}}  {check.advice}")
    return code
