"""A checkpoint as a Hugging Face folder, in the memory of one tensor.

    config.json, generation_config.json, tokenizer   of the model the run began with
    model.safetensors (or shards)       its weights, those that were trained as the checkpoint has them
    optimizer/{exp_avg,exp_avg_sq}/model.safetensors, optimizer/state.json      if asked for: what training goes on with

state.json holds trainer.json and a checksum of every trained weight and moment: an optimizer that does not belong to the
weights beside it, or is damaged, is refused. transformers looks for weights in the folder itself and does not see optimizer/.
"""

import shutil
from pathlib import Path

from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.atomic import write_json
from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import read_tensor, stored_tensors, torch_dtype, write_shards
from dilqur.tokenizer.files import copy_tokenizer

STATE_VERSION = 1


def write_folder(out, reader, base, tokenizer, config, model, dtype=None, with_optimizer=False):
    """Write the checkpoint of `reader` into the empty folder `out`. Returns the number of weights written.

    base: the model folder the run began with, for what was frozen, or None. tokenizer: where its files lie. config, model: that
    model's transformers config and ModelParameters. dtype: of all floating-point weights; None: as they are trained, and
    as they are in `base`. Raises InputError where checkpoint and model do not belong together.
    """
    tensors = _weights(reader, base, model, dtype)
    checksums = {f"weight/{name}": digest for name, digest in write_shards(out, tensors).items()}
    floats = [there for there, *_ in tensors.values() if there.is_floating_point]
    config.dtype = max(floats, key=lambda there: there.itemsize)  # transformers makes all weights so
    config.use_cache = True
    config.save_pretrained(out)
    if base and (Path(base) / "generation_config.json").exists():
        shutil.copyfile(Path(base) / "generation_config.json", Path(out) / "generation_config.json")
    copy_tokenizer(tokenizer, out)
    if with_optimizer:
        folder = Path(out) / "optimizer"
        for kind in MOMENTS:
            (folder / kind).mkdir(parents=True)
            inside = {name: _of_checkpoint(reader, kind, name) for name in reader.shapes}
            checksums |= {f"{kind}/{name}": digest for name, digest in write_shards(folder / kind, inside).items()}
        kept = {key: digest for key, digest in checksums.items() if key.partition("/")[2] in reader.shapes}
        write_json(folder / "state.json", {"version": STATE_VERSION, "trainer": reader.trainer, "xxh3": kept})
    return len(tensors)


def _weights(reader, base, model, dtype):
    """{name: (dtype, shape, function)} of every weight of the model."""
    for name, shape in reader.shapes.items():
        if model.shapes.get(name) != tuple(shape):
            raise InputError(
                f"{reader.folder}: {name} is {list(shape)}, {base or 'its model'} has {list(model.shapes.get(name, ())) or 'none'}: "
                "give --model_name_or_path, the model the run began with"
            )
    stored = stored_tensors(base) if base and set(model.every) - set(model.tied) - set(reader.shapes) else {}
    tensors = {}
    for name in model.every:
        if name in model.tied:
            continue
        if name in reader.shapes:
            tensors[name] = _of_checkpoint(reader, "weight", name)
        elif name in stored:
            there = torch_dtype(stored[name].dtype)
            if there is None or (name in model.shapes and stored[name].shape != model.shapes[name]):
                raise InputError(
                    f"{base}: {name} is {stored[name].dtype} {list(stored[name].shape)}, which its config.json does not say"
                )
            tensors[name] = there, stored[name].shape, lambda name=name: read_tensor(stored[name], name)
        else:
            raise InputError(
                f"{reader.folder}: was not trained on {name}, and {base or 'no model'} holds none: give --model_name_or_path"
            )
    return {name: _cast(tensor, dtype) for name, tensor in tensors.items()} if dtype else tensors


def _of_checkpoint(reader, kind, name):
    return reader.dtypes[kind, name], reader.shapes[name], lambda: reader.tensor(kind, name)


def _cast(tensor, dtype):
    there, shape, make = tensor
    return (dtype, shape, lambda: make().to(dtype)) if there.is_floating_point else tensor
