"""Which slices are chosen, and what the graphs of each family's bundle are fed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from edgemed.bundle import Bundle, open_bundle
from edgemed.calibration.slices import EXPECTED_MODALITIES, QUESTIONS, Recording, Slices, read_slices, record_feeds
from edgemed.core import Prompt, Scan
from edgemed.errors import CannotRead, InvalidInput, NoInput


@pytest.fixture(scope="module")
def public() -> Slices:
    return read_slices(most=6)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)).save(path)


def test_the_public_set_has_every_modality_in_turn(public: Slices) -> None:
    assert set(public.modalities) >= set(EXPECTED_MODALITIES)
    assert max(public.modalities.values()) - min(public.modalities.values()) <= 1
    assert public.warnings == ()


def test_a_slice_is_recorded_by_its_digest_alone(tmp_path: Path, sample_scan: str) -> None:
    shutil.copy(sample_scan, tmp_path / "DOE^JANE.dcm")
    slices = read_slices(tmp_path)
    digest = hashlib.sha256(Path(sample_scan).read_bytes()).hexdigest()
    assert slices.digests == (digest,)
    assert slices.digest == hashlib.sha256(digest.encode()).hexdigest()
    assert "JANE" not in repr((slices.digests, slices.warnings, slices.modalities))
    assert slices.warnings == tuple(
        f"no slice of modality {name}: ranges and gates say nothing about it" for name in ("CR", "MR", "US")
    )


def test_a_folder_is_sampled_over_modalities_without_copies_and_blank_pictures(
    tmp_path: Path, sample_scan: str
) -> None:
    for i in range(6):
        picture(tmp_path / "deep" / f"{i}.png", i)
    shutil.copy(tmp_path / "deep" / "0.png", tmp_path / "again.png")
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path / "blank.png")
    (tmp_path / "notes.txt").write_text("no image")
    shutil.copy(sample_scan, tmp_path / "ct.dcm")
    everything = read_slices(tmp_path, 99, expected=())
    assert len(everything.scans) == 7
    assert everything.warnings == ()
    some = read_slices(tmp_path, 3)
    assert some.modalities["CT"] == 1
    assert sum(some.modalities.values()) == 3


def test_the_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / f"{i}.png", i)
    chosen = [read_slices(tmp_path, 4, seed=seed).digests for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_the_digest_of_the_set_does_not_depend_on_the_order(public: Slices) -> None:
    assert Slices(public.scans[::-1], public.digests[::-1]).digest == public.digest
    assert Slices(public.scans[1:], public.digests[1:]).digest != public.digest


def test_slices_are_split_for_calibration_and_for_judging(public: Slices) -> None:
    first, held_out = public.split(2)
    assert first.digests + held_out.digests == public.digests
    assert len(held_out.scans) == 2
    with pytest.raises(NoInput, match="6 slices cannot be split with 6 held out"):
        public.split(6)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NoInput, match="no image among 0 files"):
        read_slices(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(NoInput, match="no image among 1 files"):
        read_slices(tmp_path)
    with pytest.raises(CannotRead, match="is not a folder"):
        read_slices(tmp_path / "notes.txt")
    with pytest.raises(InvalidInput, match="0 slices"):
        read_slices(tmp_path, 0)


def check(bundle: Bundle, recording: Recording, scans: tuple[Scan, ...]) -> None:
    """What holds for every family: feeds fit their graphs, prefill comes first, steps follow it."""
    for role, sequences in recording.calls.items():
        for sequence in sequences:
            for feeds in sequence:
                bundle.spec(role).check(feeds)
    assert len(recording.calls["vision_encoder"]) == len(scans)
    for sequence in recording.calls["decoder"]:
        past = [int(feeds["past_length"][0]) for feeds in sequence]
        sizes = [feeds["input_ids"].shape[1] for feeds in sequence]
        assert past[0] == 0
        assert past[1:] == list(np.cumsum(sizes)[:-1])
        assert set(sizes[1:]) <= {1}
        assert sequence[0]["image_tokens"].std() > 0


def test_nanos_graphs_are_fed_from_real_answers(sample_scan: str) -> None:
    from edgemed.dicom import read_scan

    scan = read_scan(sample_scan)
    bundle = open_bundle("nano")
    recording = record_feeds(bundle, [scan], max_new_tokens=12, threads=1, questions=QUESTIONS[:1])
    check(bundle, recording, (scan,))
    assert recording.warnings == ()
    assert any(feeds["has_box"].any() for (feeds,) in recording.calls["mask_decoder"])
    assert any(len(sequence) == 12 for sequence in recording.calls["decoder"])


@pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])
def test_published_families_take_the_same_questions(
    published_bundle: Callable[[str], Bundle], family: str, public: Slices
) -> None:
    bundle = published_bundle(family)
    recording = record_feeds(bundle, public.scans[:1], max_new_tokens=2, threads=1)
    check(bundle, recording, public.scans[:1])
    assert recording.warnings == ()


def test_questions_that_no_family_takes_are_an_error(tiny_native: ModuleType, tmp_path: Path, public: Slices) -> None:
    bundle = tiny_native.make(tmp_path / "b", "Yes.")
    with pytest.raises(InvalidInput, match="took none of the 1 questions"):
        record_feeds(bundle, public.scans[:1], questions=[Prompt("?", settings={"no such": "setting"})])


def test_a_graph_that_no_question_leads_to_is_told(tiny_native: ModuleType, tmp_path: Path, public: Slices) -> None:
    bundle = tiny_native.make(tmp_path / "b", "Yes.")
    recording = record_feeds(bundle, public.scans[:1], questions=QUESTIONS[2:3])
    assert recording.calls["mask_decoder"] == ()
    assert recording.warnings == ("no question led to the mask_decoder: it has no feeds",)
