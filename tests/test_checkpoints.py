"""Checkpoints in every layout that is read, and one broken copy for each error."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgemed.checkpoints import check_keys, open_checkpoint
from edgemed.errors import CannotRead, InvalidInput, NoInput

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=torch.bfloat16),
    "c.count": torch.tensor(7),
    "d.none": torch.empty(0, 5, dtype=torch.float16),
}
SHARDS = ("model-00001-of-00002", "model-00002-of-00002")


def halves(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[:2], names[2:])]


def write(folder: Path, kind: str, tensors: Mapping[str, Tensor] = TENSORS, **config: Any) -> Path:
    """Write a checkpoint: `kind` is file, shards or index, then the suffix, as in "index.bin"."""
    layout, suffix = kind.split(".")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    parts = dict(zip(SHARDS, halves(tensors), strict=True)) if layout != "file" else {"model": dict(tensors)}
    for stem, part in parts.items():
        save(folder / f"{stem}.{suffix}", part)
    if layout == "index":
        write_index(folder, suffix, {name: f"{stem}.{suffix}" for stem, part in parts.items() for name in part})
    return folder


def save(file: Path, part: Mapping[str, Any]) -> None:
    if file.suffix == ".safetensors":
        save_file(dict(part), file)
    else:
        torch.save(dict(part), file)


def write_index(folder: Path, suffix: str, weight_map: object) -> None:
    (folder / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut(file: Path, bytes_left: int) -> None:
    file.write_bytes(file.read_bytes()[:bytes_left])


KINDS = [f"{layout}.{suffix}" for layout in ("file", "shards", "index") for suffix in ("safetensors", "bin")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_tensors_that_were_saved(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, kind))
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.names == tuple(sorted(TENSORS))
    for name, saved in TENSORS.items():
        read = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(saved.shape)
        assert checkpoint.dtype(name) == str(saved.dtype).removeprefix("torch.")
        assert read.dtype == saved.dtype
        assert torch.equal(read, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_shard_that_is_missing_is_named(kind: str, tmp_path: Path) -> None:
    layout, suffix = kind.split(".")
    write(tmp_path, kind)
    if layout == "file":
        (tmp_path / f"model.{suffix}").unlink()
        with pytest.raises(NoInput, match=r"no weights; expected model\.safetensors"):
            open_checkpoint(tmp_path)
    else:
        (tmp_path / f"{SHARDS[1]}.{suffix}").unlink()
        with pytest.raises(CannotRead, match=rf"1 of 2 shards missing \({SHARDS[1]}.{suffix}\); fetch the rest"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(("suffix", "bytes_left"), [("safetensors", 4), ("safetensors", 60), ("bin", 0), ("bin", 700)])
def test_cut_off_shard_is_named(suffix: str, bytes_left: int, tmp_path: Path) -> None:
    file = write(tmp_path, f"shards.{suffix}") / f"{SHARDS[0]}.{suffix}"
    cut(file, bytes_left)
    with pytest.raises((CannotRead, InvalidInput), match=re.escape(str(file))):
        open_checkpoint(tmp_path)


def test_cut_off_data_says_both_sizes(tmp_path: Path) -> None:
    file = write(tmp_path, "file.safetensors") / "model.safetensors"
    size = file.stat().st_size
    cut(file, size - 1)
    with pytest.raises(CannotRead, match=f"is cut off: {size - 1} bytes, {size} expected; fetch it again"):
        open_checkpoint(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "file.safetensors") / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(InvalidInput, match="1 bytes follow the last tensor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "tensor a has 4 bytes, expected 8"),
        ('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}', "dtype F4, expected one of F64"),
        ('{"a": {"dtype": "F32", "shape": [1]}}', "data_offsets"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "tensor a has -4 bytes"),
        ('{"a": 1, "a": 2}', "a key is there twice"),
        ("[1]", "header does not hold"),
        ("{", "header does not hold"),
    ],
)
def test_header_that_does_not_hold_is_refused(header: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, "file.safetensors") / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(InvalidInput, match=message):
        open_checkpoint(tmp_path)


def test_odd_header_length_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, "file.safetensors") / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = torch.tensor([1.5, -3.0])
    for padding in range(4):
        padded = header + b" " * padding
        file.write_bytes(len(padded).to_bytes(8, "little") + padded + data.numpy().tobytes())
        assert torch.equal(open_checkpoint(tmp_path).read("a"), data)


def test_git_lfs_pointer_is_told_from_weights(tmp_path: Path) -> None:
    file = write(tmp_path, "file.bin") / "model.bin"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CannotRead, match="is a Git LFS pointer"):
        open_checkpoint(tmp_path)


class Code:
    """What a hostile checkpoint holds: unpickling it calls a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "file.bin") / "model.bin"
    torch.save({"a.weight": Code()}, file)
    with pytest.raises(InvalidInput, match=r"model\.bin: the pickle names \w+\.mkdir, which could run code; only"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_pickle_of_an_old_torch_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "file.bin") / "model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidInput, match=r"not saved by torch 1\.6 or later; save it again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "found"), [([1], "holds a list"), ({"a": 3}, "entry 'a' is a int"), ({}, "dict")])
