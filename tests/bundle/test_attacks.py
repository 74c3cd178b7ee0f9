"""Whatever is done to a signed bundle is refused with its code, before a graph is looked at.

Two tables: bits flipped in every region, and structural attacks, generated. 81 is for signatures, 80 for the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemed import bundle as bundles
from edgemed.bundle import open_bundle
from edgemed.errors import BundleError

FILES = ("NOTICE", "graphs/decoder.onnx", "graphs/decoder.onnx.data", "reports/card.md", "tokenizer/tokenizer.json")
Attack = Callable[[Any, Path], None]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and pipes need rights on Windows")


@pytest.fixture
def no_graph_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "external_files", lambda path: pytest.fail(f"{path.name} was looked at"))


def refused_with(folder: Path, policy: Any) -> int:
    try:
        open_bundle(folder, policy)
    except BundleError as error:
        return error.exit_code
    return 0


# --- bits -------------------------------------------------------------------------------------------------------------


def flip_bits(hospital: Any, folder: Path, count: int) -> None:
    """Flip `count` bits, one at a time, spread evenly over every file; each must be refused with its code."""
    files = ("bundle.json", "bundle.sig", *FILES)
    places = [(name, bit) for name in files for bit in range((folder / name).stat().st_size * 8)]
    chosen = places if count >= len(places) else random.Random(7).sample(places, count)  # a fixed seed: any bit will do
    for name in files:
        chosen += [(name, 0), (name, (folder / name).stat().st_size * 8 - 1)]
    for name, bit in chosen:
        descriptor = os.open(folder / name, os.O_RDWR)
        try:
            old = os.pread(descriptor, 1, bit // 8)
            os.pwrite(descriptor, bytes([old[0] ^ 1 << bit % 8]), bit // 8)
            code = refused_with(folder, hospital.policy)
            os.pwrite(descriptor, old, bit // 8)
        finally:
            os.close(descriptor)
        assert code == (81 if name.startswith("bundle.") else 80), (name, bit)


@pytest.mark.usefixtures("no_graph_is_read")
def test_1000_flipped_bits_are_refused(hospital: Any, tmp_path: Path) -> None:
    flip_bits(hospital, hospital.copy(tmp_path / "b"), 1000)


@pytest.mark.slow
@pytest.mark.usefixtures("no_graph_is_read")
def test_10000_flipped_bits_are_refused(hospital: Any, tmp_path: Path) -> None:
    flip_bits(hospital, hospital.copy(tmp_path / "b"), 10_000)


# --- structure --------------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object], *signers: str) -> Attack:
    """Return the attack that changes the manifest's values, and signs it anew where signers are named."""

    def attack(hospital: Any, folder: Path) -> None:
        values = json.loads((folder / "bundle.json").read_bytes())
        change(values)
        (folder / "bundle.json").write_text(json.dumps(values), "utf-8")
        if signers:
            hospital.sign(folder, *signers)

    return attack


def manifest_text(change: Callable[[str], str], *signers: str) -> Attack:
    """Return the attack that changes the manifest's text and has the right keys sign it."""

    def attack(hospital: Any, folder: Path) -> None:
        text = (folder / "bundle.json").read_text("utf-8")
        assert change(text) != text
        (folder / "bundle.json").write_text(change(text), "utf-8")
        hospital.sign(folder, *(signers or ("vendor", "site")))

    return attack


def signature_text(change: Callable[[str], str]) -> Attack:
    def attack(hospital: Any, folder: Path) -> None:
        text = (folder / "bundle.sig").read_text()
        assert change(text) != text
        (folder / "bundle.sig").write_text(change(text))

    return attack


def signature_rows(change: Callable[[list[dict[str, Any]]], object]) -> Attack:
    def attack(hospital: Any, folder: Path) -> None:
        values = json.loads((folder / "bundle.sig").read_bytes())
        change(values["signatures"])
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        (folder / "bundle.sig").write_text(text + "\n")

    return attack


def on(name: str, act: Callable[[Path], object]) -> Attack:
    return lambda hospital, folder: act(folder / name) and None


