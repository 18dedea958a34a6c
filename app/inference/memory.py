"""Give memory back, and keep the search for garbage short.

Loading a model takes more memory than the model does, and leaves garbage with references to itself.
"""

import ctypes
import gc

# glibc's; other systems' give freed memory back by themselves.
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
# Containers made, less those gone, before the youngest are searched: more than a turn of the event
# loop makes for some hundred requests, of which none is garbage.
YOUNGEST = 20_000


def release() -> None:
    """Give back what is not in use."""
    gc.collect()
    if malloc_trim:
        malloc_trim(0)


def settle() -> None:
    """Have what is there now stay: looking through it for garbage stops all answers for 40 ms."""
    release()
    gc.freeze()
    gc.set_threshold(YOUNGEST, *gc.get_threshold()[1:])