def test_pickle_of_something_else_is_refused(content: object, found: str, tmp_path: Path) -> None:
    torch.save(content, write(tmp_path, "file.bin") / "model.bin")
    with pytest.raises(InvalidInput, match=found):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_index_that_lies_is_refused(suffix: str, tmp_path: Path) -> None:
    write(tmp_path, f"index.{suffix}")
    first, second = (f"{stem}.{suffix}" for stem in SHARDS)
    true = {"a.weight": first, "b.weight": first, "c.count": second, "d.none": second}
    write_index(tmp_path, suffix, {**true, "e.weight": second})
    with pytest.raises(InvalidInput, match=f"the index puts tensor e.weight in {second}, but no shard has it"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, suffix, {**true, "a.weight": second})
    with pytest.raises(InvalidInput, match=f"puts tensor a.weight in {second}, but it is in {first}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [(None, "has no weight_map"), ({"a": "../model.bin"}, "file of the same folder"), ({"a": 3}, "names 3")],
)
def test_index_that_is_none_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    write_index(write(tmp_path, "file.safetensors"), "safetensors", weight_map)
    with pytest.raises(InvalidInput, match=message):
        open_checkpoint(tmp_path)


def test_two_indexes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "index.safetensors")
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(InvalidInput, match="2 indexes, expected one"):
        open_checkpoint(tmp_path)


def test_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "shards.safetensors")
    save(tmp_path / f"{SHARDS[1]}.safetensors", TENSORS)
    with pytest.raises(InvalidInput, match=f"tensor a.weight is in {SHARDS[0]}.safetensors and in {SHARDS[1]}"):
        open_checkpoint(tmp_path)


def test_shards_of_two_series_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "shards.safetensors")
    save(tmp_path / "old-00001-of-00001.safetensors", TENSORS)
    with pytest.raises(InvalidInput, match=r"shards of 2 series \(model of 00002, old of 00001\)"):
        open_checkpoint(tmp_path)


def test_published_mixture_of_layouts_reads_the_safetensors(tmp_path: Path) -> None:
    """Both kinds of shards lie in the folder, and only the pickles have an index."""
    write(tmp_path, "index.bin", {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
    write(tmp_path, "shards.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert {stored.file.suffix for stored in checkpoint.stored.values()} == {".safetensors"}
    for shard in SHARDS:
        (tmp_path / f"{shard}.safetensors").unlink()
    assert not open_checkpoint(tmp_path).read("a.weight").any()


def test_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match=r"config\.json cannot be read"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(NoInput, match="no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds a list"), ("\xff", "is not JSON")])
def test_config_that_is_no_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (write(tmp_path, "file.bin") / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InvalidInput, match=message):
        open_checkpoint(tmp_path)


def test_other_family_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    write(tmp_path, "file.bin", model_type="llava")
    (tmp_path / "model.bin").unlink()
    with pytest.raises(InvalidInput, match="model_type in config.json is 'llava', expected 'tiny' or 'small'"):
        open_checkpoint(tmp_path, model_types=("tiny", "small"))


def test_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no tensor z among its 4"):
        open_checkpoint(write(tmp_path, "file.safetensors")).read("z")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_file_that_goes_away_while_reading_is_named(suffix: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, f"file.{suffix}"))
    (tmp_path / f"model.{suffix}").unlink()
    with pytest.raises(CannotRead, match=f"model.{suffix}"):
        checkpoint.read("a.weight")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_writing_to_a_tensor_leaves_the_file(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"file.{suffix}") / f"model.{suffix}"
    before = file.read_bytes()
    open_checkpoint(tmp_path).read("a.weight").zero_()
    assert file.read_bytes() == before


