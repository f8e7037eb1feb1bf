"""With FAKE_CUDA_ARITHMETIC=1 (the launcher puts this on the path): arithmetic from when torch is imported."""

import os
import sys


class _AfterTorch:
    """Finds torch as everyone does, and runs ``enable`` when it is loaded."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Wraps the loader of ``torch``; knows nothing else."""
        if name != "torch":
            return None
        finder = next(f for f in sys.meta_path if isinstance(f, type) and f.__name__ == "_AfterTorch")
        sys.meta_path.remove(finder)
        from importlib.util import find_spec

        spec = find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            import fakecuda_arithmetic

            fakecuda_arithmetic.enable()

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("FAKE_CUDA_ARITHMETIC") == "1" and "libcudart" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _AfterTorch)
