// AVX-512 with BF16: 32 products an instruction, codes looked up as bf16 in a register.
#if defined(__x86_64__)
#include "avx512.h"
#include "int8_avx512.h"

namespace camera {
namespace {

using namespace avx512;

constexpr int64_t kDenseBlock = 4096;  // summed weights of a panel that level 2 should hold as bf16
constexpr int64_t kDownRows = 2048;    // 16-bit rows of down whose columns level 2 should hold
constexpr int64_t kUnpackFrom = 48;    // tokens for which a panel of codes is unpacked first

CAMERA_INLINE Words broadcast_pair(const uint16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, 4);
  return _mm512_set1_epi32(both);
}

CAMERA_INLINE Vec dot(Vec sum, Words a, Words b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// What a tile fetches into level 2 while it computes: nothing, its own weights a little ahead, or
// what comes after its weights, which a tile before it has fetched.
enum class Fetch { none, ahead, next };

// Where a tile's weights lie: two streams (gate and up, or two column blocks), each of up to two
// vectors a pair.
struct Streams {
  const uint8_t* first;
  const uint8_t* second;
  int64_t step;       // bytes from pair to pair
  int64_t pairs;
  __mmask16 last;     // lanes of a stream's last vector
  Fetch fetch;
  const uint8_t* next;   // with Fetch::next: what to fetch, so many cache lines a pair, over the
  int64_t next_lines;    // first pairs
  int64_t next_pairs;
};

// Bytes; measured.
template <int M>
constexpr int64_t kAhead = M == 1 ? 3072 : 1024;

// sums[m][s * H + h] += a[m] · stream s, vector h; S streams of H vectors, for M tokens.
template <int M, int S, int H, bool kFull, Fetch kFetch>
CAMERA_INLINE void multiply(const uint16_t* const* a, const Streams& w, int64_t from, int64_t to,
                            Vec (&sums)[M][S * H]) {
  const uint8_t* streams[2] = {w.first, w.second};
  for (int64_t pair = from; pair < to; ++pair) {
    Words b[S * H];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const uint8_t* at = streams[s] + pair * w.step + h * 64;
        b[s * H + h] = kFull || h + 1 < H ? _mm512_loadu_si512(at)
                                          : _mm512_maskz_loadu_epi32(w.last, at);
        if (kFetch == Fetch::ahead) _mm_prefetch(at + kAhead<M>, _MM_HINT_T1);
      }
    if (kFetch == Fetch::next)
      for (int64_t i = 0; i < w.next_lines; ++i)
        _mm_prefetch(w.next + (pair * w.next_lines + i) * 64, _MM_HINT_T1);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Words x = broadcast_pair(a[m] + 2 * pair);
#pragma GCC unroll 4
      for (int n = 0; n < S * H; ++n) sums[m][n] = dot(sums[m][n], x, b[n]);
    }
  }
}

template <int M, int S, int H, bool kFull>
CAMERA_INLINE void multiply(const uint16_t* const* a, const Streams& w, Vec (&sums)[M][S * H]) {
  switch (w.fetch) {
    case Fetch::ahead: multiply<M, S, H, kFull, Fetch::ahead>(a, w, 0, w.pairs, sums); break;
    case Fetch::next:
      multiply<M, S, H, kFull, Fetch::next>(a, w, 0, w.next_pairs, sums);
      multiply<M, S, H, kFull, Fetch::none>(a, w, w.next_pairs, w.pairs, sums);
      break;
    case Fetch::none: multiply<M, S, H, kFull, Fetch::none>(a, w, 0, w.pairs, sums); break;
  }
}

// How the tiles over one block of weights share the fetching of `next`. One tile alone reads its
// weights from memory and fetches those.
struct FetchPlan {
  int64_t tiles;
  const uint8_t* next;
  int64_t lines;

  CAMERA_INLINE int64_t share() const { return ceil_div(lines, tiles); }

