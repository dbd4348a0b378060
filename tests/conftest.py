"""Every process of the tests computes in one thread, and so do the processes that it starts.

The models are too small to share: on a busy machine a second thread multiplies the time. And numbers that are to be
equal to the last bit are made by equally many threads.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that a test starts

import torch  # noqa: E402

torch.set_num_threads(1)
