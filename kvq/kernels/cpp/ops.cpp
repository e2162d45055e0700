// torch.ops.kvq: the CPU's kernels as operators. Built when first used (kvq/kernels/cpp/build.py) against torch's stable
// interface, whose parallel_for runs on torch's own threads. Shapes and dtypes are the business of launch.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "decode_attention.h"
#include "pack.h"
#include "product.h"
#include "statistics.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

kvq::Tokens tokens_of(const Tensor& x) {
  const int64_t size = x.element_size();
  const ScalarType type = x.scalar_type();
  const kvq::Kind kind = type == ScalarType::Float      ? kvq::Kind::kFloat
                         : type == ScalarType::Double   ? kvq::Kind::kDouble
                         : type == ScalarType::BFloat16 ? kvq::Kind::kBFloat16
                                                        : kvq::Kind::kHalf;
  return {data<uint8_t>(x), x.size(2), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size, kind};
}

// f on up to n threads of torch.
template <class F>
void parallel(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f();
  });
}

// The numbers and reals of a side (kvq/kernels/cpp/sides.py).
kvq::Side side_of(const Tensor& numbers, const Tensor& reals) { return {data<int64_t>(numbers), data<double>(reals)}; }

template <class T>
void attend(const Tensor& q, const Tensor& pool, const Tensor& table, const std::vector<int64_t>& n, const kvq::Side& key,
            const kvq::Side& value, const Tensor& counts, const Tensor& keys, const Tensor& values,
            const std::optional<Tensor>& sink_keys, const std::optional<Tensor>& sink_values,
            const std::array<std::optional<Tensor>, 5>& frame, double softcap, const std::optional<Tensor>& sink_logits,
            const std::optional<Tensor>& bias, Tensor& out, Tensor& lse) {
  kvq::Attention<T> a{
      .B = q.size(0), .K = q.size(1), .G = q.size(2), .L = q.size(3), .D = q.size(4), .splits = 1, .page_tokens = n[0],
      .record = n[1], .stride = n[2], .pages = table.size(1), .window = n[3], .bias_stride = bias ? bias->stride(0) : 0,
      .counts = data<int32_t>(counts), .pool = data<uint8_t>(pool), .table = data<int64_t>(table), .key = key,
      .value = value, .keys = tokens_of(keys), .values = tokens_of(values), .sink_keys = {}, .sink_values = {},
      .q = data<T>(q), .sink_logits = data<T>(sink_logits), .bias = data<T>(bias), .softcap = static_cast<T>(softcap),
      .frame = {.block = n[4], .blocks = frame[0] ? frame[0]->size(1) : 0, .turns_keys = n[5] != 0,
                .cos = data<T>(frame[0]), .sin = data<T>(frame[1]), .matrix = data<T>(frame[3]), .mean = data<T>(frame[4]),
                .partner = data<int64_t>(frame[2])},
      .folds_keys = false, .folds_values = false, .tops = nullptr, .sums = nullptr, .accs = nullptr};
  if (sink_keys) a.sink_keys = tokens_of(*sink_keys), a.sink_values = tokens_of(*sink_values);
  const auto run = [](int64_t threads, const auto& f) { parallel(threads, f); };
  kvq::attend(a, torch::stable::get_num_threads(), run, data<T>(out), data<T>(lse));
}

void decode_attention(const Tensor q, const Tensor pool, const Tensor table, std::vector<int64_t> numbers,
                      const Tensor key, const Tensor key_reals, const Tensor value, const Tensor value_reals,
                      const Tensor counts, const Tensor keys, const Tensor values, std::optional<Tensor> sink_keys,
                      std::optional<Tensor> sink_values, std::optional<Tensor> cos, std::optional<Tensor> sin,
                      std::optional<Tensor> partner, std::optional<Tensor> matrix, std::optional<Tensor> mean,
                      double softcap, std::optional<Tensor> sink_logits, std::optional<Tensor> bias, Tensor out,
                      Tensor lse) {
  const auto run = q.scalar_type() == ScalarType::Double ? attend<double> : attend<float>;
  run(q, pool, table, numbers, side_of(key, key_reals), side_of(value, value_reals), counts, keys, values, sink_keys,
      sink_values, {cos, sin, partner, matrix, mean}, softcap, sink_logits, bias, out, lse);
}

