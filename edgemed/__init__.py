"""edgemed: a region- and pixel-aware, bilingual medical multimodal model on an offline workstation."""

from __future__ import annotations

__version__ = "0.1.0"
