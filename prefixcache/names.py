"""What a tenant may be called, here and on the server."""

from __future__ import annotations

import re

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TENANT_NAME_RULE = "a tenant's name has 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or a digit"
