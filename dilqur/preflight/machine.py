"""Checks of this machine: installed versions, its GPUs, their driver."""

import platform
import re
import subprocess
from importlib import metadata

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.preflight.findings import Skipped

DRIVERS = {"cu126": 560, "cu128": 570}  # NVIDIA's oldest for CUDA 12.6 and 12.8; torch 2.13 from PyPI is CUDA 13: 580


def check_packages():
    """Installed versions are those of requirements.txt."""
    wrong, pins = [], 0
    for name, version, marker in re.findall(r"^([\w-]+)==([\w.]+)(.*)", (ROOT / "requirements.txt").read_text(), re.M):
        if "platform_machine" in marker and platform.machine() not in marker:
            continue
        pins += 1
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        if installed.partition("+")[0] != version:
            wrong.append(f"{name} {installed}, not {version}")
    if wrong:
        raise InputError(f"{'; '.join(wrong)}: pip install -r requirements.txt")
    return f"{pins} as in requirements.txt"


def check_gpus(found):
    """Append to `found` what nvidia-smi says of each GPU: name, bytes, driver (its major version), compute capability."""
    lines = ask_nvidia_smi("--query-gpu=name,memory.total,driver_version,compute_cap")
    for name, mib, driver, capability in lines:
        try:
            numbers = {"bytes": int(mib) << 20, "driver": int(driver.split(".")[0]), "capability": float(capability)}
        except ValueError:  # "[N/A]", of a GPU that shares the CPU's memory, say
            raise Skipped(f"nvidia-smi says of {name}: {mib} MiB, driver {driver}, capability {capability}") from None
        found.append({"name": name, **numbers})


def check_driver(gpus, bf16):
    """The driver is new enough for this build of torch, and the GPUs for bfloat16."""
    if not gpus:
        return None
    first, torch = gpus[0], metadata.version("torch")
    build = torch.partition("+")[2]
    if build == "cpu":
        raise InputError(f"torch {torch} is a build without CUDA: install the one requirements.txt names")
    if first["driver"] < DRIVERS.get(build, 580):
        raise InputError(
            f"driver {first['driver']} is too old for torch {torch}, which wants {DRIVERS.get(build, 580)}: update it, or "
            "install a build for an older CUDA (requirements.txt says how)"
        )
    if bf16 and (weak := [gpu for gpu in gpus if gpu["capability"] < 8.0]):
        raise InputError(f"{weak[0]['name']} has no bfloat16 (compute capability {weak[0]['capability']}): bf16: false")
    return f"{len(gpus)} × {first['name']}, {first['bytes'] / 1e9:,.1f} GB, driver {first['driver']}"


def ask_nvidia_smi(query):
    """Its rows as lists of words. Raises Skipped where it is not there or finds no GPU."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        raise Skipped("no nvidia-smi here; run this again on a GPU node") from None
    fields = query.count(",")
    rows = [line.split(", ") for line in run.stdout.splitlines() if line.count(", ") == fields]
    if run.returncode or (not rows and "query-gpu" in query):
        raise Skipped(f"nvidia-smi finds none: {' '.join((run.stdout + run.stderr).split()) or 'silence'}")
    return rows
