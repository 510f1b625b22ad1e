// Checkpoint rows to what the kernel streams: every weight once, in the order it is read.
#include <cstring>
#include <initializer_list>

#include "camera_moe.h"
#include "layout.h"

namespace camera {
namespace {

// Little-endian bit string (checkpoint format 1): code i takes the bits [i * bits, (i + 1) * bits).
uint32_t code_at(const uint32_t* words, int64_t i, int64_t bits) {
  const int64_t bit = i * bits, word = bit / 32, shift = bit % 32;
  uint32_t code = words[word] >> shift;
  if (shift + bits > 32) code |= words[word + 1] << (32 - shift);
  return code & ((1u << bits) - 1);
}

// Some bits of a unit's 32 codes, from bit `from` on, as words.
void pack_plane(const uint32_t* codes, int64_t from, int64_t bits, uint32_t* words) {
  const int64_t per_word = quads_per_word(bits);
  for (int64_t quad = 0; quad < kUnitQuads; ++quad) {
    for (int64_t byte = 0; byte < 4; ++byte) {
      const uint32_t part = codes[4 * quad + kQuadOrder[byte]] >> from & ((1u << bits) - 1);
      words[quad / per_word] |= part << (8 * byte + quad % per_word * bits);
    }
  }
}

// The `bits` words of a unit's 32 codes.
void pack_lane(const uint32_t* codes, int64_t bits, uint32_t* words) {
  const int64_t low = low_plane_bits(bits);
  std::memset(words, 0, bits * 4);
  pack_plane(codes, 0, low, words);
  if (low < bits) pack_plane(codes, low, bits - low, words + low);
}

void store16(uint8_t* to, uint16_t value) { std::memcpy(to, &value, 2); }
void store32(uint8_t* to, uint32_t value) { std::memcpy(to, &value, 4); }

void pack_panel_16(const Shape& shape, int64_t first, int64_t rows, const uint16_t* gate,
                   const uint16_t* up, uint8_t* to) {
  for (int64_t pair = 0; pair < shape.d_model / 2; ++pair) {
    for (const uint16_t* projection : {gate, up}) {
      for (int64_t r = 0; r < rows; ++r, to += 4) {
        const uint16_t* source = projection + (first + r) * shape.d_model + 2 * pair;
        store32(to, source[0] | static_cast<uint32_t>(source[1]) << 16);
      }
    }
  }
}

void pack_panel_codes(const Shape& shape, int64_t first, int64_t rows, const camera_rows& gate,
                      const camera_rows& up, uint8_t* to) {
  const int64_t groups = shape.groups(), bits = shape.bits;
  const int64_t words_per_row = shape.d_model * bits / 32;
  for (int64_t g = 0; g < groups; ++g) {
    for (const camera_rows* rows_of : {&gate, &up})
      for (const uint16_t* grid : {rows_of->scales, rows_of->zeros})
        for (int64_t r = 0; r < rows; ++r, to += 2) store16(to, grid[(first + r) * groups + g]);
    for (int64_t k = g * shape.group_size; k < (g + 1) * shape.group_size; k += kUnit) {
      int64_t lane = 0;
      for (const camera_rows* rows_of : {&gate, &up}) {
        for (int64_t r = 0; r < rows; ++r, ++lane) {
          const auto* row = static_cast<const uint32_t*>(rows_of->weights) +
                            (first + r) * words_per_row;
          uint32_t codes[kUnit], words[8];
          for (int64_t i = 0; i < kUnit; ++i) codes[i] = code_at(row, k + i, bits);
          pack_lane(codes, bits, words);
          for (int64_t w = 0; w < bits; ++w) store32(to + (w * 2 * rows + lane) * 4, words[w]);
        }
      }
      to += bits * 2 * rows * 4;
    }
  }
}

void pack_block_16(const Shape& shape, int64_t block, const uint16_t* down, uint8_t* to) {
  for (int64_t row = 0; row < shape.rows; row += 2) {
    for (int64_t c = 0; c < kBlockCols; ++c) {
      const uint16_t* source = down + row * shape.d_model + block * kBlockCols + c;
      // An odd last row has no partner and takes half the place.
      store16(to, source[0]);
      to += 2;
      if (row + 1 == shape.rows) continue;
      store16(to, source[shape.d_model]);
      to += 2;
    }
  }
}

void pack_block_codes(const Shape& shape, int64_t block, const uint32_t* down, uint8_t* to) {
  const int64_t bits = shape.bits, words_per_row = shape.d_model * bits / 32;
  for (int64_t unit = 0; unit < shape.down_rows(); unit += kUnit) {
    for (int64_t c = 0; c < kBlockCols; ++c) {
      uint32_t codes[kUnit] = {}, words[8];
      for (int64_t i = 0; i < kUnit && unit + i < shape.rows; ++i)
        codes[i] = code_at(down + (unit + i) * words_per_row, block * kBlockCols + c, bits);
      pack_lane(codes, bits, words);
      for (int64_t w = 0; w < bits; ++w) store32(to + (w * kBlockCols + c) * 4, words[w]);
    }
    to += bits * kBlockCols * 4;
  }
}

// `[rows, groups]` to `[groups, down_rows]`, zeros where a padded row has none.
void pack_grid(const Shape& shape, const uint16_t* grid, uint8_t* to) {
  for (int64_t g = 0; g < shape.groups(); ++g)
    for (int64_t row = 0; row < shape.down_rows(); ++row, to += 2)
      store16(to, row < shape.rows ? grid[row * shape.groups() + g] : 0);
}

}  // namespace
}  // namespace camera

