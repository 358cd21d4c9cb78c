"""The first run on a GPU that nobody has run the kernels on, and the compiled kernels that it takes along.

`python -m benchmarks.gpu` is the first stage of `make gpu`: correctness of each kernel, then times of each alone.
`python -m benchmarks.gpu.cache` is `make gpu-cache`.
"""
