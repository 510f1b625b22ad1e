// Integer dot products with AVX-512 VNNI: a code is a byte after a shift and a mask, and
// `vpdpbusd` multiplies four of them with four signed bytes of the activations.
#if defined(__x86_64__)
#include "int8_avx512.h"

#include "avx512.h"

namespace camera {
namespace avx512 {
namespace {

constexpr int64_t kAhead = 3072;  // bytes of codes to fetch ahead; measured

// In assembly, because gcc 12 spills the sums of the intrinsic.
CAMERA_INLINE Words dot(Words sum, Words codes, Words a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(a));
  return sum;
}

CAMERA_INLINE Words broadcast_quad(const int8_t* quad) {
  int32_t four;
  std::memcpy(&four, quad, 4);
  return _mm512_set1_epi32(four);
}

CAMERA_INLINE Words load_words(const uint8_t* at, __mmask16 lanes) {
  return lanes == 0xffff ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(lanes, at);
}

// The codes of quad Q of a unit, a byte each. Words are loaded again for every quad: they are in
// level 1, and the sums leave no registers for them.
template <int kBits, int Q>
CAMERA_INLINE Words codes_of(const uint8_t* unit, int64_t word_bytes, __mmask16 lanes) {
  constexpr int kLow = low_plane_bits(kBits), kPerWord = quads_per_word(kLow);
  constexpr int kShift = Q % kPerWord * kLow;
  Words codes = load_words(unit + Q / kPerWord * word_bytes, lanes);
  if (kShift) codes = _mm512_srli_epi32(codes, kShift);
  codes = _mm512_and_si512(codes, _mm512_set1_epi8((1 << kLow) - 1));
  if (kBits == 3) {
    Words high = load_words(unit + 2 * word_bytes, lanes);
    if (Q < 2) high = _mm512_slli_epi32(high, 2 - Q);
    if (Q > 2) high = _mm512_srli_epi32(high, Q - 2);
    codes = _mm512_ternarylogic_epi32(codes, high, _mm512_set1_epi8(4), 0xf8);  // codes | high & 4
  }
  return codes;
}

// Where the N vectors of lanes of a unit lie: word w of vector n at `w * word_bytes + offset[n]`.
template <int N>
struct Lanes {
  int64_t word_bytes;
  int64_t offset[N];
  __mmask16 mask[N];
};

template <int kBits, int M, int N, int Q, bool kFull>
CAMERA_INLINE void multiply_quad(const uint8_t* unit, const Lanes<N>& lanes,
                                 const int8_t* const* a, int64_t first, Words (&sums)[M][N]) {
  asm volatile("" : "+r"(unit));  // or words of the quad before are kept
  Words codes[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
    codes[n] = codes_of<kBits, Q>(unit + lanes.offset[n], lanes.word_bytes,
                                  kFull ? 0xffff : lanes.mask[n]);
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    const Words four = broadcast_quad(a[m] + first + 4 * Q);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = dot(sums[m][n], codes[n], four);
  }
}

template <int kBits, int M, int N, bool kFull>
CAMERA_INLINE void multiply_unit(const uint8_t* unit, const Lanes<N>& lanes,
                                 const int8_t* const* a, int64_t first, Words (&sums)[M][N]) {
  multiply_quad<kBits, M, N, 0, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 1, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 2, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 3, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 4, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 5, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 6, kFull>(unit, lanes, a, first, sums);
  multiply_quad<kBits, M, N, 7, kFull>(unit, lanes, a, first, sums);
}

// ---- gate and up

// A group's sums, scaled and shifted by its grid.
template <int M, int H>
CAMERA_INLINE void add_to_totals(const PanelTile& tile, const float* const* scales,
                                 const float* const* x_sums, int64_t group, const Grid& grid,
                                 const Words (&sums)[M][2 * H]) {
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    const Vec scale = _mm512_set1_ps(scales[m][group]), sum = _mm512_set1_ps(x_sums[m][group]);
#pragma GCC unroll 4
    for (int n = 0; n < 2 * H; ++n) {
      const int vector = n / H * 2 + n % H;
      float* to = total_at(tile, m, vector);
      const Vec scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[m][n]), scale);
      Vec total = _mm512_fmadd_ps(scaled, grid.scale[vector], _mm512_loadu_ps(to));
      total = _mm512_fmadd_ps(sum, grid.zero[vector], total);
      _mm512_storeu_ps(to, total);
    }
  }
}

