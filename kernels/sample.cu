// From rows of f32 logits to tokens: bias, penalties, bans and a mask of what is allowed, then the likeliest token or
// one draw after temperature, top-k, top-p and min-p; log-probabilities when asked. One block per row, which stays in
// the cache.
//
// A draw is among integers: a token's weight is its probability relative to the likeliest one's in 2^-30ths, from f32
// operations that are rounded one by one. Integers add up to the same sum in any order, so the token is the one that
// the host's plain implementation takes, bit for bit, whatever a block's threads add up first. Nothing is sorted: what
// top-k and top-p keep is the tokens above a weight, found digit by digit, and the first few of those that weigh as
// much.
//
// A row that cannot be sampled from (a NaN, or no finite largest) gives NO_TOKEN.
//
// Source: crates/backend/src/sampling.rs and sampling/weights.rs, which specify all of it.
#include "device.cuh"

constexpr int SAMPLE_THREADS = 1024;  // at most; whole warps, and any number of them does the same
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / WARP;
constexpr uint32_t NO_TOKEN = 0xffffffffu;
constexpr int MAX_TOP = 32;

// What a row asks for.
struct SampleRow {
  double top_p;    // 1: all
  double uniform;  // the draw, below 1
  float scale;     // log2(e) / temperature; 0: the likeliest token
  uint32_t top_k;  // 0: all
  uint32_t least_weight;
  // The token to be taken whatever the logits say, or NO_TOKEN.
  uint32_t forced;
  int first_edit;
  int num_edits;
  // Likeliest tokens to report, MAX_TOP at most; negative if no log-probability is wanted.
  int num_top;
  // Where the mask of its allowed tokens begins, token t in bit t % 32 of word t / 32; negative if all are allowed.
  int first_mask_word;
};

// What bias, penalties and bans do to one token's logit.
struct LogitEdit {
  uint32_t token;
  float bias;
  // Divides positive logits and multiplies others.
  float repetition;
  float subtracted;
};

struct TokenLogprob {
  uint32_t token;
  float logprob;
  uint32_t rank;
};

// ---- over the block --------------------------------------------------------------------------------------------

// Combines a value of each thread; every thread gets the result.
template <class T, class Combine>
DEVICE T block_combine(T value, T (&of_warp)[SAMPLE_WARPS], Combine combine) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, offset));
  }
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
  __syncthreads();
  value = of_warp[0];
  for (uint32_t warp = 1; warp < blockDim.x / WARP; warp++) value = combine(value, of_warp[warp]);
  __syncthreads();
  return value;
}

template <class T>
DEVICE T block_sum(T value) {
  __shared__ T of_warp[SAMPLE_WARPS];
  return block_combine(value, of_warp, [](T a, T b) { return a + b; });
}

// A logit with its token, in one number that orders them: larger logits first, then lower tokens, and a NaN before all.
DEVICE uint64_t order_key(float logit, uint32_t token) {
  uint32_t bits = __float_as_uint(logit);
  uint32_t rising = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  if (logit == 0.0f) rising = 0x80000000u;  // both zeros are one
  if (logit != logit) rising = 0xfffffffeu;
  return static_cast<uint64_t>(rising) << 32 | (0xffffffffu - token);
}

DEVICE uint32_t token_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// A row whose tokens may be taken, or only those in its mask: the others' logits are minus infinity.
template <bool IS_MASKED>
struct Row {
  const float* logits;
  int vocab;
  const uint32_t* mask;

  DEVICE float logit(uint32_t token) const {
    if (IS_MASKED && (mask[token / 32] >> token % 32 & 1) == 0) return -INFINITY;
    return logits[token];
  }

