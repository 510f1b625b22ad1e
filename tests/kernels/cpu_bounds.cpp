// Fuzzes the CPU kernel's C interface; `test_cpu_bounds.py` compiles and runs it.
//
// Every input and output has its exact size. On the heap AddressSanitizer watches both its ends; at
// a page that cannot be touched the hardware does, which also stops the masked loads and stores
// that AddressSanitizer does not see. Inputs there can only be read.
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "camera_moe.h"

namespace {

constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

#define EXPECT(condition, ...)                                            \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::fprintf(stderr, "%s is not so: ", #condition);                 \
      std::fprintf(stderr, __VA_ARGS__);                                  \
      std::fputc('\n', stderr);                                           \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t up_to(int64_t most) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(most + 1)); }
  uint16_t bits16() { return static_cast<uint16_t>(engine_()); }
  template <typename T>
  T of(const std::vector<T>& values) { return values[up_to(static_cast<int64_t>(values.size()) - 1)]; }

 private:
  std::mt19937_64 engine_;
};

enum class Place { heap, before_guard, after_guard };

// Memory aligned to its type and, on the heap and mostly before a guard page, to no more.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t alignment, Place place) : bytes_(bytes) {
    if (place == Place::heap) {
      base_ = static_cast<uint8_t*>(std::malloc(bytes + alignment));
      data_ = base_ + alignment;
      return;
    }
    page_ = sysconf(_SC_PAGESIZE);
    mapped_ = (bytes + page_ - 1) / page_ * page_ + 2 * page_;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT(base_ != MAP_FAILED, "%lld bytes", static_cast<long long>(mapped_));
    allow(PROT_READ | PROT_WRITE);
    data_ = place == Place::after_guard ? base_ + page_ : base_ + mapped_ - page_ - bytes;
  }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(page_, other.page_);
    return *this;
  }
  ~Buffer() {
    if (mapped_) munmap(base_, mapped_);
    else std::free(base_);
  }

  void allow(int protection) {
    if (mapped_ > 2 * page_) mprotect(base_ + page_, mapped_ - 2 * page_, protection);
  }
  template <typename T>
  T* as() const { return reinterpret_cast<T*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t *base_ = nullptr, *data_ = nullptr;
  int64_t bytes_ = 0, mapped_ = 0, page_ = 0;
};

// Values of order 0.1, so that no sum overflows.
uint16_t small_bf16(Random& random) { return static_cast<uint16_t>((random.bits16() & 0x80ff) | 0x3d00); }
uint16_t small_fp16(Random& random) { return static_cast<uint16_t>((random.bits16() & 0x83ff) | 0x2000); }

struct Shape {
  int64_t bits, rows, d_model, group_size;
};

// One projection of one expert, as the checkpoint has it.
struct Rows {
  Buffer weights, scales, zeros;
  camera_rows view() const { return {weights.as<void>(), scales.as<uint16_t>(), zeros.as<uint16_t>()}; }
};

Rows make_rows(const Shape& shape, Random& random, Place place) {
  const bool packed = shape.bits != 16;
  const int64_t grid = packed ? shape.rows * (shape.d_model / shape.group_size) : 0;
  Rows rows{{shape.rows * shape.d_model * shape.bits / 8, packed ? 4 : 2, place},
            {grid * 2, 2, place},
            {grid * 2, 2, place}};
  for (int64_t i = 0; i < rows.weights.bytes() / 2; ++i)
    rows.weights.as<uint16_t>()[i] = packed ? random.bits16() : small_bf16(random);
  for (int64_t i = 0; i < grid; ++i) {
    rows.scales.as<uint16_t>()[i] = small_fp16(random) & 0x7fff;
    rows.zeros.as<uint16_t>()[i] = small_fp16(random);
  }
  for (Buffer* buffer : {&rows.weights, &rows.scales, &rows.zeros}) buffer->allow(PROT_READ);
  return rows;
}

struct Tier {
  int64_t bits;
  Buffer offsets, gate_up, down;
};

