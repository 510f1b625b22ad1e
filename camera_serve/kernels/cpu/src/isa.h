// What an instruction set implements: one gate/up panel and one column range of down.
#pragma once

#include <stdint.h>

#include "layout.h"

namespace camera {

// The tokens of one expert. `token[i]` is a row of x and of the sums, `weight[i]` its routing
// weight.
struct Routed {
  const int32_t* token;
  const float* weight;
  int64_t count;
};

struct GateUpJob {
  Shape shape;           // `rows`: those of this panel, 1 to 32
  const uint8_t* panel;
  const uint8_t* next;   // what this thread reads next, only ever prefetched, or null
  int64_t next_bytes;
  const uint16_t* x;     // [num_tokens, d_model]
  const float* x_sums;   // [num_tokens, groups]
  Routed routed;
  uint8_t* hidden;       // this panel's first activation of the first routed token
  int64_t hidden_stride; // bytes from token to token
  uint8_t* scratch;
};

// One tier of an expert, as down reads it.
struct DownBlock {
  Shape shape;
  const uint8_t* packed;
  const uint8_t* hidden;  // the first routed token's activations
};

struct DownJob {
  const DownBlock* blocks;
  int64_t num_blocks;
  int64_t group_size;
  int64_t column;         // the range [column, column + num_columns), multiples of 32
  int64_t num_columns;
  const uint8_t* next;    // as in GateUpJob
  int64_t next_bytes;
  int64_t hidden_stride;  // bytes from token to token
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
  int64_t (*scratch_bytes)(const Extent&);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512Bf16;
#endif

}  // namespace camera
