// Losses on log-probs, their slopes and statistics on CPU: one pass over the tokens, blocks of tokens in parallel.
// Formulas and the meaning of the arguments: fastalign/ops/policy_terms.py; the work on a block: policy_loss_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "direct.h"

namespace fastalign {

// In the order of KINDS, KLS and COLUMNS in fastalign/ops/policy_terms.py.
enum class LossKind { none, mle, apa, awr, clip, cispo };
enum class KlKind { none, k1, k2, k3 };
enum Column {
  kPolicy, kValue, kCount, kRatio, kClipped, kWeight, kWeightSquared, kEntropy,
  kRefK1, kRefK2, kRefK3, kOldK1, kOldK2, kOldK3, kValueClipped, kColumns
};

// MAX_LOG_RATIO of fastalign/losses/ratio.py.
constexpr float kFarthest = 20.0f;

struct LossForm {
  LossKind kind;
  KlKind kl;
  float scale, lower, upper, most, kl_coef, entropy_coef, vf_coef, value_clip;
  float share;  // factor of every slope: one over the divisor
};

// What is absent is null.
struct LossTokens {
  const float *logp, *entropy, *advantages, *old_logp, *ref_logp, *weights, *log_ratio;
  const float *values, *returns, *old_values;
  const bool* mask;
  float *losses, *dlogp, *dentropy, *dvalues;
};

}  // namespace fastalign

#define FASTALIGN_ROWS "policy_loss_rows.h"
#include "common.h"

namespace {

using fastalign::kColumns;
using fastalign::KlKind;
using fastalign::LossForm;
using fastalign::LossKind;
using fastalign::LossTokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Sums are formed block by block and added in their order: the same bits with any number of threads.
constexpr int64_t kTokensPerBlock = 1024;

// The inputs, contiguous and alive as long as this is.
struct Inputs {
  Maybe logp, entropy, advantages, old_logp, ref_logp, weights, log_ratio, values, returns, old_values, mask, scale;

  Inputs(const Maybe& logp, const Maybe& entropy, const Maybe& advantages, const Maybe& old_logp,
         const Maybe& ref_logp, const Maybe& weights, const Maybe& log_ratio, const Maybe& values,
         const Maybe& returns, const Maybe& old_values, const Maybe& mask, const Maybe& scale)
      : logp(dense(logp)), entropy(dense(entropy)), advantages(dense(advantages)), old_logp(dense(old_logp)),
        ref_logp(dense(ref_logp)), weights(dense(weights)), log_ratio(dense(log_ratio)), values(dense(values)),
        returns(dense(returns)), old_values(dense(old_values)), mask(dense(mask)), scale(dense(scale)) {}

  static Maybe dense(const Maybe& x) { return x ? Maybe(torch::stable::contiguous(*x)) : std::nullopt; }
  static const float* floats(const Maybe& x) { return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr; }

  const Tensor& leading() const { return logp ? *logp : *values; }

  LossTokens tokens() const {
    STD_TORCH_CHECK(leading().scalar_type() == ScalarType::Float, "policy_loss: expected float32 tensors on CPU");
    LossTokens t{};
    t.logp = floats(logp);
    t.entropy = floats(entropy);
    t.advantages = floats(advantages);
    t.old_logp = floats(old_logp);
    t.ref_logp = floats(ref_logp);
    t.weights = floats(weights);
    t.log_ratio = floats(log_ratio);
    t.values = floats(values);
    t.returns = floats(returns);
    t.old_values = floats(old_values);
    t.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    return t;
  }
};

// A block's tokens with one scale for all of them, or one each, or one per row of `per` tokens.
void block_of_tokens(const LossTokens& t, const LossForm& f, const float* scale, int64_t per, int64_t begin,
                     int64_t end, double* sums) {
  if (!scale || per == 1) {
    FASTALIGN_CALL(policy_loss, t, f, scale, 1.0f, begin, end, sums);
    return;
  }
  while (begin < end) {
    const int64_t row = begin / per;
    const int64_t stop = std::min(end, (row + 1) * per);
    FASTALIGN_CALL(policy_loss, t, f, nullptr, scale[row], begin, stop, sums);
    begin = stop;
  }
}

// The sums of all columns over the n tokens.
std::vector<double> run(const LossTokens& t, const LossForm& f, const float* scale, int64_t n_scales, int64_t n) {
  const int64_t n_blocks = (n + kTokensPerBlock - 1) / kTokensPerBlock;
  const int64_t per = n_scales > 0 ? n / n_scales : 1;
  std::vector<double> partials(n_blocks * kColumns, 0.0), sums(kColumns, 0.0);
  torch::stable::parallel_for(0, n_blocks, 8, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kTokensPerBlock;
      block_of_tokens(t, f, scale, per, begin, std::min(n, begin + kTokensPerBlock), &partials[block * kColumns]);
    }
  });
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t column = 0; column < kColumns; ++column) sums[column] += partials[block * kColumns + column];
  }
  return sums;
}

