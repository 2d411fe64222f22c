"""AdamW in bfloat16 alone: rounded right on average, never stalling, in 8 bytes, and the same bits however a run is cut up."""

import math
import os
import socket

import pytest
import torch
from conftest import CORPUS
from torch import nn

from dilqur.checkpoint.format import CheckpointReader
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.checkpoint.writer import CheckpointWriter, load_checkpoint
from dilqur.training import bf16_adamw
from dilqur.training.bf16_adamw import BF16AdamW, noise, noise_key, stochastic_round, update_

SIGMAS = 5  # standard errors allowed to a mean: chance alone passes this once in two million times, and seeds are fixed


def as_float(bits):
    """fp32 of the given bits, from a list or a tensor of integers up to 2³²."""
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits(tensor):
    return tensor.detach().view(torch.int16)


def repeat(optimizer, parameter, gradient, steps):
    """`steps` steps of a parameter by the same gradient."""
    for _ in range(steps):
        parameter.grad = gradient.clone()
        optimizer.step()


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_a_value_goes_up_in_as_many_of_all_cases_as_its_fraction_says():
    every_noise = torch.arange(1 << 16)
    for value in (1.0, -1.0, 1e-4, -3e38, 1e-39, 65504.0):  # 1e-39 is denormal; -3e38 near the end of the range
        low = int(torch.tensor(value).view(torch.int32)) & 0xFFFF0000
        for fraction in (0, 1, 0x4000, 0x8000, 0xFFFF):  # of 65,536 parts of the way to the next bfloat16
            rounded = stochastic_round(as_float(low + fraction).expand(1 << 16).contiguous(), every_noise)
            down, up = as_float([low, low + 0x10000]).bfloat16()
            assert int((rounded == up).sum()) == fraction
            assert int((rounded == down).sum()) == (1 << 16) - fraction


@pytest.mark.parametrize("noise", [0, 0x7FFF, 0xFFFF, -1])
def test_what_is_a_bfloat16_stays_what_it_is(noise):
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    out = stochastic_round(every.float(), torch.tensor(noise).expand(1 << 16))
    number = ~every.isnan()  # -0.0, denormals and both infinities are among them
    assert torch.equal(bits(out)[number], bits(every)[number])
    assert bool(out[~number].isnan().all())


@pytest.mark.parametrize("noise", [0, 0xFFFF])
def test_the_largest_do_not_become_infinite_and_no_nan_becomes_a_number(noise):
    beyond = as_float([0x7F7FFFFF, 0xFF7FFFFF])  # of fp32, above the largest bfloat16
    out = stochastic_round(beyond, torch.tensor([noise, noise]))
    assert out.tolist() == [torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]
    not_numbers = as_float([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000])  # CUDA's, its negative, and those of x86
    assert bool(stochastic_round(not_numbers, torch.tensor([noise] * 4)).isnan().all())


# -- the noise --------------------------------------------------------------------------------------------------------


def test_the_noise_is_what_it_was_when_runs_began():
    # were these to change, a run resumed after an update would round otherwise than before
    assert noise_key(42, 7, "model.norm.weight") == -3705203491042007046
    key, start = noise_key(42, 7, "model.norm.weight"), 2**33 + 5  # an element beyond 32 bits
    got = [n % 2**64 for n in noise(start, 3, torch.tensor(key), "cpu").tolist()]
    for element, value in enumerate(got, start):
        x = element ^ key % 2**64  # splitmix64's finaliser in Python's integers
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        assert value == x ^ x >> 31


def test_the_noise_of_weight_and_moments_is_even_and_nothing_in_it_repeats():
    n = 1 << 20
    streams = {
        (seed, step, name, field): (noise(0, n, torch.tensor(noise_key(seed, step, name)), "cpu") >> shift & 0xFFFF)
        for seed, step, name in [(0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "b")]
        for field, shift in (("weight", 0), ("exp_avg", 16), ("exp_avg_sq", 32))
    }
    scores = []  # each of about standard deviation 1 where the noise is what it should be
    for values in streams.values():
        counts = torch.bincount(values, minlength=1 << 16).double()
        mean = n / (1 << 16)
        scores.append((((counts - mean) ** 2).sum() / mean - 65535) / math.sqrt(2 * 65535))  # chi-square
        x = (values.double() - 32767.5) / 18918.6  # mean and standard deviation of 0 … 65,535
        scores.append(x.mean() * math.sqrt(n))
        scores += [(x[lag:] * x[:-lag]).mean() * math.sqrt(n) for lag in (1, 2, 8, 64, 4096)]
    whole = torch.stack([v.double() - 32767.5 for v in streams.values()])
    scores += (torch.corrcoef(whole).triu(1) * math.sqrt(n))[torch.ones(12, 12).triu(1) > 0].tolist()
    assert len(scores) == 12 * 7 + 66
    assert max(map(abs, scores)) < SIGMAS


