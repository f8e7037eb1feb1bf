"""What PyTorch's releases do differently on a card: the one place that looks at torch's version.

Each was read off PyTorch's own allocator with torch 2.13.0 and 2.14.1 (``tests/fakecuda``); between them a build is
taken for the release that its number says.
"""

import torch

RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])

TIES_BY_AGE = RELEASE >= (2, 13)
"""Of free blocks equal in size the one in the oldest segment is taken; before, the one at the lowest address.

Source: https://github.com/pytorch/pytorch/pull/183591.
"""
