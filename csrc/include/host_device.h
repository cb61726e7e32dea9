// Marks small functions that kernels on either device call.
#pragma once

#if defined(__CUDACC__)
#define KFAC2_HOST_DEVICE __host__ __device__
#else
#define KFAC2_HOST_DEVICE
#endif
