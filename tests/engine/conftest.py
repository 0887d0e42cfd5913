"""One thread for tiny models: handing work to a second one costs more than it saves."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Set before every test, since an engine that a test loads sets it for the whole process."""
    torch.set_num_threads(1)
