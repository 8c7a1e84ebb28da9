#pragma once

#include <cstdint>
#include <functional>

namespace specformer {

// out bf16[rows, columns] = x bf16[rows, inputs] @ weights, packed as bf16[columns / 16, inputs / 2, 16, 2].
void product(const uint16_t* x, int64_t rows, int64_t inputs, const uint32_t* weights, int64_t columns, uint16_t* out);

// out f32[rows, columns] = x bf16[rows, inputs] @ the transpose of stored bf16[columns, inputs].
void product_of_rows(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                     float* out);

// The same a tile of columns at a time, each of them `tile` long but the last; take(first, count, products) gets
// f32[rows, tile], of which the first `count` columns are there, from any thread.
using TakesTile = std::function<void(int64_t first, int64_t count, const float* products)>;
void tiles_of_products(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                       int64_t tile, const TakesTile& take);

}  // namespace specformer
