"""GPUs, as far as planning needs to know them: what data sheets say, and the share of it that published runs have made of them."""

import difflib
import re
from dataclasses import dataclass

from dilqur.common.errors import InputError
from dilqur.estimate.cost_model import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """memory: bytes that torch finds, as its out-of-memory messages say ("39.50 GiB total"), which is less than the name says. peak:
    bfloat16 operations per second. bandwidth: of the memory. watts: of the board at most. link: to the other GPUs of the node, one way.
    network: of a node of 8 with its typical network. host_link: to main memory, one way. All in bytes per second.

    efficiency: model operations per second, as `training_flops_per_token` counts them, / peak, in a published run: `published` says which.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    watts: float
    link: float
    network: float
    host_link: float
    efficiency: float
    published: str


A100_RUN = "Llama 3.2 1B on 16 A100-40GB, 2.87 s a step of 224 × 2,048 tokens"  # 43,000 s for 15,000 steps
H100_RUN = "Llama 3.2 1B with Liger, 78,319 tokens/s of an H100"
H200_RUN = "NeoBERT on 8 H200, 1.68 s a step of 2,304 × 1,024 tokens"
NO_RUN = f"none of this GPU; that of {A100_RUN}"
# Sources: NVIDIA's data sheets of the SXM boards (A100 2021, H100 2022, H200 2024, a DGX B200's eighth 2024) and of the A10G, a PCIe card.
# They give NVLink both ways together: 600, 900, 1,800 GB/s. Networks are those of AWS's nodes of 8 (p4d, p4de, p5, p5en, p6-b200, g5):
# 400, 3,200 and 100 Gbit/s. PCIe 4 and 5 with 16 lanes: 32 and 64 GB/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40GB", 39.50 * GIB, PEAK_FLOPS["A100"], 1.555e12, 400, 300e9, 50e9, 32e9, 0.240, A100_RUN),
        GPU("A100-80GB", 79.25 * GIB, PEAK_FLOPS["A100"], 2.039e12, 400, 300e9, 50e9, 32e9, 0.240, A100_RUN),
        GPU("H100-80GB", 79.11 * GIB, PEAK_FLOPS["H100"], 3.35e12, 700, 450e9, 400e9, 64e9, 0.619, H100_RUN),
        GPU("H200", 139.8 * GIB, PEAK_FLOPS["H200"], 4.8e12, 700, 450e9, 400e9, 64e9, 0.268, H200_RUN),
        GPU("B200", 178.3 * GIB, PEAK_FLOPS["B200"], 8.0e12, 1000, 900e9, 400e9, 64e9, 0.240, NO_RUN),
        GPU("A10G", 22.06 * GIB, PEAK_FLOPS["A10G"], 0.6e12, 300, 32e9, 12.5e9, 32e9, 0.240, NO_RUN),
    )
}
# Main memory of a node, bytes per second: two AMD EPYC 7003, each with 8 channels of DDR4-3200 (AMD's data sheet: 204.8 GB/s)
HOST_BANDWIDTH = 409.6e9


def gpu_of(name):
    """The GPU called so: its name here in any case, with or without its memory where there is one kind of it. Raises InputError."""
    wanted = re.sub(r"[\s_-]", "", name.lower()).removeprefix("nvidia")
    found = [gpu for known, gpu in GPUS.items() if known.lower().replace("-", "").startswith(wanted)]
    if exact := [gpu for gpu in found if gpu.name.lower().replace("-", "") == wanted]:
        return exact[0]
    if len(found) == 1:
        return found[0]
    near = ", ".join(gpu.name for gpu in found) or ", ".join(difflib.get_close_matches(name.upper(), GPUS)) or "none"
    raise InputError(f"--gpu {name}: which one: {near}? Known are {', '.join(GPUS)}")


def gpu_meant(line):
    """The GPU of a batch file's line `# GPU: H100, 80 GB`; of `any with 24 GB` the first known one with that memory; None if unknown."""
    said = re.search(r"(\w+).*?(\d+) GB", line)
    if not said:
        return None
    kind, size = said[1].upper(), float(said[2])
    fits = [gpu for gpu in GPUS.values() if abs(gpu.memory / GIB - size) < 0.1 * size]
    of_kind = [gpu for gpu in fits if gpu.name.startswith(kind)]
    return next(iter(of_kind or (fits if kind == "ANY" else [])), None)