def file_attacks() -> Iterator[tuple[str, int, Attack]]:
    def replaced_by_link(path: Path) -> None:
        outside = path.with_name("outside") if path.parent.name == "b" else path.parent.parent.parent / "outside"
        path.rename(outside)
        path.symlink_to(outside)

    def replaced_by_folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def replaced_by_pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    acts: dict[str, Callable[[Path], object]] = {
        "removed": Path.unlink,
        "emptied": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        "linked": replaced_by_link,
        "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
        "folder": replaced_by_folder,
        "pipe": replaced_by_pipe,
        "renamed": lambda path: path.rename(path.with_name(path.name + ".old")),
        "capitals": lambda path: path.rename(path.with_name(path.name.swapcase())),
        "moved": lambda path: path.rename(path.parent.parent / f"{path.name}-moved") if path.parent.name != "b" else
        path.rename(path.parent / "graphs" / path.name),
        "backup": lambda path: path.with_name(path.name + "~").write_bytes(path.read_bytes()),
    }  # fmt: skip
    for name in FILES:
        for what, act in acts.items():
            if not (what == "moved" and name != "NOTICE" and name.count("/") != 1):
                yield f"{name} {what}", 80, on(name, act)
    for i, one in enumerate(FILES):
        for other in FILES[i + 1 :]:

            def swap(hospital: Any, folder: Path, one: str = one, other: str = other) -> None:
                (folder / one).rename(folder / "third")
                (folder / other).rename(folder / one)
                (folder / "third").rename(folder / other)

            yield f"{one} and {other} swapped", 80, swap
    for extra in (".hidden", "graphs/x.onnx", "bundle.json.bak", "bundle.sig.bak", "a/b/c", "graphs/decoder.onnx.data2",
                  "tokenizer/..", "notice", "BUNDLE.JSON", "libops.so", "x.pkl", "graphs/.nfs0", "肝.txt"):  # fmt: skip

        def add(hospital: Any, folder: Path, extra: str = extra) -> None:
            path = folder / (extra if extra != "tokenizer/.." else "tokenizer/...")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

        yield f"extra file {extra}", 80, add
    yield "extra link to a folder", 80, lambda h, folder: (folder / "more").symlink_to("/etc")
    yield "extra link to a bundled file", 80, lambda h, folder: (folder / "more").symlink_to("NOTICE")
    yield "extra pipe", 80, lambda h, folder: os.mkfifo(folder / "more")

    def linked_folder(h: Any, folder: Path) -> None:
        (folder / "graphs").rename(folder.parent / "graphs")
        (folder / "graphs").symlink_to(folder.parent / "graphs")

    yield "folder replaced by a link to it", 80, linked_folder


