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

namespace plain {
#define TARGET
typedef float Part __attribute__((vector_size(16)));
#include "swiglu/swiglu_body.inc"
#undef TARGET
}  // namespace plain

#if defined(__x86_64__)

namespace avx2 {
#define TARGET __attribute__((target("avx2")))
typedef float Part __attribute__((vector_size(32)));
#include "swiglu/swiglu_body.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx2")))
typedef float Part __attribute__((vector_size(64)));
#include "swiglu/swiglu_body.inc"
#undef TARGET
}  // namespace avx512

#endif  // x86-64

void multiply_rows(const uint16_t* gate_up, int64_t rows, int64_t size, uint16_t* out) {
  const FlushesDenormals flushes;
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return avx512::multiply_rows(gate_up, rows, size, out);
    case Isa::kAvx2: return avx2::multiply_rows(gate_up, rows, size, out);
    case Isa::kPlain: break;
  }
#endif
  plain::multiply_rows(gate_up, rows, size, out);
}

}  // namespace

void swiglu(const uint16_t* gate_up, int64_t rows, int64_t size, uint16_t* out) {
  const bool few = rows * size < 5'000;  // about ten microseconds of one core
  share_out(rows, 1, few, [&](int64_t begin, int64_t end) {
    multiply_rows(gate_up + begin * 2 * size, end - begin, size, out + begin * size);
  });
}

}  // namespace specformer
