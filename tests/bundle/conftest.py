"""A hospital with keys: a small bundle signed by its vendor and by the site, and the policy that asks for both."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgemed import keys, signing
from edgemed.bundle import Bundle, write_bundle
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

SPEC = GraphSpec(
    "decoder",
    (TensorSpec("x", "float32", (1, "sequence")),),
    (TensorSpec("y", "float32", (1, "sequence")),),
    {"sequence": DimRange(1, 8, 16)},
)


def field(number: int, content: bytes | int) -> bytes:
    """Return one field of a protocol buffer: a number, or bytes of any length."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
        return out + bytes([value])

    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(key: bytes, value: bytes) -> bytes:
    """Return the external_data field of a tensor."""
    return field(13, field(1, key) + field(2, value))


def model(graph: bytes = b"", more: bytes = b"") -> bytes:
    """Return an ONNX file around a graph's fields."""
    return field(1, 10) + field(8, field(1, b"") + field(2, 21)) + more + field(7, graph)


WEIGHTS = field(5, field(8, b"w") + entry(b"location", b"decoder.onnx.data") + field(14, 1))
GRAPH = model(field(1, field(4, b"MatMul") + field(7, b"")) + WEIGHTS)


@dataclass(frozen=True)
class Hospital:
    """Keys, the signed list of them, and a signed bundle in `template`, which tests copy."""

    folder: Path
    private: dict[str, Any]
    policy: signing.Policy
    field = staticmethod(field)
    entry = staticmethod(entry)
    model = staticmethod(model)

    @property
    def template(self) -> Path:
        return self.folder / "template"

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.template, target)
        return target

    def sign(self, bundle: Path, *names: str, roles: dict[str, str] | None = None) -> None:
        """Sign whatever lies in bundle.json as it is."""
        data = (bundle / "bundle.json").read_bytes()
        usual = {name: "site" if name == "site" else "vendor" for name in names}
        made = [signing.sign(data, self.private[n], role) for n, role in {**usual, **(roles or {})}.items()]
        (bundle / "bundle.sig").write_bytes(signing.to_bytes(made))

    def id(self, name: str) -> str:
        return keys.key_id(keys.public_bytes(self.private[name]))

    def key_list(self, folder: Path, root: str = "root", **changes: Any) -> signing.Policy:
        """Return a policy that uses another list: the usual one with fields replaced."""
        usual = keys.read_key_list(self.policy.trusted_keys or "", self.policy.root_keys)
        path = folder / "keys.json"
        path.write_bytes(keys.key_list_bytes(dataclasses.replace(usual, **changes), self.private[root]))
        return dataclasses.replace(self.policy, trusted_keys=path)

    def make(self, folder: Path, **changes: Any) -> Bundle:
        parts: dict[str, Any] = {
            "name": "tiny",
            "family": "native",
            "graphs": {"decoder": SPEC},
            "files": {
                "graphs/decoder.onnx": GRAPH,
                "graphs/decoder.onnx.data": bytes(range(256)) * 4,
                "tokenizer/tokenizer.json": '{"肝": 1}'.encode(),
                "reports/card.md": b"# A small model\n",
                "NOTICE": b"terms",
            },
            "precision": {"decoder": "int8"},
            "versions": {"edgemed": "0.1.0", "bundle": "1.2"},
            "licences": {"weights": "Apache-2.0"},
            "settings": {"side": 256},
        }
        return write_bundle(folder, **{**parts, **changes})


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    folder = tmp_path_factory.mktemp("hospital")
    private = {}
    for name in ("root", "root-2", "vendor", "vendor-2", "vendor-old", "vendor-new", "vendor-lost", "site", "stranger"):
        keys.write_key_pair(folder / name)
        private[name] = keys.read_private_key(folder / f"{name}.key.pem")
    public = {name: keys.public_bytes(key) for name, key in private.items()}
    trusted = [
        keys.TrustedKey(public["vendor"], "vendor", "2020-01-01", "2999-12-31"),
        keys.TrustedKey(public["vendor-2"], "vendor"),
        keys.TrustedKey(public["vendor-old"], "vendor", "2001-01-01", "2001-12-31"),
        keys.TrustedKey(public["vendor-new"], "vendor", "2998-01-01"),
        keys.TrustedKey(public["vendor-lost"], "vendor"),
        keys.TrustedKey(public["site"], "site"),
    ]
    listed = keys.KeyList(0, "").changed(trusted).changed(revoke={keys.key_id(public["vendor-lost"]): "laptop stolen"})
    (folder / "keys.json").write_bytes(keys.key_list_bytes(listed, private["root"]))
    roots = (keys.key_id(public["root"]),)
    policy = signing.Policy(True, folder / "keys.json", roots, ("vendor", "site"))
    made = Hospital(folder, private, policy)
    made.make(made.template)
    made.sign(made.template, "vendor", "site")
    return made


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of this machine and no variable sets anything."""
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("edgemed.config.system_file", lambda: tmp_path / "none.toml")
    monkeypatch.delenv("EDGEMED_CONFIG", raising=False)
