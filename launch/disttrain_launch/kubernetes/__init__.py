"""Kubernetes: a job as a value (`spec`), checked (`checks`), as manifests (`manifest`), sent (`client`) and watched."""
