"""edgemed: a region- and pixel-aware, bilingual medical multimodal model on an offline workstation."""

from __future__ import annotations

from edgemed.offline import switch_off as _switch_off

__version__ = "0.1.0"

_switch_off()  # libraries read these when they are loaded, so this is the one thing done at import
