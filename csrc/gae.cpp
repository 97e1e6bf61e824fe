// Scans over time on CPU (gae, lambda_returns, vtrace): one backward walk over each sequence, sequences in parallel.
// Formulas and meaning of the arguments: fastalign/ops/gae.py, lambda_returns.py, vtrace.py; the walk: gae_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastalign {

// `discounted` has values of 0, which are not read.
enum class ScanKind { gae, discounted, vtrace };

// Caps of the importance weights of vtrace.
struct Clips {
  float rho_bar, c_bar, pg_rho_bar;
};

// What is absent is null; rewards and values have the kernel's dtype.
struct ScanTokens {
  const void *rewards, *values;
  const float* log_ratio;
  const bool* mask;
  float *advantages, *returns;
  Clips clips;
};

struct ScanRow {
  int64_t begin, end;
  float gamma, lam, bootstrap;
};

struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;  // squares about the mean

  void add(const Moments& other) {
    if (other.count == 0.0) return;
    const double all = count + other.count, gap = other.mean - mean;
    mean += gap * other.count / all;
    squares += other.squares + gap * gap * count * other.count / all;
    count = all;
  }
};

// Advantages whose moments are taken at once, while they are in the cache.
constexpr int64_t kTokensPerMoment = 2048;

}  // namespace fastalign

#define FASTALIGN_ROWS "gae_rows.h"
#include "common.h"

namespace {

using fastalign::Moments;
using fastalign::ScanKind;
using fastalign::ScanRow;
using fastalign::ScanTokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Tokens that one thread should have before a second one is worth waking.
constexpr int64_t kTokensPerTask = 16384;

Maybe dense(const Maybe& x) { return x ? Maybe(torch::stable::contiguous(*x)) : std::nullopt; }

template <typename T>
const T* pointer(const Maybe& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Where the sequences are and what each has of its own.
struct Sequences {
  Maybe cu_seqlens, bootstrap, rates;
  double gamma, lam;
  int64_t count, n_steps, n_tokens;

  Sequences(const Tensor& rewards, double gamma, double lam, const Maybe& cu_seqlens_in, const Maybe& bootstrap_in,
            const Maybe& rates_in)
      : cu_seqlens(dense(cu_seqlens_in)), bootstrap(dense(bootstrap_in)), rates(dense(rates_in)), gamma(gamma),
        lam(lam), count(cu_seqlens ? cu_seqlens->size(0) - 1 : rewards.size(0)),
        n_steps(cu_seqlens ? 0 : rewards.size(1)), n_tokens(rewards.numel()) {}

  ScanRow row(int64_t i) const {
    const int32_t* offsets = pointer<int32_t>(cu_seqlens);
    const float* own = pointer<float>(rates);
    return {offsets ? offsets[i] : i * n_steps,
            offsets ? offsets[i + 1] : (i + 1) * n_steps,
            own ? own[2 * i] : static_cast<float>(gamma),
            own ? own[2 * i + 1] : static_cast<float>(lam),
            bootstrap ? pointer<float>(bootstrap)[i] : 0.0f};
  }

  // work(row) for all that are not empty; a task takes the sequences that begin in its share of the tokens.
  template <typename Work>
  void for_each(const Work& work) const {
    const int32_t* offsets = pointer<int32_t>(cu_seqlens);
    torch::stable::parallel_for(0, n_tokens, kTokensPerTask, [&](int64_t first, int64_t last) {
      int64_t i = offsets ? std::lower_bound(offsets, offsets + count, first) - offsets
                          : (first + n_steps - 1) / n_steps;
      for (; i < count && (offsets ? offsets[i] : i * n_steps) < last; ++i) work(i);
    });
  }
};

void scan(ScanKind kind, const Tensor& rewards, const Sequences& sequences, const ScanTokens& tokens,
          std::vector<Moments>* moments) {
  if (rewards.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    sequences.for_each([&](int64_t i) {
      const ScanRow row = sequences.row(i);
      Moments* own = moments ? &(*moments)[i] : nullptr;
      FASTALIGN_CALL(scan_row<T>, kind, tokens, row, own);
    });
  };
  switch (rewards.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(fastalign::Bfloat16{});
    case ScalarType::Half:
      return run(fastalign::Float16{});
    default:
      STD_TORCH_CHECK(false, "gae: expected float32, bfloat16 or float16 rewards on CPU");
  }
}

Tensor floats_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes(), ScalarType::Float); }

