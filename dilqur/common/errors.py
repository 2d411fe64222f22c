"""A person's mistake gets one line (what, where, what to do) and exit code 2, never a traceback."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path


class InputError(Exception):
    """What is wrong, where (file and line), and what to do about it, in one line. Exit code 2."""


class EveryRankError(InputError):
    """One that all ranks meet alike, at the same step: rank 0 says it."""


class AlreadyFinished(Exception):
    """The stage's result is there and still belongs to its inputs: nothing to do. Exit code 0."""


@contextlib.contextmanager
def one_line_errors():
    """Around a program's work: turns the exceptions above, a full disk, a forbidden path and Ctrl-C into one line and an exit code."""
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    try:
        yield
    except AlreadyFinished as done:
        if rank == "0":
            print(done, file=sys.stderr if "--json" in sys.argv else sys.stdout)
    except InputError as mistake:
        if isinstance(mistake, EveryRankError) and rank != "0":
            sys.exit(2)
        line = f"{who}error: {mistake}"
        _tell_launcher(line)
        _leave(line, 2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as problem:
        where = f" at {problem.filename}" if problem.filename else ""
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            _leave(f"{who}error: no space left on the device{where}: free some, or choose another --output_dir", 2)
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = problem.strerror.lower()
            _leave(f"{who}error: {reason}{where}: look at its permissions, or choose another path", 2)
        _tell_launcher(traceback.format_exc())
        raise
    except KeyboardInterrupt:
        _leave(f"{who}interrupted", 130)
    except Exception:
        _tell_launcher(traceback.format_exc())
        raise


def _tell_launcher(text):
    """torchrun and accelerate launch end with what the first rank that failed wrote into this file; of the others, which failed
    because that one was gone, they say less. The keys are those of torch.distributed.elastic."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": text.strip().splitlines()[-1], "extraInfo": more}
        Path(file).write_text(json.dumps({"message": message}))


def _leave(line, code):
    print(" ".join(line.split("\n")), file=sys.stderr, flush=True)
    sys.exit(code)
