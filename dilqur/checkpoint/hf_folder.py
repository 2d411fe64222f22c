"""A checkpoint as a Hugging Face folder, and back, with one tensor in memory at a time.

    config.json, generation_config.json, tokenizer      of the base model, with which the run began
    model.safetensors (or shards)                       all weights: the trained ones from the checkpoint
    optimizer/{exp_avg,exp_avg_sq}/model.safetensors, optimizer/state.json      on request: what training resumes from

state.json holds trainer.json and a checksum of every trained weight and moment: a damaged optimizer, or one that does not
belong to the weights beside it, is refused. transformers reads weights from the folder itself and ignores optimizer/.
"""

import json
import shutil
from pathlib import Path

import torch

from dilqur.checkpoint.import_state import TrainingState
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.atomic import write_json
from dilqur.common.errors import InputError
from dilqur.common.hashing import checksum
from dilqur.models.config import load_config
from dilqur.models.safetensors_io import read_tensor, stored_tensors, tensor_bytes, torch_dtype, write_shards
from dilqur.tokenizer.files import copy_tokenizer

STATE_VERSION = 1
WRITTEN_BY_PUBLISH = ("version", "step", "world_size")  # keys of trainer.json


# -- what a checkpoint does not hold ----------------------------------------------------------------------------------


def base_of(reader, given=None):
    """The folder of the model that the run of `reader` began with; None if it began with random weights. given: the user's
    choice. Raises InputError where the folder is missing or unknown."""
    recipe = reader.trainer.get("recipe") or {}
    base = given or recipe.get("model_name_or_path") or reader.trainer.get("imported", {}).get("model")
    if base and not (Path(base) / "config.json").exists():
        raise InputError(f"{base}: the model the run began with is not there: give --model_name_or_path")
    if not base and not recipe.get("model_config"):
        raise InputError(f"{reader.folder}: does not say which model it began with: give --model_name_or_path")
    return base


def base_model(reader, given=None):
    """(its folder or None, its transformers config, the folder of its tokenizer), as `base_of` finds it."""
    from transformers import LlamaConfig

    if base := base_of(reader, given):
        return base, load_config(base), base
    recipe = reader.trainer["recipe"]
    return None, LlamaConfig(**recipe["model_config"]), recipe["tokenizer"]


def read_encoder_checkpoint(reader, given=None):
    """(weights, NeoBERTConfig, the tokenizer's folder) of a checkpoint of mlm.py. given: as of `base_of`."""
    from dilqur.models.modeling_neobert import NeoBERTLMHead
    from dilqur.models.neobert_folder import neobert_config, new_config, refuse_other_shapes

    base, recipe = base_of(reader, given), reader.trainer["recipe"]
    config = neobert_config(base) if base else new_config(recipe["model_config"], recipe["tokenizer"])
    if base and recipe["max_position_embeddings"]:
        config.max_length = recipe["max_position_embeddings"]
    with torch.device("meta"):
        refuse_other_shapes(reader.folder, reader.shapes, NeoBERTLMHead(config))
    return {name: reader.tensor("weight", name) for name in reader.shapes}, config, base or recipe["tokenizer"]


# -- write ------------------------------------------------------------------------------------------------------------


def write_folder(out, reader, base, tokenizer, config, model, dtype=None, with_optimizer=False):
    """Write the checkpoint of `reader` into the empty folder `out`.

    base: the folder of the base model, for frozen weights, or None. tokenizer: a folder with its files. config, model: the
    base model's transformers config and ModelParameters. dtype: of all floating-point weights; None: as trained, and as in
    `base`. Raises InputError where checkpoint and model do not belong together.
    """
    tensors = _weights(reader, base, model)
    if dtype:
        tensors = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    checksums = {f"weight/{name}": digest for name, digest in write_shards(out, tensors).items()}
    floats = [stored for stored, *_ in tensors.values() if stored.is_floating_point]
    config.dtype = max(floats, key=lambda stored: stored.itemsize)  # transformers loads all weights in it
    config.use_cache = True
    config.save_pretrained(out)
    if base and (Path(base) / "generation_config.json").exists():
        shutil.copyfile(Path(base) / "generation_config.json", Path(out) / "generation_config.json")
    copy_tokenizer(tokenizer, out)
    if with_optimizer:
        folder = Path(out) / "optimizer"
        for kind in MOMENTS:
            (folder / kind).mkdir(parents=True)
            moments = {name: _of_checkpoint(reader, kind, name) for name in reader.shapes}
            checksums |= {f"{kind}/{name}": digest for name, digest in write_shards(folder / kind, moments).items()}
        trained = {key: digest for key, digest in checksums.items() if key.partition("/")[2] in reader.shapes}
        write_json(folder / "state.json", {"version": STATE_VERSION, "trainer": reader.trainer, "xxh3": trained})


