"""Exact mode: the same bits at every number of workers."""
