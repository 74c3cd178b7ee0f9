"""Fault loops: make the n-th open, write, fsync or rename of an operation fail, for every n until nothing fails.

    python tests/robustness/loops.py [LOOP ...] [--short]

Each loop runs an operation in a folder of its own in three ways: the n-th call fails once with EIO; it and all later
ones fail with ENOSPC, the first write by half; the process is killed with SIGKILL there. Afterwards, without faults:
what was there before or what was to be made must be there, whole (a loss else); the operation ends with a class of
`edgemed.errors`; done again it succeeds. Needs Linux and a C compiler for faults.c.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODES = ("EIO once", "ENOSPC from then on", "SIGKILL")
KINDS = ("open", "write", "fsync", "rename")
MAX_CALLS = 3000


@dataclass
class Row:
    """What a loop found in one mode. stray: hidden files that were left, none of which anything looks at."""

    loop: str
    mode: str
    calls: int = 0
    injected: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    stray: int = 0
    losses: list[str] = field(default_factory=list)


class Loop:
    """An operation on a folder, and how to tell whether it is whole. `base` is made anew for each n."""

    name = ""
    modes = MODES
    short = 2
    """In the short form only every such n is looked at."""

    def make(self, base: Path) -> None:
        """Write what is there before."""

    def act(self, base: Path) -> int:
        """Do the operation; return an exit code. Raises errors of edgemed."""
        raise NotImplementedError

    def state(self, base: Path) -> str:
        """Return "before" or "after"; raise if it is neither."""
        raise NotImplementedError


def module(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def command(*arguments: str) -> int:
    """Return the exit code of `edgemed ARGUMENTS`, which must tell an error in one line."""
    from edgemed.cli import main

    told = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(told):
        code = main(arguments)
    if code and (told.getvalue().count("\n") != 1 or "internal error" in told.getvalue()):
        raise AssertionError(f"exit {code} told {told.getvalue()!r}")
    return code


def write_tiny(folder: Path, version: str, **more: Any) -> Any:
    from edgemed.bundle import write_bundle
    from edgemed.graphs import DimRange, GraphSpec, TensorSpec

    spec = GraphSpec(
        "decoder",
        (TensorSpec("x", "float32", (1, "sequence")),),
        (TensorSpec("y", "float32", (1, "sequence")),),
        {"sequence": DimRange(1, 8, 16)},
    )
    files = {"graphs/decoder.onnx": b"\x08\x0a\x12\x04test", "tokenizer/t.json": b"{}" * 600, "NOTICE": b"terms"}
    parts: dict[str, Any] = {"name": "tiny", "family": "native", "graphs": {"decoder": spec}, "files": files}
    parts |= {"precision": {"decoder": "int8"}, "versions": {"bundle": version}, **more}
    return write_bundle(folder, **parts)


def installed(base: Path) -> str:
    """Return the version of the one bundle installed under `base`, "" without any; raise if there is another thing."""
    from edgemed.bundle import list_bundles, open_bundle

    os.environ["EDGEMED_HOME"] = str(base / "home")
    names = [listed.name for listed in list_bundles() if not listed.embedded]
    if not names:
        return ""
    assert names == ["tiny"], names
    return str(open_bundle(base / "home" / "bundles" / "tiny").manifest.versions["bundle"])


class Import(Loop):
    """edgemed models import."""

    name = "models import"
    options: tuple[str, ...] = ()

    def make(self, base: Path) -> None:
        write_tiny(base / "source", "2")

    def act(self, base: Path) -> int:
        os.environ["EDGEMED_HOME"] = str(base / "home")
        return command("models", "import", str(base / "source"), *self.options)

    def state(self, base: Path) -> str:
        return {"": "before", "2": "after"}[installed(base)]


class ImportOver(Import):
    """The same over an older version."""

    name = "models import --replace"
    options = ("--replace",)

    def make(self, base: Path) -> None:
        super().make(base)
        write_tiny(base / "home" / "bundles" / "tiny", "1")

    def state(self, base: Path) -> str:
        return {"1": "before", "2": "after"}[installed(base)]


class Pack(Loop):
    """edgemed bundle pack."""

    name = "bundle pack"

    def make(self, base: Path) -> None:
        write_tiny(base / "source", "2")

    def act(self, base: Path) -> int:
        return command("bundle", "pack", str(base / "source"), "-o", str(base / "parts"), "--part-size", "2k")

    def state(self, base: Path) -> str:
        from edgemed.archive import read_index
        from edgemed.files import sha256_of

        index = base / "parts" / "tiny.index.json"
        if not index.exists():
            return "before"
        assert all(sha256_of(base / "parts" / part.name) == part.sha256 for part in read_index(index).parts)
        return "after"


class Unpack(Loop):
    """edgemed bundle unpack."""

    name = "bundle unpack"

    def make(self, base: Path) -> None:
        from edgemed.archive import pack

        write_tiny(base / "source", "2")
        pack(base / "source", base / "parts", 2048)

    def act(self, base: Path) -> int:
        os.environ["EDGEMED_HOME"] = str(base / "home")
        return command("bundle", "unpack", str(base / "parts" / "tiny.index.json"), "-o", str(base / "bundle"), "-q")

    def state(self, base: Path) -> str:
        from edgemed.bundle import open_bundle

        if not (base / "bundle").exists():
            return "before"
        assert open_bundle(base / "bundle").manifest.versions["bundle"] == "2"
        return "after"


class Write(Loop):
    """write_bundle over an older bundle, as `quantize --replace` calls it: some files as bytes, some copied."""

    name = "write_bundle, replacing"
    move = False

    def make(self, base: Path) -> None:
        write_tiny(base / "bundle", "1")
        self.sources(base)

    def sources(self, base: Path) -> None:
        (base / "work").mkdir(exist_ok=True)
        (base / "work" / "decoder.onnx").write_bytes(b"\x08\x0a\x12\x04test")

    def act(self, base: Path) -> int:
        files = {"graphs/decoder.onnx": base / "work" / "decoder.onnx", "reports/card.md": b"# small\n" * 500}
        write_tiny(base / "bundle", "2", files=files, replace=True, move=self.move)
        return 0

    def state(self, base: Path) -> str:
        from edgemed.bundle import open_bundle

        found = {"1": "before", "2": "after"}[open_bundle(base / "bundle").manifest.versions["bundle"]]
        self.sources(base)  # what was moved is made again, as a second export does
        return found


class WriteMoved(Write):
    """write_bundle of files that are moved, as `export` calls it."""

    name = "write_bundle, moving"
    move = True


class Sign(Loop):
    """edgemed bundle sign: a second signature beside the first."""

    name = "bundle sign"

    def make(self, base: Path) -> None:
        from edgemed import bundle, keys

        write_tiny(base / "bundle", "1")
        for name in ("vendor", "site"):
            keys.write_key_pair(base / name)
        bundle.sign_bundle(base / "bundle", keys.read_private_key(base / "vendor.key.pem"), "vendor")

    def act(self, base: Path) -> int:
        return command("bundle", "sign", str(base / "bundle"), "--key", str(base / "site.key.pem"), "--role", "site")

    def state(self, base: Path) -> str:
        from edgemed import signing

        found = signing.from_bytes((base / "bundle" / "bundle.sig").read_bytes())
        return {("vendor",): "before", ("site", "vendor"): "after"}[tuple(sorted(s.role for s in found))]


class KeyPair(Loop):
    """edgemed bundle keygen."""

    name = "bundle keygen"
    modes = MODES[:2]  # two files: after a kill in between another name is needed, and nothing that counts is lost

    def make(self, base: Path) -> None:
        base.mkdir(parents=True)

    def act(self, base: Path) -> int:
        return command("bundle", "keygen", str(base / "vendor"))

    def state(self, base: Path) -> str:
        from edgemed import keys

        if not any(base.glob("vendor*")):
            return "before"
        public = keys.public_bytes(keys.read_private_key(base / "vendor.key.pem"))
        assert public == keys.read_public_key(base / "vendor.pub.pem")
        return "after"


class EngineCache(Loop):
    """An engine written over a stale one."""

    name = "engine cache"

    def key(self, profile: str) -> Any:
        from edgemed.backends.engine_cache import EngineKey

        return EngineKey("decoder", "g" * 64, "tensorrt_rtx 1.7.1", "sm_89", "fp16", profile * 64)

    def make(self, base: Path) -> None:
        from edgemed.backends.engine_cache import write_cached

        write_cached(base / "engines", self.key("1"), b"old" * 1000)

    def act(self, base: Path) -> int:
        from edgemed.backends.engine_cache import load_cached, write_cached

        write_cached(base / "engines", self.key("2"), b"new" * 1000)
        assert load_cached(base / "engines", self.key("2")) == b"new" * 1000
        return 0

    def state(self, base: Path) -> str:
        from edgemed.backends.engine_cache import load_cached
        from edgemed.errors import BundleError

        try:
            assert load_cached(base / "engines", self.key("2")) == b"new" * 1000
        except BundleError:
            assert load_cached(base / "engines", self.key("1")) == b"old" * 1000
            return "before"
        return "after"


class Results(Loop):
    """Result files of every kind, over those of an earlier run."""

    name = "result writers"
    short = 8

    def __init__(self) -> None:
        from pydicom.data import get_testdata_file

        from edgemed.dicom import read_scan

        self.inputs = module("edgemed_tests_result_inputs", HERE.parent / "helpers" / "result_inputs.py")
        self.source = Path(str(get_testdata_file("CT_small.dcm")))
        self.scan = read_scan(self.source)
        self.analysed = self.inputs.analyse(self.source)
        self.names: list[str] = []

    def make(self, base: Path) -> None:
        base.mkdir(parents=True)
        self.act(base)
        self.names = sorted(os.listdir(base / "out"))

    def act(self, base: Path) -> int:
        from edgemed.report.results import KINDS as RESULT_KINDS
        from edgemed.report.results import LIBRARIES, write_results

        there = {n for names in LIBRARIES.values() for n in names if importlib.util.find_spec(n.split(".")[0])}
        kinds = [k for k in RESULT_KINDS if k != "pdf" and there.issuperset(LIBRARIES.get(k, ()))]  # pdf: 0.4 s a run
        options = self.inputs.options(read=lambda file, frame: self.scan, fhir=("R4B",))
        write_results(self.analysed, base / "out", kinds, language="en", options=options)
        return 0

    def state(self, base: Path) -> str:
        assert [name for name in sorted(os.listdir(base / "out")) if name[0] != "."] == self.names
        for name in self.names:
            check_result(base / "out" / name)
        return "after"


def check_result(path: Path) -> None:
    """Raise unless a result file is whole."""
    if path.suffix == ".dcm":
        import pydicom

        ds = pydicom.dcmread(path)
        assert ds.SOPInstanceUID and len(list(ds.iterall()))
        if "PixelData" in ds and "Rows" in ds:
            assert ds.pixel_array.size
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".gz":
        import gzip

        assert gzip.decompress(path.read_bytes())
    else:
        raise AssertionError(f"an unknown result {path.name}")


class Node(Loop):
    """The life of a study in a node: taken, closed, claimed, answered, delivered. What it told is done stays done."""

    name = "journal and store"
    short = 5

    def __init__(self) -> None:
        self.helper = module("edgemed_tests_dicom_node", HERE.parent / "serve" / "dicom_node.py")
        self.files: list[Path] = []

    def make(self, base: Path) -> None:
        self.files = self.helper.write_instances(base / "scans", 2)

    @staticmethod
    def told(base: Path) -> Path:
        """Return the file, beside the folder, of what the operation said is done before it ended in any way."""
        return base.with_name(f"told-{base.name}")

    def store(self, base: Path) -> Any:
        from edgemed.serve.store import Store

        return Store(self.helper.settings(base / "node", target_port=1), now=lambda: 100.0)

    def act(self, base: Path) -> int:
        import sqlite3

        from edgemed.serve.store import Refused

        promised = os.open(self.told(base), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            with self.store(base) as store:
                self.life(store, lambda line: os.write(promised, line.encode() + b"\n"))
        except (Refused, sqlite3.Error, OSError) as error:  # what the node's threads catch and tell
            from edgemed.errors import CannotWrite

            raise CannotWrite(str(error)) from error
        finally:
            os.close(promised)
        return 0

    def life(self, store: Any, promise: Callable[[str], object]) -> None:
        from pydicom import dcmread

        from edgemed.serve.store import Head

        store.recover()
        journal = store.journal
        for file in self.files:
            ds = dcmread(file)
            spool = store.open_spool(Head(ds.SOPInstanceUID, ds.SOPClassUID, ds.file_meta.TransferSyntaxUID))
            data = file.read_bytes()
            start = data.index(b"DICM") + 4
            spool.write(data[start + 12 + int.from_bytes(data[start + 8 : start + 12], "little") :])
            item = store.take(spool, "CT1")
            promise(f"taken {item.uid} {item.sha256}")
        journal.close_study(item.study, ["any"], 100.0, 100.0)
        while (job := journal.claim(100.0)) is not None:
            inside, out = store.open_job(job)
            shutil.copyfile(next(iter(sorted(inside.iterdir()))), out / "answer.dcm")
            results = store.keep_results(job, [out / "answer.dcm"])
            if journal.finish(job, results, ["PACS"], 100.0):
                promise(f"result {results[0].name} {results[0].sha256}")
            store.close_job(job)
        for delivery in journal.due_deliveries(100.0):
            journal.sent(delivery, 100.0)
            promise(f"sent {delivery.uid}")

    def state(self, base: Path) -> str:
        from edgemed.files import sha256_of

        told = self.told(base)
        promised = [line.split() for line in told.read_text().splitlines()] if told.exists() else []
        with self.store(base) as store:
            assert store.recover()["missing"] == 0
            assert {f"{p.parent.name}/{p.name}" for p in store.instances.rglob("*.dcm")} == store.journal.names()
            for what, name, *digest in promised:
                if what == "taken":
                    item = store.journal.instance(name)
                    assert item is not None and sha256_of(store.instances / item.name) == digest[0] == item.sha256
                elif what == "result":
                    assert name in store.journal.result_names() and sha256_of(store.result(name)) == digest[0]
                else:
                    assert not [d for d in store.journal.due_deliveries(100.0) if d.uid == name]
            counts = store.journal.counts()
        done = counts["instances"]["stored"] == 2 and counts["jobs"]["done"] == 1 and counts["deliveries"]["sent"] == 1
        return "after" if done else "before"


class AuditTrail(Loop):
    """Records of the audit trail, that go on from one file to the next. What was told to be recorded is there."""

    name = "audit trail"
    told = 0

    @staticmethod
    def trail(base: Path) -> Any:
        from edgemed.audit.trail import open_trail

        return open_trail(base / "audit" / "1000", 400)

    def make(self, base: Path) -> None:
        for _ in range(6):
            self.trail(base).append(lambda number: f"event {number}")

    def act(self, base: Path) -> int:
        from edgemed.errors import EdgemedError

        numbers, told = [0], 0
        try:
            for _ in range(6):
                self.trail(base).append(lambda number: numbers.append(number) or f"event {number}")
                told = numbers[-1]
        except EdgemedError:
            self.told = told
            raise
        return 0

    def state(self, base: Path) -> str:
        told, self.told = max(self.told, 6), 0
        verdict = self.trail(base).check()
        assert not verdict.damage, verdict.damage
        assert verdict.records >= told
        return "after" if verdict.records >= 12 else "before"


LOOPS: tuple[type[Loop], ...] = (
    Import, ImportOver, Pack, Unpack, Write, WriteMoved, Sign, KeyPair, EngineCache, Results, Node, AuditTrail,
)  # fmt: skip


class Faults:
    """The library of faults.c in this process, which has to be preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)

    @contextmanager
    def armed(self, folder: Path, number: int, mode: str) -> Iterator[None]:
        how = MODES.index(mode)
        self._library.faults_arm(f"{folder}/".encode(), number, how, (errno.EIO, errno.ENOSPC, 0)[how])
        try:
            yield
        finally:
            self.calls = self._library.faults_disarm()

    @property
    def hits(self) -> int:
        return int(self._library.faults_hits())

    def kinds(self) -> dict[str, int]:
        """Return how many calls of each kind there were."""
        return {kind: int(self._library.faults_of_kind(number)) for number, kind in enumerate(KINDS)}


