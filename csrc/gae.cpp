// Scans over time on CPU (gae, lambda_returns, vtrace): one backward walk over each sequence, and over each piece of a
// long one, in parallel. Formulas and meaning of the arguments: fastalign/ops/gae.py, lambda_returns.py, vtrace.py; the
// walk: gae_rows.h.
#include "huge_pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
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

// What follows some tokens: the advantage of the next kept one and its value.
struct Carry {
  double advantage;
  float next_value;
};

// A sequence or a piece of one.
struct ScanRow {
  int64_t begin, end;
  float gamma, lam;
  Carry after;
};

// The first advantage of some tokens is scale * (the one after them) + shift.
struct ScanMap {
  double scale, shift;
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
// Tokens whose map is formed at once. Most rates leave nothing, in float32, of what comes so many tokens later.
constexpr int64_t kTokensPerMap = 2048;

}  // namespace fastalign

#define FASTALIGN_ROWS "gae_rows.h"
#include "common.h"

namespace {

using fastalign::Carry;
using fastalign::Moments;
using fastalign::ScanKind;
using fastalign::ScanMap;
using fastalign::ScanRow;
using fastalign::ScanTokens;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Tokens that one thread should have before a second one is worth waking.
constexpr int64_t kTokensPerTask = 65536;
// Tokens of a piece of a long sequence, whatever the number of threads: the same bits with any.
constexpr int64_t kTokensPerPiece = 16384;

Maybe dense(const Maybe& x) { return x ? Maybe(torch::stable::contiguous(*x)) : std::nullopt; }

template <typename T>
const T* pointer(const Maybe& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

struct Piece {
  ScanRow row;
  bool goes_on;  // the next piece belongs to the same sequence
  double first;  // the advantage of the first kept token, once walked
};

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

  // Those that are not empty, in order. All pieces of a long one are full but its first.
  std::vector<Piece> pieces(ScanKind kind) const {
    const int32_t* offsets = pointer<int32_t>(cu_seqlens);
    const float *own = pointer<float>(rates), *last = pointer<float>(bootstrap);
    std::vector<Piece> pieces;
    pieces.reserve(count + n_tokens / kTokensPerPiece);
    for (int64_t i = 0; i < count; ++i) {
      const float value = last ? last[i] : 0.0f;
      ScanRow row{offsets ? offsets[i] : i * n_steps,
                  0,
                  own ? own[2 * i] : static_cast<float>(gamma),
                  own ? own[2 * i + 1] : static_cast<float>(lam),
                  {kind == ScanKind::discounted ? value : 0.0, value}};
      const int64_t end = offsets ? offsets[i + 1] : row.begin + n_steps;
      for (; row.begin < end; row.begin = row.end) {
        row.end = end - (end - row.begin - 1) / kTokensPerPiece * kTokensPerPiece;
        pieces.push_back({row, row.end < end, 0.0});
      }
    }
    return pieces;
  }
};

// work(i) for each piece; a task takes those that begin in its share of the tokens.
template <typename Work>
void for_each(const std::vector<Piece>& pieces, int64_t n_tokens, const Work& work) {
  torch::stable::parallel_for(0, n_tokens, kTokensPerTask, [&](int64_t first, int64_t last) {
    const auto before = [](const Piece& piece, int64_t token) { return piece.row.begin < token; };
    size_t i = std::lower_bound(pieces.begin(), pieces.end(), first, before) - pieces.begin();
    for (; i < pieces.size() && pieces[i].row.begin < last; ++i) work(i);
  });
}

// What follows each piece of the sequences that have several, from the maps of the pieces after it.
template <typename T>
void find_carries(ScanKind kind, const ScanTokens& tokens, int64_t n_tokens, std::vector<Piece>& pieces) {
  for (size_t i = pieces.size() - 1; i-- > 0;) {
    if (pieces[i].goes_on) FASTALIGN_CALL(value_from<T>, tokens, pieces[i + 1].row, &pieces[i].row.after.next_value);
  }
  std::vector<ScanMap> maps(pieces.size());
  for_each(pieces, n_tokens, [&](size_t i) {
    if (i > 0 && pieces[i - 1].goes_on) FASTALIGN_CALL(map_row<T>, kind, tokens, pieces[i].row, &maps[i]);
  });
  for (size_t i = pieces.size() - 1; i-- > 0;) {
    if (!pieces[i].goes_on) continue;
    pieces[i].row.after.advantage = maps[i + 1].scale * pieces[i + 1].row.after.advantage + maps[i + 1].shift;
  }
}

template <typename T>
void walk_all(ScanKind kind, const ScanTokens& tokens, int64_t n_tokens, std::vector<Piece>& pieces,
              std::vector<Moments>* moments) {
  const auto walk = [&](size_t i) {
    FASTALIGN_CALL(scan_row<T>, kind, tokens, pieces[i].row, &pieces[i].first, moments ? &(*moments)[i] : nullptr);
  };
  const bool split = std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.goes_on; });
  if (split) find_carries<T>(kind, tokens, n_tokens, pieces);
  for_each(pieces, n_tokens, walk);
  // A map is formed no further than numbers reach. NaN and infinity reach all tokens before them: piece after piece.
  for (size_t i = pieces.size() - 1; split && i-- > 0;) {
    double& carry = pieces[i].row.after.advantage;
    if (pieces[i].goes_on && !(std::isfinite(carry) && std::isfinite(pieces[i + 1].first))) {
      carry = pieces[i + 1].first;
      walk(i);
    }
  }
}