template <int kBits, int M, int H, bool kFull>
void panel_tile(const PanelTile& tile) {
  const Shape& shape = tile.job.shape;
  const Int8Inputs& x8 = tile.job.x8;
  const int64_t rows = kFull ? kPanelRows : shape.rows, size = shape.group_size;
  const int8_t* a[M];
  const float *scales[M], *x_sums[M];
  for (int m = 0; m < M; ++m) {
    a[m] = x8.codes + tile.token(m) * shape.d_model;
    scales[m] = x8.scales + tile.token(m) * shape.groups();
    x_sums[m] = x8.sums + tile.token(m) * shape.groups();
  }
  Lanes<2 * H> lanes{8 * rows, {}, {}};
  for (int n = 0; n < 2 * H; ++n) {
    lanes.offset[n] = (n / H * rows + n % H * kLanes) * 4;
    lanes.mask[n] = first_lanes(rows - n % H * kLanes);
  }
  const int64_t unit_bytes = kBits * 8 * rows;
  const uint8_t* unit = tile.job.panel;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    const uint8_t* grid = unit;
    unit += 8 * rows;
    Words sums[M][2 * H] = {};
    for (int64_t i = group * size; i < (group + 1) * size; i += kUnit, unit += unit_bytes) {
      if (tile.first == 0)
        for (int64_t line = 0; line < unit_bytes; line += 64)
          _mm_prefetch(unit + kAhead + line, _MM_HINT_T0);
      multiply_unit<kBits, M, 2 * H, kFull>(unit, lanes, a, i, sums);
    }
    add_to_totals<M, H>(tile, scales, x_sums, group, read_grid(grid, rows), sums);
  }
}

using PanelFunction = void (*)(const PanelTile&);

template <int kBits, int H, bool kFull>
constexpr PanelFunction kPanelTiles[kTile + 1] = {
    nullptr,
    panel_tile<kBits, 1, H, kFull>,
    panel_tile<kBits, 2, H, kFull>,
    panel_tile<kBits, 3, H, kFull>,
    panel_tile<kBits, 4, H, kFull>,
    panel_tile<kBits, 5, H, kFull>,
    panel_tile<kBits, 6, H, kFull>,
};

template <int kBits>
void panel(const GateUpJob& job, float* totals) {
  const int64_t rows = job.shape.rows, size = tile_size(job.routed.count, kTile);
  const PanelFunction* tiles = rows == kPanelRows  ? kPanelTiles<kBits, 2, true>
                               : rows > kLanes     ? kPanelTiles<kBits, 2, false>
                                                   : kPanelTiles<kBits, 1, false>;
  for (int64_t first = 0; first < job.routed.count; first += size) {
    const int64_t left = job.routed.count - first, count = left < size ? left : size;
    tiles[count]({job, first, count, totals + first * 2 * kPanelRows});
  }
}

// ---- down

// Where a tile's sums go, and what its integer sums are scaled with.
struct DownTile {
  const int8_t* a[kTile];
  float scale[kTile];
  float* sums[kTile];
};

// S column blocks of 32 of a tier.
template <int kBits, int M, int S>
void columns(const DownTile& tile, int64_t column, const uint8_t* unit, int64_t block_bytes,
             int64_t rows) {
  Lanes<2 * S> lanes{kBlockCols * 4, {}, {}};
  for (int n = 0; n < 2 * S; ++n) lanes.offset[n] = n / 2 * block_bytes + n % 2 * 64;
  Words sums[M][2 * S] = {};
  constexpr int64_t kUnitBytes = kBits * kBlockCols * 4;
  for (int64_t row = 0; row < rows; row += kUnit, unit += kUnitBytes) {
    for (int s = 0; s < S; ++s)
      for (int64_t line = 0; line < kUnitBytes; line += 64)
        _mm_prefetch(unit + s * block_bytes + kAhead + line, _MM_HINT_T0);
    multiply_unit<kBits, M, 2 * S, true>(unit, lanes, tile.a, row, sums);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    const Vec scale = _mm512_set1_ps(tile.scale[m]);
    float* to = tile.sums[m] + column;
#pragma GCC unroll 4
    for (int n = 0; n < 2 * S; ++n, to += kLanes)
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m][n]), scale, _mm512_loadu_ps(to)));
  }
}

using Columns = void (*)(const DownTile&, int64_t, const uint8_t*, int64_t, int64_t);

