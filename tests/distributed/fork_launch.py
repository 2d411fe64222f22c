"""Starts many runs of scripts/cpt.py quickly, for campaigns of hundreds: torch and the rest are imported once, and forked.

A process of `accelerate launch` spends ten seconds on imports before its first step. Here it is asked once for each strategy and
number of processes what environment it would give its workers; after that each worker is a fork of this process, which must have
no threads: a program of its own, not a test runner. What runs in the workers is the same as ever: the program's `main`, the
process group, FSDP2, DeepSpeed. That real launches work is what tests/distributed/test_strategies.py shows.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
DUMP = "import json, os, sys; os.environ['RANK'] == '0' and json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


def import_everything():
    """What a run imports; once, before the first fork."""
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    import accelerate  # noqa: F401
    import torch.distributed.fsdp
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch.distributed.tensor import DTensor  # noqa: F401

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import cpt  # noqa: F401
    import deepspeed  # noqa: F401

    import dilqur.checkpoint
    import dilqur.loop
    import dilqur.model_folder  # noqa: F401


@functools.cache
def workers_environment(strategy, world):
    """What `accelerate launch` gives the workers of `strategy` (the name of an accelerate config, or "single")."""
    if strategy == "single":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        (script := Path(folder) / "dump.py").write_text(DUMP)
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            str(world),
            "--num_machines",
            "1",
        ]
        config = ["--config_file", str(ROOT / "accelerate_configs" / f"{strategy}.yaml"), "--main_process_port", "0"]
        done = subprocess.run(
            [*launcher, *config, str(script), f"{folder}/environment.json"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = json.loads((Path(folder) / "environment.json").read_text())
    changed = {k: v for k, v in found.items() if os.environ.get(k) != v}
    # the launcher's own store and agent are not there
    return {k: v for k, v in changed.items() if not k.startswith(("TORCHELASTIC", "TORCH_NCCL", "PWD", "MASTER"))}


class Run:
    """`world` forked workers of one run of cpt.py with `flags`; their output goes to the file `log`."""

    def __init__(self, strategy, world, flags, log, **environment):
        environment = {**workers_environment(strategy, world), **environment, "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(free.getsockname()[1])
        self.log, self.codes = Path(log), {}
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.pids = [self._fork(rank, world, flags, output, environment) for rank in range(world)]
        os.close(output)

    def _fork(self, rank, world, flags, output, environment):
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(environment)
            if environment.get("WORLD_SIZE"):  # not "single"
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = [str(ROOT / "scripts" / "cpt.py"), *map(str, flags)]
            import cpt

            cpt.main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        """Exit code once all have ended, None before; as a launcher does, ends the others when one has failed."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.kill()
        return None if len(self.codes) < len(self.pids) else next((c for c in self.codes.values() if c), 0)

    def wait(self, seconds=600):
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{seconds} s: {self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        return code

    def kill(self):
        """SIGKILL for all at once."""
        for pid in self.pids:
            if pid not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            if pid not in self.codes:
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(strategy, world, flags, log, **environment):
    """One run to its end; AssertionError with the log unless it ends with 0."""
    code = Run(strategy, world, flags, log, **environment).wait()
    assert code == 0, f"exit code {code}\n{Path(log).read_text()[-5000:]}"
