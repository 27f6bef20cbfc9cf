"""The machine that a measurement was made on, and a terminal for commands that show a bar."""

import contextlib
import fcntl
import os
import platform
import pty
import struct
import termios

import torch


def description():
    """The machine and the software in words."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {cores} cores, {gpu}; {system}"


def terminal():
    """Open a pseudo-terminal of 120 columns; returns the descriptors (to read from, for the command)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    return ours, theirs
