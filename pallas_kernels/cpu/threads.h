// A small pool of threads for the native bodies: they share out columns, heads or rows of one operation, never a sum.
//
// XLA runs independent operations of a program at the same time, and several programs may run at once: whoever finds
// the pool taken works alone. The caller never waits for a thread that has not begun, so a machine with fewer free
// cores than threads loses nothing but speed. No thread exists before the first call that needs one, and a forked
// child starts with none.
#pragma once

#include <cstdint>

namespace specformer {

// How many threads this process may use: SPECFORMER_THREADS, else its CPU affinity within the quota of its cgroup.
int thread_count();

using Work = void (*)(const void* context, int64_t begin, int64_t end);

// Calls work on disjoint parts of [0, count), each of them a multiple of `grain` long where enough is left.
void share_out(int64_t count, int64_t grain, bool alone, Work work, const void* context);

// The same for a lambda of (begin, end); `alone` keeps what is too small to share on the calling thread.
template <typename Function>
void share_out(int64_t count, int64_t grain, bool alone, const Function& function) {
  share_out(
      count, grain, alone,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Function*>(context))(begin, end); },
      &function);
}

}  // namespace specformer
