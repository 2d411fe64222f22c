"""Checks of what is special about a cluster: slurm/site.env as slurm/lib/read_site.sh reads it, and the image it may name."""

import difflib
import os
import re
import subprocess

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.preflight.findings import Skipped

SECONDS = 5
SHELL_S_OWN = ("_", "SHLVL", "PWD", "OLDPWD")


def check_site(variables):
    """slurm/site.env is bash, ends, and sets what is known. Its variables are added to `variables`."""
    file = ROOT / "slurm" / "site.env"
    if not file.exists():
        raise Skipped("no slurm/site.env: the SBATCH_* and DILQUR_* of this shell hold; slurm/setup_site.sh makes one")
    if not os.access(file, os.R_OK):
        raise InputError("slurm/site.env: cannot be read: look at its permissions")
    if mistake := unknown_key(file.read_text(encoding="utf-8")):
        raise InputError(f"slurm/site.env:{mistake}")
    script = "source slurm/lib/read_site.sh >&2; env -0"
    try:
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"slurm/site.env: has not ended after {SECONDS} s, and every job reads it: it may only set variables"
        ) from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode or "syntax error" in said or "unexpected" in said:
        last = said.splitlines()[0] if said else f"exit code {done.returncode}"
        raise InputError(f"slurm/site.env: bash cannot read it: {last}")
    now = dict(word.split("=", 1) for word in done.stdout.decode(errors="replace").split("\0") if "=" in word)
    changed = {k: v for k, v in now.items() if os.environ.get(k) != v and k not in SHELL_S_OWN}
    variables.update(changed)
    venv = now.get("DILQUR_VENV")
    if venv and not (ROOT / venv / "bin" / "python").exists():
        raise InputError(
            f"slurm/site.env: DILQUR_VENV: {venv}: no bin/python in it: make it again, or correct the path"
        )
    asked = {k.removeprefix("SBATCH_").lower(): v for k, v in sorted(now.items()) if k.startswith("SBATCH_")}
    return "slurm/site.env: " + (
        ", ".join(f"{name} {value}" for name, value in asked.items()) or "asks sbatch for nothing"
    )


def unknown_key(text):
    """The first line that sets a DILQUR_* that slurm/site.env.example does not know, as "LINE: what is wrong", or None."""
    example = ROOT / "slurm" / "site.env.example"
    if not example.exists():
        return None
    known = set(re.findall(r"\bDILQUR_\w+", example.read_text(encoding="utf-8")))
    for script in (ROOT / "slurm").glob("*.sh"):
        known |= set(re.findall(r"\bDILQUR_\w+", script.read_text(encoding="utf-8")))
    for number, line in enumerate(text.splitlines(), 1):
        name = re.match(r"\s*(?:export\s+)?(DILQUR_\w+)=", line)
        if name and name[1] not in known:
            close = difflib.get_close_matches(name[1], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "slurm/site.env.example has those that are"
            return f"{number}: {name[1]}: nothing reads that; {hint}"
    return None


def check_image():
    """The image of the site is an Apptainer image that can be read."""
    image = os.environ.get("DILQUR_IMAGE")
    if not image:
        return None
    path = ROOT / image
    if not path.exists():
        raise InputError(
            f"DILQUR_IMAGE: {image}: no such file: build it (apptainer/build.sh), or correct slurm/site.env"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"DILQUR_IMAGE: {image}: cannot be read: look at its permissions")
    if path.is_dir():
        if not (path / ".singularity.d").exists():
            raise InputError(f"DILQUR_IMAGE: {image}: a folder, and none that Apptainer made: name the .sif file")
        return f"{image}, a folder made by Apptainer"
    with path.open("rb") as file:
        head = file.read(48)
    if b"SIF_MAGIC" not in head:  # after a line that runs it
        raise InputError(f"DILQUR_IMAGE: {image}: not an Apptainer image (SIF): build or copy it again")
    return f"{image}, {path.stat().st_size / 1e9:,.1f} GB"