def test_weight_and_moments_of_an_element_are_rounded_independently():
    n = 1 << 16
    weight = nn.Parameter(torch.ones(n).bfloat16())
    optimizer = BF16AdamW([("w", weight)])
    repeat(optimizer, weight, torch.ones(n).bfloat16(), 1)  # 0.999, 0.1 and 0.001: each between two bfloat16
    rounded = torch.stack([weight.detach(), *(optimizer.state[weight][m] for m in MOMENTS)]).double()
    together = torch.corrcoef(rounded)[[0, 0, 1], [1, 2, 2]]
    assert together.abs().max().item() < SIGMAS / math.sqrt(n)


# -- it is AdamW ------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_torch_to_the_next_bfloat16():
    torch.manual_seed(0)
    n, settings = 10_000, {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    values = [torch.randn(n).bfloat16() for _ in range(3)] + [torch.rand(n).bfloat16()]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, gradient, exp_avg, exp_avg_sq = (v.to(dtype, copy=True) for v in values)
        weight = nn.Parameter(weight)
        weight.grad = gradient
        named = dtype is torch.bfloat16
        optimizer = BF16AdamW([("w", weight)], **settings) if named else torch.optim.AdamW([weight], **settings)
        optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        optimizer.step()
        results.append({"weight": weight.detach(), **optimizer.state[weight]})
    exact, ours = results
    assert ours["step"] == exact["step"] == 4
    for key in ("weight", *MOMENTS):
        apart = (ours[key].float() - exact[key]).abs()
        ulp = torch.maximum(exact[key].abs(), ours[key].float().abs()) * 2**-7  # at most, between neighbours
        # 1e-6: fp32 rounds what torch writes in another order, at values of about 1
        assert bool((apart <= ulp + 1e-6).all()), key
        assert bool((apart > 0).any()), key


def test_matrices_decay_and_vectors_do_not_as_their_groups_say():
    weights = {name: nn.Parameter(torch.ones(4096).bfloat16()) for name in ("matrix", "vector")}
    groups = [
        {"params": [("matrix", weights["matrix"])], "weight_decay": 0.1},
        {"params": [("vector", weights["vector"])], "weight_decay": 0.0},
    ]
    optimizer = BF16AdamW(groups, lr=1e-1)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert bool((weights["vector"] == 1).all())
    decayed = weights["matrix"].float()  # to 0.99, between 0.98828125 and 0.9921875
    assert decayed.mean().item() == pytest.approx(0.99, abs=SIGMAS * decayed.std().item() / 64)


# -- it does not stall ------------------------------------------------------------------------------------------------


def test_small_steps_add_up_where_rounding_to_the_nearest_stands_still():
    n, steps, rate = 1 << 14, 100, 1e-4
    moved = {}
    for kind in ("ours", "nearest", "fp32"):
        weight = nn.Parameter(torch.ones(n, dtype=torch.float32 if kind == "fp32" else torch.bfloat16))
        flags = {"lr": rate, "weight_decay": 0.0}
        optimizer = BF16AdamW([("w", weight)], **flags) if kind == "ours" else torch.optim.AdamW([weight], **flags)
        repeat(optimizer, weight, torch.ones_like(weight), steps)
        moved[kind] = weight.detach().float()
    assert moved["fp32"].mean().item() == pytest.approx(1 - steps * rate, rel=1e-5)
    assert bool((moved["nearest"] == 1).all())
    error = moved["ours"].std().item() / math.sqrt(n)  # of the mean
    assert error < 0.01 * steps * rate  # so the next line can tell
    assert moved["ours"].mean().item() == pytest.approx(moved["fp32"].mean().item(), abs=SIGMAS * error)


def test_the_second_moment_forgets_a_burst_as_in_fp32():
    n, steps = 1 << 12, 300
    left = {}
    for kind in ("ours", "nearest"):
        weight = nn.Parameter(torch.ones(n).bfloat16())
        optimizer = BF16AdamW([("w", weight)]) if kind == "ours" else torch.optim.AdamW([weight])
        moments = {"exp_avg": torch.zeros(n).bfloat16(), "exp_avg_sq": torch.ones(n).bfloat16()}
        optimizer.state[weight] = {"step": torch.tensor(1000.0), **moments}
        repeat(optimizer, weight, torch.zeros_like(weight), steps)
        left[kind] = moments["exp_avg_sq"].float()
    assert bool((left["nearest"] == 1).all())  # 0.999 of it rounds to it
    error = left["ours"].std().item() / math.sqrt(n)
    assert error < 0.005
    assert left["ours"].mean().item() == pytest.approx(0.999**steps, abs=SIGMAS * error)


# -- it learns --------------------------------------------------------------------------------------------------------


def loss_after_training(optimizer_of, dtype):
    """Cross-entropy, nats per byte, of a small network that guesses the next byte of a text from four; ln 256 = 5.545 untrained."""
    text = b"".join(path.read_bytes() for path in sorted((CORPUS / "az").iterdir()))
    text, steps, rate = torch.tensor(list(text)), 300, 3e-4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 256)).to(
        dtype
    )
    optimizer = optimizer_of(model)

    def loss(seed, size):
        at = torch.randint(len(text) - 5, (size, 1), generator=torch.Generator().manual_seed(seed))
        window = text[at + torch.arange(5)]
        return nn.functional.cross_entropy(model(window[:, :4]).float(), window[:, 4])

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        loss(1 + step, 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return loss(0, 8192).item()


def test_a_model_learns_as_with_fp32_and_far_better_than_rounded_to_the_nearest():
    fp32 = loss_after_training(lambda model: torch.optim.AdamW(model.parameters()), torch.float32)
    ours = [
        loss_after_training(lambda model, seed=seed: BF16AdamW(model.named_parameters(), seed=seed), torch.bfloat16)
        for seed in range(2)
    ]
    nearest = loss_after_training(lambda model: torch.optim.AdamW(model.parameters()), torch.bfloat16)
    assert fp32 < 4.5  # measured: 4.298
    # 0.01: six times what was measured (4.297 for both), a sixtieth of what rounding to the nearest loses (4.969)
    assert ours == pytest.approx([fp32] * 2, abs=0.01)
    assert nearest > fp32 + 0.3


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_parameter_takes_eight_bytes():
    model = nn.Linear(256, 512).bfloat16()
    optimizer = BF16AdamW(model.named_parameters())
    model(torch.ones(1, 256).bfloat16()).sum().backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    assert sum(t.nbytes for t in held) == 8 * sum(p.numel() for p in model.parameters())
    assert all(state["step"].nbytes == 4 for state in optimizer.state.values())  # and 4 for a whole tensor


# -- the same bits, however a run is cut up ---------------------------------------------------------------------------

SHAPES = {
    "wide.weight": (7, 33),
    "row.weight": (1, 40),
    "norm.weight": (5,),
    "norm.bias": (5,),
}  # no row of `row` for a rank


class Shapes(nn.Module):
    """Parameters of SHAPES in bfloat16, no forward."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            module, leaf = name.split(".")
            if not hasattr(self, module):
                self.add_module(module, nn.Module())
            value = torch.randn(shape, generator=generator).bfloat16()
            self.get_submodule(module).register_parameter(leaf, nn.Parameter(value))


def gradient_of(name, step):
    """bfloat16 of the parameter's whole shape."""
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator).bfloat16()