template <int kBits, int S>
constexpr Columns kColumns[kTile + 1] = {
    nullptr,
    columns<kBits, 1, S>,
    columns<kBits, 2, S>,
    columns<kBits, 3, S>,
    columns<kBits, 4, S>,
    columns<kBits, 5, S>,
    columns<kBits, 6, S>,
};

template <int S>
CAMERA_INLINE const Columns* columns_of(int64_t bits) {
  switch (bits) {
    case 4: return kColumns<4, S>;
    case 3: return kColumns<3, S>;
    case 2: return kColumns<2, S>;
    default: return kColumns<1, S>;
  }
}

// 16 values as signed bytes, the weights of each quad in the order of a word's bytes.
CAMERA_INLINE void store_quads(int8_t* to, Words values) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_shuffle_epi8(_mm512_cvtepi32_epi8(values), order));
}

struct Scaled {
  float scale;  // of the codes
  float shift;  // what every output gets beside the codes' sums
};

// a[j] = hidden[j] * scales[j] in steps of 1/127 of the largest. The shift is the sum of
// hidden[j] * zeros[j], and what rounding took away, times the middle of all codes.
CAMERA_INLINE Scaled scale_hidden(const float* hidden, const float* scales, const float* zeros,
                                  int64_t rows, float middle, int8_t* a) {
  // Of both halves of a unit, or each sum would wait for the one before.
  Vec largest[2] = {}, shift[2] = {}, sum[2] = {};
  for (int64_t j = 0; j < rows; j += 2 * kLanes)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t i = j + half * kLanes;
      const Vec h = _mm512_loadu_ps(hidden + i), scaled = _mm512_mul_ps(h, _mm512_loadu_ps(scales + i));
      largest[half] = _mm512_max_ps(largest[half], _mm512_abs_ps(scaled));
      shift[half] = _mm512_fmadd_ps(h, _mm512_loadu_ps(zeros + i), shift[half]);
      sum[half] = _mm512_add_ps(sum[half], scaled);
    }
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
  const Vec inverse = _mm512_set1_ps(most >= 1e-30f ? 127 / most : 0);
  Words total[2] = {};
  for (int64_t j = 0; j < rows; j += 2 * kLanes)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t i = j + half * kLanes;
      const Vec scaled = _mm512_mul_ps(_mm512_loadu_ps(hidden + i), _mm512_loadu_ps(scales + i));
      const Words codes = _mm512_cvtps_epi32(_mm512_mul_ps(scaled, inverse));
      total[half] = _mm512_add_epi32(total[half], codes);
      store_quads(a + i, codes);
    }
  // One sum of all lanes: what was rounded away, in the middle of the codes, and the zeros' part.
  const Vec step = _mm512_set1_ps(most / 127);
  const Vec kept = _mm512_cvtepi32_ps(_mm512_add_epi32(total[0], total[1]));
  const Vec lost = _mm512_fnmadd_ps(kept, step, _mm512_add_ps(sum[0], sum[1]));
  const Vec all = _mm512_fmadd_ps(lost, _mm512_set1_ps(middle), _mm512_add_ps(shift[0], shift[1]));
  return {most / 127, _mm512_reduce_add_ps(all)};
}

struct DownScratch {
  float* scales;  // of all tiers, one after another
  float* zeros;
  int8_t* a;      // [kTile][rows]
  int64_t rows;   // of all tiers
};

