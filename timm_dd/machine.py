"""What this machine has."""

import os


def memory() -> int:
    """Its main memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
