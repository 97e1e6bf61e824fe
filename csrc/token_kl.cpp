// KL to a reference model and its dlogits of rows of logits on CPU, rows in parallel. Formulas and the meaning of the
// arguments: fastalign/ops/token_kl.py; the work on one row: token_kl_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "rows.h"

namespace fastalign {

// The dtypes of the two models' logits: one name, because FASTALIGN_CALL takes no comma.
template <typename T, typename R>
struct Dtypes {
  using Logits = T;
  using Reference = R;
};

struct KlStats {
  float logp, entropy, row_max, log_sum, kl, ref_logp, ref_row_max, mean_gap;
};

struct KlGradient {
  float g, e, k, logp, entropy, row_max, log_sum, ref_row_max, mean_gap;
};

}  // namespace fastalign

#define FASTALIGN_ROWS "token_kl_rows.h"
#include "common.h"

namespace {

using fastalign::Dtypes;
using fastalign::KlGradient;
using fastalign::KlStats;
using fastalign::Rows;
using fastalign::rows_of;
using fastalign::rows_per_task;
using fastalign::with_dense_rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kStats = 8;

// Calls f with a value of the logits' type.
template <typename F>
void with_type(const char* op, const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(fastalign::Bfloat16{});
    case ScalarType::Half:
      return f(fastalign::Float16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16 logits on CPU");
  }
}

// Calls f with Dtypes<T, R> of the two tensors.
template <typename F>
void with_types(const char* op, const Tensor& logits, const Tensor& ref_logits, const F& f) {
  with_type(op, logits, [&](auto x) {
    with_type(op, ref_logits, [&](auto y) { f(Dtypes<decltype(x), decltype(y)>{}); });
  });
}

template <typename Pair>
void stats_of_rows(const Rows& rows, const Rows& refs, float* const* out) {
  const auto body = [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      KlStats stats{};
      if (rows.targets[row] != rows.ignore_index) {
        FASTALIGN_CALL(kl_stats<Pair>, rows.row(row), refs.row(row), rows.vocab, rows.targets[row],
                       rows.settings(row), &stats);
      }
      const float values[kStats] = {stats.logp, stats.entropy,  stats.row_max,     stats.log_sum,
                                    stats.kl,   stats.ref_logp, stats.ref_row_max, stats.mean_gap};
      for (int i = 0; i < kStats; ++i) out[i][row] = values[i];
    }
  };
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.vocab), body);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_stats_cpu(
    const Tensor& logits_in, const Tensor& ref_logits_in, const Tensor& targets_in,
    const Tensor& temperature_in, double softcap, int64_t ignore_index) {
  const Tensor logits = with_dense_rows(logits_in), ref_logits = with_dense_rows(ref_logits_in);
  const Tensor targets = torch::stable::contiguous(targets_in);
  const Tensor temperature = torch::stable::contiguous(temperature_in);
  const Rows rows = rows_of("kl_stats", logits, targets, temperature, softcap, ignore_index);
  const Rows refs = rows_of("kl_stats", ref_logits, targets, temperature, softcap, ignore_index);
  const auto vector = [&] { return torch::stable::new_empty(logits, {rows.count}, ScalarType::Float); };
  Tensor stats[kStats] = {vector(), vector(), vector(), vector(), vector(), vector(), vector(), vector()};
  float* out[kStats];
  for (int i = 0; i < kStats; ++i) out[i] = static_cast<float*>(stats[i].mutable_data_ptr());
  with_types("kl_stats", logits, ref_logits,
             [&](auto pair) { stats_of_rows<decltype(pair)>(rows, refs, out); });
  return {stats[0], stats[1], stats[2], stats[3], stats[4], stats[5], stats[6], stats[7]};
}

struct KlGradientInputs {
  const float *grad_logp, *grad_entropy, *grad_kl, *logp, *entropy, *row_max, *log_sum, *kl, *ref_row_max,
      *mean_gap;
};

