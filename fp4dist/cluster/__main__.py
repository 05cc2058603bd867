"""python -m fp4dist.cluster plan | predict | simulate | preflight | launch; each command is a module of its own.

A command's module has HELP, add_arguments(parser) and run(args) -> exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fp4dist.errors import Fp4DistError

COMMANDS = {
    "plan": "fp4dist.cluster.plan_command",
    "predict": "fp4dist.cluster.predict_command",
    "simulate": "fp4dist.cluster.simulate_command",
    "preflight": "fp4dist.cluster.preflight_command",
    "launch": "fp4dist.cluster.launch_command",
}
USAGE = 2  # exit status of what a user can mend in the arguments, as argparse has it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of ours is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m fp4dist.cluster", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    # only the module that is asked for is imported: preflight must run where nothing else does
    wanted = [name for name in COMMANDS if name in arguments[:1]] or list(COMMANDS)
    modules = {name: import_module(COMMANDS[name]) for name in wanted}
    for name, module in modules.items():
        child = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        child.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(child)
    args = parser.parse_args(arguments)
    try:
        return int(modules[args.command].run(args))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()  # else Python reports at exit that stdout cannot be flushed
        return 0
    except Fp4DistError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(getattr(e, "exit_code", USAGE) or USAGE)


if __name__ == "__main__":
    sys.exit(main())
