"""Files -> specs: `extends`, named sections, `--set` overrides, resolved dump, hashes.

A name is looked up beside the file that uses it, then among the shipped configs: `recipe: quartet2` is
`recipes/quartet2.yaml`, `model: llama_124m` is `models/llama_124m.yaml`. A path (anything with a slash or ending in
.yaml) is a path.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fp4dist.errors import ConfigError
from fp4dist.spec.build import build, plain
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.run import ModelConfig, RunConfig

Spec = TypeVar("Spec")
_SECTIONS = {"recipe": "recipes", "model": "models"}  # keys of a run file that may be a bare name -> shipped folder
# Keys that do not change what is computed: two runs that differ only here are the same run.
_NOT_IDENTITY = ("logging", "checkpoint", "backend", "monitor")
_FOLDERS = ("recipes", "models", "runs")


def config_root() -> Path:
    """The folder of shipped configs: inside the installed package, or `configs/` of the checkout."""
    spec = util.find_spec("fp4dist.configs")
    for folder in list(spec.submodule_search_locations or ()) if spec else []:
        if (Path(folder) / "recipes").is_dir():
            return Path(folder)
    return Path(__file__).resolve().parents[2] / "configs"


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `key.sub=value` overrides, and return the checked RunConfig."""
    file = _find(str(path), "runs", None)
    raw = _expand_sections(_read(file, "runs"), file)
    for text in overrides:
        _override(raw, text)
        raw = _expand_sections(raw, file)
    return _build_file(RunConfig, raw, file)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by shipped name or by path."""
    file = _find(str(name_or_path), "recipes", None)
    return _build_file(Recipe, _read(file, "recipes"), file)


def changed_recipe(name_or_path: str | Path, change: Mapping[str, Any]) -> Recipe:
    """A recipe with `change` laid over its file, as a file that extends it would."""
    file = _find(str(name_or_path), "recipes", None)
    return _build_file(Recipe, _overlay(_read(file, "recipes"), dict(change)), file)


def load_model(name_or_path: str | Path) -> ModelConfig:
    """Read a model by shipped name or by path."""
    file = _find(str(name_or_path), "models", None)
    return _build_file(ModelConfig, _read(file, "models"), file)


def load_spec(tp: type[Spec], kind: str, name_or_path: str | Path) -> Spec:
    """Read a file of the folder `kind` (topology, calibration ...), by shipped name or by path, as a `tp`."""
    file = _find(str(name_or_path), kind, None)
    return _build_file(tp, _read(file, kind), file)


def shipped(kind: str) -> list[str]:
    """Names of the shipped files of `kind` (recipes, models, runs)."""
    return sorted(p.stem for p in (config_root() / kind).glob("*.yaml"))


def dump(config: object) -> str:
    """The complete resolved configuration as YAML; loading it gives an equal object."""
    return yaml.safe_dump(plain(config), sort_keys=False, width=120)


def config_hash(config: RunConfig) -> str:
    """16 hex digits of everything that decides what the run computes."""
    data = {k: v for k, v in plain(config).items() if k not in _NOT_IDENTITY}
    data["run"].pop("dir")
    data["train"].pop("stop_after")
    return canonical_digest(data)


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits of what the recipe does (its name and notes excluded)."""
    data = plain(recipe)
    return canonical_digest({k: data[k] for k in data if k not in ("name", "paper", "notes")})


def model_hash(model: ModelConfig) -> str:
    """16 hex digits of the model's shape (its name excluded, and how its experts are run)."""
    data = {k: v for k, v in plain(model).items() if k != "name"}
    if data.get("moe") is not None:
        data["moe"] = {k: v for k, v in data["moe"].items() if k not in ("dispatcher", "grouped_gemm")}
    return canonical_digest(data)


def canonical_digest(data: Any) -> str:
    """16 hex digits of plain data; a field that came later, and means what files of before meant, adds nothing."""
    return hashlib.sha256(json.dumps(_canonical(data), sort_keys=True).encode()).hexdigest()[:16]


# Fields that came after checkpoints were written: at these values they mean what the files of before meant
_CAME_LATER = {
    "amax_scope": "tensor",
    "mask": None,
    "nonzero": False,
    "outer": None,
    "samples": 1,
    "ties": "even",
    "moe": None,
    "beyond": None,
    "vpp": 1,
    "ep": 1,
    "overlap": True,
    "fp4_param_gather": False,
    "comm": None,
    "pairs": "auto",
    "deepspeed": {},
    "deterministic": False,
    "fusions": "auto",
    "cuda_graph": "auto",
    "recompute": "none",
    "recompute_modules": ["mlp"],
    "amax": {"kind": "current"},
    "split": None,
    "outlier": None,
    "estimator": {"kind": "straight"},
    "four_over_six": "none",
    "group": "block",
    "truncate": 0,
    "assign": [],
    "lr": None,
    "trigger": None,
    "gradients": [],
    "weights": [],
    "optimizer_state": None,
    "kind": "adamw",
    "momentum": 0.9,
    "order": "tp-cp-ep-dp-pp",
    "ends_as_layers": False,
    "autopilot": None,
}


def _canonical(data: Any) -> Any:
    """Equal objects have equal hashes, those of older versions too.

    A float field that Python code filled with `1` is `1.0` in YAML; a field that did not exist is left out.
    """
    if isinstance(data, Mapping):
        return {k: _canonical(v) for k, v in data.items() if k not in _CAME_LATER or v != _CAME_LATER[k]}
    if isinstance(data, list):
        return [_canonical(v) for v in data]
    return int(data) if isinstance(data, float) and data.is_integer() else data