bool pack(const Tensor x, const Tensor ranges, Tensor pool, const Tensor table, const Tensor side, const Tensor reals,
          int64_t record, int64_t stride) {
  const kvq::Pack p{.side = side_of(side, reals), .tokens = tokens_of(x), .pool = data<uint8_t>(pool),
                    .table = data<int64_t>(table), .B = x.size(0), .K = x.size(1), .pages = table.size(1),
                    .record = record, .stride = stride, .ranges = data<int32_t>(ranges)};
  std::atomic<bool> good{true};
  // A thread is woken for so many tokens.
  int64_t most = 1;
  for (int64_t b = 0; b < p.B; ++b) most = std::max<int64_t>(most, p.ranges[3 * b + 1] - p.ranges[3 * b]);
  const int64_t heads = p.heads_at_once(), units = p.K / heads;
  torch::stable::parallel_for(0, p.B * units, std::max<int64_t>(1, 64 / (most * heads)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / units, k = i % units * heads;
      const bool own = p.tokens.kind == kvq::Kind::kDouble ? kvq::pack_heads<double>(p, b, k, heads)
                                                           : kvq::pack_heads<float>(p, b, k, heads);
      if (!own) good = false;
    }
  });
  return good;
}

void product(const Tensor x, const Tensor matrix, std::optional<Tensor> offset, Tensor out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    kvq::product<T>(tokens_of(x), x.size(0), x.size(1), x.size(3), data<T>(matrix), data<T>(offset), data<T>(out));
  };
  if (matrix.scalar_type() == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
}

// A thread takes a multiple of so many columns, a cache line of float32.
constexpr int64_t kLine = 16;

kvq::Rows rows_of(const Tensor& x, int64_t groups) { return {x.size(0), x.size(1), x.size(2), groups}; }

template <class F>
void by_columns(int64_t columns, const F& f) {
  torch::stable::parallel_for(0, (columns + kLine - 1) / kLine, 1, [&](int64_t first, int64_t last) {
    f(first * kLine, std::min(last * kLine, columns));
  });
}

void channel_range(const Tensor x, Tensor low, Tensor high, Tensor total, Tensor squares) {
  by_columns(x.size(2), [&](int64_t first, int64_t last) {
    kvq::channel_range(rows_of(x, low.size(0)), data<float>(x), first, last, data<float>(low), data<float>(high),
                       data<double>(total), data<double>(squares));
  });
}

kvq::Bins bins_of(const std::vector<int64_t>& n) {
  return {static_cast<int32_t>(n[0]), static_cast<int32_t>(n[1]), static_cast<int32_t>(n[2])};
}

void count_signed(const Tensor x, std::vector<int64_t> bins, Tensor counts) {
  by_columns(x.size(2), [&](int64_t first, int64_t last) {
    kvq::count_signed(rows_of(x, counts.size(0)), data<int32_t>(x), first, last, bins_of(bins), data<int32_t>(counts));
  });
}

void massive(const Tensor x, const Tensor valid, std::vector<int64_t> bins, int64_t step, Tensor tokens, Tensor channels,
             Tensor counts) {
  const kvq::Rows n = rows_of(x, 1);
  torch::stable::parallel_for(0, n.rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      kvq::massive(n, data<int32_t>(x) + i * n.tokens * n.columns, data<bool>(valid) + i * n.tokens, step, bins_of(bins),
                   data<int32_t>(tokens) + i * n.tokens, data<int32_t>(channels) + i * n.columns,
                   data<int64_t>(counts) + i * (bins[2] + 1));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(kvq, m) {
  m.def(
      "decode_attention(Tensor q, Tensor pool, Tensor table, int[] numbers, Tensor key, Tensor key_reals, Tensor value, "
      "Tensor value_reals, Tensor counts, Tensor keys, Tensor values, Tensor? sink_keys, Tensor? sink_values, "
      "Tensor? cos, Tensor? sin, Tensor? partner, Tensor? matrix, Tensor? mean, float softcap, Tensor? sink_logits, Tensor? bias, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "pack(Tensor x, Tensor ranges, Tensor(a!) pool, Tensor table, Tensor side, Tensor reals, int record, int stride) "
      "-> bool");
  m.def("product(Tensor x, Tensor matrix, Tensor? offset, Tensor(a!) out) -> ()");
  m.def("channel_range(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) total, Tensor(d!) squares) -> ()");
  m.def("count_signed(Tensor x, int[] bins, Tensor(a!) counts) -> ()");
  m.def(
      "massive(Tensor x, Tensor valid, int[] bins, int step, Tensor(a!) tokens, Tensor(b!) channels, "
      "Tensor(c!) counts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kvq, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("product", TORCH_BOX(&product));
  m.impl("channel_range", TORCH_BOX(&channel_range));
  m.impl("count_signed", TORCH_BOX(&count_signed));
  m.impl("massive", TORCH_BOX(&massive));
}
