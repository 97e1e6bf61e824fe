// Preference losses of packed sequences on CPU: the sums over sequences in parallel, then the losses, slopes and
// statistics of all pairs; and the gradient, written in parallel. Formula and the meaning of the arguments:
// fastalign/losses/preference_terms.py, fastalign/ops/preference_loss.py; the work on tokens: preference_loss_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#define FASTALIGN_ROWS "preference_loss_rows.h"
#include "common.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kTokensPerBlock = 1024;  // added up in float32; blocks of a sequence are added up in float64
constexpr int64_t kTokensPerTask = 16384;  // what one thread should have before a second one is worth waking
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// In the order of PREFERENCE_KINDS in fastalign/losses/preference_terms.py.
enum class Kind { sigmoid, hinge, square, kto };

// PreferenceForm of the same file.
struct Form {
  Kind kind;
  bool average;
  double gap, extra, length, margin, right, wrong, nll_sum, nll_mean, optimism;
};

struct Sums {
  double gap = 0.0, logp = 0.0;
  int64_t count = 0;
};

struct Response {
  double reward, logp, sum, count, divisor;
};

// Infinities stay infinite, and a coefficient of 0 makes no NaN of them.
double times(double coefficient, double x) { return coefficient == 0.0 ? 0.0 : coefficient * x; }

// sigmoid(x), sigmoid(-x), and log(1 + exp(x)), log(1 + exp(-x)), from one exponential.
struct Logistic {
  double up, down, soft_up, soft_down;

  Logistic(double x) {
    const double e = std::exp(-std::fabs(x)), near = 1.0 / (1.0 + e), far = e / (1.0 + e), rest = std::log1p(e);
    up = x < 0.0 ? far : near;
    down = x < 0.0 ? near : far;
    soft_up = (x > 0.0 ? x : 0.0) + rest;
    soft_down = (x < 0.0 ? -x : 0.0) + rest;
  }
};

Response response_of(const Form& f, const Sums& s) {
  const double count = static_cast<double>(s.count);
  const double n = f.average ? std::max(1.0, count) : 1.0;
  return {(f.gap * s.gap + times(f.extra, s.logp)) / n + f.length * count, s.logp / n, s.logp, count, n};
}

struct Value {
  double loss, chosen, rejected;  // slopes; KTO: of the one response, `chosen`
};

Value pair_value(const Form& f, const Response& w, const Response& l, bool chosen_is_ref) {
  const double h = w.reward - l.reward - f.margin;
  double loss, slope;
  if (f.kind == Kind::sigmoid) {
    const Logistic at(h);
    loss = f.right * at.soft_down + times(f.wrong, at.soft_up);
    slope = f.wrong * at.up - f.right * at.down;
  } else if (f.kind == Kind::hinge) {
    loss = h >= 1.0 ? 0.0 : 1.0 - h;
    slope = h >= 1.0 ? 0.0 : -1.0;
  } else {
    loss = f.right * (h - 0.5) * (h - 0.5);
    slope = 2.0 * f.right * (h - 0.5);
  }
  slope *= f.gap + f.extra;
  const double many = std::max(1.0, w.count);
  loss += times(f.optimism, chosen_is_ref ? w.sum : l.sum) - times(f.nll_sum, w.sum) - times(f.nll_mean, w.sum) / many;
  if (w.count + l.count == 0.0) loss = 0.0;
  return {loss, slope / w.divisor - f.nll_sum - f.nll_mean / many + (chosen_is_ref ? f.optimism : 0.0),
          -slope / l.divisor + (chosen_is_ref ? 0.0 : f.optimism)};
}

Value kto_value(const Form& f, const Response& y, bool desirable, double z0) {
  const Logistic at(y.reward - f.gap * z0);
  const double loss = desirable ? f.right * at.down : f.wrong * at.up;
  const double slope = (desirable ? -f.right : f.wrong) * at.up * at.down * (f.gap + f.extra) / y.divisor;
  return {y.count == 0.0 ? 0.0 : loss, slope, 0.0};
}

const int64_t* bounds_of(const Tensor& cu_seqlens, int64_t n_tokens) {
  const int64_t* bounds = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  const int64_t sequences = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == n_tokens && std::is_sorted(bounds, bounds + sequences + 1),
                  "preference_loss: expected cu_seqlens to rise from 0 to N = ", n_tokens);
  return bounds;
}

// Runs work(sequence) for all sequences, several threads at once where there are enough tokens.
template <typename Work>
void for_sequences(int64_t sequences, int64_t n_tokens, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask * sequences / std::max<int64_t>(1, n_tokens));
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) work(s);
  });
}

template <typename T>
std::vector<Sums> sums_of(const void* logp, const void* ref_logp, const bool* mask, const int64_t* bounds,
                          int64_t sequences) {
  std::vector<Sums> sums(sequences);
  const T *x = static_cast<const T*>(logp), *r = static_cast<const T*>(ref_logp);
  for_sequences(sequences, bounds[sequences], [&](int64_t s) {
    Sums& to = sums[s];
    for (int64_t i = bounds[s]; i < bounds[s + 1]; i += kTokensPerBlock) {
      const int64_t n = std::min(kTokensPerBlock, bounds[s + 1] - i);
      FASTALIGN_CALL(token_sums, x + i, r ? r + i : nullptr, mask ? mask + i : nullptr, n, &to.gap, &to.logp,
                     &to.count);
    }
  });
  return sums;
}

