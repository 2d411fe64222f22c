"""Which strategy (DDP, FSDP2, ZeRO) a process is launched for, and what does not work under it; without torch."""

import os
from pathlib import Path

import yaml

from dilqur.common.errors import InputError

ZERO = ("zero1", "zero2", "zero3")


CANNOT = {  # (key, value) of a recipe: ({strategy}, why, what to do)
    ("dtype", "bfloat16"): (ZERO, "DeepSpeed keeps fp32 master weights", "take ddp.yaml or fsdp2.yaml"),
    ("torch_compile", True): (("zero3",), "its hooks break the graph at every weight", "take fsdp2.yaml"),
}


def kind_of_config(config):
    """ddp, fsdp2, zero1, zero2 or zero3: what an accelerate config, a dict, launches. Raises InputError for what is not supported."""
    if config.get("distributed_type") == "DEEPSPEED":
        return _zero_stage((config.get("deepspeed_config") or {}).get("zero_stage", 2))
    if config.get("distributed_type") != "FSDP":
        return "ddp"
    fsdp, dynamo = config.get("fsdp_config") or {}, config.get("dynamo_config") or {}
    _refuse_accelerates_own(fsdp.get("fsdp_activation_checkpointing", False), dynamo.get("dynamo_backend", "no"))
    return _fsdp_version(fsdp.get("fsdp_version", 1))


def planned_strategy():
    """The strategy this process was launched for, without torch: what `accelerate launch` exported, or the accelerate config in
    DILQUR_ACCELERATE_CONFIG that slurm/lib/launch.sh is about to launch. Raises InputError for one that is not supported."""
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
    if world > 1 and (config := os.environ.get("DILQUR_ACCELERATE_CONFIG")) and "LOCAL_RANK" not in os.environ:
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
