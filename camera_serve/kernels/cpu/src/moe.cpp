// One MoE layer: check, sort the tokens by expert, gate/up of all experts, down of all experts.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "camera_moe.h"
#include "isa.h"
#include "numbers.h"

namespace camera {
namespace {

const Isa* best_isa() {
#if defined(__x86_64__)
  if (kAvx512Bf16.runs_here()) return &kAvx512Bf16;
  if (kAvx2.runs_here()) return &kAvx2;
#endif
  return &kPortable;
}

std::atomic<const Isa*> g_isa{nullptr};

const Isa& isa() {
  const Isa* chosen = g_isa.load();
  if (!chosen) g_isa.store(chosen = best_isa());
  return *chosen;
}

// Grows and never shrinks: a fresh mapping per call would cost a page fault per 4 KiB.
class Workspace {
 public:
  ~Workspace() { std::free(start_); }
  uint8_t* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(start_);
      capacity_ = round_up(bytes + bytes / 8, 4096);
      start_ = static_cast<uint8_t*>(std::aligned_alloc(4096, capacity_));
      if (!start_) capacity_ = 0;
    }
    return start_;
  }

 private:
  uint8_t* start_ = nullptr;
  int64_t capacity_ = 0;
};

// How a tier is computed: its codes and bf16, or integer dot products of them. Eight bits are no
// coarser than int8 activations, and so are not worth it.
enum Way { kBf16, kInt8 };
constexpr int64_t kMostInt8Bits = 4;
constexpr int64_t kMostInt8Rows = int64_t{1} << 20;  // 15 * 127 times this fits 32 bits

std::atomic<bool> g_int8{false};

Way way_of(const Shape& shape) {
  const bool small = shape.bits <= kMostInt8Bits && shape.rows <= kMostInt8Rows;
  return g_int8.load() && is_packed(shape.bits) && small ? kInt8 : kBf16;
}

// An expert that some token goes to; its tiers that have micro-experts are blocks, by the way they
// are computed.
struct Expert {
  Routed routed;
  std::vector<const uint8_t*> gate_up[2];
  std::vector<DownBlock> down[2];
  int64_t hidden_stride = 0;  // bytes from row to row

  bool empty() const { return down[kBf16].empty() && down[kInt8].empty(); }
};

struct PanelItem {
  size_t expert;
  Way way;
  size_t block;
  int64_t panel;
};

// Tokens with ordinary activations, and those whose spikes int8 would not do justice, which the
// other way takes. The pointers are into one array: the second follow the first.
struct Split {
  Routed ordinary, spiky;
};

int check(const camera_layer& layer) {
  if (layer.num_experts < 1 || layer.num_experts > kMostCount) return CAMERA_BAD_SHAPE;
  if (layer.num_tiers < 1 || layer.num_tiers > kMostCount) return CAMERA_BAD_SHAPE;
  for (int64_t t = 0; t < layer.num_tiers; ++t) {
    const camera_tier& tier = layer.tiers[t];
    if (!Shape{tier.bits, 0, layer.d_model, layer.group_size}.valid()) return CAMERA_BAD_SHAPE;
    if (tier.offsets[0] != 0) return CAMERA_BAD_OFFSETS;
    int64_t gate_up = 0, down = 0;
    for (int64_t e = 0; e < layer.num_experts; ++e) {
      const int64_t start = tier.offsets[e], end = tier.offsets[e + 1];
      if (end < start || end > kMostRows) return CAMERA_BAD_OFFSETS;
      const Shape shape{tier.bits, end - start, layer.d_model, layer.group_size};
      gate_up += shape.gate_up_bytes();
      down += shape.down_bytes();
    }
    if (gate_up != tier.gate_up_bytes || down != tier.down_bytes) return CAMERA_BAD_SIZE;
  }
  return CAMERA_OK;
}

// One call's work. The vectors are few and small beside a layer's weights.
class Run {
 public:
  Run(const camera_layer& layer, const uint16_t* x, int64_t num_tokens, int64_t top_k,
      uint16_t* out)
      : layer_(layer), x_(x), num_tokens_(num_tokens), top_k_(top_k), out_(out) {}

