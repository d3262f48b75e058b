// What the CPU and the CUDA side of the contrastive losses share: checks, allocation, and the loop over tiles.
//
// An Engine owns a device's matrix products, passes and tile-sized scratch. The operators construct one for each call:
//
//   Engine(query_BE, key_GE, with_gradients)   rows dense, one of the four dtypes
//   rows(), columns()                          largest tile
//   set_query(query_XE), set_key(key_YE)       the tile the calls below are about
//   product()                                  computes <query_i, key_j>, returns the contiguous tile (type A)
//   weight()                                   where a backward pass puts its weights
//   pass(params)                               overloads for the four structs of params.h
//   add_query_gradient(grad_XE)                += weight key_YE, in A
//   add_key_gradient(begin, grad_NE)           += weight[:, begin : begin + N]^T query_XE, in A
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

#include "common/dispatch.h"
#include "contrastive/params.h"

namespace megaeva::contrastive {

// The type A that sums over features are kept in.
inline at::ScalarType wide_type(at::ScalarType features) { return features == at::kDouble ? at::kDouble : at::kFloat; }

inline at::TensorOptions wide_options(const at::Tensor& features) {
  return features.options().dtype(wide_type(features.scalar_type()));
}

inline void check_features(const char* name, const at::Tensor& query, const at::Tensor& key) {
  TORCH_CHECK(query.dim() == 2 && key.dim() == 2 && query.size(1) == key.size(1), name, ": query_BE ", query.sizes(),
              " and key_GE ", key.sizes(), " must be two matrices of one width; pass [rows, embedding] twice.");
  TORCH_CHECK(query.scalar_type() == key.scalar_type() && query.device() == key.device(), name, ": query_BE is ",
              query.scalar_type(), " on ", query.device(), ", key_GE ", key.scalar_type(), " on ", key.device(),
              "; they must agree, convert one of them.");
  scalar_of(query, name);
}

inline void check_number(const char* name, const char* argument, const at::Tensor& number, const at::Tensor& query) {
  const at::ScalarType wide = wide_type(query.scalar_type());
  TORCH_CHECK(number.dim() == 0 && number.scalar_type() == wide && number.device() == query.device(), name, ": ",
              argument, " is ", number.sizes(), " ", number.scalar_type(), " on ", number.device(),
              ", must be a 0-dim tensor, ", wide, " on ", query.device(), " for ", query.scalar_type(),
              " features; convert it.");
}

inline void check_vector(const char* name, const char* argument, const at::Tensor& vector, std::int64_t length,
                         at::ScalarType dtype, const at::Tensor& query) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == length && vector.scalar_type() == dtype &&
                  vector.device() == query.device(),
              name, ": ", argument, " is ", vector.sizes(), " ", vector.scalar_type(), " on ", vector.device(),
              ", must be [", length, "], ", dtype, " on ", query.device(), "; pass one number for each row.");
}

inline void check_gradients(const char* name, const at::Tensor& key, std::int64_t key_begin, std::int64_t key_end,
                            at::ScalarType dtype) {
  TORCH_CHECK(0 <= key_begin && key_begin <= key_end && key_end <= key.size(0), name, ": keys ", key_begin, " to ",
              key_end, " must be a range inside key_GE ", key.sizes(), "; key_begin = key_end asks for no gradient.");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, name,
              ": gradients in ", dtype, " must be float32, float64, bfloat16 or float16; pass the features' dtype.");
}

// tile(row, column, rows, columns) for every tile; the engine's query and key are set.
template <typename Engine, typename BeginRows, typename Tile, typename EndRows>
void over_tiles(Engine& engine, const at::Tensor& query, const at::Tensor& key, BeginRows begin_rows, Tile tile,
                EndRows end_rows) {
  for (std::int64_t row = 0; row < query.size(0); row += engine.rows()) {
    const std::int64_t rows = std::min(engine.rows(), query.size(0) - row);
    engine.set_query(query.narrow(0, row, rows));
    begin_rows(row, rows);
    for (std::int64_t column = 0; column < key.size(0); column += engine.columns()) {
      const std::int64_t columns = std::min(engine.columns(), key.size(0) - column);
      engine.set_key(key.narrow(0, column, columns));
      tile(row, column, rows, columns);
    }
    end_rows(row, rows);
  }
}

template <typename Engine, typename Tile>
void over_tiles(Engine& engine, const at::Tensor& query, const at::Tensor& key, Tile tile) {
  const auto nothing = [](std::int64_t, std::int64_t) {};
  over_tiles(engine, query, key, nothing, tile, nothing);
}

// An element of a contiguous vector of the accumulation type, as the structs of params.h want it.
inline const void* at_index(const at::Tensor& vector, std::int64_t index) {
  return static_cast<const char*>(vector.const_data_ptr()) + index * vector.element_size();
}