def run_loop(loop: Loop, mode: str, faults: Faults, folder: Path, every: int = 1) -> Row:
    """Return what happened when every n-th call failed in turn. every: only each such n, for a quick look."""
    row = Row(loop.name, mode)
    before, whole = folder / "before", folder / "whole"
    loop.make(before)
    shutil.copytree(before, whole)
    with faults.armed(whole, 0, MODES[0]):  # no call has the number 0: they are counted
        loop.act(whole)
    row.calls, row.kinds = faults.calls, faults.kinds()
    for number in range(1, MAX_CALLS):
        if number % every and number <= row.calls:
            continue
        base = folder / f"{number}"
        shutil.copytree(before, base)
        hit, refused, problem = attempt(loop, base, number, mode, faults)
        if problem:
            row.losses.append(f"n = {number}: {problem}")
        row.injected += hit
        row.refused += refused
        try:
            where = "state"
            if loop.state(base) == "before" or isinstance(loop, Results):
                where = "repeat"
                assert loop.act(base) == 0
            assert loop.state(base) == "after"
        except Exception:  # noqa: BLE001  whatever it is, something that was there is not
            row.losses.append(f"n = {number}, {where}: {traceback.format_exc(limit=-2)}")
        row.stray += sum(path.name.startswith(".") for path in base.rglob("*"))
        shutil.rmtree(base)
        if not hit:
            break
    shutil.rmtree(folder)
    return row


