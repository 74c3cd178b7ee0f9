"""What becomes of each element of a dataset: DICOM PS3.15 Annex E, the Basic Profile and its options.

    cleaner = Cleaner(profile, key, dataset)
    cleaner.clean(dataset)          in place, sequences too
    cleaner.counts, cleaner.pseudonym

The table E.1-1 is data (deid_actions.toml). What it leaves alone is treated more strictly than the standard asks for:

    free text that does not say how the image was made      a dummy, with Clean Descriptors: cleaned
    dates and times                                         removed, with Retain ... Dates: kept or shifted
    UIDs that the standard does not define                  new ones
    names of persons                                        a dummy
    codes                                                   kept in a public scheme's form, with that scheme's meaning
    coded strings and numbers that are none, unknown bytes  removed
    what is kept and has a part of a name or an id in it    removed

A cleaned text has left only words that occur in the meanings of DICOM's own context groups or in the terminology, and
numbers of up to three digits; parts of the patient's, a person's or an id's name are never among them.

Does not cover pixels (`deid_worker`) and files (`deid`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import date, timedelta
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgemed.dicom.header import _finish_tags
from edgemed.errors import EdgemedError
from edgemed.terminology import read_terms

if TYPE_CHECKING:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

REMOVED = "REMOVED"
_TEXT = ("LO", "SH", "LT", "ST", "UT", "UC")
_TIME = ("DA", "DT", "TM")
_NUMBERS = ("DS", "IS", "FL", "FD", "SL", "SS", "SV", "UL", "US", "UV")
_DUMMY = {
    **dict.fromkeys(_TEXT, REMOVED), **dict.fromkeys(_NUMBERS, 0), "PN": "Anonymous", "AE": REMOVED, "CS": REMOVED,
    "AS": "000Y", "UR": "urn:removed", "DA": "19000101", "DT": "19000101000000", "TM": "000000", "OB": b"\0\0",
    "OW": b"\0\0",
}  # fmt: skip
UID_FORM = re.compile(r"[0-9.]{1,64}\Z")
_CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}\Z")
_NUMBER_STRING = re.compile(r" *[-+]?[0-9]*\.?[0-9]*(?:[eE][-+]?[0-9]+)? *\0?\Z")
_SNOMED_RT = re.compile(r"[A-Z]-[0-9A-F]{2,6}\Z")
_SCHEMES = {
    "DCM": re.compile(r"\d{6}\Z"), "SCT": re.compile(r"\d{5,18}\Z"), "LN": re.compile(r"\d{1,6}-\d\Z"),
    "RADLEX": re.compile(r"RID\d{1,6}\Z"), "FMA": re.compile(r"\d{1,6}\Z"), "I10": re.compile(r"[A-Z]\d\d(\.\d)?\Z"),
    **dict.fromkeys(("SRT", "SNM3", "99SDM"), _SNOMED_RT),
}  # fmt: skip
"""Public coding schemes -> the form of their codes. UCUM units are kept where DICOM names them."""
_IDS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "IssuerOfPatientID", "MedicalRecordLocator", "AdmissionID")
_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")
_OLDEST = 89  # years; ages above identify (45 CFR 164.514 b 2 C)
_CURVES, _OVERLAYS = 0x50, 0x60


@dataclass(frozen=True)
class Profile:
    """The options of PS3.15 E.3, each off: the Basic Profile alone.

    retain_dates: "" (none), "full", or "modified": each patient's shifted by a number of days of their own.
    clean_pixel_data: whoever runs it has seen that the blanked regions hold all text there was.
    """

    retain_uids: bool = False
    retain_dates: str = ""
    retain_patient: bool = False
    retain_device: bool = False
    retain_institution: bool = False
    retain_safe_private: bool = False
    clean_descriptors: bool = False
    clean_content: bool = False
    clean_graphics: bool = False
    clean_pixel_data: bool = False

    def __post_init__(self) -> None:
        if self.retain_dates not in ("", "full", "modified"):
            raise EdgemedError(f"dates cannot be kept {self.retain_dates!r}; full or modified was expected")

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of CID 7050 for what this profile does, in the order of the fields."""
        chosen = [(f.name, getattr(self, f.name)) for f in fields(self)]
        names = [f"{name}:{value}" if name == "retain_dates" else name for name, value in chosen if value]
        return ("113100", *(CODES[name][0] for name in names))


