"""Every kernel compiles, reads 16 bytes at a time or uses the matrix unit, and is described as it is."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgemed.errors import BackendUnavailable, InvalidInput
from edgemed.triton_kernels.aot import build_kernels, compile_variant, variants_for
from edgemed.triton_kernels.variants import TARGETS

if TYPE_CHECKING:
    from conftest import Built


@pytest.mark.parametrize("target", TARGETS)
def test_fp8_is_compiled_where_the_gpu_converts_it(target: int) -> None:
    names = [variant.name for variant in variants_for(target)]
    assert len(set(names)) == len(names)
    assert ("box_head.fp8" in names) == ("masked_argmax.fp8" in names) == (target >= 89)
    assert {name.split(".")[0] for name in names} == {"box_head", "masked_argmax", "accept_draft", "expert_gemv"}


@pytest.mark.slow
def test_every_kernel_compiles_and_is_described(built: Built) -> None:
    targets = sorted({target for _, target in built.compiled})
    for target in targets:
        folder = built.folder / f"sm_{target}"
        description = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
        assert description["target"] == target
        assert [entry["name"] for entry in description["kernels"]] == [v.name for v in variants_for(target)]
        for entry in description["kernels"]:
            code = (folder / entry["file"]).read_bytes()
            assert code.startswith(b"\x7fELF")
            assert (len(code), hashlib.sha256(code).hexdigest()) == (entry["bytes"], entry["sha256"])
            assert entry["triton"] == "3.6.0"


def test_no_kernel_needs_more_than_every_gpu_gives(built: Built) -> None:
    """Beyond 48 KiB of shared memory a launch would have to ask; scratch memory would have to be allocated."""
    for one in built.compiled.values():
        assert one.entry["shared_bytes"] <= 48 * 1024
        assert one.entry["scratch_bytes"] == 0


def test_cubins_hold_no_path_of_the_machine_that_compiled_them(built: Built) -> None:
    for one in built.compiled.values():
        assert not re.search(rb"\.py\b|/home|/tmp|/root", one.cubin)


def test_products_with_the_head_use_the_matrix_unit_and_read_16_bytes_at_a_time(built: Built) -> None:
    for (name, target), one in built.compiled.items():
        if name.startswith(("box_head", "masked_argmax")) and "combine" not in name:
            assert re.search(r"\b(mma\.sync|wgmma|tcgen05\.mma)", one.ptx), (name, target)
            assert re.search(r"cp\.async\.cg\.shared\.global[^;]*0x10", one.ptx), (name, target)
            assert "cvt.rn.f16.s16" not in one.ptx, (name, target)  # bits, not the slow conversion


def test_products_with_an_expert_read_16_bytes_at_a_time(built: Built) -> None:
    for (name, target), one in built.compiled.items():
        if name.startswith("expert_gemv"):
            assert "ld.global.v4" in one.ptx, (name, target)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("box_head.int8", ("HMMA.16816", "LDGSTS.E.BYPASS.128")),
        ("masked_argmax.fp16", ("HMMA.16816", "LDGSTS.E.BYPASS.128")),
        ("expert_gemv.fp16.up", ("LDG.E.128",)),
        ("expert_gemv.int4_block32.down", ("LDG.E.128",)),
    ],
)
@pytest.mark.parametrize("target", [80, 90, 120])
def test_machine_code_has_the_instructions_that_were_meant(
    built: Built, triton_folder: Path, name: str, expected: tuple[str, ...], target: int
) -> None:
    # LDGSTS copies past the registers into shared memory, for the matrix unit; LDG reads into registers.
    code = dump(triton_folder, "-sass", built.folder / f"sm_{target}" / f"{name}.cubin")
    for instruction in expected:
        assert instruction in code
    # The slow conversion: of some offsets, but of no weight, of which a thread has 16 and more.
    assert len(re.findall(r"\sI2F(?!P)", code)) < 16


def test_arguments_lie_in_the_machine_code_as_described(built: Built, triton_folder: Path) -> None:
    for variant in variants_for(90):
        entry = built.compiled[variant.name, 90].entry
        listing = dump(triton_folder, "-elf", built.folder / "sm_90" / entry["file"])
        # "Ordinal : 0x6 ... Size : 0x4", once for each parameter
        found = re.findall(r"Ordinal\s*:\s*0x([0-9a-f]+).*?Size\s*:\s*0x([0-9a-f]+)", listing, re.DOTALL)
        sizes = [8 if kind.startswith("*") else 4 for kind in variant.arguments.values()]
        assert [size for _, size in sorted((int(o, 16), int(s, 16)) for o, s in found)] == [
            *sizes,
            *[8] * entry["extra_pointers"],
        ]


def dump(triton_folder: Path, option: str, cubin: Path) -> str:
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_command_gives_the_same_bytes_again(built: Built, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgemed.triton_kernels.aot", str(tmp_path), "--target", "80"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "box_head.int8" in done.stdout
    first, again = built.folder / "sm_80", tmp_path / "sm_80"
    assert {file.name for file in first.iterdir()} == {file.name for file in again.iterdir()}
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_a_target_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"targets \[75\]"):
        build_kernels(tmp_path, (75, 80))


def test_a_variant_that_the_target_lacks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no kernel 'box_head.fp8' for sm_80"):
        compile_variant("box_head.fp8", 80)


def test_nothing_is_compiled_under_the_interpreter(triton_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        compile_variant("accept_draft", 80)


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailable, match=r"edgemed\[export\]"):
        compile_variant("accept_draft", 80)
