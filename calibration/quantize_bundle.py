"""Bundle -> quantized bundle: calibrate on slices, write smaller graphs, judge them on others, keep all or nothing.

Covers the order of work, the search for nodes that keep their precision, what is tried where a gate is missed, and the
report. Does not cover how a graph is changed (`qdq`, `weight_only`), how errors are measured (`sensitivity`) or what is
good enough (`gates`).
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import onnx

from edgemed import __version__
from edgemed.bundle import Bundle, graph_file, open_bundle, write_bundle
from edgemed.bundle_folder import working_folder
from edgemed.calibration import search
from edgemed.calibration.dense import without_blocks
from edgemed.calibration.equalize import equalized, sample_rows, to_equalize
from edgemed.calibration.gates import Agreement, Gates, GraphRow, check_graphs, compare_answers, missed
from edgemed.calibration.kv_cache import cache_scales, with_int8_cache
from edgemed.calibration.plan import Cache, Precision, QuantPlan, plan_to_toml
from edgemed.calibration.qdq import quantize
from edgemed.calibration.ranges import Method, bounds, measure
from edgemed.calibration.rounding import measure_products
from edgemed.calibration.sensitivity import Outputs, Sensitivity, errors_of, outputs_of, sensitivities, to_markdown
from edgemed.calibration.sites import activations, default_plan, planned, products_wanted, sites, without_branches
from edgemed.calibration.slices import QUESTIONS, Sequences, Slices, read_slices, record_feeds
from edgemed.calibration.weight_only import WeightPlan, quantize_weights
from edgemed.errors import BundleError, CannotWrite, InvalidInput
from edgemed.families import open_family
from edgemed.graphs import GraphSpec
from edgemed.triton_kernels.head_file import KERNELS

Named = Literal["int8", "fp8", "int4", "auto"]
"""int8, fp8: vision encoder and decoder; a decoder in int8 has 8-bit weights alone. int4: the decoder's weights, and
int8 for the vision encoder. auto: as int4, and what does not pass gets more. A plan says it for each graph."""

KEPT = ("projector", "mask_decoder")
"""Graphs that a name leaves as they are: little work, and their outputs are coordinates and outlines."""

REPORT, PLAN, TABLE = "reports/accuracy.json", "reports/quantization.toml", "reports/sensitivity.md"

_FEW = 2  # sequences of calls that sensitivities are measured on: each node takes a session and a run of them
_SEQUENCES = 24  # at most, of one graph: a mask decoder is called a hundred times, and its outputs are large
_RELAXED = 3  # times that a graph gets a dearer plan for its answers: each takes it to be made and asked again
_SHARP = {"int8", "fp8", "int8-weights"}
"""Precisions whose graphs must meet the cosine; of INT4 the answers are judged."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What a quantization may be told.

    slices: folder; None: public files of the pydicom package. calibrate, held_out: slices to measure and to judge on.
    search: where a graph misses the cosine, nodes keep their precision until it does not; a plan is taken as it is.
    cache: int8 makes the decoder's cache so, whatever the plan says of it.
    max_new_tokens: of the answers that are compared; recorded_tokens: of those that the graphs are calibrated on.
    tell: gets a line for a note, progress (what, done, in all).
    """

    slices: Path | None = None
    calibrate: int = 8
    held_out: int = 4
    method: Method = "minmax"
    block: int = 32
    cache: Cache = "fp32"
    gates: Gates = field(default_factory=Gates)
    max_new_tokens: int = 96
    recorded_tokens: int = 16
    name: str | None = None
    replace: bool = False
    threads: int | None = None
    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


@dataclass(eq=False)
class _Role:
    """One graph on its way: as it was, what it is fed, what it gives, and what became of it.

    made: describes `model`. scales: of an int8 cache.
    """

    spec: GraphSpec
    exact: onnx.ModelProto
    calls: Sequences
    judged: Sequences
    expected: Outputs
    model: onnx.ModelProto | None = None
    made: GraphSpec | None = None
    scales: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[GraphRow, ...] = ()
    table: tuple[Sensitivity, ...] = ()


def quantize_bundle(
    source: str | Path, output: Path, precision: Named | QuantPlan, options: QuantizeOptions | None = None
) -> Bundle:
    """Return the quantized bundle, written to `output`.

    Raises BundleError naming graph, output and the layers that cost most where a gate is missed; NoInput or CannotRead
    where there are no slices; InvalidInput where a plan does not fit the graphs; CannotWrite. Then nothing is written.
    """
    options = options or QuantizeOptions()
    bundle = open_bundle(source)
    _check_output(output, options)
    slices = read_slices(options.slices, options.calibrate + options.held_out)
    first, held = slices.split(min(options.held_out, len(slices.scans) - 1))
    for warning in slices.warnings:
        options.tell(warning)
    work = _Work(bundle, first, held, options)
    plan = precision if isinstance(precision, QuantPlan) else work.first_plan(precision)
    if options.cache != "fp32":
        plan = replace(plan, cache=options.cache)
    if not any(plan.precision.values()) and not plan.nodes and plan.cache == "fp32":
        raise InvalidInput("the plan quantizes nothing; give a precision to at least one graph")
    try:
        with working_folder(output) as folder:
            searched = not isinstance(precision, QuantPlan)
            plan, agreement = work.settle(plan, folder, searched=searched, may_keep=precision == "auto")
            if precision == "auto":  # the table is asked for even where nothing had to be left out
                for role in plan.precision:
                    work.table(role, plan)
            return work.write(plan, agreement, folder, output)
    except OSError as error:
        raise CannotWrite(f"cannot write the bundle {output}: {error.strerror or 'refused'}") from error


def _check_output(output: Path, options: QuantizeOptions) -> None:
    """Raise CannotWrite before the work where `write_bundle` would after it."""
    taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if taken and not (options.replace and (output / "bundle.json").is_file()):
        raise CannotWrite(f"cannot write a bundle to {output}: it exists already; choose another folder")


class _Work:
    """The state of one quantization."""

    def __init__(self, bundle: Bundle, first: Slices, held: Slices, options: QuantizeOptions) -> None:
        self.bundle, self.first, self.held, self.options = bundle, first, held, options
        options.progress("calibration", 0, 2)
        record = partial(record_feeds, bundle, max_new_tokens=options.recorded_tokens, threads=options.threads)
        calls = record(first.scans)
        options.progress("calibration", 1, 2)
        judged = record(held.scans)
        for warning in calls.warnings:
            options.tell(warning)
        options.progress("calibration", 2, 2)
        self.roles: dict[str, _Role] = {}
        for role, spec in bundle.manifest.graphs.items():
            if calls.calls[role] and judged.calls[role]:
                model = onnx.load(bundle.graph_path(role))
                some, others = _evenly(calls.calls[role]), _evenly(judged.calls[role])
                expected = outputs_of(model, spec, others, threads=options.threads)
                self.roles[role] = _Role(spec, without_blocks(model), some, others, expected)
        self.steady_text = open_family(bundle).steady_text

    # -- plans ---------------------------------------------------------------------------------------------------------

    def first_plan(self, named: Named) -> QuantPlan:
        """Return the plan to begin with. Raises InvalidInput where there is no such precision."""
        if named not in get_args(Named):
            raise InvalidInput(f"precision is {named!r}; one of {', '.join(get_args(Named))} or a plan was expected")
        wanted: dict[str, Precision] = {}
        for role, found in self.roles.items():
            if role in KEPT:
                continue
            decoder = bool(found.spec.state)
            if named == "fp8":
                wanted[role] = "fp8"
            elif decoder:
                wanted[role] = "int8-weights" if named == "int8" else "int4-weights"
            else:
                wanted[role] = "int8"
            have = self.bundle.manifest.precision[role]
            if wanted[role].removesuffix("-weights") == have:
                self.options.tell(f"{role} is in {have} already and stays as it is")
                del wanted[role]
        models = {role: self.roles[role].exact for role in wanted}
        return default_plan(models, wanted, method=self.options.method, block=self.options.block)

    def settle(self, plan: QuantPlan, folder: Path, *, searched: bool, may_keep: bool) -> tuple[QuantPlan, Agreement]:
        """Return a plan whose graphs and answers pass, and how the answers agree. Raises BundleError if none does.

        searched: a graph to blame for answers that differ gets a dearer plan, _RELAXED times. may_keep: after that it
        keeps its own precision, as long as another graph does not.
        """
        touched = {r for r in self.roles if _has_weights(plan, r) or self.small_cache(plan, r)}
        if unknown := sorted({*plan.precision, *plan.nodes, *plan.excluded} - set(self.roles)):
            raise InvalidInput(f"the plan names the {unknown[0]}; the bundle has none, or no question led to it")
        if plan.cache == "int8":
            self.judge_cache(plan)
        relaxations: Counter[str] = Counter()
        while True:  # ends: a graph is relaxed _RELAXED times, then given up, and the last one is not given up
            for role in sorted(touched):
                plan = self.fit(role, plan, searched=searched)
            agreement = self.ask_both(plan, folder)
            failed = missed(agreement, self.options.gates, self.steady_text)
            if not failed:
                return plan, agreement
            blamed = self.blamed(plan, folder)
            relaxed = self.relaxed(plan, blamed) if searched and relaxations[blamed] < _RELAXED else None
            relaxed = relaxed or (self.given_up(plan, blamed) if may_keep else None)
            relaxations[blamed] += 1
            if relaxed is None:
                worst = f"most of it by the {blamed}: {self.worst(blamed, plan)}"
                raise BundleError(f"the quantized bundle is refused: {'; '.join(failed)}; {worst}; nothing was written")
            self.options.tell(f"{'; '.join(failed)}: {relaxed[1]}")
            plan, touched = relaxed[0], {blamed}
            if not (_has_weights(plan, blamed) or self.small_cache(plan, blamed)):
                self.roles[blamed].model, self.roles[blamed].rows, touched = None, (), set()

    def relaxed(self, plan: QuantPlan, role: str) -> tuple[QuantPlan, str] | None:
        """Return (a plan that costs more in this graph, what it changes), or None where nothing is left to give.

        First INT4 becomes INT8, the half of the matrices that suffers most, then the rest; then nodes keep their
        precision until the error of the outputs is half as large.
        """
        now = {site.node: precision for site, precision in planned(self.roles[role].exact, role, plan)}
        fours = [node for node, precision in now.items() if precision == "int4-weights"]
        rows = [row for row in self.table(role, plan) if row.node in (fours or now)]
        if not rows:
            return None
        if fours:
            some = rows if len(fours) < len(now) else rows[: -(-len(rows) // 2)]
            text = f"{len(some)} matrices of the {role} that suffer most from 4 bits get 8"
            return search.with_nodes(plan, role, [row.node for row in some], "int8-weights"), text
        error = max((row.relative_error for row in self.roles[role].rows), default=0.0)
        some = search.left_out(rows, self.products_of(role), error / 2) or rows[:1]
        return search.with_excluded(plan, role, some), f"{len(some)} nodes of the {role} keep their precision"

    def given_up(self, plan: QuantPlan, role: str) -> tuple[QuantPlan, str] | None:
        """Return (the plan with this graph as it was, what it changes), or None where no other graph gets smaller."""
        precision = {k: v for k, v in plan.precision.items() if k != role}
        nodes = {k: v for k, v in plan.nodes.items() if k != role}
        excluded = {k: v for k, v in plan.excluded.items() if k != role}
        if not precision and not nodes:
            return None
        plan = replace(plan, precision=precision, nodes=nodes, excluded=excluded)
        return plan, f"the {role} keeps its precision"

    def blamed(self, plan: QuantPlan, folder: Path) -> str:
        """Return the quantized graph that changes the answers most where it alone is quantized."""
        models = {role: found.model for role, found in self.roles.items() if found.model is not None}
        if len(models) == 1:
            return next(iter(models))
        losses = {}
        for role in models:
            for other, found in self.roles.items():
                found.model = models[role] if other == role else None
            alone = self.ask_both(plan, folder)
            losses[role] = sum(
                1 - (v if v is not None else 1) for v in (alone.same_text, alone.box_iou, alone.mask_dice)
            )
        for role, model in models.items():
            self.roles[role].model = model
        return max(losses, key=lambda role: losses[role])

    # -- one graph -----------------------------------------------------------------------------------------------------

    def fit(self, role: str, plan: QuantPlan, *, searched: bool) -> QuantPlan:
        """Return a plan with which a graph meets the cosine; graph and rows are in `roles`. Raises BundleError."""
        found, least = self.roles[role], self.options.gates.cosine
        allowed = max(2 * (1 - least), 1e-12) ** 0.5  # relative error of vectors of the same length at that cosine
        aim = allowed
        for attempt in range(search.ROUNDS + 1):
            self.build(role, plan)
            if all(row.passed for row in found.rows):
                return plan
            table = self.table(role, plan)
            if not searched or attempt == search.ROUNDS:
                break
            error = max(row.relative_error for row in found.rows if not row.passed)
            aim = min(aim, allowed) * (1.0 if attempt == 0 else min(0.8, allowed / max(error, 1e-30)))
            rows = [row for row in table if plan.of(role, row.node) == row.precision]
            work = self.products_of(role)
            out = search.left_out(rows, work, aim) or rows[:1]
            gone = [*(n for n in plan.excluded.get(role, {})), *(row.node for row in out)]
            if search.share_of([n for n in gone if n in {r.node for r in table}], work) > search.MOST:
                break
            plan = search.with_excluded(plan, role, out)
            self.options.tell(
                f"{role}: {len(out)} nodes keep their precision, the worst {out[0].node} "
                f"(alone it changes {out[0].error.output} by {out[0].error.relative_error:.2g})"
            )
        check_graphs(found.rows, self.options.gates, lambda r: self.worst(r, plan))
        return plan

    def build(self, role: str, plan: QuantPlan) -> None:
        """Quantize one graph and compare it with full precision on the slices that were held out."""
        found, threads = self.roles[role], self.options.threads
        small_cache = self.small_cache(plan, role)
        smaller, spec = self.with_weights(role, plan), found.spec
        if small_cache:
            smaller, spec = with_int8_cache(smaller, spec, self.scales_of(role))
        found.model, found.made = smaller, spec
        outputs = outputs_of(smaller, spec, found.judged, threads=threads)
        judged = small_cache or any(p in _SHARP for _, p in planned(found.exact, role, plan))
        sharp = judged and plan.precision.get(role) != "int4-weights"
        found.rows = tuple(
            GraphRow(
                role, self.named(role, plan), row.output, row.cosine, row.smallest, row.relative_error,
                not sharp or row.cosine >= self.options.gates.cosine,
            )
            for row in errors_of(found.expected, outputs)
        )  # fmt: skip

    def with_weights(self, role: str, plan: QuantPlan) -> onnx.ModelProto:
        """Return the graph with its weights and activations as the plan says; as it was where it says nothing."""
        if not _has_weights(plan, role):
            return onnx.load(self.bundle.graph_path(role))
        model, limits, products = self.calibrated(role, plan)
        packed = {"int8-weights", "int4-weights"} if _is_fused(model) else set()
        rest, blocks = _parted(plan, role, model, packed)
        smaller, _ = quantize(model, role, rest, limits, products)
        return _packed(smaller, blocks, plan.block, products) if blocks else smaller

    def small_cache(self, plan: QuantPlan, role: str) -> bool:
        """Return whether the plan makes the cache of this graph int8."""
        return plan.cache == "int8" and bool(self.roles[role].spec.state)

    def scales_of(self, role: str) -> Mapping[str, Any]:
        """Return the scales of an int8 cache, measured once, in full precision."""
        found = self.roles[role]
        if not found.scales:
            found.scales = cache_scales(found.exact, found.spec, found.calls, threads=self.options.threads)
        return found.scales

    def judge_cache(self, plan: QuantPlan) -> None:
        """Raise BundleError where an int8 cache alone misses the cosine, which no choice of nodes could mend.

        Raises InvalidInput where there is no cache that could be int8.
        """
        roles = [role for role in self.roles if self.small_cache(plan, role)]
        if not roles:
            raise InvalidInput("the plan wants an int8 cache; the bundle has no decoder, or no question led to it")
        for role in roles:
            found, least = self.roles[role], self.options.gates.cosine
            small = with_int8_cache(found.exact, found.spec, self.scales_of(role))
            outputs = outputs_of(*small, found.judged, threads=self.options.threads)
            row = min(errors_of(found.expected, outputs), key=lambda row: row.cosine)
            if row.cosine < least:
                raise BundleError(
                    f"the quantized bundle is refused: {role} with an int8 cache and nothing else: cosine of "
                    f"{row.output} is {row.cosine:.5f}, at least {least:g} was expected; keep the cache in fp32; "
                    "nothing was written"
                )

    def named(self, role: str, plan: QuantPlan) -> str:
        """Return the precision of a graph's weights, as the manifest says it."""
        if not _has_weights(plan, role):
            return self.bundle.manifest.precision[role]
        return plan.precision.get(role, "fp32").removesuffix("-weights")

    def calibrated(self, role: str, plan: QuantPlan) -> tuple[onnx.ModelProto, dict[str, float], dict[str, Any]]:
        """Return (the graph with its channels equalized, the bounds of its activations, the products of its inputs)."""
        found, how = self.roles[role], {"threads": self.options.threads}
        model = found.exact
        if wanted := to_equalize(model, role, plan):
            model = equalized(model, role, plan, sample_rows(model, found.spec, wanted, found.calls, **how))
        flat = without_branches(model)
        names, inputs = activations(model, role, plan), products_wanted(model, role, plan)
        limits = bounds(measure(flat, found.spec, names, found.calls, **how), plan.method) if names else {}
        if not inputs:
            return model, limits, {}
        # Of rows of one length each: what a decoder makes of first tokens is a thousand times longer than of others.
        alike = bool(found.spec.state)
        return model, limits, measure_products(flat, found.spec, inputs, found.calls, same_length=alike, **how)

    def table(self, role: str, plan: QuantPlan) -> tuple[Sensitivity, ...]:
        """Return the sensitivity of every node that a plan without exclusions of the search quantizes, worst first."""
        found = self.roles[role]
        if not found.table:
            model, limits, products = self.calibrated(role, plan)
            found.table = sensitivities(
                model, found.spec, plan, limits, found.judged[:_FEW], products=products, threads=self.options.threads,
                progress=lambda done, total: self.options.progress(f"sensitivity of the {role}", done, total),
            )  # fmt: skip
        return found.table

    def worst(self, role: str, plan: QuantPlan) -> str:
        """Return which layers of a graph cost most."""
        rows = self.table(role, plan)[:3]
        if not rows:
            return "nothing in it but the cache was quantized"
        return "layers that cost most: " + ", ".join(f"{r.node} ({r.error.relative_error:.2g} alone)" for r in rows)

    def products_of(self, role: str) -> dict[str, float]:
        """Return the weights of each node: what it computes for every row that comes in."""
        model = self.roles[role].exact
        sizes = {t.name: _size(t) for t in model.graph.initializer}
        return {site.node: float(sizes.get(site.weight, 0)) for site in sites(model) if site.weight}

    # -- the bundle ----------------------------------------------------------------------------------------------------

    def ask_both(self, plan: QuantPlan, folder: Path) -> Agreement:
        """Return how the answers of the bundle with the new graphs agree with those of the old one."""
        candidate = folder / "candidate"
        shutil.rmtree(candidate, ignore_errors=True)
        self._write(candidate, plan, {}, folder)
        options = self.options
        return compare_answers(
            self.bundle.path, candidate, self.held.scans, QUESTIONS, max_new_tokens=options.max_new_tokens,
            threads=options.threads, progress=lambda done, total: options.progress("answers", done, total),
        )  # fmt: skip

    def write(self, plan: QuantPlan, agreement: Agreement, folder: Path, output: Path) -> Bundle:
        """Return the bundle with its reports, in its place."""
        reports = {REPORT: self.report(plan, agreement), PLAN: plan_to_toml(plan).encode()}
        if tables := [f"# {role}\n\n{to_markdown(f.table)}" for role, f in self.roles.items() if f.table]:
            reports[TABLE] = "\n".join(tables).encode()
        return self._write(output, plan, reports, folder, self.options.replace)

    def _write(
        self, target: Path, plan: QuantPlan, reports: Mapping[str, bytes], folder: Path, replaced: bool = False
    ) -> Bundle:
        manifest = self.bundle.manifest
        files: dict[str, bytes | Path] = {}
        kernels = f"{KERNELS}/"  # their head is that of the decoder as it was
        if any(name.startswith(kernels) for name in manifest.files):
            self.options.tell("the kernels are left out: run edgemed compile --backend triton on the new bundle")
        for name in manifest.files:
            if not name.startswith(("graphs/", kernels)) and name not in (REPORT, PLAN, TABLE):
                files[name] = self.bundle.file(name)
        precision, graphs = dict(manifest.precision), dict(manifest.graphs)
        for role in manifest.graphs:
            quantized = self.roles[role].model if role in self.roles else None
            if quantized is None:
                for name in manifest.files:
                    if name.startswith(graph_file(role)):
                        files[name] = self.bundle.file(name)
                continue
            files |= _saved(quantized, role, folder)
            precision[role], graphs[role] = self.named(role, plan), self.roles[role].made or graphs[role]
        return write_bundle(
            target,
            name=self.options.name or manifest.name,
            family=manifest.family,
            graphs=graphs,
            files={**files, **reports},
            precision=precision,
            calibration_digest=self.first.digest,
            versions={**manifest.versions, "edgemed": __version__, "onnx": version("onnx")},
            licences=manifest.licences,
            settings=manifest.settings,
            replace=replaced,
        )

    def report(self, plan: QuantPlan, agreement: Agreement) -> bytes:
        """Return the bundle's accuracy report; nothing in it names a slice."""
        values = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
            "reference": {"bundle": self.bundle.manifest.name, "sha256": self.bundle.digest},
            "slices": {
                "calibration": len(self.first.scans),
                "held_out": len(self.held.scans),
                "modalities": self.first.modalities,
                "digest": self.first.digest,
                "warnings": list(self.first.warnings),
            },
            "cache": plan.cache,
            "graphs": [asdict(row) for found in self.roles.values() for row in found.rows],
            "answers": asdict(agreement),
            "gates": {**asdict(self.options.gates), "same_text": self._same_text()},
        }
        return json.dumps(values, indent=1).encode()

    def _same_text(self) -> float:
        wanted = self.options.gates.same_text
        return self.steady_text if wanted is None else wanted


