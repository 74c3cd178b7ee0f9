"""Switches that keep libraries from the network: telemetry, look-ups of models, checks for updates.

`edgemed/__init__.py` calls `switch_off`, before any library can have read its environment; child processes inherit it.
Covers libraries that edgemed installs. Does not cover edgemed itself, which opens no connection but those that a node
is configured for (`edgemed.serve`); tests/offline holds both.
"""

from __future__ import annotations

import os

SWITCHES = {
    # onnxruntime 1.31 writes a device id and a database of events below ~/.cache/Microsoft and asks for
    # mobile.events.data.microsoft.com within 45 s (tests/offline/test_namespace.py shows it). It reads this when it is
    # loaded; its own disable_telemetry_events() comes too late for the first event.
    "ORT_DISABLE_TELEMETRY": "1",
    # tokenizers brings huggingface_hub along.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment variable -> value. They go before what the environment says: no setting here may send anything."""


def switch_off() -> None:
    """Set `SWITCHES` in this process and for the children that it starts."""
    os.environ.update(SWITCHES)