// How many of the n tokens the mask keeps: sums of bytes in the bytes of a word, which hold up to 255.
int64_t kept_tokens(const bool* mask, int64_t n) {
  int64_t count = 0, i = 0;
  while (i + 8 <= n) {
    const int64_t stop = std::min(n - 7, i + 8 * 255);
    uint64_t sums = 0;
    for (; i < stop; i += 8) {
      uint64_t word;
      std::memcpy(&word, mask + i, 8);
      sums += word;
    }
    const uint64_t pairs = (sums & 0x00ff00ff00ff00ffu) + (sums >> 8 & 0x00ff00ff00ff00ffu);
    count += static_cast<int64_t>(pairs * 0x0001000100010001u >> 48);
  }
  for (; i < n; ++i) count += mask[i];
  return count;
}

LossForm form_of(int64_t kind, int64_t kl, double scale, double lower, double upper, double most, double kl_coef,
                 double entropy_coef, double vf_coef, double value_clip) {
  const auto narrow = [](double x) { return static_cast<float>(x); };
  return {static_cast<LossKind>(kind), static_cast<KlKind>(kl), narrow(scale), narrow(lower), narrow(upper),
          narrow(most), narrow(kl_coef), narrow(entropy_coef), narrow(vf_coef), narrow(value_clip),
          1.0f};
}

Tensor floats_like(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n}, ScalarType::Float); }

float* data(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// The total and the statistics (sums of the first three columns, means of the others), with sums (but the count) and
// gradients over the divisor, 0 meaning the tokens that count. Gradients go where `t` points.
void loss_and_gradients(LossTokens t, LossForm form, const float* scale, int64_t n_scales, int64_t n, double divisor,
                        float* total, float* statistics) {
  if (divisor == 0.0) divisor = std::max<int64_t>(1, t.mask ? kept_tokens(t.mask, n) : n);
  form.share = static_cast<float>(1.0 / divisor);
  if (form.value_clip == 0.0f) t.old_values = nullptr;
  const std::vector<double> sums = run(t, form, scale, n_scales, n);
  // Divided as tensors would be afterwards: a caller that cannot give the divisor gets the same bits.
  const float last = static_cast<float>(divisor);
  *total = static_cast<float>(sums[fastalign::kPolicy] + form.vf_coef * sums[fastalign::kValue]) / last;
  const double count = std::max(1.0, sums[fastalign::kCount]);
  for (int64_t column = 0; column < kColumns; ++column) {
    const float sum = static_cast<float>(column > fastalign::kCount ? sums[column] / count : sums[column]);
    statistics[column] = column < fastalign::kCount ? sum / last : sum;
  }
}

// total, statistics, dlogp, dentropy, dvalues; a gradient that nobody needs is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_cpu(
    int64_t kind, int64_t kl, double scale, double lower, double upper, double most, double kl_coef,
    double entropy_coef, double vf_coef, double value_clip, const Maybe& logp, const Maybe& entropy,
    const Maybe& advantages, const Maybe& old_logp, const Maybe& ref_logp, const Maybe& weights,
    const Maybe& log_ratio, const Maybe& values, const Maybe& returns, const Maybe& old_values, const Maybe& mask,
    const Maybe& token_scale, double divisor) {
  const Inputs in(logp, entropy, advantages, old_logp, ref_logp, weights, log_ratio, values, returns, old_values, mask,
                  token_scale);
  const Tensor& like = in.leading();
  const int64_t n = like.numel();
  LossTokens t = in.tokens();
  const LossForm form = form_of(kind, kl, scale, lower, upper, most, kl_coef, entropy_coef, vf_coef, value_clip);
  Tensor dlogp = floats_like(like, t.logp ? n : 0);
  Tensor dentropy = floats_like(like, form.entropy_coef != 0.0f ? n : 0);
  Tensor dvalues = floats_like(like, t.values ? n : 0);
  t.dlogp = data(dlogp);
  t.dentropy = form.entropy_coef != 0.0f ? data(dentropy) : nullptr;
  t.dvalues = data(dvalues);
  Tensor total = torch::stable::new_empty(like, {}, ScalarType::Float);
  Tensor statistics = floats_like(like, kColumns);
  loss_and_gradients(t, form, Inputs::floats(in.scale), in.scale ? in.scale->numel() : 0, n, divisor, data(total),
                     data(statistics));
  return {total, statistics, dlogp, dentropy, dvalues};
}

