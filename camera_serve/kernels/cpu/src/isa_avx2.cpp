// The portable code again, compiled for AVX2 and FMA.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "isa.h"
#include "numbers.h"

namespace camera {
namespace avx2 {
#include "isa_portable.inc"
}  // namespace avx2

const Isa kAvx2{
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
    avx2::gate_up, avx2::down, avx2::quantize_x, avx2::gate_up_int8, avx2::down_int8,
    avx2::scratch_bytes};

}  // namespace camera
#endif
