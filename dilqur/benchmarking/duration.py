"""How long a benchmark will take, guessed before its first run: for each run a start, and its steps at the planner's rate."""

from dilqur.estimate.hardware import GPUS

START_S = {"gpu": 40.0, "cpu": 8.0}  # a guess: imports, weights onto the device, the loader's first batch
COMPILE_S = {"gpu": 60.0, "cpu": 15.0}  # a guess: once a variant, later runs find it in a cache
PARAMETERS_S = 2e7  # a guess: random weights that are made and written a second
BATCHES = 8  # tries of a search for the largest batch
OTHER_GPU = 1e14  # operations a second of a GPU that the planner does not know, and of a process on CPUs: guesses
CPU = 2e10


def rate_of(gpu):
    """Floating-point operations a second of a GPU by the driver's name for it, None: of a process on CPUs. Of those the planner knows,
    the share of the peak that a published run reached."""
    if gpu is None:
        return CPU
    known = (one for name, one in GPUS.items() if name.partition("-")[0] in gpu)
    return next((one.efficiency * one.peak for one in known), OTHER_GPU)


def run_seconds(job, steps, num_processes, gpu):
    """Of one run. job: dilqur.estimate.job.Job, None of a model whose sizes are not known: its start alone."""
    start = START_S["gpu" if gpu else "cpu"] * (1.0 if gpu else num_processes)
    if job is None:
        return start
    return start + steps * job.tokens / num_processes * job.computed_flops_per_token() / rate_of(gpu)


def variant_seconds(job, runs, num_processes, gpu, tries=0):
    """Of all runs of a variant. runs: steps of each. tries: of the largest batch, of which each is little more than a start."""
    if not runs and not tries:
        return 0.0
    compiled = COMPILE_S["gpu" if gpu else "cpu"] if job is not None and job.compiled else 0.0
    return compiled + sum(run_seconds(job, steps, num_processes, gpu) for steps in [*runs, *[0] * tries])
