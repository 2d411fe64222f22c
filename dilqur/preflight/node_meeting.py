"""The nodes of a job meet: at the address and port that training will use, each within a time, or in one line why not.

What they tell each other goes through torch's TCPStore at node 0; it needs no NCCL and no process group, so that what is wrong with
those can still be said.
"""

import contextlib
import json
import re
import secrets
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from dilqur.common.errors import EveryRankError, InputError

# a new name is looked up at the server, whatever attributes an NFS client has cached: what takes longer is not shared
SHARED_S = 10
NETWORK = "is the node up, is a firewall between them, does the name lead to the right network?"


class Rendezvous:
    """`rank` of `machines`, names of the nodes; `port` at the first. timeout: seconds that anybody waits for anybody."""

    def __init__(self, rank, machines, address, port, timeout):
        from torch.distributed import TCPStore

        self.rank, self.machines, self.timeout = rank, machines, timeout
        if rank == 0:
            refuse_port_in_use(port, machines[0])
        else:
            reach(address, port, timeout)
        try:
            # in a thread: in this one no signal would be heard until it is over
            limit = timedelta(seconds=timeout)
            made = ThreadPoolExecutor(1).submit(TCPStore, address, port, None, rank == 0, limit, wait_for_workers=False)
            self.store = made.result()
        except Exception as problem:  # torch has many classes for it
            raise InputError(
                f"{socket.gethostname()}: what answers at {address}:{port} is not this program's first node ({first_line(problem)}): "
                "another program has the port"
            ) from None

    def gather(self, what, value):
        """The JSON value of every node, in the order of their ranks. Raises EveryRankError naming those that do not come in time."""
        keys = [f"{what}/{rank}" for rank in range(len(self.machines))]
        self.store.set(keys[self.rank], json.dumps(value))
        return self.collect(keys, lambda missing: f"{', '.join(self.machines[i] for i in missing)}: not heard of")

    def collect(self, keys, say):
        """The JSON values of these keys. say: function of the indices of those that are missing when the time is up, which all nodes
        find alike: an EveryRankError."""
        from torch.distributed import DistError

        try:
            self.store.wait(keys, timedelta(seconds=self.timeout))
            return [json.loads(value) for value in self.store.multi_get(keys)]
        except (DistError, RuntimeError):
            try:
                missing = [i for i, key in enumerate(keys) if not self.store.check([key])]
            except (DistError, RuntimeError):
                raise EveryRankError(
                    f"the first node, {self.machines[0]}, has gone: what it said last is why"
                ) from None
            raise EveryRankError(
                f"{say(missing)} in {self.timeout} s, at {keys[0].partition('/')[0]}: {NETWORK}"
            ) from None

    def leave(self):
        """The first node goes last: the store is its."""
        self.store.set(f"left/{self.rank}", "1")
        if self.rank == 0:
            left = [f"left/{rank}" for rank in range(len(self.machines))]
            self.collect(left, lambda missing: f"{', '.join(self.machines[i] for i in missing)}: has not ended")

    # -- the network ----------------------------------------------------------------------------------------------------

    def unreachable(self, wait=5):
        """Of each node, the names of those it cannot open a connection to in `wait` seconds: training opens one from each to each."""
        with listen(0) as door, ThreadPoolExecutor(32) as pool:
            ports = self.gather("door", door.getsockname()[1])
            others = [
                (name, port)
                for name, port in zip(self.machines, ports, strict=True)
                if name != self.machines[self.rank]
            ]
            answers = pool.map(lambda to: answers_at(*to, wait), others)
            return self.gather(
                "unreachable", [name for (name, _), answered in zip(others, answers, strict=True) if not answered]
            )

    # -- clocks and folders ---------------------------------------------------------------------------------------------

    def clock_offsets(self, rounds=5):
        """Seconds by which each node's clock is ahead of their median: the least of a few rounds, since leaving a barrier late looks
        like a clock that is ahead."""
        best = [float("inf")] * len(self.machines)
        for number in range(rounds):
            self.gather(f"tick {number}", None)
            times = self.gather(f"time {number}", time.time())
            middle = sorted(times)[len(times) // 2]
            best = [min(old, now - middle, key=abs) for old, now in zip(best, times, strict=True)]
        return best

    def write_and_look(self, what, folder, wait):
        """Every node writes a file of its own into `folder`, and looks for the first node's and its neighbour's for `wait` seconds.

        Returns {"problem": why a node could not write, or None; "seen": {node: seconds until it was there, None: never}; "ahead":
        seconds by which the file's time is ahead of the node's clock} of each node. Leaves nothing behind.
        """
        word = self.gather(f"{what} word", secrets.token_hex(4))[0]
        own, result = folder / f".check-nodes-{word}-{self.rank}", {"problem": None, "seen": {}, "ahead": 0.0}
        try:
            try:
                own.write_text(self.machines[self.rank])
                result["ahead"] = own.stat().st_mtime - time.time()
            except OSError as problem:
                result["problem"] = problem.strerror.lower()
            written = self.gather(f"{what} written", result["problem"] is None)
            others = {0, (self.rank + 1) % len(self.machines)} - {self.rank}
            files = {
                r: own.with_name(f".check-nodes-{word}-{r}") for r in others if written[r] and not result["problem"]
            }
            result["seen"] = {self.machines[r]: s for r, s in seconds_until_there(files, wait).items()}
            return self.gather(f"{what} seen", result)
        finally:
            with contextlib.suppress(OSError):
                own.unlink()


def listen(port):
    """A socket that listens at `port` of every address of this machine; 0: at a free one."""
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=512
    )


