"""Start a phase of a run by hand: python -m fp4dist.train.phase RUN_FOLDER NAME

The phase must be one of the run's recipe with `trigger: {kind: manual}`. The request lies in the run folder, under
phases/, until the run's next step; then it holds that step, so that a run that goes back to an older checkpoint starts
the phase where it started before.

Exit codes: 0 asked, 2 something to correct (the last line says what).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from fp4dist.errors import ConfigError, Fp4DistError
from fp4dist.nn.phases import check_waits
from fp4dist.spec.load import load_run
from fp4dist.train.folder import RunFolder
from fp4dist.train.metrics import read_lines


class Requests:
    """Who asked for which phase, one small file for each. The run changes them on rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exist(self, names: Iterable[str]) -> bool:
        """Whether any of the phases was asked for."""
        return any(self._file(name).exists() for name in names)

    def read(self, name: str) -> tuple[bool, int | None]:
        """(asked for, step at which it started). Raises ConfigError for a file that is not ours."""
        file = self._file(name)
        try:
            step = json.loads(file.read_text(encoding="utf-8"))["step"]
        except FileNotFoundError:
            return False, None
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
            raise ConfigError(f"{file}: not a request for a phase ({e}); remove it and ask again") from e
        return True, step

    def due(self, names: Iterable[str], step: int) -> list[str]:
        """Those of `names` that start now, at `step`: asked for since the last step, or started here before."""
        found = [(name, *self.read(name)) for name in names]
        return [name for name, asked, at in found if asked and (at is None or at <= step)]

    def write(self, name: str, step: int | None) -> None:
        """Note the request, or the step at which it was followed."""
        self.folder.mkdir(exist_ok=True)
        file = self._file(name)
        tmp = file.with_suffix(".tmp")
        tmp.write_text(json.dumps({"phase": name, "step": step}) + "\n", encoding="utf-8")
        os.replace(tmp, file)

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.json"


def ask(run_folder: Path, name: str) -> str:
    """Ask the run in `run_folder` to start phase `name` at its next step; returns what to tell.

    Raises ConfigError for a folder without a run, a phase that does not wait for it, and a run that is over.
    """
    folder = RunFolder(run_folder)
    if not folder.config.is_file():
        raise ConfigError(f"{run_folder}: no {folder.config.name}; give the folder of a run")
    config = load_run(folder.config)
    check_waits(config.recipe, name, by_hand=True)
    requests = Requests(folder.phases)
    asked, step = requests.read(name)
    if step is not None:
        raise ConfigError(f"phase {name}: it runs since step {step}")
    if asked:
        raise ConfigError(f"phase {name}: it was asked for already and starts with the run's next step")
    done = max((line["step"] for line in read_lines(folder.metrics)), default=0)
    if done >= config.train.steps:
        raise ConfigError(f"phase {name}: the run is over, it has done its {done} steps")
    requests.write(name, None)
    return f"phase {name} starts with the next step of the run in {run_folder}, which has done {done}"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and ask."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m fp4dist.train.phase", description=summary)
    parser.add_argument("run_folder", type=Path, help="such as runs/quickstart")
    parser.add_argument("name", help="of the phase; a wrong one lists those that there are")
    options = parser.parse_args(argv)
    try:
        print(ask(options.run_folder, options.name))
    except (Fp4DistError, OSError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