def test_checkpoint_larger_than_the_memory_is_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    """32 GiB, of which the disk holds 2 pages: every tensor is opened, its ends are read, and little memory is used."""
    resource = pytest.importorskip("resource", reason="peak memory is asked of a POSIX system")
    count, size = 64, 1 << 29
    entries = {
        f"layer.{i}": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # as writers do: unaligned tensors would be copied
    file = write(tmp_path, "file.safetensors") / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        try:
            stream.truncate(8 + len(header) + count * size)
        except OSError as error:
            pytest.skip(f"the temporary folder takes no sparse file of 32 GiB: {error}")
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\x80\x3f")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_checkpoint(tmp_path)
    ends = [checkpoint.read(f"layer.{i}")[[0, -1]].tolist() for i in range(count)]
    assert ends == [[0, 0]] * (count - 1) + [[0, 1]]
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
    assert grown_bytes < size / 4


def test_keys_missing_and_too_many_are_counted_and_named() -> None:
    names = ["a", "e.inv_freq", *"pqrst"]
    check_keys(names, names[:2], names[2:])
    with pytest.raises(InvalidInput, match=r"json: 1 tensor is missing \(b\), 5 are unknown \(p, q, r, \.\.\.\)$"):
        check_keys(names, ["a", "b"], ["e.inv_freq"])
    with pytest.raises(InvalidInput, match=r"json: 5 tensors are unknown \(p, q, r, \.\.\.\)$"):
        check_keys(names, ["a"], ["e.inv_freq"])


# Extra files and wrapped names


@pytest.mark.parametrize("wrapper", ["", "model", "module", "state_dict"])
def test_extra_file_gets_its_prefix_and_replaces(wrapper: str, tmp_path: Path) -> None:
    write(tmp_path / "base", "file.safetensors")
    new = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    save(tmp_path / "sam.pth", {wrapper: new, "epoch": 3} if wrapper else new)
    checkpoint = open_checkpoint(tmp_path / "base", extra={"a.": tmp_path / "sam.pth"})
    assert checkpoint.replaced == ("a.weight",)
    assert set(checkpoint.names) == {*TENSORS, "a.bias"}
    assert torch.equal(checkpoint.read("a.weight"), new["weight"])


def test_extra_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, "file.safetensors")
    with pytest.raises(CannotRead, match=r"sam\.pth cannot be read"):
        open_checkpoint(tmp_path, extra={"": tmp_path / "sam.pth"})


def wrapped(rank: int = 2) -> dict[str, Tensor]:
    """Return tensors as a trainer leaves them: an adapter on one of two matrices, one module trained whole."""
    draw = torch.Generator().manual_seed(3)
    inner = "module.language_model.base_model.model.layers.0"
    return {
        f"{inner}.q.base_layer.weight": torch.randn(6, 5, generator=draw),
        f"{inner}.q.lora_A.default.weight": torch.randn(rank, 5, generator=draw),
        f"{inner}.q.lora_B.default.weight": torch.randn(6, rank, generator=draw),
        f"{inner}.k.weight": torch.randn(4, 5, generator=draw),
        f"{inner}.head.original_module.weight": torch.zeros(2, 2),
        f"{inner}.head.modules_to_save.default.weight": torch.ones(2, 2),
    }


def merged(tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    w, a, b = (next(v for k, v in tensors.items() if part in k) for part in ("q.base_layer", "lora_A", "lora_B"))
    return w.double() + scale * (b.double() @ a.double())


@pytest.mark.parametrize("kind", ["file.safetensors", "index.bin"])
@pytest.mark.parametrize(
    ("config", "adapter", "given", "scale"),
    [
        ({}, {"lora_alpha": 16}, None, 8),
        ({}, {"lora_alpha": 16, "use_rslora": True}, None, 16 / 2**0.5),
        ({"lora_alpha": 3}, None, None, 1.5),
        ({"use_llm_lora": 2}, None, None, 2),
        ({"use_llm_lora": 2}, {"lora_alpha": 16}, 1, 0.5),
    ],
)
def test_adapter_is_merged_and_wrappers_leave_the_names(
    kind: str, config: dict[str, Any], adapter: dict[str, Any] | None, given: float | None, scale: float, tmp_path: Path
) -> None:
    tensors = wrapped()
    write(tmp_path, kind, tensors, **config)
    if adapter is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    checkpoint = open_checkpoint(tmp_path, lora_alpha=given)
    layer = "language_model.layers.0"
    assert checkpoint.names == (f"{layer}.head.weight", f"{layer}.k.weight", f"{layer}.q.weight")
    assert checkpoint.shape(f"{layer}.q.weight") == (6, 5)
    torch.testing.assert_close(checkpoint.read(f"{layer}.q.weight").double(), merged(tensors, scale), atol=1e-5, rtol=0)
    assert torch.equal(
        checkpoint.read(f"{layer}.k.weight"), tensors[f"module.{'language_model.base_model.model.layers.0'}.k.weight"]
    )
    assert checkpoint.read(f"{layer}.head.weight").all()


@pytest.mark.parametrize("beside", [True, False])
def test_adapter_in_a_file_of_its_own_is_merged_into_bfloat16(beside: bool, tmp_path: Path) -> None:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    write(tmp_path, "file.safetensors", {"model.q.weight": base, "model.head.weight": torch.zeros(2, 2)})
    folder = tmp_path if beside else tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    factors = {
        "base_model.model.model.q.lora_A.weight": torch.full((2, 5), 0.5),
        "base_model.model.model.q.lora_B.weight": torch.full((6, 2), 0.25),
        "base_model.model.model.head.weight": torch.ones(2, 2),
    }
    save(folder / "adapter_model.safetensors", factors)
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4}')
    checkpoint = open_checkpoint(tmp_path, extra=None if beside else {"": folder / "adapter_model.safetensors"})
    assert checkpoint.replaced == ("model.head.weight",)
    assert checkpoint.read("model.head.weight").all()
    assert torch.equal(checkpoint.read("model.q.weight"), (base.float() + 0.5).bfloat16())


