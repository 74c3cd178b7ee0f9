"""Makes the kept corpus: the starts below, and of their mutations the first for each way an input can end.

    python tests/robustness/make_corpus.py [INPUTS_PER_TARGET [TARGET...]]

DICOM files are small ones of pydicom's own tests (MIT licence), without the pixels where they are long; everything else
is written here. The same versions of pydicom and edgemed give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import sys
import zlib
from pathlib import Path

import harness
import numpy as np

MAX_BYTES = 6000
"""Of a mutation that is kept."""

DICOM = {
    "header": ("nested_priv_SQ", "no_meta_group_length", "ExplVR_BigEndNoMeta", "priv_SQ", "UN_sequence", "rtplan",
               "meta_missing_tsyntax", "CT_small", "MR_small_bigendian", "reportsi", "badVR"),
    "pixel": ("JPEGLSNearLossless_08", "SC_rgb_jls_lossy_line", "SC_rgb_small_odd", "rtdose_1frame", "SC_rgb_rle",
              "SC_rgb_small_odd_jpeg", "JPEG2000", "SC_rgb_dcmtk_+eb+cy+np", "rtdose_rle_1frame", "image_dfl"),
}  # fmt: skip
PIXEL_DATA = b"\xe0\x7f\x10\x00"


def starts() -> dict[str, list[bytes]]:
    """Return the inputs to start from."""
    made = {name: [dicom(file) for file in files] for name, files in DICOM.items()}
    made["header"].append(dicomdir())
    made["pixel"] += [picture("PNG"), picture("JPEG"), *tiffs()]
    made["volume"] = [*volumes(), *metas()]
    made["manifest"] = manifests()
    made["config"] = [text.encode() for text in CONFIGS]
    made["prompt"] = [text.encode() for text in PROMPTS]
    return made


def dicom(name: str) -> bytes:
    from pydicom.data import get_testdata_file

    data = Path(str(get_testdata_file(f"{name}.dcm"))).read_bytes()
    at = data.find(PIXEL_DATA)
    return data if len(data) < 5000 or at < 0 else data[: at + 40]


def dicomdir() -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3"
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = 400
    record = Dataset()
    record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = 400, 0xFFFF
    record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", ["DICOM", "IM0001"]
    ds.DirectoryRecordSequence = [record]
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def picture(kind: str) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(stream, kind)
    return stream.getvalue()


def tiffs() -> list[bytes]:
    """Return TIFF files: colour as it is, and two pages of 16 bits, packed and turned by their orientation."""
    from PIL import Image

    stream = io.BytesIO()
    pages = [Image.fromarray(np.arange(n, 192 + n, dtype=np.uint16).reshape(12, 16) * 300) for n in (0, 7)]
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw", tiffinfo={274: 6})
    return [picture("TIFF"), stream.getvalue()]


def metas() -> list[bytes]:
    """Return MetaImage files with their voxels behind the header: as they are, and packed."""
    raw = np.arange(120, dtype="<i2").tobytes()
    packed = zlib.compress(raw)
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {}\n"
        "TransformMatrix = 0.96 0.28 0 -0.28 0.96 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 2 2 5\nDimSize = 4 5 6\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    sized = f"True\nCompressedDataSize = {len(packed)}"
    return [head.format("False").encode() + raw, head.format(sized).encode() + packed]


def volumes() -> list[bytes]:
    import nibabel

    voxels = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    one = nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 5, 1])).to_bytes()
    two = nibabel.Nifti2Image(voxels.astype(np.float32), np.diag([2.0, 2, 5, 1])).to_bytes()
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 5 6\nspace directions: (2,0,0) "
        "(0,2,0) (0,0,5)\nkinds: domain domain domain\nendian: little\nencoding: {}\nspace origin: (0,0,0)\n\n"
    )
    raw = voxels.tobytes("F")
    packed = gzip.compress(raw, mtime=0)
    return [one, two, gzip.compress(one, mtime=0), head.format("raw").encode() + raw,
            head.format("gzip").encode() + packed]  # fmt: skip


def manifests() -> list[bytes]:
    from edgemed import keys, manifest, signing
    from edgemed.archive import Index, Part, _index_bytes
    from edgemed.backends.engine_cache import MAGIC
    from edgemed.graphs import DimRange, GraphSpec, TensorSpec

    shape = (1, "sequence")
    tensors = (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),)
    spec = GraphSpec("decoder", *tensors, {"sequence": DimRange(1, 8, 16)})
    made = manifest.Manifest(
        "tiny", "native", {"decoder": spec}, {"graphs/decoder.onnx": "ab" * 32, "NOTICE": "cd" * 32},
        {"decoder": "int8"}, versions={"bundle": "1.2"}, licences={"weights": "MIT"},
        settings={"side": 256, "名": "肝"},
    )  # fmt: skip
    public = bytes(range(32))
    listed = {
        "format": 1, "kind": "edgemed-keys", "sequence": 2, "issued": "2026-01-01",
        "keys": {keys.key_id(public): {"public": public.hex(), "role": "site", "not_before": "", "not_after": ""}},
        "revoked": {"ab" * 32: {"date": "2026-01-01", "reason": "lost"}},
    }  # fmt: skip
    signed = {"algorithm": "ed25519", "public": "", "signature": "ab" * 64}
    header = {"role": "decoder", "graph": "g", "library": "library", "target": "any", "precision": "fp16",
              "profile": "p", "size": 4, "sha256": hashlib.sha256(b"code").hexdigest()}  # fmt: skip
    return [
        manifest.to_bytes(made),
        signing.to_bytes(signing.Signature(k * 32, role, bytes(64)) for k, role in (("ab", "vendor"), ("cd", "site"))),
        keys.canonical(listed),
        keys.canonical(listed) + keys.canonical(signed),
        _index_bytes(Index("tiny", "ab" * 32, (Part("tiny.tar.000", 1024, "cd" * 32),))),
        b"\x08\x0a\x12\x04test\x42\x04\x0a\x00\x10\x15\x3a\x10\x0a\x0e\x22\x06MatMul\x3a\x00\x0a\x02ab",
        MAGIC + json.dumps(header).encode() + b"\ncode",
    ]  # fmt: skip


CONFIGS = (
    "vendor, site\n[bundles]\nrequire_signature = true\n",
    '[bundles]\nrequire_signature = true\ntrusted_keys = "keys.json"\nroot_keys = ["ab", "cd"]\n'
    'required_roles = ["vendor", "site"]\n',
    'folder = "node"\naet = "EDGEMED"\nport = 11112\n[[sender]]\naet = "CT1"\nhost = "127.0.0.1"\n[[target]]\n'
    'name = "PACS"\naet = "PACS"\nhost = "10.0.0.2"\nport = 104\n[[rule]]\nname = "liver"\nprompts = ["Where?"]\n'
    'targets = ["PACS"]\n',
    '# 设置\n[audit]\nfolder = "trail"\nserver = "log.example:6514"\n',
)
PROMPTS = (
    "box:10,20,30.5,40", "point:3,4", "mask:a.png", "40,400", "lung",
    "The <ref>liver</ref><box><c1><c2><c30><c40></box><seg> is here. <ref>脾</ref><box><c5></box>",
    "<ref>left lung</ref><box>[[12, 34, 560, 780], [1, 2, 3, 4]]</box> and </ref> 左肺",
    "left lung[[12, 34, 560, 780]], heart[[1, 2, 3, 4]]", "What is <region>a/b.png</region>? <region></region>",
    '{"selections": [{"name": "CT", "conditions": {"Modality": "(?i)ct", "SliceThickness": [1, 5], '
    '"ImageType": ["PRIMARY", "!LOCALIZER"], "ImageOrientationPatient": "Axial"}}]}',
    '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhere?"}, '
    '{"from": "gpt", "value": "肝"}]}',
    '[{"id": 1, "image": ["a.png"], "answer_type": "seg", "conversations": [{"from": "human", "value": "q"}]}]',
    '{"liver": {"base_prompt": "Where is it?", "root": "x", "length": 3}}',
)  # fmt: skip


def told_by(target: harness.Target, data: bytes) -> str:
    """Return how an input ends: the error and its text without numbers and names."""
    from edgemed.errors import EdgemedError

    try:
        target.parse(data)
    except EdgemedError as error:
        text = str(error).removeprefix(f"{target.file}: ").replace(str(target.file), "")
        return re.sub(r"'[^']*'|\d+|[^ a-zA-Z]", "", f"{type(error).__name__} {text}")[:60]
    return "read"


def main(count: int, targets: list[str]) -> int:
    """Write the corpus anew, that of all targets if none is named, and print how large it is."""
    for name, seeds in starts().items():
        if targets and name not in targets:
            continue
        folder = harness.CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*folder.glob("start-*"), *folder.glob("kept-*")):  # found-*: what once went wrong
            path.unlink()
        kept: dict[str, bytes] = {f"start {n}": seed for n, seed in enumerate(seeds)}
        with harness.TARGETS[name]() as target:
            for number in range(count):
                data = harness.mutated(seeds, random.Random(f"corpus/{name}/{number}"))
                if len(data) < MAX_BYTES:
                    kept.setdefault(told_by(target, data), data)
        for why, data in kept.items():
            kind = "start" if why.startswith("start") else "kept"
            (folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
        sizes = [path.stat().st_size for path in folder.iterdir()]
        print(f"{name}: {len(seeds)} starts, {len(sizes)} files, {sum(sizes)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1500, sys.argv[2:]))
