"""`python -m fp4dist.kernels.verify`: the name under which owners of a GPU find `fp4dist.verify`.

It needs the whole package, trainer included, which this level must not import; so the program is started by its name.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("fp4dist.verify", run_name="__main__", alter_sys=True)
