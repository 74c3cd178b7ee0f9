"""One language model in one engine, timed on request: the child process of `bench_smollm2.py`.

    python llm_engines.py edgemed|genai|llama MODEL REQUEST.json

Needs the engine and NumPy alone, so that each engine can have its own Python. Prints a line of JSON with the engine's
version when the model is loaded and warm; then, for each line on stdin, one with the seconds of a prefill and of the
steps after it (`steps_s`: the engine's own calls, `loop_s`: with the choice of the token, one by one) and the ids.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Timing = dict[str, Any]
Turn = Callable[[], Timing]


def main() -> None:
    """Load, warm up, then one turn for each line on stdin."""
    engine, model, request = sys.argv[1:]
    version, turn = ENGINES[engine](Path(model), json.loads(Path(request).read_text()))
    turn()
    print(json.dumps({"version": version}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def edgemed(model: Path, request: Mapping[str, Any]) -> tuple[str, Turn]:
    """Return (version, one turn) of the decoder graph `model`, through the Runner and `edgemed.decoding`."""
    import onnxruntime

    from edgemed.backends import open_runner
    from edgemed.decoding import DecodeOptions, decode
    from edgemed.families.specs import decoder_spec
    from edgemed.graphs import DimRange
    from edgemed.models.llama import LlamaConfig

    config = LlamaConfig(**request["config"])
    spec = decoder_spec(config, image_rows=DimRange(1, 1, 1), cache=request["cache"], draft=False)
    runner = open_runner("onnxruntime", model, spec, threads=request["threads"], device="cpu")
    rows = {"image_tokens": np.zeros((1, config.width), np.float32)}
    options = DecodeOptions(eos_id=request["eos_id"], max_new_tokens=request["steps"], cache=request["cache"])
    grammar = _AnyToken(config.vocabulary, request["eos_id"])

    def turn() -> Timing:
        start = time.perf_counter()
        answer = decode(runner, request["prompt"], rows, grammar, options)
        prefill = answer.prefill_ms / 1000
        loop = time.perf_counter() - start - prefill
        # The first token comes from the prefill, so there is one step less than tokens.
        per_token = request["steps"] / (answer.decoder_calls - 1)
        steps = answer.step_ms / 1000
        return {"prefill_s": prefill, "steps_s": steps * per_token, "loop_s": loop * per_token, "ids": answer.ids}

    return f"edgemed (onnxruntime {onnxruntime.__version__})", turn


class _AnyToken:
    """The grammar of text without rules, which does not end."""

    def __init__(self, vocabulary: int, eos_id: int) -> None:
        self._all = np.ones(vocabulary, bool)
        self._all[eos_id] = False

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return self._all

    def advance(self, state: int, token: int) -> int:
        return 0

    def refuses(self, state: int) -> bool:
        return False


def genai(model: Path, request: Mapping[str, Any]) -> tuple[str, Turn]:
    """Return (version, one turn) of a folder that onnxruntime-genai's builder wrote."""
    import onnxruntime
    import onnxruntime_genai

    config = json.loads((model / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = request["threads"]
    (model / "genai_config.json").write_text(json.dumps(config))
    loaded = onnxruntime_genai.Model(str(model))
    parameters = onnxruntime_genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=request["cache"], min_length=request["cache"], do_sample=False)

    def turn() -> Timing:
        generator = onnxruntime_genai.Generator(loaded, parameters)
        start = time.perf_counter()
        generator.append_tokens(np.array([request["prompt"]], np.int32))
        generator.generate_next_token()
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(request["steps"]):
            generator.generate_next_token()
        loop = time.perf_counter() - start
        ids = generator.get_sequence(0)[len(request["prompt"]) :][: request["steps"]]
        return {"prefill_s": prefill, "steps_s": loop, "loop_s": loop, "ids": [int(i) for i in ids]}

    return f"onnxruntime-genai {onnxruntime_genai.__version__} (onnxruntime {onnxruntime.__version__})", turn


def llama(model: Path, request: Mapping[str, Any]) -> tuple[str, Turn]:
    """Return (version, one turn) of a GGUF file in llama.cpp."""
    import llama_cpp

    loaded = llama_cpp.Llama(
        str(model), n_ctx=request["cache"], n_batch=request["cache"], n_ubatch=request["cache"],
        n_threads=request["threads"], n_threads_batch=request["threads"], verbose=False,
    )  # fmt: skip
    eos, vocabulary = request["eos_id"], loaded.n_vocab()

    def best() -> int:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(loaded.ctx, -1), shape=(vocabulary,))
        logits[eos] = -np.inf
        return int(logits.argmax())

    def feed(ids: list[int]) -> float:
        start = time.perf_counter()
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(loaded.ctx, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(loaded.ctx)
        return time.perf_counter() - start

    def turn() -> Timing:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(loaded.ctx), True)
        prefill = feed(request["prompt"])
        start, steps, ids = time.perf_counter(), 0.0, [best()]
        for _ in range(request["steps"]):
            steps += feed(ids[-1:])
            ids.append(best())
        return {"prefill_s": prefill, "steps_s": steps, "loop_s": time.perf_counter() - start, "ids": ids[:-1]}

    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", turn


ENGINES = {"edgemed": edgemed, "genai": genai, "llama": llama}

if __name__ == "__main__":
    main()