  CAMERA_INLINE void apply(int64_t tile, Streams& w) const {
    w.fetch = tiles == 1 ? Fetch::ahead : next && lines ? Fetch::next : Fetch::none;
    if (w.fetch != Fetch::next) return;
    w.next_lines = ceil_div(share(), w.pairs);
    w.next_pairs = ceil_div(share(), w.next_lines);
    w.next = next + tile * share() * 64;
  }
};

// Codes 0, 1, 2 … as bf16. `vpermw` looks at 5 bits of an index and a code is its lowest ones, so
// the table repeats.
template <int kBits>
CAMERA_INLINE Words code_table(int step) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const float value = static_cast<float>((i & ((1 << kBits) - 1)) * step);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    table[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(table);
}

// The weights of pair `pair` of a unit, from its words `[bits]`. Eight bits are two lots of four.
template <int kBits>
struct Codes {
  static constexpr int kLots = kBits == 8 ? 2 : 1;
  Words table[kLots];

  CAMERA_INLINE Codes() {
    table[0] = code_table<kBits == 8 ? 4 : kBits>(1);
    if (kBits == 8) table[kLots - 1] = code_table<4>(16);
  }

  CAMERA_INLINE Words at(const Words* words, int pair, int lot) const {
    constexpr int kLow = low_plane_bits(kBits), kPerWord = quads_per_word(kLow);
    const int quad = pair / 2, byte = pair % 2 * 8;
    const Words word = words[quad / kPerWord];
    const int shift = quad % kPerWord * kLow + byte + lot * 4;
    Words code = shift ? _mm512_srli_epi16(word, shift) : word;
    if (kBits == 3) {
      // Above its lowest two bits come those of the second plane, and what the table ignores.
      const int to = quad + byte - 2;
      const Words high = to < 0 ? _mm512_slli_epi16(words[2], -to) : _mm512_srli_epi16(words[2], to);
      code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), code, high, 0xca);
    }
    return _mm512_permutexvar_epi16(code, table[lot]);
  }
};

// The weights of pair `pair` of a unit as one bf16 each: eight bits fill its significand.
template <int kBits>
CAMERA_INLINE Words whole_codes(const Codes<kBits>& codes, const Words* words, int pair) {
  if (kBits != 8) return codes.at(words, pair, 0);
  const Words word = _mm512_srli_epi16(words[pair / 2], pair % 2 * 8);
  const Words mask = _mm512_set1_epi32(0xff);
  const Vec even = _mm512_cvtepi32_ps(_mm512_and_si512(word, mask));
  const Vec odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(word, 16), mask));
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                         _mm512_castps_si512(odd));
}

// sums[m][n] += a[m] · the unit's codes, for N vectors of lanes; word w of vector n at
// `unit + w * word_bytes + offsets[n]`.
template <int kBits, int M, int N>
CAMERA_INLINE void multiply_unit(const Codes<kBits>& codes, const uint8_t* unit,
                                 int64_t word_bytes, const int64_t (&offsets)[N],
                                 const __mmask16 (&lanes)[N], const uint16_t* const* a,
                                 int64_t first, Vec (&sums)[M][N]) {
  constexpr int kLow = low_plane_bits(kBits), kPairsPerWord = 2 * quads_per_word(kLow);
  Words words[N][kBits];
  const auto load = [&](int w) CAMERA_LAMBDA {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      words[n][w] = _mm512_maskz_loadu_epi32(lanes[n], unit + w * word_bytes + offsets[n]);
  };
  if (kLow < kBits) load(kBits - 1);
#pragma GCC unroll 16
  for (int pair = 0; pair < kUnitPairs; ++pair) {
    if (pair % kPairsPerWord == 0) load(pair / kPairsPerWord);
#pragma GCC unroll 2
    for (int lot = 0; lot < Codes<kBits>::kLots; ++lot) {
      Words b[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) b[n] = codes.at(words[n], pair, lot);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const Words x = broadcast_pair(a[m] + first + 2 * pair);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = dot(sums[m][n], x, b[n]);
      }
    }
  }
}

