// The token of each row: logits over temperature plus noise, the highest of them, and the softmax beside it.
//
// A row is looked at a tile of columns at a time, tiles begin at multiples of their size, and what they gave is put
// together in their order: the same bits whatever else is sampled, and however tiles were shared out. Rows that are
// greedy draw no noise.

#include "sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bodies.h"
#include "isa.h"
#include "product/product.h"
#include "threads.h"

namespace specformer {
namespace {

constexpr int64_t kTile = 256;  // columns
constexpr float kNone = -std::numeric_limits<float>::infinity();

// What a tile gave for a row.
struct Best {
  float score, top, mass;
  int32_t column;
};

// How the logits of a row are perturbed.
struct Row {
  uint32_t first_key, second_key;
  float temperature, threshold;
};

#define BODY "sampling/sampling_body.inc"
#include "sets.inc"

void look_at_tile(const Row& row, const float* logits, const int32_t* tokens, int64_t count, bool softmax, Best& best) {
  const FlushesDenormals flushes;
  DISPATCH(look_at_tile, row, logits, tokens, count, softmax, best);
}

// The winners of all tiles and rows, Best[tiles][rows].
class Tiles {
 public:
  explicit Tiles(const Sampling& call) : call_(call), best_((call.columns + kTile - 1) / kTile * call.rows) {}

  int64_t count() const { return static_cast<int64_t>(best_.size()) / std::max<int64_t>(call_.rows, 1); }

  void take(int64_t first, int64_t count, const float* logits, int64_t stride) {
    for (int64_t row = 0; row < call_.rows; row++) {
      const Row how{call_.keys[2 * row], call_.keys[2 * row + 1], call_.how[2 * row], call_.how[2 * row + 1]};
      Best& best = best_[first / kTile * call_.rows + row];
      look_at_tile(how, logits + row * stride, call_.tokens + first, count, call_.softmax, best);
      best.column += static_cast<int32_t>(first);
    }
  }

  void finish() const {
    for (int64_t row = 0; row < call_.rows; row++) {
      Best all{kNone, kNone, 0, 0};
      for (int64_t tile = 0; tile < count(); tile++) {
        const Best& best = best_[tile * call_.rows + row];
        if (best.score > all.score) all.score = best.score, all.column = best.column;
        if (std::isnan(best.score)) all.score = best.score, all.column = static_cast<int32_t>(call_.columns - 1);
        if (std::isnan(all.score)) break;
        all.top = std::max(all.top, best.top);
      }
      for (int64_t tile = 0; call_.softmax && tile < count(); tile++) {
        const Best& best = best_[tile * call_.rows + row];
        if (best.mass > 0) all.mass += best.mass * std::exp(best.top - all.top);
      }
      call_.score[row] = all.score, call_.column[row] = all.column;
      call_.top[row] = all.top, call_.mass[row] = all.mass;
    }
  }

 private:
  const Sampling& call_;
  std::vector<Best> best_;
};

}  // namespace

void best_of_logits(const Sampling& call, const float* logits) {
  Tiles tiles(call);
  const bool few = call.rows * call.columns < 50'000;  // some ten microseconds of one core
  share_out(tiles.count(), 1, few, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kTile; first < std::min(end * kTile, call.columns); first += kTile) {
      tiles.take(first, std::min(kTile, call.columns - first), logits + first, call.columns);
    }
  });
  tiles.finish();
}

void best_of_hidden(const Sampling& call, const uint16_t* hidden, int64_t inputs, const uint16_t* lm_head) {
  Tiles tiles(call);
  tiles_of_products(hidden, call.rows, inputs, lm_head, call.columns, kTile,
                    [&](int64_t first, int64_t count, const float* logits) { tiles.take(first, count, logits, kTile); });
  tiles.finish();
}

}  // namespace specformer
