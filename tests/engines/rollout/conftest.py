"""One thread: these models are too small for two, and spinning threads slow down whatever runs beside the tests."""

import torch

torch.set_num_threads(1)
