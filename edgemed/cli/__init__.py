"""The command line. Importing this costs click and nothing else: `edgemed --help` is instant.

One verb is one file here with a click command called `command`; the libraries it needs are imported inside it.
`main` holds the only error handler.
"""

from __future__ import annotations

from edgemed.cli.verbs import main

__all__ = ["main"]