def manifest_attacks() -> Iterator[tuple[str, int, Attack]]:
    both = ("vendor", "site")
    other: dict[str, Any] = {
        "name": "other", "family": "medrega", "settings": {}, "licences": {}, "versions": {"bundle": "9"},
        "calibration_digest": "c" * 64, "precision": {"decoder": "fp32"}, "format": 1.0,
    }  # fmt: skip
    for key, value in other.items():
        yield f"{key} changed", 81, edited(lambda m, k=key, v=value: m.update({k: v}))
    yield "only spaces added", 81, edited(lambda m: None)
    yield "a hash replaced with its file", 81, edited(lambda m: m["files"].update(NOTICE="0" * 64))
    for signer in (("vendor",), ("site",), ("vendor-lost", "site"), ("vendor-old", "site"), ("vendor-new", "site"),
                   ("stranger", "site"), ("root", "site"), ("vendor", "vendor-2")):  # fmt: skip
        yield f"changed and signed by {'+'.join(signer)}", 81, edited(lambda m: m.update(settings={}), *signer)
        yield f"signed by {'+'.join(signer)}", 81, edited(lambda m: None, *signer)
    # From here on the right keys have signed what a manifest must not say.
    for name in ("../x", "/etc/passwd", "a//b", "./a", "a/.", "a/../../x", "a\\b", "C:x", "", "bundle.json", "a\n",
                 "a ", "bundle.sig", "a.", "x?", "a|b", "con:", "\u0000", "x.pkl", "x.PT", "ops.so", "ops.dll",
                 "hook.py", "m.engine", "x.joblib"):  # fmt: skip
        yield f"file name {name!r}", 80, edited(lambda m, n=name: m["files"].update({n: "0" * 64}), *both)
    for value in ("0" * 63, "0" * 65, "G" * 64, "A" * 64, "", 7, None, ["0" * 64]):
        yield (
            f"hash {str(value)[:8]} {len(str(value))}",
            80,
            edited(lambda m, v=value: m["files"].update(NOTICE=v), *both),
        )
    for key in ("format", "name", "family", "graphs", "files", "precision", "versions", "licences", "settings"):
        yield f"{key} removed", 80, edited(lambda m, k=key: m.pop(k), *both)
        yield f"{key} of another kind", 80, edited(lambda m, k=key: m.update({k: [1]}), *both)
        yield f"{key} twice", 80, manifest_text(lambda t, k=key: t.replace(f'"{k}":', f'"{k}":null,"{k}":', 1))
    for value in ("2", "0", "-1", "1e400", "true", '"1"', "null", "[[[[]]]]", "NaN"):
        yield f"format {value}", 80, manifest_text(lambda t, v=value: t.replace('"format":1', f'"format":{v}'))
    for name in ("..", "Tiny", "a/b", "", "x" * 65, "肝", "-x"):
        yield f"name {name[:9]!r}", 80, edited(lambda m, n=name: m.update(name=n), *both)
    for version in ("", "x", "1..2", "1.2.3.4.5", "9999999999"):
        yield f"version {version!r}", 80, edited(lambda m, v=version: m["versions"].update(bundle=v), *both)
    yield "unknown key", 80, edited(lambda m: m.update(hook="x"), *both)
    yield "names that differ in case", 80, edited(lambda m: m["files"].update(notice="0" * 64), *both)
    composed = "caf\u00e9"
    names = {composed: "0" * 64, unicodedata.normalize("NFD", composed): "0" * 64}
    yield "names that differ in accents' form", 80, edited(lambda m: m["files"].update(names), *both)
    yield "a file twice", 80, manifest_text(lambda t: t.replace('"NOTICE":', f'"NOTICE":"{"0" * 64}","NOTICE":'))
    yield "a setting twice", 80, manifest_text(lambda t: t.replace('"side":', '"side":1,"side":'))
    yield "not a number", 80, manifest_text(lambda t: t.replace('"side":256', '"side":NaN'))
    yield "half a character", 80, manifest_text(lambda t: t.replace('"family":"', '"family":"\\ud800'))
    yield "nested deeply", 80, manifest_text(lambda t: t.replace('"side":256', '"side":' + "[" * 99999 + "]" * 99999))
    yield "huge number", 80, manifest_text(lambda t: t.replace('"side":256', '"side":' + "9" * 9999))
    yield "huge", 80, lambda h, folder: os.truncate(folder / "bundle.json", (8 << 20) + 1)
    yield "huge and sparse", 80, lambda h, folder: os.truncate(folder / "bundle.json", 1 << 40)
    yield "no graph file", 80, edited(lambda m: m["files"].pop("graphs/decoder.onnx"), *both)
    yield "graph of another role", 80, edited(lambda m: m["graphs"]["decoder"].update(role="projector"), *both)
    yield "missing manifest", 80, lambda h, folder: (folder / "bundle.json").unlink()
    yield "empty manifest", 81, lambda h, folder: (folder / "bundle.json").write_bytes(b"") and None
    yield "empty manifest, signed", 80, manifest_text(lambda t: "")
    yield "list as manifest, signed", 80, manifest_text(lambda t: "[]")
    yield "manifest in UTF-16, signed", 80, manifest_text(lambda t: t.encode("utf-16").decode("latin-1"))
    yield "file the bundle has not", 80, edited(lambda m: m["files"].update(more="0" * 64), *both)
    yield "file the manifest has not", 80, edited(lambda m: m["files"].pop("NOTICE"), *both)

    def linked(h: Any, folder: Path) -> None:
        (folder / "bundle.json").rename(folder.parent / "m")
        (folder / "bundle.json").symlink_to(folder.parent / "m")

    yield "manifest is a link", 80, linked


