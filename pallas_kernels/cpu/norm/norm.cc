// RMS norm over the last axis, each row for itself: why a token's result depends on no other token.
//
// Squares are summed in 16 lanes in the order of the elements, the lanes in a tree. Nothing is fused, so that every
// instruction set gives the same bits: they differ in how many lanes a register holds.

#include "norm/norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bodies.h"
#include "isa.h"
#include "threads.h"

namespace specformer {
namespace {

#define BODY "norm/norm_body.inc"
#include "sets.inc"

template <typename T>
void norm_rows(const T* x, int64_t begin, int64_t end, int64_t size, const T* scale, int64_t groups, float epsilon,
               T* out) {
  const FlushesDenormals flushes;
  DISPATCH(norm_rows, x, begin, end, size, scale, groups, epsilon, out);
}

}  // namespace

template <typename T>
void rms_norm(const T* x, int64_t rows, int64_t size, const T* scale, int64_t groups, float epsilon, T* out) {
  const bool few = rows * size < 100'000;  // about ten microseconds of one core
  share_out(rows, 16, few, [&](int64_t begin, int64_t end) {
    norm_rows(x, begin, end, size, scale, groups, epsilon, out);
  });
}

template void rms_norm(const float*, int64_t, int64_t, const float*, int64_t, float, float*);
template void rms_norm(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, float, uint16_t*);

}  // namespace specformer