Q = "module.language_model.base_model.model.layers.0.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_A.default.weight": None}, "its lora_A is missing"),
        ({f"{Q}.lora_B.default.weight": None}, "its lora_B is missing"),
        ({f"{Q}.base_layer.weight": None}, "the tensor itself is missing"),
        ({f"{Q}.lora_B.default.weight": torch.ones(6, 3)}, r"lora_B \[6, 3\] times lora_A \[2, 5\] does not fit"),
        ({f"{Q}.lora_A.second.weight": torch.ones(2, 5)}, "more than one adapter"),
        ({f"{Q}.lora_magnitude_vector.default.weight": torch.ones(6)}, "is no lora_A or lora_B"),
        ({f"{Q}.weight": torch.ones(6, 5)}, "both are"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in {**wrapped(), **change}.items() if tensor is not None}
    write(tmp_path, "file.safetensors", tensors, lora_alpha=4)
    with pytest.raises(InvalidInput, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (None, "neither adapter_config.json nor config.json says lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": 16, "alpha_pattern": {"q": 3}}, "alpha_pattern is set, which is not supported"),
    ],
)
def test_adapter_of_unknown_scale_is_refused(adapter: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    write(tmp_path, "file.safetensors", wrapped())
    if adapter is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(InvalidInput, match=message):
        open_checkpoint(tmp_path)


# The published layouts


@pytest.mark.parametrize(("family", "count"), [("medrega-tiny", 92), ("medplib-tiny", 352)])
def test_reference_checkpoint_is_read_as_the_library_reads_it(family: str, count: int, reference: Any) -> None:
    from safetensors.torch import load_file

    folder = reference(family).folder
    checkpoint = open_checkpoint(folder)
    expected = load_file(folder / "model.safetensors")
    check_keys(checkpoint.names, expected)
    assert len(checkpoint.names) == count
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_reference_checkpoint_in_shards_equals_the_single_file(reference: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(reference("medrega-tiny").folder)
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, file in enumerate(files):
        save(tmp_path / file, {name: checkpoint.read(name).clone() for name in checkpoint.names[number::3]})
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    for index in (False, True):
        if index:
            spread = {name: files[place % 3] for place, name in enumerate(checkpoint.names)}
            write_index(tmp_path, "safetensors", spread)
        sharded = open_checkpoint(tmp_path, model_types=["internvl_chat"])
        assert sharded.names == checkpoint.names
        assert all(torch.equal(sharded.read(name), checkpoint.read(name)) for name in checkpoint.names)


def test_reference_pickles_are_the_tensors_in_bfloat16(reference: Any, tmp_path: Path) -> None:
    tiny = reference("medplib-tiny")
    full = tiny / "bin"
    for file in [tiny.folder / "config.json", *full.iterdir()]:
        (tmp_path / file.name).symlink_to(file)
    checkpoint, single = open_checkpoint(tmp_path), open_checkpoint(full.parent)
    assert checkpoint.names == single.names
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {"bfloat16"}
    assert all(torch.equal(checkpoint.read(name), single.read(name).bfloat16()) for name in checkpoint.names[::7])
