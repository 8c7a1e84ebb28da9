// The instruction sets that a native body is compiled for, and which of them runs.
#pragma once

namespace specformer {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

// The best one that this CPU and its system run, or the one that SPECFORMER_CPU_ISA names if they run that.
Isa isa();

}  // namespace specformer

#define SPECFORMER_EXPORT extern "C" __attribute__((visibility("default")))

// The name of the set that runs ("avx2"), or null where SPECFORMER_CPU_ISA names one that this CPU cannot run.
SPECFORMER_EXPORT const char* specformer_isa();
// The names of all that this CPU runs, best first, with a blank between.
SPECFORMER_EXPORT const char* specformer_isas();
// The fingerprint of the sources that this was built from.
SPECFORMER_EXPORT const char* specformer_sources();
