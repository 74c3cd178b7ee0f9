"""What two experts cost where a token needs one: time, bytes read and memory, as Markdown tables.

    python tests/bench/bench_moe.py                     all three parts, 20 minutes; 8 GB of memory, 4 GB of disk
    python tests/bench/bench_moe.py decoder             a decoder of 4 layers of width 2048 beside a dense one
    python tests/bench/bench_moe.py layer               one layer's MLP in every form a graph can give it
    python tests/bench/bench_moe.py tensorrt            the portable forms (opset 24) in TensorRT-RTX: parse, build

Step: the least wall time and the median processor time of one call through the Runner, the graphs of a table in turn,
so that what else runs on the machine meets all of them. On a busy machine use `--threads 1`, where processor time
leaves out what others take (with more, threads that wait count too). Prefill: the least processor time of 256 tokens.

Touched (Linux): the memory of the pages whose accessed bit a step set, by /proc/self/clear_refs before and smaps_rollup
after it, in a process that holds this graph alone; what a call of no work touches is taken off. How far that can be
trusted is measured first, on a buffer of known size. Memory: resident in that process after a step, less what it held
before the graph was opened; private: what is no page of the weight file.

Off: the largest difference from `edgemed.models.moe.TopOneExperts` with the same rounded weights, as a share of its
largest output. Weights are random: speed does not depend on them, and such a router takes both experts equally often.
"""

from __future__ import annotations

import argparse
import datetime
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from machine import processor
from onnx import TensorProto, helper

from edgemed.backends import open_runner
from edgemed.backends.onnxruntime_runner import physical_cores
from edgemed.blocks import as_float32, pack_rows, unpack_rows
from edgemed.export.decoder_graph import DecoderBuilder
from edgemed.export.graph_writer import FUSED, GraphWriter, MatrixFormat, WeightFile
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, Feeds, GraphSpec, TensorSpec
from edgemed.models.llama import LlamaConfig
from edgemed.models.moe import MoeLlama, TopOneExperts

Array = npt.NDArray[Any]
Tensors = Mapping[str, Any]

