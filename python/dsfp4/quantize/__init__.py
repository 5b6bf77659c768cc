"""Quantises a BF16, F32 or FP8 checkpoint to NVFP4, in NVIDIA's layout and names."""

from dsfp4.quantize.run import quantize

__all__ = ["quantize"]