Tier make_tier(const std::vector<Shape>& experts, Random& random, Place place) {
  std::vector<uint8_t> gate_up, down;
  Buffer offsets((experts.size() + 1) * 8, 8, place);
  offsets.as<int64_t>()[0] = 0;
  for (size_t e = 0; e < experts.size(); ++e) {
    const Shape& s = experts[e];
    offsets.as<int64_t>()[e + 1] = offsets.as<int64_t>()[e] + s.rows;
    const Rows gate = make_rows(s, random, place), up = make_rows(s, random, place),
               rows_of_down = make_rows(s, random, place);
    const camera_rows g = gate.view(), u = up.view(), d = rows_of_down.view();
    const Buffer one(camera_gate_up_bytes(s.bits, s.rows, s.d_model, s.group_size), 1, place);
    const Buffer two(camera_down_bytes(s.bits, s.rows, s.d_model, s.group_size), 1, place);
    int code = camera_pack_gate_up(s.bits, s.rows, s.d_model, s.group_size, &g, &u, one.as<uint8_t>());
    EXPECT(code == CAMERA_OK, "gate and up: %d", code);
    code = camera_pack_down(s.bits, s.rows, s.d_model, s.group_size, &d, two.as<uint8_t>());
    EXPECT(code == CAMERA_OK, "down: %d", code);
    gate_up.insert(gate_up.end(), one.as<uint8_t>(), one.as<uint8_t>() + one.bytes());
    down.insert(down.end(), two.as<uint8_t>(), two.as<uint8_t>() + two.bytes());
  }
  Tier tier{experts[0].bits,
            std::move(offsets),
            {static_cast<int64_t>(gate_up.size()), 1, place},
            {static_cast<int64_t>(down.size()), 1, place}};
  if (!gate_up.empty()) std::memcpy(tier.gate_up.as<uint8_t>(), gate_up.data(), gate_up.size());
  if (!down.empty()) std::memcpy(tier.down.as<uint8_t>(), down.data(), down.size());
  for (Buffer* buffer : {&tier.offsets, &tier.gate_up, &tier.down}) buffer->allow(PROT_READ);
  return tier;
}

// Counts of micro-experts by expert and tier, and the call they are tried with.
struct Case {
  int64_t d_model, group_size;
  std::vector<int64_t> bits;
  std::vector<std::vector<int64_t>> rows;
  int64_t num_tokens, top_k;
  bool one_expert;  // all tokens go to the first
};

Case random_case(Random& random) {
  Case c{};
  c.d_model = 32 * (1 + random.up_to(7));
  std::vector<int64_t> groups;
  for (int64_t size = 32; size <= c.d_model; size += 32)
    if (c.d_model % size == 0) groups.push_back(size);
  c.group_size = random.of(groups);
  for (int64_t left = 1 + random.up_to(2); left > 0; --left)
    c.bits.push_back(random.of<int64_t>({16, 8, 4, 3, 2, 1}));
  for (int64_t left = 1 + random.up_to(4); left > 0; --left) {
    c.rows.emplace_back();
    for (size_t t = 0; t < c.bits.size(); ++t)
      c.rows.back().push_back(random.of<int64_t>({0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 47, 49, 65}));
  }
  c.num_tokens = random.of<int64_t>({0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 19, 49, 61});
  c.top_k = random.up_to(3);
  c.one_expert = random.up_to(4) == 0;
  return c;
}

// Sizes past which the vector kernel works in several blocks, which random cases never reach.
std::vector<Case> large_cases() {
  return {
      {4096 + 64, 32, {16, 2}, {{3, 0}, {17, 1}}, 8, 2, false},
      {32, 32, {16, 1}, {{2048 + 33, 0}, {2, 65}}, 7, 2, false},
      {512, 256, {4, 16}, {{33, 31}}, 13, 1, true},
  };
}

