"""moecompress: compress Mixture-of-Experts language models to a byte budget, and prove what it cost.

Importing this package makes `transformers.AutoModelForCausalLM.from_pretrained` understand compressed folders. It does so
without importing torch or transformers itself, so that the command line starts at once.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

__version__ = "0.1.0"

_SEAM = "transformers.quantizers"


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers our quantizer right after `transformers.quantizers` has been imported by whoever needs it."""

    def find_spec(self, name, path=None, target=None):
        if name != _SEAM:
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec(name)
        if self.spec is None:
            return None
        assert self.spec.loader is not None
        self.loader = self.spec.loader
        self.spec.loader = self
        return self.spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module("moecompress.runtime.registration")


if _SEAM in sys.modules:
    importlib.import_module("moecompress.runtime.registration")
else:
    sys.meta_path.insert(0, _WhenImported())
