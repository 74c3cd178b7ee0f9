"""`edgemed compile`: engines for named GPUs and for the one that is there, cubins, and what is told if none can be."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemed.backends import cuda_device
from edgemed.backends.cuda_device import Gpu
from edgemed.backends.engine_build import ANY, graph_key, open_or_build
from edgemed.backends.engine_cache import engines_folder
from edgemed.bundle import Bundle, open_bundle, read_manifest, write_bundle
from edgemed.cli import main, verbs
from edgemed.errors import BackendUnavailable
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

Captured = pytest.CaptureFixture[str]

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (extra: edgemed[gpu])"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (extra: edgemed[export], on Linux)"
)

SPEC = GraphSpec(
    "projector",
    (TensorSpec("x", "float32", ("rows", 8)),),
    (TensorSpec("z", "float32", ("rows", 8)),),
    {"rows": DimRange(1, 2, 16)},
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of one graph that every library takes."""
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 8]) for n in ("x", "z")]
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "g", infos[:1], infos[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return write_bundle(
        tmp_path / "bundle", name="small", family="native", graphs={"projector": SPEC},
        precision={"projector": "fp32"}, versions={"torch": "2.13"}, settings={"compat": "corrected"},
        licences={"weights": "Apache-2.0"}, calibration_digest="c" * 64,
        files={"graphs/projector.onnx": model.SerializeToString(), "NOTICE": b"made by a test\n",
               "kernels/sm_80/old.cubin": b"old", "kernels/sm_80/kernels.json": b"{}"},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(verbs.VERBS, "compile", "")
    return tmp_path / "home"


def no_gpu(index: int = 0) -> Gpu:
    raise BackendUnavailable("no NVIDIA driver: libcuda.so.1 was not found. Install the driver, or use the CPU")


# --- engines ----------------------------------------------------------------------------------------------------------


@needs_library
def test_both_spellings_of_a_target_name_one_engine_which_is_kept(
    bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    command = ["compile", str(bundle.path), "-o", str(tmp_path / "out")]
    assert main([*command, "--target", "sm_89", "--target", "sm89", "--target", "any"]) == 0
    first = capsys.readouterr()
    assert [line.split("projector.fp32.")[1].split(".")[0] for line in first.out.splitlines()] == ["sm_89", "any"]
    assert first.err == ""
    assert main([*command, "--target", "sm89"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("kept")
    assert all(path.stat().st_mode & 0o77 == 0 for path in (tmp_path / "out").iterdir())


@needs_library
def test_without_a_gpu_and_a_target_it_builds_for_any_and_says_so(
    bundle: Bundle, home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "find_gpu", no_gpu)
    assert main(["compile", str(bundle.path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(str(home / "engines" / "projector.fp32.any."))
    assert told.err == (
        "note: no NVIDIA driver: libcuda.so.1 was not found; building for any GPU from sm_80 on, name others with "
        "--target\n"
    )
    assert main(["compile", str(bundle.path), "-q"]) == 0
    assert capsys.readouterr().err == ""


@needs_library
def test_with_a_gpu_the_back_end_finds_what_was_compiled(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "find_gpu", lambda index=0: Gpu(index, "NVIDIA Test", 89))
    assert main(["compile", str(bundle.path)]) == 0
    assert "projector.fp32.sm_89." in capsys.readouterr().out
    path = bundle.graph_path("projector")
    told: list[str] = []
    assert open_or_build(path, SPEC, ("sm_89", ANY), engines_folder(), bytes, told.append)
    assert told == []  # nothing was built
    assert (engines_folder() / graph_key(path, SPEC, "sm_89").file_name).is_file()


@needs_library
@pytest.mark.parametrize("arguments", [[], ["--target", "sm_90"], ["--target", "sm100"]])
def test_a_gpu_that_the_library_does_not_know_is_an_error_with_those_it_does(
    arguments: list[str], bundle: Bundle, home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "find_gpu", lambda index=0: Gpu(index, "NVIDIA H200", 90))
    assert main(["compile", str(bundle.path), *arguments]) == (22 if arguments else 82)
    (line,) = capsys.readouterr().err.splitlines()
    assert "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121" in line
    assert not home.exists()


@needs_library
def test_a_fused_bundle_is_code_80_with_the_operator_and_what_to_do(tmp_path: Path, capsys: Captured) -> None:
    assert main(["compile", "nano", "--target", "sm_89", "-o", str(tmp_path / "out")]) == 80
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not take operator MatMulNBits" in line
    assert "`edgemed export --target tensorrt`" in line


def test_a_missing_library_is_code_82_and_names_the_extra(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["compile", str(bundle.path), "--target", "sm_89"]) == 82
    assert "edgemed[gpu]" in capsys.readouterr().err


@needs_library
def test_a_folder_that_cannot_be_written_is_code_40(bundle: Bundle, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "taken").write_text("a file")
    assert main(["compile", str(bundle.path), "--target", "any", "-o", str(tmp_path / "taken")]) == 40
    assert "cannot write" in capsys.readouterr().err


@needs_library
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_ctrl_c_ends_the_build_and_leaves_nothing_half_written(tmp_path: Path, home: Path) -> None:
    """On a terminal, which shows progress; the signal comes once it does. The build takes seconds without it."""
    nano = open_bundle("nano")
    write_bundle(
        tmp_path / "slow", name="slow", family="native", graphs={"vision_encoder": nano.spec("vision_encoder")},
        precision={"vision_encoder": "fp32"},
        files={"graphs/vision_encoder.onnx": nano.graph_path("vision_encoder")},
    )  # fmt: skip
    code = (
        "import sys; from edgemed.cli import verbs; verbs.VERBS.setdefault('compile', '')\n"
        f"sys.exit(verbs.main(['compile', {str(tmp_path / 'slow')!r}, '--target', 'sm_89']))"
    )
    terminal, other = os.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stderr=other, stdout=subprocess.PIPE) as child:
        os.close(other)
        shown = b""
        while b"vision_encoder for sm_89: step" not in shown:
            shown += os.read(terminal, 1000)
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
    os.close(terminal)
    assert (child.returncode, out) == (130, b"")
    assert not home.exists()


# --- kernels ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_a_copy_with_cubins_keeps_everything_else(bundle: Bundle, tmp_path: Path, capsys: Captured) -> None:
    (bundle.path / "bundle.sig").write_bytes(b"signed")
    assert (
        main(["compile", str(bundle.path), "--backend", "triton", "--target", "sm120", "-o", f"{tmp_path}/copy"]) == 0
    )
    told = capsys.readouterr()
    assert "compiling kernels for sm_120" in told.err
    assert "not signed" in told.err
    copy, before = open_bundle(tmp_path / "copy").manifest, bundle.manifest
    assert {k: v for k, v in copy.files.items() if not k.startswith("kernels/")} == {
        k: v for k, v in before.files.items() if not k.startswith("kernels/")
    }
    kernels = {name for name in copy.files if name.startswith("kernels/")}
    assert {name.split("/")[1] for name in kernels} == {"sm_120"}  # and none of the old ones
    listed = json.loads((tmp_path / "copy" / "kernels" / "sm_120" / "kernels.json").read_text())["kernels"]
    assert kernels == {"kernels/sm_120/kernels.json", *(f"kernels/sm_120/{k['file']}" for k in listed)}
    assert f"with {len(listed)} kernels" in told.out
    assert copy.versions == {"torch": "2.13", "triton": listed[0]["triton"]}
    for field in ("name", "family", "graphs", "precision", "settings", "licences", "calibration_digest"):
        assert getattr(copy, field) == getattr(before, field), field


@needs_triton
def test_a_folder_that_is_taken_stays_as_it_is(bundle: Bundle, capsys: Captured) -> None:
    before = read_manifest(bundle.path)
    assert main(["compile", str(bundle.path), "--backend", "triton", "--target", "80", "-o", str(bundle.path)]) == 22
    assert main(["compile", str(bundle.path), "--backend", "triton", "--target", "sm_80", "-o", str(bundle.path)]) == 40
    assert "it exists already" in capsys.readouterr().err
    assert read_manifest(bundle.path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 1, "say where with -o FOLDER"),
        (["-o", "copy", "--target", "sm_75"], 22, "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, any"),
    ],
)
def test_kernels_need_a_folder_and_a_target_that_there_is(
    arguments: list[str], code: int, told: str, bundle: Bundle, capsys: Captured
) -> None:
    assert main(["compile", str(bundle.path), "--backend", "triton", *arguments]) == code
    assert told in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_it_is_code_82_and_names_the_extra(bundle: Bundle, capsys: Captured) -> None:
    assert main(["compile", str(bundle.path), "--backend", "triton", "-o", "copy"]) == 82
    assert "edgemed[export]" in capsys.readouterr().err
