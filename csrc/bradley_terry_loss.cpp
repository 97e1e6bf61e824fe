// Bradley-Terry loss of K heads and its gradient on CPU, in one pass over the cells, blocks of cells in parallel.
// Formulas and the meaning of the arguments: fastalign/ops/bradley_terry_loss.py; the work on one block:
// bradley_terry_loss_cells.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "direct.h"

#define FASTALIGN_ROWS "bradley_terry_loss_cells.h"
#include "common.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 2048;       // cells handled together, or one pair where it has more heads
constexpr int64_t kBlocksPerTask = 4;  // what one thread should have before a second one is worth waking
constexpr int64_t kCountsPerTask = 32768;
constexpr int64_t kRound = 64;  // counts added side by side, where a pair has fewer

// Shapes and pointers of one call; null pointers are tensors that are absent. Cells lie side by side, those of a pair
// together.
struct Pairs {
  const char *chosen, *rejected;
  const float* margin;
  const char* counts;
  int64_t n, heads, margin_columns;
  float offset, label_smoothing;

  int64_t cells() const { return n * heads; }
  // Of a block: whole pairs.
  int64_t size() const { return std::min(cells(), heads * std::max<int64_t>(1, kBlock / heads)); }
  int64_t blocks() const { return cells() == 0 ? 0 : (cells() + size() - 1) / size(); }
};

// Calls f with a value of the scores' type.
template <typename F>
void with_type(ScalarType scores, const F& f) {
  switch (scores) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(fastalign::Bfloat16{});
    case ScalarType::Half:
      return f(fastalign::Float16{});
    default:
      STD_TORCH_CHECK(false, "bradley_terry_loss: expected float32, bfloat16 or float16 scores on CPU");
  }
}

// Calls f with a value of the counts' type.
template <typename F>
void with_counts(ScalarType counts, const F& f) {
  switch (counts) {
    case ScalarType::Bool:
      return f(uint8_t{});
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Long:
      return f(int64_t{});
    default:
      STD_TORCH_CHECK(false, "bradley_terry_loss: expected a bool, int32 or int64 head_mask on CPU");
  }
}

// How many pairs each head keeps, repeats counted.
template <typename Count>
std::vector<int64_t> kept(const Pairs& pairs) {
  std::vector<int64_t> totals(pairs.heads, pairs.counts ? 0 : pairs.n);
  if (!pairs.counts) {
    return totals;
  }
  const int64_t round = pairs.heads * std::max<int64_t>(1, kRound / pairs.heads);
  const int64_t size = round * std::max<int64_t>(1, kCountsPerTask / round);
  const int64_t tasks = (pairs.cells() + size - 1) / size;
  std::vector<int64_t> parts(tasks * round);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task * size, count = std::min(size, pairs.cells() - begin);
      FASTALIGN_CALL(add_counts<Count>, pairs.counts + begin * sizeof(Count), count, &parts[task * round],
                     round);
    }
  });
  for (size_t i = 0; i < parts.size(); ++i) totals[i % pairs.heads] += parts[i];
  return totals;
}

// What one count of each cell of a block weighs: 1 / (heads * max(1, total of the head)).
template <typename Total>
std::vector<float> weights(const Pairs& pairs, const Total* totals) {
  std::vector<float> weight(pairs.size());
  for (int64_t i = 0; i < pairs.size(); ++i) {
    const double heads = static_cast<double>(pairs.heads);
    weight[i] = i < pairs.heads
                    ? static_cast<float>(1.0 / (heads * std::max(1.0, static_cast<double>(totals[i]))))
                    : weight[i - pairs.heads];
  }
  return weight;
}

template <typename T, typename Count>
double loss_and_dgap(const Pairs& pairs, const std::vector<float>& weight, float* dgap) {
  const int64_t size = pairs.size(), blocks = pairs.blocks();
  const bool spread = pairs.margin && pairs.margin_columns < pairs.heads;
  // One sum per block: how many threads there are does not change the result.
  std::vector<double> parts(blocks);
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t first, int64_t last) {
    std::vector<float> times(pairs.counts ? size : 0), margins(spread ? size : 0);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * size, count = std::min(size, pairs.cells() - begin);
      if (pairs.counts) {
        FASTALIGN_CALL(counts_as_floats<Count>, pairs.counts + begin * sizeof(Count), count, times.data());
      }
      const float* margin = pairs.margin ? pairs.margin + begin : nullptr;
      if (spread) {
        for (int64_t i = 0; i < count; i += pairs.heads) {
          std::fill_n(&margins[i], pairs.heads, pairs.margin[(begin + i) / pairs.heads]);
        }
        margin = margins.data();
      }
      FASTALIGN_CALL(cells_loss<T>, pairs.chosen + begin * sizeof(T), pairs.rejected + begin * sizeof(T),
                     margin, pairs.offset, pairs.counts ? times.data() : nullptr, weight.data(), count,
                     pairs.label_smoothing, dgap + begin, &parts[block]);
    }
  });
  double loss = 0.0;
  for (const double part : parts) loss += part;
  return loss;
}

// The loss, and dL/dgap to `dgap`. `counts` is any type where there are none; totals may be null.
float loss_of_pairs(const Pairs& pairs, ScalarType scores, ScalarType counts, const float* totals, float* dgap) {
  double sum = 0.0;
  with_counts(counts, [&](auto count) {
    using Count = decltype(count);
    const std::vector<float> weight =
        totals ? weights(pairs, totals) : weights(pairs, kept<Count>(pairs).data());
    with_type(scores, [&](auto zero) { sum = loss_and_dgap<decltype(zero), Count>(pairs, weight, dgap); });
  });
  return static_cast<float>(sum);
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
  const Pairs pairs{static_cast<const char*>(chosen.const_data_ptr()),
                    static_cast<const char*>(rejected.const_data_ptr()),
                    static_cast<const float*>(pointer(margin)),
                    static_cast<const char*>(pointer(mask)),
                    n,
                    heads,
                    margin ? margin->size(1) : 0,
                    static_cast<float>(offset),
                    static_cast<float>(label_smoothing)};
  *static_cast<float*>(loss.mutable_data_ptr()) =
      loss_of_pairs(pairs, chosen.scalar_type(), mask ? mask->scalar_type() : ScalarType::Bool,
                    static_cast<const float*>(pointer(totals)), static_cast<float*>(dgap.mutable_data_ptr()));
  return {loss, dgap};
}

}  // namespace

// (dtype, chosen, rejected, margin, margin's columns, offset, head_mask's dtype, head_mask, totals, label_smoothing,
// pairs, heads, loss, dgap)
PyObject* fastalign::bradley_terry_loss_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments in(given, count);
  Pairs pairs{};
  const ScalarType scores = in.dtype();
  pairs.chosen = in.address<const char>(), pairs.rejected = in.address<const char>();
  pairs.margin = in.address<const float>(), pairs.margin_columns = in.integer();
  pairs.offset = static_cast<float>(in.number());
  const ScalarType counts = in.dtype();
  pairs.counts = in.address<const char>();
  const float* totals = in.address<const float>();
  pairs.label_smoothing = static_cast<float>(in.number());
  pairs.n = in.integer(), pairs.heads = in.integer();
  float *loss = in.address<float>(), *dgap = in.address<float>();
  return in.finished([&] { *loss = loss_of_pairs(pairs, scores, counts, totals, dgap); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "bradley_terry_loss(Tensor chosen, Tensor rejected, Tensor? margin, float offset, Tensor? head_mask, "
      "Tensor? totals, float label_smoothing) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("bradley_terry_loss", TORCH_BOX(&bradley_terry_loss_cpu));
}
