// silu(gate) * up in bfloat16: every operation in float32, its result rounded, as XLA's bfloat16 does it.
//
// Nothing is fused, so that every instruction set gives the same bits, and an element depends on no other.

#include "swiglu/swiglu.h"

#include <algorithm>
#include <cstdint>

#include "bodies.h"
#include "isa.h"
#include "threads.h"

namespace specformer {
namespace {

#define BODY "swiglu/swiglu_body.inc"
#include "sets.inc"

void multiply_rows(const uint16_t* gate_up, int64_t rows, int64_t size, uint16_t* out) {
  const FlushesDenormals flushes;
  DISPATCH(multiply_rows, gate_up, rows, size, out);
}

}  // namespace

void swiglu(const uint16_t* gate_up, int64_t rows, int64_t size, uint16_t* out) {
  const bool few = rows * size < 5'000;  // about ten microseconds of one core
  share_out(rows, 1, few, [&](int64_t begin, int64_t end) {
    multiply_rows(gate_up + begin * 2 * size, end - begin, size, out + begin * size);
  });
}

}  // namespace specformer
