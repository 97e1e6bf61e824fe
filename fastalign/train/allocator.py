"""glibc's allocator, told to keep what is freed: a training step asks for the same blocks again.

By default blocks of more than 32 MiB go back to the kernel when they are freed, and the top of the
heap too. Getting them again costs a page fault for every 4 KiB and the kernel's zeros: 21 ms for
the 64 MiB gradient of an embedding, of a step of 1.3 s.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**30  # blocks of up to so many bytes


def keep_freed_memory() -> bool:
    """For the rest of this process; whether the C library has such a switch (glibc does)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, KEPT) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
