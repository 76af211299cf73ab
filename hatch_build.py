"""Builds the native kernels into the package, where a C++ compiler is at hand.

Without one the package is built all the same, and computes with ggml's kernels alone.
"""

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).parent / "src" / "gemloom" / "kernels"


class KernelsHook(BuildHookInterface):
    """Runs before a wheel is made, an editable one among them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library and have it packed, as one for this platform alone."""
        spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        library = module.build(KERNELS)
        if library is None:
            self.app.display_warning("the native kernels were not built: ggml's are used instead")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(f"/src/gemloom/kernels/{library.name}")
