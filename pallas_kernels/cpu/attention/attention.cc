// Ragged attention of a CPU over a paged cache: the tokens of a row share each read of its keys and values.
//
// Positions are taken in blocks of 64 from the first on. A block's keys are turned so that 16 positions lie side by
// side, and then a few queries at a time go over it: scores, a softmax that carries the greatest score so far, and the
// weighted sum of the values, which reads them as they lie. Scores, weights and sums are float32.
// Every sum runs over all of a query's positions in their order, on one thread: why a token's result depends on no
// other token, nor on where its pages lie.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention/attention.h"
#include "attention/tasks.h"
#include "bodies.h"
#include "intrinsics.h"
#include "isa.h"
#include "threads.h"

namespace specformer {
namespace {

constexpr int kBlock = 64;  // positions that are taken together
constexpr int kBlockLaness = kBlock / kLanes;

INLINE uint16_t without_nan(uint16_t value) { return (value & 0x7fff) > 0x7f80 ? 0 : value; }

INLINE float without_nan(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0.0f : value;
}

// Writes the keys and values of tokens [begin, end) into their pages; the output of those that are nobody's is zero.
template <typename T>
void write_tokens(const Attention<T>& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; token++) {
    if (is_nobodys(call, token)) {
      std::fill_n(call.out + token * call.heads * call.size, call.heads * call.size, T{});
      continue;
    }
    const int64_t position = call.position[token];
    if (position >= call.tables * call.page_size) continue;
    const int64_t page = call.table[call.row[token] * call.tables + position / call.page_size];
    if (page < 0 || page >= call.pages) continue;
    for (int64_t head = 0; head < call.kv_heads; head++) {
      const int64_t from = (token * call.kv_heads + head) * call.size;
      const int64_t to = ((page * call.kv_heads + head) * call.page_size + position % call.page_size) * call.size;
      for (int64_t i = 0; i < call.size; i++) call.keys[to + i] = without_nan(call.k[from + i]);
      for (int64_t i = 0; i < call.size; i++) call.values[to + i] = without_nan(call.v[from + i]);
    }
  }
}

// Memory of a thread, kept between calls and handed out from the front.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    thread_local std::unique_ptr<char[]> kept;
    thread_local size_t size = 0;
    if (size < bytes + kAlign) kept.reset(new char[size = bytes + kAlign]);
    next_ = kept.get() + (kAlign - reinterpret_cast<uintptr_t>(kept.get()) % kAlign);
  }

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return taken;
  }

 private:
  static constexpr size_t kAlign = 64;
  char* next_;
};

// Where the keys and values of a block's positions lie.
template <typename T>
struct Lines {
  const T *keys[kBlock], *values[kBlock];
};

// Positions from `begin` on; what lies at `context` or later is never read and counts as zeros.
template <typename T>
void find_lines(const Attention<T>& call, int64_t row, int64_t kv_head, int64_t begin, int64_t context, const T* zeros,
                Lines<T>& lines) {
  const int64_t there = std::min<int64_t>(kBlock, context - begin);
  for (int64_t i = 0; i < there;) {
    const int64_t inside = (begin + i) % call.page_size;
    const int64_t named = call.table[row * call.tables + (begin + i) / call.page_size];
    const int64_t page = std::min(std::max<int64_t>(named, 0), call.pages - 1);
    const int64_t from = ((page * call.kv_heads + kv_head) * call.page_size + inside) * call.size;
    const int64_t end = std::min(there, i + call.page_size - inside);
    for (int64_t offset = from; i < end; i++, offset += call.size) {
      lines.keys[i] = call.keys + offset;
      lines.values[i] = call.values + offset;
    }
  }
  for (int64_t i = there; i < kBlock; i++) lines.keys[i] = lines.values[i] = zeros;
}

// Copies lines to where zeros follow each, up to a whole number of vectors.
template <typename T>
void pad_lines(int64_t size, int64_t padded, T* to, const T* (&lines)[kBlock]) {
  for (int i = 0; i < kBlock; i++, to += padded) {
    std::copy_n(lines[i], size, to);
    std::fill(to + size, to + padded, T{});
    lines[i] = to;
  }
}

