#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace specformer {
namespace {

struct Named {
  Isa isa;
  const char* name;
};

std::vector<Named> runnable() {
  std::vector<Named> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) all.push_back({Isa::kAvx512Bf16, "avx512_bf16"});
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
