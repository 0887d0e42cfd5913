"""One thread for tiny models: handing work to a second one costs more than it saves."""

import torch

torch.set_num_threads(1)