CODES = {
    "retain_uids": ("113110", "Retain UIDs Option"),
    "retain_dates:full": ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    "retain_dates:modified": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "retain_patient": ("113108", "Retain Patient Characteristics Option"),
    "retain_device": ("113109", "Retain Device Identity Option"),
    "retain_institution": ("113112", "Retain Institution Identity Option"),
    "retain_safe_private": ("113111", "Retain Safe Private Option"),
    "clean_descriptors": ("113105", "Clean Descriptors Option"),
    "clean_content": ("113104", "Clean Structured Content Option"),
    "clean_graphics": ("113103", "Clean Graphics Option"),
    "clean_pixel_data": ("113101", "Clean Pixel Data Option"),
    "basic": ("113100", "Basic Application Confidentiality Profile"),
}
"""Field of Profile -> (code, meaning) of CID 7050."""


@dataclass(frozen=True)
class Rule:
    """One row of Table E.1-1: the basic action, and the options that change it, as K (keep) or C (clean)."""

    action: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Rules:
    """The data file: rules by tag, tags of texts and bytes that stay, tags that always go, private elements."""

    rules: Mapping[int, Rule]
    keep: frozenset[int]
    bulk: frozenset[int]
    remove: frozenset[int]
    safe_private: Mapping[str, frozenset[tuple[int, int]]]


@cache
def read_rules() -> Rules:
    """Return what deid_actions.toml says."""
    from pydicom.datadict import tag_for_keyword

    told = tomllib.loads(resources.files("edgemed.dicom").joinpath("deid_actions.toml").read_text("utf-8"))

    def tags(names: list[str]) -> frozenset[int]:
        return frozenset(tag for name in names if (tag := tag_for_keyword(name)) is not None)

    rules: dict[int, Rule] = {}
    for name, text in told["attributes"].items():
        action, *options = text.split()
        cleans = ("descriptors", "content", "graphics")
        changes = {o.partition(":")[0]: "C" if o.endswith(":C") or o in cleans else "K" for o in options}
        tag = tag_for_keyword(name)
        rules[int(name, 16) if tag is None else tag] = Rule(action, changes)
    private = {
        creator: frozenset((int(e[:4], 16), int(e[4:], 16)) for e in elements)
        for creator, elements in told["safe_private"].items()
    }
    return Rules(rules, tags(told["keep"]), tags(told["bulk"]), tags(told["remove"]), private)


