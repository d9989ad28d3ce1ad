"""Triton kernels, each beside its plain-torch reference; the only room that imports triton."""