// The loss of every token, and its derivatives by logp and by the entropy (empty when the loss does not use it).
std::tuple<Tensor, Tensor, Tensor> policy_loss_terms_cpu(
    int64_t kind, int64_t kl, double scale, double lower, double upper, double most, double kl_coef,
    double entropy_coef, const Tensor& logp, const Maybe& entropy, const Maybe& advantages, const Maybe& old_logp,
    const Maybe& ref_logp, const Maybe& weights) {
  const Maybe none;
  const Inputs in(logp, entropy, advantages, old_logp, ref_logp, weights, none, none, none, none, none, none);
  const LossForm form = form_of(kind, kl, scale, lower, upper, most, kl_coef, entropy_coef, 0.0, 0.0);
  const Tensor& like = in.leading();
  LossTokens t = in.tokens();
  Tensor losses = floats_like(like, like.numel()), dlogp = floats_like(like, like.numel());
  Tensor dentropy = floats_like(like, form.entropy_coef != 0.0f ? like.numel() : 0);
  t.losses = data(losses);
  t.dlogp = data(dlogp);
  t.dentropy = form.entropy_coef != 0.0f ? data(dentropy) : nullptr;
  run(t, form, nullptr, 0, like.numel());
  return {losses, dlogp, dentropy};
}

}  // namespace

// (form, tokens of fastalign/ops/policy_terms.py, scales, tokens, divisor, total, statistics, dlogp, dentropy, dvalues)
PyObject* fastalign::policy_loss_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments in(given, count);
  const int64_t kind = in.integer(), kl = in.integer();
  double f[8];
  for (double& x : f) x = in.number();
  const LossForm form = form_of(kind, kl, f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]);
  LossTokens t{};
  for (const float** x : {&t.logp, &t.entropy, &t.advantages, &t.old_logp, &t.ref_logp, &t.weights, &t.log_ratio,
                          &t.values, &t.returns, &t.old_values}) {
    *x = in.address<const float>();
  }
  t.mask = in.address<const bool>();
  const float* scale = in.address<const float>();
  const int64_t n_scales = in.integer(), n = in.integer();
  const double divisor = in.number();
  float *total = in.address<float>(), *statistics = in.address<float>();
  for (float** x : {&t.dlogp, &t.dentropy, &t.dvalues}) *x = in.address<float>();
  return in.finished([&] { loss_and_gradients(t, form, scale, n_scales, n, divisor, total, statistics); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def(
      "policy_loss(int kind, int kl, float scale, float lower, float upper, float most, float kl_coef, "
      "float entropy_coef, float vf_coef, float value_clip, Tensor? logp, Tensor? entropy, Tensor? advantages, "
      "Tensor? old_logp, Tensor? ref_logp, Tensor? weights, Tensor? log_ratio, Tensor? values, Tensor? returns, "
      "Tensor? old_values, Tensor? mask, Tensor? token_scale, float divisor) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "policy_loss_terms(int kind, int kl, float scale, float lower, float upper, float most, float kl_coef, "
      "float entropy_coef, Tensor logp, Tensor? entropy, Tensor? advantages, Tensor? old_logp, Tensor? ref_logp, "
      "Tensor? weights) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss_cpu));
  m.impl("policy_loss_terms", TORCH_BOX(&policy_loss_terms_cpu));
}
