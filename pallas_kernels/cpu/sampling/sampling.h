#pragma once

#include <cstdint>

namespace specformer {

// What decides each row's winner besides its logits, and where it goes.
struct Sampling {
  int64_t rows, columns;
  const uint32_t* keys;  // [rows, 2], of the noise
  const float* how;      // [rows, 2]: temperature and threshold
  const int32_t* tokens; // [columns], what the noise of a column is drawn for
  bool softmax;          // whether top and mass are wanted
  float* score;          // [rows], the largest perturbed logit; NaN if some logit of the row is
  int32_t* column;       // the lowest column that has it; the last one for NaN
  float *top, *mass;     // the largest logit, and the sum of e^(logit - top)
};

// The winners among logits f32[rows, columns].
void best_of_logits(const Sampling& call, const float* logits);

// The winners among the logits hidden bf16[rows, inputs] @ the transpose of lm_head bf16[columns, inputs], of which no
// more than a tile is ever in memory.
void best_of_hidden(const Sampling& call, const uint16_t* hidden, int64_t inputs, const uint16_t* lm_head);

}  // namespace specformer