def _evenly(sequences: Sequences) -> Sequences:
    """Return at most `_SEQUENCES` of the sequences, spread over all of them."""
    step = max(1.0, len(sequences) / _SEQUENCES)
    return tuple(sequences[int(i * step)] for i in range(int(len(sequences) / step)))


def _has_weights(plan: QuantPlan, role: str) -> bool:
    """Return whether the plan quantizes weights of a graph."""
    return plan.precision.get(role, "fp32") != "fp32" or role in plan.nodes


def _is_fused(model: onnx.ModelProto) -> bool:
    """Return whether the graph is one for onnxruntime alone, whose packed matrices it multiplies fastest."""
    return any(node.domain == "com.microsoft" for node in model.graph.node)


def _parted(
    plan: QuantPlan, role: str, model: onnx.ModelProto, packed: Sequence[str] | set[str]
) -> tuple[QuantPlan, dict[str, int]]:
    """Return (the plan of what gets pairs, weight -> bits of what is packed)."""
    bits = {"int8-weights": 8, "int4-weights": 4}
    blocks: dict[str, int] = {}
    others: dict[str, Precision] = {}
    for site, wanted in planned(model, role, plan):
        if wanted in packed and site.operator == "MatMul":
            blocks[site.weight] = bits[wanted]
            others[site.node] = "fp32"
    if not blocks:
        return plan, {}
    return replace(plan, nodes={**plan.nodes, role: {**plan.nodes.get(role, {}), **others}}), blocks


def _packed(
    model: onnx.ModelProto, bits: Mapping[str, int], block: int, products: Mapping[str, Any]
) -> onnx.ModelProto:
    """Return the graph with these weights in blocks; every other matrix as it is."""
    matrices = {t.name for t in model.graph.initializer if len(t.dims) == 2}
    read = [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in matrices]
    excluded = {name: "the plan has another precision for it" for name in read if name not in bits}
    return quantize_weights(model, WeightPlan(block=block, bits_of=bits, excluded=excluded), products)[0]


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


_INSIDE = 1 << 30  # bytes of a graph up to which its weights lie in the ONNX file; protobuf ends at 2 GiB


def _saved(model: onnx.ModelProto, role: str, folder: Path) -> dict[str, bytes | Path]:
    """Return the files of a graph, written to `folder`."""
    name = graph_file(role)
    path = folder / f"{role}.onnx"
    for old in folder.glob(f"{role}.onnx*"):
        old.unlink()
    if model.ByteSize() < _INSIDE:
        onnx.save(model, path)
        return {name: path}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location=f"{role}.onnx.data", size_threshold=1024)
    return {name: path, f"{name}.data": folder / f"{role}.onnx.data"}
