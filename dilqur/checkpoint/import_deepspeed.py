"""DeepSpeed ZeRO-1, 2 and 3: fp32 master weights and moments, put together from every rank's flat partitions.

    global_step500/ (Trainer, engine.save_checkpoint) or pytorch_model/ (accelerate), named by the file `latest` beside it
        mp_rank_00_model_states.pt, zero_pp_rank_0_mp_rank_00_model_states.pt, …    names, shapes, the step
        zero_pp_rank_0_mp_rank_00_optim_states.pt, …     a rank's partition of each parameter group; bf16_zero_pp_… in bf16

DeepSpeed's `ds_to_universal` also gives moments by name, but below ZeRO-3 it needs metadata that neither accelerate nor the
Trainer writes, and it first copies everything into pickles of its own. Here its way of reading works on mapped files
(deepspeed/checkpoint/ds_to_universal.py, `extract_zero_shards`, `extract_zero_shards_stage3`).
"""

import math
import re

from dilqur.checkpoint.import_state import TrainingState, adam_steps, expected, hyperparameters, load_pickle
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.errors import InputError

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def is_deepspeed(folder):
    """Is the folder one, or does it hold one?"""
    return any(next(folder.glob(f"{place}*_states.pt"), None) for place in ("", "*/"))


def read_deepspeed(folder, model):
    """TrainingState of `folder`, a pathlib.Path. Frozen weights are as the ranks held them: under bf16, rounded."""
    folder = _folder_of_ranks(folder)
    files = {int(found[1]): file for file in folder.iterdir() if (found := RANK.search(file.name))}
    models = sorted(folder.glob("*_model_states.pt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if parallel := [f.name for f in folder.iterdir() if re.search(r"mp_rank_(?!00)\d\d|expert|expp_", f.name)]:
        raise InputError(
            f"{folder}: {min(parallel)} is of tensor, pipeline or expert parallelism, which is not read here"
        )
    if not files:
        raise InputError(f"{folder}: no zero_pp_rank_*_optim_states.pt in it: not whole, or written without ZeRO")
    if not models:
        raise InputError(f"{folder}: no *_model_states.pt in it: not whole")
    ranks = [load_pickle(files[rank], "DeepSpeed") for rank in sorted(files)]
    abouts = [load_pickle(file, "DeepSpeed") for file in models]  # one below ZeRO-3
    about = abouts[0]
    with expected(folder, "DeepSpeed ZeRO"):
        ranks = [rank["optimizer_state_dict"] for rank in ranks]
        stage = int(ranks[0].get("zero_stage", 1))  # its bf16 optimizer is a ZeRO-1 and does not say so
        count = ranks[0]["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if sorted(files) != list(range(count)):
            raise InputError(f"{folder}: {len(files)} of {count} zero_pp_rank_*_optim_states.pt are there: not whole")
        groups = [{name: tuple(shape) for name, shape in group.items()} for group in about["param_shapes"]]
        flat = [_flat(rank, stage) for rank in ranks]
        fragments = _fragments_zero3(ranks, groups) if stage == 3 else _fragments_zero12(ranks)
        shapes = {name: shape for group in groups for name, shape in group.items()}
        for name, shape in shapes.items():
            if sum(length for *_, length in fragments.get(name, ())) != math.prod(shape):
                raise InputError(f"{folder}: its ranks do not hold all of {name}")
        optimizer = ranks[0]["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        optimizer_groups = optimizer["param_groups"] if isinstance(optimizer, dict) else []
        states = [{k: v for k, v in group.items() if k != "weight"} for rank in flat for group in rank]
        steps = adam_steps(folder, states, optimizer_groups)
        dtypes = {
            name: {k: flat[r][g][k].dtype for k in ("weight", *MOMENTS)} for name, [(r, g, *_), *_] in fragments.items()
        }
        stored = {(kind, name): (shapes[name], dtype) for name in shapes for kind, dtype in dtypes[name].items()}
        frozen = {name: tuple(shape) for name, shape in (about.get("frozen_param_shapes") or {}).items()}
        parts = {name: [a["frozen_param_fragments"][name].view(-1) for a in abouts] for name in frozen}
        stored |= {("weight", name): (shape, parts[name][0].dtype) for name, shape in frozen.items()}

    def read(kind, name):
        import torch

        if name in frozen:
            return torch.cat(parts[name])[: math.prod(frozen[name])].view(frozen[name])
        with expected(folder, f"DeepSpeed ZeRO-{stage}"):
            held = [flat[rank][group][kind].narrow(0, start, length) for rank, group, start, length in fragments[name]]
            return torch.cat(held).view(shapes[name])

    return TrainingState(
        format=f"DeepSpeed ZeRO-{stage} on {count} ranks",
        stored=stored,
        read=read,
        trained=list(shapes),
        step=int(about["global_steps"]),
        optimizer_steps=steps,
        groups=hyperparameters(optimizer_groups),
    )


def _folder_of_ranks(folder):
    """The folder itself, or the one in it that `latest` names, or the only one."""
    if next(folder.glob("*_states.pt"), None):
        return folder
    inside, latest = sorted({file.parent for file in folder.glob("*/*_states.pt")}), folder / "latest"
    if latest.exists() and (named := folder / latest.read_text().strip()) not in inside:
        raise InputError(f"{named}: not there or empty, but {latest} names it")
    if not latest.exists() and len(inside) > 1:
        raise InputError(f"{folder}: holds {len(inside)} checkpoints and no file `latest`: name one: {inside[-1]}")
    return named if latest.exists() else inside[0]


def _flat(rank, stage):
    """[{"weight", "exp_avg", "exp_avg_sq", "step"}] of one rank, flat, per group, or under ZeRO-3 per sub-group."""
    weights = rank["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    optimizer = rank["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    states = optimizer["state"] if isinstance(optimizer, dict) else optimizer  # a list in an elastic checkpoint
    return [{**states[group], "weight": weight} for group, weight in enumerate(weights)]


def _fragments_zero12(ranks):
    """{name: [(rank, group, start in the rank's partition, length), …]}, in the order of the ranks."""
    fragments = {}
    for rank, state in enumerate(ranks):
        for group, mapping in enumerate(state["param_slice_mappings"]):
            for name, where in mapping.items():
                fragments.setdefault(name, []).append((rank, group, where.start, where.numel))
    return fragments


def _fragments_zero3(ranks, groups):
    """The same: each parameter is split into one equal part per rank, the last one padded."""
    if ranks[0].get("ds_zero_partition_groups"):
        raise InputError("this DeepSpeed checkpoint is of expert parallelism, which is not read here")
    fragments = {}
    for number, group in enumerate(groups):
        start = 0
        for name, shape in group.items():
            size = math.prod(shape)
            each = -(-size // len(ranks))
            lengths = [max(0, min(each, size - rank * each)) for rank in range(len(ranks))]
            fragments[name] = [(rank, number, start, length) for rank, length in enumerate(lengths)]
            start += each
    return fragments