SIZES = LlamaConfig(
    vocabulary=8000, width=2048, layers=4, heads=16, kv_heads=16, head_dim=128, inner=5504, tied=False, bins=0
)
ONE_LAYER = LlamaConfig(vocabulary=2, width=2048, layers=1, inner=5504, bins=0)
FOR_TENSORRT = LlamaConfig(vocabulary=2, width=1024, layers=1, inner=2816, bins=0)
CACHE = 512
PREFILL = 256
STEPS = 8
BLOCK = 32
BITS = {"int8": 8, "int4": 4}
PRECISIONS = ("fp32", *BITS)
MLP = "layers.0.mlp."
OPSET_PORTABLE = 24
MB = 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=["decoder", "layer", "tensorrt"])
    parser.add_argument("--precision", choices=PRECISIONS, action="append")
    parser.add_argument("--form", action="append", help="of the experts, in the decoder: rows (shipped), if-expert ...")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    machine = f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{datetime.date.today()}, {machine}, onnxruntime {onnxruntime.__version__}, {options.threads} threads\n")
    torch.set_num_threads(options.threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        part = pool.submit(touched_of_a_buffer).result()
    print(f"Touched, of a buffer of which 128 of 256 MiB are read: {part / (1 << 20):.1f} MiB\n")
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            if name == "tensorrt":
                tensorrt(Path(folder))
            for precision in (options.precision or PRECISIONS) if name != "tensorrt" else ():
                measure = decoders if name == "decoder" else layers
                measure(Path(folder), precision, options.form or ["rows"], options.threads, options.repeat)


def decoders(folder: Path, precision: str, forms: Sequence[str], threads: int, repeat: int) -> None:
    """Print the table of whole decoders: every layer with experts, in each form, beside a dense one."""
    graphs, specs = {}, {}
    for form in ("dense", *forms):
        experts = [1 if form == "dense" else 2] * SIZES.layers
        torch.manual_seed(0)
        tensors = MoeLlama(SIZES, experts).state_dict()
        spec = decoder_spec(SIZES, image_rows=DimRange(1, 1, 1), cache=CACHE, draft=False, experts=experts)
        with _builder(folder / f"{precision}-{form}.onnx", SIZES, tensors, spec, precision, form) as builder:
            builder.save(builder.build("float16"))
        graphs[form], specs[form] = builder.path, spec
        del tensors
    rng = np.random.default_rng(0)

    def feeds(tokens: int, past: int) -> Feeds:
        lengths = {"past_length": np.array([past]), "logits_from": np.array([tokens - 1])}
        ids = rng.integers(0, SIZES.vocabulary, (1, tokens))
        return {"input_ids": ids, "image_tokens": np.zeros((1, SIZES.width), np.float32), **lengths}

    prefill = feeds(PREFILL, 0)
    steps = [feeds(1, PREFILL + step) for step in range(STEPS)]
    print(f"### Decoder, {precision}: {SIZES.layers} layers, {SIZES.width} x {SIZES.inner}, vocabulary 8000\n")
    _table(graphs, specs, prefill, steps, threads, repeat, {})


def layers(folder: Path, precision: str, _: Sequence[str], threads: int, repeat: int) -> None:
    """Print the table of one layer's MLP in every form."""
    tokens = DimRange(1, 1, CACHE)
    row = ("x", "float32", (1, "tokens", ONE_LAYER.width))
    spec = GraphSpec("decoder", (TensorSpec(*row),), (TensorSpec("y", *row[1:]),), {"tokens": tokens, "cache": tokens})
    torch.manual_seed(0)
    experts = TopOneExperts(ONE_LAYER.width, ONE_LAYER.inner)
    tensors = {MLP + name: value for name, value in experts.state_dict().items()}
    rng = np.random.default_rng(0)
    prefill = rng.normal(size=(1, PREFILL, ONE_LAYER.width)).astype(np.float32)
    graphs, off = {}, {}
    expected = reference(experts, prefill, precision)
    for form in ("dense", *FORMS):
        with _builder(folder / f"{precision}-{form}.onnx", ONE_LAYER, tensors, spec, precision, form) as builder:
            builder.node("Identity", [builder.mlp("x")], "y")
            builder.save(builder.writer.model(spec))
        try:
            runner = open_runner("onnxruntime", builder.path, spec, threads=threads)
            step = [runner.run({"x": prefill[:, i : i + 1]})["y"] for i in range(0, PREFILL, 8)]
            whole = runner.run({"x": prefill})["y"] if form not in ONE_TOKEN_ONLY else np.concatenate(step, axis=1)
        except Exception as error:  # noqa: BLE001 - a form that the runtime refuses is a result
            print(f"{form}, {precision}: {error}\n")
            continue
        scale = np.abs(expected).max()
        wanted = (expected[:, ::8] if form == "gather" else expected, expected[:, ::8])
        worst = [
            np.abs(g - w).max() / scale for g, w in zip((whole, np.concatenate(step, axis=1)), wanted, strict=True)
        ]
        off[form] = max(worst) if form != "dense" else float("nan")
        graphs[form] = builder.path
    specs = dict.fromkeys(graphs, spec)
    steps = [{"x": prefill[:, i : i + 1]} for i in range(STEPS)]
    print(f"### One layer, {precision}: {ONE_LAYER.width} x {ONE_LAYER.inner}\n")
    _table(graphs, specs, {"x": prefill}, steps, threads, repeat, off)


def tensorrt(folder: Path) -> None:
    """Print which portable forms TensorRT-RTX parses and builds, and what onnxruntime computes with the same file."""
    torch.manual_seed(0)
    c = FOR_TENSORRT
    experts = TopOneExperts(c.width, c.inner)
    with torch.inference_mode():
        for value in experts.experts.parameters():
            value.copy_(value.half().float())
    tensors = {MLP + name: value for name, value in experts.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(1, 64, c.width)).astype(np.float16)
    expected = reference(experts, x.astype(np.float32), "fp32")
    print(f"### TensorRT-RTX, one layer, fp16, opset 24: {c.width} x {c.inner}, no GPU\n")
    print("| form | weights | tokens | file MB | parses | builds | engine MB | build s | off |\n" + "|---" * 9 + "|")
    for form, precision in (*((form, "fp16") for form in PORTABLE), ("dense", "int4"), ("if-all", "int4")):
        for most in (1,) if form in (*ONE_TOKEN_ONLY, "if-token") else (1, PREFILL):
            tokens = DimRange(1, 1, PREFILL)
            row = ("x", "float16", (1, 1 if most == 1 else "tokens", c.width))
            inputs, outputs = (TensorSpec(*row),), (TensorSpec("y", *row[1:]),)
            spec = GraphSpec("decoder", inputs, outputs, {"tokens": tokens, "cache": tokens})
            writer = GraphWriter(MatrixFormat("int4" if precision == "int4" else "fp32"))
            builder = Forms(c, tensors, spec, [1 if form == "dense" else 2], writer)
            builder.form, builder.half = form, True
            builder.node("Identity", [builder.mlp("x")], "y")
            model = writer.model(spec)
            del model.opset_import[:]
            model.opset_import.append(helper.make_opsetid("", OPSET_PORTABLE))
            onnx.checker.check_model(model, full_check=True)
            path = folder / f"{form}-{precision}-{most}.onnx"
            onnx.save(model, path)
            # Above BASIC, onnxruntime 1.31.1 looks inside the branch for the weights of a DequantizeLinear and fails.
            settings = onnxruntime.SessionOptions()
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
            parts = [session.run(None, {"x": x[:, i : i + most]})[0] for i in range(0, x.shape[1], most)]
            error = np.abs(np.concatenate(parts, axis=1) - expected).max() / np.abs(expected).max()
            off = "-" if form == "dense" else f"{error:.0e}"
            cells = (form, precision, str(most), f"{path.stat().st_size / MB:.1f}", *engine(path, most), off)
            print("| " + " | ".join(cells) + " |", flush=True)
    print()


def engine(path: Path, most: int) -> tuple[str, str, str, str]:
    """Return (does it parse, does it build, engine MB, seconds) for TensorRT-RTX; a reason where it does not."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return "tensorrt-rtx is not installed", "-", "-", "-"
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        return f"no: {parser.get_error(0).desc().partition(': ')[2].rstrip()}", "-", "-", "-"
    config = builder.create_builder_config()
    if most > 1:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 1, FOR_TENSORRT.width), (1, 1, FOR_TENSORRT.width), (1, most, FOR_TENSORRT.width))
        config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    took = f"{time.perf_counter() - start:.1f}"
    layers = f"yes, {network.num_layers} layers"
    return (layers, "yes", f"{plan.nbytes / MB:.1f}", took) if plan else (layers, "no", "-", took)


# -- forms -------------------------------------------------------------------------------------------------------------

FORMS = ("rows", "if-expert", "if-all", "if-token", "fused", "mask", "gather")
ONE_TOKEN_ONLY = ("gather",)
SLOW = ("if-token", "gather")
"""Forms whose matrices in blocks onnxruntime multiplies 200 times slower; eight steps say enough."""
PORTABLE = ("dense", "rows", "if-expert", "if-all", "if-token", "mask", "gather")
PORTABLE_BLOCK = 128


class Forms(DecoderBuilder):
    """A decoder's builder that gives the experts another form than the shipped one ("rows"); "dense" has one expert.

    half: every matrix in fp16 and only operators of the ONNX standard, the router in fp32.
    """

    form = "rows"
    half = False
    path = Path()
    weights: WeightFile | None = None

    def save(self, model: onnx.ModelProto) -> None:
        """Write the model beside its weights."""
        onnx.save(model, self.path)

    def mlp(self, x: str) -> str:
        """Add layer 0's MLP alone and return its output."""
        return self.swiglu(x, MLP + "experts.0.") if self.form == "dense" else self._mixture(x, MLP, 0)

    def _mixture(self, x: str, p: str, i: int) -> str:
        if self.form == "rows" and not self.half:
            return super()._mixture(x, p, i)
        logits, probabilities, best = self._route(x, p)
        self.routed.append(probabilities if i == self.config.layers - 1 else self.kept(probabilities, p + "kept"))
        if self.form == "fused":
            return self._fused(x, logits, best, p)
        chosen = self.node("ArgMax", [probabilities], p + "chosen", axis=-1, keepdims=0)  # [1, tokens]
        first_axis = self.constant("axis_0", np.array([0]))
        rows = self.node("Squeeze", [x, first_axis], p + "rows")  # [tokens, width]
        of_row = self.node("Squeeze", [chosen, first_axis], p + "expert_of_row")  # [tokens]
        forms = {"if-token": self._one_token, "if-all": self._if_all, "mask": self._masked, "gather": self._gathered}
        mixed = forms.get(self.form, self._by_expert)(rows, of_row, p)
        return self.node("Mul", [self.node("Unsqueeze", [mixed, first_axis], p + "whole"), best], p + "out")

    def _route(self, x: str, p: str) -> tuple[str, str, str]:
        """Return logits and probabilities [1, tokens, 2] and the larger probability [1, tokens, 1] of x."""
        read = self.tensor(p + "router.weight", 2, self.config.width)
        router = self.constant(p + "router.weight", as_float32(read()).T)
        x = self.node("Cast", [x], p + "x.float", to=TensorProto.FLOAT) if self.half else x
        logits = self.node("MatMul", [x, router], p + "router.logits")
        probabilities = self.node("Softmax", [logits], p + "router.probabilities", axis=-1)
        best = self.node("ReduceMax", [probabilities, self.constant("last_axis", np.array([-1]))], p + "best")
        if self.half:
            best = self.node("Cast", [best], p + "best.half", to=TensorProto.FLOAT16)
        return logits, probabilities, best

    def _by_expert(self, rows: str, of_row: str, p: str) -> str:
        """rows: each expert gets its rows, maybe none. if-expert: one without rows is skipped by an If."""
        places, parts = [], []
        for e in range(2):
            mine = self.node("Equal", [of_row, self.constant(f"expert_{e}", np.array(e))], f"{p}mine.{e}")
            place = self.node("Transpose", [self.node("NonZero", [mine], f"{p}nonzero.{e}")], f"{p}places.{e}")
            places.append(place)

            def own(e: int = e, place: str = place) -> str:
                return self.swiglu(self.node("GatherND", [rows, place], f"{p}own.{e}"), f"{p}experts.{e}.")

            def none(e: int = e) -> str:
                nothing = np.zeros((0, self.config.width), np.float16 if self.half else np.float32)
                return self.node("Constant", [], f"{p}none.{e}", value=onnx.numpy_helper.from_array(nothing))

            if self.form == "if-expert":
                parts.append(self._if(self._any(mine), own, none))
            else:
                parts.append(own())
        order = self.node("Concat", places, p + "order", axis=0)  # [tokens, 1]
        sorted_rows = self.node("Concat", parts, p + "by_expert", axis=0)
        return self.node("ScatterND", [rows, order, sorted_rows], p + "merged")

    def _one_token(self, rows: str, of_row: str, p: str) -> str:
        """One token: one If chooses the expert. More: as rows; both hold the same weights. TensorRT: one token only."""

        def chosen() -> str:
            expert = self.node("Squeeze", [of_row], p + "one_expert")
            second = self.node("Cast", [expert], p + "second", to=TensorProto.BOOL)
            return self._if(
                second, lambda: self.swiglu(rows, p + "experts.1."), lambda: self.swiglu(rows, p + "experts.0.")
            )

        if self.half:
            return chosen()
        tokens = self.node("Size", [of_row], p + "tokens")
        one = self.node("Equal", [tokens, self.constant("scalar_1", np.array(1))], p + "one_token")
        return self._if(one, chosen, lambda: self._by_expert(rows, of_row, p))

    def _if_all(self, rows: str, of_row: str, p: str) -> str:
        """An expert that some row needs computes every row, one that none needs nothing; a Where keeps what counts."""
        parts = []
        for e in range(2):
            mine = self.node("Equal", [of_row, self.constant(f"expert_{e}", np.array(e))], f"{p}mine.{e}")
            skipped = f"{p}skipped.{e}"
            parts.append(
                self._if(
                    self._any(mine),
                    lambda e=e: self.swiglu(rows, f"{p}experts.{e}."),
                    lambda name=skipped: self.node("Identity", [rows], name),
                )
            )
        choose = self.node("Unsqueeze", [f"{p}mine.1", self.constant("last_axis", np.array([-1]))], p + "choose")
        return self.node("Where", [choose, parts[1], parts[0]], p + "merged")

    def _masked(self, rows: str, of_row: str, p: str) -> str:
        """Both experts compute every row; a Where keeps the right one."""
        second = self.node("Cast", [of_row], p + "second", to=TensorProto.BOOL)
        choose = self.node("Unsqueeze", [second, self.constant("last_axis", np.array([-1]))], p + "choose")
        both = [self.swiglu(rows, f"{p}experts.{e}.") for e in (1, 0)]
        return self.node("Where", [choose, *both], p + "merged")

    def _gathered(self, rows: str, of_row: str, p: str) -> str:
        """One token only: its expert's matrices are copied out of a stack, then multiplied."""
        c = self.config
        expert = self.node("Squeeze", [of_row], p + "one_expert")

        def linear(x: str, name: str, n: int, k: int) -> str:
            values = [as_float32(self.tensor(f"{p}experts.{e}.{name}.weight", n, k)()) for e in range(2)]
            name = p + name
            if self.writer.matrices.precision == "fp32":
                stack = self._stack(name, [v.T.astype(np.float16 if self.half else np.float32) for v in values])
                return self.node("MatMul", [x, self.node("Gather", [stack, expert], name + ".own")], name + ".output")
            bits = BITS[self.writer.matrices.precision]
            packed, scales = zip(*(pack_rows(v, BLOCK, bits) for v in values), strict=True)
            own = self.node("Gather", [self._stack(name, packed), expert], name + ".own")
            own_scales = self.node("Gather", [self._stack(name + ".s", scales), expert], name + ".s.own")
            return self.node(
                "MatMulNBits", [x, own, own_scales], name + ".output", domain=FUSED, K=k, N=n, bits=bits,
                block_size=BLOCK, accuracy_level=4,
            )  # fmt: skip

        gate_up = linear(rows, "gate_up", 2 * c.inner, c.width)
        return linear(self._gated(gate_up, p), "down", c.width, c.inner)

    def _fused(self, x: str, logits: str, best: str, p: str) -> str:
        """onnxruntime's MoE, or QMoE, which leaves out the probability where k is 1. Gate and up rows take turns."""
        c, precision = self.config, self.writer.matrices.precision
        shape = self.constant("router_shape", np.array([-1, 2]))
        inputs = [x, self.node("Reshape", [logits, shape], p + "logits.rows")]
        for name, n, k in (("gate_up", 2 * c.inner, c.width), ("down", c.width, c.inner)):
            values = [as_float32(self.tensor(f"{p}experts.{e}.{name}.weight", n, k)()) for e in range(2)]
            if name == "gate_up":
                values = [v.reshape(2, c.inner, k).swapaxes(0, 1).reshape(n, k) for v in values]
            if precision == "fp32":
                inputs += [self._stack(p + name, values), ""]
                continue
            packed, scales = zip(*(pack_rows(v, BLOCK, BITS[precision]) for v in values), strict=True)
            inputs += [
                self._stack(p + name, [q.reshape(n, -1) for q in packed]),
                self._stack(f"{p}{name}.s", scales),
                "",
            ]
        exact: dict[str, Any] = {"activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_limit": 1e30}
        common = {"domain": FUSED, "k": 1, "activation_type": "swiglu", "swiglu_fusion": 1, **exact}
        if precision == "fp32":
            return self.node("MoE", inputs[:-1], p + "out", normalize_routing_weights=0, **common)
        bits = BITS[precision]
        mixed = self.node("QMoE", inputs, p + "mixed", expert_weight_bits=bits, block_size=BLOCK, **common)
        return self.node("Mul", [mixed, best], p + "out")

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _stack(self, name: str, values: Sequence[Array]) -> str:
        """Store the experts' arrays as one."""
        whole = np.stack(values)
        return self.writer.stored(name + ".stack", whole.size, lambda: whole)

    def _any(self, mine: str) -> str:
        """Return whether one of `mine` [tokens] is true, a scalar."""
        number = self.node("Cast", [mine], mine + ".number", to=TensorProto.INT32)
        some = self.node("ReduceMax", [number, self.constant("axis_0", np.array([0]))], mine + ".max", keepdims=0)
        return self.node("Cast", [some], mine + ".any", to=TensorProto.BOOL)

    def _if(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """Return the output of an If whose branches are what the two functions add; weights stay in the main graph."""
        branches = {}
        for attribute, add in (("then_branch", then), ("else_branch", otherwise)):
            outer, self.writer.nodes = self.writer.nodes, []
            output = add()
            kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
            info = helper.make_tensor_value_info(output, kind, [None, self.config.width])
            branches[attribute] = helper.make_graph(self.writer.nodes, attribute, [], [info])
            self.writer.nodes = outer
        return self.node("If", [condition], condition + ".if", **branches)

    def swiglu(self, x: str, p: str) -> str:
        if not self.half:
            return super().swiglu(x, p)
        c = self.config
        product = self._half_linear(x, p + "gate_up", 2 * c.inner, c.width)
        return self._half_linear(self._gated(product, p), p + "down", c.width, c.inner)

    def _gated(self, gate_up: str, p: str) -> str:
        gate, up = p + "gate", p + "up"
        self.node("Split", [gate_up], gate, more_outputs=[up], axis=-1, num_outputs=2)
        silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], p + "sigmoid")], p + "silu")
        return self.node("Mul", [silu, up], p + "inner")

    def _half_linear(self, x: str, name: str, rows: int, columns: int) -> str:
        weight = as_float32(self.tensor(f"{name}.weight", rows, columns)()).T
        if self.writer.matrices.precision == "fp32":
            return self.node("MatMul", [x, self.constant(name, weight.astype(np.float16))], f"{name}.output")
        blocks = weight.reshape(columns // PORTABLE_BLOCK, PORTABLE_BLOCK, rows)
        scales = (np.abs(blocks).max(axis=1) / 7).astype(np.float16)  # [blocks, rows]
        values = np.rint(blocks / scales[:, None]).clip(-7, 7).reshape(columns, rows)
        inputs = [self.constant(name + ".q", values.astype(ml_dtypes.int4)), self.constant(name + ".s", scales)]
        whole = self.node("DequantizeLinear", inputs, name + ".whole", axis=0, block_size=PORTABLE_BLOCK)
        return self.node("MatMul", [x, whole], f"{name}.output")


@contextmanager
def _builder(
    path: Path, config: LlamaConfig, tensors: Tensors, spec: GraphSpec, precision: Any, form: str
) -> Iterator[Forms]:
    """Give a builder whose weights go to the file beside `path`."""
    weights = WeightFile(path.with_suffix(".bin"))
    experts = [1 if form == "dense" else 2] * config.layers
    builder = Forms(config, tensors, spec, experts, GraphWriter(MatrixFormat(precision), weights))
    builder.form, builder.path = form, path
    yield builder
    weights.finish()


def reference(experts: TopOneExperts, x: Array, precision: str) -> Array:
    """Return what TopOneExperts gives for x, its experts' matrices rounded as the graph's are."""
    exact = {name: value.clone() for name, value in experts.state_dict().items()}
    if precision != "fp32":
        for name, value in exact.items():
            if name != "router.weight":
                packed, scales = pack_rows(value.numpy(), BLOCK, BITS[precision])
                exact[name] = torch.from_numpy(unpack_rows(packed, scales, BITS[precision])[:, : value.shape[1]])
    rounded = TopOneExperts(experts.router.in_features, experts.experts[0].down.in_features)
    rounded.load_state_dict(exact)
    with torch.inference_mode():
        return np.asarray(rounded(torch.from_numpy(x))[0].numpy())


# -- measuring ---------------------------------------------------------------------------------------------------------


def _table(
    graphs: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    prefill: Feeds,
    steps: Sequence[Feeds],
    threads: int,
    repeat: int,
    off: Mapping[str, float],
) -> None:
    """Measure each graph and print one row for it; ratios are to the first one, the dense one."""
    pages = {}
    for form, path in graphs.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pages[form] = pool.submit(pages_of, path, specs[form], prefill, steps, threads).result()
    runners = {form: open_runner("onnxruntime", path, specs[form], threads=threads) for form, path in graphs.items()}
    stepped: dict[str, list[tuple[float, float]]] = {form: [] for form in graphs}
    filled: dict[str, list[tuple[float, float]]] = {form: [] for form in graphs}
    for round_ in range(repeat):
        for form, runner in runners.items():
            if form in SLOW and round_:
                continue
            for feeds in steps[:2]:
                runner.run(feeds)
            stepped[form] += [seconds(lambda r=runner, f=feeds: r.run(f)) for feeds in steps]
        for form, runner in runners.items():
            if form not in ONE_TOKEN_ONLY and round_ % 3 == 0:
                filled[form].append(seconds(lambda r=runner: r.run(prefill)))
    for runner in runners.values():
        runner.close()
    print(HEADER + "\n" + "|---" * HEADER.count(" | ") + "|---|")
    dense = next(iter(graphs))
    at = {form: float(np.mean(pages[form][0])) for form in graphs}
    for form, path in graphs.items():
        each, resident, private = pages[form]
        (best, median), (dense_best, dense_median) = (_least_and_median(stepped[f]) for f in (form, dense))
        fill, dense_fill = (min((busy for _, busy in filled[f]), default=np.nan) for f in (form, dense))
        cells = (
            form,
            f"{path.with_suffix('.bin').stat().st_size / MB:.0f}",
            f"{best * 1e3:.2f} / {median * 1e3:.2f}",
            f"{best / dense_best:.2f} / {median / dense_median:.2f}",
            f"{at[form] / MB:.1f} ({max(each) / MB:.1f})",
            f"{at[form] / at[dense]:.3f} ({max(each) / at[dense]:.3f})",
            f"{resident / MB:.0f} ({private / MB:.0f})",
            f"{fill * 1e3:.0f}",
            f"{fill / dense_fill:.2f}",
            f"{off[form]:.0e}" if form in off else "-",
        )
        print("| " + " | ".join(cells).replace("nan", "-") + " |")
    print(flush=True)


HEADER = (
    "| form | weights MB | step ms, least / median | to dense | touched MB/step, mean (most) | to dense "
    "| memory MB (private) | prefill ms | to dense | off |"
)


def _least_and_median(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the least wall time and the median processor time of all threads together."""
    return min(wall for wall, _ in times), float(np.median([processor for _, processor in times]))


def pages_of(
    path: Path, spec: GraphSpec, prefill: Feeds, steps: Sequence[Feeds], threads: int
) -> tuple[list[float], float, float]:
    """Return (bytes that each step touches, bytes resident with the graph open, those that are no file's pages)."""
    before = rollup("Rss"), rollup("Anonymous")
    runner = open_runner("onnxruntime", path, spec, threads=threads)
    for feeds in steps:
        runner.run(feeds)
    after = rollup("Rss"), rollup("Anonymous")
    if spec.state:
        runner.run(prefill)
    for feeds in steps:
        runner.run(feeds)
    idle = min(touched(lambda: None) for _ in range(5))
    each = [touched(lambda f=feeds: runner.run(f)) - idle for feeds in steps]
    return each, after[0] - before[0], after[1] - before[1]


def touched_of_a_buffer() -> float:
    """Return what `touched` says of reading 128 MiB out of 256."""
    buffer = np.ones(256 << 18, np.float32)
    idle = min(touched(lambda: None) for _ in range(5))
    return touched(lambda: buffer[: 128 << 18].sum()) - idle


def touched(work: Callable[[], object]) -> float:
    """Return the bytes of the memory pages that `work` reads or writes."""
    Path("/proc/self/clear_refs").write_text("1")
    # Unmapping many pages empties the processor's translation buffer, without which it would not set a bit again.
    with mmap.mmap(-1, 16 << 20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
    Path("/proc/self/clear_refs").write_text("1")
    work()
    return rollup("Referenced")


def rollup(field: str) -> float:
    """Return a field of /proc/self/smaps_rollup in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall time and the processor time, all threads together, that `work` takes."""
    processor, start = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - start, time.process_time() - processor


if __name__ == "__main__":
    main()