def _build_file(tp: type, raw: Any, file: Path) -> Any:
    try:
        return build(tp, raw)
    except ConfigError as e:
        raise ConfigError(f"{file.name}: {e}") from e


def _find(name: str, kind: str, beside: Path | None) -> Path:
    """The file that `name` means in the file `beside`."""
    candidates = _candidates(name, kind, beside)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    near = difflib.get_close_matches(name, shipped(kind), 1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; shipped {kind}: {', '.join(shipped(kind))}"
    raise ConfigError(f"{kind}: no file for {name!r} (looked at {', '.join(map(str, candidates))}){hint}")


def _candidates(name: str, kind: str, beside: Path | None) -> list[Path]:
    if "/" in name or name.endswith((".yaml", ".yml")):
        near = [beside.parent / name] if beside else []
        return [Path(name), *near, config_root() / name.removeprefix("configs/")]
    file = f"{name}.yaml"
    candidates = [config_root() / kind / file]
    if beside is not None:
        candidates.insert(0, beside.parent.parent / kind / file)
        if beside.parent.name not in _FOLDERS or beside.parent.name == kind:  # runs/a.yaml does not name a model `a`
            candidates.insert(0, beside.parent / file)
        # a file that names itself means another of that name, if there is one: a local `bf16` may extend the shipped
        candidates.sort(key=lambda c: c.resolve() == beside.resolve())
    return candidates


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently keep the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Judge keys as they are written, before `<<` merges others in."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice; keep one")
                seen.add((key.tag, key.value))
        return node


def _parse(text: str) -> Any:
    """Plain data in which nothing is shared: an override of one place must not reach the others of a YAML anchor."""
    return _unshared(yaml.load(text, Loader=_StrictLoader), ())


def _unshared(value: Any, above: tuple[int, ...]) -> Any:
    if id(value) in above:
        raise ConfigError("an alias refers to a place that contains it")
    if isinstance(value, dict):
        return {k: _unshared(v, (*above, id(value))) for k, v in value.items()}
    if isinstance(value, list):
        return [_unshared(v, (*above, id(value))) for v in value]
    return value


def _read(file: Path, kind: str, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Parse one YAML file and merge what it `extends` underneath it. chain: the files that led here."""
    try:
        raw = _parse(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: not valid YAML: {e}") from e
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping at the top, got {type(raw).__name__}")
    return _extend(raw, file, kind, (*chain, file.resolve()))


def _extend(raw: dict[str, Any], file: Path, kind: str, chain: tuple[Path, ...]) -> dict[str, Any]:
    """Resolve `extends: name or [names]`; later bases win over earlier ones, the file itself wins over all."""
    bases: dict[str, Any] = {}
    for name in _names(raw.get("extends", []), file):
        base = _find(name, kind, file)
        if base.resolve() in chain:
            raise ConfigError(f"{file}: extends {name!r} leads back to itself")
        bases = _overlay(bases, _read(base, kind, chain))
    own = {k: v for k, v in raw.items() if k != "extends"}
    return _overlay(bases, _anchor_sections(own, file) if kind == "runs" else own)


def _names(extends: Any, file: Path) -> list[str]:
    names = extends if isinstance(extends, list) else [extends]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{file}: extends: expected a name, a path or a list of them, got {name!r}")
    return names


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge, but a section that names a file of its own replaces the base's section."""
    replaced = [k for k, v in over.items() if isinstance(v, dict) and "extends" in v]
    return _merge({k: v for k, v in base.items() if k not in replaced}, over)


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key, unless their `kind` differs; everything else is replaced."""
    if (
        not isinstance(base, dict)
        or not isinstance(over, dict)
        or base.get("kind") != over.get("kind", base.get("kind"))
    ):
        return over
    return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}


def _anchor_sections(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """`recipe: name` and `{extends: name, ...}` with the paths that `file` means, so that other files can extend it."""
    out = dict(raw)
    for key, kind in _SECTIONS.items():
        value = out.get(key)
        if isinstance(value, str):
            out[key] = {"extends": [str(_find(value, kind, file).resolve())]}
        elif isinstance(value, Mapping) and "extends" in value:
            paths = [str(_find(name, kind, file).resolve()) for name in _names(value["extends"], file)]
            out[key] = {**value, "extends": paths}
    return out


def _expand_sections(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Replace `recipe: name` and `model: name` (or `{extends: name, ...}`) by the file's content."""
    out = _anchor_sections(raw, file)
    for key, kind in _SECTIONS.items():
        if isinstance(out.get(key), Mapping):
            out[key] = _extend(out[key], file, kind, ())
    return out


def _override(raw: dict[str, Any], text: str) -> None:
    """Apply one `a.b.0.c=value` in place; the value is YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {text!r}: expected key.sub=value")
    try:
        parsed = _parse(value)
    except (yaml.YAMLError, ConfigError) as e:
        raise ConfigError(f"--set {key}: {value!r} is not valid YAML: {e}") from e
    node: Any = raw
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: i + 1]))
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError(f"--set {key}: {'.'.join(parents)} is {node!r}, not a section; set it as a whole")


def _child(node: Any, part: str, path: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise ConfigError(f"--set {path}: {part!r} is not an index below {len(node)}")
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {path}: {node!r} is not a section; set it as a whole")
    if node.get(part) is None:
        node[part] = {}
    return node[part]