// ---- gate and up

template <int M, int H>
CAMERA_INLINE void add_to_totals(const PanelTile& tile, const Vec (&sums)[M][2 * H]) {
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * H; ++n) {
      float* at = total_at(tile, m, n / H * 2 + n % H);
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[m][n]));
    }
  }
}

// A group's sums, scaled and shifted by its grid.
template <int M, int H>
CAMERA_INLINE void add_to_totals(const PanelTile& tile, const Vec (&sums)[M][2 * H],
                                 const Grid& grid, int64_t group) {
  const int64_t groups = tile.job.shape.groups();
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    const Vec x_sum =
        _mm512_set1_ps(tile.job.x_sums[tile.job.routed.token[tile.first + m] * groups + group]);
#pragma GCC unroll 4
    for (int n = 0; n < 2 * H; ++n) {
      const int vector = n / H * 2 + n % H;
      float* at = total_at(tile, m, vector);
      Vec total = _mm512_fmadd_ps(sums[m][n], grid.scale[vector], _mm512_loadu_ps(at));
      total = _mm512_fmadd_ps(x_sum, grid.zero[vector], total);
      _mm512_storeu_ps(at, total);
    }
  }
}

template <int M, int H, bool kFull>
void panel_tile(const PanelTile& tile, int64_t k, const Streams& weights) {
  const uint16_t* a[M];
  tile.rows_of_x(k, a);
  Vec sums[M][2 * H] = {};
  multiply<M, 2, H, kFull>(a, weights, sums);
  add_to_totals<M, H>(tile, sums);
}

using PanelFunction = void (*)(const PanelTile&, int64_t, const Streams&);

template <int H, bool kFull>
constexpr PanelFunction kPanelTiles[kTile + 1] = {
    nullptr,
    panel_tile<1, H, kFull>,
    panel_tile<2, H, kFull>,
    panel_tile<3, H, kFull>,
    panel_tile<4, H, kFull>,
    panel_tile<5, H, kFull>,
    panel_tile<6, H, kFull>,
};

CAMERA_INLINE void panel_tiles(const GateUpJob& job, const PanelFunction* tiles, int64_t k,
                               Streams weights, const FetchPlan& plan, float* totals) {
  const int64_t size = tile_size(job.routed.count, kTile);
  for (int64_t first = 0; first < job.routed.count; first += size) {
    const int64_t left = job.routed.count - first, count = left < size ? left : size;
    plan.apply(first / size, weights);
    tiles[count]({job, first, count, totals + first * 2 * kPanelRows}, k, weights);
  }
}

void gate_up_16(const GateUpJob& job, float* totals) {
  const int64_t rows = job.shape.rows, pair_bytes = 8 * rows;
  const PanelFunction* tiles = rows == kPanelRows  ? kPanelTiles<2, true>
                               : rows > kLanes     ? kPanelTiles<2, false>
                                                   : kPanelTiles<1, false>;
  const __mmask16 last = first_lanes(rows > kLanes ? rows - kLanes : rows);
  const int64_t num_tiles = ceil_div(job.routed.count, kTile);
  for (int64_t k = 0; k < job.shape.d_model; k += kDenseBlock) {
    const int64_t left = job.shape.d_model - k, size = left < kDenseBlock ? left : kDenseBlock;
    const uint8_t* weights = job.panel + k / 2 * pair_bytes;
    const Streams streams{weights, weights + 4 * rows, pair_bytes, size / 2, last, {}, {}, {}, {}};
    // A block fetches the next one, the last block the next panel's first.
    const bool is_last = left <= kDenseBlock;
    const int64_t bytes = size / 2 * pair_bytes;
    const FetchPlan plan{num_tiles, is_last ? job.next : weights + bytes,
                         ceil_div(is_last && job.next_bytes < bytes ? job.next_bytes : bytes, 64)};
    panel_tiles(job, tiles, k, streams, plan, totals);
  }
}

