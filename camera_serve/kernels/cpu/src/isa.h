// What an instruction set implements: one gate/up panel and one column range of down.
#pragma once

#include <stdint.h>

#include "layout.h"

namespace camera {

// Some tokens of one expert. `token[i]` is a row of x and of the sums, `row[i]` one of the expert's
// activations, `weight[i]` the routing weight.
struct Routed {
  const int32_t* token;
  const int32_t* row;
  const float* weight;
  int64_t count;
};

// How some values lie, by their absolutes: the largest, and the sum.
struct Spread {
  float largest, sum;
};

// A value this many times the mean of the others is left to bf16: the step of 1/127 of it would be
// too coarse for them.
constexpr float kSpike = 48;

// Whether `count` values with this spread are too uneven for int8, or not numbers.
CAMERA_INLINE bool is_spiky(const Spread& spread, int64_t count) {
  const bool ordinary = spread.sum <= 1e30f && (spread.largest >= 1e-30f || spread.largest == 0) &&
                        spread.largest * static_cast<float>(count - 1) <=
                            kSpike * (spread.sum - spread.largest) + 1e-5f * spread.sum;
  return !ordinary;
}

// x rounded to int8 per token and group, the inputs of each quad in the order of a word's bytes.
struct Int8Inputs {
  int8_t* codes;  // [num_tokens, d_model]
  float* scales;  // [num_tokens, groups]
  float* sums;    // the same, of what the codes stand for
};

struct GateUpJob {
  Shape shape;           // `rows`: those of this panel, 1 to 32
  const uint8_t* panel;
  const uint8_t* next;   // what this thread reads next, only ever prefetched, or null
  int64_t next_bytes;
  const uint16_t* x;     // [num_tokens, d_model]
  const float* x_sums;   // [num_tokens, groups]
  Int8Inputs x8;         // used by `gate_up_int8` alone
  Routed routed;
  uint8_t* hidden;       // this panel's first activation of the expert's first row
  uint8_t* spreads;      // a packed panel's spread of the expert's first row
  int64_t hidden_stride; // bytes from row to row
  uint8_t* scratch;
};

// One tier of an expert, as down reads it.
struct DownBlock {
  Shape shape;
  const uint8_t* packed;
  const uint8_t* hidden;  // the activations of the expert's first row
};

struct DownJob {
  const DownBlock* blocks;
  int64_t num_blocks;
  int64_t group_size;
  int64_t column;         // the range [column, column + num_columns), multiples of 32
  int64_t num_columns;
  const uint8_t* next;    // as in GateUpJob
  int64_t next_bytes;
  int64_t hidden_stride;  // bytes from row to row
  Routed routed;
  float* sums;            // [num_tokens, num_columns], added to
  uint8_t* scratch;
};

// The largest of everything that scratch memory depends on.
struct Extent {
  int64_t tokens;     // of one expert
  int64_t rows;       // packed and padded, of one expert
  int64_t group_size; // this and d_model only where something is packed, or 0
  int64_t d_model;
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  void (*gate_up)(const GateUpJob&);
  void (*down)(const DownJob&);
  // Token by token; returns whether one of its groups is spiky.
  bool (*quantize_x)(const uint16_t* x, int64_t token, const Shape&, const Int8Inputs&);
  // The same as the first two, for packed tiers of at most 4 bits and inputs in int8.
  void (*gate_up_int8)(const GateUpJob&);
  void (*down_int8)(const DownJob&);
  int64_t (*scratch_bytes)(const Extent&);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512Bf16;
#endif

}  // namespace camera
