"""Under pytest the checks try themselves, on the CPU."""

from __future__ import annotations

import os

os.environ["CHECKS_DEVICE"] = "cpu"