def signature_attacks() -> Iterator[tuple[str, int, Attack]]:
    texts: dict[str, Callable[[str], str]] = {
        "empty": lambda t: "",
        "spaces": lambda t: t.replace(",", ", "),
        "no newline": lambda t: t.rstrip(),
        "two newlines": lambda t: t + "\n",
        "a list": lambda t: "[]\n",
        "a number": lambda t: "1\n",
        "nested": lambda t: "[" * 30000,
        "format 2": lambda t: t.replace('"format":1', '"format":2'),
        "format true": lambda t: t.replace('"format":1', '"format":1.0'),
        "algorithm none": lambda t: t.replace("ed25519", "none"),
        "algorithm twice": lambda t: t.replace('"algorithm":', '"algorithm":"none","algorithm":'),
        "signatures twice": lambda t: t.replace('"signatures":', '"signatures":[],"signatures":'),
        "capital hex": lambda t: t.replace("a", "A"),
        "roles exchanged": lambda t: t.replace("vendor", "x").replace("site", "vendor").replace('"x"', '"site"'),
        "unknown role": lambda t: t.replace("vendor", "root"),
        "more keys": lambda t: t.replace('"format":1', '"format":1,"note":"x"'),
        "huge": lambda t: t + " " * (64 << 10),
        "null": lambda t: "null\n",
    }
    for what, change in texts.items():
        yield f"signatures: {what}", 81, signature_text(change)
    rows: dict[str, Callable[[list[dict[str, Any]]], object]] = {
        "none": list.clear,
        "first stripped": lambda r: r.pop(0),
        "last stripped": lambda r: r.pop(),
        "reversed": list.reverse,
        "one twice": lambda r: r.insert(0, r[0]),
        "values exchanged": lambda r: [r[0].update(signature=r[1]["signature"]), r[1].update(key=r[0]["key"])],
        "zeros": lambda r: r[0].update(signature="0" * 128),
        "short": lambda r: r[0].update(signature="0" * 126),
        "long": lambda r: r[0].update(signature=r[0]["signature"] + "00"),
        "number": lambda r: r[0].update(signature=7),
        "short key id": lambda r: r[0].update(key=r[0]["key"][:16]),
        "unknown key id": lambda r: r[0].update(key="0" * 64),
        "key id of a list": lambda r: r[0].update(key=[]),
        "many": lambda r: r.extend({**r[0], "key": f"{i:064x}"} for i in range(100)),
        "one is null": lambda r: r.append(None),  # type: ignore[arg-type]
        "role missing": lambda r: r[0].pop("role"),
        "malleable": lambda r: r[0].update(signature=r[0]["signature"][:64] + malleable(r[0]["signature"][64:])),
    }
    for what, alter in rows.items():
        yield f"signatures: {what}", 81, signature_rows(alter)
    yield "signatures: no file", 81, on("bundle.sig", Path.unlink)

    def a_folder(h: Any, folder: Path) -> None:
        (folder / "bundle.sig").unlink()
        (folder / "bundle.sig").mkdir()

    def link(h: Any, folder: Path) -> None:
        (folder / "bundle.sig").rename(folder.parent / "s")
        (folder / "bundle.sig").symlink_to(folder.parent / "s")

    def of_another_bundle(h: Any, folder: Path) -> None:
        other = h.copy(folder.parent / "other")
        edited(lambda m: m.update(settings={}), "vendor", "site")(h, other)
        (other / "bundle.sig").replace(folder / "bundle.sig")

    yield "signatures: folder", 81, a_folder
    yield "signatures: link", 81, link
    yield "signatures: of another bundle", 81, of_another_bundle


def malleable(scalar: str) -> str:
    """Return the scalar half of an Ed25519 signature plus the group's order: the same point, other bytes."""
    order = 2**252 + 27742317777372353535851937790883648493
    return ((int.from_bytes(bytes.fromhex(scalar), "little") + order) % 2**256).to_bytes(32, "little").hex()


ATTACKS = [*file_attacks(), *manifest_attacks(), *signature_attacks()]


