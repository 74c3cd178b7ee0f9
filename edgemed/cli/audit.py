"""`edgemed audit`: look after the audit trail of this machine. Imports no engine and no library."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.verbs import debug_option
from edgemed.errors import EdgemedError, InvalidInput, NoInput

if TYPE_CHECKING:
    from edgemed.audit import Settings
    from edgemed.audit.trail import Trail


@click.group("audit", short_help="Verify, show and send the audit trail.")
def command() -> None:
    """Verify, show and send the audit trail: your own, or as root those of all users.

    It is kept where audit.folder says; without that nothing is recorded. See 'edgemed config show'.
    """


def _opened() -> tuple[Settings, list[Trail]]:
    from edgemed.audit import read_audit, trails

    settings = read_audit()
    if settings is None:
        raise NoInput("audit.folder is not set, so that nothing is recorded; see 'edgemed config show'")
    return settings, trails(settings)


@command.command("verify")
@click.option("--from-oldest", is_flag=True, help="The site took older files away: begin at the oldest that is here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def verify(from_oldest: bool, as_json: bool) -> int:
    """Check the chain of hashes from the first record to the last, and that the last is the one that was written.

    It goes through all files of a trail: 'trail', and 'trail-N' with the records from N on.

    Exit code 22 if a trail was changed, cut or cut off, or a file of it is missing or another's: the first record that
    does not hold is named.
    """
    rows = [{"trail": trail.folder.name, **vars(trail.check(from_oldest=from_oldest))} for trail in _opened()[1]]
    if as_json:
        print(json.dumps({"schema": "edgemed.audit-verify/1", "trails": rows}, ensure_ascii=False))
    for row in () if as_json else rows:
        if not row["damage"]:
            older = f" (those before {row['first']} are not here)" if row["first"] > 1 else ""
            count = row["records"] - row["first"] + 1
            print(f"{row['trail']}: {count} records hold{older}, {row['unsent']} of them wait to be sent")
    damaged = [row for row in rows if row["damage"]]
    for row in damaged:
        click.echo(f"edgemed: audit trail {row['trail']}: {row['damage']}; compare it with the server's copy", err=True)
    return InvalidInput.exit_code if damaged else 0


@command.command("show")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last N records of each trail.")
@click.option("--study", metavar="UID|FILE", help="Only records about this study, or this file that has no study.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a record.")
@debug_option
def show(last: int | None, study: str | None, as_json: bool) -> None:
    """Print what was recorded, a line each. That it was looked at is recorded, too."""
    from edgemed.audit import log_used, pseudonyms, record

    settings, found = _opened()
    record(log_used("audit show"), settings)
    for trail in found:
        about = None
        if study is not None:
            is_uid = re.fullmatch(r"[0-9.]+", study)
            about = pseudonyms(trail, settings)(study if is_uid else str(Path(study).absolute()))
        lines = (row for row in _rows(trail) if about is None or about in row["studies"])
        for row in list(lines)[-last:] if last else lines:
            print(json.dumps(row, ensure_ascii=False) if as_json else _line(row))


def _rows(trail: Trail) -> Iterator[dict[str, Any]]:
    """Yield what each record says, from the XML that is in it."""
    from xml.etree import ElementTree

    for record in trail.records():
        row: dict[str, Any] = {
            "trail": trail.folder.name,
            "record": record.number,
            "holds": record.holds,
            "studies": [],
        }
        try:
            root = ElementTree.fromstring(record.text.partition("\ufeff")[2])  # noqa: S314  (expat limits entities)
        except ElementTree.ParseError:
            yield {**row, "event": "unreadable"}
            continue
        event, users = root[0], root.findall("ActiveParticipant")
        kinds = [code.get("originalText", "") for code in event.iter() if code.get("originalText")]
        row |= {"at": event.get("EventDateTime"), "event": kinds[0] if kinds else "", "type": kinds[1:]}
        row |= {"outcome": event.get("EventOutcomeIndicator"), "users": [user.get("UserID") for user in users]}
        row |= {"process": users[0].get("UserName") if users else None}
        for told in root.findall("ParticipantObjectIdentification"):
            code = told.find("ParticipantObjectIDTypeCode")
            if code is not None and code.get("csd-code") == "110180":
                row["studies"].append(told.get("ParticipantObjectID"))
            for detail in told.findall("ParticipantObjectDetail"):
                row[detail.get("type", "")] = base64.b64decode(detail.get("value", "")).decode("utf-8", "replace")
        yield row


def _line(row: dict[str, Any]) -> str:
    told = [f"{row.get('event')}" + "".join(f" ({kind})" for kind in row.get("type", ()))]
    told += [f"outcome {row.get('outcome')}", f"by {' '.join(row.get('users', ()))}", *row["studies"]]
    told += [row[key] for key in ("Alert Description", "Results") if key in row]
    mark = "" if row["holds"] else "  DOES NOT HOLD"
    return f"{row['trail']}/{row['record']}  {row.get('at')}  " + "  ".join(told) + mark


@command.command("send")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; errors stay.")
@debug_option
def send_them(quiet: bool) -> None:
    """Send the records that wait to audit.server. A timer should do this, besides the commands that do at their end."""
    from edgemed.audit import send

    settings, found = _opened()
    failed: EdgemedError | None = None
    for trail in found:
        try:
            count = send(trail, settings)
        except EdgemedError as error:
            failed = error
            continue
        if not quiet:
            print(f"{trail.folder.name}: {count} records sent", file=sys.stdout)
    if failed is not None:
        raise failed
