"""The run folder: what lies where, and who may continue it.

config.resolved.yaml   the configuration with every default filled in; its first line holds its hash
layers.json            every linear with its formats
metrics.jsonl          one object a line; tensorboard/ the same for TensorBoard
curves.png             the same as a picture;  report.html   with what the monitor saw and the autopilot did
monitor.jsonl          see monitor.py;  autopilot.jsonl   see autopilot.py
metrics.undone.jsonl   lines of steps that were undone by going back to a checkpoint
checkpoints/           see checkpoint.py
phases/                phases that were asked for by hand, see phase.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from fp4dist.errors import ConfigError
from fp4dist.spec.build import plain
from fp4dist.spec.load import config_hash, dump
from fp4dist.spec.run import RunConfig

_HASH = "# config_hash: "
_SHOWN = 6  # differing keys named in an error


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.resolved.yaml"
        self.layers = path / "layers.json"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.phases = path / "phases"
        self.monitor = path / "monitor.jsonl"
        self.autopilot = path / "autopilot.jsonl"
        self.undone = path / "metrics.undone.jsonl"

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError when the folder holds a run of another configuration. Changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.dir = {self.path}: a file is in the way; set run.dir to another place")
        if not self.config.exists():
            if self.checkpoints.exists() or self.metrics.exists():
                raise ConfigError(
                    f"run.dir = {self.path}: it holds a run without {self.config.name}; remove it or set run.dir"
                )
            return
        text = self.config.read_text(encoding="utf-8")
        found, wanted = text.partition("\n")[0].removeprefix(_HASH), config_hash(config)
        if found != wanted:
            changes = _differences(yaml.safe_load(text), plain(config))
            raise ConfigError(
                f"run.dir = {self.path}: another run lives there (config hash {found}, this one has {wanted}{changes});"
                f" set run.dir (--set run.dir=...) or run.name, or remove {self.path}"
            )

    def claim(self, config: RunConfig) -> None:
        """Make the folder this run's; called when all else is ready, so that a failed start leaves no claim behind."""
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(config)  # anew in a continuation too: logging, checkpoint and backend may have changed

    def _write(self, config: RunConfig) -> None:
        tmp = self.config.with_suffix(".tmp")
        tmp.write_text(f"{_HASH}{config_hash(config)}\n{dump(config)}", encoding="utf-8")
        os.replace(tmp, self.config)


def _differences(there: Any, here: Any) -> str:
    """The first few keys that differ, for people."""
    found = [
        f"{k}: {a} -> {b}"
        for k, a, b in _walk("", there, here)
        if not k.startswith(("logging.", "checkpoint.", "backend.", "monitor"))
    ]
    if not found:
        return ""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; " + ", ".join(found[:_SHOWN]) + more


def _walk(path: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [item for k in keys for item in _walk(f"{path}.{k}" if path else str(k), a.get(k), b.get(k))]
    same = list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b
    return [] if same else [(path, a, b)]
