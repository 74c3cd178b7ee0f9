"""`python -m edgemed`: the same as the command `edgemed`."""

from __future__ import annotations

import sys

from edgemed.cli import main

sys.exit(main())
