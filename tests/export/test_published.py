"""Published checkpoints become bundles: whole, gone on with after a stop, or not at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from edgemed.backends import open_runner
from edgemed.bundle import Bundle, open_bundle
from edgemed.checkpoints import Checkpoint, open_checkpoint
from edgemed.errors import BundleError, CannotWrite
from edgemed.export.graph_writer import MatrixFormat
from edgemed.export.published import Conversion, Progress, estimated_bytes, write_published_bundle
from edgemed.families import open_family
from edgemed.families.opened_torch import describe
from edgemed.families.published_torch import Published, PublishedTensors

MAKE = Path(__file__).resolve().parents[1] / "bench" / "make_checkpoint.py"
CACHE = 64
TWO = ("projector", "decoder")

# The full references have the same sizes; other digits of their weights change nothing here.
compact = pytest.mark.parametrize("reference", ["compact"], indirect=True)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", MAKE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_checkpoint"] = module  # where its dataclass looks its own annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 MedRegA checkpoint of small size in one file."""
    path = tmp_path_factory.mktemp("made") / "medrega"
    tool.make("medrega", path, scale="small")
    return path


def opened(folder: Path, *roles: str, **options: Any) -> tuple[Checkpoint, Published]:
    """Return a checkpoint and what of it is exported: only `roles` if there are any, which takes less time."""
    checkpoint = open_checkpoint(folder, **options)
    published = describe(checkpoint, cache=CACHE)
    if not roles:
        return checkpoint, published
    kept = {name: {role: getattr(published, name)[role] for role in roles} for name in ("specs", "modules", "tensors")}
    return checkpoint, dataclasses.replace(published, **kept)  # type: ignore[arg-type]


def conversion(precision: str = "fp32", *roles: str, block: int = 32) -> Conversion:
    return Conversion("tiny", {role: MatrixFormat(precision, block) for role in roles})  # type: ignore[arg-type]


def write(
    folder: Path,
    output: Path,
    how: Conversion | None = None,
    roles: tuple[str, ...] = ("decoder",),
    extra: Mapping[str, Path] | None = None,
    **options: Any,
) -> Bundle:
    return write_published_bundle(*opened(folder, *roles, extra=extra), output, how or conversion(), **options)