// Returns the moments of the advantages of each piece, in their order, where asked for them.
std::vector<Moments> scan(ScanKind kind, const Tensor& rewards, const Sequences& sequences, const ScanTokens& tokens,
                          bool statistics = false) {
  if (rewards.numel() == 0) return {};
  std::vector<Piece> pieces = sequences.pieces(kind);
  std::vector<Moments> moments(statistics ? pieces.size() : 0);
  const auto run = [&](auto zero) {
    walk_all<decltype(zero)>(kind, tokens, rewards.numel(), pieces, statistics ? &moments : nullptr);
  };
  switch (rewards.scalar_type()) {
    case ScalarType::Float:
      run(float{});
      break;
    case ScalarType::BFloat16:
      run(fastalign::Bfloat16{});
      break;
    case ScalarType::Half:
      run(fastalign::Float16{});
      break;
    default:
      STD_TORCH_CHECK(false, "gae: expected float32, bfloat16 or float16 rewards on CPU");
  }
  return moments;
}

Tensor floats_like(const Tensor& x) {
  Tensor y = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  fastalign::advise_huge_pages(y.mutable_data_ptr(), 4 * y.numel());
  return y;
}

template <typename T>
bool rise(const T* offsets, int64_t size, int64_t n_tokens) {
  return offsets[0] == 0 && offsets[size - 1] == n_tokens && std::is_sorted(offsets, offsets + size);
}

// Whether offsets, int32 or int64, rise from 0 to the number of tokens.
bool offsets_fit_cpu(const Tensor& offsets_in, int64_t n_tokens) {
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const void* data = offsets.const_data_ptr();
  const int64_t size = offsets.size(0);
  return offsets.scalar_type() == ScalarType::Int ? rise(static_cast<const int32_t*>(data), size, n_tokens)
                                                  : rise(static_cast<const int64_t*>(data), size, n_tokens);
}

std::tuple<Tensor, Tensor, Tensor> gae_cpu(const Tensor& rewards_in, const Tensor& values_in, double gamma, double lam,
                                           const Maybe& mask_in, const Maybe& cu_seqlens, const Maybe& bootstrap,
                                           const Maybe& rates, bool statistics) {
  const Tensor rewards = torch::stable::contiguous(rewards_in), values = torch::stable::contiguous(values_in);
  const Maybe mask = dense(mask_in);
  const Sequences sequences(rewards, gamma, lam, cu_seqlens, bootstrap, rates);
  Tensor advantages = floats_like(rewards), returns = floats_like(rewards);
  const ScanTokens tokens{rewards.const_data_ptr(), values.const_data_ptr(), nullptr, pointer<bool>(mask),
                          floats(advantages),       floats(returns),         {}};
  const std::vector<Moments> moments = scan(ScanKind::gae, rewards, sequences, tokens, statistics);
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
  scan(values ? ScanKind::gae : ScanKind::discounted, rewards, sequences, tokens);
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
  scan(ScanKind::vtrace, rewards, sequences, tokens);
  return {vs, pg_advantages};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def("offsets_fit(Tensor cu_seqlens, int n_tokens) -> bool");
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
  m.impl("offsets_fit", TORCH_BOX(&offsets_fit_cpu));
  m.impl("gae", TORCH_BOX(&gae_cpu));
  m.impl("lambda_returns", TORCH_BOX(&lambda_returns_cpu));
  m.impl("vtrace", TORCH_BOX(&vtrace_cpu));
}