void route(const Case& c, Random& random, Buffer& ids, Buffer& weights) {
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
  const auto num_experts = static_cast<int32_t>(c.rows.size());
  for (int64_t slot = 0; slot < c.num_tokens * c.top_k; ++slot) {
    const int32_t garbage = random.of<int32_t>({-1, num_experts, kLowest, -(kLowest + 1), 1 << 20});
    const auto id = static_cast<int32_t>(c.one_expert ? 0 : random.up_to(num_experts - 1));
    ids.as<int32_t>()[slot] = random.up_to(7) == 0 ? garbage : id;
    weights.as<float>()[slot] = static_cast<float>(random.up_to(100)) / 100;
  }
}

const std::vector<const char*>& instruction_sets() {
  static const std::vector<const char*> found = [] {
    std::vector<const char*> names;
    for (const char* name : {"portable", "avx2", "avx512_bf16"})
      if (camera_use_isa(name) == CAMERA_OK) names.push_back(name);
    return names;
  }();
  return found;
}

void try_case(const Case& c, Random& random) {
  const Place place = random.of<Place>({Place::heap, Place::before_guard, Place::after_guard});
  std::vector<Tier> tiers;
  std::vector<camera_tier> views;
  for (size_t t = 0; t < c.bits.size(); ++t) {
    std::vector<Shape> shapes;
    for (const auto& rows : c.rows) shapes.push_back({c.bits[t], rows[t], c.d_model, c.group_size});
    tiers.push_back(make_tier(shapes, random, place));
    const Tier& tier = tiers.back();
    views.push_back({tier.bits, tier.offsets.as<int64_t>(), tier.gate_up.as<uint8_t>(),
                     tier.gate_up.bytes(), tier.down.as<uint8_t>(), tier.down.bytes()});
  }
  const camera_layer layer{static_cast<int64_t>(c.rows.size()), c.d_model, c.group_size,
                           static_cast<int64_t>(views.size()), views.data()};
  Buffer x(c.num_tokens * c.d_model * 2, 2, place), ids(c.num_tokens * c.top_k * 4, 4, place),
      weights(c.num_tokens * c.top_k * 4, 4, place);
  for (int64_t i = 0; i < x.bytes() / 2; ++i) x.as<uint16_t>()[i] = small_bf16(random);
  route(c, random, ids, weights);
  for (Buffer* input : {&x, &ids, &weights}) input->allow(PROT_READ);
  for (const char* name : instruction_sets()) {
    const Buffer out(x.bytes(), 2, place);
    if (out.bytes()) std::memset(out.as<uint8_t>(), 0xff, out.bytes());
    camera_use_isa(name);
    omp_set_num_threads(static_cast<int>(1 + random.up_to(2)));
    const int code = camera_moe(&layer, x.as<uint16_t>(), weights.as<float>(), ids.as<int32_t>(),
                                c.num_tokens, c.top_k, out.as<uint16_t>());
    EXPECT(code == CAMERA_OK, "%s: %d", name, code);
    for (int64_t i = 0; i < out.bytes() / 2; ++i)
      EXPECT((out.as<uint16_t>()[i] & 0x7f80) != 0x7f80, "%s: output %lld of %lld", name,
             static_cast<long long>(i), static_cast<long long>(out.bytes() / 2));
  }
}

// ---- what must be refused

// A layer of two experts and two tiers whose numbers are right; what it points to faults.
struct Call {
  Buffer forbidden{4096, 1, Place::after_guard};
  int64_t offsets[2][3] = {{0, 3, 36}, {0, 0, 7}};
  camera_tier tiers[2];
  camera_layer layer{2, 64, 32, 2, tiers};
  int64_t num_tokens = 4, top_k = 2;

  Call() {
    forbidden.allow(PROT_NONE);
    for (int64_t t = 0; t < 2; ++t) {
      tiers[t] = {t == 0 ? 16 : 3, offsets[t], forbidden.as<uint8_t>(), 0, forbidden.as<uint8_t>(), 0};
      for (int64_t e = 0; e < 2; ++e) {
        const int64_t rows = offsets[t][e + 1] - offsets[t][e];
        tiers[t].gate_up_bytes += camera_gate_up_bytes(tiers[t].bits, rows, 64, 32);
        tiers[t].down_bytes += camera_down_bytes(tiers[t].bits, rows, 64, 32);
      }
    }
  }
  int run() const {
    return camera_moe(&layer, forbidden.as<uint16_t>(), forbidden.as<float>(),
                      forbidden.as<int32_t>(), num_tokens, top_k, forbidden.as<uint16_t>());
  }
};