inline void* mutable_at_index(const at::Tensor& vector, std::int64_t index) {
  return static_cast<char*>(vector.mutable_data_ptr()) + index * vector.element_size();
}

constexpr std::int64_t kSweepKeys = 8192;  // at least this many keys in a sweep: below, halving them saves nothing

// Both gradients from the weights that weigh(row, column, rows, columns) leaves in engine.weight(). The sums of a row
// block become its gradients when the block is done; those of the keys live through a sweep over all queries. Gradients
// narrower than sums are made in two sweeps of half the keys each, for half the memory; the query's then round twice.
template <typename Engine, typename Weigh>
std::tuple<at::Tensor, at::Tensor> gradients(Engine& engine, const at::Tensor& query, const at::Tensor& key,
                                             const at::Tensor& factor, std::int64_t key_begin, std::int64_t key_end,
                                             at::ScalarType dtype, Weigh weigh) {
  const std::int64_t width = query.size(1), num_keys = key.size(0);
  const at::TensorOptions wide = wide_options(query), narrow = query.options().dtype(dtype);
  const bool in_place = dtype == wide.dtype().toScalarType();
  const std::int64_t sweep = in_place ? num_keys : std::max(kSweepKeys, (num_keys + 1) / 2);
  at::Tensor grad_query = at::zeros(query.sizes(), narrow);
  at::Tensor grad_key = at::empty({key_end - key_begin, width}, narrow);
  at::Tensor scratch = in_place ? at::Tensor() : at::empty({std::min(engine.rows(), query.size(0)), width}, wide);
  at::Tensor sum_query;
  for (std::int64_t start = 0; start < num_keys; start += sweep) {
    const std::int64_t stop = std::min(start + sweep, num_keys);
    const std::int64_t own_begin = std::clamp(key_begin, start, stop), own_end = std::clamp(key_end, start, stop);
    at::Tensor own_grad = grad_key.narrow(0, own_begin < own_end ? own_begin - key_begin : 0, own_end - own_begin);
    at::Tensor sum_key = in_place ? own_grad.zero_() : at::zeros(own_grad.sizes(), wide);
    over_tiles(
        engine, query, key.narrow(0, start, stop - start),
        [&](std::int64_t row, std::int64_t rows) {
          sum_query = in_place ? grad_query.narrow(0, row, rows) : scratch.narrow(0, 0, rows).zero_();
        },
        [&](std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns) {
          column += start;
          weigh(row, column, rows, columns);
          engine.add_query_gradient(sum_query);
          const std::int64_t begin = std::max(own_begin, column), end = std::min(own_end, column + columns);
          if (begin < end) engine.add_key_gradient(begin - column, sum_key.narrow(0, begin - own_begin, end - begin));
        },
        [&](std::int64_t row, std::int64_t rows) {
          sum_query.mul_(factor);
          if (!in_place) grad_query.narrow(0, row, rows).copy_(sum_query.add_(grad_query.narrow(0, row, rows)));
        });
    sum_key.mul_(factor);
    if (!in_place) own_grad.copy_(sum_key);
  }
  return {grad_query, grad_key};
}

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor> infonce_forward(const at::Tensor& query, const at::Tensor& key,
                                                               const at::Tensor& scale, std::int64_t first) {
  constexpr const char* name = "infonce_forward";
  check_features(name, query, key);
  check_number(name, "scale", scale, query);
  const at::Tensor query_rows = with_dense_rows(query), key_rows = with_dense_rows(key);
  Engine engine(query_rows, key_rows, /*with_gradients=*/false);
  const at::TensorOptions wide = wide_options(query), exact = query.options().dtype(at::kDouble);
  const double nothing = -std::numeric_limits<double>::infinity();
  const at::Tensor max_query = at::full({query.size(0)}, nothing, wide), sum_query = at::zeros({query.size(0)}, exact);
  const at::Tensor max_key = at::full({key.size(0)}, nothing, wide), sum_key = at::zeros({key.size(0)}, exact);
  const at::Tensor pair_query = at::zeros({query.size(0)}, wide);
  over_tiles(engine, query_rows, key_rows,
             [&](std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns) {
               engine.pass(InfonceForwardParams{
                   engine.product(), scale.const_data_ptr(), mutable_at_index(max_query, row),
                   sum_query.mutable_data_ptr<double>() + row, mutable_at_index(max_key, column),
                   sum_key.mutable_data_ptr<double>() + column, mutable_at_index(pair_query, row), rows, columns,
                   first + row - column});
             });
  return {sum_query.log_().add_(max_query), sum_key.log_().add_(max_key), pair_query};
}

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor> infonce_backward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& scale, const at::Tensor& factor,
    const at::Tensor& lse_query, const at::Tensor& lse_key, const at::Tensor& pair_query, const at::Tensor& pair_key,
    std::int64_t first, double pair_weight, double uniform, std::int64_t key_begin, std::int64_t key_end,
    at::ScalarType dtype) {
  constexpr const char* name = "infonce_backward";
  check_features(name, query, key);
  check_number(name, "scale", scale, query);
  check_number(name, "factor", factor, query);
  const at::ScalarType wide = wide_type(query.scalar_type());
  check_vector(name, "lse_query_B", lse_query, query.size(0), at::kDouble, query);
  check_vector(name, "lse_key_G", lse_key, key.size(0), at::kDouble, query);
  check_vector(name, "pair_query_B", pair_query, query.size(0), wide, query);
  check_vector(name, "pair_key_G", pair_key, key.size(0), wide, query);
  check_gradients(name, key, key_begin, key_end, dtype);
  const at::Tensor query_rows = with_dense_rows(query), key_rows = with_dense_rows(key);
  // A contiguous A each, and what rounding to A took away.
  const at::Tensor lse_rows = lse_query.to(wide).contiguous(), lse_columns = lse_key.to(wide).contiguous();
  const at::Tensor rest_rows = lse_query.sub(lse_rows).to(wide), rest_columns = lse_key.sub(lse_columns).to(wide);
  const at::Tensor pair_rows = pair_query.contiguous(), pair_columns = pair_key.contiguous();
  Engine engine(query_rows, key_rows, /*with_gradients=*/true);
  const at::Tensor share = at::zeros({query.size(0)}, query.options().dtype(at::kDouble));
  auto [grad_query, grad_key] = gradients(
      engine, query_rows, key_rows, factor, key_begin, key_end, dtype,
      [&](std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns) {
        engine.pass(InfonceBackwardParams{
            engine.product(), engine.weight(), scale.const_data_ptr(), at_index(lse_rows, row),
            at_index(rest_rows, row), at_index(lse_columns, column), at_index(rest_columns, column),
            at_index(pair_rows, row), at_index(pair_columns, column), share.mutable_data_ptr<double>() + row, rows,
            columns, first + row - column, pair_weight, uniform});
      });
  return {grad_query, grad_key, share.sum().to(scale.scalar_type())};
}