class Cleaner:
    """De-identifies the dataset of one file. key: the secret that new UIDs, pseudonyms and shifts are derived from.

    pseudonym: of the patient, "" where the file tells neither id nor name. counts: what was done how often.
    """

    def __init__(self, profile: Profile, key: bytes, ds: Dataset) -> None:
        self._profile, self._key = profile, key
        self._rules = read_rules()
        self._names = frozenset(_name_parts(ds))
        patient = _joined(ds.get("PatientID")) or _joined(ds.get("PatientName"))
        self.pseudonym = f"P{self._digest('patient', patient).hex()[:12].upper()}" if patient else ""
        days = int.from_bytes(self._digest("days", patient)[:4], "big") % 3650
        self._shift = timedelta(days=1 + days)
        self.counts: Counter[str] = Counter()

    def _digest(self, what: str, text: str) -> bytes:
        return hmac.digest(self._key, f"{what}\0{text}".encode(), hashlib.sha256)

    def new_uid(self, uid: str) -> str:
        """Return the UID 2.25.N that takes the place of `uid`: always the same with one key, else unrelated.

        With Retain UIDs a UID is kept; what is none, and could be a name or a path, is not.
        """
        if self._profile.retain_uids and UID_FORM.match(uid):
            return uid
        return f"2.25.{uuid.UUID(bytes=self._digest('uid', uid)[:16], version=4).int}"

    # --- elements ---

    def clean(self, ds: Dataset) -> None:
        """De-identify a dataset in place, with the sequences in it."""
        _finish_tags(ds)
        self._clean_groups(ds)
        for tag in list(ds.keys()):
            if tag not in ds:
                continue
            element = ds[tag]
            if element.tag.is_private:
                self._private(ds, element)
            else:
                self._standard(ds, element)
        self._clean_code(ds)

    def _standard(self, ds: Dataset, element: DataElement) -> None:
        tag = int(element.tag)
        rule = self._rules.rules.get(tag)
        if tag in self._rules.remove or tag >> 16 in (0x0000, 0x0002, 0x0004, 0x0006):
            self._drop(ds, element)
        elif rule is not None:
            self._apply(ds, element, self._chosen(rule))
        else:
            self._unlisted(ds, element)

    def _chosen(self, rule: Rule) -> str:
        """Return the rule's action under the options: D, Z, X, U, K, C, S (shift) or one as "X/D"."""
        profile = self._profile
        chosen = {
            "uids": profile.retain_uids, "dates": bool(profile.retain_dates), "device": profile.retain_device,
            "institution": profile.retain_institution, "patient": profile.retain_patient,
            "descriptors": profile.clean_descriptors, "content": profile.clean_content,
            "graphics": profile.clean_graphics,
        }  # fmt: skip
        for option, change in rule.options.items():
            if chosen[option]:
                return "S" if option == "dates" and profile.retain_dates == "modified" else change
        return rule.action

    def _apply(self, ds: Dataset, element: DataElement, action: str) -> None:
        if element.VR == "SQ":
            self._sequence(ds, element, action)
        elif element.VR == "UI" and action != "X":
            self._renew(element)
        elif action == "K":
            self._keep(ds, element)
        elif action == "C":
            self._clean_text(ds, element)
        elif action == "S":
            self._shift_dates(ds, element)
        elif action == "X":
            self._drop(ds, element)
        elif action in ("Z", "X/Z") and element.keyword != "PatientName":
            self._set(element, None, "emptied")
        else:  # where the IOD decides, a dummy is right in all of them
            self._dummy(ds, element)

    def _sequence(self, ds: Dataset, element: DataElement, action: str) -> None:
        if element.keyword == "ContentSequence":
            self._content(element, action)
        elif action in ("Z", "X/Z"):
            self._set(element, [], "emptied")
        elif action in ("X", "X/D", "X/Z/D") or (action == "D" and element.keyword == "GraphicAnnotationSequence"):
            self._drop(ds, element)
        else:
            for item in element.value:
                self.clean(item)

    def _unlisted(self, ds: Dataset, element: DataElement) -> None:
        """What Table E.1-1 does not list."""
        tag, vr = int(element.tag), element.VR
        if vr == "SQ":
            for item in element.value:
                self.clean(item)
        elif vr == "PN":
            self._dummy(ds, element)
        elif vr in _TEXT:
            if tag in self._rules.keep or element.keyword in _CODE_PARTS:
                self._keep(ds, element)
            elif self._profile.clean_descriptors:
                self._clean_text(ds, element)
            else:
                self._dummy(ds, element)
        elif vr in _TIME:
            if self._profile.retain_dates == "modified":
                self._shift_dates(ds, element)
            elif not self._profile.retain_dates:
                self._drop(ds, element)
        elif vr == "UI":
            self._renew(element)
        elif vr == "CS":
            if not all(_CODE_STRING.match(str(v)) for v in _values(element)):
                self._drop(ds, element)
        elif vr in ("DS", "IS"):
            if not all(_NUMBER_STRING.match(_original(v)) for v in _values(element)):
                self._drop(ds, element)
        elif (vr in ("UN", "UR", "AE", "AS") or vr == "OB") and tag not in self._rules.bulk:
            self._drop(ds, element)

    def _private(self, ds: Dataset, element: DataElement) -> None:
        """Keep a private element if it is a number that the standard calls safe, and the creator of such."""
        if self._profile.retain_safe_private:
            tag = element.tag
            if 0x10 <= tag.element <= 0xFF:
                creator, block = str(element.value), tag.element
                safe = self._rules.safe_private.get(creator, frozenset())
                if any((tag.group, other.element & 0xFF) in safe for other in _block(ds, tag.group, block)):
                    return
            else:
                creator = str(ds[tag.group, tag.element >> 8].value) if (tag.group, tag.element >> 8) in ds else ""
                safe = self._rules.safe_private.get(creator, frozenset())
                numbers = element.VR in _NUMBERS and all(
                    element.VR not in ("DS", "IS") or _NUMBER_STRING.match(_original(v)) for v in _values(element)
                )
                if (tag.group, tag.element & 0xFF) in safe and numbers:
                    return
        self._drop(ds, element, "private")

    def _clean_groups(self, ds: Dataset) -> None:
        """Remove curves, and overlays: with Clean Graphics, those of type graphics, for they may be writing."""
        for tag in list(ds.keys()):
            kind = tag.group >> 8
            if tag.group % 2 or kind not in (_CURVES, _OVERLAYS):
                continue
            shape = str(ds.get((tag.group, 0x0040), "")) if kind == _OVERLAYS else ""
            region = shape and ds[tag.group, 0x0040].value == "R" and (tag.group, 0x3000) in ds
            if not (self._profile.clean_graphics and region) or tag.element == 0x4000:
                self._drop(ds, ds[tag])

    # --- actions ---

    def _drop(self, ds: Dataset, element: DataElement, what: str = "removed") -> None:
        del ds[element.tag]
        self.counts[what] += 1

    def _set(self, element: DataElement, value: Any, what: str) -> None:
        element.value = value
        self.counts[what] += 1

    def _dummy(self, ds: Dataset, element: DataElement) -> None:
        if element.keyword in ("PatientName", "PatientID"):
            self._set(element, self.pseudonym, "replaced")
        elif element.VR == "UI":
            self._renew(element)
        elif element.VR not in _DUMMY:
            self._drop(ds, element)
        else:
            count = max(1, len(_values(element)))
            dummy = _DUMMY[element.VR]
            self._set(element, [dummy] * count if count > 1 else dummy, "replaced")

    def _renew(self, element: DataElement) -> None:
        """Give new UIDs for those that the standard does not define."""
        from pydicom.uid import UID_dictionary

        values = [str(v) for v in _values(element)]
        new = [v if v in UID_dictionary or not v else self.new_uid(v) for v in values]
        if new != values:
            self._set(element, new if len(new) > 1 else new[0], "uids")

    def _keep(self, ds: Dataset, element: DataElement) -> None:
        if element.VR in _TEXT and any(self._names & set(_words(str(v))) for v in _values(element)):
            self._dummy(ds, element)
        elif element.keyword == "PatientAge" and str(element.value)[:3].isdecimal():
            years = int(str(element.value)[:3]) if str(element.value).endswith("Y") else 0
            if years > _OLDEST:
                self._set(element, f"{_OLDEST + 1:03d}Y", "replaced")

    def _clean_text(self, ds: Dataset, element: DataElement) -> None:
        if element.VR not in _TEXT:
            self._dummy(ds, element)
            return
        known = _vocabulary() - self._names
        kept = [
            " ".join(w for w in _WORD.findall(str(v)) if w.lower() in known or (w[0].isdecimal() and len(w) <= 3))
            for v in _values(element)
        ]
        texts = [text or REMOVED for text in kept] or [REMOVED]
        self._set(element, texts if len(texts) > 1 else texts[0], "cleaned")

    def _shift_dates(self, ds: Dataset, element: DataElement) -> None:
        if element.VR == "TM" or element.VR not in _TIME:
            return
        moved = [self._moved(str(v)) for v in _values(element)]
        if any(v is None for v in moved):
            self._drop(ds, element)
        elif moved:
            self._set(element, moved if len(moved) > 1 else moved[0], "shifted")

    def _moved(self, text: str) -> str | None:
        """Return a DA or DT value some days earlier, None for one that has no whole date."""
        try:
            day = date(int(text[:4]), int(text[4:6]), int(text[6:8])) - self._shift
        except (ValueError, OverflowError):
            return None
        return f"{day.year:04d}{day:%m%d}{text[8:]}"

    def _clean_code(self, ds: Dataset) -> None:
        """Keep the code in a dataset that is one if its scheme is public; its meaning is then the scheme's."""
        values = [ds[k] for k in ("CodeValue", "LongCodeValue", "URNCodeValue") if k in ds]
        if not values and "CodeMeaning" not in ds:
            return
        scheme, code = _joined(ds.get("CodingSchemeDesignator")), _joined(values[0].value if values else "")
        meanings = _meanings().get((scheme, code), ())
        form = _SCHEMES.get(scheme)
        if len(values) != 1 or not (meanings or (form is not None and form.match(code))):
            meanings = ()
            for value in values:
                self._set(value, REMOVED, "replaced")
            if "CodingSchemeDesignator" in ds:
                ds.CodingSchemeDesignator = f"99{REMOVED}"
            ds.pop("CodingSchemeVersion", None)
        if "CodeMeaning" in ds and _joined(ds.CodeMeaning) not in meanings:
            self._set(ds["CodeMeaning"], meanings[0] if meanings else REMOVED, "replaced")

    def _content(self, element: DataElement, action: str) -> None:
        """Clean the items of an SR tree, or put one that says nothing in their place."""
        if action != "C":
            self._set(element, [_nothing()], "replaced")
            return
        for item in element.value:
            self.clean(item)


