"""Run a command: signals, ranks, messages, exit statuses. InputErrors become one line here."""

import contextlib
import errno
import logging
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import AGAIN, InputError, first_line, log

if TYPE_CHECKING:
    from ..dist_util import Peers, Ranks
    from .flags import Given, Parser

DONE, FAILED, REFUSED, DEFECT, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses: all done, some images failed, bad input, a defect (with its traceback), interrupted."""


def start() -> None:
    """Prepare the process before torch is imported, which takes seconds: an interrupt then is one line, too."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file that is opened would get its number
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - until the process ends
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted_early)
    # Where a rank is lost, torch's store would write stack traces of its own to stderr.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # OpenMP's threads spin while they wait for each other. Beside other work, they spin on the core that the other
    # thread needs: two threads on two cores then take many times as long as one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _interrupted_early(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"interrupted; {AGAIN}\n".encode())
    os._exit(INTERRUPTED)


def run(function: Callable[..., int | None], parser: "Parser", *, ranks: str = "peers") -> None:
    """Parse flags, call function(given, ranks), and end the process with the status that it returns or its error has.

    ranks: "peers": a connected `dist_util.Peers`; "ranks": a `dist_util.Ranks`; "none": function(given).
    """
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata, which does not concern the pixels
    logging.raiseExceptions = False  # a full disk behind stderr is no reason to end
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    me = peers = None
    try:
        _raise_on_signals()
        if ranks == "none":
            status = function(parser.parse())
        else:
            from .. import dist_util, runtime

            runtime.keep_freed_memory()
            me = dist_util.ranks()
            if me.rank:
                logging.getLogger().setLevel(logging.ERROR)
            given = parser.parse()
            if ranks == "peers":
                peers = dist_util.connect(me)
                _check_ranks(given, peers)
            status = function(given, peers or me)
    except BaseException as error:
        status = explain(error, parser, me, peers)
    if peers is not None:
        peers.leave()
    if status not in (None, DONE, FAILED) and me is not None:
        dist_util.abort(me, status)
    settle()
    sys.exit(status or DONE)


def _check_ranks(given: "Given", peers: "Peers") -> None:
    """Raise InputError unless all ranks have the same flags; rank 0 waits for all others to agree."""
    from ..dist_util import PATIENCE, POLL

    mine = given.digestible()
    if peers.rank == 0:
        peers.publish("flags", mine)
        notice_at = time.monotonic() + PATIENCE
        while missing := peers.world_size - 1 - peers.count("flags_agreed", 0):
            if time.monotonic() > notice_at:
                notice_at = math.inf
                log.info("waiting for %d of %d ranks to start", missing, peers.world_size)
            peers.watch()
            time.sleep(POLL)
        return
    theirs = peers.wait_for("flags")
    for name, value in mine.items():
        if theirs.get(name) != value:
            reason = f"rank {peers.rank} was started with --{name} {value}, rank 0 with {theirs.get(name)}"
            raise InputError(f"{reason}; all ranks need the same flags")
    peers.count("flags_agreed")


def explain(error: BaseException, parser: "Parser", me: "Ranks | None", peers: "Peers | None") -> int:
    """Say what ended the command, once for all ranks; returns the exit status."""
    # The ranks of a training go separate ways, and each may fail for reasons of its own.
    distributed = sys.modules.get("torch.distributed")
    first = me is None or me.rank == 0 or (distributed is not None and distributed.is_initialized())
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else DONE
    if type(error).__name__ == "Stopped":
        return REFUSED
    if isinstance(error, KeyboardInterrupt):
        if peers.interrupted() if peers else first:
            say(f"{cause(error, me)}; {AGAIN}")
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = InputError(f"no room left on the disk: {first_line(error)}")
    if not isinstance(error, InputError):
        from ..runtime import is_out_of_memory

        if is_out_of_memory(error):
            error = InputError(f"out of memory: {first_line(error)}")
    if isinstance(error, InputError):
        # Ranks that are not connected have the same flags and environment: rank 0 speaks for them.
        text = error.text(parser.spell)
        if peers.stop(text) if peers else first:
            say(f"error: {text}")
        return REFUSED
    if peers:
        peers.stop(repr(error))
    if me is not None and me.world_size > 1:
        say(f"rank {me.rank} of {me.world_size} failed; {AGAIN}")
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return DEFECT


def say(text: str, file: Any = None) -> None:
    """Print a line to stderr or `file`; a reader that is gone or a full disk does not end the command."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stderr, flush=True)


def settle() -> None:
    """Flush stdout and stderr, and close those that cannot be written to."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _raise_on_signals() -> None:
    """Turn the first signal into KeyboardInterrupt. A second one after 2 seconds ends the process.

    Ctrl-C under a launcher comes twice at once: from the terminal and from the launcher.
    """
    since: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        since.append(time.monotonic())
        if len(since) == 1:
            raise KeyboardInterrupt(signal.Signals(number).name)
        if since[-1] - since[0] > 2:
            os._exit(INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def cause(interrupt: BaseException, me: Any) -> str:
    """Words for the signal behind a KeyboardInterrupt."""
    if "SIGTERM" not in interrupt.args:
        return "interrupted"
    many = me is not None and me.world_size > 1
    return "ended by SIGTERM" + ", as launchers do when another process has died" * many