def attempt(loop: Loop, base: Path, number: int, mode: str, faults: Faults) -> tuple[bool, bool, str]:
    """Return (whether a call failed, whether the operation told so, what it did wrong)."""
    from edgemed.errors import EdgemedError

    if mode == "SIGKILL":
        pid = os.fork()
        if pid == 0:
            try:
                with faults.armed(base, number, mode):
                    loop.act(base)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
        return killed, killed, ""
    try:
        with faults.armed(base, number, mode):
            code = loop.act(base)
    except EdgemedError as error:
        code = error.exit_code
    except Exception:  # noqa: BLE001  the finding itself
        return faults.hits > 0, True, traceback.format_exc(limit=-3)
    return faults.hits > 0, code != 0, "" if code in (0, 4, 20, 40, 80, 81) else f"exit {code}"


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    cells = [("Loop", "Fault", "Calls (open, write, fsync, rename)", "Injected", "Refused", "Losses"), ("---",) * 6]
    for row in rows:
        kinds = ", ".join(str(row.kinds.get(kind, 0)) for kind in KINDS)
        calls = f"{row.calls} ({kinds})"
        cells.append((row.loop, row.mode, calls, str(row.injected), str(row.refused), str(len(row.losses))))
    sums = (sum(r.injected for r in rows), sum(r.refused for r in rows), sum(len(r.losses) for r in rows))
    cells.append(("all", "", "", *map(str, sums)))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def memory() -> str | None:
    """Return a folder in memory, where fsync costs nothing; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def build(folder: Path) -> Path | None:
    """Return the library of faults.c, None where there is no compiler or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", str(HERE / "faults.c"), "-o", str(library), "-ldl"], check=True
    )
    return library


