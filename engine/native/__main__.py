"""`python -m engine.native`: compile the kernels now, so that the first start of a server does not have to."""

from __future__ import annotations

import subprocess
import sys

from engine.native.library import compiled

try:
    print(compiled())
except (OSError, subprocess.SubprocessError) as error:
    print(f"no kernels for this processor ({error}): PyTorch's will be used, which takes longer", file=sys.stderr)
