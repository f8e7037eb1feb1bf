"""Ways in which the kernels' library may be compiled."""

import torch

WAYS = {"this processor": ("-march=native",), "AVX2": ("-mavx2", "-mfma"), "none": ()}
X86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