template <int kBits, int M, int H>
void codes_tile(const PanelTile& tile, int64_t k, const uint8_t* unit, const Grid& grid,
                 int64_t group) {
  const Codes<kBits> codes;
  const int64_t rows = tile.job.shape.rows;
  const uint16_t* a[M];
  tile.rows_of_x(k, a);
  int64_t offsets[2 * H];
  __mmask16 lanes[2 * H];
  for (int n = 0; n < 2 * H; ++n) {
    offsets[n] = (n / H * rows + n % H * kLanes) * 4;
    lanes[n] = first_lanes(rows - n % H * kLanes);
  }
  Vec sums[M][2 * H] = {};
  for (int64_t i = 0; i < tile.job.shape.group_size; i += kUnit, unit += kBits * 8 * rows)
    multiply_unit<kBits, M, 2 * H>(codes, unit, 8 * rows, offsets, lanes, a, i, sums);
  add_to_totals<M, H>(tile, sums, grid, group);
}

using CodesFunction = void (*)(const PanelTile&, int64_t, const uint8_t*, const Grid&, int64_t);

template <int kBits, int H>
constexpr CodesFunction kCodesTiles[kTile + 1] = {
    nullptr,
    codes_tile<kBits, 1, H>,
    codes_tile<kBits, 2, H>,
    codes_tile<kBits, 3, H>,
    codes_tile<kBits, 4, H>,
    codes_tile<kBits, 5, H>,
    codes_tile<kBits, 6, H>,
};

template <int kBits>
void gate_up_codes(const GateUpJob& job, float* totals) {
  const int64_t rows = job.shape.rows, size = tile_size(job.routed.count, kTile);
  const int64_t group_bytes = job.shape.gate_up_group_bytes();
  const CodesFunction* tiles = rows > kLanes ? kCodesTiles<kBits, 2> : kCodesTiles<kBits, 1>;
  for (int64_t group = 0; group < job.shape.groups(); ++group) {
    const uint8_t* from = job.panel + group * group_bytes;
    const Grid grid = read_grid(from, rows);
    for (int64_t line = 0; line < group_bytes; line += 64)
      _mm_prefetch(from + 2 * kCodesAhead + line, _MM_HINT_T0);
    for (int64_t first = 0; first < job.routed.count; first += size) {
      const int64_t left = job.routed.count - first, count = left < size ? left : size;
      tiles[count]({job, first, count, totals + first * 2 * kPanelRows},
                   group * job.shape.group_size, from + 8 * rows, grid, group);
    }
  }
}

// Groups of a panel from `first` on.
struct GroupRange {
  int64_t first, count;
};

// A panel's codes for many tokens: unpacked once, to `[pairs][2 * H]` vectors.
template <int kBits, int H>
void unpack_groups(const GateUpJob& job, const GroupRange& groups, Words* to) {
  const Codes<kBits> codes;
  const int64_t rows = job.shape.rows, group_bytes = job.shape.gate_up_group_bytes();
  for (int64_t g = groups.first; g < groups.first + groups.count; ++g) {
    const uint8_t* unit = job.panel + g * group_bytes + 8 * rows;
    for (int64_t k = 0; k < job.shape.group_size; k += kUnit, unit += kBits * 8 * rows) {
      for (int n = 0; n < 2 * H; ++n, ++to) {
        const int64_t row = n % H * kLanes;
        const uint8_t* from = unit + (n / H * rows + row) * 4;
        Words words[kBits];
#pragma GCC unroll 8
        for (int w = 0; w < kBits; ++w)
          words[w] = _mm512_maskz_loadu_epi32(first_lanes(rows - row), from + w * 8 * rows);
#pragma GCC unroll 16
        for (int pair = 0; pair < kUnitPairs; ++pair)
          _mm512_store_si512(to + pair * 2 * H, whole_codes<kBits>(codes, words, pair));
      }
      to += (kUnitPairs - 1) * 2 * H;
    }
  }
}

