// The native bodies under a sanitizer, without Python: shapes, many callers at once, a forked child.
// CONTRIBUTING.md has the command; SPECFORMER_CPU_ISA names the instruction set.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "attention/attention.h"
#include "isa.h"
#include "norm/norm.h"
#include "product/product.h"
#include "rotary/rotary.h"
#include "sampling/sampling.h"
#include "swiglu/swiglu.h"

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

// Weights in four bits against those of bfloat16 that they stand for: a scale and least value of which all sums are exact.
void check_four_bits(int64_t rows, int64_t blocks, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t inputs = 32 * blocks, panels = (columns + 15) / 16;
  std::vector<uint16_t> x(rows * inputs), out(rows * columns), expected(out.size());
  for (auto& each : x) each = static_cast<uint16_t>((random() & 0x80ff) | 0x3f00);
  std::vector<specformer::Record> records(panels * blocks);
  std::vector<uint32_t> packed(panels * inputs / 2 * 16);
  for (int64_t i = 0; i < panels * blocks; i++) {
    for (int column = 0; column < 16; column++) {
      records[i].scale[column] = 0x3c00, records[i].least[column] = 0xc400;  // 1 and -4
      for (int pair = 0; pair < 16; pair++) {
        if (pair % 8 == 0) records[i].q[pair / 8][column][0] = records[i].q[pair / 8][column][1] = 0;
        for (int input = 0; input < 2; input++) {
          const uint32_t q = random() & 15;
          const float weight = static_cast<float>(q) - 4;
          uint32_t bits;
          std::memcpy(&bits, &weight, 4);
          records[i].q[pair / 8][column][input] |= q << 4 * (pair % 8);
          packed[(i * 16 + pair) * 16 + column] |= (bits >> 16) << 16 * input;
        }
      }
    }
  }
  specformer::four_bit_product(x.data(), rows, inputs, records.data(), columns, out.data());
  specformer::product(x.data(), rows, inputs, packed.data(), columns, expected.data());
  require(out == expected, "four bits");
}

// Attention over pages in any order, against sums in double; whatever no row has written is NaN.
void check_attention(int64_t rows, int64_t tokens, int64_t first, int64_t size, int64_t page_size, unsigned seed) {
  const int64_t kv_heads = 2, heads = 6, end = first + tokens, tables = (end + page_size - 1) / page_size;
  std::mt19937 random(seed);
  auto draw = [&] { return static_cast<uint16_t>((random() & 0x80ff) | 0x3f00); };
  const int64_t all = rows * tokens, pages = rows * tables;
  std::vector<uint16_t> q(all * heads * size), k(all * kv_heads * size), v(k.size()), out(q.size());
  std::vector<uint16_t> keys(pages * kv_heads * page_size * size, 0x7fc0), values = keys;
  std::vector<int32_t> row(all), position(all), table(pages);
  for (auto* each : {&q, &k, &v}) {
    for (auto& element : *each) element = draw();
  }
  for (int64_t i = 0; i < pages; i++) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), random);
  for (int64_t i = 0; i < all; i++) {
    row[i] = static_cast<int32_t>(i / tokens), position[i] = static_cast<int32_t>(first + i % tokens);
  }
  auto line = [&](int64_t of_row, int64_t at, int64_t head) {
    return ((table[of_row * tables + at / page_size] * kv_heads + head) * page_size + at % page_size) * size;
  };
  for (int64_t i = 0; i < rows * first * kv_heads; i++) {
    const int64_t from = line(i / kv_heads / first, i / kv_heads % first, i % kv_heads);
    for (int64_t j = 0; j < size; j++) keys[from + j] = draw(), values[from + j] = draw();
  }
  specformer::ragged_attention<uint16_t>({all, heads, kv_heads, size, pages, page_size, rows, tables, q.data(),
                                          k.data(), v.data(), row.data(), position.data(), table.data(), keys.data(),
                                          values.data(), out.data()});
  std::vector<double> weights(end), sums(size);
  for (int64_t token = 0; token < all; token++) {
    for (int64_t head = 0; head < heads; head++) {
      const int64_t kv_head = head / (heads / kv_heads), query = (token * heads + head) * size;
      double total = 0;
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t at = 0; at <= position[token]; at++) {
        const int64_t from = line(row[token], at, kv_head);
        double score = 0;
        for (int64_t i = 0; i < size; i++) score += static_cast<double>(wide(q[query + i])) * wide(keys[from + i]);
        const double weight = std::exp(score / std::sqrt(static_cast<double>(size)));
        total += weight;
        for (int64_t i = 0; i < size; i++) sums[i] += weight * wide(values[from + i]);
      }
      for (int64_t i = 0; i < size; i++) {
        require(std::abs(wide(out[query + i]) - sums[i] / total) <= 1e-4 + std::ldexp(std::abs(sums[i] / total), -8),
                "attention");
      }
    }
  }
}

