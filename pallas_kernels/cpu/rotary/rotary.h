#pragma once

#include <cstdint>

namespace specformer {

// The heads of one product, qkv bf16[tokens, kv_heads, group + 2, size], as q bf16[tokens, kv_heads * group, size] and
// k and v bf16[tokens, kv_heads, size]; q and k are turned by the angles whose cos and sin are f32[tokens, size / 2].
struct Rotary {
  int64_t tokens, kv_heads, group, size;
  const uint16_t* qkv;
  const float *cos, *sin;
  uint16_t *q, *k, *v;
};

void split_and_rotate(const Rotary& call);

}  // namespace specformer
