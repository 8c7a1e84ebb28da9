// bfloat16 products of a CPU: few rows against weights that are read once, float32 sums.
//
// Weights are packed as [columns / 16, inputs / 2, 16, 2]: a panel of 16 columns is read from end to end, a pair of
// inputs at a time, which is what AVX512-BF16 multiplies and the other sets widen with a shift and a mask. Blocks of
// a few rows by up to four panels keep their sums in registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "bodies.h"
#include "intrinsics.h"
#include "isa.h"
#include "product/product.h"
#include "threads.h"

namespace specformer {
namespace {

constexpr int kColumns = 16;     // of a panel
constexpr int kBlocksAhead = 4;  // of stored rows: how far ahead of them memory is asked for the next

// What is read soon, for the second level of the cache: the first one waits for too few lines at a time to keep memory
// busy, once a block of several rows takes longer over each.
INLINE void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Rows of inputs, and how they are cut into blocks of about the same size.
struct Rows {
  const uint16_t* data;
  int64_t count, inputs, pairs, blocks;

  Rows(const uint16_t* data, int64_t count, int64_t inputs, int most)
      : data(data), count(count), inputs(inputs), pairs((inputs + 1) / 2), blocks((count + most - 1) / most) {}

  template <typename Function>
  void each_block(const Function& function) const {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = count * block / blocks;
      function(first, static_cast<int>(count * (block + 1) / blocks - first));
    }
  }
};

// Whether an operation is over before another thread would be awake: some ten microseconds of one core.
bool small(int64_t rows, int64_t inputs, int64_t columns) {
  return inputs * columns * (2 + rows / 4) < 200'000;
}

namespace plain {

#define TARGET
using Input = FloatPair;
typedef float Sum __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
constexpr int kMostRows = 4;
constexpr int most_panels(int rows) { return rows == 1 ? 2 : 1; }

INLINE Input make_input(uint16_t even, uint16_t odd) { return {widened(even), widened(odd)}; }

#define zero() (Sum{})  // no function: a compiler would warn of vectors that the processor lacks
#define store(sum, out) std::memcpy(out, &(sum), sizeof(Sum))

template <int ROWS, int PANELS>
INLINE void add_pair(const Input* x, const uint32_t* panels, int64_t stride, Sum (&sum)[ROWS][PANELS]) {
  UNROLL for (int panel = 0; panel < PANELS; panel++) {
    Words words;
    std::memcpy(&words, panels + panel * stride, sizeof(words));
    const Sum even = reinterpret_cast<Sum>(words << 16), odd = reinterpret_cast<Sum>(words & 0xffff0000u);
    UNROLL for (int row = 0; row < ROWS; row++) {
      sum[row][panel] = sum[row][panel] + even * x[row].even + odd * x[row].odd;
    }
  }
}

using Lanes = Sum;
using Side = Sum;
constexpr int kStep = 32, kSides = 2;
constexpr int kMostRowsOfDots = 2, kStored = 2;

#define no_lanes() (Lanes{})
#define total(sum) total_of(reinterpret_cast<const float*>(&(sum)))

INLINE float total_of(const float* lanes) {
  float half[8], out = 0;
  for (int i = 0; i < 8; i++) half[i] = lanes[i] + lanes[i + 8];
  for (float each : half) out += each;
  return out;
}

INLINE void put(uint16_t value, int64_t i, Side* step) { step[i % 2][i / 2] = widened(value); }

template <int ROWS, int STORED>
INLINE void add_step(const Side* x, const uint16_t* stored, int64_t stride, Lanes (&sum)[ROWS][STORED]) {
  for (int each = 0; each < STORED; each++) {
    Words words;
    std::memcpy(&words, stored + each * stride, sizeof(words));
    const Sum even = reinterpret_cast<Sum>(words << 16), odd = reinterpret_cast<Sum>(words & 0xffff0000u);
    for (int row = 0; row < ROWS; row++) {
      sum[row][each] = sum[row][each] + even * x[2 * row] + odd * x[2 * row + 1];
    }
  }
}

#include "product/product_body.inc"
#undef zero
#undef store
#undef no_lanes
#undef total
#undef TARGET
}  // namespace plain

#if defined(__x86_64__)

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))
using Input = FloatPair;
struct Sum {
  __m256 low, high;
};
constexpr int kMostRows = 5;  // with six the compiler runs out of registers
constexpr int most_panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

INLINE Input make_input(uint16_t even, uint16_t odd) { return {widened(even), widened(odd)}; }
TARGET INLINE Sum zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TARGET INLINE void store(const Sum& sum, float* out) {
  _mm256_storeu_ps(out, sum.low);
  _mm256_storeu_ps(out + 8, sum.high);
}

