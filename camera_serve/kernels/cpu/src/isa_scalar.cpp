// Any machine: what the compiler's default target offers.
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "isa.h"
#include "numbers.h"

namespace camera {
namespace portable {
#include "isa_portable.inc"
}  // namespace portable

const Isa kPortable{"portable",
                    [] { return true; },
                    portable::gate_up,
                    portable::down,
                    portable::quantize_x,
                    portable::gate_up_int8,
                    portable::down_int8,
                    portable::scratch_bytes};

}  // namespace camera