def refuse_port_in_use(port, machine):
    """Raise InputError if something listens at `port` of this machine, the first node."""
    try:
        listen(port).close()
    except OSError:
        raise InputError(
            f"port {port} of {machine} {owner_of(port)}, and training would wait there for ever: end that program, or set "
            "DILQUR_PORT to another"
        ) from None


def owner_of(port):
    """Whose it is, as far as `ss` may tell."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(["ss", "-Hltnp", f"sport = :{port}"], capture_output=True, text=True, timeout=5).stdout
        if owner := re.search(r'"([^"]*)",pid=(\d+)', said):
            return f"is in use by {owner[1]} (pid {owner[2]})"
    return "is in use"


def answers_at(name, port, wait):
    """Does one of the addresses of a name answer, in `wait` seconds for all of them?"""
    with contextlib.suppress(OSError):
        addresses = {entry[4] for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)}
        for address in addresses:
            with contextlib.suppress(OSError), socket.create_connection(address[:2], wait / len(addresses)):
                return True
    return False


def reach(address, port, timeout):
    """Wait until the first node answers. Raises InputError with the last thing that the network said."""
    here, end, said = socket.gethostname(), time.monotonic() + timeout, "no answer"
    while time.monotonic() < end:
        try:
            socket.create_connection((address, port), min(5, timeout)).close()
            return
        except socket.gaierror:
            raise InputError(
                f"{here}: does not know the name {address}, the first node's: look at DNS or /etc/hosts there"
            ) from None
        except OSError as problem:
            said = problem.strerror or str(problem)
            time.sleep(0.2)
    raise InputError(
        f"{here}: cannot reach the first node at {address}:{port} in {timeout} s ({said.lower()}): {NETWORK}"
    )


def seconds_until_there(files, wait):
    """{key: seconds until the file could be read, None: not within `wait`} of these {key: file}."""
    began, seen = time.monotonic(), dict.fromkeys(files)
    while True:
        for key, file in files.items():
            with contextlib.suppress(OSError):
                if seen[key] is None and file.read_text():
                    seen[key] = time.monotonic() - began
        if None not in seen.values() or time.monotonic() - began >= wait:
            return seen
        time.sleep(0.2)


def first_line(problem):
    return str(problem).strip().splitlines()[0][:120] if str(problem).strip() else type(problem).__name__
