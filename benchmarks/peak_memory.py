"""The memory of a program and its worker processes together, while it runs."""

import subprocess
import threading
import time
from pathlib import Path


def run_and_watch(command, cwd):
    """(peak bytes, seconds) of `command`: the largest sum of the proportional set sizes of the process and its children, of five
    looks a second. Exits with what it wrote to standard error if it fails."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]

    def watch():
        while process.poll() is None:
            peak[0] = max(peak[0], sum(map(_pss, _family(process.pid))))
            time.sleep(0.2)

    watcher, started = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    _, err = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(err)
    return peak[0], time.perf_counter() - started


def _family(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [pid, *(int(child) for child in children.read_text().split())]
    except FileNotFoundError:
        return []


def _pss(pid):
    """Bytes, shared pages divided among those who share them; file-backed pages of the output do not count."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return 0
