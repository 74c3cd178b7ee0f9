"""edgemed: a region- and pixel-aware, bilingual medical multimodal model on an offline workstation."""

from __future__ import annotations

from edgemed.blas import let_threads_sleep as _let_threads_sleep
from edgemed.offline import switch_off as _switch_off

__version__ = "0.1.0"

_switch_off()  # libraries read these when they are loaded, so these are what is done at import
_let_threads_sleep()
