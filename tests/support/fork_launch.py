"""Starts programs and training runs quickly, for tests and campaigns of hundreds: torch and the rest are imported once, and forked.

A process of `accelerate launch` spends ten seconds of a core on imports before its first step, a program that trains five, one that
reads text one. Here accelerate is asked what environment it would give its workers, and each worker is a fork of this process, which
must have no threads: a program of its own, not a test runner (`Server` starts one). What runs in the workers is the same as ever: the
program, the process group, FSDP2, DeepSpeed. That real launches work is what tests/distributed/test_strategies.py shows.
"""

import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPT = ROOT / "scripts" / "cpt.py"
# what a tenth of a second or more of a run goes into
FOR_THE_FORKS = (
    "deepspeed", "matplotlib.pyplot", "peft", "py3langid.langid", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.nn.attention.varlen", "transformers.models.llama.modeling_llama", "trl.import_utils",
)  # fmt: skip


def import_everything():
    """What a run imports, and the tables over all characters that cleaning makes; once, before the first fork."""
    sys.path.insert(1, str(ROOT))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # another ninja, of another version, would have DeepSpeed compile its extension again
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for name in FOR_THE_FORKS:
        importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("triton_interpreter").install()

    from dilqur.cleaning.near_duplicates import signatures
    from dilqur.cleaning.word_hashes import word_hashes

    signatures(["a"])
    for folded in (True, False):
        word_hashes("a", folded)


@functools.cache
def workers_environment(strategy, world):
    """What `accelerate launch` gives the workers of `strategy` (the name of an accelerate config, or "single")."""
    if strategy == "single":
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    config = ["--config_file", str(ROOT / "accelerate_configs" / f"{strategy}.yaml"), "--num_processes", str(world)]
    if strategy == "hsdp":
        config += ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", str(world // 2)]
    words = [*config, "--num_machines", "1", "--main_process_port", "0", str(CPT)]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    deepspeed = arguments.use_deepspeed
    environment = prepare_deepspeed_cmd_env(arguments)[1] if deepspeed else prepare_multi_gpu_env(arguments)
    # PYTHONPATH: accelerate gives DeepSpeed's workers this process's sys.path, which a fork has anyway
    changed = {k: v for k, v in environment.items() if os.environ.get(k) != v and k != "PYTHONPATH"}
    return {**changed, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}


class Run:
    """`world` forked workers of one run of `program` with `flags`, in the folder `cwd`, if given; their output goes to the file `log`, and
    what they say on standard error to `errors`, if given. A variable that is None is not set; PYTHONPATH is where another dilqur is."""

    def __init__(self, strategy, world, flags, log, program=CPT, errors=None, cwd=None, **environment):
        environment = {**workers_environment(strategy, world), **environment}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(free.getsockname()[1])
        self.log, self.codes = Path(log), {}
        files = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in (log, errors) if file]
        self.pids = [self._fork(rank, program, flags, files, cwd, environment) for rank in range(world)]
        for file in files:
            os.close(file)

    def _fork(self, rank, program, flags, files, cwd, environment):
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(files[0], 1)
            os.dup2(files[-1], 2)
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            if "WORLD_SIZE" in environment:  # not "single"
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.modules["torch"].set_num_threads(
                1
            )  # torch's pool anew, before several threads at once would each begin one
            sys.argv = [str(program), *map(str, flags)]
            sys.path[0] = str(Path(program).parent)  # as python has it; here it was this file's folder
            if "PYTHONPATH" in environment:
                sys.path.insert(1, environment["PYTHONPATH"])
                for name in [name for name in sys.modules if name.partition(".")[0] == "dilqur"]:
                    del sys.modules[name]
            if cwd:
                os.chdir(cwd)
            runpy.run_path(str(program), run_name="__main__")
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                threading._shutdown()  # as an interpreter waits at its end; its exit handlers are the parent's, and not run here
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


def run(strategy, world, flags, log, **more):
    """One run to its end; AssertionError with the log unless it ends with 0."""
    code = Run(strategy, world, flags, log, **more).wait()
    assert code == 0, f"exit code {code}\n{Path(log).read_text()[-5000:]}"


# -- for a test runner ------------------------------------------------------------------------------------------------


class Server:
    """This file as a process of its own, which forks the runs that a test asks for. A context manager. variables: of its environment,
    from the start: TRITON_INTERPRET=1 has Triton's kernels run in its interpreter."""

    def __init__(self, **variables):
        self.variables = variables

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.variables}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *exception):
        # said, not only closed: whatever the test runner has forked since holds the pipe open
        self.process.stdin.write(json.dumps(["stop", [], {}]) + "\n")
        self.process.stdin.close()
        self.process.wait(60)

    def ask(self, what, *arguments, **named):
        self.process.stdin.write(json.dumps([what, arguments, named]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["value"]

    @contextlib.contextmanager
    def launch(self, strategy, flags, log, processes=2, program=CPT, **environment):
        """A run, as an object with `poll`, `wait`, `kill` and `pids`; it is gone at the end, whatever happens."""
        words = (strategy, processes, [*map(str, flags)], str(log))
        started = _Started(self, self.ask("start", *words, program=str(program), **environment))
        try:
            yield started
        finally:
            started.kill()

    def run(self, program, flags, **environment):
        """Run a program to its end, in one process, as a CompletedProcess."""
        with tempfile.TemporaryDirectory() as folder:
            log, errors = f"{folder}/stdout", f"{folder}/stderr"
            words = ("single", 1, [*map(str, flags)], log)
            started = _Started(self, self.ask("start", *words, program=str(program), errors=errors, **environment))
            try:
                code = started.wait(600)
            finally:
                started.kill()
            out, said = (Path(file).read_text(encoding="utf-8") for file in (log, errors))
        return subprocess.CompletedProcess([str(program), *map(str, flags)], code, out, said)


class _Started:
    def __init__(self, server, pids):
        self.server, self.pids = server, pids

    def poll(self):
        return self.server.ask("poll", self.pids[0])

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"still running after {seconds} s"
            time.sleep(0.02)
        return code

    def kill(self):
        self.server.ask("kill", self.pids[0])


def serve():
    """One JSON request a line on standard input, one answer a line on standard output."""
    import_everything()
    runs = {}
    for line in sys.stdin:
        what, arguments, named = json.loads(line)
        if what == "stop":
            break
        try:
            if what == "start":
                started = Run(*arguments, **named)
                runs[started.pids[0]] = started
                value = started.pids
            else:
                value = getattr(runs[arguments[0]], what)()
            answer = {"value": value}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    for started in runs.values():
        started.kill()


if __name__ == "__main__":
    serve()
