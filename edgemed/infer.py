"""A Session: one opened bundle with its runners; ask it about scans and get answers in scan pixels.

Covers opening the graphs side by side, running them in order, keeping image features so that a second question on an
image skips its encoder, and what ran where (provenance). Knows no family by name. Does not cover reading files, reports
or the decoding loop.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from edgemed import __version__, signing
from edgemed.backends import BACKENDS, Artifact, Device, Outputs, Runner, find_backend, open_runner
from edgemed.beam_search import beam_search
from edgemed.bundle import Bundle, find_bundle, is_checkpoint, open_bundle
from edgemed.core import SCAN_WARNINGS, Answer, Finding, Language, Prompt, Provenance, Region, Scan
from edgemed.decoder_calls import PromptCache
from edgemed.decoding import NOTHING_DECODED, Decoded, DecodeOptions, decode
from edgemed.drafts import PhraseDrafts
from edgemed.errors import BackendUnavailable, InvalidInput
from edgemed.families import EXAMPLE, Family, Prepared, Question, Written, open_family
from edgemed.families.specs import has_box_head, has_split_head
from edgemed.graphs import Feeds, GraphSpec
from edgemed.kernel_head import KernelHead, open_head
from edgemed.memory import MemoryPlan, check_memory, free_bytes, place_of, plan_memory
from edgemed.triton_kernels.head_file import KERNELS

DecodeMode = Literal["auto", "plain"]

MAX_BEAMS = 16
IMAGES_KEPT = 4
"""How many images' features a Session keeps (native: 4 MiB each), or as many as one question has."""


@dataclass(frozen=True)
class InferOptions:
    """How an answer is written.

    decode: "plain" takes one token a step and no shortcut; "auto" gives the same answer in fewer steps. grammar: only
    answers that parse; without it the model writes what it likes. temperature 0 is greedy; above 0, `seed` makes the
    draw repeatable. beams above 1: beam search. router: keep what the routers of a mixture of experts said. min_score:
    a region whose score is lower is marked as uncertain.
    """

    decode: DecodeMode = "auto"
    grammar: bool = True
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    beams: int = 1
    router: bool = False
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise InvalidInput(f"min-score is {self.min_score:g}; a number from 0 to 1 was expected")
        if not 1 <= self.beams <= MAX_BEAMS or (self.beams > 1 and self.temperature > 0):
            raise InvalidInput(
                f"beams is {self.beams} at temperature {self.temperature:g}; 1 to {MAX_BEAMS} was expected, and "
                "temperature 0 with more than 1"
            )
        if self.decode not in get_args(DecodeMode):
            raise InvalidInput(f"decode is {self.decode!r}; one of {', '.join(get_args(DecodeMode))} was expected")