// Even inputs of a panel first and then the odd ones: sixteen registers hold no more.
template <int ROWS, int PANELS>
TARGET INLINE void add_pair(const Input* x, const uint32_t* panels, int64_t stride, Sum (&sum)[ROWS][PANELS]) {
  UNROLL for (int panel = 0; panel < PANELS; panel++) {
    const __m256i* words = reinterpret_cast<const __m256i*>(panels + panel * stride);
    const __m256i low = _mm256_loadu_si256(words), high = _mm256_loadu_si256(words + 1);
    const __m256 even_low = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    const __m256 even_high = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    UNROLL for (int row = 0; row < ROWS; row++) {
      const __m256 even = _mm256_broadcast_ss(&x[row].even);
      sum[row][panel].low = _mm256_fmadd_ps(even_low, even, sum[row][panel].low);
      sum[row][panel].high = _mm256_fmadd_ps(even_high, even, sum[row][panel].high);
    }
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    const __m256 odd_low = _mm256_castsi256_ps(_mm256_and_si256(low, mask));
    const __m256 odd_high = _mm256_castsi256_ps(_mm256_and_si256(high, mask));
    UNROLL for (int row = 0; row < ROWS; row++) {
      const __m256 odd = _mm256_broadcast_ss(&x[row].odd);
      sum[row][panel].low = _mm256_fmadd_ps(odd_low, odd, sum[row][panel].low);
      sum[row][panel].high = _mm256_fmadd_ps(odd_high, odd, sum[row][panel].high);
    }
  }
}

using Lanes = __m256;
struct Side {
  float lanes[8];
};
constexpr int kStep = 16, kSides = 2;
constexpr int kMostRowsOfDots = 2, kStored = 4;

TARGET INLINE Lanes no_lanes() { return _mm256_setzero_ps(); }

TARGET INLINE float total(Lanes sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE void put(uint16_t value, int64_t i, Side* step) { step[i % 2].lanes[i / 2] = widened(value); }

template <int ROWS, int STORED>
TARGET INLINE void add_step(const Side* x, const uint16_t* stored, int64_t stride, Lanes (&sum)[ROWS][STORED]) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  __m256 side[2 * ROWS];
  UNROLL for (int i = 0; i < 2 * ROWS; i++) side[i] = _mm256_loadu_ps(x[i].lanes);
  UNROLL for (int each = 0; each < STORED; each++) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored + each * stride));
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, mask));
    UNROLL for (int row = 0; row < ROWS; row++) {
      sum[row][each] = _mm256_fmadd_ps(even, side[2 * row], sum[row][each]);
      sum[row][each] = _mm256_fmadd_ps(odd, side[2 * row + 1], sum[row][each]);
    }
  }
}

#include "product/product_body.inc"
#undef TARGET
}  // namespace avx2

#include "product/product_avx512.inc"
#include "product/product_amx.inc"

#endif  // x86-64

// Every float16 that is a number: the smallest are no full float16, and no thread may take them for zero.
float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff;
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &tiny, 4);
  bits = (magnitude < 0x400 ? bits : (magnitude << 13) + (112u << 23)) | static_cast<uint32_t>(half & 0x8000) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// Records as panels of bfloat16. A product of scale and q is exact.
void expand(const Record* records, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i++) {
    for (int column = 0; column < kColumns; column++) {
      const float scale = from_half(records[i].scale[column]), least = from_half(records[i].least[column]);
      for (int pair = 0; pair < kRecordPairs; pair++) {
        const auto weight = [&](int input) -> uint32_t {
          const uint32_t q = records[i].q[pair / 8][column][input] >> 4 * (pair % 8) & 15;
          return rounded(static_cast<float>(q) * scale + least);
        };
        words[(i * kRecordPairs + pair) * kColumns + column] = weight(0) | weight(1) << 16;
      }
    }
  }
}

}  // namespace

void product(const uint16_t* x, int64_t rows, int64_t inputs, const uint32_t* weights, int64_t columns, uint16_t* out) {
  DISPATCH(product, x, rows, inputs, weights, columns, out);
}

void four_bit_product(const uint16_t* x, int64_t rows, int64_t inputs, const Record* weights, int64_t columns,
                      uint16_t* out) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Bf16) return avx512_bf16::four_bit_product(x, rows, inputs, weights, columns, out);
#endif
  // The other sets take longer to expand weights than memory takes for bfloat16 ones: nobody hurries with these.
  const int64_t panels = (columns + kColumns - 1) / kColumns, count = panels * (inputs / 2 / kRecordPairs);
  const std::unique_ptr<uint32_t[]> expanded(new uint32_t[count * kRecordPairs * kColumns]);
  expand(weights, count, expanded.get());
  product(x, rows, inputs, expanded.get(), columns, out);
}

void product_of_rows(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                     float* out) {
  DISPATCH(product_of_rows, x, rows, inputs, stored, columns, out);
}

void tiles_of_products(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* stored, int64_t columns,
                       int64_t tile, const TakesTile& take) {
  DISPATCH(tiles_of_products, x, rows, inputs, stored, columns, tile, take);
}

}  // namespace specformer
