"""AdamW in bfloat16 alone, 8 bytes per parameter: weight, gradient and both moments; what does not fit is rounded by chance.

A step of 1e-4 on a weight of 1.0 is a fortieth of the way to the next bfloat16: rounded to the nearest, the weight never moves.
So what a step makes, in fp32, goes to one of its two neighbours, up with a probability that is the fraction of the way it has
come: right on average, however small the steps (stochastic rounding; for bfloat16 training Zamirai et al. 2020,
arXiv:2010.06192). The moments need it as much: at beta2 = 0.999 a step takes less than half of the last digit off exp_avg_sq.

The chance is a pure function of seed, optimizer step, the parameter's name and the element's index in the whole parameter: that
of torchao's optimizers comes from a running generator, so that a run resumed, or sharded otherwise, would round otherwise from
there on. (They round the moments to the nearest, too; and so does optimi, whose Kahan sum takes 2 bytes more.)

The class of an optimizer is made from torch's: importing this imports torch.
"""

import hashlib
import math

import torch

from dilqur.checkpoint.local_shards import MOMENTS, first_element

# elements at a time, with some 64 bytes each of temporaries: what a core's cache holds, and 0.25 GB of a GPU
CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}
LARGEST = 0x7F7F0000  # the bits of the largest finite bfloat16


class BF16AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2, as torch.optim.AdamW) on bfloat16 parameters.

    params: (name, parameter) pairs, or groups of them, with the names that `model.named_parameters()` has before anything
    wraps the model: it is by them that a parameter has the same noise in every run, however groups are ordered and whatever
    else is trained. Parameters may be plain tensors or DTensors sharded by whole rows, as DDP and FSDP2 have them; a step
    communicates nothing, and replicas stay equal to the bit. seed: an integer; it travels in `state_dict()`, as the rest.
    compiled: one kernel a parameter by torch.compile, for a GPU; its fp32 results may differ from eager ones in the last bit.

    State of a parameter, under torch's names: `step`, a 0-d fp32 tensor on the CPU; `exp_avg` and `exp_avg_sq`, bfloat16 of
    the parameter's shape (and sharding). Raises ValueError for a parameter without a name or of another dtype.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, seed=0, compiled=False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})
        self.compiled = compiled
        self._update = torch.compile(update_, dynamic=True, fullgraph=True) if compiled else update_

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if "param_names" not in self.param_groups[-1]:
            raise ValueError("BF16AdamW takes (name, parameter) pairs, such as model.named_parameters()")
        for name, parameter in _named(self.param_groups[-1]):
            _refuse_other_dtypes(name, parameter)

    @torch.no_grad()
    def step(self, closure=None):
        """One step over every parameter that has a gradient (of any float dtype). Returns what `closure`, if any, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in _named(group):
                if parameter.grad is not None:
                    # again: under mixed precision, accelerate's FSDP2 has made them fp32
                    _refuse_other_dtypes(name, parameter)
                    self._step(group, name, parameter)
        return loss

    def _step(self, group, name, parameter):
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2), rate = int(state["step"]), group["betas"], float(group["lr"])
        numbers = torch.tensor(
            [
                1 - rate * group["weight_decay"],
                beta1,
                1 - beta1,
                beta2,
                1 - beta2,
                rate / (1 - beta1**step),
                math.sqrt(1 - beta2**step),
                group["eps"],
            ],
            dtype=torch.float32,
        )
        key = torch.tensor(noise_key(group["seed"], step, name))
        weight, exp_avg, exp_avg_sq = (_local(t).view(-1) for t in (parameter.detach(), *(state[m] for m in MOMENTS)))
        gradient = _local(parameter.grad).reshape(-1)
        size, before = weight.numel(), _elements_before(parameter)
        chunk = size if self.compiled else CHUNK.get(weight.device.type, size)
        for start in range(0, size, max(1, chunk)):
            part = slice(start, start + chunk)
            self._update(weight[part], gradient[part], exp_avg[part], exp_avg_sq[part], before + start, key, numbers)


def update_(weight, gradient, exp_avg, exp_avg_sq, start, key, numbers):
    """One step on the elements [start, start + n) of a flattened parameter, in place: four 1-D tensors of n elements.

    key: 0-d int64, of this parameter and step. numbers: fp32 (8,), on the CPU, in the order of the first line.
    """
    keep, beta1, new1, beta2, new2, rate, correction, eps = numbers.unbind()
    # one operation at a time: those every processor rounds alike, while `lerp`, `addcmul` and `alpha=` fuse a product with a sum
    # on some (measured between ATEN_CPU_CAPABILITY=default and avx2)
    gradient = gradient.float()
    mean = exp_avg.float() * beta1 + gradient * new1
    square = exp_avg_sq.float() * beta2 + gradient * gradient * new2
    after = weight.float() * keep - mean / (square.sqrt() / correction + eps) * rate
    bits = noise(start, weight.numel(), key, weight.device)
    weight.copy_(stochastic_round(after, bits))
    exp_avg.copy_(stochastic_round(mean, bits >> 16))
    exp_avg_sq.copy_(stochastic_round(square, bits >> 32))


def stochastic_round(x, bits):
    """fp32 `x` as bfloat16, one of its two neighbours: away from zero where its last 16 bits and the last 16 of `bits` (int64,
    of any value) add up to a carry, which for uniform bits has the probability of the fraction between the neighbours.

    What is a bfloat16 stays what it is, infinities and NaN too; a finite value stays finite.
    """
    whole = x.view(torch.int32)
    up = bits.to(torch.int32) & 0xFFFF
    room = (LARGEST - (whole & 0x7FFFFFFF)).clamp(min=0)  # infinities and NaN lie above the largest, and have none
    return ((whole + torch.minimum(up, room)) >> 16).to(torch.int16).view(torch.bfloat16)


def noise(start, n, key, device):
    """int64 (n,): 64 random bits for each of the elements [start, start + n), by the finaliser of splitmix64 (Steele, Lea and
    Flood 2014). key: 0-d int64."""
    # ^ and not +: of a sum that is multiplied, compilers conclude that it cannot overflow, so that their loop ends at once
    x = torch.arange(start, start + n, device=device) ^ key
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def noise_key(seed, step, name):
    """What `noise` is seeded with for a parameter in a step: an int64, as int. The same in every process and release."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest(), "little", signed=True
    )


def _shift(x, count):
    """x >> count of an int64 as if it were unsigned."""
    return x >> count & (1 << 64 - count) - 1


def _signed(x):
    return x - (1 << 64) if x >> 63 else x


def _named(group):
    # by number: accelerate's FSDP2 puts sharded parameters into the places of the old ones
    return zip(group["param_names"], group["params"], strict=True)


def _refuse_other_dtypes(name, parameter):
    if parameter.dtype is not torch.bfloat16:
        raise ValueError(f"BF16AdamW: {name} is {parameter.dtype}, not torch.bfloat16")


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _elements_before(parameter):
    """How many elements of the whole flattened parameter lie before those of this rank."""
    return first_element(parameter) if hasattr(parameter, "to_local") else 0
