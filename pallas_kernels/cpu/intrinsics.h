// The intrinsics of x86-64, where they are.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header of intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
