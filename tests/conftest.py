"""Without a GPU, kernels run in Triton's interpreter. The switch is read when triton is imported, so it is set here,
before any test module is; everything that does not ask for an implementation takes the eager path, which is faster."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DPO_FAST_IMPL", "torch")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
