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

#include "direct.h"

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

void check_bounds(const int64_t* bounds, int64_t sequences, int64_t n_tokens) {
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == n_tokens && std::is_sorted(bounds, bounds + sequences + 1),
                  "preference_loss: expected cu_seqlens to rise from 0 to N = ", n_tokens);
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

Tensor floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

float* data(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// What one call reads; null where absent.
struct Batch {
  ScalarType dtype;
  const void *logp, *ref_logp;
  const int64_t* bounds;
  const bool *mask, *flags;
  const float* z0;
  int64_t sequences, n_tokens;
};

std::vector<Sums> sums_of(const Batch& b) {
  switch (b.dtype) {
    case ScalarType::Float:
      return sums_of<float>(b.logp, b.ref_logp, b.mask, b.bounds, b.sequences);
    case ScalarType::BFloat16:
      return sums_of<fastalign::Bfloat16>(b.logp, b.ref_logp, b.mask, b.bounds, b.sequences);
    case ScalarType::Half:
      return sums_of<fastalign::Float16>(b.logp, b.ref_logp, b.mask, b.bounds, b.sequences);
    default:
      STD_TORCH_CHECK(false, "preference_loss: expected float32, bfloat16 or float16 log-probs on CPU");
  }
}

// losses [values], slopes [sequences], statistics [4 or 6, values].
void losses_and_slopes(const Form& form, const Batch& b, float* losses, float* slopes, float* statistics) {
  check_bounds(b.bounds, b.sequences, b.n_tokens);
  const std::vector<Sums> sums = sums_of(b);
  const bool kto = form.kind == Kind::kto;
  const int64_t values = kto ? b.sequences : b.sequences / 2;
  const double z0 = b.z0 ? *b.z0 : 0.0;
  for (int64_t v = 0; v < values; ++v) {
    const auto log = [&](int64_t column, bool applies, double x) {
      statistics[column * values + v] = static_cast<float>(applies ? x : kNaN);
    };
    const bool is_set = b.flags && b.flags[v];
    const Response w = response_of(form, sums[kto ? v : 2 * v]);
    if (kto) {
      const Value value = kto_value(form, w, is_set, z0);
      losses[v] = static_cast<float>(value.loss);
      slopes[v] = static_cast<float>(value.chosen);
      const bool some = w.count > 0.0;
      log(0, some && is_set, w.reward);
      log(1, some && !is_set, w.reward);
      log(2, some && is_set, w.logp);
      log(3, some && !is_set, w.logp);
      continue;
    }
    const Response l = response_of(form, sums[2 * v + 1]);
    const Value value = pair_value(form, w, l, is_set);
    losses[v] = static_cast<float>(value.loss);
    slopes[2 * v] = static_cast<float>(value.chosen);
    slopes[2 * v + 1] = static_cast<float>(value.rejected);
    const bool some = w.count + l.count > 0.0;
    log(0, some, w.reward);
    log(1, some, l.reward);
    log(2, some, w.reward - l.reward);
    log(3, some, w.reward > l.reward ? 1.0 : 0.0);
    log(4, some, w.logp);
    log(5, some, l.logp);
  }
}

// dlogp [n_tokens] of upstream [values] and slopes [sequences].
void gradient(const float* upstream, int64_t values, const float* slopes, const int64_t* bounds, int64_t sequences,
              const bool* mask, int64_t n_tokens, float* dlogp) {
  check_bounds(bounds, sequences, n_tokens);
  const int64_t per_value = values > 0 ? sequences / values : 1;
  for_sequences(sequences, n_tokens, [&](int64_t s) {
    FASTALIGN_CALL(fill_tokens, slopes[s] * upstream[s / per_value], mask ? mask + bounds[s] : nullptr,
                   bounds[s + 1] - bounds[s], dlogp + bounds[s]);
  });
}

template <typename T>
const T* pointer(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
const T* pointer(const Maybe& x) {
  return x ? pointer<T>(*x) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> preference_loss_cpu(
    int64_t kind, bool average, double gap, double extra, double length, double margin, double right, double wrong,
    double nll_sum, double nll_mean, double optimism, const Tensor& logp_in, const Maybe& ref_in,
    const Tensor& cu_seqlens_in, const Maybe& mask_in, const Maybe& flags_in, const Maybe& z0_in) {
  const Form form{static_cast<Kind>(kind), average, gap, extra, length, margin, right, wrong, nll_sum, nll_mean,
                  optimism};
  const Tensor logp = torch::stable::contiguous(logp_in), cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const Maybe ref_logp = dense(ref_in), mask = dense(mask_in), flags = dense(flags_in), z0 = dense(z0_in);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  const bool kto = form.kind == Kind::kto;
  const int64_t values = kto ? sequences : sequences / 2;
  Tensor losses = floats(logp, {values}), slopes = floats(logp, {sequences});
  Tensor statistics = floats(logp, {kto ? 4 : 6, values});
  const Batch batch{logp.scalar_type(),       pointer<void>(logp), pointer<void>(ref_logp), pointer<int64_t>(cu_seqlens),
                    pointer<bool>(mask),      pointer<bool>(flags), pointer<float>(z0),     sequences,
                    logp.numel()};
  losses_and_slopes(form, batch, data(losses), data(slopes), data(statistics));
  return {losses, slopes, statistics};
}

Tensor preference_loss_backward_cpu(const Tensor& grad_in, const Tensor& slopes, const Tensor& cu_seqlens_in,
                                    const Maybe& mask_in, int64_t n_tokens) {
  const Tensor grad = torch::stable::contiguous(grad_in), cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const Maybe mask = dense(mask_in);
  Tensor dlogp = floats(slopes, {n_tokens});
  gradient(pointer<float>(grad), grad.size(0), pointer<float>(slopes), pointer<int64_t>(cu_seqlens), slopes.size(0),
           pointer<bool>(mask), n_tokens, data(dlogp));
  return dlogp;
}

}  // namespace

// (PreferenceForm of fastalign/losses/preference_terms.py, dtype, logp, ref_logp, cu_seqlens, mask, flags, z0,
// sequences, tokens, losses, slopes, statistics)
PyObject* fastalign::preference_loss_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments in(given, count);
  Form form{static_cast<Kind>(in.integer()), in.integer() != 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  for (double* x : {&form.gap, &form.extra, &form.length, &form.margin, &form.right, &form.wrong, &form.nll_sum,
                    &form.nll_mean, &form.optimism}) {
    *x = in.number();
  }
  Batch b{};
  b.dtype = in.dtype();
  b.logp = in.address<const void>(), b.ref_logp = in.address<const void>();
  b.bounds = in.address<const int64_t>();
  b.mask = in.address<const bool>(), b.flags = in.address<const bool>();
  b.z0 = in.address<const float>();
  b.sequences = in.integer(), b.n_tokens = in.integer();
  float *losses = in.address<float>(), *slopes = in.address<float>(), *statistics = in.address<float>();
  return in.finished([&] { losses_and_slopes(form, b, losses, slopes, statistics); });
}

// (grad, values, slopes, cu_seqlens, sequences, mask, tokens, dlogp)
PyObject* fastalign::preference_loss_backward_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments in(given, count);
  const float* grad = in.address<const float>();
  const int64_t values = in.integer();
  const float* slopes = in.address<const float>();
  const int64_t *bounds = in.address<const int64_t>(), sequences = in.integer();
  const bool* mask = in.address<const bool>();
  const int64_t n_tokens = in.integer();
  float* dlogp = in.address<float>();
  return in.finished([&] { gradient(grad, values, slopes, bounds, sequences, mask, n_tokens, dlogp); });
}

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