def run(names: list[str], short: bool, folder: Path) -> list[Row]:
    """Return the rows of loops (all without names), run in a process of its own that has faults.c preloaded."""
    library = build(folder)
    assert library is not None
    environment = {**os.environ, "LD_PRELOAD": str(library), "EDGEMED_CONFIG": "", "OMP_NUM_THREADS": "1"}
    code = [sys.executable, str(Path(__file__).resolve()), "--inside", str(folder), *names]
    code += ["--short"] if short else []
    done = subprocess.run(code, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines()]


def main(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--inside")
    options = parser.parse_args(arguments)
    if options.inside is None:
        with tempfile.TemporaryDirectory(prefix="edgemed-faults-", dir=memory()) as folder:
            rows = run(options.names, options.short, Path(folder))
        print(table(rows))
        for row in rows:
            for loss in row.losses[:3]:
                print(f"{row.loop}, {row.mode}: {loss}")
        return 1 if any(row.losses for row in rows) else 0
    import warnings

    warnings.simplefilter("error")
    faults = Faults()
    for kind in LOOPS:
        if options.names and kind.name not in options.names:
            continue
        loop = kind()
        for mode in loop.modes:
            row = run_loop(loop, mode, faults, Path(options.inside) / "loop", loop.short if options.short else 1)
            print(json.dumps(asdict(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
