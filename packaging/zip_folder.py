"""Write a folder as a zip that depends on names and contents alone: sorted, stored, with one time for all.

    SOURCE_DATE_EPOCH=... python packaging/zip_folder.py FOLDER FILE.zip

Standard library only. Stored: what is in an installer is packed already, and zlib's bytes differ by its version.
"""

from __future__ import annotations

import os
import sys
import time
import zipfile
from pathlib import Path


def main() -> None:
    """Zip the folder that the command line names."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    when = time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))[:6]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{target.stem}/{path.relative_to(folder).as_posix()}", when)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as stream:
                stream.write(path.read_bytes())


if __name__ == "__main__":
    main()
