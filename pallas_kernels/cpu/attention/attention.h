#pragma once

#include <cstdint>

namespace specformer {

// One call of ragged attention over a paged cache; T is how elements are stored, float32 or bfloat16 (uint16_t).
// Arrays are row-major, shapes as in `pallas_kernels/attention/places.py`.
template <typename T>
struct Attention {
  int64_t tokens, heads, kv_heads, size;  // size: elements of a head
  int64_t pages, page_size;               // page_size: positions of a page
  int64_t rows, tables;                   // tables: pages of a row
  const T *q, *k, *v;                     // [tokens, heads, size], [tokens, kv_heads, size]
  const int32_t *row, *position, *table;  // [tokens], [tokens], [rows, tables]
  T *keys, *values;                       // [pages, kv_heads, page_size, size]
  T* out;                                 // [tokens, heads, size]
};

// Writes the tokens' keys and values into their pages, NaN as 0, and then lets each token attend to its row up to
// itself. The result of a token and head is one fixed order of operations on its own row, whatever else is in the call.
template <typename T>
void ragged_attention(const Attention<T>& call);

extern template void ragged_attention(const Attention<float>&);
extern template void ragged_attention(const Attention<uint16_t>&);

}  // namespace specformer
