"""Limits: what one file may ask for before it is refused with ResourceLimit (exit 86).

Every number is checked against what the headers *declare*, before a pixel is decoded; the memory, CPU and wall clock
limits are the net below, held by the operating system on the child process.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgemed.errors import EdgemedError

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What reading one frame of one file may cost.

    max_pixels: rows x columns of one frame. 50 million is twice a large mammography detector (4,096 x 5,625).
    max_expansion, expansion_floor_bytes: a frame or picture that unpacks to more than the floor *and* to more than
        max_expansion times its packed size is refused; a deflated dataset likewise, at 200 times.
    max_inflated_bytes: a deflated dataset, unpacked.
    max_declared_bytes: all frames of a file together, as the header states them (they are never decoded together).
    max_elements: data elements outside sequences. Real files have some hundred, with private ones some thousand.
    max_header_reads: read calls while parsing the header; bounds the elements inside sequences. A million are about
        5,000 frames with functional groups of their own.
    memory_bytes: what the child may allocate on top of its own start-up.
    cpu_seconds, wall_seconds: per file. The clock is for a stalled disk or share; a busy machine must not reach it: a
        23-megapixel JPEG 2000 mammogram took 4.3 s of CPU time and, among other jobs, 115 s by the clock.
    """

    max_pixels: int = 50_000_000
    max_expansion: int = 1000
    expansion_floor_bytes: int = 16 * MIB
    max_inflated_bytes: int = 512 * MIB
    max_declared_bytes: int = 64 * 1024 * MIB
    max_elements: int = 50_000
    max_header_reads: int = 1_000_000
    memory_bytes: int = 1024 * MIB
    cpu_seconds: int = 30
    wall_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not all(value > 0 for value in vars(self).values()):
            raise EdgemedError("every limit must be above 0")


DEFAULT_LIMITS = Limits()