float as_float(float value) { return value; }
float as_float(uint16_t value) { return wide(value); }

// The norm of some rows against sums in double.
template <typename T>
void check_norm(int64_t rows, int64_t size, double error, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t groups = rows % 4 == 0 ? 4 : 1;
  std::vector<T> x(rows * size), scale(groups * size), out(x.size());
  for (auto* each : {&x, &scale}) {
    for (auto& element : *each) {
      const uint16_t drawn = static_cast<uint16_t>((random() & 0x80ff) | 0x3f00);
      if constexpr (sizeof(T) == 2) element = drawn;
      else element = wide(drawn);
    }
  }
  specformer::rms_norm(x.data(), rows, size, scale.data(), groups, 1e-5f, out.data());
  for (int64_t row = 0; row < rows; row++) {
    double squares = 0;
    for (int64_t i = 0; i < size; i++) squares += std::pow(as_float(x[row * size + i]), 2);
    for (int64_t i = 0; i < size; i++) {
      const double normed = as_float(x[row * size + i]) / std::sqrt(squares / size + 1e-5);
      const double exact = normed * as_float(scale[row % groups * size + i]);
      require(std::abs(as_float(out[row * size + i]) - exact) <= error * std::abs(exact), "norm");
    }
  }
}

// The gate of some rows; five roundings to bfloat16 lie between.
void check_gate(int64_t rows, int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> x(rows * 2 * size), out(rows * size);
  for (auto& each : x) each = static_cast<uint16_t>((random() & 0x81ff) | 0x3e00);  // +-0.125 .. 8
  specformer::swiglu(x.data(), rows, size, out.data());
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = 0; i < size; i++) {
      const double gate = wide(x[2 * row * size + i]), up = wide(x[(2 * row + 1) * size + i]);
      const double exact = gate / (1 + std::exp(-gate)) * up;
      require(std::abs(wide(out[row * size + i]) - exact) <= std::ldexp(5.1 * std::abs(exact), -8), "gate");
    }
  }
}

// Three heads beside each other, the first two turned, against the same in double.
void check_rotation(int64_t rows, int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t half = (size + 1) / 2;
  size = 2 * half;
  std::vector<uint16_t> x(rows * 3 * size), q(rows * size), k(q.size()), v(q.size());
  std::vector<float> cosines(rows * half), sines(cosines.size());
  for (auto& each : x) each = static_cast<uint16_t>((random() & 0x81ff) | 0x3e00);  // +-0.125 .. 8
  for (size_t i = 0; i < cosines.size(); i++) {
    const float angle = static_cast<float>(random() % 1000) / 100;
    cosines[i] = std::cos(angle), sines[i] = std::sin(angle);
  }
  specformer::split_and_rotate(
      {rows, 1, 1, size, x.data(), cosines.data(), sines.data(), q.data(), k.data(), v.data()});
  for (int64_t row = 0; row < rows; row++) {
    const auto right = [&](int64_t head, int64_t i) -> double {
      const uint16_t* from = x.data() + (3 * row + head) * size;
      const int64_t pair = row * half + i % half;
      const double low = wide(from[i % half]), high = wide(from[i % half + half]);
      const double cos = cosines[pair], sin = sines[pair];
      return i < half ? low * cos - high * sin : high * cos + low * sin;
    };
    for (int64_t i = 0; i < size; i++) {
      const auto near = [&](uint16_t got, double exact) {
        return std::abs(wide(got) - exact) <= std::ldexp(1.01 * std::abs(exact), -8) + 1e-5;
      };
      require(near(q[row * size + i], right(0, i)) && near(k[row * size + i], right(1, i)), "rotation");
      require(v[row * size + i] == x[(3 * row + 2) * size + i], "values beside a rotation");
    }
  }
}