CAMERA_INLINE void down_tile(const DownJob& job, int64_t first, int64_t tokens, int64_t column,
                             int64_t num_columns, const DownScratch& scratch) {
  alignas(64) float sums[kTile][kMostColumns];
  DownTile tile;
  float shift[kTile] = {};
  for (int64_t m = 0; m < tokens; ++m) {
    std::memset(sums[m], 0, num_columns * 4);
    tile.sums[m] = sums[m];
    for (int64_t c = 0; c < num_columns; c += kLanes)
      _mm_prefetch(sums_of(job, first + m) + column - job.column + c, _MM_HINT_T1);
  }
  int64_t done = 0;
  for (const DownBlock* block = job.blocks; block < job.blocks + job.num_blocks; ++block) {
    const int64_t rows = block->shape.down_rows(), block_bytes = block->shape.down_block_bytes();
    const float middle = static_cast<float>((1 << block->shape.bits) - 1) / 2;
    for (int64_t m = 0; m < tokens; ++m) {
      int8_t* a = scratch.a + m * scratch.rows + done;
      const auto* hidden = reinterpret_cast<const float*>(
          block->hidden + job.routed.row[first + m] * job.hidden_stride);
      const Scaled scaled =
          scale_hidden(hidden, scratch.scales + done, scratch.zeros + done, rows, middle, a);
      shift[m] += scaled.shift;
      tile.scale[m] = scaled.scale;
      tile.a[m] = a;
    }
    const uint8_t* codes = block->packed + column / kBlockCols * block_bytes;
    int64_t c = 0;
    for (; c + 2 * kBlockCols <= num_columns; c += 2 * kBlockCols, codes += 2 * block_bytes)
      columns_of<2>(block->shape.bits)[tokens](tile, c, codes, block_bytes, rows);
    if (c < num_columns) columns_of<1>(block->shape.bits)[tokens](tile, c, codes, block_bytes, rows);
    done += rows;
  }
  for (int64_t m = 0; m < tokens; ++m) {
    float* to = sums_of(job, first + m) + column - job.column;
    for (int64_t c = 0; c < num_columns; c += kLanes) {
      const Vec sum = _mm512_add_ps(_mm512_load_ps(sums[m] + c), _mm512_set1_ps(shift[m]));
      _mm512_storeu_ps(to + c, _mm512_add_ps(_mm512_loadu_ps(to + c), sum));
    }
  }
}

}  // namespace

bool quantize_x(const uint16_t* x, int64_t token, const Shape& shape, const Int8Inputs& to) {
  bool spiky = false;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    const int64_t start = token * shape.d_model + group * shape.group_size;
    Vec largest = _mm512_setzero_ps(), absolutes = largest;
    const auto load = [&](int64_t i) CAMERA_LAMBDA {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + start + i));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    };
    for (int64_t i = 0; i < shape.group_size; i += kLanes) {
      const Vec value = _mm512_abs_ps(load(i));
      largest = _mm512_max_ps(largest, value);
      absolutes = _mm512_add_ps(absolutes, value);
    }
    const Spread spread{_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(absolutes)};
    spiky |= is_spiky(spread, shape.group_size);
    const Vec inverse = _mm512_set1_ps(spread.largest >= 1e-30f ? 127 / spread.largest : 0);
    Words sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < shape.group_size; i += kLanes) {
      const Words codes = _mm512_cvtps_epi32(_mm512_mul_ps(load(i), inverse));
      sum = _mm512_add_epi32(sum, codes);
      store_quads(to.codes + start + i, codes);
    }
    const int64_t at = token * shape.groups() + group;
    to.scales[at] = spread.largest / 127;
    to.sums[at] = to.scales[at] * static_cast<float>(_mm512_reduce_add_epi32(sum));
  }
  return spiky;
}

void gate_up_int8(const GateUpJob& job) {
  float* totals = reinterpret_cast<float*>(job.scratch);
  std::memset(totals, 0, job.routed.count * 2 * kPanelRows * 4);
  switch (job.shape.bits) {
    case 4: panel<4>(job, totals); break;
    case 3: panel<3>(job, totals); break;
    case 2: panel<2>(job, totals); break;
    case 1: panel<1>(job, totals); break;
  }
  activate(job, totals);
}

void down_int8(const DownJob& job) {
  int64_t rows = 0;
  for (int64_t b = 0; b < job.num_blocks; ++b) rows += job.blocks[b].shape.down_rows();
  auto* scales = reinterpret_cast<float*>(job.scratch);
  const DownScratch scratch{scales, scales + rows, reinterpret_cast<int8_t*>(scales + 2 * rows), rows};
  const int64_t size = tile_size(job.routed.count, kTile), end = job.column + job.num_columns;
  for (int64_t column = job.column, stop; column < end; column = stop) {
    const int64_t group = column / job.group_size;
    stop = (group + 1) * job.group_size < end ? (group + 1) * job.group_size : end;
    if (stop - column > kMostColumns) stop = column + kMostColumns;
    int64_t done = 0;
    for (int64_t b = 0; b < job.num_blocks; ++b) {
      read_down_grid(job.blocks[b], group, scales + done, scales + rows + done);
      done += job.blocks[b].shape.down_rows();
    }
    for (int64_t first = 0; first < job.routed.count; first += size) {
      const int64_t more = job.routed.count - first;
      down_tile(job, first, more < size ? more : size, column, stop - column, scratch);
    }
  }
}

}  // namespace avx512
}  // namespace camera
#endif