std::tuple<Tensor, Tensor, Tensor> gae_cpu(const Tensor& rewards_in, const Tensor& values_in, double gamma, double lam,
                                           const Maybe& mask_in, const Maybe& cu_seqlens, const Maybe& bootstrap,
                                           const Maybe& rates, bool statistics) {
  const Tensor rewards = torch::stable::contiguous(rewards_in), values = torch::stable::contiguous(values_in);
  const Maybe mask = dense(mask_in);
  const Sequences sequences(rewards, gamma, lam, cu_seqlens, bootstrap, rates);
  Tensor advantages = floats_like(rewards), returns = floats_like(rewards);
  const ScanTokens tokens{rewards.const_data_ptr(), values.const_data_ptr(), nullptr, pointer<bool>(mask),
                          floats(advantages),       floats(returns),         {}};
  // Added up in the order of the sequences: the same bits with any number of threads.
  std::vector<Moments> moments(statistics ? sequences.count : 0);
  scan(ScanKind::gae, rewards, sequences, tokens, statistics ? &moments : nullptr);
  Tensor stats = torch::stable::new_empty(rewards, {statistics ? 3 : 0}, ScalarType::Double);
  if (statistics) {
    Moments all;
    for (const Moments& own : moments) all.add(own);
    double* out = static_cast<double*>(stats.mutable_data_ptr());
    out[0] = all.count;
    out[1] = all.mean;
    out[2] = all.squares / std::max(1.0, all.count - 1.0);
  }
  return {advantages, returns, stats};
}

Tensor lambda_returns_cpu(const Tensor& rewards_in, const Maybe& values_in, double gamma, double lam,
                          const Maybe& mask_in, const Maybe& cu_seqlens, const Maybe& bootstrap, const Maybe& rates) {
  const Tensor rewards = torch::stable::contiguous(rewards_in);
  const Maybe values = dense(values_in), mask = dense(mask_in);
  const Sequences sequences(rewards, gamma, lam, cu_seqlens, bootstrap, rates);
  Tensor returns = floats_like(rewards);
  const ScanTokens tokens{rewards.const_data_ptr(), pointer<void>(values), nullptr, pointer<bool>(mask), nullptr,
                          floats(returns),          {}};
  scan(values ? ScanKind::gae : ScanKind::discounted, rewards, sequences, tokens, nullptr);
  return returns;
}

std::tuple<Tensor, Tensor> vtrace_cpu(const Tensor& rewards_in, const Tensor& values_in, const Tensor& log_ratio_in,
                                      double gamma, double lam, double rho_bar, double c_bar, double pg_rho_bar,
                                      const Maybe& mask_in, const Maybe& cu_seqlens, const Maybe& bootstrap,
                                      const Maybe& rates) {
  const Tensor rewards = torch::stable::contiguous(rewards_in), values = torch::stable::contiguous(values_in);
  const Maybe log_ratio = dense(log_ratio_in), mask = dense(mask_in);
  const Sequences sequences(rewards, gamma, lam, cu_seqlens, bootstrap, rates);
  Tensor vs = floats_like(rewards), pg_advantages = floats_like(rewards);
  const fastalign::Clips clips{static_cast<float>(rho_bar), static_cast<float>(c_bar), static_cast<float>(pg_rho_bar)};
  const ScanTokens tokens{rewards.const_data_ptr(), values.const_data_ptr(), pointer<float>(log_ratio), pointer<bool>(mask),
                          floats(pg_advantages),    floats(vs),              clips};
  scan(ScanKind::vtrace, rewards, sequences, tokens, nullptr);
  return {vs, pg_advantages};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, float gamma, float lam, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? bootstrap, Tensor? rates, bool statistics) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lambda_returns(Tensor rewards, Tensor? values, float gamma, float lam, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? bootstrap, Tensor? rates) -> Tensor");
  m.def(
      "vtrace(Tensor rewards, Tensor values, Tensor log_ratio, float gamma, float lam, float rho_bar, float c_bar, "
      "float pg_rho_bar, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, Tensor? rates) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("gae", TORCH_BOX(&gae_cpu));
  m.impl("lambda_returns", TORCH_BOX(&lambda_returns_cpu));
  m.impl("vtrace", TORCH_BOX(&vtrace_cpu));
}
