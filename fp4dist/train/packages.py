"""The packages a run needs, checked by what is in them before anything imports them.

PyPI has a package named `apex` that is not NVIDIA's; Megatron-core and DeepSpeed would import it. NVIDIA's is told by
its content.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

from fp4dist.errors import DependencyError
from fp4dist.spec.run import RunConfig

_INSTALL = "pip install -c constraints.txt -e ."


def check_packages(config: RunConfig) -> None:
    """Raise DependencyError when a package is missing or is another one of the same name."""
    _require("megatron.core", "megatron-core", "the model is built from its layers")
    if config.engine.kind == "deepspeed":
        _require("deepspeed", "deepspeed", "engine.kind is deepspeed")
    if config.logging.wandb:
        _require("wandb", "wandb", "logging.wandb is true")
    has_nvidia_apex()


def has_nvidia_apex() -> bool:
    """Whether NVIDIA's apex with its CUDA kernels is installed; DependencyError for the unrelated package."""
    folders = _folders("apex")
    if not folders:
        return False
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        raise DependencyError(
            f"apex: {folders[0]} is PyPI's unrelated package of that name, which Megatron-core and DeepSpeed would"
            " import as NVIDIA's; pip uninstall apex (fp4dist then uses torch's fused AdamW), or build NVIDIA's from"
            " https://github.com/NVIDIA/apex"
        )
    return util.find_spec("amp_C") is not None


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers; "absent" where a package is not installed."""
    found = {}
    for name in ("fp4dist", "torch", "megatron-core", "deepspeed", "transformer-engine", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _require(module: str, package: str, why: str) -> None:
    parent = module.partition(".")[0]
    if util.find_spec(parent) is None or util.find_spec(module) is None:
        raise DependencyError(f"{package} is not installed, and {why}; run: {_INSTALL}")


def _folders(module: str) -> list[Path]:
    spec = util.find_spec(module)
    if spec is None:
        return []
    places = list(spec.submodule_search_locations or ())
    return [Path(p) for p in places] or ([Path(spec.origin)] if spec.origin else [])