  int run(const float* weights, const int32_t* ids, Workspace& workspace) {
    sort_tokens(weights, ids);
    find_blocks();
    if (!place(workspace)) return CAMERA_NO_MEMORY;
#pragma omp parallel num_threads(threads_)
    {
      sum_groups();
#pragma omp barrier
      split_by_x();
#pragma omp barrier
      gate_up();
#pragma omp barrier
      split_by_hidden();
#pragma omp barrier
      down();
    }
    return CAMERA_OK;
  }

 private:
  // Counting sort: tokens of an expert stay in order, so sums do not depend on the threads.
  void sort_tokens(const float* weights, const int32_t* ids) {
    const int64_t slots = num_tokens_ * top_k_;
    std::vector<int64_t> start(layer_.num_experts + 1, 0);
    for (int64_t s = 0; s < slots; ++s)
      if (held(ids[s])) ++start[ids[s] + 1];
    for (int64_t e = 0; e < layer_.num_experts; ++e) start[e + 1] += start[e];
    token_.resize(start.back());
    row_.resize(start.back());
    weight_.resize(start.back());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t s = 0; s < slots; ++s) {
      if (!held(ids[s])) continue;
      const int64_t to = next[ids[s]]++;
      token_[to] = static_cast<int32_t>(s / top_k_);
      row_[to] = static_cast<int32_t>(to - start[ids[s]]);
      weight_[to] = weights[s];
    }
    routed_.resize(layer_.num_experts);
    for (int64_t e = 0; e < layer_.num_experts; ++e)
      routed_[e] = {token_.data() + start[e], row_.data() + start[e], weight_.data() + start[e],
                    start[e + 1] - start[e]};
  }

  bool held(int32_t id) const { return id >= 0 && id < layer_.num_experts; }

  void find_blocks() {
    std::vector<int64_t> gate_up(layer_.num_tiers, 0), down(layer_.num_tiers, 0);
    for (int64_t e = 0; e < layer_.num_experts; ++e) {
      Expert expert{routed_[e], {}, {}};
      int64_t packed_rows = 0;
      for (int64_t t = 0; t < layer_.num_tiers; ++t) {
        const camera_tier& tier = layer_.tiers[t];
        const Shape shape{tier.bits, tier.offsets[e + 1] - tier.offsets[e], layer_.d_model,
                          layer_.group_size};
        if (shape.rows > 0 && expert.routed.count > 0) {
          const Way way = way_of(shape);
          for (int64_t p = 0; p < shape.num_panels(); ++p)
            panels_.push_back({experts_.size(), way, expert.down[way].size(), p});
          expert.gate_up[way].push_back(tier.gate_up + gate_up[t]);
          expert.down[way].push_back({shape, tier.down + down[t], nullptr});
          has_int8_ |= way == kInt8;
          expert.hidden_stride += shape.hidden_bytes();
          if (is_packed(shape.bits)) packed_rows += shape.down_rows();
        }
        gate_up[t] += shape.gate_up_bytes();
        down[t] += shape.down_bytes();
      }
      if (expert.empty()) continue;
      most_.tokens = std::max(most_.tokens, expert.routed.count);
      most_.rows = std::max(most_.rows, packed_rows);
      experts_.push_back(std::move(expert));
    }
    if (most_.rows) {
      most_.group_size = layer_.group_size;
      most_.d_model = layer_.d_model;
    }
  }

  // Wide ranges share the scaling of activations between their blocks; many threads want narrow.
  int64_t columns_per_item() const {
    for (int64_t columns : {512, 256, 128, 64})
      if (layer_.d_model % columns == 0 && layer_.d_model / columns >= 4 * threads_) return columns;
    return kBlockCols;
  }

  bool place(Workspace& workspace) {
    if (has_int8_) {
      split_token_.resize(token_.size());
      split_row_.resize(token_.size());
      split_weight_.resize(token_.size());
      spiky_x_.resize(num_tokens_);
      split_.resize(experts_.size());
    }
    threads_ = threads_worth_waking();
    columns_ = columns_per_item();
    scratch_bytes_ = round_up(isa().scratch_bytes(most_), 4096);
    sums_bytes_ = round_up(num_tokens_ * columns_ * 4, 4096);
    const int64_t x_sums = most_.rows ? round_up(num_tokens_ * groups() * 4, 4096) : 0;
    const int64_t x8 = has_int8_ ? round_up(num_tokens_ * layer_.d_model, 4096) : 0;
    int64_t hidden = 0;
    for (const Expert& expert : experts_) hidden += expert.routed.count * expert.hidden_stride;
    uint8_t* start =
        workspace.reserve(3 * x_sums + x8 + threads_ * (scratch_bytes_ + sums_bytes_) + hidden);
    if (!start) return false;
    x_sums_ = reinterpret_cast<float*>(start);
    x8_.scales = reinterpret_cast<float*>(start + x_sums);
    x8_.sums = reinterpret_cast<float*>(start + 2 * x_sums);
    x8_.codes = reinterpret_cast<int8_t*>(start + 3 * x_sums);
    scratch_ = start + 3 * x_sums + x8;
    sums_ = scratch_ + threads_ * scratch_bytes_;
    uint8_t* next = sums_ + threads_ * sums_bytes_;
    for (Expert& expert : experts_) {
      uint8_t* tier = next;
      for (auto& blocks : expert.down) {
        for (DownBlock& block : blocks) {
          block.hidden = tier;
          tier += block.shape.hidden_bytes();
        }
      }
      next += expert.routed.count * expert.hidden_stride;
    }
    return true;
  }

  // Waking a thread costs as much as reading some 100 KiB.
  int threads_worth_waking() const {
    constexpr int64_t kWorth = 1 << 17;
    int64_t work = 0;
    for (const Expert& expert : experts_)
      for (const auto& blocks : expert.down)
        for (const DownBlock& block : blocks)
          work += (block.shape.gate_up_bytes() + block.shape.down_bytes()) *
                  ceil_div(expert.routed.count, 8);
    return static_cast<int>(std::min<int64_t>(omp_get_max_threads(), 1 + work / kWorth));
  }

  int64_t groups() const { return layer_.d_model / layer_.group_size; }

  // Of tokens that some packed tier multiplies: their groups' sums, and their inputs in int8.
  void sum_groups() {
    if (has_int8_) {
      const Shape shape{1, 0, layer_.d_model, layer_.group_size};
#pragma omp for nowait
      for (int64_t token = 0; token < num_tokens_; ++token)
        spiky_x_[token] = isa().quantize_x(x_, token, shape, x8_);
    }
    if (!most_.rows) return;
    const int64_t size = layer_.group_size, num_groups = groups();
#pragma omp for
    for (int64_t i = 0; i < num_tokens_ * num_groups; ++i) {
      const uint16_t* x = x_ + (i / num_groups) * layer_.d_model + (i % num_groups) * size;
      float partial[16] = {};
      for (int64_t k = 0; k < size; k += 16)
        for (int64_t lane = 0; lane < 16; ++lane) partial[lane] += from_bf16(x[k + lane]);
      float sum = 0;
      for (float value : partial) sum += value;
      x_sums_[i] = sum;
    }
  }

  // Orders an expert's tokens, those that are not spiky first; each kind stays in order.
  template <typename IsSpiky>
  Split split(const Routed& routed, IsSpiky&& is_spiky) {
    const int64_t start = routed.token - token_.data();
    int64_t ordinary = 0, to = start;
    for (const bool wanted : {false, true}) {
      for (int64_t i = 0; i < routed.count; ++i) {
        if (is_spiky(i) != wanted) continue;
        split_token_[to] = routed.token[i];
        split_row_[to] = routed.row[i];
        split_weight_[to++] = routed.weight[i];
      }
      if (!wanted) ordinary = to - start;
    }
    const auto part = [&](int64_t first, int64_t count) {
      return Routed{split_token_.data() + start + first, split_row_.data() + start + first,
                    split_weight_.data() + start + first, count};
    };
    return {part(0, ordinary), part(ordinary, routed.count - ordinary)};
  }

  void split_by_x() {
    if (!has_int8_) return;
#pragma omp for
    for (size_t e = 0; e < experts_.size(); ++e) {
      const Routed& routed = experts_[e].routed;
      split_[e] = split(routed, [&](int64_t i) { return spiky_x_[routed.token[i]] != 0; });
    }
  }

  void split_by_hidden() {
    if (!has_int8_) return;
#pragma omp for
    for (size_t e = 0; e < experts_.size(); ++e) {
      const Expert& expert = experts_[e];
      split_[e] = split(expert.routed, [&](int64_t i) {
        return spiky_x_[expert.routed.token[i]] != 0 || has_spike(expert, i);
      });
    }
  }

  static bool has_spike(const Expert& expert, int64_t row) {
    for (const DownBlock& block : expert.down[kInt8]) {
      Spread all{0, 0};
      const uint8_t* from = block.hidden + row * expert.hidden_stride + block.shape.spread_offset();
      for (int64_t panel = 0; panel < block.shape.num_panels(); ++panel, from += kSpreadBytes) {
        Spread one;
        std::memcpy(&one, from, sizeof one);
        all.largest = std::max(all.largest, one.largest);
        all.sum += one.sum;
      }
      if (is_spiky(all, block.shape.down_rows())) return true;
    }
    return false;
  }

  void gate_up() {
    uint8_t* scratch = scratch_ + omp_get_thread_num() * scratch_bytes_;
    // Taking the next ticket early tells what to prefetch.
    for (size_t item = next_panel_++, then; item < panels_.size(); item = then) {
      then = next_panel_++;
      const Way way = panels_[item].way;
      GateUpJob job = panel_job(panels_[item], scratch);
      if (then < panels_.size()) {
        const GateUpJob following = panel_job(panels_[then], scratch);
        job.next = following.panel;
        job.next_bytes = following.shape.gate_up_bytes();
      }
      if (way == kInt8) {
        const Split& split = split_[panels_[item].expert];
        job.routed = split.ordinary;
        if (job.routed.count) isa().gate_up_int8(job);
        job.routed = split.spiky;
      }
      if (job.routed.count) isa().gate_up(job);
    }
  }

  GateUpJob panel_job(const PanelItem& item, uint8_t* scratch) const {
    const Expert& expert = experts_[item.expert];
    const DownBlock& block = expert.down[item.way][item.block];
    const int64_t element = is_packed(block.shape.bits) ? 4 : 2;
    GateUpJob job{};
    job.shape = block.shape;
    job.shape.rows = block.shape.panel_rows(item.panel);
    job.panel = expert.gate_up[item.way][item.block] + block.shape.panel_offset(item.panel);
    job.x = x_;
    job.x_sums = x_sums_;
    job.x8 = x8_;
    job.routed = expert.routed;
    auto* hidden = const_cast<uint8_t*>(block.hidden);
    job.hidden = hidden + item.panel * kPanelRows * element;
    job.spreads = hidden + block.shape.spread_offset() + item.panel * kSpreadBytes;
    job.hidden_stride = expert.hidden_stride;
    job.scratch = scratch;
    return job;
  }

  void down() {
    const int thread = omp_get_thread_num();
    float* sums = reinterpret_cast<float*>(sums_ + thread * sums_bytes_);
    uint8_t* scratch = scratch_ + thread * scratch_bytes_;
    for (int64_t item; (item = next_columns_++) < layer_.d_model / columns_;) {
      std::memset(sums, 0, num_tokens_ * columns_ * 4);
      for (size_t e = 0; e < experts_.size(); ++e) down(e, down_job(e, item * columns_, sums, scratch));
      for (int64_t t = 0; t < num_tokens_; ++t)
        for (int64_t c = 0; c < columns_; ++c)
          out_[t * layer_.d_model + item * columns_ + c] = to_bf16(sums[t * columns_ + c]);
    }
  }

  void down(size_t e, DownJob job) const {
    const auto with = [&](Way way, const Routed& routed) {
      job.blocks = experts_[e].down[way].data();
      job.num_blocks = static_cast<int64_t>(experts_[e].down[way].size());
      job.routed = routed;
      return job.num_blocks && routed.count;
    };
    if (with(kBf16, experts_[e].routed)) isa().down(job);
    if (!has_int8_) return;
    if (with(kInt8, split_[e].ordinary)) isa().down_int8(job);
    if (with(kInt8, split_[e].spiky)) isa().down(job);
  }

  DownJob down_job(size_t e, int64_t column, float* sums, uint8_t* scratch) const {
    const Expert& expert = experts_[e];
    DownJob job{};
    job.group_size = layer_.group_size;
    job.column = column;
    job.num_columns = columns_;
    if (e + 1 < experts_.size()) {
      const auto& then = experts_[e + 1].down;
      const DownBlock& following = then[kBf16].empty() ? then[kInt8][0] : then[kBf16][0];
      const int64_t block_bytes = following.shape.down_block_bytes();
      job.next = following.packed + column / kBlockCols * block_bytes;
      job.next_bytes = columns_ / kBlockCols * block_bytes;
    }
    job.hidden_stride = expert.hidden_stride;
    job.sums = sums;
    job.scratch = scratch;
    return job;
  }

  const camera_layer& layer_;
  const uint16_t* x_;
  const int64_t num_tokens_, top_k_;
  uint16_t* out_;

  std::vector<int32_t> token_, row_, split_token_, split_row_;
  std::vector<float> weight_, split_weight_;
  std::vector<uint8_t> spiky_x_;
  std::vector<Split> split_;
  std::vector<Routed> routed_;
  std::vector<Expert> experts_;
  std::vector<PanelItem> panels_;
  Extent most_{};
  int64_t columns_ = 0, scratch_bytes_ = 0, sums_bytes_ = 0;
  int threads_ = 1;
  bool has_int8_ = false;
  float* x_sums_ = nullptr;
  Int8Inputs x8_{};
  uint8_t *scratch_ = nullptr, *sums_ = nullptr;
  std::atomic<size_t> next_panel_{0};
  std::atomic<int64_t> next_columns_{0};
};

}  // namespace
}  // namespace camera