  // The first token by order among those after `limit`.
  DEVICE uint64_t best_below(uint64_t limit) const {
    __shared__ uint64_t of_warp[SAMPLE_WARPS];
    uint64_t best = 0;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
      uint64_t key = order_key(logit(token), token);
      if (key < limit && key > best) best = key;
    }
    return block_combine(best, of_warp, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  // The likeliest token, or NO_TOKEN.
  DEVICE uint32_t likeliest() const {
    uint32_t token = token_of(best_below(~0ull));
    float largest = logit(token);
    return largest < INFINITY && largest > -INFINITY ? token : NO_TOKEN;
  }
};

// ---- the draw --------------------------------------------------------------------------------------------------

// 2^x for x from -1/2 to 1/2, less 1: the series of e^x in powers of ln 2.
DEVICE float exp2_series(float x) {
  constexpr float LN2 = 0.693147182464599609375f;
  constexpr float C1 = LN2 * LN2 / 2.0f, C2 = C1 * LN2 / 3.0f, C3 = C2 * LN2 / 4.0f, C4 = C3 * LN2 / 5.0f;
  constexpr float COEFFICIENTS[6] = {LN2, C1, C2, C3, C4, C4 * LN2 / 6.0f};
  float sum = 0.0f;
#pragma unroll
  for (int i = 5; i >= 0; i--) sum = __fmul_rn(__fadd_rn(sum, COEFFICIENTS[i]), x);
  return sum;
}

// Which tokens are still in the draw: those above a weight, and those that weigh as much and come before a token.
struct Kept {
  uint32_t weight;
  int ties_end;

  // What a token adds to the sum.
  DEVICE uint64_t operator()(uint32_t of_token, int token) const {
    return of_token > weight || (of_token == weight && token < ties_end) ? of_token : 0;
  }
};

// A row's weights, and what is left of them.
template <class Row>
struct Draw {
  Row row;
  float largest;
  float scale;
  Kept kept;

  DEVICE uint32_t weight_of(int token) const {
    constexpr float ROUNDS = 12582912.0f, LEAST_EXPONENT = -64.0f;
    float x = fmaxf(__fmul_rn(__fsub_rn(row.logit(token), largest), scale), LEAST_EXPONENT);
    float shifted = __fadd_rn(x, ROUNDS);
    float series = exp2_series(__fsub_rn(x, __fsub_rn(shifted, ROUNDS)));
    uint32_t exponent = __float_as_uint(shifted) - __float_as_uint(ROUNDS) + 30 + 127;
    float weight = __fmul_rn(__fadd_rn(1.0f, series), __uint_as_float(exponent << 23));
    return static_cast<uint32_t>(__float2int_rz(__fadd_rn(weight, 0.5f)));
  }

  // The sum of the amounts of all tokens.
  template <class Amount>
  DEVICE uint64_t sum(Amount amount) const {
    uint64_t sum = 0;
    for (int token = threadIdx.x; token < row.vocab; token += blockDim.x) sum += amount(weight_of(token), token);
    return block_sum(sum);
  }

  // A weight, and the amounts of what weighs more.
  struct Cut {
    uint32_t weight;
    uint64_t above;
  };

  // The largest weight from which on the amounts of tokens add up to `wanted`; all of them together are known to.
  //
  // A digit of eight bits at a time, from the top: each pass adds the amounts of the tokens that have the digits found
  // so far, by their next one. Most tokens weigh next to nothing and would queue for one counter, that of the zero,
  // which nobody needs: what no larger digit reaches, zero does.
  template <class Amount>
  DEVICE Cut cut(uint64_t wanted, Amount amount) const {
    constexpr int DIGITS = 256, GROUP = 16, TOP_SHIFT = 24;
    __shared__ unsigned long long of_digit[DIGITS], of_group[DIGITS / GROUP];
    Cut found = {0, 0};
    for (int shift = TOP_SHIFT; shift >= 0; shift -= 8) {
      for (int digit = threadIdx.x; digit < DIGITS; digit += blockDim.x) of_digit[digit] = 0;
      __syncthreads();
      for (int token = threadIdx.x; token < row.vocab; token += blockDim.x) {
        uint32_t weight = weight_of(token), digit = weight >> shift & (DIGITS - 1);
        bool has_digits = shift == TOP_SHIFT || weight >> (shift + 8) == found.weight >> (shift + 8);
        if (!has_digits || digit == 0) continue;
        unsigned long long added = amount(weight, token);
        atomicAdd(&of_digit[digit], added);
      }
      __syncthreads();
      if (threadIdx.x < DIGITS / GROUP) {
        unsigned long long sum = 0;
        for (int i = 0; i < GROUP; i++) sum += of_digit[threadIdx.x * GROUP + i];
        of_group[threadIdx.x] = sum;
      }
      __syncthreads();
      int group = DIGITS / GROUP - 1;
      while (group > 0 && found.above + of_group[group] < wanted) found.above += of_group[group--];
      uint32_t digit = GROUP * group + GROUP - 1;
      while (digit > 0 && found.above + of_digit[digit] < wanted) found.above += of_digit[digit--];
      found.weight |= digit << shift;
      __syncthreads();
    }
    return found;
  }

