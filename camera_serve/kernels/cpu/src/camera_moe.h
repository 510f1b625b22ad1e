// The CPU kernel's C interface: raw pointers in, an error code out. Nothing of torch or Python here.
//
// A layer's routed experts lie tier by tier. Every tier holds `offsets[e + 1] - offsets[e]`
// micro-experts of expert e, packed by `camera_pack_gate_up` and `camera_pack_down` one expert after
// another. `camera_moe` checks every offset and size before it reads, and ignores ids outside
// `[0, num_experts)`. Pointers need no alignment beyond their type's.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

typedef struct {
  int64_t bits;            // 16, 8, 4, 3, 2 or 1
  const int64_t* offsets;  // [num_experts + 1], in micro-experts
  const uint8_t* gate_up;
  int64_t gate_up_bytes;
  const uint8_t* down;
  int64_t down_bytes;
} camera_tier;

typedef struct {
  int64_t num_experts;
  int64_t d_model;     // a multiple of 32
  int64_t group_size;  // a multiple of 32 that divides d_model
  int64_t num_tiers;
  const camera_tier* tiers;
} camera_layer;

// One projection of one expert and tier: bf16 rows `[rows, d_model]` at 16 bits, or a bit string of
// codes per row with float16 scales and zeros `[rows, d_model / group_size]` (checkpoint format 1).
typedef struct {
  const void* weights;
  const uint16_t* scales;
  const uint16_t* zeros;
} camera_rows;

enum {
  CAMERA_OK = 0,
  CAMERA_BAD_SHAPE = 1,
  CAMERA_BAD_OFFSETS = 2,
  CAMERA_BAD_SIZE = 3,
  CAMERA_NO_MEMORY = 4,
  CAMERA_BAD_ISA = 5
};

// Bytes of one expert's micro-experts of one tier, or -1 for a shape that cannot be packed.
int64_t camera_gate_up_bytes(int64_t bits, int64_t rows, int64_t d_model, int64_t group_size);
int64_t camera_down_bytes(int64_t bits, int64_t rows, int64_t d_model, int64_t group_size);

int camera_pack_gate_up(int64_t bits, int64_t rows, int64_t d_model, int64_t group_size,
                        const camera_rows* gate, const camera_rows* up, uint8_t* packed);
int camera_pack_down(int64_t bits, int64_t rows, int64_t d_model, int64_t group_size,
                     const camera_rows* down, uint8_t* packed);

// x, out: bf16 [num_tokens, d_model]; weights: [num_tokens, top_k]; ids: [num_tokens, top_k].
// out is written whole and must not overlap x.
int camera_moe(const camera_layer* layer, const uint16_t* x, const float* weights,
               const int32_t* ids, int64_t num_tokens, int64_t top_k, uint16_t* out);

// The instruction set in use: "avx512_bf16", "avx2" or "portable"; the best of the machine unless
// `camera_use_isa` names another. Set before the first layer runs, not during one.
const char* camera_isa(void);
int camera_use_isa(const char* name);

// Whether packed tiers of at most 4 bits take activations in int8, or in bf16 (the default).
int camera_int8(void);
void camera_use_int8(int yes);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
