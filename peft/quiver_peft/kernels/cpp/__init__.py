"""The CPU's own kernels in C++, compiled when first wanted; without a compiler or AVX2 torch's operators serve."""