def open_session(
    bundle: str | Path = "nano",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    allow_cpu: bool = False,
    roles: Collection[str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Session:
    """Return a Session over the bundle of this name or in this folder, its graphs being loaded side by side.

    The back end "torch" takes the folder of a checkpoint instead and runs its modules as they are.

    device: "auto", "cpu", "gpu" or "gpu:N". allow_cpu: where the GPU that was asked for is not there, use the CPU; the
    answers then say so. threads: CPU threads of each graph, default one for each physical core. roles: the only graphs
    that are loaded; "vision_encoder" is all that `Session.embed` needs. tell: gets a line where loading takes long.

    Raises BundleError if the bundle does not hold; for torch, BackendUnavailable if torch is missing or this is no
    checkpoint, and what reading one raises; OutOfMemory or DeviceOutOfMemory, before a graph is loaded, where the
    memory that is free cannot hold them. What a graph's loading raises (BackendUnavailable, BundleError, OutOfMemory)
    comes with the first question that needs the graph, or from `Session.wait`.
    """
    if backend != "torch":
        checked = open_bundle(bundle)
        plan = partial(plan_memory, checked, roles=roles)
        return Session(checked, backend, device, threads, allow_cpu, roles=roles, plan=plan, tell=tell)
    if not is_checkpoint(bundle):
        raise BackendUnavailable(
            f"the torch back end runs checkpoint folders, {find_bundle(bundle)} is a bundle of ONNX graphs: pass the "
            "folder of the checkpoint, or use --backend onnxruntime"
        )
    signing.refuse_unsigned("a checkpoint")
    find_backend(backend)
    from edgemed.checkpoints import open_checkpoint
    from edgemed.families.opened_torch import open_folder

    opened, artifact = open_folder(bundle)
    size = 4 * sum(math.prod(tensor.shape) for tensor in open_checkpoint(bundle).stored.values())
    plan = partial(plan_memory, opened, roles=roles, float32_bytes=size)
    return Session(opened, backend, device, threads, allow_cpu, artifact, roles, plan, tell)


class Session:
    """One opened bundle with its runners and the features of the last images. One question at a time.

    artifact: what the back end runs for a role; default, the bundle's graph file. roles: see `open_session`. plan: the
    memory that is needed on a "cpu" or "gpu"; no graph is loaded where that is not free. Without it nothing is checked.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        allow_cpu: bool = False,
        artifact: Callable[[str], Artifact] | None = None,
        roles: Collection[str] | None = None,
        plan: Callable[..., MemoryPlan] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.bundle = bundle
        self._images: OrderedDict[bytes, _Image] = OrderedDict()
        self._prompts = PromptCache()
        self._lock = threading.Lock()

        def check() -> None:
            if plan is None:
                return
            place = place_of(backend, device)
            free = free_bytes(place)
            if free is None and allow_cpu and place.kind == "gpu":
                place = Device("cpu")
                free = free_bytes(place)
            if free is not None:
                check_memory(plan(kind=place.kind), place, free)

        def load(role: str) -> Runner:
            fits.result()
            runs, spec = (artifact or bundle.graph_path)(role), bundle.spec(role)
            try:
                return open_runner(backend, runs, spec, device=device, threads=threads, tell=tell)
            except BackendUnavailable:
                if not (allow_cpu and device.startswith("gpu")) or not find_backend(backend).on_cpu:
                    raise
                return open_runner(backend, runs, spec, device="cpu", threads=threads)

        wanted = [role for role in bundle.manifest.graphs if roles is None or role in roles]
        pool = ThreadPoolExecutor(1 + len(wanted), thread_name_prefix="load-graph")
        fits = pool.submit(check)  # here, too, since it may have to import the engine
        self._runners: dict[str, Future[Runner]] = {r: pool.submit(load, r) for r in wanted}

        def load_head() -> KernelHead | None:
            runner = self._runners["decoder"].result()
            if artifact is not None or not runner.device.startswith("GPU"):
                return None
            return open_head(bundle.path / KERNELS, int(runner.device.split()[1]), tell or _say_nothing)

        self._head = pool.submit(load_head) if "decoder" in self._runners else None
        pool.shutdown(wait=False)
        try:
            self.family: Family = open_family(bundle)  # while the graphs load
            fits.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> None:
        """Return when all graphs are loaded; raises what loading one of them raised."""
        for future in self._runners.values():
            future.result()
        if self._head is not None:
            self._head.result()

    def close(self) -> None:
        """Give back the runners' memory and devices, and forget all features."""
        self._images.clear()
        if self._head is not None and not self._head.cancel():
            self._head.exception()  # it may still wait for the decoder
        self._head = None
        for future in self._runners.values():
            if not future.cancel() and future.exception() is None:
                future.result().close()
        self._runners = {}

    def notice(self, language: Language) -> str:
        """Return the sentence that goes with every answer of this bundle, or ""."""
        return self.family.notice(language)

    def ask(self, scans: Scan | Sequence[Scan], prompt: Prompt, options: InferOptions | None = None) -> Answer:
        """Return the answer to `prompt` about `scans`, regions in scan pixels of the prompt's frame.

        scans: one, or as many as the family takes at a time: () asks without an image.

        Raises InvalidInput if the prompt does not fit the scans or the model, and what loading a graph raised.
        """
        options = options or InferOptions()
        scans = (scans,) if isinstance(scans, Scan) else tuple(scans)
        with self._lock:
            first = self.family.lead_in(prompt)
            if first is None:
                return self._answer(scans, prompt, options)
            found = self._answer(scans, first, options)
            answer = self._answer(scans, self.family.follow_up(prompt, found), options)
        notes = tuple(dict.fromkeys((f"asked first: {found.tagged_text}", *found.notes, *answer.notes)))
        moved = tuple(Finding(f.text, tuple(i + len(found.regions) for i in f.regions)) for f in answer.findings)
        return replace(answer, regions=(*found.regions, *answer.regions), notes=notes, findings=moved)

    def embed(self, scan: Scan, frame: int = 0) -> npt.NDArray[np.float32]:
        """Return what a frame is like, [width], of length 1: dot products of such vectors are cosine similarities.

        Only vision_encoder is run. Vectors of different bundles cannot be compared.

        Raises InvalidInput if the frame was not read, and what loading the graph raised.
        """
        with self._lock:
            prepared = self.family.prepare((scan,), Prompt("?", frame=frame))
            return self.family.embedding(self._encoded(_Run(self._runners, self.family.graphs()), prepared).features)

    def _answer(self, scans: Sequence[Scan], prompt: Prompt, options: InferOptions) -> Answer:
        """Return the answer to one question."""
        run = _Run(self._runners, self.family.graphs())
        with run.timed("prepare"):
            prepared = self.family.prepare(scans, prompt)
        features, projected = self._images_of(run, prepared)
        with run.timed("prepare"):
            question = self.family.ask(prompt, prepared, projected, constrained=options.grammar)
        decoded = _decode(run, question, options, self._prompts, self._head)
        hidden = dict(decoded.hidden)
        written = Written(decoded.ids, decoded.log_probs, hidden, decoded.ended, decoded.spreads)
        feeds = self.family.mask_feeds(prompt, prepared, projected, written)
        masks = [run.graph("mask_decoder", batch, features, projected) for batch in feeds]
        with run.timed("read_answer"):
            reading = self.family.read_answer(scans, prompt, prepared, projected, written, masks)
        return Answer(
            text=reading.text,
            tagged_text=reading.tagged_text,
            regions=tuple(_marked(region, options.min_score) for region in reading.regions),
            provenance=self._provenance(run, options, decoded),
            prompt_ids=tuple(question.prompt_ids),
            generated_ids=decoded.ids,
            notes=(*dict.fromkeys(SCAN_WARNINGS[key] for scan in scans for key in scan.warnings), *reading.notes),
            labels=reading.labels,
            findings=reading.findings,
            router=decoded.router,
            vocabulary=_vocabulary(run.specs),
            written_ids=None if question.written_ids is None else tuple(question.written_ids),
        )

    def _images_of(self, run: _Run, prepared: Prepared) -> tuple[Feeds, Feeds]:
        """Return what `_image` gives, and the projector's outputs for the examples stacked beside its own."""
        keep = max(IMAGES_KEPT, 1 + len(prepared.examples))
        features, projected = self._image(run, prepared, keep)
        shown = [self._image(run, example, keep)[1] for example in prepared.examples]
        if not shown:
            return features, projected
        return features, {**projected, **{EXAMPLE + name: np.stack([s[name] for s in shown]) for name in shown[0]}}

    def _image(self, run: _Run, prepared: Prepared, keep: int) -> tuple[Feeds, Feeds]:
        """Return (the encoder's outputs, the projector's), from memory where the same feeds were asked about before."""
        if not prepared.vision:
            return {}, {}
        image = self._encoded(run, prepared, keep)
        regions = _digest(prepared.projector)
        if regions not in image.projected:
            outputs = run.graph("projector", prepared.projector, image.features)
            image.projected.clear()  # only the last: a mask of the user gives a key of its own each time
            image.projected[regions] = outputs
        return image.features, image.projected[regions]

    def _encoded(self, run: _Run, prepared: Prepared, keep: int = IMAGES_KEPT) -> _Image:
        """Return an image with the encoder's outputs, from memory where the same feeds were asked about before.

        keep: how many images' features stay in memory.
        """
        key = _digest(prepared.vision)
        if key in self._images:
            self._images.move_to_end(key)
            run.timings.setdefault("vision_encoder", 0.0)
        else:
            self._images[key] = _Image(run.graph("vision_encoder", prepared.vision))
            while len(self._images) > keep:
                self._images.popitem(last=False)
        return self._images[key]

    def _provenance(self, run: _Run, options: InferOptions, decoded: Decoded) -> Provenance:
        manifest = self.bundle.manifest
        counts = {
            "prompt": decoded.prompt_tokens,
            "held": decoded.held,
            "generated": len(decoded.ids),
            "decoder_calls": decoded.decoder_calls,
            "forced": decoded.forced,
            "drafted": decoded.drafted,
            "accepted": decoded.accepted,
        }
        runners = [future.result() for future in self._runners.values()]
        backends = sorted({runner.backend for runner in runners})
        head = _head_for(options, self._head)
        return Provenance(
            edgemed=__version__,
            family=manifest.family,
            bundle=manifest.name,
            bundle_sha256=self.bundle.digest,
            backend=", ".join([*backends, *(["triton"] if head is not None else [])]),
            device=", ".join(sorted({runner.device for runner in runners})),
            precision={**manifest.precision, **({} if head is None else {"head": head.format})},
            decode=options.decode,
            tokens=counts,
            timings_ms={**run.timings, "total": run.elapsed_ms()},
            versions=_versions(backends),
        )


def _marked(region: Region, min_score: float) -> Region:
    """Return the region, marked as uncertain where its score is known and lower."""
    doubtful = region.score is not None and region.score < min_score
    return replace(region, uncertain=True) if doubtful else region


@dataclass(eq=False)
class _Image:
    """The features of one image and the projector's outputs for the regions last asked about."""

    features: Outputs
    projected: dict[bytes, Outputs] = field(default_factory=dict)


class _Run:
    """One question on its way through the graphs: runs them and notes the time each took, in ms.

    "load" is the time spent waiting for graphs that were still being loaded.
    """

    def __init__(self, runners: Mapping[str, Future[Runner]], specs: Mapping[str, GraphSpec]) -> None:
        self._runners = runners
        self.specs = specs
        self.timings: dict[str, float] = {}
        self._start = time.perf_counter()

    def elapsed_ms(self) -> float:
        """Return the time since the question came in."""
        return (time.perf_counter() - self._start) * 1000

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to `timings`."""
        start = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + (time.perf_counter() - start) * 1000

    def runner(self, role: str) -> Runner:
        """Return the runner of a role once it is loaded. Raises what loading it raised."""
        if role not in self._runners:
            raise InvalidInput(f"there is no {role} to run; the session was closed or the bundle has none")
        if self._runners[role].done():
            return self._runners[role].result()
        with self.timed("load"):
            return self._runners[role].result()

    def graph(self, role: str, feeds: Feeds, *earlier: Feeds) -> Outputs:
        """Return the outputs of one graph; inputs that `feeds` lacks are taken from the outputs of earlier graphs."""
        known = {name: array for outputs in earlier for name, array in outputs.items()}
        missing = {
            t.name: known[t.name] for t in self.specs[role].fed_inputs if t.name not in feeds and t.name in known
        }
        runner = self.runner(role)
        with self.timed(role):
            return runner.run({**feeds, **missing})


def _vocabulary(specs: Mapping[str, GraphSpec]) -> int | None:
    size = next((t.shape[-1] for t in specs["decoder"].outputs if t.name == "logits"), None)
    return size if isinstance(size, int) else None


def _head_for(options: InferOptions, head: Future[KernelHead | None] | None) -> KernelHead | None:
    """Return the kernels, where there are any and they choose as `options` say: they have no logits to draw from."""
    greedy = options.beams == 1 and options.temperature == 0
    return head.result() if head is not None and greedy else None


def _decode(
    run: _Run,
    question: Question,
    options: InferOptions,
    prompts: PromptCache,
    head: Future[KernelHead | None] | None,
) -> Decoded:
    if not question.prompt_ids:
        return NOTHING_DECODED
    if options.router and all(t.name != "router" for t in run.specs["decoder"].outputs):
        raise InvalidInput("this model has no experts, so that there is no router to look into")
    runner = run.runner("decoder")
    cache = run.specs["decoder"].dims.get("cache")
    with run.timed("decoder"):
        wanted = DecodeOptions(
            eos_id=question.eos_id,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            keep_hidden=question.keep_hidden,
            router=options.router,
            numbers=question.numbers,
            split_head=has_split_head(run.specs["decoder"]),
            box_head=has_box_head(run.specs["decoder"]),
            **({} if cache is None else {"cache": cache.max}),
        )
        what = (runner, question.prompt_ids, question.fixed, question.grammar, wanted)
        if options.beams > 1:
            prompts.forget()
            decoded = beam_search(*what, options.beams)
        else:
            drafter = None
            if options.decode == "auto":
                drafter = question.drafter or PhraseDrafts([question.prompt_ids])
            decoded = decode(*what, drafter, prompts, _head_for(options, head))
    run.timings["decoder_prefill"] = decoded.prefill_ms
    return decoded


def _say_nothing(line: str) -> None:
    """Take a note and drop it."""


def _digest(feeds: Feeds) -> bytes:
    """Return a digest of names, types, shapes and bytes of `feeds`."""
    state = hashlib.blake2b(digest_size=32)
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        state.update(f"{name} {array.dtype} {array.shape}\n".encode())
        state.update(array.data)
    return state.digest()


def _versions(backends: list[str]) -> dict[str, str]:
    """Return the versions of Python, NumPy and the engines in use."""
    libraries = [
        "numpy",
        *(lib for n in backends if n in BACKENDS for lib in (BACKENDS[n].library, BACKENDS[n].instead)),
    ]
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in libraries}
    return {"python": platform.python_version(), **{name: str(v) for name, v in found.items() if v}}
