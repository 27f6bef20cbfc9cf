"""The machine that a measurement was made on, and a terminal for commands that show a bar."""

import fcntl
import os
import platform
import pty
import struct
import termios

import torch


def describe():
    """The machine and the software, as a dict that can be written as JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def sentence(machine):
    """The same in words."""
    gpu = f", {machine['gpu']}" if machine["gpu"] else ", no GPU"
    return (
        f"{machine['cpu']}, {machine['cores']} cores{gpu}; {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}"
    )


def terminal():
    """Open a pseudo-terminal of 120 columns; returns the descriptors (to read from, for the command)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    return ours, theirs


def _cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
