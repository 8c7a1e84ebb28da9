#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specformer {
namespace {

struct Named {
  Isa isa;
  const char* name;
};

#if defined(__x86_64__)
// Whether the CPU has AMX and Linux lets this process have its tiles, which are more state to save than it gives unasked.
bool may_use_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, which may be older
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Named> runnable() {
  std::vector<Named> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && may_use_tiles()) all.push_back({Isa::kAmxBf16, "amx_bf16"});
  if (bf16) all.push_back({Isa::kAvx512Bf16, "avx512_bf16"});
  if (avx512) all.push_back({Isa::kAvx512, "avx512"});
  if (avx2) all.push_back({Isa::kAvx2, "avx2"});
#endif
  all.push_back({Isa::kPlain, "plain"});
  return all;
}

const Named* chosen() {
  static const std::vector<Named> all = runnable();
  static const Named* const one = []() -> const Named* {
    const char* wanted = std::getenv("SPECFORMER_CPU_ISA");
    if (wanted == nullptr || *wanted == 0) return &all.front();
    for (const Named& each : all) {
      if (std::strcmp(each.name, wanted) == 0) return &each;
    }
    return nullptr;
  }();
  return one;
}

}  // namespace

Isa isa() { return chosen() == nullptr ? Isa::kPlain : chosen()->isa; }

}  // namespace specformer

const char* specformer_isa() {
  const specformer::Named* one = specformer::chosen();
  return one == nullptr ? nullptr : one->name;
}

const char* specformer_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const specformer::Named& each : specformer::runnable()) {
      joined += (joined.empty() ? "" : " ") + std::string(each.name);
    }
    return joined;
  }();
  return names.c_str();
}

#ifndef SPECFORMER_SOURCES
#define SPECFORMER_SOURCES "unknown"
#endif

const char* specformer_sources() { return SPECFORMER_SOURCES; }
