// Masked whitening on CPU: moments of blocks of cells, merged in their order, then one more pass. Formulas and the meaning
// of the arguments: fastalign/ops/whiten.py; the work on a block: whiten_lanes.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace fastalign {

// What each cell needs of the moments. The mean as two floats: beside a large mean, one would lose digits of a small
// deviation.
struct Whitening {
  float mean, mean_rest, scale, shift;
};

}  // namespace fastalign

#define FASTALIGN_ROWS "whiten_lanes.h"
#include "common.h"

namespace {

using fastalign::Bfloat16;
using fastalign::Float16;
using fastalign::Whitening;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// The second look at a block finds it in the nearest cache. Blocks are the same with any number of threads, and so are
// the results.
constexpr int64_t kBlock = 4096;
constexpr int64_t kBlocksPerTask = 4;

// Calls run(zero) with a zero of the tensor's type.
template <typename Run>
void for_dtype(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(Bfloat16{});
    case ScalarType::Half:
      return run(Float16{});
    default:
      STD_TORCH_CHECK(false, "whiten: expected float32, bfloat16 or float16 on CPU");
  }
}

// Calls work(block, begin, count) for each block of `cells` cells, in parallel.
template <typename Work>
void for_blocks(int64_t cells, const Work& work) {
  const int64_t blocks = (cells + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      work(block, block * kBlock, std::min(kBlock, cells - block * kBlock));
    }
  });
}

struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;

  // Chan et al.: the moments of both.
  void merge(double other_count, double other_mean, double other_squares) {
    if (other_count == 0.0) return;
    const double both = count + other_count, step = other_mean - mean;
    mean += step * (other_count / both);
    squares += other_squares + step * step * (count * other_count / both);
    count = both;
  }

  double scale(double eps) const { return 1.0 / std::sqrt(squares / std::max(1.0, count - 1.0) + eps); }
};

const bool* bools(const Maybe& mask) { return mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr; }

const bool* from(const bool* mask, int64_t begin) { return mask ? mask + begin : nullptr; }

Maybe contiguous(const Maybe& x) { return x ? Maybe(torch::stable::contiguous(*x)) : std::nullopt; }

Moments moments_of(const Tensor& x, const Maybe& mask) {
  std::vector<double> parts(3 * ((x.numel() + kBlock - 1) / kBlock));
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* cells = static_cast<const T*>(x.const_data_ptr());
    for_blocks(x.numel(), [&](int64_t block, int64_t begin, int64_t count) {
      FASTALIGN_CALL(moments<T>, cells + begin, from(bools(mask), begin), count, &parts[3 * block]);
    });
  });
  Moments all;
  for (size_t i = 0; i < parts.size(); i += 3) all.merge(parts[i], parts[i + 1], parts[i + 2]);
  return all;
}

Tensor to_tensor(const Tensor& like, const Moments& moments) {
  Tensor out = torch::stable::new_empty(like, {3}, ScalarType::Double);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  to[0] = moments.count;
  to[1] = moments.mean;
  to[2] = moments.squares;
  return out;
}

Moments from_tensor(const Tensor& moments) {
  const double* from = static_cast<const double*>(moments.const_data_ptr());
  return {from[0], from[1], from[2]};
}

Whitening whitening_by(const Moments& m, double eps, bool shift_mean) {
  const float mean = static_cast<float>(m.mean);
  return {mean, static_cast<float>(m.mean - mean), static_cast<float>(m.scale(eps)), shift_mean ? 0.0f : mean};
}

Tensor whitened(const Tensor& x, const Maybe& mask, const Moments& moments, double eps, bool shift_mean) {
  Tensor y = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  const Whitening w = whitening_by(moments, eps, shift_mean);
  float* to = static_cast<float*>(y.mutable_data_ptr());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* cells = static_cast<const T*>(x.const_data_ptr());
    for_blocks(x.numel(), [&](int64_t, int64_t begin, int64_t count) {
      FASTALIGN_CALL(whiten<T>, cells + begin, from(bools(mask), begin), count, w, to + begin);
    });
  });
  return y;
}

Tensor moments_cpu(const Tensor& x, const Maybe& mask) {
  return to_tensor(x, moments_of(torch::stable::contiguous(x), contiguous(mask)));
}

std::tuple<Tensor, Tensor> whiten_cpu(const Tensor& x_in, const Maybe& mask_in, double eps, bool shift_mean) {
  const Tensor x = torch::stable::contiguous(x_in);
  const Maybe mask = contiguous(mask_in);
  const Moments moments = moments_of(x, mask);
  return {whitened(x, mask, moments, eps, shift_mean), to_tensor(x, moments)};
}

Tensor whiten_by_cpu(const Tensor& x, const Maybe& mask, const Tensor& moments, double eps, bool shift_mean) {
  return whitened(torch::stable::contiguous(x), contiguous(mask), from_tensor(torch::stable::contiguous(moments)), eps,
                  shift_mean);
}

Tensor whiten_backward_cpu(const Tensor& grad_in, const Tensor& x_in, const Maybe& mask_in, const Tensor& moments_in,
                           double eps, bool shift_mean) {
  const Tensor grad = torch::stable::contiguous(grad_in), x = torch::stable::contiguous(x_in);
  const Maybe mask = contiguous(mask_in);
  const Moments moments = from_tensor(moments_in);
  const Whitening w = whitening_by(moments, eps, true);
  const float* g = static_cast<const float*>(grad.const_data_ptr());
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  std::vector<double> parts(2 * ((x.numel() + kBlock - 1) / kBlock));
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* cells = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(dx.mutable_data_ptr());
    for_blocks(x.numel(), [&](int64_t block, int64_t begin, int64_t count) {
      FASTALIGN_CALL(whiten_sums<T>, g + begin, cells + begin, from(bools(mask), begin), count, w,
                     &parts[2 * block]);
    });
    double plain = 0.0, along = 0.0;
    for (size_t i = 0; i < parts.size(); i += 2) {
      plain += parts[i];
      along += parts[i + 1];
    }
    plain /= std::max(1.0, moments.count);
    along /= std::max(1.0, moments.count - 1.0);
    const double back = shift_mean ? 0.0 : plain;
    for_blocks(x.numel(), [&](int64_t, int64_t begin, int64_t count) {
      FASTALIGN_CALL(whiten_dx<T>, g + begin, cells + begin, from(bools(mask), begin), count, w,
                     static_cast<float>(plain), static_cast<float>(along), static_cast<float>(back), to + begin);
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign_cpp, m) {
  m.def("moments(Tensor x, Tensor? mask) -> Tensor");
  m.def("whiten(Tensor x, Tensor? mask, float eps, bool shift_mean) -> (Tensor, Tensor)");
  m.def("whiten_by(Tensor x, Tensor? mask, Tensor moments, float eps, bool shift_mean) -> Tensor");
  m.def(
      "whiten_backward(Tensor grad, Tensor x, Tensor? mask, Tensor moments, float eps, bool shift_mean) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign_cpp, CPU, m) {
  m.impl("moments", TORCH_BOX(&moments_cpu));
  m.impl("whiten", TORCH_BOX(&whiten_cpu));
  m.impl("whiten_by", TORCH_BOX(&whiten_by_cpu));
  m.impl("whiten_backward", TORCH_BOX(&whiten_backward_cpu));
}
