// What the machine can do at most: bytes read from memory, and multiply-adds of bf16 pairs.
// Built for the machine it runs on; `multiply_add` returns 0 where there is no such instruction.
#include <cstdint>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLine = 8;  // words
constexpr int kAccumulators = 16;

// Several places at once, because one stream alone does not keep every core's memory busy.
uint64_t read_part(const uint64_t* words, int64_t count, int64_t streams) {
  uint64_t sums[4 * kLine] = {};
  const int64_t step = 4 * kLine, length = count / streams / step * step;
  for (int64_t at = 0; at < length; at += step)
    for (int64_t stream = 0; stream < streams; ++stream) {
      const uint64_t* block = words + stream * length + at;
      for (int64_t i = 0; i < step; ++i) sums[i] += block[i];
    }
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  for (int64_t i = streams * length; i < count; ++i) sum += words[i];
  return sum;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The sum of `count` words, each thread reading its own part in `streams` places.
uint64_t read_words(const uint64_t* words, int64_t count, int64_t streams, int64_t threads) {
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t start = count * part / threads, end = count * (part + 1) / threads;
    sum += read_part(words + start, end - start, streams);
  }
  return sum;
}

// Floating-point operations done by all threads in `rounds` rounds, in registers alone.
int64_t multiply_add(int64_t rounds, int64_t threads) {
#ifdef __AVX512BF16__
#pragma omp parallel num_threads(threads)
  {
    __m512 sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512i pairs = _mm512_setzero_si512();
    for (int64_t round = 0; round < rounds; ++round) {
      // Without this the compiler sees that every round does the same.
      asm volatile("" : "+v"(pairs));
      for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)pairs);
    }
    for (auto& sum : sums) asm volatile("" : : "v"(sum));
  }
  return rounds * threads * kAccumulators * 64;
#else
  (void)rounds, (void)threads;
  return 0;
#endif
}

}  // extern "C"
#pragma GCC visibility pop
