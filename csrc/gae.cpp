// Generalised advantage estimation on CPU: one backward walk over each sequence, sequences in parallel.
// Formula and meaning of the arguments: fastalign/ops/gae.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens that one thread should have before a second one is worth waking.
constexpr int64_t kTokensPerTask = 16384;

struct Rates {
  float gamma;
  float lam;
};

// Tokens [begin, end) of one sequence; kMasked says whether `mask` is read.
template <typename T, bool kMasked>
void gae_row(const T* rewards, const T* values, const bool* mask, float* advantages, float* returns,
             int64_t begin, int64_t end, Rates rates, float next_value) {
  const float decay = rates.gamma * rates.lam;
  float advantage = 0.0f;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (kMasked && !mask[t]) {
      advantages[t] = 0.0f;
      returns[t] = 0.0f;
      continue;
    }
    const float value = static_cast<float>(values[t]);
    const float delta = static_cast<float>(rewards[t]) + rates.gamma * next_value - value;
    advantage = delta + decay * advantage;
    advantages[t] = advantage;
    returns[t] = advantage + value;
    next_value = value;
  }
}

template <typename T>
void gae_rows(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
              const int32_t* offsets, const float* bootstrap, const float* per_row, Rates rates,
              int64_t n_rows, int64_t n_steps, Tensor& advantages, Tensor& returns) {
  const T* r = static_cast<const T*>(rewards.const_data_ptr());
  const T* v = static_cast<const T*>(values.const_data_ptr());
  const bool* m = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  float* a = static_cast<float*>(advantages.mutable_data_ptr());
  float* g = static_cast<float*>(returns.mutable_data_ptr());
  const int64_t tokens_per_row = std::max<int64_t>(1, rewards.numel() / n_rows);
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask / tokens_per_row);
  torch::stable::parallel_for(0, n_rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = offsets ? offsets[row] : row * n_steps;
      const int64_t end = offsets ? offsets[row + 1] : begin + n_steps;
      const float next_value = bootstrap ? bootstrap[row] : 0.0f;
      const Rates own = per_row ? Rates{per_row[2 * row], per_row[2 * row + 1]} : rates;
      if (m) {
        gae_row<T, true>(r, v, m, a, g, begin, end, own, next_value);
      } else {
        gae_row<T, false>(r, v, m, a, g, begin, end, own, next_value);
      }
    }
  });
}

std::tuple<Tensor, Tensor> gae_cpu(const Tensor& rewards_in, const Tensor& values_in, double gamma,
                                   double lam, const std::optional<Tensor>& mask_in,
                                   const std::optional<Tensor>& cu_seqlens_in,
                                   const std::optional<Tensor>& bootstrap_in,
                                   const std::optional<Tensor>& rates_in) {
  const auto contiguous = [](const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
  };
  const auto floats = [](const std::optional<Tensor>& x) {
    return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
  };
  const Tensor rewards = torch::stable::contiguous(rewards_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const std::optional<Tensor> mask = contiguous(mask_in);
  const std::optional<Tensor> cu_seqlens = contiguous(cu_seqlens_in);
  const std::optional<Tensor> bootstrap = contiguous(bootstrap_in);
  const std::optional<Tensor> per_row = contiguous(rates_in);
  const int32_t* offsets =
      cu_seqlens ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr()) : nullptr;
  const int64_t n_rows = cu_seqlens ? cu_seqlens->size(0) - 1 : rewards.size(0);
  const int64_t n_steps = cu_seqlens ? 0 : rewards.size(1);

  Tensor advantages = torch::stable::new_empty(rewards, rewards.sizes(), ScalarType::Float);
  Tensor returns = torch::stable::new_empty(rewards, rewards.sizes(), ScalarType::Float);
  if (rewards.numel() == 0) {
    return {advantages, returns};
  }
  const Rates rates{static_cast<float>(gamma), static_cast<float>(lam)};
  const auto run = [&](auto zero) {
    gae_rows<decltype(zero)>(rewards, values, mask, offsets, floats(bootstrap), floats(per_row),
                             rates, n_rows, n_steps, advantages, returns);
  };
  switch (rewards.scalar_type()) {
    case ScalarType::Float:
      run(float{});
      break;
    case ScalarType::BFloat16:
      run(torch::headeronly::BFloat16{});
      break;
    case ScalarType::Half:
      run(torch::headeronly::Half{});
      break;
    default:
      STD_TORCH_CHECK(false, "gae: expected float32, bfloat16 or float16 rewards on CPU");
  }
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, float gamma, float lam, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? bootstrap, Tensor? rates) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("gae", TORCH_BOX(&gae_cpu));
}