void refused(const char* what, int wanted, const std::function<void(Call&)>& break_it) {
  Call call;
  break_it(call);
  const int code = call.run();
  EXPECT(code == wanted, "%s: code %d, wanted %d", what, code, wanted);
}

void refuse_shapes() {
  for (int64_t bits : {int64_t{0}, int64_t{5}, int64_t{7}, int64_t{15}, int64_t{32}, int64_t{-1}, kMin, kMax})
    refused("bits", CAMERA_BAD_SHAPE, [=](Call& c) { c.tiers[1].bits = bits; });
  for (int64_t size : {int64_t{0}, int64_t{-32}, int64_t{16}, int64_t{33}, int64_t{96}, int64_t{128}, kMin, kMax})
    refused("group size", CAMERA_BAD_SHAPE, [=](Call& c) { c.layer.group_size = size; });
  for (int64_t d : {int64_t{0}, int64_t{-64}, int64_t{16}, int64_t{48}, int64_t{65}, kMin, kMax, kMax - 31})
    refused("d_model", CAMERA_BAD_SHAPE, [=](Call& c) { c.layer.d_model = d; });
  for (int64_t n : {int64_t{0}, int64_t{-1}, kMin, kMax})
    refused("num_experts", CAMERA_BAD_SHAPE, [=](Call& c) { c.layer.num_experts = n; });
  for (int64_t n : {int64_t{0}, int64_t{-1}, kMin, kMax})
    refused("num_tiers", CAMERA_BAD_SHAPE, [=](Call& c) { c.layer.num_tiers = n; });
  for (int64_t n : {int64_t{-1}, int64_t{1} << 31, kMin, kMax}) {
    refused("num_tokens", CAMERA_BAD_SHAPE, [=](Call& c) { c.num_tokens = n; });
    refused("top_k", CAMERA_BAD_SHAPE, [=](Call& c) { c.top_k = n; });
  }
  refused("num_tokens times top_k", CAMERA_BAD_SHAPE,
          [](Call& c) { c.num_tokens = c.top_k = int64_t{1} << 33; });
  // 64 bits hold only zeros of what these sizes come to.
  refused("sizes that wrap to 0", CAMERA_BAD_SHAPE, [](Call& c) {
    c.layer.d_model = int64_t{1} << 62;
    c.layer.num_tiers = 1;
    c.tiers[0].gate_up_bytes = c.tiers[0].down_bytes = 0;
    c.offsets[0][1] = 2;
    c.offsets[0][2] = 4;
  });
}

void refuse_offsets() {
  for (int64_t start : {int64_t{1}, int64_t{-1}, kMin, kMax})
    refused("first offset", CAMERA_BAD_OFFSETS, [=](Call& c) { c.offsets[1][0] = start; });
  for (int64_t end : {int64_t{2}, int64_t{-1}, int64_t{1} << 40, kMin, kMax})
    refused("last offset", CAMERA_BAD_OFFSETS, [=](Call& c) { c.offsets[0][2] = end; });
  for (int64_t middle : {int64_t{37}, int64_t{-1}, kMin, kMax})
    refused("middle offset", CAMERA_BAD_OFFSETS, [=](Call& c) { c.offsets[0][1] = middle; });
}

