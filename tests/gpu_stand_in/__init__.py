"""A stand-in for a CUDA device, to run torch's real CUDA code on machines without one.

``runtime.cpp`` takes the place of the CUDA runtime, cuBLAS, cuDNN and NCCL when it is preloaded. Device memory is reserved host
memory that no kernel touches; kernels are counted and not run; every wait of the CPU for the GPU is reported. So it shows wrong
devices and types, waits, copies and the memory that torch's allocator takes at real sizes. It shows no values and no times.
"""
