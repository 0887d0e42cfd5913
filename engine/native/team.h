// Threads that share work. What is called from several of them, with the same arguments, says so.
#pragma once

#include <cstdint>

// Runs work() on all of `threads` if that is worth waking them, or else on this one alone.
template <typename Work>
inline void in_team(int threads, bool worth_it, Work work) {
    if (threads == 1 || !worth_it) return work();
#pragma omp parallel num_threads(threads)
    work();
}

// From all threads of a team: each does its share of work(0) .. work(count - 1), and waits for the others.
template <typename Work>
inline void share(int64_t count, Work work) {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < count; index++) work(index);
}

// The same for work of unequal length.
template <typename Work>
inline void share_unequal(int64_t count, Work work) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < count; index++) work(index);
}
