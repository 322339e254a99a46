"""Which device a worker takes, with GPUs that are only said to be there."""

import numpy as np
import pytest
import torch

from models.device import pick_device, upload
from models.errors import LoadError
from tests import tiny


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)


@pytest.mark.parametrize(
    ("gpus", "name", "index", "device"),
    [
        (0, "auto", 0, "cpu"),
        (0, "auto", 1, "cpu"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda", 1, "cuda:1"),
        (2, "cuda:0", 1, "cuda:0"),
        (2, "cpu", 1, "cpu"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_each_worker_takes_the_gpu_of_its_number(name: str, index: int, device: str) -> None:
    assert pick_device(name, index) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name"), [(0, "cuda"), (2, "auto"), (2, "cuda"), (2, "cuda:2")], indirect=["gpus"]
)
@pytest.mark.usefixtures("gpus")
def test_a_worker_without_a_gpu_beside_some_with_is_an_error(name: str) -> None:
    """A slow worker among fast ones would be found out by nobody."""
    with pytest.raises(LoadError, match="is not there"):
        pick_device(name, 2)


def test_what_is_uploaded_is_a_copy() -> None:
    values = np.arange(3)
    found = upload(values, tiny.CPU)
    values[:] = 9
    assert found.tolist() == [0, 1, 2]
