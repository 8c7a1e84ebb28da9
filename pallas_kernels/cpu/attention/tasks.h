// How the queries of one call are shared out among threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/attention.h"

namespace specformer {
namespace {

constexpr int64_t kMostQueries = 96;  // of a task: what it keeps for them stays in the cache
constexpr int64_t kBlockCost = 3;     // what reading and turning a block costs, in queries that go over it

// Tokens of one row at adjacent positions that lie side by side: the first of them, and how many.
struct Run {
  int64_t token, tokens;
};

// A pass of some queries of a run over a KV head: queries [begin, end), which are counted token by token, a group of
// query heads each.
struct Task {
  int64_t token, kv_head, begin, end;  // token: the run's first
};

template <typename T>
bool is_nobodys(const Attention<T>& call, int64_t token) {
  const int32_t row = call.row[token], position = call.position[token];
  return position < 0 || row < 0 || row >= call.rows || call.tables == 0 || call.pages == 0;
}

template <typename T>
std::vector<Run> find_runs(const Attention<T>& call) {
  std::vector<Run> runs;
  for (int64_t token = 0; token < call.tokens; token++) {
    if (is_nobodys(call, token)) continue;
    const bool follows = !runs.empty() && runs.back().token + runs.back().tokens == token &&
                         call.row[token - 1] == call.row[token] && call.position[token - 1] + 1 == call.position[token];
    if (follows) runs.back().tokens++;
    else runs.push_back({token, 1});
  }
  return runs;
}

// How many positions a token attends to: what lies past the last page of its row is nowhere.
template <typename T>
int64_t context_of(const Attention<T>& call, int64_t token) {
  return std::min<int64_t>(call.position[token] + int64_t{1}, call.tables * call.page_size);
}

// Cuts a run's queries into as many pieces as keep all threads busy, without turning its keys too often.
int64_t pieces_of(int64_t queries, int64_t passes, int64_t threads) {
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t pieces = (queries + kMostQueries - 1) / kMostQueries, i = 0; i < threads && pieces <= queries; i++) {
    const int64_t turns = (passes * pieces + threads - 1) / threads;
    const int64_t cost = turns * (kBlockCost + (queries + pieces - 1) / pieces);
    if (cost < least) best = pieces, least = cost;
    pieces++;
  }
  return best;
}

template <typename T>
std::vector<Task> find_tasks(const Attention<T>& call, const std::vector<Run>& runs, int64_t threads) {
  const int64_t group = call.heads / call.kv_heads, passes = static_cast<int64_t>(runs.size()) * call.kv_heads;
  std::vector<Task> tasks;
  for (const Run& run : runs) {
    const int64_t queries = run.tokens * group, pieces = pieces_of(queries, passes, threads);
    for (int64_t piece = pieces - 1; piece >= 0; piece--) {  // the last ones attend to the most
      for (int64_t kv_head = 0; kv_head < call.kv_heads; kv_head++) {
        tasks.push_back({run.token, kv_head, queries * piece / pieces, queries * (piece + 1) / pieces});
      }
    }
  }
  return tasks;
}

// About how long it takes, in products of an element of a query.
template <typename T>
int64_t cost_of(const Attention<T>& call, const std::vector<Run>& runs) {
  const int64_t group = call.heads / call.kv_heads;
  int64_t cost = 0;
  for (const Run& run : runs) {
    cost += context_of(call, run.token + run.tokens - 1) * (kBlockCost + run.tokens * group);
  }
  return cost * call.kv_heads * call.size;
}

}  // namespace
}  // namespace specformer
