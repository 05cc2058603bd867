"""The CUDA backend: importing this package registers what the compiled extension `fp4dist._C` offers.

The extension is optional. When it is absent or does not load, nothing is raised here; the reason is kept in `MISSING`
and given to the registry, which shows it wherever this backend is asked for.
"""

from __future__ import annotations

from importlib import import_module

import torch  # noqa: F401 (the extension's symbols are in torch's libraries, which have to be loaded first)

from fp4dist.kernels.registry import declare_missing

EXTENSION = "fp4dist._C"
BUILD = "FP4DIST_CUDA=1 pip install --no-build-isolation ."


def load_extension() -> str | None:
    """Load the extension; None on success, else why it is not there and what to do."""
    try:
        import_module(EXTENSION)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == EXTENSION:
            return f"the CUDA extension is not built; build it with {BUILD}"
        return f"the CUDA extension does not load ({error}); rebuild it against the installed torch with {BUILD}"
    return None


MISSING = load_extension()
if MISSING is None:
    from fp4dist.kernels.cuda import ops as ops
else:
    declare_missing("cuda", MISSING)
