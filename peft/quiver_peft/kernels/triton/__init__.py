"""The kernels of a step in Triton, for CUDA: each is held against its plain torch twin, under the interpreter too."""