namespace plain {

#define TARGET
typedef float Part __attribute__((vector_size(16)));
constexpr int kQueries = 3;
constexpr int most_vectors(int) { return 1; }

INLINE Part spread(float value) { return Part{value, value, value, value}; }
INLINE Part multiply_add(Part a, Part b, Part sum) { return sum + a * b; }
INLINE float greatest(Part part) { return std::max(std::max(part[0], part[1]), std::max(part[2], part[3])); }

template <typename T>
void turn(const T* const* lines, int64_t words, uint32_t* turned) {
  constexpr int64_t kWord = 4 / sizeof(T);
  for (int i = 0; i < kBlock; i++) {
    for (int64_t word = 0; word < words; word++) std::memcpy(turned + word * kBlock + i, lines[i] + word * kWord, 4);
  }
}

#include "vectors.inc"
#include "attention/attention_body.inc"
#undef TARGET
}  // namespace plain

#if defined(__x86_64__)

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))
typedef float Part __attribute__((vector_size(32)));
constexpr int kQueries = 5;  // with six the compiler runs out of registers
constexpr int most_vectors(int queries) { return queries == 1 ? 4 : queries <= 3 ? 2 : 1; }

TARGET INLINE Part spread(float value) { return _mm256_set1_ps(value); }
TARGET INLINE Part multiply_add(Part a, Part b, Part sum) { return _mm256_fmadd_ps(a, b, sum); }

TARGET INLINE float greatest(Part part) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(part), _mm256_extractf128_ps(part, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Four words of two lines, the second in the upper half.
TARGET INLINE __m256 four_of_two(const void* low, const void* high) {
  const __m128 first = _mm_loadu_ps(static_cast<const float*>(low));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(first), _mm_loadu_ps(static_cast<const float*>(high)), 1);
}

// Eight lines by four words at a time, through shuffles within the halves of a register.
template <typename T>
TARGET void turn(const T* const* lines, int64_t words, uint32_t* turned) {
  for (int i = 0; i < kBlock; i += 8) {
    const T* const* eight = lines + i;
    for (int64_t word = 0; word < words; word += 4) {
      const int64_t at = word * 4 / sizeof(T);
      const __m256 a = four_of_two(eight[0] + at, eight[4] + at), b = four_of_two(eight[1] + at, eight[5] + at);
      const __m256 c = four_of_two(eight[2] + at, eight[6] + at), d = four_of_two(eight[3] + at, eight[7] + at);
      const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
      const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
      float* to = reinterpret_cast<float*>(turned + word * kBlock + i);
      _mm256_store_ps(to, _mm256_shuffle_ps(ab_low, cd_low, 0x44));
      _mm256_store_ps(to + kBlock, _mm256_shuffle_ps(ab_low, cd_low, 0xee));
      _mm256_store_ps(to + 2 * kBlock, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
      _mm256_store_ps(to + 3 * kBlock, _mm256_shuffle_ps(ab_high, cd_high, 0xee));
    }
  }
}

#include "vectors.inc"
#include "attention/attention_body.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512bw,avx2,fma")))
typedef float Part __attribute__((vector_size(64)));
constexpr int kQueries = 6;
constexpr int most_vectors(int) { return 4; }

TARGET INLINE Part spread(float value) { return _mm512_set1_ps(value); }
TARGET INLINE Part multiply_add(Part a, Part b, Part sum) { return _mm512_fmadd_ps(a, b, sum); }
TARGET INLINE float greatest(Part part) { return _mm512_reduce_max_ps(part); }

using avx2::turn;

#include "vectors.inc"
#include "attention/attention_body.inc"
#undef TARGET
}  // namespace avx512

namespace avx512_bf16 = avx512;
namespace amx_bf16 = avx512;

#endif  // x86-64

template <typename T>
void attend(const Attention<T>& call, const Task& task) {
  DISPATCH(attend, call, task);
}

}  // namespace

template <typename T>
void ragged_attention(const Attention<T>& call) {
  const bool few = call.tokens * call.kv_heads * call.size < 50'000;  // about ten microseconds of one core
  share_out(call.tokens, 16, few, [&](int64_t begin, int64_t end) { write_tokens(call, begin, end); });
  const std::vector<Run> runs = find_runs(call);
  const bool alone = cost_of(call, runs) < 100'000;  // likewise
  const std::vector<Task> tasks = find_tasks(call, runs, alone ? 1 : thread_count());
  share_out(tasks.size(), 1, alone, [&](int64_t begin, int64_t end) {
    const FlushesDenormals flushes;
    for (int64_t task = begin; task < end; task++) attend(call, tasks[task]);
  });
}

template void ragged_attention(const Attention<float>&);
template void ragged_attention(const Attention<uint16_t>&);

}  // namespace specformer
