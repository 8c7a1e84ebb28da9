// The instruction sets that a native body is compiled for, and which of them runs.
#pragma once

namespace specformer {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// The best one that this CPU and its system run, or the one that SPECFORMER_CPU_ISA names if they run that.
Isa isa();

}  // namespace specformer

// Calls the body of the set that runs: each set has a namespace with a function of that name.
#if defined(__x86_64__)
#define DISPATCH(function, ...)                                           \
  switch (isa()) {                                                        \
    case Isa::kAmxBf16: return amx_bf16::function(__VA_ARGS__);           \
    case Isa::kAvx512Bf16: return avx512_bf16::function(__VA_ARGS__);     \
    case Isa::kAvx512: return avx512::function(__VA_ARGS__);              \
    case Isa::kAvx2: return avx2::function(__VA_ARGS__);                  \
    case Isa::kPlain: return plain::function(__VA_ARGS__);                \
  }
#else
#define DISPATCH(function, ...) plain::function(__VA_ARGS__)
#endif

#define SPECFORMER_EXPORT extern "C" __attribute__((visibility("default")))

// The name of the set that runs ("avx2"), or null where SPECFORMER_CPU_ISA names one that this CPU cannot run.
SPECFORMER_EXPORT const char* specformer_isa();
// The names of all that this CPU runs, best first, with a blank between.
SPECFORMER_EXPORT const char* specformer_isas();
// The fingerprint of the sources that this was built from.
SPECFORMER_EXPORT const char* specformer_sources();
