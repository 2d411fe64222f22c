"""Work spread over processes, its results in the order of the work: the same output for any number of processes.

And over several nodes: each takes a part of the files, and a last call puts the parts together.
"""

import collections
import ctypes
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dilqur.common.errors import InputError

AHEAD = 4  # items handed out for each process before the oldest result is asked for: no process waits, and memory stays flat

_function = None  # what a worker process runs: set before the fork, so that a loaded tokenizer is shared and not copied


def ordered_map(function, items, num_proc):
    """Yield function(item) for each of `items`, in their order, computed by `num_proc` forked processes (1: by this one).

    `items` may be endless: at most AHEAD · num_proc of them are taken ahead. The processes do not outlive this one, even if it
    is killed. Raises what `function` raises, and InputError where a process is killed from outside.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    global _function
    _function = function
    pool = ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    pending = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) == AHEAD * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed from outside; if the memory ran out, lower --num_proc, and start again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores():
    """int: the cores this process may use."""
    return len(os.sched_getaffinity(0))


def part_of(files, index, parts):
    """The `index`-th (from 0) of `parts` runs of consecutive files, of about equal bytes on disk."""
    sizes = [Path(file).stat().st_size for file in files]
    total = sum(sizes) or 1
    chosen, before = [], 0
    for file, size in zip(files, sizes, strict=True):
        if min(parts - 1, int((before + size / 2) * parts / total)) == index:
            chosen.append(file)
        before += size
    return chosen


def _call(item):
    return _function(item)


def _start_worker(parent):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent, however it ends
    if os.getppid() != parent:
        os._exit(1)
