"""Every error edgemed raises on purpose, with the exit code a shell sees.

    EdgemedError                 1   usage
      OutOfMemory                4   host memory
      CannotRead                20   a file cannot be opened or read
      NoInput                   21   nothing to work on (empty file, folder without scans)
      InvalidInput              22   the file is read but is not what it must be
      CannotWrite               40   a result cannot be written
      BundleError               80   a bundle is damaged, incomplete or of another version
        SignatureError          81   a bundle's signature does not hold
      BackendUnavailable        82   the GPU, library or execution provider is missing
      DeviceOutOfMemory         83   accelerator memory
      Timeout                   84   a time limit was reached
      UnsupportedDicom          85   valid DICOM that this version does not support
      ResourceLimit             86   hostile or oversized file
      BatchPartlyFailed         87   some inputs of several failed

The numbers follow dcmtk's `ofexit.h` ranges. A message says what was found, what was expected and what to do; it never
holds a patient's name, id or date.
"""

from __future__ import annotations


class EdgemedError(Exception):
    """Base of all errors that end a command with one line on stderr. Exit code 1: usage."""

    exit_code = 1


class OutOfMemory(EdgemedError):
    """The host has too little memory for the request."""

    exit_code = 4


class CannotRead(EdgemedError):
    """A file cannot be opened or read to its end."""

    exit_code = 20


class NoInput(EdgemedError):
    """There is nothing to work on."""

    exit_code = 21


class InvalidInput(EdgemedError):
    """An input was read and is not what it must be."""

    exit_code = 22


class CannotWrite(EdgemedError):
    """A result cannot be written; nothing half-written is left behind."""

    exit_code = 40


class BundleError(EdgemedError):
    """A bundle is damaged, incomplete or made for another version."""

    exit_code = 80


class SignatureError(BundleError):
    """A bundle's signature does not hold."""

    exit_code = 81


class BackendUnavailable(EdgemedError):
    """The GPU, engine library or execution provider that was asked for is not there."""

    exit_code = 82


class DeviceOutOfMemory(EdgemedError):
    """The accelerator has too little memory for the request."""

    exit_code = 83


class Timeout(EdgemedError):
    """A time limit was reached."""

    exit_code = 84


class UnsupportedDicom(EdgemedError):
    """Valid DICOM that this version does not support."""

    exit_code = 85


class ResourceLimit(EdgemedError):
    """A file asks for more pixels, memory or time than the limits allow."""

    exit_code = 86


class BatchPartlyFailed(EdgemedError):
    """Some of several inputs failed; the others were answered."""

    exit_code = 87