template <typename Engine>
at::Tensor sigmoid_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& scale,
                           const at::Tensor& bias, std::int64_t first) {
  constexpr const char* name = "sigmoid_forward";
  check_features(name, query, key);
  check_number(name, "scale", scale, query);
  check_number(name, "bias", bias, query);
  const at::Tensor query_rows = with_dense_rows(query), key_rows = with_dense_rows(key);
  Engine engine(query_rows, key_rows, /*with_gradients=*/false);
  const at::Tensor total = at::zeros({query.size(0)}, query.options().dtype(at::kDouble));
  over_tiles(engine, query_rows, key_rows,
             [&](std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns) {
               engine.pass(SigmoidForwardParams{engine.product(), scale.const_data_ptr(), bias.const_data_ptr(),
                                                total.mutable_data_ptr<double>() + row, rows, columns,
                                                first + row - column});
             });
  return total.sum().to(scale.scalar_type());
}

template <typename Engine>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_backward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& scale, const at::Tensor& bias,
    const at::Tensor& factor, std::int64_t first, std::int64_t key_begin, std::int64_t key_end, at::ScalarType dtype) {
  constexpr const char* name = "sigmoid_backward";
  check_features(name, query, key);
  check_number(name, "scale", scale, query);
  check_number(name, "bias", bias, query);
  check_number(name, "factor", factor, query);
  check_gradients(name, key, key_begin, key_end, dtype);
  const at::Tensor query_rows = with_dense_rows(query), key_rows = with_dense_rows(key);
  Engine engine(query_rows, key_rows, /*with_gradients=*/true);
  const at::TensorOptions exact = query.options().dtype(at::kDouble);
  const at::Tensor scale_share = at::zeros({query.size(0)}, exact), bias_share = at::zeros({query.size(0)}, exact);
  auto [grad_query, grad_key] = gradients(
      engine, query_rows, key_rows, factor, key_begin, key_end, dtype,
      [&](std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns) {
        engine.pass(SigmoidBackwardParams{engine.product(), engine.weight(), scale.const_data_ptr(),
                                          bias.const_data_ptr(), scale_share.mutable_data_ptr<double>() + row,
                                          bias_share.mutable_data_ptr<double>() + row, rows, columns,
                                          first + row - column});
      });
  return {grad_query, grad_key, scale_share.sum().to(scale.scalar_type()), bias_share.sum().to(scale.scalar_type())};
}

}  // namespace megaeva::contrastive