Maybe dense(const Maybe& x) { return x ? Maybe(torch::stable::contiguous(*x)) : std::nullopt; }

const void* pointer(const Maybe& x) { return x ? x->const_data_ptr() : nullptr; }

Tensor floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

float* data(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> preference_loss_cpu(
    int64_t kind, bool average, double gap, double extra, double length, double margin, double right, double wrong,
    double nll_sum, double nll_mean, double optimism, const Tensor& logp_in, const Maybe& ref_in,
    const Tensor& cu_seqlens_in, const Maybe& mask_in, const Maybe& flags_in, const Maybe& z0_in) {
  const Form form{static_cast<Kind>(kind), average, gap, extra, length, margin, right, wrong, nll_sum, nll_mean,
                  optimism};
  const Tensor logp = torch::stable::contiguous(logp_in), cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const Maybe ref_logp = dense(ref_in), mask = dense(mask_in), flags = dense(flags_in);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  const int64_t* bounds = bounds_of(cu_seqlens, logp.numel());
  const bool* kept = static_cast<const bool*>(pointer(mask));
  const bool* flag = static_cast<const bool*>(pointer(flags));
  std::vector<Sums> sums;
  const auto add_up = [&](auto zero) {
    using T = decltype(zero);
    sums = sums_of<T>(logp.const_data_ptr(), pointer(ref_logp), kept, bounds, sequences);
  };
  switch (logp.scalar_type()) {
    case ScalarType::Float:
      add_up(0.0f);
      break;
    case ScalarType::BFloat16:
      add_up(fastalign::Bfloat16{});
      break;
    case ScalarType::Half:
      add_up(fastalign::Float16{});
      break;
    default:
      STD_TORCH_CHECK(false, "preference_loss: expected float32, bfloat16 or float16 log-probs on CPU");
  }

  const bool kto = form.kind == Kind::kto;
  const int64_t values = kto ? sequences : sequences / 2;
  Tensor losses = floats(logp, {values}), slopes = floats(logp, {sequences});
  Tensor statistics = floats(logp, {kto ? 4 : 6, values});
  const double z0 = z0_in ? *static_cast<const float*>(z0_in->const_data_ptr()) : 0.0;
  for (int64_t v = 0; v < values; ++v) {
    const auto log = [&](int64_t column, bool applies, double x) {
      data(statistics)[column * values + v] = static_cast<float>(applies ? x : kNaN);
    };
    const bool is_set = flag && flag[v];
    const Response w = response_of(form, sums[kto ? v : 2 * v]);
    if (kto) {
      const Value value = kto_value(form, w, is_set, z0);
      data(losses)[v] = static_cast<float>(value.loss);
      data(slopes)[v] = static_cast<float>(value.chosen);
      const bool some = w.count > 0.0;
      log(0, some && is_set, w.reward);
      log(1, some && !is_set, w.reward);
      log(2, some && is_set, w.logp);
      log(3, some && !is_set, w.logp);
      continue;
    }
    const Response l = response_of(form, sums[2 * v + 1]);
    const Value value = pair_value(form, w, l, is_set);
    data(losses)[v] = static_cast<float>(value.loss);
    data(slopes)[2 * v] = static_cast<float>(value.chosen);
    data(slopes)[2 * v + 1] = static_cast<float>(value.rejected);
    const bool some = w.count + l.count > 0.0;
    log(0, some, w.reward);
    log(1, some, l.reward);
    log(2, some, w.reward - l.reward);
    log(3, some, w.reward > l.reward ? 1.0 : 0.0);
    log(4, some, w.logp);
    log(5, some, l.logp);
  }
  return {losses, slopes, statistics};
}

Tensor preference_loss_backward_cpu(const Tensor& grad_in, const Tensor& slopes, const Tensor& cu_seqlens_in,
                                    const Maybe& mask_in, int64_t n_tokens) {
  const Tensor grad = torch::stable::contiguous(grad_in), cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const Maybe mask = dense(mask_in);
  const bool* kept = static_cast<const bool*>(pointer(mask));
  const int64_t* bounds = bounds_of(cu_seqlens, n_tokens);
  const int64_t sequences = slopes.size(0), per_value = grad.size(0) > 0 ? sequences / grad.size(0) : 1;
  const float *upstream = static_cast<const float*>(grad.const_data_ptr()),
              *slope = static_cast<const float*>(slopes.const_data_ptr());
  Tensor dlogp = floats(slopes, {n_tokens});
  float* to = data(dlogp);
  for_sequences(sequences, n_tokens, [&](int64_t s) {
    FASTALIGN_CALL(fill_tokens, slope[s] * upstream[s / per_value], kept ? kept + bounds[s] : nullptr,
                   bounds[s + 1] - bounds[s], to + bounds[s]);
  });
  return dlogp;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "preference_loss(int kind, bool average, float gap, float extra, float length, float margin, float right, "
      "float wrong, float nll_sum, float nll_mean, float optimism, Tensor logp, Tensor? ref_logp, Tensor cu_seqlens, "
      "Tensor? mask, Tensor? flags, Tensor? z0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "preference_loss_backward(Tensor grad, Tensor slopes, Tensor cu_seqlens, Tensor? mask, int n_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("preference_loss", TORCH_BOX(&preference_loss_cpu));
  m.impl("preference_loss_backward", TORCH_BOX(&preference_loss_backward_cpu));
}
