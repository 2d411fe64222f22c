"""A batch file as sbatch reads it: nodes, GPUs and time that it asks for, the warning before its end, the cards it is meant for."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dilqur.common.errors import InputError
from dilqur.preflight.findings import Skipped

# sbatch takes these before the file's own lines
VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GRES": "gres",
    "SBATCH_PARTITION": "partition",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}


@dataclass
class BatchFile:
    """options: {long name of an sbatch option: value}. meant_for: its line `# GPU: H100, 80 GB` after the colon, "" without one."""

    path: Path
    options: dict
    meant_for: str = ""

    @property
    def card(self):
        """Bytes of memory of each GPU it is meant for, None if it does not say."""
        said = re.search(r"(\d+) GB", self.meant_for)
        return float(said[1]) * 1e9 if said else None

    @property
    def nodes(self):
        return int(re.split(r"\D", self.options.get("nodes", "1"))[0] or 1)

    @property
    def gpus(self):
        """Of a node; 0 if it asks for none."""
        return gpus_in(self.options.get("gres", "")) or gpus_in("gpu:" + self.options.get("gpus-per-node", ""))

    @property
    def seconds(self):
        """The time it may take; None where it does not say, or there is no limit."""
        return seconds_of(self.options.get("time", "UNLIMITED"))

    @property
    def warning(self):
        """Seconds before its end at which its trap hears of that; None: never."""
        signal, _, seconds = self.options.get("signal", "").partition("@")
        return int(seconds or 60) if signal in ("B:USR1", "B:10") else None


def read_batch_file(path, environment=os.environ):
    """The BatchFile at `path`, an empty one where there is none, under the SBATCH_* variables of `environment`."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = re.findall(r"^#SBATCH[ \t]+--([\w-]+)(?:[= \t][ \t]*(\S+))?", text, re.M)
    given = {option: environment[name] for name, option in VARIABLES.items() if environment.get(name)}
    meant_for = re.search(r"^# GPU: (.*)$", text, re.M)
    return BatchFile(path, {**dict(lines), **given}, meant_for[1] if meant_for else "")


def seconds_of(time):
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for UNLIMITED. Raises InputError."""
    if time.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return None
    days, dash, rest = time.rpartition("-")
    fields = rest.split(":")
    if not all(field.isdecimal() for field in [*fields, days if dash else "0"]) or len(fields) > 3:
        raise InputError(f"--time={time} is no time: write HH:MM:SS, or D-HH:MM:SS")
    if dash or len(fields) == 3:
        fields += ["0"] * (3 - len(fields))
    else:
        fields = ["0", *fields, "0"][:3]
    hours, minutes, seconds = map(int, fields)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def gpus_in(gres):
    """GPUs in a list of generic resources as Slurm writes it: gpu:8, gpu:h100:8(S:0-1), gres:gpu:8, gpu (which is one)."""
    return sum(int(n or 1) for n in re.findall(r"\bgpu(?::[a-zA-Z][\w.-]*)?(?::(\d+)|(?=$|,))", gres))


def check_file(batch_file):
    """It is there, leaves time for work, and its trap hears before the end."""
    path = batch_file.path
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.sbatch")))
        raise InputError(f"slurm/{path.name}: no such batch file, and pipeline.txt names it; there are: {there}")
    if batch_file.warning is None:
        raise InputError(
            f"slurm/{path.name}: no --signal=B:USR1@300: at the end of its time the job is killed without saving: put it back"
        )
    if (seconds := batch_file.seconds) is None:
        raise Skipped("asks for no --time: the partition's own limit holds, and whether it is enough is not known")
    if seconds < 3 * batch_file.warning:
        raise InputError(
            f"--time is {clock(seconds)}, and {clock(batch_file.warning)} before its end the job stops: little or nothing would "
            f"be done each time: give it {clock(3 * batch_file.warning)} or more"
        )
    return f"{clock(seconds)}, warned {clock(batch_file.warning)} before its end"


def clock(seconds):
    """20:00:00, or 2-00:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{seconds:02}"
