"""What becomes of memory that a process frees?"""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_memory() -> None:
    """On a CPU, memory that a step or a batch frees stays with the process for the next one: what the system takes back
    it must clear again, page by page, which took a fifth of a step's time on a virtual machine. glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes; larger tensors come and go as before
