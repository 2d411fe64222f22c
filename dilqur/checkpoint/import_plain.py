"""A checkpoint of one process or of DDP, as accelerate's save_state and the Trainer write it.

    model.safetensors, or shards of it        weights
    optimizer.bin (accelerate), optimizer.pt (Trainer)      the optimizer's state_dict: a pickle

The optimizer's states have numbers, not names: 0, 1, 2, … over its groups. Newer torch optimizers made with names keep them
(`param_names`). Otherwise a group lists its parameters in the model's order, as any list comprehension over
`model.named_parameters()` does, and exactly one assignment of the model's parameters to the groups must fit their shapes.
"""

from itertools import chain

from dilqur.checkpoint.import_state import TrainingState, adam_steps, expected, hyperparameters, load_pickle
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.errors import InputError


def optimizer_file(folder):
    """optimizer.bin or optimizer.pt of a folder, or None."""
    return next((folder / name for name in ("optimizer.bin", "optimizer.pt") if (folder / name).exists()), None)


def read_plain(folder, model):
    """TrainingState of a folder with both. Raises InputError where a number could mean no name, or several."""
    from dilqur.checkpoint.hf_folder import read_weights

    file, writer = optimizer_file(folder), "accelerate or the Trainer"
    if not next(folder.glob("*.safetensors"), None):
        raise InputError(f"{folder}: no .safetensors beside {file.name}: the weights are missing, or saved as a pickle")
    weights = read_weights(folder, model)
    optimizer = load_pickle(file, writer, tensors_only=True)
    with expected(file, writer):
        states, groups = optimizer["state"], optimizer["param_groups"]
        numbers = [group["params"] for group in groups]
        if without := [number for number in chain(*numbers) if number not in states]:
            raise InputError(f"{file}: no state for its parameter {without[0]}: the optimizer has not stepped it")
        steps = adam_steps(file, states.values(), groups)
        names = [group.get("param_names") for group in groups]
        if not all(names):
            shapes = [[tuple(states[number]["exp_avg"].shape) for number in inside] for inside in numbers]
            names = match_shapes(shapes, model.shapes, file)
        named = dict(zip(map(model.first_name, chain(*names)), chain(*numbers), strict=True))
        moments = {(kind, name): states[number][kind] for name, number in named.items() for kind in MOMENTS}
    stored = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in moments.items()}
    return TrainingState(
        format=f"weights and {file.name}, of one process or DDP",
        stored=weights.stored | stored,
        read=lambda *key: moments[key] if key in moments else weights.read(*key),
        trained=list(named),
        step=steps,
        optimizer_steps=steps,
        groups=hyperparameters(groups),
    )


def match_shapes(groups, model, source):
    """[[name, …]] for `groups`, [[shape, …]]: the parameters of `model`, {name: shape} in order, assigned to the groups in that
    order; those of no group were frozen. Raises InputError where no assignment fits, or several do."""
    lengths = tuple(map(len, groups))
    frozen = len(model) - sum(lengths)
    # after each parameter: {assigned so far, per group: (assignments that lead here, at most 2; the moves of one)}
    ways = {(0,) * len(groups): (1, ())}
    for position, (name, shape) in enumerate(model.items()):
        after = {}
        for taken, (count, chosen) in ways.items():
            moves = [(g, name) for g, at in enumerate(taken) if at < lengths[g] and groups[g][at] == shape]
            if position - sum(taken) < frozen:
                moves.append(None)
            for move in moves:
                now = taken if move is None else tuple(at + (g == move[0]) for g, at in enumerate(taken))
                before = after.get(now, (0, ()))[0]
                after[now] = (min(2, before + count), (chosen, move))
        ways = after
        if len(ways) > 10_000:
            break
    count, chosen = ways.get(lengths, (0, ()))
    if len(ways) > 10_000 or count > 1:
        raise InputError(
            f"{source}: its states have numbers, and they could be these parameters in more than one way; only an optimizer "
            "made with names (torch.optim.AdamW(model.named_parameters())) can be taken over"
        )
    if count == 0:
        raise InputError(
            f"{source}: its states do not fit the parameters of this model, in their order: the optimizer of another model"
        )
    names = [[] for _ in groups]
    while chosen:
        chosen, move = chosen
        if move:
            names[move[0]].insert(0, move[1])
    return names
