"""How the process keeps the memory that it has freed."""

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory():
    """Let the C library keep freed memory instead of giving it back to the system; whether that worked.

    Activations of tens of megabytes come and go in every layer. By default glibc maps each anew, and the system fills
    it with zeros page by page, which on a CPU can take as long as the layer. The process then holds on to what it
    needed at most. Only glibc has this; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_TOP_PAD, 64 << 20))