using camera::Shape;

extern "C" int64_t camera_gate_up_bytes(int64_t bits, int64_t rows, int64_t d_model,
                                        int64_t group_size) {
  const Shape shape{bits, rows, d_model, group_size};
  return shape.valid() ? shape.gate_up_bytes() : -1;
}

extern "C" int64_t camera_down_bytes(int64_t bits, int64_t rows, int64_t d_model,
                                     int64_t group_size) {
  const Shape shape{bits, rows, d_model, group_size};
  return shape.valid() ? shape.down_bytes() : -1;
}

extern "C" int camera_pack_gate_up(int64_t bits, int64_t rows, int64_t d_model, int64_t group_size,
                                   const camera_rows* gate, const camera_rows* up,
                                   uint8_t* packed) {
  const Shape shape{bits, rows, d_model, group_size};
  if (!shape.valid()) return CAMERA_BAD_SHAPE;
#pragma omp parallel for
  for (int64_t panel = 0; panel < shape.num_panels(); ++panel) {
    const int64_t first = panel * camera::kPanelRows, count = shape.panel_rows(panel);
    uint8_t* to = packed + shape.panel_offset(panel);
    if (camera::is_packed(bits)) {
      camera::pack_panel_codes(shape, first, count, *gate, *up, to);
    } else {
      camera::pack_panel_16(shape, first, count, static_cast<const uint16_t*>(gate->weights),
                            static_cast<const uint16_t*>(up->weights), to);
    }
  }
  return CAMERA_OK;
}

extern "C" int camera_pack_down(int64_t bits, int64_t rows, int64_t d_model, int64_t group_size,
                                const camera_rows* down, uint8_t* packed) {
  const Shape shape{bits, rows, d_model, group_size};
  if (!shape.valid()) return CAMERA_BAD_SHAPE;
#pragma omp parallel for
  for (int64_t block = 0; block < d_model / camera::kBlockCols; ++block) {
    uint8_t* to = packed + block * shape.down_block_bytes();
    if (camera::is_packed(bits)) {
      camera::pack_block_codes(shape, block, static_cast<const uint32_t*>(down->weights), to);
    } else {
      camera::pack_block_16(shape, block, static_cast<const uint16_t*>(down->weights), to);
    }
  }
  if (camera::is_packed(bits)) {
    uint8_t* grids = packed + shape.down_codes_bytes();
    camera::pack_grid(shape, down->scales, grids);
    camera::pack_grid(shape, down->zeros, grids + shape.down_grid_bytes());
  }
  return CAMERA_OK;
}