void refuse_sizes() {
  for (int64_t t = 0; t < 2; ++t) {
    const Call good;
    for (int64_t off : {int64_t{-1}, int64_t{1}, int64_t{64}}) {
      refused("bytes of gate and up", CAMERA_BAD_SIZE, [=](Call& c) { c.tiers[t].gate_up_bytes += off; });
      refused("bytes of down", CAMERA_BAD_SIZE, [=](Call& c) { c.tiers[t].down_bytes += off; });
    }
    for (int64_t bytes : {int64_t{0}, int64_t{-1}, kMin, kMax}) {
      refused("bytes of gate and up", CAMERA_BAD_SIZE, [=](Call& c) { c.tiers[t].gate_up_bytes = bytes; });
      refused("bytes of down", CAMERA_BAD_SIZE, [=](Call& c) { c.tiers[t].down_bytes = bytes; });
    }
    refused("one row more", CAMERA_BAD_SIZE, [=](Call& c) { ++c.offsets[t][2]; });
    refused("more rows than there can be bytes", CAMERA_BAD_SIZE,
            [=](Call& c) { c.offsets[t][2] = int64_t{1} << 32; });
  }
}

void refuse_packing() {
  Buffer forbidden(4096, 1, Place::after_guard);
  forbidden.allow(PROT_NONE);
  const camera_rows rows{forbidden.as<void>(), forbidden.as<uint16_t>(), forbidden.as<uint16_t>()};
  const int64_t huge = int64_t{1} << 62;
  for (const Shape& s : std::vector<Shape>{{5, 8, 64, 32}, {0, 8, 64, 32}, {4, -1, 64, 32},
                                           {4, 8, 48, 48}, {4, 8, 0, 32}, {4, 8, 64, 0},
                                           {4, 8, 64, 48}, {4, 8, 64, 128}, {4, huge, 64, 32},
                                           {16, huge, 64, 32}, {16, 2, huge, huge}, {1, kMax, 32, 32},
                                           {8, 8, kMax - 31, 32}, {4, kMin, 64, 32}, {4, 8, kMin, 32}}) {
    const int64_t gate_up = camera_gate_up_bytes(s.bits, s.rows, s.d_model, s.group_size);
    const int64_t down = camera_down_bytes(s.bits, s.rows, s.d_model, s.group_size);
    EXPECT(gate_up == -1 && down == -1, "%lld bits, %lld rows, d_model %lld, groups of %lld",
           static_cast<long long>(s.bits), static_cast<long long>(s.rows),
           static_cast<long long>(s.d_model), static_cast<long long>(s.group_size));
    int code = camera_pack_gate_up(s.bits, s.rows, s.d_model, s.group_size, &rows, &rows,
                                   forbidden.as<uint8_t>());
    EXPECT(code == CAMERA_BAD_SHAPE, "gate and up: %d", code);
    code = camera_pack_down(s.bits, s.rows, s.d_model, s.group_size, &rows, forbidden.as<uint8_t>());
    EXPECT(code == CAMERA_BAD_SHAPE, "down: %d", code);
  }
}

void refuse() {
  EXPECT(camera_use_isa("avx1024") == CAMERA_BAD_ISA, "an unknown instruction set");
  for (const char* name : instruction_sets()) {
    camera_use_isa(name);
    refuse_shapes();
    refuse_offsets();
    refuse_sizes();
    // A thread's first call has no memory yet, and needs none here.
    std::thread([=] {
      Call call;
      call.num_tokens = 0;
      const int code = call.run();
      EXPECT(code == CAMERA_OK, "no tokens, %s: %d", name, code);
    }).join();
  }
  refuse_packing();
}

void group_size_of_plain_rows_is_not_read(Random& random) {
  try_case({64, 0, {16}, {{3}, {33}}, 7, 2, false}, random);
}

}  // namespace

// `refuse`, or `fuzz SEED CASES`.
int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "refuse") {
    refuse();
  } else if (mode == "fuzz" && argc == 4) {
    Random random(std::strtoull(argv[2], nullptr, 10));
    group_size_of_plain_rows_is_not_read(random);
    for (const Case& c : large_cases()) try_case(c, random);
    for (int64_t left = std::atoll(argv[3]); left > 0; --left) try_case(random_case(random), random);
  } else {
    return 2;
  }
  for (const char* name : instruction_sets()) std::printf("%s\n", name);
}
