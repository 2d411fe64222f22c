"""Strategies, without torch: what an accelerate config shards over how many GPUs, and which one this process was launched for."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError

CONFIGS = ROOT / "accelerate_configs"
ORDER = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "fsdp2_offload")  # the simpler one first
ZERO = ("zero1", "zero2", "zero3")
CANNOT = {  # (key, value) of a recipe: ({strategy}, why, what to do)
    ("dtype", "bfloat16"): (ZERO, "DeepSpeed keeps fp32 master weights", "take ddp.yaml or fsdp2.yaml"),
    ("torch_compile", True): (("zero3",), "its hooks break the graph at every weight", "take fsdp2.yaml"),
}


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
        shards = gpus_per_node if config.get("parallelism_config") else gpus  # slurm/launch.sh: a node's GPUs
        offload, reshards = keys.get("fsdp_offload_params", False), keys.get("fsdp_reshard_after_forward", True)
        return Strategy(path.stem, kind, *where, shards, offload, reshards)
    return Strategy(path.stem, kind, *where, 1 if kind == "ddp" else gpus)


def kind_of_config(config):
    """ddp, fsdp2, zero1, zero2 or zero3: what an accelerate config, a dict, launches. Raises InputError for what is not supported."""
    if config.get("distributed_type") == "DEEPSPEED":
        return _zero_stage((config.get("deepspeed_config") or {}).get("zero_stage", 2))
    if config.get("distributed_type") != "FSDP":
        return "ddp"
    fsdp, dynamo = config.get("fsdp_config") or {}, config.get("dynamo_config") or {}
    _refuse_accelerates_own(fsdp.get("fsdp_activation_checkpointing", False), dynamo.get("dynamo_backend", "no"))
    return _fsdp_version(fsdp.get("fsdp_version", 1))


def names():
    """Of the accelerate configs that are there, the simpler ones first."""
    there = [path.stem for path in CONFIGS.glob("*.yaml")]
    return sorted(there, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def planned_strategy():
    """The strategy this process was launched for, without torch: what `accelerate launch` exported, or the accelerate config in
    DILQUR_STRATEGY that slurm/launch.sh is about to launch. Raises InputError for one that is not supported."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return _zero_stage(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _refuse_accelerates_own(
            os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false"), os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        )
        replicas, shards = (
            int(os.environ.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", 1)) for name in ("REPLICATE", "SHARD")
        )
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true" and replicas * shards != world:
            raise InputError(
                f"parallelism_config: dp_replicate_size {replicas} x dp_shard_size {shards} are not the {world} processes: give "
                "--parallelism_config_dp_replicate_size (nodes) and --parallelism_config_dp_shard_size (GPUs of a node)"
            )
        return _fsdp_version(os.environ.get("FSDP_VERSION", "1"))
    if world > 1 and (config := os.environ.get("DILQUR_STRATEGY")) and "LOCAL_RANK" not in os.environ:
        return kind_of_config(yaml.safe_load(Path(config).read_text(encoding="utf-8")))
    return "ddp" if world > 1 else "single"


def _zero_stage(stage):
    if f"zero{stage}" not in ZERO:
        raise InputError(f"DeepSpeed's zero_stage {stage} partitions nothing: take 1, 2 or 3, or ddp.yaml")
    return f"zero{stage}"


def _refuse_accelerates_own(checkpointing, backend):
    """What accelerate would do to a model before it shards it, and `prepare` does not: the recipe's own keys do."""
    for key, value, ours in (
        ("fsdp_activation_checkpointing", checkpointing, "gradient_checkpointing"),
        ("dynamo_backend", backend, "torch_compile"),
    ):
        if str(value).lower() not in ("", "no", "false", "none"):
            raise InputError(
                f"{key} of the accelerate config is not used: leave it out, and give {ours}: true in the recipe"
            )


def _fsdp_version(version):
    if str(version) != "2":
        raise InputError(
            f"fsdp_version {version} of FSDP is not supported: give fsdp_version: 2 in the accelerate config"
        )
    return "fsdp2"


def refuse_what_it_cannot(settings, strategy):
    """InputError where a key of the recipe does not work under `strategy`."""
    for (key, value), (strategies, why, instead) in CANNOT.items():
        if strategy in strategies and getattr(settings, key, None) == value:
            raise InputError(f"{key}: {str(value).lower()} does not work under {strategy}: {why}; {instead}")
