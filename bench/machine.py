"""What machine this is, for the head of a benchmark's table."""

import os
import platform

from dsfp4.doctor.facts import System, processor_name


def machine() -> str:
    """One line: processor, cores that may be used, memory."""
    name = processor_name(System()) or platform.machine()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{name}, {cores} cores, {memory:.0f} GB RAM"
