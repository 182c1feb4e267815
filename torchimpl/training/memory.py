"""The memory of a processor while it trains: what is freed stays with the process.

glibc gives blocks of 32 MiB and more back to the system as soon as they are freed, and smaller ones when many are. The
next step asks for the same sizes again, and the system hands every page out anew, filled with zeros: a step on 16,384
tokens took 1.2 to 1.3 times the time on two cores, one on 4,096 1.03 to 1.07 times (`python benchmarks/training.py
--part memory`).
"""

import ctypes
import os
import sys

# Of malloc.h: the size from which free memory at the end of the heap is given back (-1: none), and how many blocks may
# be mapped each by itself.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed() -> bool:
    """Let glibc keep freed blocks of any size for the next ones; whether it could be asked to.

    The process then holds the most that it ever used, until it ends. Where the environment already tunes malloc
    (MALLOC_..., GLIBC_TUNABLES) nothing is changed, and elsewhere than under glibc neither.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if tuned or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*pair) == 1 for pair in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0)))