def take_steps(model, optimizer, steps):
    """Steps by `gradient_of`, whatever the parameters are sharded over."""
    for step in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(name, step)
            if hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                parameter.grad = distribute_tensor(parameter.grad, parameter.device_mesh, parameter.placements)
        optimizer.step()


def everything(model, optimizer):
    """{what: int16 bits} of the weights and moments."""
    state = {name: {"weight": p, **{m: optimizer.state[p][m] for m in MOMENTS}} for name, p in model.named_parameters()}
    return {(name, kind): bits(t).tolist() for name, kinds in state.items() for kind, t in kinds.items()}


@pytest.fixture(scope="module")
def uninterrupted():
    """What six steps leave."""
    model = Shapes()
    optimizer = BF16AdamW(model.named_parameters(), lr=1e-2, seed=3)
    take_steps(model, optimizer, range(6))
    return everything(model, optimizer)


def test_a_run_saved_and_loaded_in_the_middle_gives_the_bits_of_one_that_was_not(tmp_path, uninterrupted):
    model = Shapes()
    optimizer = BF16AdamW(model.named_parameters(), lr=1e-2, seed=3)
    take_steps(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)

    model = Shapes()
    model.load_state_dict(saved["model"])
    optimizer = BF16AdamW(model.named_parameters())  # rate and seed are in the state
    optimizer.load_state_dict(saved["optimizer"])
    take_steps(model, optimizer, range(3, 6))
    assert everything(model, optimizer) == uninterrupted


