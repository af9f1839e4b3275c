"""Plugin for vLLM's CPU build: linear layers and experts of NVFP4 checkpoints, which that build refuses on its own."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Offer NVFP4 kernels to vLLM if it runs on a CPU; do nothing on any other platform.

    vLLM calls this in each of its processes, in some of them more than once, before it builds a model.
    Calls after the first change nothing.
    """
    # Imported here because vLLM resolves entry points in processes that never build a model.
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from . import experts, kernels

    kernels.install()
    experts.install()
