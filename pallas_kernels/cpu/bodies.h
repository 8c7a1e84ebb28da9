// What the bodies of all operations share.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // else GCC keeps the sums of a block in memory, which halves the speed

namespace specformer {

constexpr int kLanes = 16;  // floats that are computed together

// A sum as bfloat16: the nearest, ties to even; NaN stays NaN.
INLINE uint16_t rounded(float sum) {
  uint32_t bits;
  std::memcpy(&bits, &sum, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest);
}

INLINE float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

struct FloatPair {
  float even, odd;
};

// Numbers too small for a full float32 count as zero on every thread: some callers say so of theirs, and they are slow.
class FlushesDenormals {
 public:
#if defined(__x86_64__)
  FlushesDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushesDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  FlushesDenormals() {}  // not trivial, for a compiler that warns of what is unused
#endif
};

}  // namespace specformer
