"""FSDP as accelerate and the Trainer save it: sharded (torch.distributed.checkpoint) or whole (one pickle on rank 0).

    pytorch_model_fsdp_0/, optimizer_0/            .metadata (a pickle) and __RANK_0.distcp: SHARDED_STATE_DICT
    pytorch_model_fsdp.bin, optimizer.bin          FULL_STATE_DICT

Both have optimizer states by parameter name (accelerate/utils/fsdp_utils.py). Read in one process, tensor by tensor.
"""

import warnings

from dilqur.checkpoint.import_state import TrainingState, adam_steps, expected, hyperparameters, load_pickle
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.errors import InputError

WRITER = "accelerate's FSDP"
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def is_sharded(folder):
    return (folder / "pytorch_model_fsdp_0").is_dir() or (folder / "optimizer_0").is_dir()


def is_whole(folder):
    return (folder / "pytorch_model_fsdp.bin").exists()


def read_sharded(folder, model):
    """TrainingState of a folder of SHARDED_STATE_DICT; without optimizer_0/, of weights alone."""
    weights = _DcpFolder(folder / "pytorch_model_fsdp_0", "model.")
    where = {("weight", _plain(key)): (weights, key) for key in weights.tensors}
    trained, steps, groups = None, None, []
    if (folder / "optimizer_0").is_dir():
        optimizer = _DcpFolder(folder / "optimizer_0", "optimizer.")
        scalars = optimizer.read(k for k in optimizer.every if k.endswith(".step") or k.startswith("param_groups"))
        states = {}
        for key in optimizer.every:
            if key.startswith("state."):
                name, _, kind = key.removeprefix("state.").rpartition(".")
                states.setdefault(_plain(name), {})[kind] = scalars.get(key, key)
        where |= {(k, name): (optimizer, s[k]) for name, s in states.items() for k in MOMENTS if k in s}
        groups = _groups(scalars)
        trained, steps = list(states), adam_steps(folder / "optimizer_0", states.values(), groups)

    def read(kind, name):
        source, key = where[kind, name]
        return source.read([key])[key]

    with expected(folder, WRITER):
        stored = {key: source.tensors[inside] for key, (source, inside) in where.items()}
    return TrainingState("FSDP, sharded", stored, read, trained, steps, steps, hyperparameters(groups))


def read_whole(folder, model):
    """TrainingState of a folder of FULL_STATE_DICT; without optimizer.bin, of weights alone."""
    file = folder / "pytorch_model_fsdp.bin"
    tensors = load_pickle(file, WRITER, tensors_only=True)
    with expected(file, WRITER):
        tensors = {("weight", _plain(name)): tensor for name, tensor in tensors.items()}
    trained, steps, groups, file = None, None, [], folder / "optimizer.bin"
    if file.exists():
        optimizer = load_pickle(file, WRITER, tensors_only=True)
        with expected(file, WRITER):
            states, groups = {_plain(n): state for n, state in optimizer["state"].items()}, optimizer["param_groups"]
            trained, steps = list(states), adam_steps(file, states.values(), groups)
            tensors |= {(kind, name): state[kind] for name, state in states.items() for kind in MOMENTS}
    stored = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    return TrainingState(
        "FSDP, whole", stored, lambda *key: tensors[key], trained, steps, steps, hyperparameters(groups)
    )


class _DcpFolder:
    """A folder of torch.distributed.checkpoint. tensors: {key without `prefix`: (shape, dtype)}. every: all keys."""

    def __init__(self, folder, prefix):
        self.folder, self.prefix = folder, prefix
        if not (folder / ".metadata").exists():
            raise InputError(f"{folder}/.metadata: not there: not whole")
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        class Reader(FileSystemReader):
            """Unpickles .metadata once, not for every tensor."""

            def read_metadata(self, *arguments, **more):
                if not hasattr(self, "unpickled"):
                    self.unpickled = super().read_metadata(*arguments, **more)
                return self.unpickled

        self._reader = Reader(folder)
        with expected(folder / ".metadata", WRITER):
            entries = self._reader.read_metadata().state_dict_metadata
            if strange := [key for key in entries if not key.startswith(prefix)]:
                raise InputError(f"{folder}: holds {strange[0]}, not {prefix}…: not written by {WRITER}")
            self.every = [key.removeprefix(prefix) for key in entries]
            self.tensors = {
                key.removeprefix(prefix): (tuple(entry.size), entry.properties.dtype)
                for key, entry in entries.items()
                if isinstance(entry, TensorStorageMetadata)
            }

    def read(self, keys):
        """{key: tensor or object}."""
        import torch
        from torch.distributed.checkpoint import CheckpointException, load

        found = {}
        for key in keys:
            shape, dtype = self.tensors.get(key, (None, None))
            found[self.prefix + key] = None if dtype is None else torch.empty(shape, dtype=dtype)
        with expected(self.folder, WRITER), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                load(found, storage_reader=self._reader, no_dist=True)
            except CheckpointException as problem:  # no Exception: it wraps each rank's
                raise problem.failures[0][0] from None
        return {key.removeprefix(self.prefix): value for key, value in found.items()}


def _plain(name):
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _groups(scalars):
    """The optimizer's groups; keys are param_groups.NUMBER.SETTING."""
    groups = {}
    for key, value in scalars.items():
        if key.startswith("param_groups.") and key.count(".") > 1:
            _, number, setting = key.split(".", 2)
            groups.setdefault(number, {})[setting] = value
    return list(groups.values())
