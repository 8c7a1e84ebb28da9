// The native products under a sanitizer, without Python: shapes, many callers at once, a forked child.
// CONTRIBUTING.md has the command; SPECFORMER_CPU_ISA names the instruction set.

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "isa.h"
#include "product.h"

namespace {

float wide(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

void require(bool right, const char* what) {
  if (!right) std::printf("wrong: %s\n", what), std::exit(1);
}

// Both products of one shape against sums in double; buffers are exactly as long as they must be.
void check(int64_t rows, int64_t inputs, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  auto draw = [&] { return static_cast<uint16_t>((random() & 0x80ff) | 0x3f00); };  // +-0.5 .. 2
  std::vector<uint16_t> x(rows * inputs), stored(columns * inputs), out(rows * columns);
  std::vector<float> sums(rows * columns);
  for (auto& each : x) each = draw();
  for (auto& each : stored) each = draw();
  const int64_t pairs = (inputs + 1) / 2, panels = (columns + 15) / 16;
  std::vector<uint32_t> packed(panels * pairs * 16);
  for (int64_t column = 0; column < columns; column++) {
    for (int64_t i = 0; i < inputs; i++) {
      packed[(column / 16 * pairs + i / 2) * 16 + column % 16] |= static_cast<uint32_t>(stored[column * inputs + i])
                                                                  << 16 * (i % 2);
    }
  }
  specformer::product(x.data(), rows, inputs, packed.data(), columns, out.data());
  specformer::product_of_rows(x.data(), rows, inputs, stored.data(), columns, sums.data());
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t column = 0; column < columns; column++) {
      double exact = 0, size = 0;
      for (int64_t i = 0; i < inputs; i++) {
        const double term = static_cast<double>(wide(x[row * inputs + i])) * wide(stored[column * inputs + i]);
        exact += term, size += std::abs(term);
      }
      const double error = std::ldexp(inputs + 2, -23) * size;
      require(std::abs(sums[row * columns + column] - exact) <= error, "float32 sums");
      const double rounding = std::ldexp(std::abs(exact), -8);
      require(std::abs(wide(out[row * columns + column]) - exact) <= error + rounding, "bfloat16");
    }
  }
}

}  // namespace

int main() {
  require(specformer_isa() != nullptr, "SPECFORMER_CPU_ISA");
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 40}) {
    for (int64_t inputs : {1, 2, 15, 16, 33, 256}) {
      for (int64_t columns : {1, 16, 17, 100, 1000}) check(rows, inputs, columns, 1);
    }
  }
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 8; i++) {
    callers.emplace_back([i] {
      for (unsigned j = 0; j < 20; j++) check(1 + i, 300, 1000, i * 20 + j);
    });
  }
  for (auto& caller : callers) caller.join();
#ifndef __SANITIZE_THREAD__  // which does not follow a fork of many threads
  const pid_t child = fork();
  if (child == 0) check(3, 300, 1000, 1), _exit(0);
  int status = 1;
  waitpid(child, &status, 0);
  require(status == 0, "the forked child");
#endif
  std::printf("right: %s\n", specformer_isa());
}
