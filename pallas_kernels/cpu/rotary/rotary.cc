// Heads turned by their rotary angles, in float32 and then rounded to bfloat16.
//
// Nothing is fused, so that every instruction set gives the same bits, and a token depends on no other.

#include "rotary/rotary.h"

#include <algorithm>
#include <cstdint>

#include "bodies.h"
#include "isa.h"
#include "threads.h"

namespace specformer {
namespace {

#define BODY "rotary/rotary_body.inc"
#include "sets.inc"

void rotate_tokens(const Rotary& call, int64_t begin, int64_t end) {
  DISPATCH(rotate_tokens, call, begin, end);
}

}  // namespace

void split_and_rotate(const Rotary& call) {
  const bool few = call.tokens * call.kv_heads * (call.group + 2) * call.size < 50'000;  // some ten microseconds
  share_out(call.tokens, 1, few, [&](int64_t begin, int64_t end) { rotate_tokens(call, begin, end); });
}

}  // namespace specformer