template <int M, int H>
void unpacked_tile(const PanelTile& tile, const GroupRange& groups, const Words* weights) {
  const Shape& shape = tile.job.shape;
  const auto* from = reinterpret_cast<const uint8_t*>(weights);
  Streams streams{from, from + H * 64, 2 * H * 64, shape.group_size / 2, 0xffff, Fetch::none, {}, {}, {}};
  const uint16_t* a[M];
  tile.rows_of_x(groups.first * shape.group_size, a);
  for (int64_t g = groups.first; g < groups.first + groups.count; ++g) {
    const Grid grid = read_grid(tile.job.panel + g * shape.gate_up_group_bytes(), shape.rows);
    Vec sums[M][2 * H] = {};
    multiply<M, 2, H, true, Fetch::none>(a, streams, 0, streams.pairs, sums);
    add_to_totals<M, H>(tile, sums, grid, g);
    streams.first += streams.pairs * streams.step;
    streams.second += streams.pairs * streams.step;
    for (int m = 0; m < M; ++m) a[m] += shape.group_size;
  }
}

using UnpackedFunction = void (*)(const PanelTile&, const GroupRange&, const Words*);

template <int H>
constexpr UnpackedFunction kUnpackedTiles[kTile + 1] = {
    nullptr,             unpacked_tile<1, H>, unpacked_tile<2, H>, unpacked_tile<3, H>,
    unpacked_tile<4, H>, unpacked_tile<5, H>, unpacked_tile<6, H>,
};

// Groups of which level 2 should hold the unpacked weights.
CAMERA_INLINE int64_t groups_at_once(int64_t group_size) {
  return group_size < kDenseBlock ? kDenseBlock / group_size : 1;
}

template <int kBits, int H>
void gate_up_unpacked(const GateUpJob& job, float* totals) {
  auto* unpacked = reinterpret_cast<Words*>(totals + job.routed.count * 2 * kPanelRows);
  const int64_t size = tile_size(job.routed.count, kTile);
  const int64_t all = job.shape.groups(), at_once = groups_at_once(job.shape.group_size);
  for (int64_t g = 0; g < all; g += at_once) {
    const GroupRange groups{g, all - g < at_once ? all - g : at_once};
    unpack_groups<kBits, H>(job, groups, unpacked);
    for (int64_t first = 0; first < job.routed.count; first += size) {
      const int64_t left = job.routed.count - first, count = left < size ? left : size;
      const PanelTile tile{job, first, count, totals + first * 2 * kPanelRows};
      kUnpackedTiles<H>[count](tile, groups, unpacked);
    }
  }
}

template <int kBits>
void gate_up_packed(const GateUpJob& job, float* totals) {
  if (job.routed.count < kUnpackFrom) {
    gate_up_codes<kBits>(job, totals);
  } else if (job.shape.rows > kLanes) {
    gate_up_unpacked<kBits, 2>(job, totals);
  } else {
    gate_up_unpacked<kBits, 1>(job, totals);
  }
}

void gate_up(const GateUpJob& job) {
  float* totals = reinterpret_cast<float*>(job.scratch);
  std::memset(totals, 0, job.routed.count * 2 * kPanelRows * 4);
  switch (job.shape.bits) {
    case 16: gate_up_16(job, totals); break;
    case 8: gate_up_packed<8>(job, totals); break;
    case 4: gate_up_packed<4>(job, totals); break;
    case 3: gate_up_packed<3>(job, totals); break;
    case 2: gate_up_packed<2>(job, totals); break;
    case 1: gate_up_packed<1>(job, totals); break;
  }
  activate(job, totals);
}

// ---- down

// Where a tile's sums go: token m's from `sums[m]`, counted from the range's first column.
struct DownTile {
  const uint16_t* a[kTile];  // activations of the tile's tokens
  float* sums[kTile];
};