_CODE_PARTS = ("CodeValue", "LongCodeValue", "CodeMeaning")


def _nothing() -> Dataset:
    from pydicom.dataset import Dataset

    name, item = Dataset(), Dataset()
    name.CodeValue, name.CodingSchemeDesignator, name.CodeMeaning = "121106", "DCM", "Comment"
    item.RelationshipType, item.ValueType, item.ConceptNameCodeSequence = "CONTAINS", "TEXT", [name]
    item.TextValue = REMOVED
    return item


def _values(element: DataElement) -> list[Any]:
    """Return the values of an element as a list; none for an empty one."""
    value = element.value
    if value is None or value == "" or value == []:
        return []
    return list(value) if element.VM > 1 else [value]


def _original(value: Any) -> str:
    return str(getattr(value, "original_string", value))


def _joined(value: Any) -> str:
    return str(value if value is not None else "").strip().strip("\0")


def _block(ds: Dataset, group: int, block: int) -> Iterator[Any]:
    return (tag for tag in list(ds.keys()) if tag.group == group and tag.element >> 8 == block)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _name_parts(ds: Dataset) -> Iterator[str]:
    """Yield the words of persons' names and ids in a dataset, from three letters on, or two that are no Latin ones."""
    _finish_tags(ds)
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                yield from _name_parts(item)
        elif element.VR == "PN" or element.keyword in _IDS:
            for word in _words(" ".join(str(v) for v in _values(element))):
                if len(word) >= (3 if word.isascii() else 2):
                    yield word


@cache
def _meanings() -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Return (scheme, code) -> the meanings, the shortest first, of all codes in DICOM's context groups."""
    from pydicom.sr._snomed_dict import mapping
    from pydicom.sr.codedict import codes

    found: dict[tuple[str, str], set[str]] = {}
    for scheme in codes.schemes():
        for code in getattr(codes, scheme).concepts.values():
            found.setdefault((scheme, code.value), set()).add(code.meaning)
    for old, new in mapping["SRT"].items():
        if ("SCT", new) in found:
            found.update({(scheme, old): found["SCT", new] for scheme in ("SRT", "SNM3", "99SDM")})
    return {key: tuple(sorted(meanings, key=lambda m: (len(m), m))) for key, meanings in found.items()}


@cache
def _vocabulary() -> frozenset[str]:
    """Return the words that a cleaned text may have, in lower case."""
    texts = [meaning for meanings in _meanings().values() for meaning in meanings]
    texts += [text for term in read_terms().values() for text in (*term.en, *term.zh)]
    return frozenset(word for text in texts for word in _words(text) if not word[0].isdecimal())
