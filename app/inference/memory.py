"""Return memory to the system, and keep garbage collection short.

Loading a model takes more memory than the model itself, and leaves cyclic garbage.
"""

import ctypes
import gc

# In glibc; other C libraries return freed memory by themselves.
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
# Net allocations before the youngest generation is collected: more than a turn of the event loop
# makes for some hundred requests, none of which is garbage.
YOUNGEST = 20_000


def trim() -> None:
    """Return unused memory to the system."""
    gc.collect()
    if malloc_trim:
        malloc_trim(0)


def freeze() -> None:
    """Exclude all present objects from garbage collection, which would stop responses for 40 ms."""
    trim()
    gc.freeze()
    gc.set_threshold(YOUNGEST, *gc.get_threshold()[1:])
