"""A run of a program that trains, in processes of its own, watched through its metrics.jsonl and ended when it has logged enough.

It is ended by SIGKILL: what it would do from there on, a checkpoint and a model of many GB, is not what is measured.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dilqur.common.atomic import write_json
from dilqur.common.constants import ROOT

LOOK_S = 0.1
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|MemoryError", re.I)


@dataclass
class Outcome:
    """problem: None, "out of memory", or the line in which the program said why it ended. records: the lines of metrics.jsonl.
    resident_gb: the most memory one of its processes held on the host, GiB, libraries and all."""

    problem: str | None
    records: list
    seconds: float
    resident_gb: float


def command_line(program, recipe, folder, num_processes=1, strategy=None):
    """What slurm/lib/launch.sh would start on one node."""
    words = [str(program), "--config", str(recipe), "--output_dir", str(folder)]
    if num_processes == 1:
        return [sys.executable, *words]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(strategy), "--num_machines", "1"]
    return [sys.executable, *launcher, "--num_processes", str(num_processes), "--main_process_port", "0", *words]


def launch_environment(num_processes, gpus, cache):
    """Variables as slurm/lib/launch.sh sets them, where they are not set already. gpus: what CUDA_VISIBLE_DEVICES would
    call each that there is; the run sees as many as it has processes."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    usual = {
        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
    }  # fmt: skip
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # another name of it, over which this one would win
        usual["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    out = {**usual, **os.environ, "PYTHONUNBUFFERED": "1"}
    out["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if gpus:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")
        out["CUDA_VISIBLE_DEVICES"] = ",".join(listed[:num_processes])
    return out


def run_until(command, variables, folder, steps, timeout_s):
    """Outcome of `command`, which writes FOLDER/metrics.jsonl, until that has a line of step `steps`. Its output goes to FOLDER.log."""
    log, metrics = folder.with_name(f"{folder.name}.log"), folder / "metrics.jsonl"
    began, records, resident, looked = time.monotonic(), [], 0.0, -1
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out, start_new_session=True)
        try:
            while True:
                ended = process.poll() is not None
                size = metrics.stat().st_size if metrics.exists() else 0
                if size != looked:
                    looked, records = size, read_records(metrics)
                    resident = max(resident, resident_gb(process.pid))
                late = time.monotonic() - began > timeout_s
                if ended or late or (records and records[-1]["step"] >= steps):
                    break
                time.sleep(LOOK_S)
        finally:
            end(process)
    problem = None
    if not records or records[-1]["step"] < steps:
        problem = f"no step {steps} after {timeout_s:.0f} s" if late else why(log.read_text(errors="replace"))
    return Outcome(problem, records, round(time.monotonic() - began, 2), round(resident, 3))


def read_records(path):
    """The whole lines of a metrics.jsonl that may be being written."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def end(process, patience_s=20):
    """Kill a process and all of its session, and wait until they are gone: the GPU's memory is free only then."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + patience_s
    while alive(process.pid) and time.monotonic() < until:
        time.sleep(LOOK_S)


def alive(session):
    """Processes of a session that are more than a zombie: [pid]."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state not in "ZX":
                pids.append(int(stat.parent.name))
    return pids


def resident_gb(session):
    """The most that one process of a session has held, GiB."""
    most = 0
    for pid in alive(session):
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            # a process that has just ended has none
            most = max([most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
    return most / 2**20


def why(log):
    """The line of a log that says why a program ended."""
    if OUT_OF_MEMORY.search(log):
        return "out of memory"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"(\[rank \d+\] )?error: |[\w.]*(Error|Exception): ", line)]
    return (said or lines or ["it said nothing"])[-1][:300]


def remembered(path, identity, run):
    """The Outcome of `run()`, or the one that an earlier call with the same identity left in the file `path`: a benchmark that was cut
    short goes on where it was. What failed is tried again, unless it was for want of memory."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["identity"] == identity and before["outcome"]["problem"] in (None, "out of memory"):
            return Outcome(**before["outcome"])
    outcome = run()
    write_json(path, {"identity": identity, "outcome": asdict(outcome)})
    return outcome
