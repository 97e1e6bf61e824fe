// Log-probability, entropy and dlogits of rows of logits on CPU, rows in parallel. Formulas and the meaning of the
// arguments: fastalign/ops/token_logprobs.py; the work on one row: token_logprobs_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "rows.h"

namespace fastalign {

struct RowStats {
  float logp, entropy, row_max, log_sum;
};

struct RowGradient {
  float g, e, logp, entropy, row_max, log_sum;
};

}  // namespace fastalign

#define FASTALIGN_ROWS "token_logprobs_rows.h"
#include "common.h"

namespace {

using fastalign::RowGradient;
using fastalign::RowSettings;
using fastalign::RowStats;
using fastalign::Rows;
using fastalign::rows_of;
using fastalign::rows_per_task;
using fastalign::with_dense_rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
void stats_of_rows(const Rows& rows, float* logp, float* entropy, float* row_max, float* log_sum) {
  const auto body = [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      RowStats stats{0.0f, 0.0f, 0.0f, 0.0f};
      if (rows.targets[row] != rows.ignore_index) {
        FASTALIGN_CALL(row_stats<T>, rows.row(row), rows.vocab, rows.targets[row],
                       rows.settings(row), &stats);
      }
      logp[row] = stats.logp;
      entropy[row] = stats.entropy;
      row_max[row] = stats.row_max;
      log_sum[row] = stats.log_sum;
    }
  };
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.vocab), body);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_cpu(const Tensor& logits_in,
                                                         const Tensor& targets_in,
                                                         const Tensor& temperature_in,
                                                         double softcap, int64_t ignore_index) {
  const Tensor logits = with_dense_rows(logits_in);
  const Tensor targets = torch::stable::contiguous(targets_in);
  const Tensor temperature = torch::stable::contiguous(temperature_in);
  const Rows rows = rows_of("row_stats", logits, targets, temperature, softcap, ignore_index);
  const auto vector = [&] { return torch::stable::new_empty(logits, {rows.count}, ScalarType::Float); };
  Tensor logp = vector(), entropy = vector(), row_max = vector(), log_sum = vector();
  const auto floats = [](Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      stats_of_rows<float>(rows, floats(logp), floats(entropy), floats(row_max), floats(log_sum));
      break;
    case ScalarType::BFloat16:
      stats_of_rows<fastalign::Bfloat16>(rows, floats(logp), floats(entropy), floats(row_max),
                                         floats(log_sum));
      break;
    case ScalarType::Half:
      stats_of_rows<fastalign::Float16>(rows, floats(logp), floats(entropy), floats(row_max),
                                        floats(log_sum));
      break;
    default:
      STD_TORCH_CHECK(false, "row_stats: expected float32, bfloat16 or float16 logits on CPU");
  }
  return {logp, entropy, row_max, log_sum};
}

struct GradientInputs {
  const float *grad_logp, *grad_entropy, *logp, *entropy, *row_max, *log_sum;
};

template <typename T>
void dlogits_of_rows(const Rows& rows, const GradientInputs& in, char* out) {
  const auto body = [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      char* to = out + row * rows.vocab * static_cast<int64_t>(sizeof(T));
      if (rows.targets[row] == rows.ignore_index) {
        std::memset(to, 0, rows.vocab * sizeof(T));
        continue;
      }
      const RowGradient gradient{in.grad_logp[row], in.grad_entropy ? in.grad_entropy[row] : 0.0f,
                                 in.logp[row], in.entropy[row], in.row_max[row],
                                 in.log_sum[row]};
      FASTALIGN_CALL(dlogits<T>, to, rows.row(row), rows.vocab, rows.targets[row],
                     rows.settings(row), in.grad_entropy != nullptr, gradient);
    }
  };
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.vocab), body);
}

// `out` is contiguous and may be `logits`.
void dlogits_cpu(Tensor out, const Tensor& grad_logp_in, const std::optional<Tensor>& grad_entropy_in,
                 const Tensor& logits_in, const Tensor& targets_in, const Tensor& temperature_in,
                 double softcap, int64_t ignore_index, const Tensor& logp_in,
                 const Tensor& entropy_in, const Tensor& row_max_in, const Tensor& log_sum_in) {
  const Tensor logits = with_dense_rows(logits_in);
  const Tensor targets = torch::stable::contiguous(targets_in);
  const Tensor temperature = torch::stable::contiguous(temperature_in);
  const Tensor grad_logp = torch::stable::contiguous(grad_logp_in);
  const bool has_entropy = grad_entropy_in.has_value();
  const Tensor grad_entropy =
      torch::stable::contiguous(has_entropy ? *grad_entropy_in : grad_logp_in);
  const Tensor logp = torch::stable::contiguous(logp_in);
  const Tensor entropy = torch::stable::contiguous(entropy_in);
  const Tensor row_max = torch::stable::contiguous(row_max_in);
  const Tensor log_sum = torch::stable::contiguous(log_sum_in);
  const Rows rows = rows_of("dlogits", logits, targets, temperature, softcap, ignore_index);
  STD_TORCH_CHECK(out.is_contiguous(), "dlogits: expected contiguous out");
  const auto floats = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
  const GradientInputs in{floats(grad_logp), has_entropy ? floats(grad_entropy) : nullptr,
                          floats(logp), floats(entropy), floats(row_max), floats(log_sum)};
  char* to = static_cast<char*>(out.mutable_data_ptr());
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      dlogits_of_rows<float>(rows, in, to);
      break;
    case ScalarType::BFloat16:
      dlogits_of_rows<fastalign::Bfloat16>(rows, in, to);
      break;
    case ScalarType::Half:
      dlogits_of_rows<fastalign::Float16>(rows, in, to);
      break;
    default:
      STD_TORCH_CHECK(false, "dlogits: expected float32, bfloat16 or float16 logits on CPU");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "row_stats(Tensor logits, Tensor targets, Tensor temperature, float softcap, int ignore_index) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dlogits(Tensor(a!) out, Tensor grad_logp, Tensor? grad_entropy, Tensor logits, Tensor targets, "
      "Tensor temperature, float softcap, int ignore_index, Tensor logp, Tensor entropy, Tensor row_max, "
      "Tensor log_sum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&row_stats_cpu));
  m.impl("dlogits", TORCH_BOX(&dlogits_cpu));
}
