"""DeepSpeed's files and command lines: hostfile, .deepspeed_env, the launch over pdsh and the one without ssh.

Facts of deepspeed/launcher (runner.py, launch.py) that shape this module:
    a hostfile that is missing means one node and only a warning: the command tests for the file first
    over pdsh only NCCL_*, PYTHON* and few other variables travel; .deepspeed_env adds more, a blank line in it crashes
    --no_ssh reads neither: each node is started by someone else (srun, Kubernetes), with the environment already there
    --no_python --no_local_rank leave the command of a rank to us: launch/rank.sh binds it to its NUMA node
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from fp4dist.errors import ConfigError

_LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(?:#.*)?$")


def hostfile(hosts: Sequence[str], slots: int, title: str = "") -> str:
    """One line a host, in rank order; `title` becomes a comment."""
    if len(set(hosts)) != len(hosts):
        twice = sorted({h for h in hosts if list(hosts).count(h) > 1})
        raise ConfigError(f"hostfile: {', '.join(twice)} given twice; every host once, in the order of its ranks")
    width = max((len(h) for h in hosts), default=0)
    lines = [f"# {title}"] if title else []
    return "\n".join([*lines, *(f"{h:{width}s} slots={slots}" for h in hosts)]) + "\n"


def parse_hostfile(text: str) -> dict[str, int]:
    """Hosts and their slots, in order, by DeepSpeed's rules; raises ConfigError where it would refuse or guess."""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise ConfigError(f"hostfile line {number}: {line!r} is not of the form `name slots=4`")
        if match[1] in found:
            raise ConfigError(f"hostfile line {number}: {match[1]} is given twice; every host once")
        found[match[1]] = int(match[2])
    if not found:
        raise ConfigError("hostfile: it names no host; DeepSpeed would not start")
    return found


def deepspeed_env(variables: Mapping[str, str]) -> str:
    """The .deepspeed_env file: NAME=VALUE lines, no comments and no blank lines, both of which crash DeepSpeed."""
    for name, value in variables.items():
        if "\n" in value:
            raise ConfigError(f"{name}: a value of several lines cannot be put into .deepspeed_env")
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def over_pdsh(command: Sequence[str], *, hostfile: str, master: str, port: int) -> list[str]:
    """The words of a `deepspeed` command that starts every node of `hostfile` by ssh."""
    where = ["--hostfile", hostfile, "--launcher", "pdsh", "--master_addr", master, "--master_port", str(port)]
    return ["deepspeed", *where, "--no_python", "--no_local_rank", *command]


def without_ssh(command: Sequence[str], *, hostfile: str, node_rank: str, master: str, port: str) -> str:
    """A `deepspeed` command line that starts one node; node_rank, master and port may be shell variables in quotes."""
    where = f"--hostfile {hostfile} --no_ssh --node_rank {node_rank} --master_addr {master} --master_port {port}"
    return f"deepspeed {where} --no_python --no_local_rank {shlex.join(command)}"
