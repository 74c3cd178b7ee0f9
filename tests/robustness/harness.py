"""What parses bytes that others wrote, as targets for fuzzing: each takes an input and raises nothing but a `Finding`.

    python tests/robustness/harness.py 100000                 inputs over all targets, one process each, two at a time
    python tests/robustness/harness.py 5000 --target pixel --seed 7
    python tests/robustness/harness.py --atheris manifest -runs=100000      guided by coverage (pip install atheris)

An input ends in a value or in a class of `edgemed.errors`. A finding is any other exception, a warning, a child that
ends with another code than a signal, and an input that takes more than `SECONDS`. Decoders run in the child of
`edgemed.dicom`; a child that one of them crashed is counted, since the program answers with InvalidInput.

Inputs are mutations of the kept corpus (`make_corpus.py`), drawn from a seed, so that each can be made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
SECONDS = 20
"""What one input may take. The slowest honest one takes 0.1 s; the rest is for a machine that does other things."""

SHARES = {"header": 0.3, "pixel": 0.3, "volume": 0.1, "manifest": 0.1, "config": 0.1, "prompt": 0.1}
"""Target -> its share of the inputs."""


class Finding(AssertionError):
    """An input ended in something that is not documented."""


class Target:
    """A context manager; `run(data)` returns what an input ended in: "read" or the class of the error."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Target:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edgemed-fuzz-", dir=memory)))
        self.file = folder / "input"
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> None:
        """Start what the target needs."""

    def parse(self, data: bytes) -> None:
        """Parse an input."""
        raise NotImplementedError

    def here(self, data: bytes) -> None:
        """Parse an input in this process, where coverage sees it."""
        self.parse(data)

    def run(self, data: bytes, how: Callable[[bytes], None] | None = None) -> str:
        """Return what an input ended in. Raises Finding."""
        from edgemed.errors import CannotRead, EdgemedError, ResourceLimit

        try:
            with deadline(), warnings.catch_warnings():
                warnings.simplefilter("error")
                (how or self.parse)(data)
        except EdgemedError as error:
            told = str(error)
            slow = isinstance(error, ResourceLimit) and ("longer than" in told or "CPU time" in told)
            if slow or (isinstance(error, CannotRead) and "process ended" in told):
                raise Finding(f"{type(error).__name__}: {told}") from error
            crash = re.search(r"crashed on it \(signal \d+\)", told)
            return f"{type(error).__name__}, decoder {crash[0]}" if crash else type(error).__name__
        except Finding:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Finding(f"{type(error).__name__}: {error}") from error
        return "read"


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Raise Finding in this thread after SECONDS."""

    def late(*_: object) -> None:
        raise Finding(f"it took more than {SECONDS} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _limits() -> Any:
    from edgemed.dicom import Limits

    return replace(Limits(), wall_seconds=SECONDS - 2, cpu_seconds=10)


class Header(Target):
    """A DICOM header as a slice of a series, and as a DICOMDIR."""

    def open(self) -> None:
        from edgemed.dicom.series import HeaderReader

        self.reader = self._stack.enter_context(HeaderReader(_limits()))

    def parse(self, data: bytes) -> None:
        from edgemed.errors import EdgemedError

        self.file.write_bytes(data)
        with contextlib.suppress(EdgemedError):
            self.reader.ask(str(self.file), directory=True)
        self.reader.ask(str(self.file), keywords=("PatientName", "WindowWidth"))

    def here(self, data: bytes) -> None:
        from edgemed.dicom.series_worker import _serve

        self.file.write_bytes(data)
        warnings.simplefilter("ignore")  # as in the child
        for directory in (False, True):
            _serve({"path": str(self.file), "directory": directory, "keywords": ["WindowWidth"]}, _limits(), BytesIO())


class Pixel(Target):
    """The first frame of a DICOM file, a PNG, a JPEG or a TIFF."""

    def open(self) -> None:
        from edgemed.dicom.reader import Reader

        self.reader = self._stack.enter_context(Reader(_limits()))

    def parse(self, data: bytes) -> None:
        self.file.write_bytes(data)
        self.reader.read(self.file)

    def here(self, data: bytes) -> None:
        from edgemed.dicom.worker import _serve

        self.file.write_bytes(data)
        warnings.simplefilter("ignore")  # as in the child
        _serve({"path": str(self.file), "frame": 0, "window": None}, _limits(), BytesIO())


class Volume(Target):
    """A NIfTI, NRRD or MetaImage volume and its middle slice."""

    def parse(self, data: bytes) -> None:
        from edgemed.dicom.volume_file import open_volume

        self.file.write_bytes(data)
        with open_volume(self.file) as volume:
            assert volume.verdict
            volume.read(volume.count // 2)


class Manifest(Target):
    """bundle.json, bundle.sig, the list of keys, the index of an archive, an ONNX graph, an engine of the cache."""

    def parse(self, data: bytes) -> None:
        from edgemed import archive, graph_check, keys, manifest, signing
        from edgemed.backends import engine_cache
        from edgemed.errors import EdgemedError

        self.file.write_bytes(data)
        key = engine_cache.EngineKey("decoder", "g", "library", "any", "fp16", "p")
        (self.file.parent / key.file_name).unlink(missing_ok=True)
        os.link(self.file, self.file.parent / key.file_name)
        self.file.chmod(0o600)
        last: EdgemedError | None = None
        for parse in (
            lambda: signing.from_bytes(data),
            lambda: keys.key_list_from_bytes(data, [keys.key_id(b"")]),
            lambda: keys._key_list(keys.from_canonical(data, "it")),
            lambda: archive.read_index(self.file),
            lambda: graph_check.external_files(self.file),
            lambda: engine_cache.load_cached(self.file.parent, key),
            lambda: manifest.to_bytes(manifest.from_bytes(data)),
        ):
            try:
                parse()
            except EdgemedError as error:
                last = error
            else:
                return
        assert last is not None
        raise last


class Config(Target):
    """The configuration file, one line of it in the environment, and the settings of a node."""

    def open(self) -> None:
        self._stack.enter_context(mock.patch.dict(os.environ))

    def parse(self, data: bytes) -> None:
        from edgemed import config
        from edgemed.errors import EdgemedError
        from edgemed.serve import settings

        self.file.write_bytes(data)
        line = os.fsdecode(data.splitlines()[0] if data.strip() else b"").replace("\0", "")
        (empty := self.file.with_name("empty")).touch()
        os.environ["EDGEMED_CONFIG"] = str(empty)
        os.environ["EDGEMED_BUNDLES_REQUIRED_ROLES"] = line
        try:
            with contextlib.suppress(EdgemedError):
                config.read_settings()
        finally:
            del os.environ["EDGEMED_BUNDLES_REQUIRED_ROLES"]
        os.environ["EDGEMED_CONFIG"] = str(self.file)
        with contextlib.suppress(EdgemedError):
            settings.read_settings(self.file)
        config.read_settings()


class Prompt(Target):
    """What a user says of places, windows, series and questions, and answers with places in them."""

    def open(self) -> None:
        import numpy as np

        from edgemed.core import Scan, Window

        self.scan = Scan(np.zeros((1, 64, 48), np.float32), "CT", Window(40, 400))

    def parse(self, data: bytes) -> None:
        from edgemed.cli.regions import read_region
        from edgemed.dicom.select import read_rules
        from edgemed.dicom.voi import parse_window
        from edgemed.errors import EdgemedError
        from edgemed.families import medplib_text, medrega_prompts, medrega_text, native_text
        from edgemed.questions import read_questions

        self.file.write_bytes(data)
        text = data.decode("utf-8", "surrogateescape")
        native_text.plain(text)
        native_text.normal_form(text)
        medrega_text.plain(text)
        medrega_text.grounded_items(text)
        medplib_text.with_regions(text, 2)
        last: EdgemedError | None = None
        for parse in (
            lambda: read_region(text, self.scan, lambda path: self.scan),
            lambda: parse_window(text),
            lambda: read_rules(self.file),
            lambda: medrega_prompts.read_prompts(self.file),
            lambda: list(read_questions(self.file)),
        ):
            try:
                parse()
            except EdgemedError as error:
                last = error
            else:
                return
        assert last is not None
        raise last


TARGETS: dict[str, type[Target]] = {
    "header": Header, "pixel": Pixel, "volume": Volume, "manifest": Manifest, "config": Config, "prompt": Prompt,
}  # fmt: skip


# --- inputs -----------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_VRS = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
_TOKENS = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b"=", b"null", b"true", b"1e999", b"-0.0", b"NaN", b"9" * 400,
    b"\\ud800", b"\xff", "\u202e".encode(), "肝".encode(), b"\0", b"\r\n", b"../", b"''' ", b'"""', b"<ref>", b"</ref>",
    b"<box>", b"</box>", b"[[1, 2, 3, 4]]", b"<c999>", b"<seg>", b"<region>", b"box:", b"point:", b"mask:", b"[[a]]\n",
    b"[" * 3000, b"\\N", b"\\2\\", b"1e5", b"-1", b"0x10", b"2026-01-01", b"inf",
)  # fmt: skip


