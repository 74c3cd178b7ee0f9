"""README command 1: set up .venv in this clone, then answer a question about the sample CT, with an overlay.

python3 packaging/demo.py                       the sample question
python3 packaging/demo.py "脾脏在哪里?"           another one
"""

from __future__ import annotations

import sys

import environment

SCAN = "tests/files/sample_ct.dcm"
PROMPT = "Where are the liver and the spleen?"
FOLDER = "answers"


def main() -> int:
    """Return the exit code of `edgemed infer` on the sample scan."""
    prompt = " ".join(sys.argv[1:]) or PROMPT
    python = environment.ensure("cpu")
    environment.say(f'edgemed infer {SCAN} --prompt "{prompt}" --overlay -o {FOLDER}')
    return environment.run([python, "-m", "edgemed", "infer", SCAN, "--prompt", prompt, "--overlay", "-o", FOLDER])


if __name__ == "__main__":
    sys.exit(main())