// A token's sums are wherever its last expert left them, most often not near.
template <int M, int N>
CAMERA_INLINE void fetch_sums(const DownTile& tile, int64_t column) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) _mm_prefetch(tile.sums[m] + column + n * kLanes, _MM_HINT_T0);
}

template <int M, int N>
CAMERA_INLINE void add_to_sums(const DownTile& tile, int64_t column, const Vec (&sums)[M][N]) {
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    float* at = tile.sums[m] + column;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n, at += kLanes)
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[m][n]));
  }
}

// S column blocks of 32, rows in pairs; `odd` is a last row alone, 32 bf16 a block, or null.
template <int M, int S>
void down_tile(const DownTile& tile, int64_t column, const Streams& weights, bool odd) {
  fetch_sums<M, 2 * S>(tile, column);
  Vec sums[M][2 * S] = {};
  multiply<M, S, 2, true>(tile.a, weights, sums);
  if (odd) {
    const uint8_t* streams[2] = {weights.first, weights.second};
    for (int n = 0; n < 2 * S; ++n) {
      const uint8_t* at = streams[n / 2] + weights.pairs * weights.step + n % 2 * 32;
      const Words b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      for (int m = 0; m < M; ++m)
        sums[m][n] = dot(sums[m][n], broadcast_pair(tile.a[m] + 2 * weights.pairs), b);
    }
  }
  add_to_sums<M, 2 * S>(tile, column, sums);
}

using DownFunction = void (*)(const DownTile&, int64_t, const Streams&, bool);

template <int S>
constexpr DownFunction kDownTiles[kTile + 1] = {
    nullptr,          down_tile<1, S>, down_tile<2, S>, down_tile<3, S>,
    down_tile<4, S>, down_tile<5, S>, down_tile<6, S>,
};

// Outputs that one tile of tokens adds up in registers: one or two tokens wait for memory, which
// likes one stream better than two.
CAMERA_INLINE int64_t columns_at_once(int64_t tokens) { return (tokens > 2 ? 2 : 1) * kBlockCols; }

// The rows [row, row + rows) of a 16-bit tier, for the columns from `c` on and all tokens.
CAMERA_INLINE void down_columns(const DownJob& job, const DownBlock& block, int64_t row,
                                int64_t rows, int64_t c, const FetchPlan& plan) {
  const int64_t size = tile_size(job.routed.count, kTile), block_bytes = block.shape.down_block_bytes();
  const bool two = columns_at_once(size) > kBlockCols && c + kBlockCols < job.num_columns;
  const uint8_t* weights =
      block.packed + (job.column + c) / kBlockCols * block_bytes + row * kBlockCols * 2;
  Streams streams{weights, weights + block_bytes, kBlockCols * 4, rows / 2, 0xffff, Fetch::none, nullptr, 0, 0};
  for (int64_t first = 0; first < job.routed.count; first += size) {
    const int64_t more = job.routed.count - first, tokens = more < size ? more : size;
    DownTile tile;
    for (int64_t m = 0; m < tokens; ++m) {
      tile.a[m] = reinterpret_cast<const uint16_t*>(block.hidden + job.routed.row[first + m] * job.hidden_stride) + row;
      tile.sums[m] = sums_of(job, first + m);
    }
    if (rows > 1) plan.apply(first / size, streams);
    (two ? kDownTiles<2> : kDownTiles<1>)[tokens](tile, c, streams, rows % 2 != 0);
  }
}