template <typename Pair>
void dlogits_of_rows(const Rows& rows, const Rows& refs, const KlGradientInputs& in, char* out) {
  constexpr int64_t bytes = sizeof(typename Pair::Logits);
  const auto body = [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      char* to = out + row * rows.vocab * bytes;
      if (rows.targets[row] == rows.ignore_index) {
        std::memset(to, 0, rows.vocab * bytes);
        continue;
      }
      KlGradient gradient{in.grad_logp[row],
                          in.grad_entropy ? in.grad_entropy[row] : 0.0f,
                          in.grad_kl[row],
                          in.logp[row],
                          in.entropy[row],
                          in.row_max[row],
                          in.log_sum[row],
                          in.ref_row_max[row],
                          in.mean_gap[row]};
      if (in.kl[row] == std::numeric_limits<float>::infinity()) {
        gradient.k = gradient.mean_gap = 0.0f;
      }
      FASTALIGN_CALL(kl_dlogits<Pair>, to, rows.row(row), refs.row(row), rows.vocab,
                     rows.targets[row], rows.settings(row), gradient);
    }
  };
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.vocab), body);
}

// `out` is contiguous and may be `logits`.
void kl_dlogits_cpu(Tensor out, const Tensor& grad_logp_in, const std::optional<Tensor>& grad_entropy_in,
                    const Tensor& grad_kl_in, const Tensor& logits_in, const Tensor& ref_logits_in,
                    const Tensor& targets_in, const Tensor& temperature_in, double softcap,
                    int64_t ignore_index, const Tensor& logp_in, const Tensor& entropy_in,
                    const Tensor& row_max_in, const Tensor& log_sum_in, const Tensor& kl_in,
                    const Tensor& ref_row_max_in, const Tensor& mean_gap_in) {
  const Tensor logits = with_dense_rows(logits_in), ref_logits = with_dense_rows(ref_logits_in);
  const Tensor targets = torch::stable::contiguous(targets_in);
  const Tensor temperature = torch::stable::contiguous(temperature_in);
  const bool has_entropy = grad_entropy_in.has_value();
  const Tensor vectors[] = {torch::stable::contiguous(grad_logp_in),
                            torch::stable::contiguous(has_entropy ? *grad_entropy_in : grad_logp_in),
                            torch::stable::contiguous(grad_kl_in),
                            torch::stable::contiguous(logp_in),
                            torch::stable::contiguous(entropy_in),
                            torch::stable::contiguous(row_max_in),
                            torch::stable::contiguous(log_sum_in),
                            torch::stable::contiguous(kl_in),
                            torch::stable::contiguous(ref_row_max_in),
                            torch::stable::contiguous(mean_gap_in)};
  const auto floats = [&](int i) { return static_cast<const float*>(vectors[i].const_data_ptr()); };
  const KlGradientInputs in{floats(0), has_entropy ? floats(1) : nullptr,
                            floats(2), floats(3),
                            floats(4), floats(5),
                            floats(6), floats(7),
                            floats(8), floats(9)};
  const Rows rows = rows_of("kl_dlogits", logits, targets, temperature, softcap, ignore_index);
  const Rows refs = rows_of("kl_dlogits", ref_logits, targets, temperature, softcap, ignore_index);
  STD_TORCH_CHECK(out.is_contiguous(), "kl_dlogits: expected contiguous out");
  char* to = static_cast<char*>(out.mutable_data_ptr());
  with_types("kl_dlogits", logits, ref_logits,
             [&](auto pair) { dlogits_of_rows<decltype(pair)>(rows, refs, in, to); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "kl_stats(Tensor logits, Tensor ref_logits, Tensor targets, Tensor temperature, float softcap, "
      "int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "kl_dlogits(Tensor(a!) out, Tensor grad_logp, Tensor? grad_entropy, Tensor grad_kl, Tensor logits, "
      "Tensor ref_logits, Tensor targets, Tensor temperature, float softcap, int ignore_index, Tensor logp, "
      "Tensor entropy, Tensor row_max, Tensor log_sum, Tensor kl, Tensor ref_row_max, Tensor mean_gap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("kl_stats", TORCH_BOX(&kl_stats_cpu));
  m.impl("kl_dlogits", TORCH_BOX(&kl_dlogits_cpu));
}
