"""A checkpoint of one process or of DDP, as accelerate's save_state and the Trainer write it.

    model.safetensors, or shards of it        weights
    optimizer.bin (accelerate), optimizer.pt (Trainer)      the optimizer's state_dict: a pickle

Its states have numbers, not names: 0, 1, 2, … through the optimizer's groups. Newer torch optimizers that were given names keep
them (`param_names`). Else a group lists its parameters in the model's order, as everybody's list comprehension over
`model.named_parameters()` does, and there must be exactly one such way to deal out the model's shapes over the groups.
"""

from dilqur.checkpoint.import_state import TrainingState
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.checkpoint.pickled_state import adam_steps, expected, hyperparameters, load_pickle
from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import read_tensor, stored_tensors


def optimizer_file(folder):
    """optimizer.bin or optimizer.pt of a folder, or None."""
    return next((folder / name for name in ("optimizer.bin", "optimizer.pt") if (folder / name).exists()), None)


def read_plain(folder, model):
    """TrainingState of a folder with both. Raises InputError where the numbers cannot be told to mean one name each."""
    file = optimizer_file(folder)
    if not next(folder.glob("*.safetensors"), None):
        raise InputError(f"{folder}: no .safetensors beside {file.name}: the weights are missing, or saved as a pickle")
    weights = stored_weights(folder, model)
    optimizer = load_pickle(file, "accelerate or the Trainer", tensors_only=True)
    with expected(file, "accelerate or the Trainer"):
        states, groups = optimizer["state"], optimizer["param_groups"]
        numbers = [group["params"] for group in groups]
        if without := [number for inside in numbers for number in inside if number not in states]:
            raise InputError(f"{file}: no state for its parameter {without[0]}: the optimizer has not stepped it")
        steps = adam_steps(file, states.values(), groups)
        shapes = [[tuple(states[number]["exp_avg"].shape) for number in inside] for inside in numbers]
        given = [group.get("param_names") for group in groups]
        names = (
            [[model.first_name(n) for n in g] for g in given]
            if all(given)
            else match_shapes(shapes, model.shapes, file)
        )
        named = {
            name: states[n]
            for inside, ns in zip(names, numbers, strict=True)
            for name, n in zip(inside, ns, strict=True)
        }
        moments = {(kind, name): state[kind] for name, state in named.items() for kind in MOMENTS}
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


def stored_weights(folder, model):
    """TrainingState of a model folder's safetensors files: weights alone; of tied ones, only those under the first name."""
    import torch

    from dilqur.models.safetensors_io import torch_dtype

    tensors = stored_tensors(folder)
    buffers = set(model.every) - set(model.shapes) - set(model.tied)
    stored = {}
    for name, where in tensors.items():
        if name not in buffers and name not in model.tied:
            stored["weight", name] = where.shape, torch_dtype(where.dtype) or torch.uint8
    return TrainingState("a Hugging Face folder", stored, lambda _, name: read_tensor(tensors[name], name))


def match_shapes(groups, model, source):
    """[[name, …]] for `groups`, [[shape, …]]: the parameters of `model`, {name: shape} in order, spread out so that each group
    keeps that order; those of no group were frozen. Raises InputError where there is no way to do it, or more than one."""
    lengths = tuple(map(len, groups))
    frozen = len(model) - sum(lengths)
    # after each parameter of the model: {how many of each group are taken: (ways to come here, capped at 2; the choices of one)}
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
