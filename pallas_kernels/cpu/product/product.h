#pragma once

#include <cstdint>

namespace specformer {

// out bf16[rows, columns] = x bf16[rows, inputs] @ weights, packed as bf16[columns / 16, inputs / 2, 16, 2].
void product(const uint16_t* x, int64_t rows, int64_t inputs, const uint32_t* weights, int64_t columns, uint16_t* out);

// out f32[rows, columns] = x bf16[rows, inputs] @ the transpose of stored bf16[columns, inputs].
void product_of_rows(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                     float* out);

}  // namespace specformer
