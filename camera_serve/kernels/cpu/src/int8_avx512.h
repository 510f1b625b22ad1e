// Integer dot products for packed tiers of at most 4 bits, with AVX-512 VNNI.
#pragma once

#include "isa.h"

namespace camera {
namespace avx512 {

bool quantize_x(const uint16_t* x, int64_t token, const Shape& shape, const Int8Inputs& to);
void gate_up_int8(const GateUpJob& job);
void down_int8(const DownJob& job);

}  // namespace avx512
}  // namespace camera
