"""Register kvq with transformers at the right moment, without importing transformers.

Registering needs ``transformers.quantizers.auto``, which pulls in torch and takes seconds. If it is imported already
the registration happens at once, else right after its own import.
"""

import importlib
import importlib.machinery
import sys
from importlib.abc import MetaPathFinder

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Make sure that the kvq quantizer is registered whenever transformers can load a model; safe to repeat."""
    if TARGET in sys.modules:
        # Waits for another thread that is in the middle of importing it.
        importlib.import_module(TARGET)
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds one module as Python would, and registers kvq once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            _register()

        spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    module = importlib.import_module("kvq.integrations.transformers")
    # ``kvq.load`` imports that module first, and transformers in the middle of it: it then registers itself at its end.
    if hasattr(module, "register"):
        module.register()