def test_neither_the_order_of_parameters_nor_what_else_is_trained_matters_but_the_seed_does(uninterrupted):
    def run(seed, names):
        model = Shapes()
        parameters = dict(model.named_parameters())
        optimizer = BF16AdamW([{"params": [(name, parameters[name])]} for name in names], lr=1e-2, seed=seed)
        take_steps(model, optimizer, range(6))
        return bits(parameters["wide.weight"]).tolist()

    assert run(3, reversed(SHAPES)) == run(3, ["wide.weight"]) == uninterrupted["wide.weight", "weight"]
    assert run(4, SHAPES) != uninterrupted["wide.weight", "weight"]


def stepped(values, start, stop, offset):
    """Weight and moments after `update_` on the elements [start, stop) of 1-D `values`, which it takes for those from `offset` on."""
    weight, gradient, *moments = (v[start:stop].clone() for v in values)
    numbers = torch.tensor([0.999, 0.9, 0.1, 0.999, 0.001, 1e-2, 0.1, 1e-8])
    update_(weight, gradient, *moments, offset, torch.tensor(noise_key(0, 1, "w")), numbers)
    return torch.stack([bits(t) for t in (weight, *moments)])


@pytest.mark.parametrize("rows", [1, 3, 64, 100])
def test_two_slices_of_rows_step_to_the_bits_of_the_whole(rows):
    torch.manual_seed(0)
    size, cut = 101 * 37, rows * 37  # 37: where a processor's vectors do not end
    values = [*torch.randn(3, size).bfloat16(), torch.rand(size).bfloat16()]
    whole, head = stepped(values, 0, size, 0), stepped(values, 0, cut, 0)
    assert torch.equal(torch.cat([head, stepped(values, cut, size, cut)], 1), whole)
    assert not torch.equal(torch.cat([head, stepped(values, cut, size, 0)], 1), whole)  # the offset is what does it


def test_how_much_is_done_at_a_time_does_not_matter(monkeypatch, uninterrupted):
    monkeypatch.setitem(bf16_adamw.CHUNK, "cpu", 50)
    model = Shapes()
    optimizer = BF16AdamW(model.named_parameters(), lr=1e-2, seed=3)
    take_steps(model, optimizer, range(6))
    assert everything(model, optimizer) == uninterrupted


def on_two_processes(rank, port, folder):
    """Three steps under accelerate's FSDP2, and a checkpoint of them in `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    from dilqur.training.distributed import make_accelerator, strategy

    accelerator = make_accelerator(bf16=False, batch=1, accumulation=1, max_grad_norm=None)
    assert strategy(accelerator) == "fsdp2"
    model = Shapes()
    optimizer = BF16AdamW(model.named_parameters(), lr=1e-2, seed=3)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(p.to_local().numel() < math.prod(SHAPES[n]) or rank == 0 for n, p in model.named_parameters())
    take_steps(model, optimizer, range(3))
    writer = CheckpointWriter(folder, accelerator)
    writer.save(model, optimizer, 3, {})
    writer.wait()
    torch.distributed.destroy_process_group()


def test_a_run_begun_under_fsdp2_on_two_processes_and_ended_on_one_gives_the_bits_of_one_process(
    tmp_path, uninterrupted
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_two_processes, (port, tmp_path), nprocs=2)
    model = Shapes()
    optimizer = BF16AdamW(model.named_parameters(), lr=1e-2, seed=3)
    load_checkpoint(CheckpointReader(tmp_path / "step-0000003"), model, optimizer)
    take_steps(model, optimizer, range(3, 6))
    assert everything(model, optimizer) == uninterrupted


# -- compiled ---------------------------------------------------------------------------------------------------------


def test_compiled_it_steps_to_the_same_bfloat16_but_where_fp32_itself_was_rounded_otherwise():
    torch.manual_seed(0)
    value, gradient = torch.randn(2, 100_003).bfloat16()
    results = []
    for compiled in (False, True):
        weight = nn.Parameter(value.clone())
        optimizer = BF16AdamW([("w", weight)], lr=1e-2, compiled=compiled)
        repeat(optimizer, weight, gradient, 3)
        results.append([bits(weight), *(bits(optimizer.state[weight][m]) for m in MOMENTS)])
    for eager, fused in zip(*results, strict=True):
        # a last bit of fp32 decides in 1 of 65,536 roundings; other noise would differ in a third of them and more
        assert (eager != fused).float().mean().item() < 1e-3


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_parameters_without_names_and_of_other_dtypes_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.named_parameters"):
        BF16AdamW(model.bfloat16().parameters())
    with pytest.raises(ValueError, match=r"weight is torch\.float32, not torch\.bfloat16"):
        BF16AdamW(model.float().named_parameters())


def test_weights_that_became_fp32_after_the_optimizer_was_made_are_refused():
    model = nn.Linear(2, 2).bfloat16()
    optimizer = BF16AdamW(model.named_parameters())
    model.float()(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"weight is torch\.float32, not torch\.bfloat16"):
        optimizer.step()
