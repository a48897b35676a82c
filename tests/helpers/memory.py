"""Measures the memory that a call takes at its peak."""

import ctypes
from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")


def peak_bytes(function):
    """Call a function and tell by how much the resident memory of the process grew at most."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        trim(0)  # what earlier calls have freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        pytest.skip("measures memory by glibc and /proc")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name):
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
