#pragma once

#include <cstdint>

namespace specformer {

// out [rows, size] = x [rows, size] / sqrt(the mean of its squares + epsilon), rounded to T, times the row's scale in T:
// scale [groups, size] serves the rows in turn. T is float, or uint16_t for bfloat16.
template <typename T>
void rms_norm(const T* x, int64_t rows, int64_t size, const T* scale, int64_t groups, float epsilon, T* out);

}  // namespace specformer
