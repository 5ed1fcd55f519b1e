"""C++ kernels for the CPU, compiled on first use. Without a compiler or AVX2, PyTorch's operators are used."""