def mutated(seeds: list[bytes], draw: random.Random) -> bytes:
    """Return a seed after one to eight changes."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            size, order = draw.choice((1, 2, 4)), draw.choice(("little", "big"))
            value = draw.choice(_NUMBERS) & (1 << 8 * size) - 1
            data[at : at + size] = value.to_bytes(size, order)
        elif kind == 2:
            del data[at : at + draw.choice((1, 2, 4, 8, 64, 1000))]
        elif kind == 3:
            size = draw.choice((1, 4, 8, 50, 500))
            data[at:at] = data[at : at + size] * draw.choice((1, 1, 2, 20))
        elif kind == 4:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 16)))
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            data[at : at + draw.choice((0, 0, 100))] = other[start : start + draw.choice((4, 16, 100, 1000))]
        elif kind == 7 and (places := [m.start() for m in re.finditer(rb"[A-Z]{2}", data)]):
            place = draw.choice(places)
            data[place : place + 2] = draw.choice(_VRS)
        else:
            token = draw.choice(_TOKENS)
            data[at : at + draw.choice((0, 1, len(token)))] = token
    return bytes(data[: 1 << 20])


def seeds_of(name: str) -> list[bytes]:
    """Return the kept corpus of a target in a stable order; half of the list is what it started from."""
    paths = sorted((CORPUS / name).iterdir())
    whole = [path for path in paths if path.name.startswith("start")]
    return [path.read_bytes() for path in paths + whole * (len(paths) // len(whole))]


def fuzz(name: str, count: int, seed: int, found: Path | None = None) -> dict[str, Any]:
    """Return what `count` mutated inputs ended in; what is a finding is kept in the folder `found`."""
    seeds, outcomes, findings, slowest = seeds_of(name), Counter[str](), [], 0.0
    start = time.perf_counter()
    with TARGETS[name]() as target:
        for number in range(count):
            data = mutated(seeds, random.Random(f"{seed}/{name}/{number}"))
            begun = time.perf_counter()
            try:
                outcome = target.run(data)
            except Finding as error:
                outcome = "FINDING"
                findings.append(f"{seed}/{name}/{number}: {error}"[:300])
            if ("decoder crash" in outcome or outcome == "FINDING") and found is not None:
                (found / f"{name}-{seed}-{number}").write_bytes(data)
            outcomes[outcome] += 1
            slowest = max(slowest, time.perf_counter() - begun)
    seconds = time.perf_counter() - start
    return {
        "target": name, "inputs": count, "seed": seed, "seconds": round(seconds, 1), "slowest_s": round(slowest, 2),
        "outcomes": dict(outcomes.most_common()), "findings": findings,
    }  # fmt: skip


def with_atheris(name: str, arguments: list[str]) -> None:
    """Fuzz a target in this process, guided by coverage; does not return. A finding ends it with a traceback."""
    import atheris

    from edgemed.errors import EdgemedError

    with atheris.instrument_imports(include=["edgemed", "pydicom", "nrrd", "nibabel"]), TARGETS[name]() as target:
        for seed in seeds_of(name)[:3]:
            with contextlib.suppress(EdgemedError):
                target.here(seed)  # imports what is imported late, which takes its time where it is instrumented
        atheris.Setup(
            [sys.argv[0], f"-timeout={SECONDS}", *arguments, str(CORPUS / name)],
            lambda data: target.run(data, target.here),
        )
        atheris.Fuzz()


def main(arguments: list[str]) -> int:
    """Print one JSON object for each target; return 1 if there was a finding."""
    from concurrent.futures import ThreadPoolExecutor
    from subprocess import PIPE, Popen

    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, help="folder for inputs that are findings")
    parser.add_argument("--atheris", choices=TARGETS)
    options, more = parser.parse_known_args(arguments)
    if options.atheris:
        with tempfile.TemporaryDirectory(prefix="edgemed-atheris-") as folder:
            with_atheris(options.atheris, [*more, folder])
    if options.found is not None:
        options.found.mkdir(parents=True, exist_ok=True)
    if options.target:
        result = fuzz(options.target, options.count, options.seed, options.found)
        print(json.dumps(result), flush=True)
        return int(bool(result["findings"]))
    kept = ["--found", str(options.found)] if options.found is not None else []

    def one(name: str) -> int:
        count = str(round(options.count * SHARES[name]))
        code = [sys.executable, __file__, count, "--target", name, "--seed", str(options.seed), *kept]
        with Popen(code, stdout=PIPE, text=True) as process:
            assert process.stdout is not None
            print(process.stdout.read(), end="", flush=True)
            return process.wait()

    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(one, TARGETS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
