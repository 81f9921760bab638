"""Two hosts on one machine: network namespaces that are joined by a virtual link (a veth pair).

Each host has its own network, with its own loopback, its own host name, and its own ``/etc/hosts``.
As on a fresh Debian, a host's own name is an address of its loopback, and nothing else is known
about the other host than its address. Files are shared. No root is needed where user namespaces are
allowed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TOOLS = ("unshare", "nsenter", "ip", "mount")
_ENTER = ("nsenter", "--preserve-credentials", "--user", "--net", "--uts", "--mount", "--target")
_INTERFACE = "veth"
# The last command keeps the namespaces until its standard input is closed, which happens when the
# test process ends.
_BEGIN = """
echo {name} > /proc/sys/kernel/hostname && ip link set lo up && mount -t tmpfs tmpfs /mnt &&
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /mnt/hosts &&
mount --bind /mnt/hosts /etc/hosts && umount -l /mnt && echo ready && exec cat
"""


@dataclass(frozen=True)
class Host:
    """One of two hosts.

    Attributes:
        name: its host name.
        address: its IP address on the link.
        interface: its end of the link.
        pid: a process that keeps its namespaces.
    """

    name: str
    address: str
    interface: str
    pid: int

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command that runs another one on this host, in :data:`ROOT`."""
        return [*_ENTER, str(self.pid), "env", f"--chdir={ROOT}", *arguments]

    def start(self, arguments: Sequence[str], output: Path, **kwargs: object) -> subprocess.Popen:
        """Start a program whose output is appended to a file."""
        with output.open("a") as file:
            return subprocess.Popen(
                self.command(arguments), stdout=file, stderr=subprocess.STDOUT, **kwargs
            )

    def processes(self) -> list[int]:
        """The processes that run on this host."""
        own, pids = _network_of(self.pid), [int(p.name) for p in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if pid != self.pid and _network_of(pid) == own]

    def kill(self) -> None:
        """Kill all processes of this host."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def set_link(self, state: str) -> None:
        """Connect the host (``up``) or disconnect it (``down``)."""
        self._run("ip", "link", "set", "dev", self.interface, state)

    def hide(self, folder: Path) -> None:
        """Replace a shared folder with an empty one, on this host only."""
        self._run("mount", "-t", "tmpfs", "tmpfs", str(folder))

    def _run(self, *arguments: str) -> None:
        subprocess.run(self.command(arguments), check=True, capture_output=True, text=True)


def reason_to_skip() -> str:
    """Why there can be no two hosts here; empty if there can."""
    if missing := [tool for tool in _TOOLS if not shutil.which(tool)]:
        return f"two hosts need the programs {', '.join(missing)}"
    try:
        with two_hosts():
            return ""
    except (subprocess.CalledProcessError, OSError) as error:
        text = getattr(error, "stderr", "") or str(error)
        return f"no network namespaces here: {text.strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, of which all processes are killed at the end.

    Raises:
        CalledProcessError: if namespaces are not allowed.
    """
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_host(1, ["unshare", "--user", "--map-root-user"]))
        # In the same user namespace, which may then connect them.
        inside = ["nsenter", "--preserve-credentials", "--user", "--target", str(first.pid)]
        second = stack.enter_context(_host(2, [*inside, "unshare"]))
        other_end = ["name", _INTERFACE, "netns", str(second.pid)]
        first._run("ip", "link", "add", "name", _INTERFACE, "type", "veth", "peer", *other_end)
        for host in (first, second):
            host._run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            host.set_link("up")
        yield first, second


@contextlib.contextmanager
def _host(number: int, unshare: Sequence[str]) -> Iterator[Host]:
    name = f"host-{number}"
    holder = subprocess.Popen(
        [*unshare, "--net", "--uts", "--mount", "sh", "-c", _BEGIN.format(name=name)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:  # closes its standard input and waits for its end
        assert holder.stdin and holder.stdout and holder.stderr
        if holder.stdout.readline() != "ready\n":
            holder.stdin.close()
            raise subprocess.CalledProcessError(1, holder.args, stderr=holder.stderr.read())
        host = Host(name, f"10.77.0.{number}", _INTERFACE, holder.pid)
        try:
            yield host
        finally:
            host.kill()


def _network_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:  # it has ended
        return ""
