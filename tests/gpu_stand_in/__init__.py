"""A stand-in for a CUDA device, to run torch's real CUDA code on machines without one.

``runtime.cpp`` replaces the CUDA runtime, cuBLAS, cuDNN and NCCL when it is preloaded. Device memory is reserved host memory that
no kernel touches. Kernels are counted and not run, and every wait of the CPU for the GPU is reported. The stand-in thus detects
wrong devices and types, waits, copies, and the memory that torch's allocator takes at real sizes, but no values and no times.
"""
