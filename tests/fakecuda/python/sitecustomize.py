"""With FAKE_CUDA_ARITHMETIC=1 (the launcher puts this on the path): arithmetic from when torch is imported."""

import importlib.util
import os
import sys


class _AfterTorch:
    """Finds torch as everyone does, and runs ``enable`` when it is loaded."""

    looking = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Wraps the loader of ``torch``; knows nothing else. (Some only ask whether there is a torch.)"""
        if name != "torch" or cls.looking:
            return None
        cls.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            cls.looking = False
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            sys.meta_path.remove(cls)
            import fakecuda_arithmetic

            fakecuda_arithmetic.enable()

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("FAKE_CUDA_ARITHMETIC") == "1" and "libcudart" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _AfterTorch)
