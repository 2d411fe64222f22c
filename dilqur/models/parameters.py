"""A model's parameters by name and shape; from its config alone, too: built on the meta device, without a byte for weights."""

from dataclasses import dataclass

from dilqur.common.errors import InputError


@dataclass(frozen=True)
class ModelParameters:
    """shapes: {name: shape}, in the order of `model.named_parameters()`, a tied weight once, under its first name. tied:
    {other name: first name}. every: all names of the model's state dict, tied ones and buffers too."""

    shapes: dict
    tied: dict
    every: tuple

    def first_name(self, name):
        return self.tied.get(name, name)


def model_parameters(config, where):
    """ModelParameters of a transformers config. where: what an InputError begins with if transformers cannot build it."""
    import torch
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            model = named(config) if named else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as problem:
        raise InputError(f"{where}: transformers cannot build this model ({str(problem).splitlines()[0]})") from None
    return parameters_of(model)


def parameters_of(model):
    """ModelParameters of a model that is not sharded yet."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name: first[id(p)] for name, p in every if first[id(p)] != name}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return ModelParameters(shapes, tied, tuple(model.state_dict()))
