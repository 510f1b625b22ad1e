// How packed micro-experts lie in memory; `kernels/README.md` has the pictures.
#pragma once

#include <stdint.h>

// The same headers are compiled for several instruction sets. A function that is not inlined could
// be merged with its copy for a newer one, and fault on an older machine.
#define CAMERA_INLINE inline __attribute__((always_inline))
#define CAMERA_LAMBDA __attribute__((always_inline))

namespace camera {

constexpr int64_t kPanelRows = 32;  // micro-experts of one gate/up panel
constexpr int64_t kBlockCols = 32;  // outputs of one block of down
constexpr int64_t kLanes = 16;      // 32-bit lanes of a vector: two bf16, or two times 16 code bits
constexpr int64_t kUnit = 32;       // weights along the summed dimension that fill whole words
constexpr int64_t kUnitPairs = kUnit / 2;
constexpr int64_t kSpreadBytes = 8;

// Far above any real layer, far below where a product of sizes could overflow.
constexpr int64_t kMostRows = int64_t{1} << 32;   // micro-experts of one tier
constexpr int64_t kMostModel = int64_t{1} << 20;  // d_model
constexpr int64_t kMostCount = int64_t{1} << 20;  // experts, tiers, and slots of one token
constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1;

CAMERA_INLINE bool is_packed(int64_t bits) { return bits != 16; }

CAMERA_INLINE bool is_known(int64_t bits) {
  return bits == 16 || bits == 8 || bits == 4 || bits == 3 || bits == 2 || bits == 1;
}

CAMERA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CAMERA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The codes of a lane's unit lie in planes of 8, 4, 2 or 1 bits: 3 bits are a plane of 2, then one of
// 1. A byte of a word holds the codes of as many quads (4 weights in a row) as fit, lowest first.
constexpr int64_t kUnitQuads = kUnit / 4;

// Which weight of a quad has byte b: bytes 0 and 2 are a pair of half words, and so are 1 and 3.
constexpr int64_t kQuadOrder[4] = {0, 2, 1, 3};

CAMERA_INLINE constexpr int64_t low_plane_bits(int64_t bits) { return bits == 3 ? 2 : bits; }
CAMERA_INLINE constexpr int64_t quads_per_word(int64_t plane_bits) { return 8 / plane_bits; }

struct Shape {
  int64_t bits, rows, d_model, group_size;

  CAMERA_INLINE int64_t groups() const { return d_model / group_size; }

  // Gate and up: panels of 32 micro-experts, the last one as narrow as it comes.
  CAMERA_INLINE int64_t gate_up_row_bytes() const {
    return is_packed(bits) ? groups() * (8 + group_size / kUnit * bits * 8) : d_model * 4;
  }
  CAMERA_INLINE int64_t gate_up_group_bytes() const { return gate_up_row_bytes() / groups() * rows; }
  CAMERA_INLINE int64_t gate_up_bytes() const { return rows * gate_up_row_bytes(); }
  CAMERA_INLINE int64_t num_panels() const { return ceil_div(rows, kPanelRows); }
  CAMERA_INLINE int64_t panel_rows(int64_t panel) const {
    const int64_t left = rows - panel * kPanelRows;
    return left < kPanelRows ? left : kPanelRows;
  }
  CAMERA_INLINE int64_t panel_offset(int64_t panel) const { return panel * kPanelRows * gate_up_row_bytes(); }

  // Down: codes of 32 rows share words, so packed rows are padded to a multiple of 32.
  CAMERA_INLINE int64_t down_rows() const { return is_packed(bits) ? round_up(rows, kUnit) : rows; }
  CAMERA_INLINE int64_t down_block_bytes() const { return down_rows() * kBlockCols * bits / 8; }
  CAMERA_INLINE int64_t down_codes_bytes() const { return down_block_bytes() * (d_model / kBlockCols); }
  CAMERA_INLINE int64_t down_grid_bytes() const { return is_packed(bits) ? groups() * down_rows() * 2 : 0; }
  // Codes or weights, then scales, then zeros, each `[groups, down_rows]`.
  CAMERA_INLINE int64_t down_bytes() const { return down_codes_bytes() + 2 * down_grid_bytes(); }

  // One token's activations: bf16 at 16 bits, else float, because the scales come on top; behind
  // those the spread of every panel.
  CAMERA_INLINE int64_t hidden_bytes() const {
    return is_packed(bits) ? spread_offset() + round_up(num_panels() * kSpreadBytes, 64)
                           : round_up(round_up(rows, 2) * 2, 64);
  }
  CAMERA_INLINE int64_t spread_offset() const { return down_rows() * 4; }

  CAMERA_INLINE bool valid() const {
    return is_known(bits) && rows >= 0 && rows <= kMostRows && d_model > 0 &&
           d_model <= kMostModel && d_model % kBlockCols == 0 &&
           (!is_packed(bits) ||
            (group_size > 0 && group_size % kUnit == 0 && d_model % group_size == 0));
  }
};

}  // namespace camera