// Greedy rows take their largest logit, from logits and from hidden states; sampled rows some column there is.
void check_sampling(int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t inputs = 24;
  std::vector<uint16_t> hidden(rows * inputs), lm_head(columns * inputs);
  for (auto* each : {&hidden, &lm_head}) {
    for (auto& element : *each) element = static_cast<uint16_t>((random() & 0x8080) | 0x3f00);  // +-0.5, +-1
  }
  std::vector<float> logits(rows * columns), how(2 * rows), score(rows), top(rows), mass(rows);
  for (int64_t row = 0; row < rows; row++) {
    how[2 * row] = static_cast<float>(row % 2), how[2 * row + 1] = -1e30f;
    for (int64_t column = 0; column < columns; column++) {
      float sum = 0;
      for (int64_t i = 0; i < inputs; i++) sum += wide(hidden[row * inputs + i]) * wide(lm_head[column * inputs + i]);
      logits[row * columns + column] = sum;
    }
  }
  std::vector<uint32_t> keys(2 * rows, seed);
  std::vector<int32_t> tokens(columns), found(rows);
  for (int64_t i = 0; i < columns; i++) tokens[i] = static_cast<int32_t>(i);
  const specformer::Sampling call{rows, columns, keys.data(), how.data(), tokens.data(), true,
                                  score.data(), found.data(), top.data(), mass.data()};
  for (bool fused : {false, true}) {
    if (fused) specformer::best_of_hidden(call, hidden.data(), inputs, lm_head.data());
    else specformer::best_of_logits(call, logits.data());
    for (int64_t row = 0; row < rows; row++) {
      const float* line = logits.data() + row * columns;
      const auto largest = std::max_element(line, line + columns);
      require(found[row] >= 0 && found[row] < columns && top[row] == *largest && mass[row] >= 1, "sampling");
      require(row % 2 || (found[row] == largest - line && score[row] == *largest), "argmax");
    }
  }
}

void check_rows(int64_t rows, int64_t size, unsigned seed) {
  check_norm<uint16_t>(rows, size, std::ldexp(1.01, -7), seed);
  check_norm<float>(rows, size, 1e-5, seed);
  check_gate(rows, size, seed);
  check_rotation(rows, size, seed);
  check_sampling(rows, size, seed);
}

}  // namespace

int main() {
  require(specformer_isa() != nullptr, "SPECFORMER_CPU_ISA");
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 40}) {
    for (int64_t inputs : {1, 2, 15, 16, 33, 64, 256}) {
      for (int64_t columns : {1, 16, 17, 100, 1000}) check(rows, inputs, columns, 1);
    }
    for (int64_t blocks : {1, 2, 7}) {
      for (int64_t columns : {1, 16, 17, 100, 1000}) check_four_bits(rows, blocks, columns, 1);
    }
  }
  for (int64_t size : {1, 16, 40, 64}) {
    for (int64_t page_size : {1, 16, 100}) {
      check_attention(1, 1, 0, size, page_size, 1);
      check_attention(3, 5, 130, size, page_size, 2);
      check_attention(2, 70, 3, size, page_size, 3);
    }
  }
  for (int64_t rows : {1, 5, 200}) {
    for (int64_t size : {1, 15, 16, 17, 576, 577}) check_rows(rows, size, 1);
  }
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 8; i++) {
    callers.emplace_back([i] {
      for (unsigned j = 0; j < 20; j++) {
        check(1 + i, 300, 1000, i * 20 + j), check_attention(1 + i, 5, 90, 64, 16, j), check_rows(200, 577, j);
        check_four_bits(1 + i, 9, 1000, j);
      }
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
