#pragma once

#include <cstdint>

namespace specformer {

// out bf16[rows, size] = silu(the first) * the second of gate_up bf16[rows, 2, size].
void swiglu(const uint16_t* gate_up, int64_t rows, int64_t size, uint16_t* out);

}  // namespace specformer
