"""Proof that a run's bits survive kills and other numbers of workers."""
