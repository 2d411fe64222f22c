"""A strategy as an estimate needs to know it: what an accelerate config shards, over how many GPUs."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.pipeline.strategy import kind_of_config

CONFIGS = ROOT / "accelerate_configs"
ORDER = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "fsdp2_offload")  # the simpler one first


@dataclass(frozen=True)
class Strategy:
    """name: of the accelerate config. kind: single, ddp, fsdp2, zero1, zero2 or zero3. shards: GPUs among which what it shards is
    divided. offload: weights, gradients and moments lie in main memory. reshards: gathered weights are dropped after each use."""

    name: str
    kind: str
    nodes: int
    gpus_per_node: int
    shards: int
    offload: bool = False
    reshards: bool = True

    @property
    def gpus(self):
        return self.nodes * self.gpus_per_node


def strategy_of(name, nodes, gpus_per_node):
    """The Strategy of an accelerate config (a path, or the name of one in accelerate_configs/) on so many GPUs; of one GPU it is `single`,
    as nothing is launched then. Raises InputError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"--strategy {name}: no such file; in accelerate_configs/ there are: {', '.join(names())}")
    gpus = nodes * gpus_per_node
    if gpus == 1:
        return Strategy("single", "single", 1, 1, 1)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as problem:
        raise InputError(f"{path}: not valid YAML ({str(problem).splitlines()[0]})") from None
    kind, where = kind_of_config(config), (nodes, gpus_per_node)
    if kind == "fsdp2":
        keys = config.get("fsdp_config") or {}
        shards = gpus_per_node if config.get("parallelism_config") else gpus  # slurm/lib/launch.sh: a node's GPUs
        offload, reshards = keys.get("fsdp_offload_params", False), keys.get("fsdp_reshard_after_forward", True)
        return Strategy(path.stem, kind, *where, shards, offload, reshards)
    return Strategy(path.stem, kind, *where, 1 if kind == "ddp" else gpus)


def names():
    """Of the accelerate configs that are there, the simpler ones first."""
    there = [path.stem for path in CONFIGS.glob("*.yaml")]
    return sorted(there, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
