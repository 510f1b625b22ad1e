// 16-bit floats by their bits, for the code that has no instructions for them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "layout.h"

namespace camera {

CAMERA_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

CAMERA_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

CAMERA_INLINE float from_bf16(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even; a NaN stays one.
CAMERA_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Multiplying moves the exponent's bias; float's range covers subnormal halves exactly.
CAMERA_INLINE float from_fp16(uint16_t value) {
  const uint32_t magnitude = (value & 0x7fffu) << 13, sign = (value & 0x8000u) << 16;
  const bool finite = (value & 0x7c00u) != 0x7c00u;
  const float scaled = from_bits(magnitude) * 0x1p112f;
  return from_bits(sign | (finite ? to_bits(scaled) : (magnitude | 0x7f800000u)));
}

}  // namespace camera
