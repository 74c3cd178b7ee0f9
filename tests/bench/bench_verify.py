"""How fast a bundle is verified, beside `sha256sum` over the same files, as a Markdown table.

    python tests/bench/bench_verify.py [--mib 1024] [--repeat 7] [--folder FOLDER]

The bundle is nano with one more file of random bytes, signed, in a folder of its own below FOLDER (default: the
system's temporary folder). Verifying is what opening does: the signature under a policy that requires one, every hash,
the graphs' operators. Both read what the system has in memory already, in turns, each on as many cores as it uses.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgemed import keys
from edgemed.bundle import open_bundle, sign_bundle, write_bundle
from edgemed.signing import Policy

MIB = 1 << 20


def make(folder: Path, mib: int) -> Policy:
    """Write the signed bundle to `folder`/bundle and return the policy that asks for its signature."""
    for name in ("root", "vendor"):
        keys.write_key_pair(folder / name)
    root, vendor = (keys.read_private_key(folder / f"{name}.key.pem") for name in ("root", "vendor"))
    listed = keys.KeyList(0, "").changed([keys.TrustedKey(keys.public_bytes(vendor), "vendor")])
    (folder / "keys.json").write_bytes(keys.key_list_bytes(listed, root))
    with open(folder / "more", "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
    nano = open_bundle("nano")
    manifest = nano.manifest
    write_bundle(
        folder / "bundle",
        name="large",
        family=manifest.family,
        graphs=manifest.graphs,
        files={**{name: nano.file(name) for name in manifest.files}, "more.bin": folder / "more"},
        precision=manifest.precision,
        settings=manifest.settings,
    )
    sign_bundle(folder / "bundle", vendor, "vendor")
    return Policy(True, folder / "keys.json", (keys.key_id(keys.public_bytes(root)),), ("vendor",))


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        policy = make(Path(folder), options.mib)
        bundle = Path(folder) / "bundle"
        files = sorted(str(path) for path in bundle.rglob("*") if path.is_file())
        size = sum(os.path.getsize(name) for name in files) / MIB
        ways: dict[str, Callable[[], object]] = {
            "edgemed": lambda: open_bundle(bundle, policy),
            "sha256sum": lambda: subprocess.run(["sha256sum", *files], stdout=subprocess.DEVNULL, check=True),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeat):
            for name, call in ways.items():
                took[name].append(seconds(call))
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ",
        end="",
    )
    print(f"{size:.0f} MiB in {len(files)} files\n\n| | best MiB/s | median MiB/s |\n|---|--:|--:|")
    for name, times in took.items():
        print(f"| {name} | {size / min(times):.0f} | {size / statistics.median(times):.0f} |")


if __name__ == "__main__":
    main()
