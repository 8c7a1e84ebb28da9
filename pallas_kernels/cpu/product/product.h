#pragma once

#include <cstdint>
#include <functional>

namespace specformer {

// out bf16[rows, columns] = x bf16[rows, inputs] @ weights, packed as bf16[columns / 16, inputs / 2, 16, 2].
void product(const uint16_t* x, int64_t rows, int64_t inputs, const uint32_t* weights, int64_t columns, uint16_t* out);

// 32 inputs of 16 columns in four bits: a weight is q * scale + least of its column, rounded to bfloat16.
constexpr int kRecordPairs = 16;  // of inputs
struct Record {
  uint16_t scale[16], least[16];  // float16, no infinity and no NaN
  uint32_t q[2][16][2];           // [half][column][input of a pair]: that of pair p of the half from bit 4p on
};
static_assert(sizeof(Record) == 320, "records follow each other without a gap");

// The same by weights in four bits, Record[columns / 16, inputs / 32]: the bits of `product` by what they stand for.
void four_bit_product(const uint16_t* x, int64_t rows, int64_t inputs, const Record* weights, int64_t columns,
                      uint16_t* out);

// out f32[rows, columns] = x bf16[rows, inputs] @ the transpose of stored bf16[columns, inputs].
void product_of_rows(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                     float* out);

// The same a tile of columns at a time, each of them `tile` long but the last; take(first, count, products) gets
// f32[rows, tile], of which the first `count` columns are there, from any thread.
using TakesTile = std::function<void(int64_t first, int64_t count, const float* products)>;
void tiles_of_products(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                       int64_t tile, const TakesTile& take);

}  // namespace specformer