  // A warp's part of the tokens, in the order of its tokens and of the warps.
  DEVICE int part_tokens() const { return ceil_div(row.vocab, blockDim.x) * WARP; }

  // Where the amounts of tokens, added up by rising token, exceed `target`; their sum is known to.
  template <class Amount>
  DEVICE int find(uint64_t target, Amount amount) const {
    __shared__ uint64_t of_part[SAMPLE_WARPS];
    __shared__ int found;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int begin = warp * part_tokens(), end = min(begin + part_tokens(), row.vocab);
    uint64_t total = 0;
    for (int token = begin + lane; token < end; token += WARP) total += amount(weight_of(token), token);
    for (int offset = WARP / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(ALL_LANES, total, offset);
    if (lane == 0) of_part[warp] = total;
    __syncthreads();
    int part = 0;
    while (target >= of_part[part]) target -= of_part[part++];
    if (part == warp) {
      // Steps of a warp until the one that exceeds; then the first lane in it.
      for (int first = begin;; first += WARP) {
        int token = first + lane;
        uint64_t running = token < end ? amount(weight_of(token), token) : 0;
        for (int offset = 1; offset < WARP; offset *= 2) {
          uint64_t before = __shfl_up_sync(ALL_LANES, running, offset);
          if (lane >= offset) running += before;
        }
        uint32_t exceeding = __ballot_sync(ALL_LANES, running > target);
        if (exceeding != 0) {
          if (lane == 0) found = first + __ffs(static_cast<int>(exceeding)) - 1;
          break;
        }
        target -= __shfl_sync(ALL_LANES, running, WARP - 1);
      }
    }
    __syncthreads();
    int token = found;
    __syncthreads();
    return token;
  }

  // Keeps what weighs more than `weight`, and the first `num_ties` of what weighs as much.
  DEVICE void keep(uint32_t weight, uint64_t num_ties) {
    int last = find(num_ties - 1, [=](uint32_t of_token, int) -> uint64_t { return of_token == weight ? 1 : 0; });
    kept = {weight, last + 1};
  }

  DEVICE void keep_top_k(uint32_t top_k) {
    auto one = [](uint32_t weight, int) -> uint64_t { return weight > 0 ? 1 : 0; };
    if (sum(one) < top_k) return;
    Cut found = cut(top_k, one);
    keep(found.weight, top_k - found.above);
  }

  DEVICE void keep_top_p(double top_p) {
    uint64_t wanted = static_cast<uint64_t>(ceil(top_p * static_cast<double>(sum(kept))));
    Cut found = cut(wanted, kept);
    keep(found.weight, (wanted - found.above + found.weight - 1) / found.weight);
  }

  DEVICE void keep_min_p(uint32_t least_weight) {
    if (kept.weight < least_weight) kept = {least_weight - 1, 0};
  }

  DEVICE uint32_t take(double uniform) const {
    uint64_t total = sum(kept);
    uint64_t target = static_cast<uint64_t>(uniform * static_cast<double>(total));
    if (target >= total) target = total - 1;  // the product may round up
    return find(target, kept);
  }
};

template <class Row>
DEVICE uint32_t draw_token(const Row& row, uint32_t likeliest, const SampleRow& wanted) {
  Draw<Row> draw = {row, row.logit(likeliest), wanted.scale, {0, 0}};
  if (wanted.top_k > 0 && wanted.top_k < static_cast<uint32_t>(row.vocab)) draw.keep_top_k(wanted.top_k);
  if (wanted.top_p < 1.0) draw.keep_top_p(wanted.top_p);
  draw.keep_min_p(wanted.least_weight);
  return draw.take(wanted.uniform);
}

// ---- the row ---------------------------------------------------------------------------------------------------

// Changes the logits of the edited tokens, each once, and keeps what they were.
DEVICE void edit_logits(float* logits, const LogitEdit* edits, float* originals, int num_edits) {
  __syncthreads();
  for (int i = threadIdx.x; i < num_edits; i += blockDim.x) {
    LogitEdit edit = edits[i];
    float original = logits[edit.token], logit = __fadd_rn(original, edit.bias);
    logit = logit > 0.0f ? __fdiv_rn(logit, edit.repetition) : __fmul_rn(logit, edit.repetition);
    originals[i] = original;
    logits[edit.token] = __fsub_rn(logit, edit.subtracted);
  }
  __syncthreads();
}

DEVICE void restore_logits(float* logits, const LogitEdit* edits, const float* originals, int num_edits) {
  __syncthreads();
  for (int i = threadIdx.x; i < num_edits; i += blockDim.x) logits[edits[i].token] = originals[i];
  __syncthreads();
}

// The taken token first, then the likeliest ones.
DEVICE void report_logprobs(const Row<false>& row, uint32_t taken, int num_top, TokenLogprob* out) {
  uint64_t best = row.best_below(~0ull);
  double largest = row.logits[token_of(best)], sum = 0.0;
  uint32_t num_likelier = 0;
  float own = row.logits[taken];
  for (int token = threadIdx.x; token < row.vocab; token += blockDim.x) {
    sum += exp(static_cast<double>(row.logits[token]) - largest);
    num_likelier += row.logits[token] > own ? 1 : 0;
  }
  double log_sum = largest + log(block_sum(sum));
  uint32_t rank = 1 + block_sum(num_likelier);
  auto logprob = [&](uint32_t token) { return static_cast<float>(row.logits[token] - log_sum); };
  if (threadIdx.x == 0) out[0] = {taken, logprob(taken), rank};
  for (int i = 1; i <= num_top; i++) {
    uint32_t token = token_of(best);
    if (threadIdx.x == 0) out[i] = {token, logprob(token), static_cast<uint32_t>(i)};
    best = row.best_below(best);
  }
}

// Takes the token of a row whose likeliest one is known, if it is sound.
template <class Row>
DEVICE uint32_t take_token(const Row& row, uint32_t likeliest, const SampleRow& wanted) {
  return likeliest != NO_TOKEN && wanted.scale > 0.0f ? draw_token(row, likeliest, wanted) : likeliest;
}

// `edits`, `masks` and `originals` are of all rows together; `tokens` has one entry per row, `logprobs` 1 + MAX_TOP.
KERNEL(SAMPLE_THREADS, sample)(float* logits, int vocab, int stride, const SampleRow* rows, const LogitEdit* edits,
                               const uint32_t* masks, float* originals, uint32_t* tokens, TokenLogprob* logprobs) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  SampleRow wanted = rows[blockIdx.x];
  float* row_logits = logits + static_cast<int64_t>(blockIdx.x) * stride;
  edits += wanted.first_edit;
  originals += wanted.first_edit;
  Row<false> row = {row_logits, vocab, nullptr};
  uint32_t token = row.likeliest();
  bool is_sound = token != NO_TOKEN;
  if (is_sound && wanted.forced == NO_TOKEN) {
    if (wanted.num_edits > 0) edit_logits(row_logits, edits, originals, wanted.num_edits);
    if (wanted.first_mask_word >= 0) {
      Row<true> masked = {row_logits, vocab, masks + wanted.first_mask_word};
      token = take_token(masked, masked.likeliest(), wanted);
    } else {
      token = take_token(row, wanted.num_edits > 0 ? row.likeliest() : token, wanted);
    }
    if (wanted.num_edits > 0) restore_logits(row_logits, edits, originals, wanted.num_edits);
  }
  if (is_sound && wanted.forced != NO_TOKEN) token = wanted.forced;
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
  if (token != NO_TOKEN && wanted.num_top >= 0) {
    report_logprobs(row, token, wanted.num_top, logprobs + static_cast<int64_t>(blockIdx.x) * (1 + MAX_TOP));
  }
}
REGISTER_KERNEL(sample)