// What the tiles over the columns from `c` on fetch: the next range of columns, then the first of
// the next chunk of rows, then the next expert's.
CAMERA_INLINE FetchPlan down_plan(const DownJob& job, const DownBlock& block, int64_t row,
                                  int64_t rows, int64_t c, int64_t num_tiles) {
  const int64_t at_once = columns_at_once(tile_size(job.routed.count, kTile));
  const int64_t block_bytes = block.shape.down_block_bytes(), row_bytes = kBlockCols * 2;
  const int64_t columns = job.num_columns < at_once ? job.num_columns : at_once;
  // Blocks of columns lie together only where the chunk is all of their rows.
  const int64_t blocks = rows == block.shape.rows ? columns / kBlockCols : 1;
  if (c + at_once < job.num_columns) {
    const uint8_t* next = block.packed + (job.column + c + at_once) / kBlockCols * block_bytes;
    return {num_tiles, next + row * row_bytes, ceil_div(blocks * rows * row_bytes, 64)};
  }
  const int64_t left = block.shape.rows - row - rows;
  if (left > 0) {
    const uint8_t* next = block.packed + job.column / kBlockCols * block_bytes;
    const int64_t then = left < kDownRows ? left : kDownRows;
    return {num_tiles, next + (row + rows) * row_bytes, ceil_div(then * row_bytes, 64)};
  }
  const int64_t bytes = job.next_bytes * columns / job.num_columns;
  return {num_tiles, job.next, ceil_div(bytes, 64)};
}

void down_16(const DownJob& job, const DownBlock& block) {
  const int64_t size = tile_size(job.routed.count, kTile), at_once = columns_at_once(size);
  const int64_t num_tiles = ceil_div(job.routed.count, size);
  for (int64_t row = 0; row < block.shape.rows; row += kDownRows) {
    const int64_t left = block.shape.rows - row, rows = left < kDownRows ? left : kDownRows;
    for (int64_t c = 0; c < job.num_columns; c += at_once)
      down_columns(job, block, row, rows, c, down_plan(job, block, row, rows, c, num_tiles));
  }
}

// a[j] = hidden[j] * scale[j] as bf16; returns the sum of hidden[j] * zero[j].
CAMERA_INLINE float scale_hidden(const float* hidden, const float* scales, const float* zeros,
                                 int64_t rows, uint16_t* a) {
  Vec shift[2] = {};
  for (int64_t j = 0; j < rows; j += 2 * kLanes) {
    Vec scaled[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t i = j + half * kLanes;
      const Vec h = _mm512_loadu_ps(hidden + i);
      scaled[half] = _mm512_mul_ps(h, _mm512_loadu_ps(scales + i));
      shift[half] = _mm512_fmadd_ps(h, _mm512_loadu_ps(zeros + i), shift[half]);
    }
    _mm512_storeu_si512(a + j, (Words)_mm512_cvtne2ps_pbh(scaled[1], scaled[0]));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(shift[0], shift[1]));
}

// S column blocks of 32 of a packed tier.
template <int kBits, int M, int S>
void codes_columns(const DownTile& tile, int64_t column, const uint8_t* unit, int64_t block_bytes,
                   int64_t rows) {
  const Codes<kBits> codes;
  int64_t offsets[2 * S];
  __mmask16 lanes[2 * S];
  for (int n = 0; n < 2 * S; ++n) {
    offsets[n] = n / 2 * block_bytes + n % 2 * 64;
    lanes[n] = 0xffff;
  }
  Vec sums[M][2 * S] = {};
  for (int64_t row = 0; row < rows; row += kUnit, unit += kBits * kBlockCols * 4) {
    for (int s = 0; s < S; ++s)
      for (int64_t line = 0; line < kBits * kBlockCols * 4; line += 64)
        _mm_prefetch(unit + s * block_bytes + kCodesAhead + line, _MM_HINT_T0);
    multiply_unit<kBits, M, 2 * S>(codes, unit, kBlockCols * 4, offsets, lanes, tile.a, row, sums);
  }
  add_to_sums<M, 2 * S>(tile, column, sums);
}

using CodesColumns = void (*)(const DownTile&, int64_t, const uint8_t*, int64_t, int64_t);