extern "C" int camera_moe(const camera_layer* layer, const uint16_t* x, const float* weights,
                          const int32_t* ids, int64_t num_tokens, int64_t top_k, uint16_t* out) {
  static thread_local camera::Workspace workspace;
  if (num_tokens < 0 || num_tokens > camera::kMostTokens) return CAMERA_BAD_SHAPE;
  if (top_k < 0 || top_k > camera::kMostCount) return CAMERA_BAD_SHAPE;
  if (const int error = camera::check(*layer)) return error;
  if (num_tokens == 0) return CAMERA_OK;
  try {
    return camera::Run(*layer, x, num_tokens, top_k, out).run(weights, ids, workspace);
  } catch (const std::bad_alloc&) {
    return CAMERA_NO_MEMORY;
  }
}

extern "C" const char* camera_isa(void) { return camera::isa().name; }

extern "C" int camera_int8(void) { return camera::g_int8.load(); }

extern "C" void camera_use_int8(int yes) { camera::g_int8.store(yes != 0); }

extern "C" int camera_use_isa(const char* name) {
  for (const camera::Isa* candidate : {
#if defined(__x86_64__)
           &camera::kAvx512Bf16, &camera::kAvx2,
#endif
           &camera::kPortable}) {
    if (std::strcmp(candidate->name, name) == 0 && candidate->runs_here()) {
      camera::g_isa.store(candidate);
      return CAMERA_OK;
    }
  }
  return CAMERA_BAD_ISA;
}
