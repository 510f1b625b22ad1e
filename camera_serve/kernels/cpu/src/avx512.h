// What the bf16 and the int8 kernels for AVX-512 share.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <initializer_list>

#include "isa.h"

namespace camera {
namespace avx512 {

constexpr int kTile = 6;        // tokens whose sums stay in registers, with 4 vectors of outputs
constexpr int64_t kCodesAhead = 2048;  // bytes of codes to fetch ahead

using Vec = __m512;
using Words = __m512i;

CAMERA_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// The size of equal tiles that cover `count` tokens: 7 are 4 and 3, not 6 and 1.
CAMERA_INLINE int64_t tile_size(int64_t count, int64_t most) {
  return ceil_div(count, ceil_div(count, most));
}

CAMERA_INLINE Vec exp(Vec x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-104.0f)), _mm512_set1_ps(89.0f));
  const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  // ln 2 in two parts, so that the difference is exact.
  Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  Vec p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

CAMERA_INLINE Vec silu(Vec x) {
  const Vec one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// A panel's group: scales and zeros of gate then up, two vectors each; lanes past the end are 0.
struct Grid {
  Vec scale[4], zero[4];
};

CAMERA_INLINE Vec load_halves(const uint8_t* at, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count < 0 ? 0 : count), at));
}

CAMERA_INLINE Grid read_grid(const uint8_t* at, int64_t rows) {
  Grid grid;
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    const uint8_t* gate_or_up = at + n / 2 * 4 * rows + n % 2 * 32;
    const int64_t count = rows - n % 2 * kLanes;
    grid.scale[n] = load_halves(gate_or_up, count);
    grid.zero[n] = load_halves(gate_or_up + 2 * rows, count);
  }
  return grid;
}

struct PanelTile {
  const GateUpJob& job;
  int64_t first, count;  // routed tokens
  float* totals;         // [count][2 * 32], of the first token of the tile

  CAMERA_INLINE int64_t token(int64_t m) const { return job.routed.token[first + m]; }

  CAMERA_INLINE void rows_of_x(int64_t k, const uint16_t** a) const {
    for (int64_t m = 0; m < count; ++m) a[m] = job.x + token(m) * job.shape.d_model + k;
  }
};

CAMERA_INLINE float* total_at(const PanelTile& tile, int64_t m, int64_t vector) {
  return tile.totals + m * 2 * kPanelRows + vector * kLanes;
}

CAMERA_INLINE void activate(const GateUpJob& job, const float* totals) {
  const bool packed = is_packed(job.shape.bits);
  const int64_t filled = packed ? kPanelRows : round_up(job.shape.rows, 2);
  for (int64_t i = 0; i < job.routed.count; ++i, totals += 2 * kPanelRows) {
    const Vec weight = _mm512_set1_ps(job.routed.weight[i]);
    uint8_t* hidden = job.hidden + job.routed.row[i] * job.hidden_stride;
    Vec largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t r = 0; r < filled; r += kLanes) {
      const Vec gate = _mm512_loadu_ps(totals + r), up = _mm512_loadu_ps(totals + kPanelRows + r);
      const Vec value = _mm512_maskz_mul_ps(first_lanes(job.shape.rows - r < 0 ? 0 : job.shape.rows - r),
                                            _mm512_mul_ps(silu(gate), up), weight);
      if (packed) {
        _mm512_storeu_ps(hidden + r * 4, value);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
        sum = _mm512_add_ps(sum, _mm512_abs_ps(value));
      } else {
        _mm256_mask_storeu_epi16(hidden + r * 2, first_lanes(filled - r),
                                 (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
    if (packed) {
      const Spread spread{_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(sum)};
      std::memcpy(job.spreads + job.routed.row[i] * job.hidden_stride, &spread, sizeof spread);
    }
  }
}

CAMERA_INLINE float* sums_of(const DownJob& job, int64_t routed) {
  return job.sums + job.routed.token[routed] * job.num_columns;
}

// One group's scales and zeros of a tier, as floats `[down_rows]` each.
CAMERA_INLINE void read_down_grid(const DownBlock& block, int64_t group, float* scales,
                                  float* zeros) {
  const int64_t rows = block.shape.down_rows();
  const uint8_t* from = block.packed + block.shape.down_codes_bytes() + group * rows * 2;
  const uint8_t* zeros_from = from + block.shape.down_grid_bytes();
  for (int64_t row = 0; row < rows; row += 2 * kLanes, from += 4 * kLanes, zeros_from += 4 * kLanes) {
    _mm_prefetch(from + rows * 2, _MM_HINT_T0);  // the next group's
    _mm_prefetch(zeros_from + rows * 2, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      _mm512_storeu_ps(scales + row + half * kLanes, load_halves(from + half * 2 * kLanes, kLanes));
      _mm512_storeu_ps(zeros + row + half * kLanes, load_halves(zeros_from + half * 2 * kLanes, kLanes));
    }
  }
}

// Columns whose scales are the same, at most; one tile's sums of all tiers stay in level 1.
constexpr int64_t kMostColumns = 128;

}  // namespace avx512
}  // namespace camera