def graphs(bundle: Bundle) -> dict[str, str]:
    """Return the digests of the graphs and their weights, by file name."""
    return {name: digest for name, digest in bundle.manifest.files.items() if name.startswith("graphs/")}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_at(share: float) -> Progress:
    """Return a progress that stops the run as Ctrl-C does, after a share of the weights."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


@compact
@pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])
def test_a_checkpoint_becomes_a_bundle_that_opens_and_runs(reference: Any, tmp_path: Path, family: str) -> None:
    checkpoint, published = opened(reference(family).folder)
    weights = sum(int(np.prod(published.tensors[role][n].shape)) for role in published.specs
                  for n in published.tensors[role])  # fmt: skip
    seen: list[tuple[int, int]] = []
    bundle = write_published_bundle(
        checkpoint, published, tmp_path / "b", conversion(), progress=lambda done, total: seen.append((done, total))
    )
    assert left(tmp_path) == ["b"]
    assert open_bundle(tmp_path / "b").digest == bundle.digest
    assert bundle.manifest.family == family.removesuffix("-tiny")
    assert set(bundle.manifest.precision.values()) == {"fp32"}
    assert set(open_family(bundle).graphs()) == set(published.specs)
    assert seen == sorted(seen)
    assert seen[-1] == (weights, weights)
    size = sum(p.stat().st_size for p in (bundle.path / "graphs").iterdir())
    assert estimated_bytes(published, conversion()) == pytest.approx(size, rel=0.1)
    spec = bundle.spec("decoder")
    runner = open_runner("onnxruntime", bundle.graph_path("decoder"), spec, device="cpu", threads=1)
    one = np.array([1])
    rows = np.zeros((1, published.decoder.width), np.float32)
    out = runner.run({"input_ids": one[None], "image_tokens": rows, "past_length": one * 0, "logits_from": one * 0})
    runner.close()
    assert out["logits"].shape == (1, 1, published.decoder.vocabulary)
    assert np.isfinite(out["logits"]).all()


# --- runs that were stopped -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The graphs of a run that was never stopped."""
    return graphs(write(folder, tmp_path_factory.mktemp("whole") / "b", roles=TWO))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that are read, in order."""
    names: list[str] = []
    plain = PublishedTensors.__getitem__

    def watched(self: PublishedTensors, name: str) -> Any:
        names.append(name)
        return plain(self, name)

    monkeypatch.setattr(PublishedTensors, "__getitem__", watched)
    return names


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_a_stopped_run_is_gone_on_with_and_gives_the_same_bytes(
    folder: Path, whole: dict[str, str], tmp_path: Path, reads: list[str], share: float
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "b", roles=TWO, progress=stop_at(share))
    assert left(tmp_path) == [".b.part"]
    large = {f"layers.{i}.{part}.weight" for i in range(9) for part in ("qkv", "out", "gate_up", "down")} & set(reads)
    reads.clear()
    assert graphs(write(folder, tmp_path / "b", roles=TWO)) == whole
    assert not large & set(reads)
    assert left(tmp_path) == ["b"]


def test_a_run_that_is_stopped_while_its_graphs_are_checked_writes_none_of_them_again(
    folder: Path, whole: dict[str, str], tmp_path: Path, reads: list[str]
) -> None:
    def stop(paths: Mapping[str, Path]) -> dict[str, bytes]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "b", check=stop)
    reads.clear()
    assert graphs(write(folder, tmp_path / "b")).items() <= whole.items()
    assert reads == []


def test_another_format_starts_anew(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "b", progress=stop_at(0.9))
    stopped = set(reads)
    reads.clear()
    bundle = write(folder, tmp_path / "b", conversion("int8", "decoder"))
    assert stopped <= set(reads)
    assert bundle.manifest.precision == {"decoder": "int8"}
    assert graphs(bundle) == graphs(write(folder, tmp_path / "fresh", conversion("int8", "decoder")))


def test_a_file_given_beside_the_folder_starts_anew(
    tool: ModuleType, folder: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    tool.make("medrega", tmp_path / "other", scale="small", seed=5)
    extra = {"": next((tmp_path / "other").glob("*.safetensors"))}
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "b", extra=extra, progress=stop_at(0.9))
    assert graphs(write(folder, tmp_path / "b")).items() <= whole.items()


# --- runs that fail ---------------------------------------------------------------------------------------------------


def test_graphs_that_do_not_agree_leave_nothing(folder: Path, tmp_path: Path) -> None:
    def refuse(paths: Mapping[str, Path]) -> dict[str, bytes]:
        assert all(path.is_file() for path in paths.values())
        raise BundleError("the decoder does not compute what torch does")

    with pytest.raises(BundleError, match="does not compute"):
        write(folder, tmp_path / "b", check=refuse)
    assert left(tmp_path) == []


def test_reports_of_the_check_go_into_the_bundle(folder: Path, tmp_path: Path) -> None:
    bundle = write(folder, tmp_path / "b", roles=("decoder",), check=lambda _: {"reports/parity.json": b"{}"})
    assert bundle.file("reports/parity.json").read_bytes() == b"{}"


def test_a_disk_without_room_is_found_before_anything_is_written(
    folder: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CannotWrite, match=r"the bundle needs about 0\.\d GB and .* has 0\.0 GB free") as caught:
        write(folder, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert reads == []
    assert left(tmp_path) == []


def test_what_a_stopped_run_has_written_needs_no_room_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "b", progress=stop_at(0.99))
    free = estimated_bytes(opened(folder, "decoder")[1], conversion()) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free))
    write(folder, tmp_path / "b")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The process's own limit on file sizes stands for a disk that fills up: the system takes a part, then refuses."""
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 60_000, 200_000])
def test_a_disk_that_fills_up_leaves_nothing_and_says_so_in_one_line(folder: Path, tmp_path: Path, size: int) -> None:
    with largest_file(size), pytest.raises(CannotWrite, match=r"cannot write .*File too large") as caught:
        write(folder, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_a_folder_that_is_taken_is_refused_before_the_work(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    taken = tmp_path / "b"
    taken.mkdir()
    (taken / "thesis.txt").write_text("precious")
    for replace, message in ((False, "it exists already"), (True, "not a bundle")):
        with pytest.raises(CannotWrite, match=message):
            write(folder, taken, replace=replace)
    assert reads == []
    assert left(tmp_path) == ["b"]
    assert left(taken) == ["thesis.txt"]


def test_an_older_bundle_is_replaced_only_when_asked(folder: Path, tmp_path: Path) -> None:
    old = write(folder, tmp_path / "b", roles=("decoder",))
    with pytest.raises(CannotWrite, match="it exists already"):
        write(folder, tmp_path / "b", conversion("int4", "decoder"), roles=("decoder",))
    assert open_bundle(tmp_path / "b").digest == old.digest
    new = write(folder, tmp_path / "b", conversion("int4", "decoder"), roles=("decoder",), replace=True)
    assert open_bundle(tmp_path / "b").digest == new.digest != old.digest
    assert left(tmp_path) == ["b"]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_one_file_or_many_give_the_same_graphs(
    tool: ModuleType, folder: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    tool.make("medrega", tmp_path / "sharded", scale="small", shard_bytes=300_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert graphs(write(tmp_path / "sharded", tmp_path / "b")).items() <= whole.items()


@compact
def test_weights_stored_in_bfloat16_take_half_the_room(reference: Any, tmp_path: Path) -> None:
    tiny = reference("medplib-tiny")
    half = tmp_path / "half"
    shutil.copytree(tiny.folder, half, ignore=shutil.ignore_patterns("*.safetensors", "*.npz", "*.png"))
    for file in (tiny / "bin").iterdir():
        shutil.copyfile(file, half / file.name)
    sizes = {}
    for name, folder in (("whole", tiny.folder), ("half", half)):
        bundle = write(folder, tmp_path / f"{name}.bundle")
        data = bundle.file("graphs/decoder.onnx.data")
        stored = [t for t in initializers(bundle, "decoder").values() if t.external_data]
        sizes[name] = sum(int(e.value) for t in stored for e in t.external_data if e.key == "length")
        assert sizes[name] <= data.stat().st_size
    assert sizes["half"] == sizes["whole"] / 2


def initializers(bundle: Bundle, role: str) -> dict[str, onnx.TensorProto]:
    model = onnx.load(bundle.graph_path(role), load_external_data=False)
    return {t.name: t for t in model.graph.initializer}


@pytest.mark.parametrize(("precision", "bits"), [("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("block", [32, 64])
def test_packed_sizes_are_what_the_arithmetic_says(
    folder: Path, tmp_path: Path, precision: str, bits: int, block: int
) -> None:
    _, published = opened(folder, "decoder")
    bundle = write(folder, tmp_path / "b", conversion(precision, "decoder", block=block), roles=("decoder",))
    assert bundle.manifest.precision == {"decoder": precision}
    stored = initializers(bundle, "decoder")
    lengths = {n: int(e.value) for n, t in stored.items() for e in t.external_data if e.key == "length"}
    matrices = [(n, tuple(p.shape)) for n, p in published.modules["decoder"].state_dict().items() if p.ndim == 2]
    assert lengths.pop("embedding.weight") == 2 * published.decoder.vocabulary * published.decoder.width
    for name, (rows, columns) in matrices:
        if name != "embedding.weight":
            blocks = rows * -(-columns // block)
            assert lengths.pop(f"{name}.{precision}") == blocks * block * bits / 8
            assert lengths.pop(f"{name}.scales", 4 * blocks) == 4 * blocks  # a small one lies in the graph
    assert not lengths


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("family", ["medrega", "medplib"])
def test_the_estimate_is_within_5_per_cent(tool: ModuleType, tmp_path: Path, family: str, precision: str) -> None:
    width = {"medrega": "llm_config.hidden_size", "medplib": "hidden_size"}[family]
    tool.make(family, tmp_path / "made", {width: 288}, scale="small")
    how = conversion(precision, "decoder")
    bundle = write(tmp_path / "made", tmp_path / "b", how)
    size = sum(p.stat().st_size for p in (bundle.path / "graphs").iterdir())
    estimate = estimated_bytes(opened(tmp_path / "made", "decoder")[1], how)
    assert estimate == pytest.approx(size, rel=0.05)