def _weights(reader, base, model):
    """{name: (dtype, shape, function that reads it)} of every weight of the model."""
    for name, shape in reader.shapes.items():
        if model.shapes.get(name) != tuple(shape):
            raise InputError(
                f"{reader.folder}: {name} is {list(shape)}, {base or 'its model'} has {list(model.shapes.get(name, ())) or 'none'}: "
                "give --model_name_or_path, the model the run began with"
            )
    names = [name for name in model.every if name not in model.tied]
    stored = stored_tensors(base) if base and set(names) - set(reader.shapes) else {}
    tensors = {}
    for name in names:
        if name in reader.shapes:
            tensors[name] = _of_checkpoint(reader, "weight", name)
        elif name in stored:
            dtype, shape = torch_dtype(stored[name].dtype), stored[name].shape
            if dtype is None or (name in model.shapes and shape != model.shapes[name]):
                raise InputError(f"{base}: {name} is {stored[name].dtype} {list(shape)}, unlike its config.json says")
            tensors[name] = dtype, shape, lambda name=name: read_tensor(stored[name], name)
        else:
            raise InputError(
                f"{reader.folder}: was not trained on {name}, and {base or 'no model'} holds none: give --model_name_or_path"
            )
    return tensors


def _of_checkpoint(reader, kind, name):
    return reader.dtypes[kind, name], reader.shapes[name], lambda: reader.tensor(kind, name)


def _cast(tensor, dtype):
    stored, shape, read = tensor
    return (dtype, shape, lambda: read().to(dtype)) if stored.is_floating_point else tensor


# -- read -------------------------------------------------------------------------------------------------------------


def read_weights(folder, model):
    """TrainingState of the weights in a model folder's safetensors files; tied ones under their first name alone."""
    tensors = stored_tensors(folder)
    unwanted = set(model.every) - set(model.shapes)  # buffers, and other names of tied weights
    stored = {("weight", name): _described(where) for name, where in tensors.items() if name not in unwanted}
    return TrainingState("a Hugging Face folder", stored, lambda _, name: read_tensor(tensors[name], name))


def read_folder(folder, model):
    """TrainingState of a Hugging Face folder, with the moments in its optimizer/ if there is one."""
    weights = read_weights(folder, model)
    path = Path(folder) / "optimizer" / "state.json"
    if not path.parent.exists():
        return weights
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, trainer, checksums, step = state["version"], state["trainer"], state["xxh3"], state["trainer"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not there or damaged: remove optimizer/ to take the weights alone") from None
    if version > STATE_VERSION:
        raise InputError(f"{path}: version {version} is newer than this program's {STATE_VERSION}")
    moments = {(kind, n): where for kind in MOMENTS for n, where in stored_tensors(path.parent / kind).items()}

    def read(kind, name):
        tensor = read_tensor(moments[kind, name], name) if kind in MOMENTS else weights.read(kind, name)
        if checksum(tensor_bytes(tensor.contiguous().view(-1))) != checksums.get(f"{kind}/{name}"):
            raise InputError(
                f"{folder}: {kind} of {name}: its checksum does not match {path}: changed since, or damaged; remove optimizer/ "
                "to take the weights alone"
            )
        return tensor

    return TrainingState(
        format="a Hugging Face folder with its optimizer",
        stored=weights.stored | {key: _described(where) for key, where in moments.items()},
        read=read,
        trained=[name for kind, name in moments if kind == MOMENTS[0]],
        step=step,
        optimizer_steps=trainer.get("optimizer_steps", step),
        trainer={key: value for key, value in trainer.items() if key not in WRITTEN_BY_PUBLISH},
    )


def _described(stored):
    return stored.shape, torch_dtype(stored.dtype) or torch.uint8
