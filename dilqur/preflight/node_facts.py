"""What a node says of itself, without torch: its GPUs, who holds their memory, its driver and versions."""

import os
import platform
import socket

from dilqur.preflight.findings import Skipped
from dilqur.preflight.machine import ask_nvidia_smi
from dilqur.stage import package_versions


def node_facts():
    """{"host", "given": GPUs that Slurm says it gave, "gpus": [{"index", "uuid", "name", "used": bytes}] that nvidia-smi shows, "holders":
    [{"pid", "name", "used"}] of their memory, "driver", "versions": {what: version}}."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    facts = {
        "host": socket.gethostname(),
        "given": given,
        "gpus": [],
        "holders": [],
        "driver": None,
        "versions": versions(),
    }
    try:
        rows = ask_nvidia_smi("--query-gpu=index,uuid,name,memory.used,driver_version")
        apps = ask_nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
    except Skipped:
        return facts
    mine = our_gpus()
    for index, uuid, name, used, driver in rows:
        if mine is None or index in mine or uuid in mine:
            facts["gpus"].append({"index": index, "uuid": uuid, "name": name, "used": mib(used)})
            facts["driver"] = driver
    ours = {gpu["uuid"] for gpu in facts["gpus"]}
    facts["holders"] = [
        {"pid": int(pid), "name": os.path.basename(name), "used": mib(used)}  # noqa: PTH119 (as nvidia-smi writes it)
        for uuid, pid, name, used in apps
        if uuid in ours
    ]
    return facts


def our_gpus():
    """Indices or UUIDs of the GPUs this job may use, {"0", "1"}; None: all that nvidia-smi shows. Others may be another job's."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if listed is None else set(listed.split(","))


def mib(text):
    """Bytes of a number of MiB; 0 for "[N/A]"."""
    return int(text) << 20 if text.isdecimal() else 0


def versions():
    """{what: version} of all that should be the same on every node."""
    installed = {name: version or "none" for name, version in package_versions().items()}
    return {"Python": platform.python_version(), "kernel": platform.release(), **installed}
