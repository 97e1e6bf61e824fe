// Bradley-Terry loss of K heads and its gradient on CPU, in one pass over the cells, blocks of cells in parallel.
// Formulas and the meaning of the arguments: fastalign/ops/bradley_terry_loss.py; the work on one block:
// bradley_terry_loss_cells.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#define FASTALIGN_ROWS "bradley_terry_loss_cells.h"
#include "common.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 2048;       // cells handled together, or one pair where it has more heads
constexpr int64_t kBlocksPerTask = 4;  // what one thread should have before a second one is worth waking
constexpr int64_t kMostLanes = 16;

// Shapes and pointers of one call; null pointers are tensors that are absent.
struct Pairs {
  const void *chosen, *rejected;
  const float* margin;
  const int32_t* mask;
  int64_t n, heads, margin_columns;
  float offset, label_smoothing;
  std::vector<float> weight;  // of one count, for a block of cells: 1 / (heads * max(1, total of the head))
};

// Fills gap, and how often each counts, of `count` cells that lie side by side from `first` on, the first one of
// head 0.
template <typename T>
void gather_cells(const Pairs& pairs, int64_t first, int64_t count, float* __restrict gap,
                  float* __restrict times) {
  const T* chosen = static_cast<const T*>(pairs.chosen) + first;
  const T* rejected = static_cast<const T*>(pairs.rejected) + first;
  for (int64_t i = 0; i < count; ++i) {
    gap[i] = static_cast<float>(chosen[i]) - static_cast<float>(rejected[i]) - pairs.offset;
  }
  if (pairs.margin && pairs.margin_columns == 1) {
    for (int64_t i = 0; i < count; i += pairs.heads) {
      const float margin = pairs.margin[(first + i) / pairs.heads];
      for (int64_t k = 0; k < pairs.heads; ++k) gap[i + k] -= margin;
    }
  } else if (pairs.margin) {
    for (int64_t i = 0; i < count; ++i) gap[i] -= pairs.margin[first + i];
  }
  for (int64_t i = 0; i < count; ++i) {
    times[i] = pairs.mask ? static_cast<float>(pairs.mask[first + i]) : 1.0f;
  }
}

int64_t cells_of_a_block(int64_t heads) { return heads * std::max<int64_t>(1, kBlock / heads); }

template <typename T>
double loss_and_dgap(const Pairs& pairs, float* dgap) {
  const int64_t cells = pairs.n * pairs.heads, size = cells_of_a_block(pairs.heads);
  const int64_t blocks = (cells + size - 1) / size;
  // One sum per block: how many threads there are does not change the result.
  std::vector<double> parts(blocks);
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t first, int64_t last) {
    std::vector<float> gap(size + kMostLanes), times(size + kMostLanes);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * size, count = std::min(size, cells - begin);
      gather_cells<T>(pairs, begin, count, gap.data(), times.data());
      // Cells that never count fill the last register.
      std::fill_n(times.begin() + count, kMostLanes, 0.0f);
      FASTALIGN_CALL(cells_loss, gap.data(), times.data(), pairs.weight.data(), count, pairs.label_smoothing,
                     &parts[block]);
      std::copy(gap.begin(), gap.begin() + count, dgap + begin);
    }
  });
  double loss = 0.0;
  for (const double part : parts) loss += part;
  return loss;
}

std::vector<float> weight_of(const int32_t* mask, const float* totals, int64_t n, int64_t heads) {
  std::vector<int64_t> counts(heads, n);
  if (mask && !totals) {
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t b = 0; b < n; ++b) {
      for (int64_t k = 0; k < heads; ++k) counts[k] += std::max(0, mask[b * heads + k]);
    }
  }
  std::vector<float> weight(cells_of_a_block(heads) + kMostLanes);
  for (int64_t k = 0; k < heads; ++k) {
    const double total = std::max(1.0, totals ? totals[k] : static_cast<double>(counts[k]));
    for (size_t i = k; i < weight.size(); i += heads) {
      weight[i] = static_cast<float>(1.0 / (static_cast<double>(heads) * total));
    }
  }
  return weight;
}

std::tuple<Tensor, Tensor> bradley_terry_loss_cpu(const Tensor& chosen_in, const Tensor& rejected_in,
                                                  const std::optional<Tensor>& margin_in, double offset,
                                                  const std::optional<Tensor>& mask_in,
                                                  const std::optional<Tensor>& totals_in,
                                                  double label_smoothing) {
  const auto contiguous = [](const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
  };
  const auto pointer = [](const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; };
  const Tensor chosen = torch::stable::contiguous(chosen_in);
  const Tensor rejected = torch::stable::contiguous(rejected_in);
  const std::optional<Tensor> margin = contiguous(margin_in), mask = contiguous(mask_in);
  const std::optional<Tensor> totals = contiguous(totals_in);
  const int64_t n = chosen.size(0), heads = chosen.size(1);
  Tensor loss = torch::stable::new_empty(chosen, {}, ScalarType::Float);
  Tensor dgap = torch::stable::new_empty(chosen, {n, heads}, ScalarType::Float);
  const int32_t* counts = static_cast<const int32_t*>(pointer(mask));
  const Pairs pairs{chosen.const_data_ptr(),
                    rejected.const_data_ptr(),
                    static_cast<const float*>(pointer(margin)),
                    counts,
                    n,
                    heads,
                    margin ? margin->size(1) : 0,
                    static_cast<float>(offset),
                    static_cast<float>(label_smoothing),
                    weight_of(counts, static_cast<const float*>(pointer(totals)), n, heads)};
  float* to = static_cast<float*>(dgap.mutable_data_ptr());
  double sum = 0.0;
  switch (chosen.scalar_type()) {
    case ScalarType::Float:
      sum = loss_and_dgap<float>(pairs, to);
      break;
    case ScalarType::BFloat16:
      sum = loss_and_dgap<torch::headeronly::BFloat16>(pairs, to);
      break;
    case ScalarType::Half:
      sum = loss_and_dgap<torch::headeronly::Half>(pairs, to);
      break;
    default:
      STD_TORCH_CHECK(false, "bradley_terry_loss: expected float32, bfloat16 or float16 scores on CPU");
  }
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum);
  return {loss, dgap};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "bradley_terry_loss(Tensor chosen, Tensor rejected, Tensor? margin, float offset, Tensor? head_mask, "
      "Tensor? totals, float label_smoothing) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("bradley_terry_loss", TORCH_BOX(&bradley_terry_loss_cpu));
}
