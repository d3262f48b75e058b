// Arguments of the passes over one tile of the contrastive losses. No torch or CUDA header: the .cu compiles fast.
//
// A tile is rows x columns inner products <query_i, key_j>, contiguous, of the accumulation type A (double for double
// features, else float). Logits are l_ij = scale * <query_i, key_j>, plus bias for the sigmoid loss. Query i is paired
// with column pair + i, where that column is inside the tile. scale and bias point to one A each.
//
// What is summed over many tiles is kept in double, one number for each row (and each column in infonce_forward), and
// each pass adds its tile to it; so no pass needs another's result and none needs an atomic.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace megaeva::contrastive {

//   m' = max(m, max l),  s' = s exp(m - m') + sum exp(l - m')        along every row and along every column
// so that m + log(s) is log-sum-exp in the end; m = -inf and s = 0 before the first tile. NaN and infinity must come
// out as from torch.logsumexp: no inf - inf.
struct InfonceForwardParams {
  const void* product;
  const void* scale;
  void* max_query;       // A[rows]
  double* sum_query;     // [rows]
  void* max_key;         // A[columns]
  double* sum_key;       // [columns]
  void* pair_query;      // A[rows]: the logit of a query's pair is written where the pair is inside the tile
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t pair;
};

//   w_ij = exp(l_ij - lse_query_i) + exp(l_ij - lse_key_j) - pair_weight [j = pair + i] - uniform
//   share_i += sum_j [exp(l_ij - lse_query_i) - uniform] (l_ij - pair_query_i)
//                    + exp(l_ij - lse_key_j) (l_ij - pair_key_j)
// A log-sum-exp is a double, in two numbers: exp((l - lse) - lse_rest). One A of the size of a logit would not hold the
// digits of a pair's small 1 - exp(l - lse).
struct InfonceBackwardParams {
  const void* product;
  void* weight;            // [rows, columns]; its type is the engine's choice, and it may be product itself
  const void* scale;
  const void* lse_query;   // A[rows]
  const void* lse_query_rest;
  const void* lse_key;     // A[columns]
  const void* lse_key_rest;
  const void* pair_query;  // A[rows]: logit of this query's pair
  const void* pair_key;    // A[columns]
  double* share;           // [rows]
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t pair;
  double pair_weight;
  double uniform;
};

//   total_i += sum_j log(1 + exp(-z_ij l_ij)),  z = 1 for a pair and -1 else
struct SigmoidForwardParams {
  const void* product;
  const void* scale;
  const void* bias;
  double* total;           // [rows]
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t pair;
};

//   w_ij = 1 / (1 + exp(-l_ij)) - [j = pair + i]                     (a pair's as -1 / (1 + exp(l)): no difference)
//   scale_share_i += sum_j w_ij scale <query_i, key_j>,  bias_share_i += sum_j w_ij
// The former is not w_ij (l_ij - bias): the logit has lost digits to a bias of another size.
struct SigmoidBackwardParams {
  const void* product;
  void* weight;            // as in InfonceBackwardParams
  const void* scale;
  const void* bias;
  double* scale_share;     // [rows]
  double* bias_share;      // [rows]
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t pair;
};

}  // namespace megaeva::contrastive