template <int kBits, int S>
constexpr CodesColumns kCodesColumns[kTile + 1] = {
    nullptr,
    codes_columns<kBits, 1, S>,
    codes_columns<kBits, 2, S>,
    codes_columns<kBits, 3, S>,
    codes_columns<kBits, 4, S>,
    codes_columns<kBits, 5, S>,
    codes_columns<kBits, 6, S>,
};

template <int S>
CAMERA_INLINE const CodesColumns* columns_of(int64_t bits) {
  switch (bits) {
    case 8: return kCodesColumns<8, S>;
    case 4: return kCodesColumns<4, S>;
    case 3: return kCodesColumns<3, S>;
    case 2: return kCodesColumns<2, S>;
    default: return kCodesColumns<1, S>;
  }
}

struct DownScratch {
  float* scales;   // of all packed tiers, one after another
  float* zeros;
  uint16_t* a;     // [kTile][rows]
  int64_t rows;    // of all packed tiers
};

CAMERA_INLINE void down_codes_tile(const DownJob& job, int64_t first, int64_t tokens,
                                   int64_t column, int64_t num_columns,
                                   const DownScratch& scratch) {
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
    if (!is_packed(block->shape.bits)) continue;
    const int64_t rows = block->shape.down_rows(), block_bytes = block->shape.down_block_bytes();
    for (int64_t m = 0; m < tokens; ++m) {
      uint16_t* a = scratch.a + m * scratch.rows + done;
      const auto* hidden =
          reinterpret_cast<const float*>(block->hidden + job.routed.row[first + m] * job.hidden_stride);
      shift[m] += scale_hidden(hidden, scratch.scales + done, scratch.zeros + done, rows, a);
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

void down_codes(const DownJob& job) {
  int64_t rows = 0;
  for (int64_t b = 0; b < job.num_blocks; ++b)
    if (is_packed(job.blocks[b].shape.bits)) rows += job.blocks[b].shape.down_rows();
  if (rows == 0) return;
  auto* scales = reinterpret_cast<float*>(job.scratch);
  const DownScratch scratch{scales, scales + rows, reinterpret_cast<uint16_t*>(scales + 2 * rows),
                            rows};
  const int64_t size = tile_size(job.routed.count, kTile), end = job.column + job.num_columns;
  for (int64_t column = job.column, stop; column < end; column = stop) {
    const int64_t group = column / job.group_size;
    stop = (group + 1) * job.group_size < end ? (group + 1) * job.group_size : end;
    if (stop - column > kMostColumns) stop = column + kMostColumns;
    int64_t done = 0;
    for (int64_t b = 0; b < job.num_blocks; ++b) {
      if (!is_packed(job.blocks[b].shape.bits)) continue;
      read_down_grid(job.blocks[b], group, scales + done, scales + rows + done);
      done += job.blocks[b].shape.down_rows();
    }
    for (int64_t first = 0; first < job.routed.count; first += size) {
      const int64_t more = job.routed.count - first;
      down_codes_tile(job, first, more < size ? more : size, column, stop - column, scratch);
    }
  }
}

void down(const DownJob& job) {
  for (int64_t b = 0; b < job.num_blocks; ++b)
    if (!is_packed(job.blocks[b].shape.bits)) down_16(job, job.blocks[b]);
  down_codes(job);
}

int64_t scratch_bytes(const Extent& most) {
  const int64_t block = most.group_size > kDenseBlock ? most.group_size : kDenseBlock;
  const int64_t unpacked = most.tokens < kUnpackFrom ? 0 : most.d_model < block ? most.d_model : block;
  const int64_t gate_up = (most.tokens * 4 + unpacked * 2) * 2 * kPanelRows;
  const int64_t down = most.rows * (2 * 4 + kTile * 2);  // of int8 half as much for the activations
  return gate_up > down ? gate_up : down;
}

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

}  // namespace

const Isa kAvx512Bf16{"avx512_bf16", runs_here,     gate_up,   down,
                      quantize_x,    gate_up_int8, down_int8, scratch_bytes};

}  // namespace camera
#endif
