import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These models are too small to share: on a busy machine a second thread multiplies the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
