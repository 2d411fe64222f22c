"""manifest.json, and what it says of a run besides its result: identities of files, commit, versions, hardware."""

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dilqur.common.errors import InputError
from dilqur.common.hashing import file_checksum
from dilqur.common.paths import identity_of

PACKAGES = ("torch", "accelerate", "transformers", "tokenizers", "deepspeed", "liger-kernel", "peft", "trl", "numpy")


def read_manifest(folder):
    """manifest.json of a stage or a folder of token shards. Raises InputError where it is missing or damaged."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not there: {folder} is not finished") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: damaged ({problem})") from None


def hardware():
    """What this process runs on: host, CPU, cores it may use, memory, GPUs (where torch is loaded and sees some)."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines_of("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next((int(line.split()[1]) for line in _lines_of("/proc/meminfo") if line.startswith("MemTotal")), 0)
    out = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**20, 1),
        "gpus": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        out["cuda"] = torch.version.cuda
    return out


def file_identity(path):
    """{"bytes", "mtime_ns", "xxh3"} of a file."""
    return {**identity_of(path), "xxh3": file_checksum(path, 128)}


def unchanged(path, was):
    """Is it the file that `file_identity` said this of? Same size and time: yes. Another time: hash it."""
    try:
        stat = path.stat()
    except OSError:
        return True  # moved away: see Stage.path
    if stat.st_size != was["bytes"]:
        return False
    return stat.st_mtime_ns == was["mtime_ns"] or file_checksum(path, 128) == was["xxh3"]


def git_commit():
    """Commit of the code that ran, and whether it had uncommitted changes; None outside a checkout."""

    def git(*words):
        run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit and {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def package_versions():
    """{package: its version, None where it is not installed} of those that a run's numbers may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _lines_of(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
