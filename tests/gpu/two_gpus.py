"""`python -m tests.gpu.two_gpus [NAME…]`: the checks that need several GPUs, one after the other."""

from __future__ import annotations

import sys

from tests.gpu.__main__ import main

if __name__ == "__main__":
    sys.exit(main(on_several=True))