def test_there_are_200_attacks_of_different_names() -> None:
    assert len(ATTACKS) >= 200
    assert len({name for name, _, _ in ATTACKS}) == len(ATTACKS)


@pytest.mark.usefixtures("no_graph_is_read")
@pytest.mark.parametrize(("code", "attack"), [pytest.param(code, act, id=name) for name, code, act in ATTACKS])
def test_attack_is_refused_before_a_graph_is_read(hospital: Any, tmp_path: Path, code: int, attack: Attack) -> None:
    folder = hospital.copy(tmp_path / "b")
    attack(hospital, folder)
    assert refused_with(folder, hospital.policy) == code


# --- graphs that the right keys have signed ---------------------------------------------------------------------------

GRAPHS: dict[str, Callable[[Any], bytes]] = {
    "not a graph": lambda h: b"graph",
    "own domain": lambda h: h.model(h.field(1, h.field(7, b"my.ops"))),
    "ai.onnx.ml": lambda h: h.model(h.field(1, h.field(7, b"ai.onnx.ml"))),
    "capital domain": lambda h: h.model(h.field(1, h.field(7, b"AI.ONNX"))),
    "domain with zero": lambda h: h.model(h.field(1, h.field(7, b"ai.onnx\0"))),
    "second domain": lambda h: h.model(h.field(1, h.field(7, b"") + h.field(7, b"evil"))),
    "own opset": lambda h: h.model(more=h.field(8, h.field(1, b"my.ops"))),
    "opset of a function": lambda h: h.model(more=h.field(25, h.field(9, h.field(1, b"my.ops")))),
    "function": lambda h: h.model(more=h.field(25, h.field(10, b"my.ops"))),
    "node of a function": lambda h: h.model(more=h.field(25, h.field(7, h.field(7, b"my.ops")))),
    "in a branch": lambda h: h.model(h.field(1, h.field(5, h.field(6, h.field(1, h.field(7, b"my.ops")))))),
    "in one of the branches": lambda h: h.model(h.field(1, h.field(5, h.field(11, h.field(1, h.field(7, b"my.ops")))))),
    "second graph": lambda h: h.model(more=h.field(7, h.field(1, h.field(7, b"my.ops")))),
    "engine": lambda h: h.model(h.field(1, h.field(4, b"EPContext") + h.field(7, b"com.microsoft"))),
    "python": lambda h: h.model(h.field(1, h.field(4, b"PythonOp") + h.field(7, b"com.microsoft"))),
    "training": lambda h: h.model(more=h.field(20, h.field(1, b""))),
    "weights above": lambda h: h.model(h.field(5, h.entry(b"location", b"../NOTICE"))),
    "weights outside": lambda h: h.model(h.field(5, h.entry(b"location", b"../../x"))),
    "weights at the root": lambda h: h.model(h.field(5, h.entry(b"location", b"/etc/passwd"))),
    "weights elsewhere": lambda h: h.model(h.field(5, h.entry(b"location", b"other.data"))),
    "weights in memory": lambda h: h.model(h.field(5, h.entry(b"location", b"*/_ORT_MEM_ADDR_/*"))),
    "weights not named in UTF-8": lambda h: h.model(h.field(5, h.entry(b"location", b"\xff"))),
    "group": lambda h: b"\x0b\x0c",
    "field 0": lambda h: b"\x00\x00",
    "long number": lambda h: b"\x08" + b"\xff" * 20,
    "long length": lambda h: b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "cut": lambda h: h.model(h.field(1, h.field(4, b"Add")))[:-1],
    "long name": lambda h: h.model(h.field(1, h.field(4, b"A" * 5000))),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_signed_graph_that_asks_for_more_is_refused_before_an_engine_opens_it(
    hospital: Any, tmp_path: Path, name: str
) -> None:
    folder, graph = hospital.copy(tmp_path / "b"), GRAPHS[name](hospital)
    (folder / "graphs/decoder.onnx").write_bytes(graph)
    digest = hashlib.sha256(graph).hexdigest()
    edited(lambda m: m["files"].update({"graphs/decoder.onnx": digest}), "vendor", "site")(hospital, folder)
    assert refused_with(folder, hospital.policy) == 80
