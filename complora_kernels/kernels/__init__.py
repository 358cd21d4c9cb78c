"""Triton kernels, one file per operation, each with the functions that launch them. Imported when first used."""
