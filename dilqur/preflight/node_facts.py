"""What a node says of itself, without torch: its GPUs, who holds their memory, its driver and versions."""

import os
import platform
import re
import socket
import subprocess

from dilqur.pipeline.manifest import package_versions
from dilqur.preflight.findings import Skipped
from dilqur.preflight.machine import ask_nvidia_smi


def node_facts():
    """{"host", "given": GPUs that Slurm says it gave, "gpus": [{"index", "uuid", "name", "used": bytes, "mig"}] that this job may use, in
    the order in which CUDA numbers them, "holders": [{"pid", "name", "used", "gpu": uuid}] of their memory, "driver", "versions": {what:
    version}}. index: what CUDA_VISIBLE_DEVICES calls it. mig: it is a slice of the GPU that `name` says; of one nobody says what is used.
    """
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
    whole = [
        {"index": index, "uuid": uuid, "name": name, "used": mib(used), "mig": False}
        for index, uuid, name, used, _ in rows
    ]
    facts["gpus"] = our_gpus(whole, mig_slices(whole), os.environ.get("CUDA_VISIBLE_DEVICES"))
    facts["driver"] = rows[0][-1] if facts["gpus"] else None
    ours = {gpu["uuid"] for gpu in facts["gpus"]}
    facts["holders"] = [
        {"pid": int(pid), "name": os.path.basename(name), "used": mib(used), "gpu": uuid}  # noqa: PTH119 (as nvidia-smi writes it)
        for uuid, pid, name, used in apps
        if uuid in ours
    ]
    return facts


def our_gpus(whole, slices, listed):
    """Those of the GPUs `whole`, and of their MIG slices, that this job may use: the others may be another job's. slices: {uuid of a GPU:
    its slices}. listed: CUDA_VISIBLE_DEVICES, names as in the CUDA Programming Guide: an index, GPU- or MIG- and the beginning of a UUID,
    or MIG-GPU-UUID/numbers of older drivers; after a name of nothing CUDA looks no further. None: all that nvidia-smi shows. A GPU that
    is divided can be used by its slices alone."""
    if listed is None:
        return [found for gpu in whole for found in slices.get(gpu["uuid"]) or [gpu]]
    ours = []
    for name in map(str.strip, listed.split(",")):
        kind, every = name[:4], [part for parts in slices.values() for part in parts]
        if name.startswith("MIG-GPU-"):
            parent = next((gpu for gpu in whole if gpu["uuid"] == name[4:].partition("/")[0]), {"name": "GPU"})
            found = [{"index": name, "uuid": name, "name": f"{parent['name']} MIG", "used": 0, "mig": True}]
        elif kind == "MIG-":
            found = [part for part in every if part["uuid"].startswith(name)]
            # in a container nvidia-smi may show the GPU and not its slices
            found = found or [{"index": name, "uuid": name, "name": f"{whole[0]['name']} MIG", "used": 0, "mig": True}]
        else:
            found = [gpu for gpu in whole if gpu["index"] == name or (kind == "GPU-" and gpu["uuid"].startswith(name))]
            found = (
                slices.get(found[0]["uuid"], [])[:1] or found if found else []
            )  # of a divided GPU CUDA takes the first slice
        if not found:
            break
        ours.append(found[0])
    return ours


def mig_slices(whole):
    """{uuid of a GPU: its MIG slices, as `our_gpus` has them}, of what nvidia-smi lists."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    slices, gpu = {}, None
    for line in listing.splitlines():
        if shown := re.match(r"GPU \d+: .*\(UUID: (GPU-\S+)\)", line):
            gpu = next((one for one in whole if one["uuid"] == shown[1]), None)
        elif gpu and (part := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-\S+)\)", line)):
            name, uuid = f"{gpu['name']} MIG {part[1]}", part[2]
            slices.setdefault(gpu["uuid"], []).append(
                {"index": uuid, "uuid": uuid, "name": name, "used": 0, "mig": True}
            )
    return slices


def mib(text):
    """Bytes of a number of MiB; 0 for "[N/A]"."""
    return int(text) << 20 if text.isdecimal() else 0


def versions():
    """{what: version} of all that should be the same on every node."""
    installed = {name: version or "none" for name, version in package_versions().items()}
    return {"Python": platform.python_version(), "kernel": platform.release(), **installed}
